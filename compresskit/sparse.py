"""Sparse matrices: which entries are kept, and what it costs to say so.

A mask can be written in four ways. None is always the smallest, so `mask_code` measures them all;
each takes the mask as it is in memory and differs only in its bytes.

(Over 200 lines with four ways to write a mask, and what each of them must refuse.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit import bits
from compresskit.code import Array, Bits, Code, Leaf, check_float, check_shape
from compresskit.linalg import all_finite

_LARGEST = 1 << 16  # patterns within a group: above it a table of them is no longer small
_MOST = 1 << 28  # entries of a mask of which less than a bit each is stored: 256 MiB in memory


@dataclass(frozen=True)
class Pattern:
    """Of the units compared with each other, round(sparsity * their number) go: the lowest scores.

    Counts are exact, whatever the scores are: of equal ones the first goes first. (A threshold,
    such as a quantile, removes too few or too many as soon as scores are tied.)

    Parameters
    ----------
    sparsity : float
        the share that goes, from 0 to 1; halves are rounded to even
    among : "row", "layer" or int
        what is compared: the weights of a row (all weights of one output), the whole matrix, or
        each m consecutive inputs of a row. Of m, m - round(sparsity * m) are kept at most, which
        is what kernels for n:m patterns ask for: a shorter last group keeps that many, or all
    unit : "weight", "row" or "column"
        what goes: single weights, or whole rows or columns, scored by the sum of the squares of
        the scores of their weights; these are compared across the layer
    size : int
        rows or columns that go together, for instance those of an attention head

    Raises
    ------
    ValueError : options that are out of range or do not go together

    Notes
    -----
    Book: chapter "Removing weights".

    Examples
    --------
    >>> Pattern.n_of_m(2, 4).mask(torch.tensor([[3.0, 1.0, 2.0, 4.0]]))
    tensor([[ True, False, False,  True]])
    """

    sparsity: float
    among: str | int = "row"
    unit: str = "weight"
    size: int = 1

    def __post_init__(self):
        if not isinstance(self.sparsity, int | float) or not 0 <= self.sparsity <= 1:
            raise ValueError(
                f"sparsity={self.sparsity!r}; it must be from 0 to 1, for instance 0.5"
            )
        if self.among not in ("row", "layer") and (type(self.among) is not int or self.among < 1):
            raise ValueError(
                f'among={self.among!r}; it must be "row", "layer", or a number of inputs such as 4'
            )
        if self.unit not in ("weight", "row", "column"):
            raise ValueError(f'unit={self.unit!r}; it must be "weight", "row" or "column"')
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size={self.size!r}; it must be a number of rows or columns, like 64")
        if self.unit == "weight" and self.size > 1:
            raise ValueError(f'size={self.size} is for unit="row" and "column"; weights go singly')
        if self.unit != "weight" and self.among != "layer":
            raise ValueError(f'whole {self.unit}s are compared across the layer; add among="layer"')

    @classmethod
    def n_of_m(cls, n: int, m: int) -> Pattern:
        """At most n weights are kept of each m consecutive inputs ("n:m").

        Parameters
        ----------
        n, m : int
            2 and 4 for the pattern that some GPUs multiply faster

        Raises
        ------
        ValueError : not 0 <= n <= m, or m below 1
        """
        if type(n) is not int or type(m) is not int or m < 1 or not 0 <= n <= m:
            raise ValueError(f"{n!r} of {m!r}; two whole numbers, 0 <= n <= m, are needed: 2 and 4")
        return cls((m - n) / m, among=m)

    def mask(self, scores: Tensor) -> Tensor:
        """Which weights are kept.

        Parameters
        ----------
        scores : (m, n) tensor
            the lowest go, of whole rows or columns those with the lowest sum of squares; any size,
            compared in float32, or in float64 if they are

        Returns
        -------
        (m, n) bool tensor, True where a weight is kept

        Raises
        ------
        ValueError : not a matrix, scores that are NaN, or rows (columns) that are no multiple of
            `size`
        """
        scores = _scores(scores)
        rows, columns = scores.shape
        if self.unit != "weight":
            across = scores if self.unit == "row" else scores.T
            if len(across) % self.size:
                raise ValueError(
                    f"{len(across)} {self.unit}s in units of {self.size}; size must divide them"
                )
            units = across.double().square().sum(1).reshape(-1, self.size).sum(1)
            gone = lowest(units[None], round(self.sparsity * len(units)))[0]
            kept = ~gone.repeat_interleave(self.size)
            return (kept[:, None] if self.unit == "row" else kept).expand(rows, columns).clone()
        if self.among == "layer":
            return ~lowest(scores.reshape(1, -1), self.removed(rows, columns)).reshape(
                rows, columns
            )
        if self.among == "row":
            return ~lowest(scores, round(self.sparsity * columns))
        # What is missing in a shorter last group counts as removed already.
        padded = F.pad(scores, (0, -columns % self.among), value=-torch.inf)
        gone = lowest(padded.reshape(-1, self.among), round(self.sparsity * self.among))
        return ~gone.reshape(rows, -1)[:, :columns]

    def removed(self, rows: int, columns: int) -> int:
        """How many weights of a (rows, columns) matrix go."""
        if self.unit != "weight":
            units, each = (rows, columns) if self.unit == "row" else (columns, rows)
            return round(self.sparsity * (units // self.size)) * self.size * each
        if self.among == "layer":
            return round(self.sparsity * rows * columns)
        if self.among == "row":
            return rows * round(self.sparsity * columns)
        drop, (groups, rest) = round(self.sparsity * self.among), divmod(columns, self.among)
        return rows * (groups * drop + max(0, drop - (self.among - rest)))


def lowest(scores: Tensor, count: int) -> Tensor:
    """In each row, the `count` lowest entries; of equal ones the first.

    Parameters
    ----------
    scores : (m, n) tensor
    count : int
        0 to n

    Returns
    -------
    (m, n) bool tensor with `count` True entries in each row
    """
    if not count or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.kthvalue(count, dim=1, keepdim=True).values
    gone = scores <= limit  # at least `count` of each row, and more only where some are equal
    if gone.count_nonzero() > count * len(scores):
        below = scores < limit
        room = count - below.sum(1, keepdim=True)
        gone = below | (gone & ((gone & ~below).cumsum(1) <= room))
    return gone


def pooled_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Global pruning: the lowest scores of all layers together go, so each layer has its own rate.

    Parameters
    ----------
    scores : mapping
        layer name -> (m, n) tensor
    sparsity : float
        the share of all weights that goes

    Returns
    -------
    dict : layer name -> (m, n) bool tensor, True where a weight is kept

    Raises
    ------
    ValueError : no layer, or as `Pattern` and `Pattern.mask`
    """
    if not scores:
        raise ValueError("no scores; give those of one layer or more, by name")
    flat = [_scores(s).reshape(-1) for s in scores.values()]
    kept = Pattern(sparsity, among="layer").mask(torch.cat(flat)[None])[0]
    parts = kept.split([len(s) for s in flat])
    return {
        name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)
    }


@dataclass(frozen=True, eq=False)
class Sparse(Code):
    """`values`, in row-major order, where `mask` is 1; 0 elsewhere.

    A formula over whole numbers, such as `Quantized` or `Codebook`, may have a Sparse for these:
    an entry that is not stored is then 0, whatever the formula makes of the others (`Code.kept`).

    Parameters
    ----------
    values : Code
        (k,), for the k ones of the mask
    mask : Code
        zeros and ones, of the shape of the whole

    Raises
    ------
    ValueError : as many values as there are ones are needed

    Examples
    --------
    >>> Sparse.of(torch.eye(2), torch.eye(2) > 0).decode()
    tensor([[1., 0.],
            [0., 1.]])
    """

    values: Code
    mask: Code

    def __post_init__(self):
        if not isinstance(self.mask, Bits):
            _check_entries(math.prod(self.mask.shape))
        kept = self.kept
        if kept.is_meta:
            return
        if self.values.shape != (int(kept.count_nonzero()),):
            raise ValueError(
                f"values of shape {self.values.shape} for a mask with"
                f" {int(kept.count_nonzero())} ones; give one value for each"
            )

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, *, dtype: torch.dtype = torch.float32) -> Sparse:
        """The kept weights at `dtype`, and the mask in the fewest bytes.

        Parameters
        ----------
        weight : (m, n) tensor
        mask : (m, n) bool tensor
            True where a weight is kept
        dtype : torch.dtype
            float32, float16 or bfloat16

        Raises
        ------
        ValueError : shapes that differ, another dtype, or a weight beyond its range
        """
        check_float("dtype", dtype)
        if weight.shape != mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of shape {tuple(mask.shape)} and type {mask.dtype} for a weight of shape"
                f" {tuple(weight.shape)}; a bool mask of the same shape is needed"
            )
        kept = weight.detach()[mask].to(dtype)
        if not all_finite(kept):
            raise ValueError(f"a weight is out of the range of {dtype}; use dtype=torch.float32")
        return cls(Array(kept), mask_code(mask))

    @property
    def kept(self) -> Tensor:
        mask = self.mask.tensor if isinstance(self.mask, Bits | Mask) else self.mask.decode()
        return mask.bool()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    def decode(self) -> Tensor:
        kept, values = self.kept, self.values.decode()
        out = values.new_zeros(kept.shape)
        out[kept] = values
        return out

    def csr(self) -> Tensor:
        """The matrix in PyTorch's compressed sparse row format, for its sparse products.

        Places are 32-bit integers where these suffice: products are up to five times faster than
        with 64-bit ones, which are PyTorch's own choice. Kept weights of 0 stay entries.

        Raises
        ------
        ValueError : not a matrix
        """
        if len(self.shape) != 2:
            raise ValueError(f"a code of shape {self.shape}; only a matrix has rows to compress")
        kept, values = self.kept, self.values.decode()
        rows, columns = kept.nonzero(as_tuple=True)
        starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
        small = max(len(rows), *self.shape) < 1 << 31
        places = torch.int32 if small else torch.int64
        with warnings.catch_warnings():  # that this format is in beta state
            warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
            return torch.sparse_csr_tensor(
                starts.to(places),
                columns.to(places),
                values,
                size=self.shape,
                check_invariants=True,
            )


@dataclass(frozen=True, eq=False)
class Mask(Leaf):
    """A mask that lies unpacked in memory, as uint8; a subclass says how it is written.

    Parameters
    ----------
    tensor : tensor
        zeros and ones, uint8
    """

    tensor: Tensor

    def __post_init__(self):
        if self.tensor.dtype != torch.uint8:
            raise ValueError(
                f"a mask of type {self.tensor.dtype}; use {type(self).__name__}.of(mask)"
            )
        _check_entries(self.tensor.numel())

    def decode(self) -> Tensor:
        return self.tensor.int()

    def _flat(self) -> np.ndarray:
        """The entries, in row-major order."""
        return self.tensor.detach().cpu().numpy().reshape(-1)


@dataclass(frozen=True, eq=False)
class RunLengths(Mask):
    """The number of zeros before each one, `width` bits each.

    The largest number, 2^width - 1, says that as many zeros follow and no one: long runs are
    written in parts. Zeros after the last one are not written.

    Parameters
    ----------
    tensor : tensor
        zeros and ones, uint8
    width : int
        bits of a number, 1 to 16

    References
    ----------
    Han et al., "Deep Compression", arXiv 1510.00149, section 2, who write 5 or 8 bits and put a
    zero among the values where a run is too long.
    """

    width: int

    def __post_init__(self):
        super().__post_init__()
        bits.check_width(self.width)

    @classmethod
    def of(cls, mask: Tensor) -> RunLengths:
        """With the width that takes the fewest bytes."""
        mask = mask.to(torch.uint8)
        gaps = _histogram(_gaps(mask.cpu().numpy().reshape(-1)))
        sizes = {w: w * _numbers_of(gaps, w) for w in bits.WIDTHS}
        return cls(mask, min(sizes, key=sizes.get))

    @cached_property
    def nbytes(self) -> int:
        return bits.packed_size(self._count, self.width)

    def to_bytes(self) -> bytes:
        gaps, top = _gaps(self._flat()), (1 << self.width) - 1
        last = np.cumsum(gaps // top + 1)  # one beyond the last number of each gap
        numbers = np.full(last[-1] if len(last) else 0, top, np.int64)
        numbers[last - 1] = gaps % top
        return bits.pack(torch.from_numpy(numbers), self.width)

    def header(self) -> dict:
        return {"width": self.width, "shape": self.tensor.shape, "numbers": self._count}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> RunLengths:
        shape, count = check_shape(header.get("shape"))
        width, numbers = header.get("width"), header.get("numbers")
        bits.check_width(width)
        _check_count("numbers", numbers, count)
        numbers = bits.unpack(data, width, numbers).long().numpy()
        top = (1 << width) - 1
        places = np.cumsum(np.where(numbers == top, top, numbers + 1))[numbers < top] - 1
        return cls(_mask_at(places, count).reshape(shape), width)

    @cached_property
    def _count(self) -> int:
        """How many numbers are written."""
        return _numbers_of(_histogram(_gaps(self._flat())), self.width)


@dataclass(frozen=True, eq=False)
class Golomb(Mask):
    """The distances between the rarer entries in Golomb's code, the best one for random places.

    A distance g, less one, is q M + r: q in unary, r in the nearest whole number of bits. The code
    is stored in three pieces, all unary parts, then all first bits of the remainders, then all
    last bits of the longer ones, so that each is packed and unpacked in one pass.

    Parameters
    ----------
    tensor : tensor
        zeros and ones, uint8
    parameter : int
        M, 1 to 65536
    symbol : int
        the rarer entry, 0 or 1

    References
    ----------
    Golomb, "Run-length encodings", IEEE Trans. Inform. Theory 12 (1966); Gallager and van
    Voorhis, "Optimal source codes for geometrically distributed integer alphabets", ibid. 21
    (1975): the smallest M with p^M + p^(M + 1) <= 1, p the share of the commoner entry.
    """

    parameter: int
    symbol: int

    def __post_init__(self):
        super().__post_init__()
        if type(self.parameter) is not int or not 1 <= self.parameter <= _LARGEST:
            raise ValueError(f"parameter={self.parameter!r}; it must be from 1 to {_LARGEST}")
        if type(self.symbol) is not int or self.symbol not in (0, 1):
            raise ValueError(f"symbol={self.symbol!r}; it must be 0 or 1")

    @classmethod
    def of(cls, mask: Tensor) -> Golomb:
        """With the parameter that is best for the share of ones in `mask`."""
        mask = mask.to(torch.uint8)
        ones, count = int(mask.count_nonzero()), mask.numel()
        common = max(ones, count - ones) / max(count, 1)
        parameter = 1
        if 0 < common < 1:
            parameter = min(math.ceil(-math.log1p(common) / math.log(common)), _LARGEST)
        return cls(mask, max(parameter, 1), int(2 * ones <= count))

    @cached_property
    def nbytes(self) -> int:
        counts = self._counts
        width, _ = self._remainder()
        sizes = (counts["unary"], 1), (counts["places"], width), (counts["long"], 1)
        return sum(bits.packed_size(count, w) for count, w in sizes if w)

    def to_bytes(self) -> bytes:
        quotient, first, last, _ = self._parts()
        ends = np.cumsum(quotient + 1) - 1
        unary = np.ones(ends[-1] + 1 if len(ends) else 0, np.uint8)
        unary[ends] = 0
        width, _ = self._remainder()
        pieces = [(unary, 1), (last, 1)] if width < 1 else [(unary, 1), (first, width), (last, 1)]
        return b"".join(bits.pack(torch.from_numpy(part), w) for part, w in pieces)

    def header(self) -> dict:
        given = {"parameter": self.parameter, "symbol": self.symbol, "shape": self.tensor.shape}
        return given | self._counts

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> Golomb:
        shape, count = check_shape(header.get("shape"))
        places, unary, long = (header.get(key) for key in ("places", "unary", "long"))
        _check_count("places", places, count)
        _check_count("unary", unary, 2 * count)
        _check_count("long", long, places)
        empty = cls(
            torch.zeros(0, dtype=torch.uint8), header.get("parameter"), header.get("symbol")
        )
        width, cutoff = empty._remainder()
        pieces, at = [], 0
        for entries, w in ((unary, 1), (places, width), (long, 1)):
            size = bits.packed_size(entries, w) if w else 0
            part = bits.unpack(data[at : at + size], w, entries) if w else torch.zeros(entries)
            pieces.append(part.long().numpy())
            at += size
        ends = np.flatnonzero(pieces[0] == 0)
        first = pieces[1]
        longer = first >= cutoff
        if at != len(data) or len(ends) != places or longer.sum() != long:
            raise ValueError(f"{len(data)} bytes that are no Golomb code of {places} places")
        remainder = first.copy()
        remainder[longer] = 2 * first[longer] + pieces[2] - cutoff
        gaps = np.diff(ends, prepend=-1) - 1
        at = np.cumsum(gaps * empty.parameter + remainder + 1) - 1
        mask = _mask_at(at, count)
        mask = mask if empty.symbol else 1 - mask
        return cls(mask.reshape(shape), empty.parameter, empty.symbol)

    def _remainder(self) -> tuple[int, int]:
        """Bits of every remainder, and from which of their values on there is one more."""
        width = (self.parameter - 1).bit_length()  # that of the longer ones
        return max(width - 1, 0), (1 << width) - self.parameter if width else 1

    @cached_property
    def _counts(self) -> dict[str, int]:
        """Entries of the three pieces, the ends of the unary numbers included."""
        gaps, counts = _histogram(_gaps(self._flat() == self.symbol))
        quotient, remainder = np.divmod(gaps, self.parameter)
        _, cutoff = self._remainder()
        places, unary = int(counts.sum()), int(((quotient + 1) * counts).sum())
        return {"places": places, "unary": unary, "long": int(counts[remainder >= cutoff].sum())}

    def _parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Quotients, first bits of the remainders, last bits of the longer ones, and which."""
        gaps = _gaps(self._flat() == self.symbol)
        quotient, remainder = np.divmod(gaps, self.parameter)
        _, cutoff = self._remainder()
        longer = remainder >= cutoff
        moved = remainder[longer] + cutoff
        first = remainder.copy()
        first[longer] = moved >> 1
        return quotient, first, moved & 1, longer


@dataclass(frozen=True, eq=False)
class GroupRanks(Mask):
    """n ones among each m consecutive entries: one of C(m, n) patterns, by its rank in order.

    As many ranks as fit are the digits, in base C(m, n), of one 64-bit number: for 2:4, 24 groups
    to 8 bytes, 0.667 bits per entry, where two bits for each one would be 1.

    Parameters
    ----------
    tensor : (..., c) tensor
        zeros and ones, uint8; c a multiple of m
    n, m : int
        ones in each group, and its length
    """

    n: int
    m: int

    def __post_init__(self):
        super().__post_init__()
        _check_group(self.n, self.m)
        if not self.tensor.ndim or self.tensor.shape[-1] % self.m:
            raise ValueError(
                f"shape {tuple(self.tensor.shape)}; groups of {self.m} must fill a row"
            )

    @classmethod
    def of(cls, mask: Tensor) -> GroupRanks:
        """With the shortest groups that all hold the same number of ones, 2 to 16 entries.

        Raises
        ------
        ValueError : there are none
        """
        mask = mask.to(torch.uint8)
        for m in range(2, 17):
            if not mask.numel() or not mask.ndim or mask.shape[-1] % m:
                continue
            ones = mask.reshape(-1, m).sum(1, dtype=torch.uint8)
            if (ones == ones[0]).all():
                return cls(mask, int(ones[0]), m)
        raise ValueError("no groups of 2 to 16 entries hold equally many ones; use mask_code(mask)")

    @property
    def nbytes(self) -> int:
        per, _ = self._digits()
        return 8 * -(-(self.tensor.numel() // self.m) // per)

    def to_bytes(self) -> bytes:
        patterns = _group_patterns(self.n, self.m)
        weights = 1 << np.arange(self.m)[::-1]
        values = self._flat().reshape(-1, self.m) @ weights
        if not len(values):
            return b""
        codes = patterns @ weights
        ranks = np.searchsorted(codes, values).clip(max=len(codes) - 1)
        if not (codes[ranks] == values).all():
            raise ValueError(f"a group of {self.m} entries without {self.n} ones; use mask_code")
        per, base = self._digits()
        digits = np.zeros(-(-len(ranks) // per) * per, np.uint64)
        digits[: len(ranks)] = ranks
        powers = np.array([base**i for i in range(per)], np.uint64)
        return (digits.reshape(-1, per) * powers).sum(1).astype("<u8").tobytes()

    def header(self) -> dict:
        return {"n": self.n, "m": self.m, "shape": self.tensor.shape}

    @classmethod
    def from_bytes(cls, data: bytes, header: dict) -> GroupRanks:
        shape, count = check_shape(header.get("shape"))
        empty = cls(torch.zeros(0, dtype=torch.uint8), header.get("n"), header.get("m"))
        per, base = empty._digits()
        groups, rest = divmod(count, empty.m)
        if rest:
            raise ValueError(f"shape {shape}; its entries must fill groups of {empty.m}")
        if len(data) != 8 * -(-groups // per):
            raise ValueError(
                f"{len(data)} bytes given; {groups} groups take {8 * -(-groups // per)}"
            )
        words = np.frombuffer(data, "<u8")
        ranks = np.empty((len(words), per), np.int64)
        for i in range(per):
            words, ranks[:, i] = np.divmod(words, np.uint64(base))
        if words.any() or ranks.reshape(-1)[groups:].any():
            raise ValueError("the bytes hold more than the ranks of the groups")
        mask = _group_patterns(empty.n, empty.m)[ranks.reshape(-1)[:groups]].astype(np.uint8)
        return cls(torch.from_numpy(mask).reshape(shape), empty.n, empty.m)

    def _digits(self) -> tuple[int, int]:
        """How many ranks one 64-bit number holds, and their base."""
        base = math.comb(self.m, self.n)
        per = 64
        while base**per > 1 << 64:
            per -= 1
        return per, base


#: The ways to write a mask: name -> function of a tensor of zeros and ones.
MASK_CODES = {
    "bitmap": lambda mask: Bits(mask.to(torch.uint8), 1),
    "run lengths": RunLengths.of,
    "Golomb": Golomb.of,
    "group ranks": GroupRanks.of,
}


def mask_code(mask: Tensor) -> Code:
    """The mask in the fewest bytes, of all `MASK_CODES`; of equal ones the first.

    Parameters
    ----------
    mask : tensor
        bool, or zeros and ones

    Raises
    ------
    ValueError : other values

    Examples
    --------
    >>> type(mask_code(torch.arange(96) % 4 < 2)).__name__
    'GroupRanks'
    """
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"a mask holds zeros and ones, not {mask.min():g} to {mask.max():g}")
    codes = []
    for write in MASK_CODES.values():
        try:
            codes.append(write(mask))
        except ValueError:
            continue
    return min(codes, key=lambda code: code.nbytes)


def _scores(scores: Tensor) -> Tensor:
    """A matrix of scores that can be compared."""
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)}; a matrix is needed")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if scores.isnan().any():
        raise ValueError("the scores hold NaN; check the weights and the moments behind them")
    return scores


def _gaps(flat: np.ndarray) -> np.ndarray:
    """How many zeros stand before each one, since the one before."""
    return np.diff(np.flatnonzero(flat.astype(bool)), prepend=-1) - 1  # of bool it is fast


def _histogram(gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different gaps and how often each occurs: few, so that sizes are soon counted."""
    counts = np.bincount(gaps)
    values = np.flatnonzero(counts)
    return values, counts[values]


def _numbers_of(gaps: tuple[np.ndarray, np.ndarray], width: int) -> int:
    """How many numbers of `width` bits the gaps of a histogram take."""
    values, counts = gaps
    return int(((values // ((1 << width) - 1) + 1) * counts).sum())


def _mask_at(places: np.ndarray, count: int) -> Tensor:
    """(count,) zeros, with ones at `places`, which must lie within."""
    _check_entries(count)
    if len(places) and not (0 <= places[0] and places[-1] < count):
        raise ValueError(f"a place at {places[-1]} in a mask of {count} entries")
    mask = torch.zeros(count, dtype=torch.uint8)
    mask[torch.from_numpy(places)] = 1
    return mask


def _check_entries(count: int) -> None:
    """Few bytes may stand for many zeros: a limit to what a file can make its reader allocate."""
    if count > _MOST:
        raise ValueError(
            f"a mask of {count} entries; one of more than {_MOST} is stored as Bits(mask, 1)"
        )


def _check_count(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name}={value!r} in the header of a mask; it must be from 0 to {most}")


def _check_group(n: object, m: object) -> None:
    whole = type(n) is int and type(m) is int and 1 <= m <= 64 and 0 <= n <= m
    if not whole or math.comb(m, n) > _LARGEST:
        raise ValueError(
            f"{n!r} of {m!r}; there must be 1 to {_LARGEST} such groups, as for 2 of 4"
        )


@lru_cache
def _group_patterns(n: int, m: int) -> np.ndarray:
    """(C(m, n), m) all groups of m with n ones, in order of the numbers they spell."""
    rows = np.zeros((math.comb(m, n), m), np.int64)
    for row, ones in zip(rows, sorted(combinations(range(m), n), reverse=True), strict=True):
        row[list(ones)] = 1
    return rows
