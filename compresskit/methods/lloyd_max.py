"""Lloyd-Max: the table of least squared error for the very weights it will stand for."""

from collections.abc import Callable

import torch
from torch import Tensor

from compresskit.code import Array, Bits, check_float
from compresskit.codebook import (
    Codebook,
    block_scales,
    double_quantized,
    nearest,
    optimal_values,
)
from compresskit.methods.moments import checked
from compresskit.stats import InputStats

Fit = Callable[[Tensor, Tensor], Tensor]
"""(...,) values and their weights -> (k,) levels."""


def lloyd_max(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    bits: int = 4,
    share: str = "matrix",
    block: int | None = None,
    double_quant: bool = True,
    value_dtype: torch.dtype = torch.float16,
) -> Codebook:
    """The table of 2^bits values that minimizes sum_ij E x_j^2 (W_ij - table[i_ij])^2, exactly.

    With isotropic inputs that is the squared error of the weights. Correlations between inputs
    are not used: only the diagonal of E[x x^T] is.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device; the table is computed on the CPU
    stats : InputStats
        moments of the inputs; None: isotropic. Where all inputs are 0 they count as isotropic
    bits : int
        1 to 8
    share : str
        "matrix": one table; "row": one for each row
    block : int
        divide each `block` consecutive weights by their largest magnitude, as `nf4` does; None:
        no scales
    double_quant : bool
        store these scales as `nf4` does
    value_dtype : torch.dtype
        how the table is stored

    Returns
    -------
    Codebook
        bits * m * n bits, the tables, and the scales if there are any

    Raises
    ------
    ValueError : not a matrix, empty, not finite; an argument out of its range; moments of another
        width or not finite; values that `value_dtype` cannot hold

    Notes
    -----
    O(m n log(m n)), whatever `bits` is (`codebook.optimal_values`). For given scales no other
    table of this size does better, but for the rounding of its values to `value_dtype`.

    References
    ----------
    Lloyd 1957; Max, "Quantizing for minimum distortion", 1960. Weighing the errors: Kim et al.,
    "SqueezeLLM", 2024, there by gradients. Book: chapter "Better codebooks and the limit".

    Examples
    --------
    >>> code = lloyd_max(torch.tensor([[0.0, 1.0, 10.0], [12.0, 0.5, 11.0]]), bits=1)
    >>> code.decode()
    tensor([[ 0.5000,  0.5000, 11.0000],
            [11.0000,  0.5000, 11.0000]])
    """

    def fit(values, weights):
        return optimal_values(values, 1 << bits, weights=weights)

    return fitted(weight, stats, fit, bits, share, block, double_quant, value_dtype)


def fitted(
    weight: Tensor,
    stats: InputStats | None,
    fit: Fit,
    bits: int,
    share: str,
    block: int | None,
    double_quant: bool,
    value_dtype: torch.dtype,
) -> Codebook:
    """The code whose tables come from `fit`; all else as `lloyd_max` says.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats
    fit : callable
        values and weights -> levels
    bits : int
    share : str
    block : int
    double_quant : bool
    value_dtype : torch.dtype
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits={bits!r}; it must be 1 to 8, for instance 4")
    if share not in ("matrix", "row"):
        raise ValueError(f'share={share!r}; it must be "matrix" or "row"')
    weight, stats = checked(weight, stats)
    importance = stats.second.diagonal().double().expand(weight.shape)
    scales, x = None, weight
    if block is not None:
        scales = block_scales(weight, block)
        block = min(block, weight.numel())
        scales = double_quantized(scales) if double_quant else Array(scales)
        scale = scales.decode().repeat_interleave(block)[: weight.numel()].reshape(weight.shape)
        x = torch.where(scale != 0, weight / scale, 0)  # by the scale that is stored
        importance = importance * scale.double().square()
    if share == "row":
        pairs = zip(x, importance, strict=True)
        tables = torch.stack([_stored(_fit(fit, *pair), value_dtype) for pair in pairs])
        index = torch.stack([nearest(*pair) for pair in zip(x, tables.float(), strict=True)])
    else:
        tables = _stored(_fit(fit, x, importance), value_dtype)
        index = nearest(x, tables.float())
    return Codebook(Bits(index, bits), Array(tables), scales, block=block)


def _fit(fit: Fit, values: Tensor, weights: Tensor) -> Tensor:
    return fit(values, weights if weights.any() else torch.ones_like(weights))


def _stored(table: Tensor, dtype: torch.dtype) -> Tensor:
    check_float("value_dtype", dtype)
    rounded = table.to(dtype)
    if not (rounded - table).abs().max() <= table.abs().max() / 128:
        raise ValueError(
            f"values up to {table.abs().max():.3g} are out of the range of {dtype};"
            " use value_dtype=torch.float32"
        )
    return rounded
