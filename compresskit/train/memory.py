"""What training holds in memory: weights, gradients, optimizer states, and what backward needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Memory(NamedTuple):
    """Bytes.

    Parameters
    ----------
    weights : int
        parameters and buffers, frozen ones and codes included
    gradients : int
    states : int
        of the optimizer
    activations : int
        what the forward pass keeps for the backward pass, weights not counted again
    """

    weights: int
    gradients: int
    states: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def measured(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
) -> Memory:
    """What one step of training holds, counted tensor by tensor; the step is made.

    Parameters
    ----------
    model : nn.Module
    loss : callable
        (model, batch) -> scalar
    batch : whatever `loss` takes
    optimizer : torch.optim.Optimizer
        of the trained parameters

    Notes
    -----
    Storages are counted once, however many tensors look at them, and as long as they are. The
    allocator's own overhead and what a kernel needs while it runs are not in it.
    """
    held = [*model.parameters(), *model.buffers()]
    known = {_place(t) for t in held}
    seen: dict[int, int] = {}
    alive = []  # a freed storage's place would be used again

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in known:
            seen[_place(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    optimizer.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model, batch)
    activations = sum(seen.values())
    alive.clear()
    value.backward()
    gradients = sum(_nbytes(p.grad) for p in model.parameters() if p.grad is not None)
    optimizer.step()
    states = sum(
        _nbytes(t)
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor) and t.ndim
    )
    weights = sum({_place(t): t.untyped_storage().nbytes() for t in held}.values())
    return Memory(weights, gradients, states, activations)


def predicted(model: nn.Module, *, state_bytes: float = 8.0) -> Memory:
    """The same but for activations, from the number of trained parameters.

    Parameters
    ----------
    model : nn.Module
    state_bytes : float
        of the optimizer per trained parameter: 8 for Adam in float32, 2 + 8/256 for 8-bit states

    Returns
    -------
    Memory, with 0 for activations
    """
    weights = sum(map(_nbytes, [*model.parameters(), *model.buffers()]))
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(map(_nbytes, trained))
    return Memory(weights, gradients, round(state_bytes * sum(p.numel() for p in trained)), 0)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
