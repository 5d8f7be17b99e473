"""Compress in another basis: W x = (W V^+) (V x) for any V with V^+ V = I.

(Over 200 lines, two thirds of them statements and refusals: three bases, and the code in one.)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit import linalg
from compresskit.code import Bits, Code, Leaf


class Basis(Code):
    """A stored map x -> V x of the inputs, V of shape (N, n) with left inverse V^+: V^+ V = I.

    `decode()` is V itself; the methods multiply by it without building it. `monomial` says that
    each new coordinate is a positive multiple of a single old one, so that |V x| = V |x|.
    """

    monomial = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, n)."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """V x along the last axis: (..., n) -> (..., N)."""

    @abstractmethod
    def into(self, weight: Tensor) -> Tensor:
        """weight V^+, the matrix for the new coordinates: (m, n) -> (m, N)."""

    @abstractmethod
    def undo(self, weight: Tensor) -> Tensor:
        """weight V, back in the old coordinates: (m, N) -> (m, n)."""

    def decode(self) -> Tensor:
        return self.undo(torch.eye(self.shape[0], device=self._device))

    @property
    def _device(self) -> torch.device:
        return next(iter(self.leaves().values())).tensor.device


@dataclass(frozen=True, eq=False)
class Permutation(Basis):
    """V x = x[order]: the same coordinates in another order.

    Parameters
    ----------
    order : Code
        (n,) each of 0 ... n-1 once; `of` stores it at ceil(log2 n) bits each

    Raises
    ------
    ValueError : `order` is no stored vector, or not a permutation

    Examples
    --------
    >>> basis = Permutation.of(torch.tensor([2, 0, 1]))
    >>> basis.apply(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    >>> basis.nbytes  # 3 places of 2 bits
    1
    """

    order: Code

    monomial = True

    def __post_init__(self):
        order = _stored_vector(self.order, "an order")
        if order.is_floating_point():
            raise ValueError(f"an order of {order.dtype}; whole numbers in Bits are needed")
        places = torch.arange(len(order), device=order.device)
        if not order.is_meta and not torch.equal(order.sort().values, places.to(order.dtype)):
            raise ValueError(
                f"the order is no permutation: it must hold each of 0 to {len(order) - 1} once"
            )

    @classmethod
    def of(cls, order: Tensor) -> Permutation:
        """The permutation that a tensor of n whole numbers lists, as few bits as they need."""
        return cls(Bits.of(order, max(1, (len(order) - 1).bit_length())))

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.order.shape

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order.decode())

    def into(self, weight: Tensor) -> Tensor:
        return self.apply(weight)

    def undo(self, weight: Tensor) -> Tensor:
        return weight.index_select(-1, self.order.decode().argsort())


@dataclass(frozen=True, eq=False)
class Scales(Basis):
    """V = diag(1/s): each input divided by its scale, each column of the weight multiplied by it.

    Parameters
    ----------
    scale : Code
        (n,) positive numbers s

    Raises
    ------
    ValueError : not a stored vector, or a scale that is zero, negative or not finite

    Examples
    --------
    >>> from compresskit.code import Array
    >>> basis = Scales(Array(torch.tensor([1.0, 4.0])))
    >>> basis.into(torch.tensor([[1.0, 1.0]])), basis.apply(torch.tensor([1.0, 1.0]))
    (tensor([[1., 4.]]), tensor([1.0000, 0.2500]))
    """

    scale: Code

    monomial = True

    def __post_init__(self):
        scale = _stored_vector(self.scale, "scales")
        if not scale.is_meta and not ((scale > 0) & scale.isfinite()).all():
            raise ValueError(
                f"scales from {scale.min():.3g} to {scale.max():.3g}; they must be finite and above"
                " 0 in the dtype in which they are stored, for instance torch.float32"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.scale.shape

    def apply(self, x: Tensor) -> Tensor:
        return (x / self.scale.decode()).to(x.dtype)  # in float32: 1/s is not rounded first

    def into(self, weight: Tensor) -> Tensor:
        return weight * self.scale.decode()

    def undo(self, weight: Tensor) -> Tensor:
        return weight / self.scale.decode()


@dataclass(frozen=True, eq=False)
class Rotation(Basis):
    """V = H D P: zeros appended up to length N (P), signs flipped (D), a Hadamard matrix (H).

    Its columns are orthonormal, V^+ = V^T, so it changes no length and no inner product, and
    costs N times the sum of H's Kronecker factors instead of N n. N is an order for which
    `linalg.hadamard` has a matrix.

    Parameters
    ----------
    signs : Code
        (N,) bits: 1 flips the sign of a coordinate
    width : int
        n, at most N

    Raises
    ------
    ValueError : `signs` is no stored vector of 0 and 1, no Hadamard matrix of order N can be built,
        or n is not in 1 ... N

    References
    ----------
    Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform", SIAM J. Comput. 2009 (the
    transform); Ashkboos et al., "QuaRot", arXiv 2404.00456 (its use here).
    """

    signs: Code
    width: int

    def __post_init__(self):
        signs = _stored_vector(self.signs, "signs")
        shape = tuple(signs.shape)
        if type(self.width) is not int or not 1 <= self.width <= shape[0]:
            raise ValueError(
                f"signs of shape {shape} for {self.width!r} inputs; (N,) with N >= n >= 1 is needed"
            )
        if not signs.is_meta and not ((signs == 0) | (signs == 1)).all():
            raise ValueError("signs that are not 0 or 1; store them as Bits of width 1")
        if linalg.hadamard_order(shape[0]) != shape[0]:
            raise ValueError(
                f"no Hadamard matrix of order {shape[0]} can be built here; the next order for"
                f" which there is one is {linalg.hadamard_order(shape[0])}"
            )

    @classmethod
    def random(cls, n: int, *, seed: int = 0, device: torch.device | str = "cpu") -> Rotation:
        """Of `n` inputs, with signs drawn by `seed`: the same on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        order = linalg.hadamard_order(n)
        signs = torch.randint(2, (order,), generator=generator, device="cpu")
        return cls(Bits.of(signs, 1).to(device), n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.signs.shape[0], self.width

    def apply(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, self.shape[0] - self.width))
        return linalg.hadamard_transform(padded * self._signs(x))

    def into(self, weight: Tensor) -> Tensor:
        return self.apply(weight)  # row by row, as V^+ = V^T

    def undo(self, weight: Tensor) -> Tensor:
        turned = linalg.hadamard_transform(weight, transposed=True) * self._signs(weight)
        return turned[..., : self.width]

    def _signs(self, like: Tensor) -> Tensor:
        return 1 - 2 * self.signs.decode().to(like)


def _stored_vector(code: Code, what: str) -> Tensor:
    """What a leaf holds, if it is (n,) with n >= 1; formulas are refused before they are decoded.

    A damaged file may name one that fills the memory.
    """
    if not isinstance(code, Leaf) or len(code.shape) != 1 or not code.shape[0]:
        kind = f"a {type(code).__name__} of shape {tuple(code.shape)}"
        raise ValueError(f"{what}: {kind}; a stored array (n,) with n >= 1 is needed")
    return code.decode()


@dataclass(frozen=True, eq=False)
class InBasis(Code):
    """W = W' V: a code for the matrix in new coordinates, and the basis that leads to them.

    Multiplying an input applies the basis to it instead of undoing it on the weight; both give
    the same product.

    Parameters
    ----------
    code : Code
        (m, N), approximates W V^+
    basis : Basis
        (N, n)

    Raises
    ------
    ValueError : the shapes do not fit, or `basis` is not a Basis
    """

    code: Code
    basis: Basis

    def __post_init__(self):
        if not isinstance(self.basis, Basis):
            raise ValueError(
                f"a {type(self.basis).__name__} for a basis; it must be a Permutation, Scales or"
                " Rotation"
            )
        if len(self.code.shape) != 2 or self.code.shape[1] != self.basis.shape[0]:
            raise ValueError(
                f"a code of shape {self.code.shape} in a basis of shape {self.basis.shape};"
                " the code needs as many columns as the basis has rows"
            )

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the inner code does."""
        return self.code.quantizes_inputs

    def decode(self) -> Tensor:
        return self.basis.undo(self.code.decode())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[-1:] != self.shape[1:]:
            raise ValueError(f"inputs of shape {tuple(x.shape)} for {self.shape[1]} columns")
        return self.code.product(self.basis.apply(x), bias)

    @property
    def shape(self) -> tuple[int, int]:
        return self.code.shape[0], self.basis.shape[1]
