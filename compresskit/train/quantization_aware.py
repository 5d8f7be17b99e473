"""Training through a code: the loss sees the compressed weights, the update moves latent ones.

(Over 200 lines, more than half of them statements and refusals: what is computed with, what is
trained and what is stored must be the same three times.)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresskit.affine import Fit, Grid, QuantSpec, fit_grid, mse
from compresskit.code import Code, check_float
from compresskit.integer import Integer
from compresskit.layers import as_matrix, compressed
from compresskit.losses import fake_quantize, straight_through
from compresskit.model import Method, layers, named, replaced, tables


class Latent(nn.Module):
    """A parametrization: the weight that training moves, and the code that computes."""

    def code(self, weight: Tensor) -> Code:
        """What the layer would be stored as, were its latent weights these.

        Parameters
        ----------
        weight : tensor
            latent, in the shape of the layer's weight
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its code is")


class MethodLatent(Latent):
    """weight -> method(weight).decode(), the gradient passed straight through to the weight.

    Parameters
    ----------
    method : callable
        (matrix, None) -> Code
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def code(self, weight: Tensor) -> Code:
        with torch.autocast(weight.device.type, enabled=False):  # methods say what they round
            return self.method(weight.detach().flatten(1), None)

    def forward(self, weight: Tensor) -> Tensor:
        value = self.code(weight).decode().reshape(weight.shape).to(weight.dtype)
        return straight_through(value, weight)


class LearnedStep(Latent):
    """weight -> the nearest point of a grid whose steps are parameters too.

    The parameter is the logarithm of the steps, used within the range of the stored type: they
    stay positive, and Adam, whose updates do not depend on the size of a gradient, changes all of
    them at the same relative rate. (LSQ learns the step itself and scales its gradient, which is
    meant for plain gradient descent and has no effect on Adam.) Zero points stay as they were
    fitted.

    Parameters
    ----------
    weight : (m, n) tensor
        to which the first steps are fitted
    spec : QuantSpec
    fit : callable
        how: `compresskit.affine.mse`, `minmax`, ...
    scale_dtype : torch.dtype
        of the stored steps; the grid computed with is the stored one
    """

    def __init__(self, weight: Tensor, spec: QuantSpec, fit: Fit, scale_dtype: torch.dtype):
        super().__init__()
        grid = fit_grid(weight, spec, fit=fit, scale_dtype=scale_dtype)
        smallest = torch.finfo(scale_dtype).tiny  # for a group of zeros
        self.log_step = nn.Parameter(torch.where(grid.scale > 0, grid.scale, smallest).log())
        # As integers, twice the zero points: `.half()` and the like leave those alone.
        self.register_buffer("zero", (2 * grid.zero).int())
        self.spec, self.group_size, self.scale_dtype = spec, grid.group_size, scale_dtype

    def grid(self, shape: tuple[int, int]) -> Grid:
        """The grid with the present steps, rounded to their stored type.

        Parameters
        ----------
        shape : (m, n)
        """
        step, info = self.log_step.float().exp(), torch.finfo(self.scale_dtype)
        kept = step.clamp(info.smallest_normal * info.eps, info.max)  # what the type can hold
        stored = straight_through(kept.to(self.scale_dtype).float(), step)
        zero = self.zero / 2
        return Grid(self.spec, stored, zero, self.group_size, shape, self.scale_dtype)

    @torch.no_grad()
    def code(self, weight: Tensor) -> Code:
        matrix = weight.flatten(1).float()
        grid = self.grid(tuple(matrix.shape))
        scale, zero = grid.by_column()
        last = self.spec.levels - 1
        return grid.code((matrix / scale + zero).clamp(0, last).round())

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1).float()
        scale, zero = self.grid(tuple(matrix.shape)).by_column()
        rounded = fake_quantize(matrix, scale, zero, levels=self.spec.levels)
        return rounded.reshape(weight.shape).to(weight.dtype)


def quantization_aware(model: nn.Module, plan: Mapping[str, Method]) -> nn.Module:
    """A copy of `model` that computes with method(weight) and trains the weights behind it.

    In the forward pass a layer of the plan is what `compress` would make of it now; in the
    backward pass the gradient of its decoded weight is handed to the latent weight unchanged. So
    every matrix method can be trained through, and `converted` gives the model that was trained.
    A method whose code rounds inputs as well multiplies as that code does, and the gradients are
    those of the product of the rounded inputs and weights, passed straight through both.

    Parameters
    ----------
    model : nn.Module
    plan : mapping
        layer or table name -> method, called without statistics at every step

    Returns
    -------
    nn.Module, whose parameters "...parametrizations.weight.original" are the latent weights

    Raises
    ------
    ValueError : a name that is no layer, or whose weight is shared or computed from others; what
        the method refuses; a code that rounds inputs where the layer is not linear, in another
        basis, or by a threshold

    Notes
    -----
    The straight-through gradient is not the gradient: that is 0 almost everywhere. Book: chapter
    "Training for low precision".

    References
    ----------
    Jacob et al., arXiv 1712.05877, section 3; Bengio et al., arXiv 1308.3432, section 3.1.

    Examples
    --------
    >>> from compresskit.methods import ternary
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> trained = quantization_aware(model, {"0": ternary})
    >>> trained[0].weight.unique().numel()
    3
    """
    return registered(model, {name: MethodLatent(method) for name, method in plan.items()})


def learned_steps(
    model: nn.Module,
    specs: Mapping[str, QuantSpec],
    *,
    fit: Fit = mse,
    scale_dtype: torch.dtype = torch.float16,
) -> nn.Module:
    """A copy of `model` on uniform grids whose steps are trained with the weights (LSQ).

    Parameters
    ----------
    model : nn.Module
    specs : mapping
        layer or table name -> QuantSpec
    fit : callable
        the range that sets the first steps
    scale_dtype : torch.dtype
        float16, bfloat16 or float32

    Returns
    -------
    nn.Module, with one more parameter per layer, the logarithms of its steps

    Raises
    ------
    ValueError : as `quantization_aware`

    References
    ----------
    Esser et al., "Learned step size quantization", arXiv 1902.08153, section 2.
    """
    check_float("scale_dtype", scale_dtype)
    found = named(model, layers(model) | tables(model), specs)
    latents = {
        name: LearnedStep(as_matrix(found[name]), spec, fit, scale_dtype)
        for name, spec in specs.items()
    }
    return registered(model, latents)


def converted(model: nn.Module) -> nn.Module:
    """A copy in which every trained-through layer is the code it computed with.

    Its outputs equal those of `model` bit for bit; what is stored is what post-training methods
    store, in the same nodes.

    Parameters
    ----------
    model : nn.Module
        from `quantization_aware` or `learned_steps`

    Raises
    ------
    ValueError : no layer of it was trained through a code
    """
    model = copy.deepcopy(model)
    found = {name: module for name, module in model.named_modules() if _latent(module)}
    if not found:
        raise ValueError(
            "no layer of this model computes with a code; give one that quantization_aware or"
            " learned_steps returned"
        )
    for name, layer in found.items():
        code = _latent(layer).code(layer.parametrizations.weight.original)
        model = replaced(model, name, compressed(layer, code).train(layer.training))
    return model


class _Rounding:
    """The two hooks of a layer whose code rounds its inputs: the gradient's way, and the value."""

    def __init__(self):
        self.x, self.code = None, None

    def before(self, layer: nn.Module, inputs: tuple[Tensor], options: dict[str, Tensor]):
        (x,) = inputs or options.values()
        self.x = x.detach()  # until `after`, or the next call if this one fails
        self.code = _latent(layer).code(layer.parametrizations.weight.original)
        return (straight_through(self.code.rounded(self.x), x),), {}

    def after(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.detach()
        value = self.code.product(self.x, bias)
        self.x, self.code = None, None
        return straight_through(value, output)


def registered(model: nn.Module, latents: Mapping[str, Latent]) -> nn.Module:
    """A copy with each of `latents` between a weight and its use; refuses what has no code.

    Parameters
    ----------
    model : nn.Module
    latents : mapping
        layer or table name -> its parametrization
    """
    named(model, layers(model) | tables(model), latents)
    model = copy.deepcopy(model)
    for name, latent in latents.items():
        layer = model.get_submodule(name)
        code = latent.code(layer.weight)
        compressed(layer, code)  # refuses now what `converted` could not do later
        parametrize.register_parametrization(layer, "weight", latent)
        if code.quantizes_inputs:
            if not isinstance(code, Integer):
                raise ValueError(
                    f"the {type(code).__name__} of layer {name!r} rounds inputs in another basis;"
                    " only those rounded as they come can be trained through, as by int8, ternary"
                    " or sign"
                )
            code.rounded(layer.weight.detach()[:1])  # refuses a threshold
            hooks = _Rounding()
            layer.register_forward_pre_hook(hooks.before, with_kwargs=True)
            layer.register_forward_hook(hooks.after)
    return model


def _latent(module: nn.Module) -> Latent | None:
    """The parametrization of a layer that is trained through a code."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    kind = module.parametrizations.weight[0]
    return kind if isinstance(kind, Latent) else None
