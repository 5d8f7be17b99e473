"""Round to nearest: each weight to the closest point of its group's grid."""

import torch
from torch import Tensor

from compresskit.affine import Fit, Quantized, QuantSpec, fit_grid, minmax
from compresskit.stats import InputStats


def round_to_nearest(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    spec: QuantSpec,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """The nearest matrix to `weight`, entry by entry, on the grid of `spec`.

    Rounding minimizes ||W - Q||_F on a given grid, and E||(W - Q) x||^2 only where the inputs
    are isotropic; `stats` is accepted because every method has it, and not used.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        ignored
    spec : QuantSpec
        bits, symmetric or not, per tensor, row or group
    fit : callable
        `affine.minmax`, `affine.percentile` or `affine.mse`: what range the grid covers
    scale_dtype : torch.dtype
        how the scales are stored

    Returns
    -------
    Quantized
        bits * m * n bits of levels, one scale per group and, when asymmetric, one zero point of
        `bits` bits per group

    Raises
    ------
    ValueError : as `compresskit.affine.fit_grid`

    Notes
    -----
    O(m n) time. With `minmax`, |weight - decoded| <= scale/2 (up to float32 rounding).
    Book: chapter "The uniform quantizer".

    Examples
    --------
    >>> code = round_to_nearest(torch.tensor([[-1.0, 0.0, 0.4, 2.0]]), spec=QuantSpec(2))
    >>> code.decode()
    tensor([[-1.,  0.,  0.,  2.]])
    >>> code.size_table()
    {'levels': 1, 'scale': 2, 'zero': 1}
    """
    grid = fit_grid(weight, spec, fit=fit, scale_dtype=scale_dtype)
    return grid.code(grid.nearest(weight))
