"""SmoothQuant: part of the inputs' outliers moved into the weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compresskit.basis import InBasis, Scales
from compresskit.code import Array, Code, check_float
from compresskit.methods.moments import checked
from compresskit.stats import InputStats


def smooth(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    method: Callable[[Tensor, InputStats | None], Code],
    alpha: float = 0.5,
    scale_dtype: torch.dtype = torch.float16,
) -> InBasis:
    """M diag(1/s) with M = method(W diag(s)), s_j = max|x_j|^alpha / max_i|w_ij|^(1 - alpha).

    The product is that of x / s with W diag(s), the same without rounding. At alpha = 1/2 the
    largest entries of input j and of column j become equal: both sides get the same range.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        moments of x; None: isotropic ones, whose max|x_j| is 1
    method : callable
        (weight, stats) -> Code, one that quantizes inputs if this is to gain anything; bind
        options with `functools.partial`
    alpha : float
        how much of the outliers to move: 0 levels the columns of the weight, 1 the inputs
    scale_dtype : torch.dtype
        how s is stored

    Returns
    -------
    InBasis
        of what `method` returns, in `Scales`: n numbers more. `surgery.smooth` has none, as it
        folds s into what precedes the layer

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together, `alpha` outside
        [0, 1], and what `method` raises

    Notes
    -----
    O(m n) beside what `method` takes.
    Xiao et al., "SmoothQuant", arXiv 2211.10438, section 4 and eq. 4.
    Book: chapter "Activations and outliers".
    """
    weight, stats = checked(weight, stats)
    check_float("scale_dtype", scale_dtype)
    scale = smoothing_scale(stats.max_abs, [weight], alpha=alpha)
    basis = Scales(Array(scale.to(scale_dtype)))
    return InBasis(method(basis.into(weight), stats.in_basis(basis)), basis)


def smoothing_scale(max_abs: Tensor, weights: Sequence[Tensor], *, alpha: float = 0.5) -> Tensor:
    """s_j = max|x_j|^alpha / max_ij|w_ij|^(1 - alpha), over all layers that read the same x.

    Parameters
    ----------
    max_abs : (n,) tensor
        max |x|
    weights : sequence of (m_k, n) tensors
    alpha : float
        from 0 to 1

    Returns
    -------
    (n,) tensor, at least 1e-5; a column's largest weight counts as at least 1e-5 too

    Raises
    ------
    ValueError : `alpha` outside [0, 1]; `max_abs` not finite, as after a rotation
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it must be from 0 to 1, for instance 0.5")
    if not torch.isfinite(max_abs).all():
        raise ValueError(
            "max |x| is not finite: after a rotation it is unknown, and hardly needs smoothing."
            " Collect the moments of the rotated inputs"
        )
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=1e-5)
    return (max_abs.pow(alpha) / largest.pow(1 - alpha)).clamp(min=1e-5)
