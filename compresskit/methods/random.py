"""Random pruning: the control that every criterion must beat."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats


def random(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    pattern: Pattern,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Sparse:
    """Weights chosen by chance go; the same number, with the same pattern, as by a criterion.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16
    stats : InputStats
        not used
    pattern : Pattern
        how many go, and what is compared
    seed : int
        of the scores, which are uniform and drawn on the CPU: the same on every device
    dtype : torch.dtype
        at which the kept weights are stored

    Raises
    ------
    ValueError : as `magnitude`

    Notes
    -----
    Layers of one shape are pruned alike by one seed; give each layer of a model its own.
    Book: chapter "Removing weights".
    """
    linalg.check_weight(weight)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    return Sparse.of(weight, pattern.mask(scores.to(weight.device)), dtype=dtype)
