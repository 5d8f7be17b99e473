"""Low-rank adapters on frozen layers: attach, train, switch, merge (LoRA, QLoRA, rsLoRA, DoRA).

A layer computes base(x) + alpha/r B A x. The base may be a `nn.Linear` or a compressed layer: then
only its codes are in memory, gradients pass through the weight they decode to, and that weight is
decoded again for them instead of being kept (QLoRA).

(Over 200 lines, half of them statements and refusals.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.layers import CompressedLinear
from compresskit.lowrank import Adapter
from compresskit.model import Method, compress, replaced


class LoRALinear(nn.Module):
    """A frozen linear layer, and the adapters that may be added to it, one at a time.

    Parameters
    ----------
    base : nn.Linear or CompressedLinear
        its parameters are frozen

    Notes
    -----
    Hu et al., "LoRA", 2021, eq. 3.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        plain = _frozen(self.base, x)
        if self.active is None:
            return plain
        return self.adapters[self.active](self.base, x, plain)

    @property
    def weight(self) -> Tensor:
        """(m, n) the base's matrix, decoded if it is a code."""
        return self.base.weight

    def extra_repr(self) -> str:
        return f"active={self.active!r}"


class TrainedAdapter(nn.Module):
    """The parameters of one `Adapter`, and what it adds to its layer.

    Parameters
    ----------
    adapter : Adapter
    dropout : float
        share of the inputs of A that is dropped in training
    """

    def __init__(self, adapter: Adapter, dropout: float):
        super().__init__()
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (adapter.a, adapter.b))
        magnitude = adapter.magnitude
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.detach().clone())
        self.alpha, self.rank_stabilized = adapter.alpha, adapter.rank_stabilized
        self.dropout = dropout

    @property
    def adapter(self) -> Adapter:
        """The present values."""
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        a, b = self.a.detach(), self.b.detach()
        return Adapter(a, b, self.alpha, self.rank_stabilized, magnitude)

    @property
    def scale(self) -> float:
        """alpha/r, or alpha/sqrt(r)."""
        return self.alpha / (math.sqrt(len(self.a)) if self.rank_stabilized else len(self.a))

    def forward(self, base: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
        """What the layer returns, `plain` being what its base does."""
        seen = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(seen, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale
        return plain + update if self.magnitude is None else self._rescaled(base, plain, update)

    def _rescaled(self, base: nn.Module, plain: Tensor, update: Tensor) -> Tensor:
        """DoRA: rows of W + update get a trained length; no gradient goes through their old one."""
        with torch.no_grad():
            length = (base.weight.float() + self.scale * (self.b @ self.a)).norm(dim=1)
        factor = (self.magnitude / length).to(plain.dtype)
        if base.bias is None:
            return (plain + update) * factor
        return (plain - base.bias + update) * factor + base.bias


class _Recomputed(torch.autograd.Function):
    """A frozen layer whose weight is decoded once more for the gradient, instead of being kept."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: CompressedLinear) -> Tensor:
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


def _frozen(base: nn.Module, x: Tensor) -> Tensor:
    if isinstance(base, CompressedLinear) and x.requires_grad and torch.is_grad_enabled():
        return _Recomputed.apply(x, base)
    return base(x)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can carry adapters, dense, compressed or already carrying some, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = type(module) in (nn.Linear, CompressedLinear, LoRALinear)
        if plain and not name.endswith(".base") and name != "base":
            found[name] = module
    return found


def start(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    decompose: bool = False,
    seed: int = 0,
) -> dict[str, Adapter]:
    """Adapters that change nothing yet: A uniform within 1/sqrt(n), B zero.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        layers, of `linear_layers(model)`
    rank : int
        r
    alpha : float
        None: r, so that the scale alpha/r is 1
    rank_stabilized : bool
        scale by alpha/sqrt(r) (rsLoRA)
    decompose : bool
        train the length of every row of W + B A as well (DoRA)
    seed : int
        of A

    Returns
    -------
    dict : layer name -> Adapter

    Raises
    ------
    ValueError : no name, an unknown one, or a rank below 1 or above the smaller side of a layer

    Notes
    -----
    The first gradient of A is zero and that of B is not; with B zero and A not, training starts,
    and with both zero it never would. The interval is that of PEFT (Kaiming's with a = sqrt(5)).
    """
    known = linear_layers(model)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in _named(known, names):
        weight = known[name].weight
        rows, columns = weight.shape
        if type(rank) is not int or not 1 <= rank <= min(rows, columns):
            raise ValueError(
                f"rank={rank!r} for {name!r}, a ({rows}, {columns}) matrix; use 1 to"
                f" {min(rows, columns)}: no update has a higher rank"
            )
        a = (2 * torch.rand(rank, columns, generator=generator) - 1) / math.sqrt(columns)
        a, b = a.to(weight.device), torch.zeros(rows, rank, device=weight.device)
        length = weight.detach().float().norm(dim=1) if decompose else None
        found[name] = Adapter(a, b, rank if alpha is None else alpha, rank_stabilized, length)
    return found


def attach(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    *,
    name: str = "default",
    dropout: float = 0.0,
) -> nn.Module:
    """A copy of a model in which only these adapters are trained, and are active.

    Attached under another name, adapters join those a model has: one base, several sets, of which
    `use` chooses one. The copy shares no parameter with `model`.

    Parameters
    ----------
    model : nn.Module
        dense, or with layers that `compresskit.model.compress` replaced
    adapters : mapping
        layer name -> Adapter
    name : str
        of this set; letters, digits and underscores
    dropout : float
        share of each adapter's inputs dropped in training, from 0 to below 1

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError : no adapter; an unknown layer; a shape that is not the layer's; a tied weight or a
        code that rounds its inputs; a set's name that is taken or no identifier; `dropout` out of
        range

    Notes
    -----
    Book: chapter "LoRA and QLoRA".
    """
    if not name.isidentifier() or name in names(model):
        raise ValueError(
            f"name={name!r}; a new identifier is needed, and the model has {names(model)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}; it must be from 0 to below 1, for instance 0.05")
    for layer, module in _named(linear_layers(model), adapters).items():
        _check(layer, module, adapters[layer], model)
    model = copy.deepcopy(model).requires_grad_(False)
    for layer, adapter in adapters.items():
        module = model.get_submodule(layer)
        if not isinstance(module, LoRALinear):
            module = LoRALinear(module).train(module.training)
            model = replaced(model, layer, module)
        trained = TrainedAdapter(adapter, dropout).to(module.weight.device)
        module.adapters[name] = trained.train(module.training)
    return use(model, name)


def use(model: nn.Module, name: str | None) -> nn.Module:
    """Make one set of adapters active and trainable, and freeze the others; None: the base alone.

    Parameters
    ----------
    model : nn.Module
        changed in place, and returned
    name : str or None

    Raises
    ------
    ValueError : a set the model does not have
    """
    if name is not None and name not in names(model):
        raise ValueError(f"no adapters named {name!r}; the model has {names(model)}")
    for module in _loras(model).values():
        module.active = name if name in module.adapters else None
        for other, adapter in module.adapters.items():
            adapter.requires_grad_(other == name)
    return model


def names(model: nn.Module) -> list[str]:
    """The sets of adapters that a model has, in the order in which they were attached."""
    return list(dict.fromkeys(n for module in _loras(model).values() for n in module.adapters))


def adapters(model: nn.Module, name: str | None = None) -> dict[str, Adapter]:
    """The present values of a set of adapters, for `container.save_adapters` or `attach`.

    Parameters
    ----------
    model : nn.Module
    name : str
        None: the set that is active

    Returns
    -------
    dict : layer name -> Adapter

    Raises
    ------
    ValueError : no such set, or none active
    """
    found = {}
    for layer, module in _loras(model).items():
        chosen = module.active if name is None else name
        if chosen is not None and chosen in module.adapters:
            found[layer] = module.adapters[chosen].adapter
    if not found:
        raise ValueError(f"no adapters named {name!r} are active; the model has {names(model)}")
    return found


def merged(model: nn.Module, name: str | None = None, *, method: Method | None = None) -> nn.Module:
    """A model without adapters that computes the same: each layer's matrix is W + alpha/r B A.

    Parameters
    ----------
    model : nn.Module
        as `attach` returns it; not changed
    name : str
        the set to merge; None: the active one. The other sets are dropped
    method : callable
        codes the merged matrices of layers whose base is a code; None: those become dense. A grid
        rounds the update away where it is smaller than half a step. Layers that this set does not
        touch keep their base as it is

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError : no such set

    Notes
    -----
    Computed in float32 and rounded once, to the dtype of the base.
    """
    chosen = adapters(model, name)
    model = copy.deepcopy(model)
    coded = []
    for layer, module in _loras(model).items():
        base = module.base
        if layer in chosen:
            if isinstance(base, CompressedLinear):
                coded.append(layer)
                base = base.restored()
            base.weight.data = chosen[layer].merged(base.weight).to(base.weight.dtype)
        model = replaced(model, layer, base.train(module.training))
    model.requires_grad_(True)
    return compress(model, dict.fromkeys(coded, method)) if method else model


def unmerged(model: nn.Module, adapters: Mapping[str, Adapter]) -> nn.Module:
    """A copy with the updates subtracted again: what they were added to, up to rounding.

    Parameters
    ----------
    model : nn.Module
        dense
    adapters : mapping
        layer name -> Adapter, those that were merged

    Raises
    ------
    ValueError : an unknown layer, another shape, or DoRA, which rescales rows

    Notes
    -----
    Exact only if the sums were: what W + delta rounded away does not come back. Keep the base.
    """
    model = copy.deepcopy(model)
    for layer, module in _named(linear_layers(model), adapters).items():
        if adapters[layer].magnitude is not None or isinstance(
            module, LoRALinear | CompressedLinear
        ):
            raise ValueError(f"{layer!r}: only sums into dense layers can be undone; keep the base")
        _check(layer, module, adapters[layer], model)
        weight = module.weight.data
        module.weight.data = (weight.float() - adapters[layer].delta()).to(weight.dtype)
    return model


def _loras(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def _named(known: Mapping[str, nn.Module], wanted: Iterable[str]) -> dict[str, nn.Module]:
    wanted = list(wanted)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"no linear layer is named {unknown}; the model has {list(known)}")
    return {name: known[name] for name in wanted}


def _check(layer: str, module: nn.Module, adapter: Adapter, model: nn.Module) -> None:
    shape = tuple(module.weight.shape)
    if adapter.shape != shape:
        raise ValueError(f"an adapter of {adapter.shape} for {layer!r}, whose matrix is {shape}")
    base = module.base if isinstance(module, LoRALinear) else module
    if isinstance(base, CompressedLinear):
        if base.code.quantizes_inputs:
            raise ValueError(
                f"{layer!r} rounds its inputs, and rounding has no gradient; give it a code of its"
                " weight alone"
            )
        return
    owners = sum(p is base.weight for _, p in model.named_parameters(remove_duplicate=False))
    if owners > 1:
        raise ValueError(f"the weight of {layer!r} is tied; an adapter would change one use of it")


__all__ = [
    "LoRALinear",
    "TrainedAdapter",
    "adapters",
    "attach",
    "linear_layers",
    "merged",
    "names",
    "start",
    "unmerged",
    "use",
]
