"""Penalties that make zeros: L1 by soft thresholds, L0 by random gates.

(Over 200 lines, more than half of them statements: both are short, and easily taken for more than
they are.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresskit.code import Code
from compresskit.layers import as_matrix
from compresskit.model import layers, named
from compresskit.sparse import Sparse
from compresskit.train.loop import Loss, Run, fit
from compresskit.train.quantization_aware import Latent, registered

#: Louizos et al., section 4: temperature, and the interval to which the sigmoid is stretched.
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
UNITS = ("weight", "row", "column")


def soft_threshold(weight: Tensor, threshold: float) -> Tensor:
    """sign(w) max(|w| - threshold, 0), the v with the least 1/2 (v - w)^2 + threshold |v|.

    Parameters
    ----------
    weight : (...) tensor
    threshold : float
        0 or more

    Raises
    ------
    ValueError : a negative threshold

    Examples
    --------
    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 1.0]
    """
    if not threshold >= 0:
        raise ValueError(f"threshold={threshold}; it must be 0 or more, such as 0.01")
    return weight - weight.clamp(-threshold, threshold)


def l1_norm(model: nn.Module, names: Sequence[str] | None = None) -> Tensor:
    """sum |w| over the weights of some layers, as a scalar with a gradient: that of |0| is 0.

    Added to a loss it draws weights to 0 and leaves them hopping around it: the subgradient step
    changes a weight by rate * strength however small the weight is, so hardly one becomes exactly
    0. For zeros, cut off what is small in the end, or use `proximal_l1`.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
        of layers; None means all
    """
    found = named(model, layers(model), layers(model) if names is None else names)
    return torch.stack([layer.weight.abs().sum() for layer in found.values()]).sum()


def proximal_l1(
    model: nn.Module,
    loss: Loss,
    batches: Sequence,
    *,
    strength: float,
    names: Sequence[str] | None = None,
    fit: Callable = fit,
) -> Run:
    """Train `model` in place, with a soft threshold of rate_t * strength after every update.

    For plain gradient descent that is the proximal gradient method for loss + strength * sum |w|:
    the threshold takes to exactly 0 every weight that the update left within it. `fit` divides
    each gradient by its usual size and the threshold not, as AdamW does not divide its weight
    decay: what comes out is sparse in the same way, but is no minimum of that sum.

    Parameters
    ----------
    model : nn.Module
    loss : callable
        as for `fit`
    batches : sequence
        as for `fit`
    strength : float
        threshold per unit of learning rate, 0 or more
    names : sequence of str
        of the layers that are drawn to 0; None means all
    fit : callable
        the loop; its `after` is taken

    Returns
    -------
    Run; `compresskit.train.support` gives the masks of what is left

    Raises
    ------
    ValueError : a negative strength; a name that is no layer, or whose weight is shared

    References
    ----------
    Parikh and Boyd, "Proximal algorithms", 2014, sections 4.2 and 6.5.2. Loshchilov and Hutter,
    arXiv 1711.05101 (what is divided, and what is not).
    """
    if not strength >= 0:
        raise ValueError(f"strength={strength}; it must be 0 or more, such as 0.1")
    found = named(model, layers(model), layers(model) if names is None else names)

    def after(model: nn.Module, done: int, rate: float) -> None:
        for layer in found.values():
            layer.weight.copy_(soft_threshold(layer.weight, rate * strength))

    return fit(model, loss, batches, after=after)


class HardConcrete(Latent):
    """weight -> weight * gate, where the gate is 0, 1 or between, and random in training.

    With u uniform on (0, 1), s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta) and
    gate = min(1, max(0, s (zeta - gamma) + gamma)), which is 0 with a positive probability and has
    a gradient in log_alpha where it is not. In evaluation the gate is
    min(1, max(0, sigmoid(log_alpha) (zeta - gamma) + gamma)).

    Parameters
    ----------
    shape : (int, int)
        of the layer's matrix
    unit : str
        what has a gate: "weight"; "row", an output; or "column", an input
    dropped : float
        the chance of u > sigmoid(log_alpha) that the gates start with
    """

    def __init__(self, shape: tuple[int, int], unit: str, dropped: float):
        super().__init__()
        rows, columns = shape
        gates = {"weight": (rows, columns), "row": (rows, 1), "column": (1, columns)}[unit]
        start = math.log((1 - dropped) / dropped)
        self.log_alpha = nn.Parameter(torch.full(gates, start))
        self.each = rows * columns // math.prod(gates)  # weights behind one gate

    def gate(self) -> Tensor:
        """(m, n), (m, 1) or (1, n) gates: drawn anew in training, the fixed ones in evaluation."""
        logit = self.log_alpha.float()
        if self.training:
            u = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = (u.log() - (-u).log1p() + logit) / BETA
        return (logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def open(self) -> Tensor:
        """P(gate > 0) in training, sigmoid(log_alpha - beta ln(-gamma / zeta))."""
        return (self.log_alpha.float() - BETA * math.log(-GAMMA / ZETA)).sigmoid()

    @torch.no_grad()
    def code(self, weight: Tensor) -> Code:
        training = self.training
        gate = self.eval().gate()
        self.train(training)
        matrix = weight.flatten(1)
        return Sparse.of(matrix * gate.to(weight), (gate > 0).expand_as(matrix), dtype=weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.flatten(1) * self.gate().to(weight)).reshape(weight.shape)


def gated(
    model: nn.Module,
    names: Sequence[str] | None = None,
    *,
    unit: str = "weight",
    dropped: float = 0.1,
) -> nn.Module:
    """A copy of `model` with a random gate on every weight, row or column of some layers.

    Trained by `fit` on a loss plus a strength times `expected_l0`; `converted` then gives the
    model of the test-time gates, in which closed gates are not stored.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
        of layers; None means all
    unit : str
        "weight"; "row", all weights of an output; "column", all weights of an input
    dropped : float
        between 0 and 1, how far closed the gates start: the drawn ones are closed with a
        probability that is smaller still, and 0.1 starts the test-time ones at 0.98

    Returns
    -------
    nn.Module, with parameters "...parametrizations.weight.0.log_alpha" besides the weights

    Raises
    ------
    ValueError : an unknown unit; `dropped` not between 0 and 1; a name that is no layer, or whose
        weight is shared

    References
    ----------
    Louizos, Welling, Kingma, "Learning sparse neural networks through L0 regularization", arXiv
    1712.01312, eq. 10 to 13.

    Examples
    --------
    >>> model = gated(nn.Sequential(nn.Linear(8, 4)), unit="row")
    >>> model[0].parametrizations.weight[0].log_alpha.shape
    torch.Size([4, 1])
    """
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}; it must be one of {', '.join(map(repr, UNITS))}")
    if not 0 < dropped < 1:
        raise ValueError(f"dropped={dropped}; it must be between 0 and 1, such as 0.1")
    found = named(model, layers(model), layers(model) if names is None else names)
    return registered(
        model,
        {
            name: HardConcrete(tuple(as_matrix(layer).shape), unit, dropped)
            for name, layer in found.items()
        },
    )


def expected_l0(model: nn.Module) -> Tensor:
    """The expected number of weights that are not 0, sum P(gate > 0), as a scalar with a gradient.

    Parameters
    ----------
    model : nn.Module
        from `gated`

    Raises
    ------
    ValueError : no layer has gates

    References
    ----------
    Louizos et al., arXiv 1712.01312, eq. 12.
    """
    kinds = [
        module.parametrizations.weight[0]
        for module in model.modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[0], HardConcrete)
    ]
    if not kinds:
        raise ValueError("no layer of this model has gates; give one that `gated` returned")
    return torch.stack([kind.each * kind.open().sum() for kind in kinds]).sum()
