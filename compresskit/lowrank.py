"""Matrices as products of thin factors: the code, how large a rank may be, and LoRA's updates."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.code import Array, Code
from compresskit.linalg import all_finite


@dataclass(frozen=True, eq=False)
class LowRank(Code):
    """left @ right: k(m + n) numbers for the m n of the matrix they stand for.

    Parameters
    ----------
    left : Code
        (m, k)
    right : Code
        (k, n)

    Raises
    ------
    ValueError : not two matrices, or of different inner sizes

    Notes
    -----
    A layer with this code multiplies twice, by `right` and by `left`; the (m, n) matrix is never
    formed. That is k(m + n) multiplications per token.

    Examples
    --------
    >>> code = LowRank(Array(torch.ones(3, 1)), Array(torch.ones(1, 5)))
    >>> code.shape, code.nbytes, code.product(torch.ones(1, 5))
    ((3, 5), 32, tensor([[5., 5., 5.]]))
    """

    left: Code
    right: Code

    def __post_init__(self):
        left, right = self.left.shape, self.right.shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise ValueError(
                f"factors of shapes {left} and {right}; they must be (m, k) and (k, n), for"
                " instance (64, 8) and (8, 32)"
            )

    def decode(self) -> Tensor:
        return self.left.decode() @ self.right.decode()

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.left.product(self.right.product(x), bias)

    @property
    def quantizes_inputs(self) -> bool:
        """Whether a factor rounds what it multiplies."""
        return self.left.quantizes_inputs or self.right.quantizes_inputs

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """k: the largest rank that the product can have."""
        return self.left.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An update of one matrix as LoRA learns it: scale * b @ a, in float32.

    Parameters
    ----------
    a : (r, n) tensor
    b : (m, r) tensor
    alpha : float
        the update is alpha/r b a
    rank_stabilized : bool
        alpha/sqrt(r) instead (rsLoRA)
    magnitude : (m,) tensor or None
        DoRA: the rows of W + update are scaled to these lengths

    Raises
    ------
    ValueError : shapes that do not fit together, values that are not finite

    References
    ----------
    Hu et al., "LoRA", 2021, section 4.1; Kalajdzievski, "A rank stabilization scaling factor for
    fine-tuning with LoRA", 2023; Liu et al., "DoRA", 2024, eq. 5.

    Examples
    --------
    >>> Adapter(torch.ones(2, 3), torch.ones(1, 2), alpha=4).delta()
    tensor([[4., 4., 4.]])
    """

    a: Tensor
    b: Tensor
    alpha: float
    rank_stabilized: bool = False
    magnitude: Tensor | None = None

    def __post_init__(self):
        a, b = tuple(self.a.shape), tuple(self.b.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise ValueError(
                f"a of shape {a} and b of shape {b}; they must be (r, n) and (m, r), for instance"
                " (8, 32) and (64, 8)"
            )
        if self.magnitude is not None and tuple(self.magnitude.shape) != (b[0],):
            raise ValueError(
                f"a magnitude of shape {tuple(self.magnitude.shape)} for {b[0]} rows; it must be"
                f" ({b[0]},)"
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha}; it must be a finite number, for instance 16")
        if not all(all_finite(t) for t in (self.a, self.b, self.magnitude) if t is not None):
            raise ValueError("the adapter holds NaN or infinite values; train it again")

    @property
    def rank(self) -> int:
        """r: the largest rank that the update can have."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix it updates."""
        return len(self.b), self.a.shape[1]

    @property
    def scale(self) -> float:
        """What b @ a is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def count(self) -> int:
        """Trained numbers."""
        extra = 0 if self.magnitude is None else self.magnitude.numel()
        return self.a.numel() + self.b.numel() + extra

    def delta(self) -> Tensor:
        """(m, n) tensor scale * b @ a, before any rescaling of rows."""
        return self.scale * (self.b @ self.a)

    def merged(self, weight: Tensor) -> Tensor:
        """The matrix that one layer alone would need: W + delta, for DoRA with its rows rescaled.

        Parameters
        ----------
        weight : (m, n) tensor

        Returns
        -------
        (m, n) float32 tensor
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"an adapter of {self.shape} for a weight of {tuple(weight.shape)}")
        moved = weight.float() + self.delta()
        if self.magnitude is None:
            return moved
        return moved * (self.magnitude / moved.norm(dim=1))[:, None]


def linear(adapter: Adapter, x: Tensor) -> Tensor:
    """scale * b (a x), by two thin products.

    Parameters
    ----------
    adapter : Adapter
    x : (..., n) tensor

    Returns
    -------
    (..., m) tensor
    """
    return F.linear(F.linear(x, adapter.a.to(x.dtype)), adapter.b.to(x.dtype)) * adapter.scale


def largest_rank(rows: int, columns: int) -> int:
    """The largest k with k(m + n) < m n: above it, the factors hold no fewer numbers.

    Examples
    --------
    >>> largest_rank(384, 1536)
    307
    """
    return (rows * columns - 1) // (rows + columns)


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Refuse a rank whose factors hold as many numbers as the matrix, or more (`ValueError`)."""
    most = largest_rank(rows, columns)
    if most < 1:
        raise ValueError(
            f"a ({rows}, {columns}) matrix is smaller than two factors of rank 1, which hold"
            f" {rows + columns} numbers; leave it as it is, or quantize it"
        )
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank!r} for a ({rows}, {columns}) matrix; use 1 to {most}: from {most + 1} on"
            " its factors hold as many numbers as the matrix itself, or more"
        )


def rank_for_energy(singular: Tensor, share: float) -> int:
    """The smallest k whose first k squared singular values are `share` of the sum of all.

    Parameters
    ----------
    singular : (q,) tensor
        largest first
    share : float
        above 0, at most 1

    Raises
    ------
    ValueError : a share out of range, or singular values that do not fall

    Notes
    -----
    Cumulated in float64. At share = 1 rounding would decide which of the smallest count, so all
    that are not zero do.

    Examples
    --------
    >>> rank_for_energy(torch.tensor([3.0, 2.0, 1.0]), 0.9)  # 9 + 4 of 14
    2
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; it must be above 0 and at most 1, for instance 0.9")
    energy = singular.double().square()
    if not len(energy) or not (energy.diff() <= 0).all() or not energy.isfinite().all():
        raise ValueError("singular values must be finite and fall; torch.linalg.svdvals sorts them")
    if share == 1:
        return max(1, int(energy.count_nonzero()))
    reached = energy.cumsum(0)
    return max(1, int((reached < share * reached[-1]).sum()) + 1 if reached[-1] > 0 else 1)


def rank_for_bytes(rows: int, columns: int, nbytes: int, *, bits: int = 16) -> int:
    """The largest rank whose factors take at most `nbytes`, and no more numbers than allowed.

    Parameters
    ----------
    rows, columns : int
        m and n
    nbytes : int
    bits : int
        per number of a factor; scales of quantized factors are not counted

    Raises
    ------
    ValueError : not even rank 1 fits

    Examples
    --------
    >>> rank_for_bytes(384, 1536, 2 * 384 * 1536 // 4)  # a quarter of the bytes of float16
    76
    """
    found = min(8 * nbytes // (bits * (rows + columns)), largest_rank(rows, columns))
    if found < 1:
        raise ValueError(
            f"{nbytes} bytes for a ({rows}, {columns}) matrix; factors of rank 1 take"
            f" {-(-bits * (rows + columns) // 8)} bytes with {bits} bits per number"
        )
    return found


def allocated_ranks(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], numbers: int
) -> dict[str, int]:
    """Ranks for several matrices that share a budget: the largest sum of kept squares.

    The next rank of a matrix gains its next squared singular value and costs m + n numbers. Gains
    fall, so taking the best ratio of gain to cost first is optimal for every budget at which it
    stops with nothing left over, and else loses less than the next gain.

    Parameters
    ----------
    spectra : mapping
        layer name -> (q,) singular values, largest first; of the whitened matrix for errors of
        the outputs
    shapes : mapping
        layer name -> (m, n)
    numbers : int
        of all factors together

    Returns
    -------
    dict : layer name -> rank, 1 to `largest_rank`

    Raises
    ------
    ValueError : other names, or a budget below one rank each

    Examples
    --------
    >>> spectra = {"a": torch.tensor([9.0, 1.0, 0.1]), "b": torch.tensor([4.0, 3.0, 2.0])}
    >>> allocated_ranks(spectra, dict.fromkeys("ab", (9, 9)), numbers=72)
    {'a': 1, 'b': 3}
    """
    if spectra.keys() != shapes.keys() or not spectra:
        raise ValueError(f"spectra of {sorted(spectra)} and shapes of {sorted(shapes)}; both need"
                         " the same names, at least one")  # fmt: skip
    cost = {name: sum(shape) for name, shape in shapes.items()}
    ranks = dict.fromkeys(spectra, 1)
    left = numbers - sum(cost.values())
    most = {name: min(largest_rank(*shapes[name]), len(spectra[name])) for name in spectra}
    if left < 0 or min(most.values()) < 1:
        raise ValueError(
            f"numbers={numbers}; one rank for each of {len(ranks)} matrices takes"
            f" {sum(cost.values())}, and none may be smaller than its factors"
        )

    def offer(name: str) -> tuple[float, str]:
        return -(spectra[name][ranks[name]].double().item() ** 2) / cost[name], name

    waiting = [offer(name) for name in ranks if ranks[name] < most[name]]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if cost[name] > left:
            continue  # a smaller matrix may still fit
        ranks[name] += 1
        left -= cost[name]
        if ranks[name] < most[name]:
            heapq.heappush(waiting, offer(name))
    return ranks


def stored(factor: Tensor, dtype: torch.dtype) -> Array:
    """A factor as it is written; `ValueError` if `dtype` cannot hold its range."""
    array = factor.to(dtype)
    largest, limits = factor.abs().max().item(), torch.finfo(dtype)
    if largest > limits.max or 0 < largest < 1024 * limits.tiny:
        raise ValueError(
            f"a factor's largest entry is {largest:.3g}; {str(dtype).removeprefix('torch.')} holds"
            f" {limits.tiny:.2g} to {limits.max:.3g} at full precision. Use dtype=torch.bfloat16"
        )
    return Array(array.contiguous())
