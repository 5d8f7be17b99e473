"""The matrix of rank k whose outputs are nearest, for the inputs a layer really gets."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.code import check_float
from compresskit.lowrank import LowRank, check_rank
from compresskit.methods.factors import Method, written
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.stats import InputStats


def whitened_svd(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    rank: int,
    damp: float = 1e-4,
    factors: Method | None = None,
    dtype: torch.dtype = torch.float16,
) -> LowRank:
    """[W L]_k L^-1 with L L^T = E[x x^T] + damping: the least E|W x - M x|^2 of rank k.

    The expected squared error of the outputs is the sum of the squared singular values of W L that
    are left out. The inputs of the left factor are uncorrelated.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        second moments of the inputs; None: isotropic, where this is `svd`
    rank : int
        as for `svd`
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal: what inputs that calibration
        hardly saw may cost
    factors : callable
        as for `svd`; it gets the moments of what each factor sees
    dtype : torch.dtype
        as for `svd`

    Returns
    -------
    LowRank

    Raises
    ------
    ValueError : as `svd`; moments that do not fit the weight or are not finite; `damp` so small
        that they are not positive definite

    Notes
    -----
    O(m n min(m, n) + n^3), in float64. Any L with L L^T = C gives the same matrix.
    Wang et al., "SVD-LLM: Truncation-aware singular value decomposition for large language model
    compression", 2024, section 3.1; Eckart and Young, 1936.
    Book: chapter "Truncated SVD".
    """
    check_float("dtype", dtype)
    weight, moments = checked(weight, stats)
    check_rank(rank, *weight.shape)
    weight, second = without_dead_inputs(weight, moments, damp)
    root = linalg.cholesky(second.double())
    left, singular, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    kept = singular[:rank, None] * right[:rank]
    kept = torch.linalg.solve_triangular(root, kept, upper=False, left=False)
    return written(left[:, :rank], kept, None if stats is None else moments, factors, dtype)
