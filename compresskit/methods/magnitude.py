"""Magnitude pruning: the smallest weights go."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats


def magnitude(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    pattern: Pattern,
    dtype: torch.dtype = torch.float32,
) -> Sparse:
    """argmin ||W - W'||_F over all W' that have the pattern: the largest |w_ij| stay as they are.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16
    stats : InputStats
        not used: the criterion does not look at the inputs
    pattern : Pattern
        how many go, and what is compared
    dtype : torch.dtype
        at which the kept weights are stored

    Raises
    ------
    ValueError : not a matrix, empty, not finite; what `Pattern.mask` and `Sparse.of` refuse

    Notes
    -----
    O(m n) time. Han et al., "Learning both weights and connections for efficient neural networks",
    NeurIPS 2015. Book: chapter "Removing weights".

    Examples
    --------
    >>> magnitude(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), pattern=Pattern(0.5)).decode()
    tensor([[3., 0., 2., 0.]])
    """
    linalg.check_weight(weight)
    return Sparse.of(weight, pattern.mask(weight.abs()), dtype=dtype)
