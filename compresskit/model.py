"""From matrices to models: collect statistics, compress, decode, count the bytes.

(Over 200 lines: the five verbs share what a layer's name, a tied weight and a mode mean.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compresskit.code import Code
from compresskit.layers import Compressed, as_matrix, compressed, is_layer, is_table, tokens
from compresskit.stats import InputStats

Method = Callable[[Tensor, InputStats | None], Code]
_CHUNK = 1024  # tokens per (n, n) product: small batches are gathered before they are summed


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that have a matrix, by their dotted names, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_layer(module)}


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding tables of `model`, by name: compressible, but without input moments."""
    return {name: module for name, module in model.named_modules() if is_table(module)}


@torch.no_grad()
def collect(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
    names: Iterable[str] | None = None,
) -> dict[str, InputStats]:
    """The input moments of every layer, by name, from one pass over `batches`.

    Every position that reaches a layer counts as a token, padding too: give batches without it.

    Parameters
    ----------
    model : nn.Module
    batches : iterable
        what `run` takes, one at a time
    run : callable
        how to call the model on a batch
    names : iterable of str
        only these layers; None means all

    Raises
    ------
    ValueError : an unknown name; no batch; a layer that no batch reached
    """
    known = layers(model)
    watched = named(model, known, known if names is None else names)
    stats: dict[str, InputStats] = {}
    pending: dict[str, list[Tensor]] = {name: [] for name in watched}

    def watch(name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        # cloned: what follows the layer may change its input in place
        pending[name].append(tokens(layer, args[0] if args else kwargs["input"]).clone())
        if sum(map(len, pending[name])) >= _CHUNK:
            merge(name)

    def merge(name: str) -> None:
        seen = InputStats.of(torch.cat(pending[name]))
        stats[name] = stats[name] + seen if name in stats else seen
        pending[name].clear()

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in watched.items():
            hook = layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            run(model, batch)
    for name in watched:
        if any(map(len, pending[name])):
            merge(name)
    missing = [name for name in watched if name not in stats]
    if missing:
        raise ValueError(f"no batch reached {missing}; give a batch or more that runs every layer")
    return {name: stats[name] for name in watched}


@torch.no_grad()
def compress(
    model: nn.Module,
    plan: Mapping[str, Method],
    stats: Mapping[str, InputStats] | None = None,
) -> nn.Module:
    """A copy of `model` whose layers and tables named in `plan` hold what their methods return.

    Parameters
    ----------
    model : nn.Module
        not changed
    plan : mapping
        layer name -> method (weight, stats) -> Code; bind options with `functools.partial`
    stats : mapping
        layer name -> InputStats, as `collect` returns it; what has no entry gets None

    Raises
    ------
    ValueError : a name that is no layer of the model (those that exist are listed), or whose
        weight another module shares
    """
    named(model, layers(model) | tables(model), plan)
    model = copy.deepcopy(model)
    for name, method in plan.items():
        layer = model.get_submodule(name)
        weight = as_matrix(layer)
        with torch.autocast(weight.device.type, enabled=False):  # methods say what they round
            code = method(weight, None if stats is None else stats.get(name))
        model = replaced(model, name, compressed(layer, code))
    return model


@torch.no_grad()
def compress_in_order(
    model: nn.Module,
    plan: Mapping[str, Method],
    batches: Iterable[Any],
    *,
    stack: str,
    run: Callable[[nn.Module, Any], Any] = lambda model, batch: model(batch),
) -> nn.Module:
    """`compress`, each block of a stack calibrated on what the compressed blocks before it return.

    `collect` shows every layer the inputs that it has in the original model; in the compressed
    one they carry the errors of all layers before it. Here a block's moments are of the latter, so
    its methods fit the inputs that it will meet. Within a block all are collected at once.

    Parameters
    ----------
    model : nn.Module
        not changed; its blocks take a tensor (and what else they were called with, the same for
        all) and return the next block's
    plan : mapping
        layer name -> method, as for `compress`; layers of the stack only
    batches : iterable
        what `run` takes, one at a time
    stack : str
        name of the `nn.ModuleList` of blocks, such as "blocks" or "encoder.layer"
    run : callable
        how to call the model on a batch

    Raises
    ------
    ValueError : no such stack; a name that is no layer, or none of the stack's; no batch

    Notes
    -----
    Two passes over the calibration text where `collect` takes one; the inputs of one block are
    held in memory. So the GPTQ reference code calibrates (Frantar et al., arXiv 2210.17323).
    """
    named(model, layers(model), plan)
    stacks = [name for name, m in model.named_modules() if type(m) is nn.ModuleList and len(m)]
    if stack not in stacks:
        raise ValueError(f"no stack {stack!r}; this model has {', '.join(stacks) or 'none'}")
    outside = [name for name in plan if not name.startswith(f"{stack}.")]
    if outside:
        raise ValueError(f"{outside} are not in the stack {stack!r}; compress them by themselves")
    blocks, codes = model.get_submodule(stack), {}
    with evaluating(model):
        calls = [_call(model, blocks[0], batch, run) for batch in batches]
        if not calls:
            raise ValueError("no batch; give one or more")
        for place, block in enumerate(blocks):
            prefix = f"{stack}.{place}."
            inside = {n.removeprefix(prefix): m for n, m in plan.items() if n.startswith(prefix)}
            if inside:
                stats = collect(block, calls, run=lambda block, call: call.on(block), names=inside)
                block = compress(block, inside, stats)
                codes |= {prefix + name: block.get_submodule(name).code for name in inside}
                block = decoded(block)
            calls = [call.after(block) for call in calls]
    return compress(model, {n: lambda weight, stats, code=codes[n]: code for n in plan})


class _Reached(Exception):
    """Ends a forward pass where its rest is not needed."""


class _Call(NamedTuple):
    """What a block is called with: the stream `x`, and what is the same for all blocks."""

    x: Tensor
    args: tuple
    kwargs: dict

    def on(self, block: nn.Module) -> Any:
        return block(self.x, *self.args, **self.kwargs)

    def after(self, block: nn.Module) -> _Call:
        x = self.on(block)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"a block returned a {type(x).__name__}; it must return the next block's tensor"
            )
        return self._replace(x=x)


def _call(model: nn.Module, block: nn.Module, batch: Any, run: Callable) -> _Call:
    """The call of `block` when the model runs on a batch."""
    seen: list[_Call] = []

    def stop(block: nn.Module, args: tuple, kwargs: dict) -> None:
        if not args:
            raise ValueError("the blocks get no positional argument; give the stream as the first")
        seen.append(_Call(args[0], args[1:], kwargs))
        raise _Reached

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run(model, batch)
    except _Reached:
        return seen[0]
    finally:
        hook.remove()
    raise ValueError("a batch did not reach the first block; give one that runs the stack")


@torch.no_grad()
def decoded(model: nn.Module) -> nn.Module:
    """A copy of `model` with dense layers in place of the compressed ones: same values, faster.

    Layers whose code quantizes their inputs as well stay as they are: no dense one computes that.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Compressed) and not module.code.quantizes_inputs:
            model = replaced(model, name, module.restored())
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module is in evaluation mode; afterwards each in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class Size:
    """One stored array: what it belongs to, how it is stored, how many bytes.

    Parameters
    ----------
    name : str
        of the layer, or of the parameter or buffer left as it was
    stored : str
        formula and path of the leaf, or the dtype of what was left alone
    nbytes : int
    in_code : bool
        whether it is part of a code
    """

    name: str
    stored: str
    nbytes: int
    in_code: bool


@dataclass(frozen=True)
class SizeTable:
    """Every byte of a model, itemized. `str()` adds it up by kind of storage.

    Parameters
    ----------
    rows : tuple of Size
    weights : int
        how many weights the compressed layers have together
    """

    rows: tuple[Size, ...]
    weights: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model."""
        return sum(row.nbytes for row in self.rows)

    @property
    def compressed_nbytes(self) -> int:
        """Bytes of the compressed layers' codes alone."""
        return sum(row.nbytes for row in self.rows if row.in_code)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the compressed layers: all their bytes, over all their weights."""
        return 8 * self.compressed_nbytes / self.weights if self.weights else float("nan")

    def __str__(self) -> str:
        kinds: dict[str, list[int]] = {}
        for row in self.rows:
            kinds.setdefault(row.stored, []).append(row.nbytes)
        lines = [f"{'stored as':26}{'arrays':>7}{'bytes':>14}"]
        lines += [f"{kind:26}{len(n):7}{sum(n):14,}" for kind, n in kinds.items()]
        return "\n".join([*lines, f"{'total':26}{len(self.rows):7}{self.nbytes:14,}"])


def size_table(model: nn.Module) -> SizeTable:
    """What each stored array of `model` takes in a file, tied parameters counted once."""
    rows, weights = [], 0
    for name, module in model.named_modules():
        if isinstance(module, Compressed):
            code = module.code
            kind = type(code).__name__
            rows += [Size(name, f"{kind}.{path}", n, True) for path, n in code.size_table().items()]
            weights += torch.Size(code.shape).numel()
    for name, tensor in uncompressed(model).items():
        stored = str(tensor.dtype).removeprefix("torch.")
        rows.append(Size(name, stored, tensor.numel() * tensor.element_size(), False))
    return SizeTable(tuple(rows), weights)


def uncompressed(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that belong to no code; tied ones appear once."""
    codes = tuple(
        f"{name}.code__".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, Compressed)
    )
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not name.startswith(codes) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """`model` with `module` at `name`; the empty name is the model itself.

    Parameters
    ----------
    model : nn.Module
        changed in place
    name : str
    module : nn.Module
    """
    if not name:
        return module
    model.set_submodule(name, module)
    return model


def named(
    model: nn.Module, known: Mapping[str, nn.Module], names: Iterable[str]
) -> dict[str, nn.Module]:
    """Those of `known` that are named.

    Parameters
    ----------
    model : nn.Module
    known : mapping
        name -> layer or table of `model`
    names : iterable of str

    Raises
    ------
    ValueError : a name that is not among `known`, or whose weight is shared or computed
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no layer is named {unknown}; the model has {list(known)}")
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in wanted:
        shared = owners.get(id(known[name].weight))
        if shared is None:
            raise ValueError(
                f"the weight of {name!r} is computed from other parameters; make it one of its"
                " own first, for instance with torch.nn.utils.parametrize.remove_parametrizations"
            )
        if len(shared) > 1:
            raise ValueError(
                f"the weight of {name!r} is tied: {shared}; untie it before compressing"
            )
    return {name: known[name] for name in wanted}
