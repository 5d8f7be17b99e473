"""Block formats: how ggml stores 1, 32 or 256 consecutive weights of a row in a few bytes.

Every decoder repeats the float32 operations of the reference in their order, so its values are
the same to the last bit. Where several formulas are equal in real arithmetic, that order decides.

(Over 200 lines, because it is a reference of fifteen layouts, to be read beside one another.)

Notation of the layouts: bytes in file order; d, dmin and m are float16, little-endian. A field of
fewer than 8 bits is never split over consecutive weights: a run of bytes holds, in its lowest
bits, the next run of weights, in its higher bits the runs after that (`fields.split`).

References
----------
ggml-common.h and ggml-quants.c of llama.cpp; the Python package `gguf` 0.19.0, module `quants`.
Book: chapter "Block formats in the wild".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.code import Leaf, check_shape
from compresskit.formats.gguf.fields import split

_PIECE = 1 << 18  # weights decoded at a time on a CPU: few calls, temporaries of few megabytes


@dataclass(frozen=True)
class BlockType:
    """A block format: `size` weights in `nbytes` bytes.

    Parameters
    ----------
    name : str
    number : int
        what a GGUF file calls it
    size : int
        weights per block
    nbytes : int
        bytes per block
    decode : callable
        (blocks, nbytes) uint8 tensor -> (blocks, size) float32 tensor
    """

    name: str
    number: int
    size: int
    nbytes: int
    decode: Callable[[Tensor], Tensor]

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, its share of the block's scales included."""
        return 8 * self.nbytes / self.size


@dataclass(frozen=True, eq=False)
class Blocks(Leaf):
    """A tensor stored in blocks, row after row; each row is a whole number of blocks.

    Parameters
    ----------
    tensor : (blocks, bytes per block) tensor, uint8
        it may lie in a memory-mapped file
    type : str
        a key of `TYPES`
    dims : tuple of int
        shape of the decoded tensor

    Raises
    ------
    ValueError : an unknown type; bytes or dimensions that do not fit it

    Examples
    --------
    Scale 2 in float16, then 32 signed bytes.

    >>> data = bytes([0, 64, 1, 255]) + bytes(30)
    >>> Blocks.from_bytes(data, {"type": "Q8_0", "shape": [32]}).decode()[:3]
    tensor([ 2., -2.,  0.])
    """

    tensor: Tensor
    type: str
    dims: tuple[int, ...]

    def __post_init__(self):
        kind = block_type(self.type)
        dims, count = check_shape(self.dims)
        object.__setattr__(self, "dims", tuple(dims))
        if kind.size > 1 and (not dims or dims[-1] % kind.size):
            raise ValueError(
                f"rows of {dims[-1] if dims else 1} weights; {self.type} takes multiples of"
                f" {kind.size}, for instance {kind.size}"
            )
        expected = (count // kind.size, kind.nbytes)
        if self.tensor.dtype != torch.uint8 or self.tensor.shape != expected:
            raise ValueError(
                f"{tuple(self.tensor.shape)} {self.tensor.dtype} given; {dims} weights in"
                f" {self.type} are {expected} uint8: {expected[0]} blocks of {kind.nbytes} bytes"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims

    def decode(self) -> Tensor:
        """A float32 tensor of shape `dims`; of F32 it shares the memory of the blocks."""
        kind = TYPES[self.type]
        count = len(self.tensor)
        step = max(_PIECE // kind.size, 1)
        if count and (kind.size == 1 or count <= step or self.tensor.device.type != "cpu"):
            return kind.decode(self.tensor).reshape(self.dims)
        out = torch.empty((count, kind.size), device=self.tensor.device)
        for start in range(0, count, step):
            out[start : start + step] = kind.decode(self.tensor[start : start + step])
        return out.reshape(self.dims)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()

    def to_bytes(self) -> bytes:
        return self.tensor.detach().cpu().contiguous().numpy().tobytes()

    def header(self) -> dict:
        return {"type": self.type, "shape": self.dims}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Blocks:
        kind = block_type(header.get("type"))
        dims, _ = check_shape(header.get("shape"))
        if len(data) % kind.nbytes:
            raise ValueError(f"{len(data)} bytes; a block of {kind.name} takes {kind.nbytes}")
        flat = torch.tensor([], dtype=torch.uint8)
        if data:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return cls(flat.reshape(-1, kind.nbytes), kind.name, tuple(dims))


def block_type(name: str) -> BlockType:
    """The block format of that name; `ValueError` with the known names if there is none.

    Parameters
    ----------
    name : str
    """
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(f"no block type {name!r}; there are {', '.join(TYPES)}")
    return kind


def _half(blocks: Tensor, at: int) -> Tensor:
    """(blocks, 1) the float16 at byte `at` of each block."""
    return blocks[:, at : at + 2].clone(memory_format=torch.contiguous_format).view(
        torch.float16
    ).float()  # fmt: skip


def _f32(blocks: Tensor) -> Tensor:
    """4 bytes: an IEEE float32."""
    aligned = blocks.data_ptr() % 4 == 0 and blocks.storage_offset() % 4 == 0
    aligned = aligned and blocks.is_contiguous()
    return (blocks if aligned else blocks.clone(memory_format=torch.contiguous_format)).view(
        torch.float32
    )


def _f16(blocks: Tensor) -> Tensor:
    """2 bytes: an IEEE float16."""
    return _half(blocks, 0)


def _bf16(blocks: Tensor) -> Tensor:
    """2 bytes: the upper half of a float32."""
    halves = blocks.clone(memory_format=torch.contiguous_format)
    return halves.view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    """34 bytes: d; q, 32 signed bytes. w = q d."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor) -> Tensor:
    """18 bytes: d; 16 bytes with q of weights 0-15 in the low 4 bits, 16-31 in the high 4.

    w = d (q - 8).
    """
    return split(blocks[:, 2:], 4, 16).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """20 bytes: d; m; q as in Q4_0. w = d q + m."""
    return split(blocks[:, 4:], 4, 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    """22 bytes: d; 4 bytes with bit 4 of q, weight i in bit i % 8 of byte i // 8; 16 bytes with
    bits 0-3 of q as in Q4_0. w = d (q - 16).
    """
    q = split(blocks[:, 6:], 4, 16) | split(blocks[:, 2:6], 1, 1) << 4
    return q.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """24 bytes: d; m; q as in Q5_0. w = d q + m."""
    q = split(blocks[:, 8:], 4, 16) | split(blocks[:, 4:8], 1, 1) << 4
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _of_sub_blocks(q: Tensor, scale: Tensor, least: Tensor | None = None) -> Tensor:
    """scale q - least in float32: (blocks, 256) and, one for each sub-block, (blocks, 8 or 16)."""
    w = q.reshape(*scale.shape, -1).float().mul_(scale[:, :, None])
    if least is not None:
        w.sub_(least[:, :, None])
    return w.reshape(q.shape)


def _q2_k(blocks: Tensor) -> Tensor:
    """84 bytes for 16 sub-blocks of 16 weights: 16 bytes with the scale s of sub-block j in the
    low 4 bits of byte j and its minimum t in the high 4; 64 bytes, q in 2 bits, runs of 32; d;
    dmin. w = (d s) q - (dmin t).
    """
    s, t = blocks[:, :16] & 15, blocks[:, :16] >> 4
    q = split(blocks[:, 16:80], 2, 32)
    return _of_sub_blocks(q, _half(blocks, 80) * s.float(), _half(blocks, 82) * t.float())


def _q3_k(blocks: Tensor) -> Tensor:
    """110 bytes for 16 sub-blocks of 16 weights: 32 bytes with bit 2 of q, a run of 32 for each
    bit; 64 bytes with bits 0 and 1 of q, runs of 32; 12 bytes with the scales s, 6 bits each: the
    low 4 bits of s in 8 bytes (a run of 8), the high 2 bits in 4 (a run of 4); d.

    w = (d (s - 32)) (q - 4).
    """
    q = split(blocks[:, 32:96], 2, 32) | split(blocks[:, :32], 1, 32) << 2
    s = split(blocks[:, 96:104], 4, 8) | split(blocks[:, 104:108], 2, 4) << 4
    scale = _half(blocks, 108) * s.float().sub_(32)
    # The reference has q - 4 as an integer, so that a weight of 0 is +0 times the scale.
    return _of_sub_blocks(q.float().sub_(4), scale)


def _scales_and_minima(stored: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, 12) bytes -> (blocks, 8) scales and (blocks, 8) minima of 6 bits, as float32.

    Bytes 0-3 hold in their low 6 bits the scales 0-3, bytes 4-7 the minima 0-3, and all eight in
    their high 2 bits the bits 4 and 5 of the scales 4-7 and of the minima 4-7. Bytes 8-11 hold
    the bits 0-3 of both: of the scales in the low half, of the minima in the high half.
    """
    first, last = stored[:, :8], stored[:, 8:]
    low, high = first & 63, (first >> 6) << 4
    scale = torch.cat([low[:, :4], (last & 15) | high[:, :4]], 1)
    least = torch.cat([low[:, 4:], (last >> 4) | high[:, 4:]], 1)
    return scale.float(), least.float()


def _q4_k(blocks: Tensor) -> Tensor:
    """144 bytes for 8 sub-blocks of 32 weights: d; dmin; 12 bytes of scales s and minima t
    (`_scales_and_minima`); 128 bytes, q in 4 bits, runs of 32. w = (d s) q - (dmin t).
    """
    s, t = _scales_and_minima(blocks[:, 4:16])
    q = split(blocks[:, 16:], 4, 32)
    return _of_sub_blocks(q, _half(blocks, 0) * s, _half(blocks, 2) * t)


def _q5_k(blocks: Tensor) -> Tensor:
    """176 bytes for 8 sub-blocks of 32 weights: d; dmin; 12 bytes of s and t as in Q4_K; 32 bytes
    with bit 4 of q, a run of 32 for each bit; 128 bytes with bits 0-3 of q, runs of 32.

    w = (d s) q - (dmin t).
    """
    s, t = _scales_and_minima(blocks[:, 4:16])
    q = split(blocks[:, 48:], 4, 32) | split(blocks[:, 16:48], 1, 32) << 4
    return _of_sub_blocks(q, _half(blocks, 0) * s, _half(blocks, 2) * t)


def _q6_k(blocks: Tensor) -> Tensor:
    """210 bytes for 16 sub-blocks of 16 weights: 128 bytes with bits 0-3 of q, runs of 64; 64
    bytes with bits 4 and 5 of q, runs of 32; 16 signed bytes of scales s; d.

    w = (d s) (q - 32).
    """
    q = split(blocks[:, :128], 4, 64) | split(blocks[:, 128:192], 2, 32) << 4
    s = blocks[:, 192:208].view(torch.int8).float()
    return _of_sub_blocks(q.float().sub_(32), _half(blocks, 208) * s)


def _digits(stored: Tensor, count: int) -> Tensor:
    """(blocks, n) bytes -> (blocks, count n) the first digits, in base 3, of each byte / 256.

    All first digits, then all second ones, and so on. Multiplication modulo 256 removes the
    digits before; the next one is the integer part of three times what is left.
    """
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=stored.device)[:count]
    left = stored[:, None, :] * powers[:, None]
    return ((left.short() * 3) >> 8).reshape(len(stored), -1)


def _tq1_0(blocks: Tensor) -> Tensor:
    """54 bytes: 32 + 16 bytes of five digits in base 3, 4 bytes of four digits; d. In a run of 32,
    16 or 4 bytes, the first digits are the next weights, then the second ones. w = d (q - 1).
    """
    parts = (blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)
    q = torch.cat([_digits(stored, count) for stored, count in parts], 1)
    return q.float().sub_(1).mul_(_half(blocks, 52))


def _tq2_0(blocks: Tensor) -> Tensor:
    """66 bytes: 64 bytes, q in 2 bits, runs of 32; d. w = d (q - 1)."""
    return split(blocks[:, :64], 2, 32).float().sub_(1).mul_(_half(blocks, 64))


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("F32", 0, 1, 4, _f32),
        BlockType("F16", 1, 1, 2, _f16),
        BlockType("BF16", 30, 1, 2, _bf16),
        BlockType("Q8_0", 8, 32, 34, _q8_0),
        BlockType("Q4_0", 2, 32, 18, _q4_0),
        BlockType("Q4_1", 3, 32, 20, _q4_1),
        BlockType("Q5_0", 6, 32, 22, _q5_0),
        BlockType("Q5_1", 7, 32, 24, _q5_1),
        BlockType("Q2_K", 10, 256, 84, _q2_k),
        BlockType("Q3_K", 11, 256, 110, _q3_k),
        BlockType("Q4_K", 12, 256, 144, _q4_k),
        BlockType("Q5_K", 13, 256, 176, _q5_k),
        BlockType("Q6_K", 14, 256, 210, _q6_k),
        BlockType("TQ1_0", 34, 256, 54, _tq1_0),
        BlockType("TQ2_0", 35, 256, 66, _tq2_0),
    )
}
