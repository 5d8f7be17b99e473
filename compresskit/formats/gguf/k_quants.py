"""Q4_K, Q5_K and Q6_K: a search for scales that the format can store and that lose least.

A super-block of 256 weights has sub-blocks j with w = (d s_j) q - (dmin t_j): d and dmin float16,
s_j and t_j small integers, q in 4, 5 or 6 bits. (Q6_K has no minima, and signed scales.) All of
them are chosen together:

1. without the constraint on scales, each sub-block starts from several steps and alternates between
   rounding and the weighted least squares fit of scale and minimum; each keeps its best;
2. for several d and dmin, each sub-block tries the s_j around its best scale and, for each, the t_j
   that is best for the q that follow; then d and dmin are fitted to those integers, by least
   squares over the whole super-block, and the s_j and t_j are chosen once more;
3. what is kept is the candidate with the least error as a decoder will see it.

The error as a function of one scale has a minimum wherever the roundings change, so stage 2 must
look around: of equal work, more s_j for few d are better than more d.

Every step that compares errors of the second stage does so after rounding all that the file rounds.
The loops are in `search`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compresskit.formats.gguf.blocks import TYPES
from compresskit.formats.gguf.fields import packed
from compresskit.formats.gguf.search import free_fit, levels, stored_fit

_TOGETHER = 64  # super-blocks searched at once: their weights stay in the nearer caches
_LEAST = 2.0**-20  # of the largest importance; so that columns without any are stored as well


@dataclass(frozen=True)
class _Format:
    """What the search must know: levels, the range of s, the candidates of both stages."""

    run: int  # weights of a sub-block
    bounds: tuple[int, int, int, int]  # of q, of s
    shifted: bool  # whether there are minima
    reach: int  # how far from the scale of stage 1 s is tried
    starts: np.ndarray  # (k, 2): the range of a start, its lower end, in those of the weights
    divisors: np.ndarray  # (k, 2): d is the largest scale over this, dmin the largest minimum


_RANGES = [(1.0, 0.0)] + [
    (1 - 0.03 * i, 0.03 * i * p) for i in range(1, 7) for p in (0.0, 0.5, 1.0)
]
_PAIRS = [(63, 63), (60, 61), (61, 58), (57, 60)]
_SIGNED = [(sign * r, 0) for r in (1.0, 0.94) for sign in (1, -1)]
_SINGLE = [(127, 1), (122, 1), (117, 1)]
K_QUANTS = {
    name: _Format(*fields, *(np.array(candidates, np.float32) for candidates in tried))
    for name, fields, tried in (
        ("Q4_K", (32, (0, 15, 0, 63), True, 3), (_RANGES, _PAIRS)),
        ("Q5_K", (32, (0, 31, 0, 63), True, 3), (_RANGES, _PAIRS)),
        ("Q6_K", (16, (-32, 31, -128, 127), False, 8), (_SIGNED, _SINGLE)),
    )
}


def searched(weight: Tensor, type: str, importance: Tensor) -> Tensor:
    """Blocks that make sum_ij importance_j (w_ij - w'_ij)^2 small.

    Parameters
    ----------
    weight : (m, n) tensor
        finite; n a multiple of 256
    type : str
        a key of `K_QUANTS`
    importance : (n,) tensor, float32
        from 0 to 1

    Returns
    -------
    (m n / 256, bytes per block) tensor, uint8, on the CPU

    Raises
    ------
    ValueError : weights so large that their scales overflow float16

    Notes
    -----
    About 200 roundings of each weight. Nothing here proves that no better blocks exist.
    """
    form = K_QUANTS[type]
    blocks = weight.reshape(-1, 256)
    importance = importance.clamp(min=_LEAST).reshape(-1, 256)
    limit = 65504.0 * form.bounds[3]
    largest = max(abs(end) for end in blocks.aminmax())
    if largest > limit:
        raise ValueError(
            f"a weight of {largest:g}; {type} holds up to {limit:g}, where its float16"
            " scales end; scale the weights down"
        )
    stored = torch.empty((len(blocks), TYPES[type].nbytes), dtype=torch.uint8)
    for start in range(0, len(blocks), _TOGETHER):
        some = blocks[start : start + _TOGETHER].cpu().float()
        columns = torch.arange(start, start + len(some)) % len(importance)
        x, w = (_lanes(t, form.run).numpy() for t in (some, importance[columns]))
        stored[start : start + len(some)] = _WRITERS[type](*_found(form, x, w, len(some)))
    return stored


def _found(form: _Format, x: np.ndarray, w: np.ndarray, count: int) -> tuple[Tensor, ...]:
    """(b, 2) d and dmin, (2, b, subs) s and t, (b, 256) q - low, of b = `count` super-blocks."""
    low, high, least, most = (np.float32(bound) for bound in form.bounds)
    free = free_fit(x, w, high - low, low, high, form.shifted, form.starts)
    half, integers = stored_fit(
        x, w, count, low, high, least, most, form.shifted, free, form.divisors, form.reach
    )
    d, m = np.tile(half.T, len(integers[0]) // count)
    nearest = levels(x, d * integers[0], -(m * integers[1]), low, high)
    by_block = torch.from_numpy(nearest).reshape(form.run, -1, count).permute(2, 1, 0)
    return (
        torch.from_numpy(half),
        torch.from_numpy(integers).reshape(2, -1, count).transpose(1, 2),
        by_block.reshape(count, 256),
    )


def _lanes(blocks: Tensor, run: int) -> Tensor:
    """(b, 256) -> (run, (256 / run) b): a column for each sub-block, those of one j together."""
    return blocks.reshape(len(blocks), -1, run).permute(2, 1, 0).reshape(run, -1).contiguous()


def _write_q4(halves: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    return torch.cat([_halves(halves), _six_bits(scales), packed(levels, 4, 32)], 1)


def _write_q5(halves: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    fields = packed(levels >> 4, 1, 32), packed(levels, 4, 32)
    return torch.cat([_halves(halves), _six_bits(scales), *fields], 1)


def _write_q6(halves: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    fields = packed(levels, 4, 64), packed(levels >> 4, 2, 32)
    return torch.cat([*fields, scales[0].char().view(torch.uint8), _halves(halves[:, :1])], 1)


_WRITERS = {"Q4_K": _write_q4, "Q5_K": _write_q5, "Q6_K": _write_q6}


def _halves(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


def _six_bits(scales: Tensor) -> Tensor:
    """(2, b, 8) scales and minima -> (b, 12) bytes, as `blocks._scales_and_minima` reads them."""
    scale, least = scales.byte()
    first = [values[:, :4] | (values[:, 4:] >> 4) << 6 for values in (scale, least)]
    return torch.cat([*first, (scale[:, 4:] & 15) | (least[:, 4:] & 15) << 4], 1)
