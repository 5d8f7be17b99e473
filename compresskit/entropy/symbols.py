"""What all coders take and give: whole numbers of at most 32 bits, of any shape."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from compresskit.code import Bits, Leaf
from compresskit.entropy.streams import check_size

_AS_THEY_ARE = (torch.uint8, torch.int8, torch.int16, torch.int32)


def symbols(levels: Tensor | Leaf) -> tuple[np.ndarray, tuple[int, ...]]:
    """The whole numbers in row-major order, in an array of at most 32 bits, and their shape.

    Raises
    ------
    ValueError : not whole numbers, beyond 32 bits, more than a stream holds
    """
    if isinstance(levels, Leaf):
        levels = levels.tensor if isinstance(levels, Bits) else levels.decode()
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


def stored(stream: bytes, given: Tensor | Leaf) -> Tensor:
    """The bytes of a stream as a tensor, on the device of what was coded."""
    device = (given.tensor if isinstance(given, Leaf) else given).device
    return torch.from_numpy(np.frombuffer(stream, np.uint8).copy()).to(device)


@dataclass(frozen=True, eq=False)
class Stream(Leaf):
    """A leaf that lies coded in memory too, as it does in a file; a subclass reads it.

    Parameters
    ----------
    tensor : (bytes,) uint8 tensor
    size : tuple
        the shape of what it stands for
    """

    tensor: Tensor
    size: tuple[int, ...]

    def __post_init__(self):
        if self.tensor.dtype != torch.uint8 or self.tensor.ndim != 1:
            raise ValueError(
                f"a stream is a vector of uint8, not {tuple(self.tensor.shape)} of"
                f" {self.tensor.dtype}; let a coder make it"
            )
        check_size(self.size)

    @abstractmethod
    def levels(self, data: bytes, count: int) -> np.ndarray:
        """The `count` symbols, 1 or more, that the bytes hold; `ValueError` if they do not."""

    def decode(self) -> Tensor:
        size, count = check_size(self.size)
        if self.tensor.is_meta:
            return torch.empty(size, dtype=torch.int32, device="meta")
        data = self.to_bytes()
        if not count and data:
            raise ValueError(f"{len(data)} bytes for no symbols: the stream was changed")
        levels = self.levels(data, count) if count else np.zeros(0, np.int32)
        return as_tensor(levels, size, self.tensor.device)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()

    def to_bytes(self) -> bytes:
        return self.tensor.detach().cpu().numpy().tobytes()

    def header(self) -> dict:
        names = [field.name for field in fields(self) if field.name not in ("tensor", "size")]
        return {"size": list(self.size)} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Stream:
        size, _ = check_size(header.get("size"))
        names = [field.name for field in fields(cls) if field.name not in ("tensor", "size")]
        stream = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return cls(stream, size, **{name: header.get(name) for name in names})
