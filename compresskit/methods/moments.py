"""What the calibrated methods ask of a weight and of the moments of its inputs."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.stats import InputStats


def checked(weight: Tensor, stats: InputStats | None) -> tuple[Tensor, InputStats]:
    """`weight` and the moments of its inputs in float32 on one device; None: isotropic ones.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats or None

    Raises
    ------
    ValueError : not a matrix, empty, not finite, second moments that are not finite, or moments
        of another number of inputs
    """
    linalg.check_weight(weight)
    columns = weight.shape[1]
    stats = InputStats.isotropic(columns) if stats is None else stats
    if len(stats.second) != columns:
        raise ValueError(
            f"moments of {len(stats.second)} inputs for a weight with {columns}; collect them from"
            f" this layer, or give InputStats.isotropic({columns})"
        )
    if not linalg.all_finite(stats.second):
        raise ValueError("the second moments hold NaN or infinite values; check the inputs")
    moments = (stats.second, stats.mean_abs, stats.max_abs)
    tensors = (moment.detach().to(weight.device).float() for moment in moments)
    return weight.detach().float(), InputStats(stats.count, *tensors)


def without_dead_inputs(weight: Tensor, stats: InputStats, damp: float) -> tuple[Tensor, Tensor]:
    """Weights of inputs that are always 0 become 0, and each such input is given the mean moment.

    E[x_j^2] = 0 says that column j of the weight is never used. Its row and column of E[x x^T] are
    0 as well, so it is independent of the others; a moment of the mean size makes the matrix
    invertible there, in any units, and leaves the solution for the live inputs as it is.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats
    damp : float
        as for `InputStats.damped`; the mean it refers to is that of all inputs, dead ones included

    Returns
    -------
    (m, n) weight and (n, n) damped second moments
    """
    diagonal = stats.second.diagonal()
    dead = diagonal == 0
    filler = diagonal.mean() if (diagonal > 0).any() else torch.ones_like(diagonal[0])
    second = stats.damped(damp) + torch.diag(torch.where(dead, filler, 0))
    return weight.masked_fill(dead, 0), second
