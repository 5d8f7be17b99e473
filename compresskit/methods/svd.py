"""The nearest matrix of rank k: a truncated singular value decomposition."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.code import check_float
from compresskit.lowrank import LowRank, check_rank
from compresskit.methods.factors import Method, written
from compresskit.stats import InputStats


def svd(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    rank: int,
    factors: Method | None = None,
    dtype: torch.dtype = torch.float16,
) -> LowRank:
    """U_k (S_k V_k^T): the nearest matrix of rank k, in the Frobenius norm and others.

    The squared error is the sum of the squared singular values left out.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        not used for the decomposition; handed to `factors`
    rank : int
        1 to (m n - 1) // (m + n): above it, the factors hold as many numbers as the matrix
    factors : callable
        a method for the factors themselves, for instance a `round_to_nearest`; None: both are
        stored in `dtype`
    dtype : torch.dtype
        float32, float16 or bfloat16

    Returns
    -------
    LowRank
        k(m + n) numbers

    Raises
    ------
    ValueError : not a matrix, empty, not finite; a rank out of range; a `dtype` that does not hold
        the factors' range

    Notes
    -----
    O(m n min(m, n)), in float64. U has entries of one size and S V^T rows of falling sizes, which
    suits a grid per row.
    Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; Mirsky,
    "Symmetric gauge functions and unitarily invariant norms", 1960.
    Book: chapter "Truncated SVD".

    Examples
    --------
    >>> code = svd(torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 6.0)), rank=1)
    >>> code.decode().round()[3]
    tensor([ 4.,  8., 12., 16., 20.])
    """
    linalg.check_weight(weight)
    check_float("dtype", dtype)
    check_rank(rank, *weight.shape)
    left, singular, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    kept = singular[:rank, None] * right[:rank]
    return written(left[:, :rank], kept, stats, factors, dtype)
