"""AdamW with its two averages in 8 bits each: 2 bytes of state per parameter instead of 8."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compresskit.codebook import TABLES, block_scales, nearest, normalized

BLOCK = 256
SMALLEST = 4096


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose averages of gradients and of their squares are stored in 8 bits per entry.

    Each is decoded, updated in float32, and coded again: an index of a table in which steps grow
    with the value, and a float32 scale for every 256 entries. A second average is never rounded to
    0, since the step divides by its root.

    Parameters
    ----------
    params : iterable
        parameters or groups, as for `torch.optim.AdamW`
    lr : float
    betas : (float, float)
    eps : float
    weight_decay : float
    smallest : int
        parameters with fewer entries keep float32 states

    Raises
    ------
    ValueError : a rate, constant or decay out of range

    Notes
    -----
    Dettmers et al., "8-bit optimizers via block-wise quantization", 2021, section 2 (with blocks
    of 2,048 there; of 256 as in bitsandbytes today).
    Book: chapter "LoRA and QLoRA".
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        smallest: int = SMALLEST,
    ):
        in_range = lr >= 0 and all(0 <= beta < 1 for beta in betas) and eps > 0
        if not in_range or weight_decay < 0 or smallest < 0:
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay},"
                f" smallest={smallest}; for instance 1e-3, (0.9, 0.999), 1e-8, 0.01 and {SMALLEST}"
            )
        kept = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**kept, "smallest": smallest})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict) -> None:
        state, gradient = self.state[parameter], parameter.grad.float()
        state["step"] = state.get("step", 0) + 1
        averages = {}
        for name, beta, new in zip(
            ("mean", "square"), group["betas"], (gradient, gradient.square()), strict=True
        ):
            old = _decoded(state, name, gradient)
            averages[name] = (
                (old * beta + new * (1 - beta)) if old is not None else new * (1 - beta)
            )
            _store(state, name, averages[name], coded=gradient.numel() >= group["smallest"])
        first, second = group["betas"]
        mean = averages["mean"] / (1 - first ** state["step"])
        square = averages["square"] / (1 - second ** state["step"])
        moved = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter.float()
        parameter.sub_(group["lr"] * moved.to(parameter.dtype))


_TABLE = {"mean": "dynamic8", "square": "dynamic8 unsigned"}


def _store(state: dict, name: str, value: Tensor, *, coded: bool) -> None:
    if not coded:
        state[name] = value
        return
    scale = block_scales(value, BLOCK)
    index = nearest(normalized(value, scale, BLOCK), TABLES[_TABLE[name]])
    if name == "square":
        index += (index == 0) & (value > 0)
    state[name], state[f"{name}_scale"] = index.to(torch.uint8), scale


def _decoded(state: dict, name: str, like: Tensor) -> Tensor | None:
    index = state.get(name)
    if index is None or f"{name}_scale" not in state:
        return index
    # A state dictionary that was loaded has its tensors in the parameter's dtype.
    values = TABLES[_TABLE[name]].to(like.device)[index.long()]
    scale = state[f"{name}_scale"].float().repeat_interleave(BLOCK)[: like.numel()]
    return values * scale.reshape(like.shape)
