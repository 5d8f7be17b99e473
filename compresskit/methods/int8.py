"""INT8: weights and inputs on 8-bit grids, multiplied in integers."""

import torch
from torch import Tensor

from compresskit.affine import Fit, QuantSpec, minmax
from compresskit.code import Array
from compresskit.integer import Integer
from compresskit.methods.round_to_nearest import round_to_nearest
from compresskit.stats import InputStats

PER_ROW = QuantSpec(8, symmetric=True)


def int8(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    inputs: str = "token",
    spec: QuantSpec = PER_ROW,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> Integer:
    """The nearest matrix to `weight` on its grid, to be multiplied with inputs rounded to 8 bits.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        for static inputs: their scale is max |x| / 127.5 over the tokens seen; otherwise ignored
    inputs : str
        "token" or "tensor": one scale for each token, or for all of a call, computed from the
        inputs at hand (dynamic). "static": one fixed scale; larger inputs are clipped
    spec : QuantSpec
        8 bits or fewer, one scale per row or `group_size="tensor"`
    fit : callable
        as for `round_to_nearest`
    scale_dtype : torch.dtype
        how the scales of the weight are stored

    Returns
    -------
    Integer

    Raises
    ------
    ValueError : static inputs without the maxima of n inputs; a `spec` with groups or more than 8
        bits; and as `compresskit.affine.fit_grid`

    Notes
    -----
    O(m n) time. With `inputs="token"` and float32 scales these are the levels and the result of
    torchao's dynamic int8 (but for largest weights that lie between two levels).
    Book: chapter "Activations and outliers".

    References
    ----------
    Jacob et al., arXiv 1712.05877, section 2.

    Examples
    --------
    >>> code = int8(torch.tensor([[-1.0, 0.5]]))
    >>> code.product(torch.tensor([1.0, 0.3]))  # -0.85 without rounding
    tensor([-0.8434])
    >>> code.size_table()
    {'weight.levels': 2, 'weight.scale': 2, 'weight.zero': 1}
    """
    scale = _static_scale(weight, stats) if inputs == "static" else None
    code = round_to_nearest(weight, spec=spec, fit=fit, scale_dtype=scale_dtype)
    return Integer(code, inputs, scale)


def _static_scale(weight: Tensor, stats: InputStats | None) -> Array:
    if stats is None or not stats.count:
        raise ValueError(
            'static inputs need the largest inputs seen: give stats, or use inputs="token"'
        )
    if weight.shape[-1:] != stats.max_abs.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} with statistics of {len(stats.max_abs)}"
            " inputs; collect them at the layer itself"
        )
    if not torch.isfinite(stats.max_abs).all():
        raise ValueError(
            "the largest inputs are not known or not finite in these statistics (moments carried"
            ' into another basis have none); use inputs="token"'
        )
    return Array((stats.max_abs.amax().reshape(1) / 127.5).to(weight.device, torch.float32))
