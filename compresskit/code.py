"""What a compressed tensor is: a tree whose inner nodes are formulas and whose leaves are bytes.

(Over 200 lines with the contract of leaves, which every entropy coder will have to keep.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit import bits

FLOATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Code(ABC):
    """An immutable description of a tensor. Subclasses are frozen dataclasses.

    A subclass says how to rebuild the tensor (`decode`). It never says how large it is: size is a
    property of the leaves, so no method can forget its scales, masks or codebooks.

    Fields that are codes are the node's children; any other field must be a JSON value (an
    integer, a string, a list) and is part of the formula.
    """

    #: Whether `product` rounds its inputs too, so that it is not the product with `decode()`.
    quantizes_inputs = False

    @abstractmethod
    def decode(self) -> Tensor:
        """The tensor this code stands for."""

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias for the (m, n) matrix W: what a linear layer does with this code.

        A node that multiplies without decoding, or by another arithmetic, says so itself.

        Parameters
        ----------
        x : (..., n) tensor
        bias : (m,) tensor
            None: none

        Returns
        -------
        (..., m) tensor of the dtype of `x`
        """
        return F.linear(x, self.decode().to(x.dtype), bias)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded tensor; a node that knows it without decoding says so itself."""
        return tuple(self.decode().shape)

    @property
    def kept(self) -> Tensor | None:
        """Which entries are stored, as a bool tensor of this shape; None: all of them.

        A formula over this code gives 0 for the others.
        """
        return None

    def children(self) -> dict[str, Code]:
        """The codes this formula is made of, by field name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Code)}

    def leaves(self, prefix: str = "") -> dict[str, Leaf]:
        """Every stored array, by dotted path."""
        found = {}
        for name, child in self.children().items():
            found |= child.leaves(f"{prefix}{name}.")
        return found

    def map(self, fn: Callable[[str, Leaf], Code], prefix: str = "") -> Code:
        """The same formula over rewritten leaves: each becomes `fn(path, leaf)`."""
        children = self.children().items()
        return replace(
            self, **{name: child.map(fn, f"{prefix}{name}.") for name, child in children}
        )

    def to(self, device: torch.device | str) -> Code:
        """The same code with its stored arrays on `device`."""
        return self.map(lambda path, leaf: replace(leaf, tensor=leaf.tensor.to(device)))

    @property
    def nbytes(self) -> int:
        """Bytes this code takes in a file: the sum over its leaves, nothing left out."""
        return sum(self.size_table().values())

    def size_table(self) -> dict[str, int]:
        """Bytes per stored array, by dotted path."""
        return {path: leaf.nbytes for path, leaf in self.leaves().items()}


class Leaf(Code):
    """A code that is stored as it stands, in a dataclass field named `tensor`.

    The contract: `nbytes == len(to_bytes())`, and `from_bytes(leaf.to_bytes(), leaf.header())`
    is the same leaf.
    """

    tensor: Tensor

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The stored bytes, little-endian, the same on every platform."""

    @abstractmethod
    def header(self) -> dict:
        """What `from_bytes` must know besides the bytes, as a JSON object."""

    @classmethod
    @abstractmethod
    def from_bytes(cls, data: bytes, header: dict) -> Leaf:
        """The leaf that `data` holds; `ValueError` if `data` and `header` do not fit together."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def leaves(self, prefix: str = "") -> dict[str, Leaf]:
        return {prefix.rstrip("."): self}

    def map(self, fn: Callable[[str, Leaf], Code], prefix: str = "") -> Code:
        return fn(prefix.rstrip("."), self)


@dataclass(frozen=True, eq=False)
class Array(Leaf):
    """A floating-point tensor stored at its own dtype: float32, float16 or bfloat16.

    Examples
    --------
    >>> Array(torch.ones(3, dtype=torch.float16)).nbytes
    6
    """

    tensor: Tensor

    def __post_init__(self):
        if self.tensor.dtype not in FLOATS.values():
            raise ValueError(
                f"an Array stores {', '.join(FLOATS)}, not {self.tensor.dtype}; integers go in Bits"
            )

    def decode(self) -> Tensor:
        return self.tensor.float()

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def to_bytes(self) -> bytes:
        flat = self.tensor.detach().cpu().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()

    def header(self) -> dict:
        return {"dtype": str(self.tensor.dtype).removeprefix("torch."), "shape": self.tensor.shape}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Array:
        dtype = FLOATS.get(str(header.get("dtype")))
        if dtype is None:
            raise ValueError(f"dtype {header.get('dtype')!r}; it must be one of {list(FLOATS)}")
        shape, count = check_shape(header.get("shape"))
        if len(data) != count * dtype.itemsize:
            raise ValueError(
                f"{len(data)} bytes given; shape {shape} takes {count * dtype.itemsize}"
            )
        flat = (
            torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        )
        return cls(flat.reshape(shape))


@dataclass(frozen=True, eq=False)
class Bits(Leaf):
    """Unsigned integers stored `width` bits each (`compresskit.bits`).

    In memory they lie unpacked, uint8 up to 8 bits and int32 above; a file holds them packed.

    Examples
    --------
    >>> Bits.of(torch.tensor([5, 6, 7]), width=3).nbytes  # 9 bits
    2
    """

    tensor: Tensor
    width: int

    def __post_init__(self):
        bits.check_width(self.width)
        if self.tensor.dtype not in (torch.uint8, torch.int32):
            raise ValueError(
                f"Bits holds uint8 or int32, not {self.tensor.dtype}; use Bits.of(values, width)"
            )

    @classmethod
    def of(cls, values: Tensor, width: int) -> Bits:
        """Whole numbers in [0, 2**width), of any dtype, as a leaf; `ValueError` if one is not."""
        bits.check_width(width)
        top = (1 << width) - 1
        if values.numel() and not (values.min() >= 0 and values.max() <= top):
            raise ValueError(
                f"values span {values.min():g} to {values.max():g}; {width} bits hold 0 to {top}"
            )
        whole = values.to(torch.uint8 if width <= 8 else torch.int32)
        if values.is_floating_point() and not torch.equal(whole.to(values.dtype), values):
            raise ValueError("values are not whole numbers; round them first")
        return cls(whole, width)

    def decode(self) -> Tensor:
        return self.tensor.int()

    @property
    def nbytes(self) -> int:
        return bits.packed_size(self.tensor.numel(), self.width)

    def to_bytes(self) -> bytes:
        return bits.pack(self.tensor, self.width)

    def header(self) -> dict:
        return {"width": self.width, "shape": self.tensor.shape}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Bits:
        shape, count = check_shape(header.get("shape"))
        width = header.get("width")
        return cls(bits.unpack(data, width, count).reshape(shape), width)


@dataclass(frozen=True, eq=False)
class Trits(Leaf):
    """Levels 0, 1 and 2, five to a byte: 3**5 = 243 of its 256 values, 1.6 bits each.

    The first of five counts most (81 times its level), so bytes sort as what they stand for; the
    last byte is filled up with zeros. In memory they lie unpacked, as uint8.

    Examples
    --------
    >>> Trits.of(torch.tensor([2, 0, 1, 1, 2])).to_bytes()  # 162 + 9 + 3 + 2
    b'\xb0'
    """

    tensor: Tensor

    def __post_init__(self):
        if self.tensor.dtype != torch.uint8:
            raise ValueError(f"Trits holds uint8, not {self.tensor.dtype}; use Trits.of(values)")

    #: Bits that would hold a level by itself.
    width = 2

    @classmethod
    def of(cls, values: Tensor) -> Trits:
        """Levels 0, 1 and 2, of any dtype, as a leaf; `ValueError` if one is something else."""
        if not ((values == 0) | (values == 1) | (values == 2)).all():
            raise ValueError(
                f"values span {values.min():g} to {values.max():g}; the levels are 0, 1 and 2"
            )
        return cls(values.to(torch.uint8))

    def decode(self) -> Tensor:
        return self.tensor.int()

    @property
    def nbytes(self) -> int:
        return -(-self.tensor.numel() // 5)

    def to_bytes(self) -> bytes:
        return bits.pack_trits(self.tensor)

    def header(self) -> dict:
        return {"shape": self.tensor.shape}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Trits:
        shape, count = check_shape(header.get("shape"))
        return cls(bits.unpack_trits(data, count).reshape(shape))


@dataclass(frozen=True, eq=False)
class Packed(Leaf):
    """Unsigned integers of 1, 2 or 4 bits that lie packed in memory too, as they do in a file.

    An eighth to a half of what `Bits` takes in memory, for unpacking at every use.

    Examples
    --------
    >>> leaf = Packed.of(Bits.of(torch.tensor([5, 6, 7]), width=4))
    >>> leaf.tensor.tolist(), leaf.decode().tolist()
    ([86, 112], [5, 6, 7])
    """

    tensor: Tensor
    width: int
    size: tuple[int, ...]

    def __post_init__(self):
        if self.width not in (1, 2, 4):
            raise ValueError(f"width={self.width!r}; 1, 2 and 4 bits divide a byte evenly")
        size, count = check_shape(self.size)
        nbytes = bits.packed_size(count, self.width)
        if self.tensor.dtype != torch.uint8 or tuple(self.tensor.shape) != (nbytes,):
            raise ValueError(
                f"{tuple(self.tensor.shape)} of {self.tensor.dtype}; {size} in {self.width} bits"
                f" each are ({nbytes},) of torch.uint8"
            )

    @classmethod
    def of(cls, leaf: Bits) -> Packed:
        """The same integers, packed."""
        octets = torch.from_numpy(np.frombuffer(leaf.to_bytes(), np.uint8).copy())
        return cls(octets.to(leaf.tensor.device), leaf.width, tuple(leaf.tensor.shape))

    def decode(self) -> Tensor:
        shifts = torch.arange(8 - self.width, -1, -self.width, device=self.tensor.device)
        spread = self.tensor[:, None].bitwise_right_shift(shifts.to(torch.uint8))
        count = check_shape(self.size)[1]
        return (spread & ((1 << self.width) - 1)).reshape(-1)[:count].reshape(self.size).int()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.size)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel()

    def to_bytes(self) -> bytes:
        return self.tensor.detach().cpu().numpy().tobytes()

    def header(self) -> dict:
        return {"width": self.width, "size": list(self.size)}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Packed:
        width, (size, count) = header.get("width"), check_shape(header.get("size"))
        return cls.of(Bits(bits.unpack(data, width, count).reshape(size), width))


def packed(code: Code) -> Code:
    """The same code with its integers of 1, 2 and 4 bits packed in memory."""
    return code.map(
        lambda path, leaf: (
            Packed.of(leaf) if isinstance(leaf, Bits) and leaf.width in (1, 2, 4) else leaf
        )
    )


@dataclass(frozen=True, eq=False)
class Sum(Code):
    """first + second: a coarse code, and a code for what it left over."""

    first: Code
    second: Code

    def __post_init__(self):
        if self.first.shape != self.second.shape:
            raise ValueError(
                f"the terms of a Sum have shapes {self.first.shape} and {self.second.shape};"
                " they must be equal"
            )

    def decode(self) -> Tensor:
        return self.first.decode() + self.second.decode()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape


def check_float(name: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that an Array does not store (`ValueError`); `name` is the argument's."""
    if dtype not in FLOATS.values():
        raise ValueError(f"{name}={dtype}; it must be one of {list(FLOATS)}")


def check_shape(shape) -> tuple[list[int], int]:
    """A shape read from a file and its number of elements; `ValueError` if it is not a shape."""
    whole = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or len(shape) > 8:
        raise ValueError(f"shape {shape!r}; it must be a list of at most 8 sizes, like [64, 128]")
    count = 1
    for n in shape:
        count *= n
    return list(shape), count
