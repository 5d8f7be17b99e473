"""Neurons, heads and channels taken out: model -> a smaller model, dense, of what is left.

A unit is what lies between two layers: rows of those that make it, with their biases, and columns
of the one that reads it. Both go; the residual stream keeps its width. (Over 200 lines: which
rows and columns belong to a unit, and the four things done with them, are read side by side.)
"""

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresskit.layers import Compressed, as_matrix, is_layer
from compresskit.model import layers, named
from compresskit.models.decoder import Attention, Decoder
from compresskit.models.encoder import SentenceEncoder
from compresskit.stats import InputStats

# What may stand between two layers of a chain: each output depends on one unit alone. Of images,
# whose units are channels, that holds for pooling too.
UNITWISE = {nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh}
POOLING = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d}


@dataclass(frozen=True)
class Units:
    """Like parts of a model, of which any but not all can be removed; unit i is the i-th slice.

    Parameters
    ----------
    kind : str
        "neuron", "channel", "head" (with its keys and values, and all queries that share them) or
        "query head" (one of several that share keys and values)
    count : int
        how many there are
    rows : dict
        name of each layer that makes them -> how many consecutive rows of its matrix are a unit's
    reader : str
        name of the layer that reads them
    columns : int
        how many consecutive columns of the reader's matrix read one unit: of a convolution, the
        entries of its kernel; of a linear layer behind a flattened image, the positions
    """

    kind: str
    count: int
    rows: dict[str, int]
    reader: str
    columns: int


def units(model: nn.Module) -> dict[str, Units]:
    """What can be removed from `model`, by the name of the layer that puts it out.

    In a `Decoder` these are `mlp.up` (with `mlp.gate`) and `attn.v` (with q and k); where several
    query heads share a key, also `attn.q`. In a `SentenceEncoder`, `intermediate.dense` and
    `attention.self.value`. In a chain (`nn.Sequential`), every layer whose next one reads each
    unit by itself: nothing but activations, dropout, a flattening and, of images, pooling stands
    between them. (Not BatchNorm: fold it into the layer first.)

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict, layer name -> Units, in the model's order

    Raises
    ------
    ValueError : another kind of model, or one with compressed layers

    Examples
    --------
    >>> chain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    >>> units(chain)
    {'0': Units(kind='channel', count=4, rows={'0': 1}, reader='3', columns=9)}
    """
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise ValueError("layers of this model are compressed; remove units first, then compress")
    if isinstance(model, Decoder):
        return dict(_of_decoder(model))
    if isinstance(model, SentenceEncoder):
        return dict(_of_encoder(model))
    if type(model).forward is nn.Sequential.forward:
        return dict(_of_chain(model))
    raise ValueError(
        f"a {type(model).__name__}; known are the units of a Decoder, of a SentenceEncoder and of"
        " an nn.Sequential, for instance of models.digits_cnn()"
    )


@torch.no_grad()
def remove(model: nn.Module, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A smaller copy of `model` that computes what it would if these units put out zeros.

    Parameters
    ----------
    model : nn.Module
        left as it is
    removed : mapping
        name in `units(model)` -> which of its units, counted from 0

    Returns
    -------
    a new model of dense layers with fewer rows and columns. What other layers write and read, as
    the residual stream, keeps its width; `config` still describes the model it came from

    Raises
    ------
    ValueError : as `units`; a name without units; a place that is none, or is named twice;
        nothing left; a weight that another module shares; in a `Decoder`, key heads left with
        different numbers of query heads

    Notes
    -----
    Equal up to the order of additions. Heads: Michel et al., arXiv 1905.10650; channels: Li et
    al., "Pruning filters for efficient ConvNets", arXiv 1608.08710, section 3.1.
    Book: chapter "Removing weights".

    Examples
    --------
    >>> chain = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    >>> remove(chain, {"0": [1, 3]})
    Sequential(
      (0): Linear(in_features=8, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    kept = _kept(model, removed)
    small = copy.deepcopy(model)
    for name, (rows, columns) in kept.items():
        layer = small.get_submodule(name)
        weight = as_matrix(layer)[rows][:, columns].unflatten(1, (-1, *layer.weight.shape[2:]))
        layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        if layer.bias is not None:
            bias = layer.bias.detach()[rows]
            layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
        sizes = ("out_features", "in_features")
        sizes = sizes if weight.ndim == 2 else ("out_channels", "in_channels")
        for size, value in zip(sizes, weight.shape, strict=False):
            setattr(layer, size, value)
    if isinstance(small, Decoder):
        for block in small.blocks:
            block.attn.groups = len(block.attn.q.weight) // len(block.attn.k.weight)
    return small


@torch.no_grad()
def zeroed(model: nn.Module, removed: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of `model` of the same size, with zeros for all weights and biases of these units.

    It computes what `remove` returns computes: the masked model beside the smaller one.

    Parameters
    ----------
    model : nn.Module
        left as it is
    removed : mapping
        as for `remove`

    Raises
    ------
    ValueError : as `remove`
    """
    kept = _kept(model, removed)
    masked = copy.deepcopy(model)
    for name, (rows, columns) in kept.items():
        layer = masked.get_submodule(name)
        layer.weight.masked_fill_(~(rows[:, None] & columns).view(layer.weight.shape), 0)
        if layer.bias is not None:
            layer.bias.masked_fill_(~rows, 0)
    return masked


@torch.no_grad()
def unit_scores(
    model: nn.Module, stats: Mapping[str, InputStats] | None = None
) -> dict[str, Tensor]:
    """E||W_u x_u||^2 of each unit u: what its removal, alone, changes in the layer that reads it.

    W_u are the unit's columns of the reader and x_u what they read. It is the exact mean squared
    change of the reader's outputs. Without moments, E[x x^T] = I is supposed and the score is the
    energy ||W_u||^2 of the columns.

    Parameters
    ----------
    model : nn.Module
    stats : mapping
        layer name -> InputStats of every reader, as `model.collect` returns it

    Returns
    -------
    dict, name in `units(model)` -> (count,) float64 tensor

    Raises
    ------
    ValueError : as `units`; no moments of a reader
    """
    scores = {}
    for name, part in units(model).items():
        weight = as_matrix(model.get_submodule(part.reader)).double()
        weight = weight.unflatten(1, (part.count, part.columns)).transpose(0, 1)  # (count, m, c)
        if stats is None:
            scores[name] = weight.square().sum((1, 2))
            continue
        if part.reader not in stats:
            raise ValueError(f"no moments of {part.reader!r}; collect them with model.collect")
        second = stats[part.reader].second.to(weight)
        blocks = second.unflatten(0, (part.count, -1)).unflatten(2, (part.count, -1))
        own = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)  # (count, c, c)
        scores[name] = (weight @ own * weight).sum((1, 2)).clamp(min=0)
    return scores


@torch.no_grad()
def filter_norms(model: nn.Module) -> dict[str, Tensor]:
    """sum |w| over the rows that make each unit: the score of a filter, and of its like.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict, name in `units(model)` -> (count,) float64 tensor

    Raises
    ------
    ValueError : as `units`

    References
    ----------
    Li et al., arXiv 1608.08710, section 3.1, step 1. Biases are not counted.
    """
    return {
        name: sum(
            as_matrix(model.get_submodule(layer)).double().abs().sum(1).view(part.count, -1).sum(1)
            for layer in part.rows
        )
        for name, part in units(model).items()
    }


def weakest(scores: Mapping[str, Tensor], fraction: float) -> dict[str, list[int]]:
    """Of each name, the round(fraction * count) units of the smallest scores; one stays always.

    Parameters
    ----------
    scores : mapping
        name -> (count,) tensor. Of equal scores the first goes first
    fraction : float
        from 0 to 1

    Returns
    -------
    dict, name -> places in ascending order, as `remove` takes it

    Raises
    ------
    ValueError : a fraction outside [0, 1], or scores that are NaN
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}; give one from 0 to 1, such as 0.5")
    unknown = [name for name, score in scores.items() if score.isnan().any()]
    if unknown:
        raise ValueError(f"scores of {unknown} hold NaN; check the weights and the moments")
    return {
        name: score.argsort(stable=True)[
            : min(round(fraction * len(score)), len(score) - 1)
        ].sort().values.tolist()
        for name, score in scores.items()
    }  # fmt: skip


def _of_decoder(model: Decoder) -> Iterator[tuple[str, Units]]:
    for i, block in enumerate(model.blocks):
        attn, at = block.attn, f"blocks.{i}.attn"
        size, many = attn.size, attn.groups * attn.size
        heads = len(attn.k.weight) // size
        if attn.groups > 1:
            yield (
                f"{at}.q",
                Units("query head", heads * attn.groups, {f"{at}.q": size}, f"{at}.o", size),
            )
        rows = {f"{at}.q": many, f"{at}.k": size, f"{at}.v": size}
        yield f"{at}.v", Units("head", heads, rows, f"{at}.o", many)
        at = f"blocks.{i}.mlp"
        rows = {f"{at}.gate": 1, f"{at}.up": 1}
        yield f"{at}.up", Units("neuron", len(block.mlp.up.weight), rows, f"{at}.down", 1)


def _of_encoder(model: SentenceEncoder) -> Iterator[tuple[str, Units]]:
    for i, layer in enumerate(model.encoder["layer"]):
        at, size = f"encoder.layer.{i}", layer.size
        rows = {f"{at}.attention.self.{name}": size for name in layer.attention["self"]}
        value = f"{at}.attention.self.value"
        heads = len(model.get_submodule(value).weight) // size
        yield value, Units("head", heads, rows, f"{at}.attention.output.dense", size)
        dense = f"{at}.intermediate.dense"
        hidden = len(model.get_submodule(dense).weight)
        yield dense, Units("neuron", hidden, {dense: 1}, f"{at}.output.dense", 1)


def _of_chain(model: nn.Sequential) -> Iterator[tuple[str, Units]]:
    source, flat = None, False
    for name, module in model.named_children():
        if is_layer(module):
            if source is not None:
                makes, reads = model.get_submodule(source).weight, module.weight
                columns, rest = divmod(as_matrix(module).shape[1], len(makes))
                image = makes.ndim > reads.ndim  # rows of a linear layer read it flattened only
                if makes.ndim >= reads.ndim and image == flat and not rest:
                    kind = "channel" if makes.ndim > 2 else "neuron"
                    yield source, Units(kind, len(makes), {source: 1}, name, columns)
            source, flat = name, False
        elif type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flat = True
        elif type(module) in POOLING and source is not None:
            image = model.get_submodule(source).weight.ndim == 4 and not flat
            source = source if image else None
        elif type(module) not in UNITWISE:
            source = None


def _kept(
    model: nn.Module, removed: Mapping[str, Sequence[int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> which rows and which columns of its matrix stay, as masks."""
    known = units(model)
    unknown = [name for name in removed if name not in known]
    if unknown:
        raise ValueError(
            f"no units are named {unknown}; the model has {list(known)}. In a chain, nothing may"
            " stand between a unit and its reader that mixes units or has their number, such as"
            " BatchNorm"
        )
    touched = {n for name in removed for n in (*known[name].rows, known[name].reader)}
    kept = {
        name: tuple(
            torch.ones(n, dtype=torch.bool, device=layer.weight.device)
            for n in as_matrix(layer).shape
        )
        for name, layer in named(model, layers(model), touched).items()
    }
    for name, places in removed.items():
        part, chosen = known[name], _checked(name, places, known[name].count)
        for made, size in part.rows.items():
            kept[made][0].unflatten(0, (part.count, size))[chosen] = False
        kept[part.reader][1].unflatten(0, (part.count, part.columns))[chosen] = False
    if isinstance(model, Decoder):
        for i, block in enumerate(model.blocks):
            _check_groups(f"blocks.{i}.attn", block.attn, kept)
    return kept


def _checked(name: str, places: Sequence[int], count: int) -> list[int]:
    try:
        chosen = [operator.index(place) for place in places]
    except TypeError as error:
        raise ValueError(
            f"{name!r}: places {places!r}; give whole numbers, such as [0, 2]"
        ) from error
    inside = all(0 <= place < count for place in chosen)
    if not inside or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{name!r}: places {chosen} of {count}; name places from 0 to {count - 1}, each once"
        )
    if len(chosen) == count:
        raise ValueError(
            f"{name!r}: all {count} units; leave one or more (surgery.keep_layers takes out whole"
            " layers)"
        )
    return chosen


def _check_groups(at: str, attn: Attention, kept: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse key heads with different numbers of query heads: no grouped attention has them."""
    if f"{at}.q" not in kept:
        return
    queries = kept[f"{at}.q"][0].view(-1, attn.groups, attn.size)[..., 0].sum(1)
    if f"{at}.k" in kept:
        queries = queries[kept[f"{at}.k"][0].view(-1, attn.size)[:, 0]]
    if queries.min() == 0 or queries.min() < queries.max():
        raise ValueError(
            f"{at!r}: {queries.tolist()} of {attn.groups} query heads left with the key heads that"
            f" stay; leave equally many, one or more, with each, or take out key heads by"
            f" {at + '.v'!r}"
        )
