"""A truncated singular value decomposition from a few random products."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.code import check_float
from compresskit.lowrank import LowRank, check_rank
from compresskit.methods.factors import Method, written
from compresskit.stats import InputStats


def randomized_svd(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    rank: int,
    oversample: int = 10,
    power: int = 2,
    seed: int = 0,
    factors: Method | None = None,
    dtype: torch.dtype = torch.float16,
) -> LowRank:
    """The truncated decomposition of Q Q^T W, Q a random basis of nearly all that W returns.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        as for `svd`
    rank : int
        as for `svd`
    oversample : int
        columns of Q beside the `rank` wanted, 0 or more; at most min(m, n) in all
    power : int
        as for `linalg.range_finder`: without it, a slowly falling spectrum is approximated badly
    seed : int
    factors : callable
        as for `svd`
    dtype : torch.dtype
        as for `svd`

    Returns
    -------
    LowRank

    Raises
    ------
    ValueError : as `svd`; `oversample` or `power` below 0

    Notes
    -----
    O(m n (k + p)(power + 1)), in the float32 of its products. The expected squared error without
    power steps is at most 1 + k/(p - 1) times that of `svd`, if p is 2 or more.
    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011,
    theorem 10.5.
    Book: chapter "Truncated SVD".
    """
    linalg.check_weight(weight)
    check_float("dtype", dtype)
    check_rank(rank, *weight.shape)
    if oversample < 0:
        raise ValueError(f"oversample={oversample}; it must be 0 or more, for instance 10")
    work = weight.detach().float()
    size = min(rank + oversample, *work.shape)
    basis = linalg.range_finder(work, size, power=power, seed=seed)
    inner, singular, right = torch.linalg.svd(basis.T @ work, full_matrices=False)
    left, kept = basis @ inner[:, :rank], singular[:rank, None] * right[:rank]
    return written(left, kept, stats, factors, dtype)
