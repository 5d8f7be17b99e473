"""Quantizers whose every byte is laid down by a formula: the same bytes as ggml and gguf-py.

Each takes (blocks, size) float32 weights and returns (blocks, bytes per block) uint8. None is
optimal: the step is read off the extreme weights of a block, not fitted to all of them. The
operations are those of the reference, in its order, because ties are decided by the last bit.

References
----------
`quantize_row_*_ref` in ggml-quants.c; the Python package `gguf` 0.19.0, module `quants`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compresskit.formats.gguf.fields import packed


def f32(blocks: Tensor) -> Tensor:
    """The bytes of a float32."""
    return _bytes(blocks)


def f16(blocks: Tensor) -> Tensor:
    """The nearest float16, of two the even one."""
    return _bytes(_finite(blocks, torch.float16))


def bf16(blocks: Tensor) -> Tensor:
    """The nearest bfloat16, of two the even one."""
    return _bytes(_finite(blocks, torch.bfloat16))


def q8_0(blocks: Tensor) -> Tensor:
    """d = max|w| / 127, q = w / d to the nearest integer, halves away from 0."""
    d = _divided(blocks.abs().amax(1, keepdim=True), 127)
    return torch.cat([_half(d), _rounded(blocks * _inverse(d)).char().view(torch.uint8)], 1)


def q4_0(blocks: Tensor) -> Tensor:
    """d = w* / -8 with w* the weight of the largest magnitude, so that q = 0 stands for it."""
    d, q = _signed_step(blocks, 8)
    return torch.cat([_half(d), packed(q, 4, 16)], 1)


def q5_0(blocks: Tensor) -> Tensor:
    """d = w* / -16: Q4_0 with one bit more."""
    d, q = _signed_step(blocks, 16)
    return torch.cat([_half(d), packed(q >> 4, 1, 1), packed(q, 4, 16)], 1)


def q4_1(blocks: Tensor) -> Tensor:
    """m = min w, d = (max w - m) / 15."""
    d, m, q = _from_the_least(blocks, 15)
    return torch.cat([_half(d), _half(m), packed(q, 4, 16)], 1)


def q5_1(blocks: Tensor) -> Tensor:
    """m = min w, d = (max w - m) / 31."""
    d, m, q = _from_the_least(blocks, 31)
    return torch.cat([_half(d), _half(m), packed(q >> 4, 1, 1), packed(q, 4, 16)], 1)


def tq1_0(blocks: Tensor) -> Tensor:
    """d = max|w|, q in {0, 1, 2}; five q are a fraction of 256 in base 3, rounded up."""
    d, q = _ternary(blocks)
    runs = q[:, :160].reshape(-1, 5, 32), q[:, 160:240].reshape(-1, 5, 16), q[:, 240:].reshape(
        -1, 4, 4
    )  # fmt: skip
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=q.device)[:, None]
    numbers = torch.cat([(run * powers[: run.shape[1]]).sum(1) for run in runs], 1)
    return torch.cat([((numbers * 256 + 242) // 243).byte(), _half(d)], 1)


def tq2_0(blocks: Tensor) -> Tensor:
    """d = max|w|, q in {0, 1, 2}."""
    d, q = _ternary(blocks)
    return torch.cat([packed(q, 2, 32), _half(d)], 1)


#: The quantizers by the name of their type.
QUANTIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": f32, "F16": f16, "BF16": bf16, "Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1,
    "Q5_0": q5_0, "Q5_1": q5_1, "TQ1_0": tq1_0, "TQ2_0": tq2_0,
}  # fmt: skip


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(torch.stack(values.aminmax()).to(dtype)).all():
        raise ValueError(
            f"numbers up to {values.abs().max():g} where {str(dtype).removeprefix('torch.')} is"
            f" stored, whose largest is {torch.finfo(dtype).max:g}; scale the weights down"
        )
    return values.to(dtype)


def _half(step: Tensor) -> Tensor:
    return _bytes(_finite(step, torch.float16))


def _divided(values: Tensor, by: int) -> Tensor:
    """The quotient rounded once. By a Python number, CUDA multiplies with its rounded inverse."""
    return values / torch.full_like(values, by)


def _inverse(step: Tensor) -> Tensor:
    """1 / step, and 0 where there is none: for 0, and for steps that float16 takes for 0 anyway."""
    inverse = 1 / step
    return torch.where(torch.isfinite(inverse), inverse, 0)


def _rounded(values: Tensor) -> Tensor:
    """To the nearest integer, halves away from 0."""
    size = values.abs()
    whole = size.floor()
    whole += size.sub_(whole).mul_(2).floor_()
    return whole.copysign_(values)


def _level(values: Tensor, half: float, top: int) -> Tensor:
    """The integer part of values + half, at most `top`; nothing here lies below 0."""
    return values.add_(half).clamp_(max=top).byte()


def _signed_step(blocks: Tensor, center: int) -> tuple[Tensor, Tensor]:
    d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -center
    return d, _level(blocks * _inverse(d), center + 0.5, 2 * center - 1)


def _from_the_least(blocks: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    least = blocks.gather(1, blocks.argmin(1, keepdim=True))  # the first one: 0 has two signs
    d = _divided(blocks.amax(1, keepdim=True) - least, top)
    return d, least, _level((blocks - least).mul_(_inverse(d)), 0.5, top)


def _ternary(blocks: Tensor) -> tuple[Tensor, Tensor]:
    d = blocks.abs().amax(1, keepdim=True)
    return d, _rounded(blocks * _inverse(d)).add_(1).byte()
