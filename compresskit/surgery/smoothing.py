"""Scales moved from a layer's inputs into its weights, and folded into what makes the inputs."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from compresskit.layers import is_table
from compresskit.methods.smooth import smoothing_scale
from compresskit.model import layers
from compresskit.models.decoder import Decoder
from compresskit.stats import InputStats


@torch.no_grad()
def smooth(
    model: nn.Module,
    stats: Mapping[str, InputStats],
    *,
    sources: Mapping[str, Sequence[str]] | None = None,
    alpha: float = 0.5,
) -> nn.Module:
    """A copy of `model` that computes the same with x / s and W diag(s) for x and W.

    s is that of `compresskit.methods.smooth`, with one s for all layers that read the same x.
    Nothing is stored and nothing happens at run time: 1/s goes into the weight and bias of the
    source of x, a norm or a linear layer.

    Parameters
    ----------
    model : nn.Module
    stats : mapping
        layer name -> InputStats, as `model.collect` returns it. In the result the inputs are
        others: collect again before compressing it
    sources : mapping
        name of a module -> names of *all* layers that read its output, and each coordinate of it
        by itself: norm -> linear layers, or a linear layer -> another, with nothing between
        them but products by other things. None: those of a `Decoder` (`sources_of`)
    alpha : float
        from 0 to 1: how much of the outliers to move

    Returns
    -------
    a new model; the same function up to rounding

    Raises
    ------
    ValueError : no `sources` for a model that is no `Decoder`; a name that is no layer of the
        model (a source: no module with a weight, or a table), or has no moments; a weight that
        would be scaled twice; a source whose outputs are not the inputs of its layers; `alpha`
        outside [0, 1]

    References
    ----------
    Xiao et al., "SmoothQuant", arXiv 2211.10438, section 4.
    """
    if sources is None:
        sources = sources_of(model)
    known = layers(model)
    read = [name for readers in sources.values() for name in readers]
    unknown = [name for name in read if name not in known]
    if unknown:
        raise ValueError(f"no layer is named {unknown}; the model has {list(known)}")
    silent = [name for name in read if name not in stats]
    if silent:
        raise ValueError(f"no moments of {silent}; collect them with model.collect")
    weighted = [
        name
        for name, module in model.named_modules()
        if "weight" in dict(module.named_parameters(recurse=False)) and not is_table(module)
    ]
    absent = [name for name in sources if name not in weighted]
    if absent:
        raise ValueError(f"no norm or dense layer is named {absent}; the model has {weighted}")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = (*sources, *read)
    twice = [name for name in names if owners[id(model.get_submodule(name).weight)] > 1]
    twice = twice or [name for name, times in Counter(read).items() if times > 1]
    if twice:
        raise ValueError(
            f"{twice} would be scaled twice; name each reader once, and give each a weight of its"
            " own"
        )
    model = copy.deepcopy(model)
    for name, readers in sources.items():
        source, linear = model.get_submodule(name), [model.get_submodule(r) for r in readers]
        width = len(source.weight)
        if not readers or any(layer.weight.shape[1:] != (width,) for layer in linear):
            shapes = [tuple(layer.weight.shape) for layer in linear]
            raise ValueError(
                f"{name!r} has {width} outputs and its readers weights of shape {shapes}; each"
                f" needs {width} columns, and there must be one or more"
            )
        seen = [stats[reader].max_abs for reader in readers]
        if any(len(max_abs) != width for max_abs in seen):
            raise ValueError(
                f"moments of {[len(max_abs) for max_abs in seen]} inputs for {list(readers)}, which"
                f" have {width}; collect them from this model"
            )
        max_abs = torch.stack(seen).amax(0)
        weights = [layer.weight.float() for layer in linear]
        scale = smoothing_scale(max_abs.to(weights[0].device), weights, alpha=alpha)
        for layer in linear:
            layer.weight.mul_(scale)
        for parameter in (source.weight, getattr(source, "bias", None)):
            if parameter is not None:
                parameter.div_(scale.reshape(-1, *[1] * (parameter.ndim - 1)))
    return model


def sources_of(model: nn.Module) -> dict[str, list[str]]:
    """What makes the inputs of which layers in a `Decoder`, where scales pass between them.

    The norms feed the layers after them. Channels of `up` pass through products only until
    `down`, and those of `v` through averages over positions until `o`, unless several query
    heads share a channel of `v`.

    Raises
    ------
    ValueError : `model` is no Decoder
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"a {type(model).__name__}; name the sources, for instance"
            " sources={'norm': ['query', 'key', 'value']}"
        )
    found = {}
    for i, block in enumerate(model.blocks):
        at = f"blocks.{i}."
        found[f"{at}attn_norm"] = [f"{at}attn.{name}" for name in "qkv"]
        found[f"{at}mlp_norm"] = [f"{at}mlp.gate", f"{at}mlp.up"]
        found[f"{at}mlp.up"] = [f"{at}mlp.down"]
        if block.attn.groups == 1:
            found[f"{at}attn.v"] = [f"{at}attn.o"]
    return found
