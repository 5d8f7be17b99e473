"""Layers taken out: model -> the same kind of model, with fewer."""

import copy
from collections.abc import Sequence
from dataclasses import is_dataclass, replace

from torch import nn


def keep_layers(model: nn.Module, stack: str, places: Sequence[int]) -> nn.Module:
    """A copy of `model` with only these layers of a stack, in this order.

    Every kept layer must take what any other returns, as in a transformer. With places 0, 2, 4,
    ... this is the initialization of DistilBERT.

    Parameters
    ----------
    model : nn.Module
        left as it is
    stack : str
        name of the `nn.ModuleList` of layers, such as "blocks" or "encoder.layer"
    places : sequence of int
        which layers, counted from 0

    Returns
    -------
    a new model, whose `config.layers`, if it has one, is the new number

    Raises
    ------
    ValueError : no such stack, no layer kept, or a place outside the stack or named twice

    References
    ----------
    Sanh et al., "DistilBERT", arXiv 1910.01108, section 3 ("Student initialization").

    Examples
    --------
    >>> model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(2, 2) for _ in range(6))})
    >>> len(keep_layers(model, "blocks", [0, 2, 4])["blocks"])
    3
    """
    stacks = {name: m for name, m in model.named_modules() if type(m) is nn.ModuleList}
    if stack not in stacks:
        raise ValueError(f"no stack {stack!r}; this model has {', '.join(stacks) or 'none'}")
    places, count = list(places), len(stacks[stack])
    inside = all(0 <= place < count for place in places)
    if not places or not inside or len(set(places)) < len(places):
        raise ValueError(
            f"places={places} of {count} layers; name one or more of 0 to {count - 1}, each once,"
            f" such as {list(range(0, count, 2))}"
        )
    memo: dict = {}  # tensors that layers share with the rest of the model stay shared
    kept = nn.ModuleList(copy.deepcopy(stacks[stack][place], memo) for place in places)
    memo[id(stacks[stack])] = kept  # so that the others are not even copied
    small = copy.deepcopy(model, memo)
    config = getattr(small, "config", None)
    if is_dataclass(config) and hasattr(config, "layers"):
        small.config = replace(config, layers=len(places))
    return small
