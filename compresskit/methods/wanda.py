"""Wanda: what a weight adds to the output, on average, decides whether it goes."""

import torch
from torch import Tensor

from compresskit.methods.moments import checked
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats


def wanda(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    pattern: Pattern,
    dtype: torch.dtype = torch.float32,
) -> Sparse:
    """The weights with the largest |w_ij| sqrt(E[x_j^2]) stay as they are.

    w_ij^2 E[x_j^2] is the output error of removing that weight alone. The errors of several add
    up only if their inputs are uncorrelated; then no mask with the pattern has a smaller error.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16
    stats : InputStats
        moments of x; None: isotropic ones, and the result is that of `magnitude`
    pattern : Pattern
        how many go, and what is compared; the published method compares within a row
    dtype : torch.dtype
        at which the kept weights are stored

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together; what
        `Pattern.mask` and `Sparse.of` refuse

    Notes
    -----
    O(m n) time. Sun et al., "A simple and effective pruning approach for large language models",
    ICLR 2024, eq. 1. Book: chapter "One-shot pruning of trained transformers".

    Examples
    --------
    A small weight of a loud input outlives a large one of a quiet input.

    >>> stats = InputStats.of(torch.tensor([[0.1, 1.0]]))
    >>> wanda(torch.tensor([[2.0, 1.0]]), stats, pattern=Pattern(0.5)).decode()
    tensor([[0., 1.]])
    """
    values, stats = checked(weight, stats)
    return Sparse.of(values, pattern.mask(values.abs() * stats.rms), dtype=dtype)
