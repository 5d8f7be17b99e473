"""A mask found elsewhere, as a method."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.sparse import Sparse
from compresskit.stats import InputStats


def masked(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    mask: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Sparse:
    """The weights where `mask` is True; for masks of several layers together, or of tickets.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16
    stats : InputStats
        not used
    mask : (m, n) bool tensor
        for instance one of `sparse.pooled_masks`
    dtype : torch.dtype
        at which the kept weights are stored

    Raises
    ------
    ValueError : a mask of another shape or type; as `magnitude`

    Notes
    -----
    Book: chapter "Removing weights".
    """
    linalg.check_weight(weight)
    return Sparse.of(weight, mask.to(weight.device), dtype=dtype)
