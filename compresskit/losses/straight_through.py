"""Rounding that gradients pass through: its own derivative is 0 almost everywhere."""

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, surrogate):
        ctx.dtype = surrogate.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.to(ctx.dtype)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the derivative of `surrogate`: dy/d(surrogate) = 1, dy/d(value) = 0.

    The result is `value` bit for bit; the common `surrogate + (value - surrogate).detach()` is
    so only up to the rounding of two additions.

    Parameters
    ----------
    value : tensor
        what is computed with, such as round(x)
    surrogate : tensor
        of the same shape; what the gradient is handed to, such as x

    Raises
    ------
    ValueError : the shapes differ

    References
    ----------
    Bengio, Leonard and Courville, "Estimating or propagating gradients through stochastic
    neurons", arXiv 1308.3432, section 3.1. Book: chapter "Training for low precision".

    Examples
    --------
    >>> x = torch.tensor([0.2, 0.7], requires_grad=True)
    >>> straight_through(x.round(), x).square().sum().backward()
    >>> x.grad  # 2 round(x), not 0
    tensor([0., 2.])
    """
    if value.shape != surrogate.shape:
        raise ValueError(
            f"a value of shape {tuple(value.shape)} for a surrogate of shape"
            f" {tuple(surrogate.shape)}; they must be equal"
        )
    return _StraightThrough.apply(value, surrogate)


def fake_quantize(weight: Tensor, scale: Tensor, zero: Tensor, *, levels: int) -> Tensor:
    """scale (clip(round(weight / scale + zero), 0, levels - 1) - zero), rounding passed through.

    With r = weight / scale + zero and q the level, the gradients of the result are, where r is
    in [0, levels - 1] and where it is not:

    - of the weight: 1; 0 (a clipped weight no longer matters),
    - of the scale: q - r; q - zero.

    Parameters
    ----------
    weight : (..., k) tensor
    scale : (..., 1) tensor
        above 0
    zero : (..., 1) tensor
        or any shape that broadcasts; the level that stands for 0
    levels : int
        2 or more

    Returns
    -------
    tensor of the shape of `weight`, equal to `scale * (q - zero)` bit for bit

    Raises
    ------
    ValueError : a scale that is not above 0 or not finite, or fewer than two levels

    References
    ----------
    Esser et al., "Learned step size quantization", arXiv 1902.08153, equations 1 to 3. Book:
    chapter "Training for low precision".
    """
    if type(levels) is not int or levels < 2:
        raise ValueError(f"levels={levels!r}; it must be an integer of 2 or more, such as 16")
    if not ((scale > 0) & scale.isfinite()).all():
        low, high = scale.min().item(), scale.max().item()
        raise ValueError(f"scales from {low:g} to {high:g}; each must be above 0 and finite")
    place = weight / scale + zero
    inside = place.clamp(0, levels - 1)
    return scale * (straight_through(inside.round(), inside) - zero)
