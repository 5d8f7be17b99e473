"""What the low-rank methods share: how two factors are written."""

from collections.abc import Callable

import torch
from torch import Tensor

from compresskit.code import Code
from compresskit.lowrank import LowRank, stored
from compresskit.methods.moments import checked
from compresskit.stats import InputStats

Method = Callable[[Tensor, InputStats | None], Code]


def written(
    left: Tensor,
    right: Tensor,
    stats: InputStats | None,
    factors: Method | None,
    dtype: torch.dtype,
) -> LowRank:
    """left @ right, with both stored as they are or each by a method of its own.

    The right factor sees the layer's inputs x, so a method gets their moments for it; the left one
    sees R x, whose second moments are R E[x x^T] R^T.

    Parameters
    ----------
    left : (m, k) tensor
        with orthonormal columns, so that an error of `right` counts as it is
    right : (k, n) tensor
    stats : InputStats or None
        of x
    factors : callable or None
        (weight, stats) -> Code
    dtype : torch.dtype
        of both where `factors` is None

    Raises
    ------
    ValueError : `dtype` does not hold their range; moments of another number of inputs; what
        `factors` raises
    """
    if factors is None:
        return LowRank(stored(left, dtype), stored(right, dtype))
    left, right = left.float().contiguous(), right.float().contiguous()
    if stats is None:
        return LowRank(factors(left, None), factors(right, None))
    _, stats = checked(right, stats)
    first = factors(right, stats)
    return LowRank(factors(left, _behind(first.decode().double(), stats)), first)


def _behind(right: Tensor, stats: InputStats) -> InputStats:
    """Second moments of R x; its absolute moments are not determined by those of x (NaN)."""
    second = right @ stats.second.to(right) @ right.T
    unknown = torch.full_like(second[0], torch.nan)
    return InputStats(stats.count, ((second + second.T) / 2).float(), unknown, unknown)
