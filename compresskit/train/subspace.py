"""Training within a random subspace of all weights: how many directions does a task need?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from compresskit.linalg import hadamard_order, hadamard_transform


class Subspace(nn.Module):
    """A frozen model whose weights move along `dimension` random orthonormal directions only.

    theta = theta_0 + P z, and z is what is trained. P is rows of D H: `dimension` random columns of
    a Hadamard matrix with random signs, so P z takes a fast transform, and P is never stored.

    Parameters
    ----------
    model : nn.Module
        copied; theta_0 is its present weights
    dimension : int
        of z, 1 to the number of parameters
    seed : int
        of the directions

    Raises
    ------
    ValueError : a dimension out of range

    Notes
    -----
    Li et al., "Measuring the intrinsic dimension of objective landscapes", 2018, section 2 (with
    dense, sparse and Fastfood matrices; the one here is another of the fast kind). Columns are
    orthonormal up to the rows that the next Hadamard order has too many.
    Book: chapter "LoRA and QLoRA".
    """

    def __init__(self, model: nn.Module, dimension: int, *, seed: int = 0):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        named = dict(self.model.named_parameters())
        self.sizes = [p.numel() for p in named.values()]
        self.names, total = list(named), sum(self.sizes)
        if type(dimension) is not int or not 1 <= dimension <= total:
            raise ValueError(f"dimension={dimension!r}; use 1 to {total}, the model's parameters")
        generator = torch.Generator().manual_seed(seed)
        order = hadamard_order(total)
        device = next(iter(named.values())).device
        columns = torch.randperm(order, generator=generator)[:dimension]
        signs = torch.randint(0, 2, (total,), generator=generator) * 2.0 - 1
        self.order = order
        self.register_buffer("columns", columns.to(device))
        self.register_buffer("signs", signs.to(device))
        self.z = nn.Parameter(torch.zeros(dimension, device=device))

    def move(self, z: Tensor) -> Tensor:
        """P z, (parameters,)."""
        wide = z.new_zeros(self.order).index_put((self.columns,), z)
        return hadamard_transform(wide)[: len(self.signs)] * self.signs

    def weights(self) -> dict[str, Tensor]:
        """The present weights, by name."""
        parts = self.move(self.z).split(self.sizes)
        named = dict(self.model.named_parameters())
        return {
            name: named[name] + part.reshape(named[name].shape)
            for name, part in zip(self.names, parts, strict=True)
        }

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.model, self.weights(), args, kwargs)

    def moved(self) -> nn.Module:
        """A model of the original kind with the present weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict({n: t.detach() for n, t in self.weights().items()}, strict=False)
        return model.requires_grad_(True)
