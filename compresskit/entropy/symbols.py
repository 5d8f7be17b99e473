"""What all coders take and give: whole numbers of at most 32 bits, of any shape."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compresskit.code import Leaf
from compresskit.entropy.streams import check_size

_AS_THEY_ARE = (torch.uint8, torch.int8, torch.int16, torch.int32)


def symbols(levels: Tensor | Leaf) -> tuple[np.ndarray, tuple[int, ...]]:
    """The whole numbers in row-major order, in an array of at most 32 bits, and their shape.

    Raises
    ------
    ValueError : not whole numbers, beyond 32 bits, more than a stream holds
    """
    if isinstance(levels, Leaf):
        levels = levels.tensor if hasattr(levels, "width") else levels.decode()
    if levels.is_floating_point() or levels.is_complex():
        raise ValueError(f"symbols are whole numbers, not {levels.dtype}; round them first")
    size, _ = check_size(list(levels.shape))
    levels = levels.detach().cpu()
    if levels.dtype == torch.bool:
        levels = levels.to(torch.uint8)
    elif levels.dtype not in _AS_THEY_ARE:
        low, high = (int(end) for end in levels.aminmax()) if levels.numel() else (0, 0)
        if low < -(1 << 31) or high >= 1 << 31:
            raise ValueError(f"symbols from {low} to {high}; they must fit into 32 signed bits")
        levels = levels.to(torch.int32)
    return levels.contiguous().reshape(-1).numpy(), size


def as_tensor(levels: np.ndarray, size: tuple[int, ...], device: torch.device) -> Tensor:
    """The symbols as an int32 tensor of their shape."""
    whole = np.ascontiguousarray(levels, np.int32)
    return torch.from_numpy(whole).reshape(size).to(device)
