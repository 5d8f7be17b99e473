"""Layers whose code is a product, as two smaller layers that can be trained."""

import copy

from torch import nn

from compresskit.layers import CompressedLinear
from compresskit.lowrank import LowRank
from compresskit.model import replaced


def factorized(model: nn.Module) -> nn.Module:
    """A copy in which every linear layer with a `LowRank` code is two dense layers in a row.

    The first has no bias, the second the layer's own. Both are ordinary `nn.Linear` layers, whose
    weights are the decoded factors and can be trained.

    Parameters
    ----------
    model : nn.Module
        as `compresskit.model.compress` returns it

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError : no layer has such a code
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) and isinstance(module.code, LowRank)
    ]
    if not found:
        raise ValueError(
            "no linear layer has a LowRank code; compress one first, for instance with"
            " methods.svd(rank=...)"
        )
    model = copy.deepcopy(model)
    for name in found:
        layer = model.get_submodule(name)
        code, dtype = layer.code, layer.dtype
        first = _linear(code.right.decode().to(dtype), None)
        second = _linear(code.left.decode().to(dtype), layer.bias)
        pair = nn.Sequential(first, second).train(layer.training)
        model = replaced(model, name, pair)
    return model


def _linear(weight, bias) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
