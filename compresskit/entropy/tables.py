"""What a coder believes: whole-number frequencies, measured or of a law, and what is too rare."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np

from compresskit.entropy.streams import Reader, numbers, signed, small, varint

PRECISIONS = (12, 14, 16)
DENSE = 1 << 20  # up to here symbols are counted in a table, above it they are sorted


def quantized(counts: np.ndarray, precision: int) -> np.ndarray:
    """Frequencies f of sum 2^precision, 1 or more where a count c is, with a small sum c log(1/f).

    Rounded down, then raised (or lowered) one by one where a unit gains most (or loses least).

    Parameters
    ----------
    counts : (k,) array of numbers, 0 or more
    precision : int

    Raises
    ------
    ValueError : more than 2^precision positive counts, or none
    """
    total = 1 << precision
    places = np.flatnonzero(counts)
    if not 0 < len(places) <= total:
        raise ValueError(f"{len(places)} symbols for {total} parts; there must be 1 to {total}")
    c = counts[places].astype(np.float64)
    f = np.maximum(np.floor(c * (total / c.sum())), 1).astype(np.int64)
    missing = total - int(f.sum())
    step = 1 if missing > 0 else -1

    def price(i):
        if f[i] + step < 1:
            return np.inf
        return c[i] * (np.log(f[i]) - np.log(f[i] + step))

    heap = [(price(i), i) for i in range(len(f))] if missing else []
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, i = heap[0]
        f[i] += step
        heapq.heapreplace(heap, (price(i), i))
    out = np.zeros(len(counts), np.int64)
    out[places] = f
    return out


@dataclass(frozen=True)
class Alphabet:
    """The symbols that have a place of their own; all others are written out after an escape.

    Parameters
    ----------
    values : (k,) int64 array
        ascending
    low, width : int
        an escaped symbol s is written as s - low in `width` bits; `width` is 0 if none escapes
    """

    values: np.ndarray
    low: int
    width: int

    @property
    def entries(self) -> int:
        """Places of a table: the values, and the escape as the last one if there is one."""
        return len(self.values) + (self.width > 0)

    def to_bytes(self) -> bytes:
        head = varint(len(self.values)) + varint(self.width)
        if self.width:
            head += signed(self.low)
        if not len(self.values):
            return head
        return head + signed(int(self.values[0])) + small(np.diff(self.values))

    @classmethod
    def read(cls, reader: Reader) -> Alphabet:
        count, width = reader.varint(1 << 17), reader.varint(34)
        low = reader.signed() if width else 0
        if not count:
            return cls(np.zeros(0, np.int64), low, width)
        first = reader.signed()
        values = np.concatenate([[first], first + np.cumsum(reader.small(count - 1))])
        if not -(1 << 31) <= values[0] <= values[-1] < 1 << 32:
            raise ValueError("a symbol of more than 32 bits: the stream was changed")
        return cls(values, low, width)


def counted(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct symbols, ascending, and how often each occurs.

    Parameters
    ----------
    levels : (n,) integer array, n 1 or more
    """
    low, high = int(levels.min()), int(levels.max())
    if high - low >= DENSE:
        values, counts = np.unique(levels, return_counts=True)
        return values.astype(np.int64), counts
    counts = np.zeros(high - low + 1, np.int64)
    _count(levels, low, counts)
    found = np.flatnonzero(counts)
    return found + low, counts[found]


def alphabet(values: np.ndarray, counts: np.ndarray, *, largest: int, least: float = 0) -> tuple:
    """Which symbols are worth their place in a table, and the counts of the places.

    A place costs about a gamma code of the gap and of the frequency; a symbol without one costs
    the escape and its `width` bits at each occurrence. The rarest go, as many as is cheapest.

    Parameters
    ----------
    values : (k,) ascending symbols
    counts : (k,) their counts
    largest : int
        places that there may be, the escape's included
    least : float
        bits that a symbol costs at least: 1 for a prefix code

    Returns
    -------
    Alphabet, (entries,) counts
    """
    span = int(values[-1]) - int(values[0])
    width, total = max(span.bit_length(), 1), counts.sum()
    if len(values) == 1:
        return Alphabet(values, 0, 0), counts
    order = np.argsort(-counts, kind="stable")
    c = counts[order].astype(np.float64)
    gap = 2 * np.log2(span / (len(values) - 1)) + 1
    own = (
        c * np.maximum(np.log2(total / c), least)
        + 2 * np.log2(np.maximum(c / total * 4096, 1))
        + 1
        + gap
    )
    kept = np.concatenate([[0.0], np.cumsum(own)])
    gone = total - np.concatenate([[0.0], np.cumsum(c)])
    gone[-1] = 0
    rate = np.maximum(np.log2(total / np.maximum(gone, 1)), least) + width
    cost = kept + np.where(gone > 0, gone * rate + 8, 0)
    if len(values) > largest - 1:
        cost[largest:] = np.inf
    best = int(np.argmin(cost))
    if best == len(values):
        return Alphabet(values, 0, 0), counts
    keep = np.sort(order[:best])
    out = np.append(counts[keep], int(gone[best]))
    return Alphabet(values[keep], int(values[0]), width), out


def placed(flat: np.ndarray, values: np.ndarray, chosen: Alphabet) -> tuple:
    """Symbols s', a table and a number `low` such that table[s' - low] is the place of each.

    The symbols themselves, unless they span so much that they are looked up here.

    Parameters
    ----------
    flat : (n,) integer array
    values : (k,) ascending
        its distinct symbols
    chosen : Alphabet
    """
    low, high = int(values[0]), int(values[-1])
    if high - low >= DENSE:
        at = np.searchsorted(chosen.values, flat)
        found = np.append(chosen.values, np.iinfo(np.int64).max)[at] == flat
        places = np.where(found, at, len(chosen.values)).astype(np.int32)
        return places, np.arange(chosen.entries, dtype=np.int32), 0
    table = np.full(high - low + 1, len(chosen.values), np.int32)
    table[chosen.values - low] = np.arange(len(chosen.values))
    return flat, table, low


def escapes(levels: np.ndarray, chosen: Alphabet) -> bytes:
    """The symbols without a place, in order."""
    if not chosen.width:
        return b""
    rare = levels[~np.isin(levels, chosen.values)].astype(np.int64)
    return varint(len(rare)) + numbers(rare - chosen.low, chosen.width)


def restored(places: np.ndarray, chosen: Alphabet, reader: Reader) -> np.ndarray:
    """The symbols at these places, and the escaped ones from the reader: (n,) int32."""
    values = np.append(chosen.values, 0).astype(np.int32)
    out = values[places]
    if chosen.width:
        rare = places == len(chosen.values)
        count = reader.varint(len(places))
        if count != int(np.count_nonzero(rare)):
            raise ValueError(f"{count} escaped symbols for other escapes: the stream was changed")
        out[rare] = (reader.numbers(chosen.width, count) + chosen.low).astype(np.int32)
    return out


# --- laws -----------------------------------------------------------------------------------------
# Every platform must find the same whole numbers, so only +, -, *, / and powers of 2 are used,
# which IEEE arithmetic rounds alike everywhere; an exp of the C library may differ in a last bit.

_TAYLOR = [1.0]
for _k in range(1, 15):
    _TAYLOR.append(_TAYLOR[-1] / _k)
# Abramowitz and Stegun, "Handbook of mathematical functions", 7.1.26: erf to 1.5e-7.
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
SPACING = 8  # scales per octave
_EIGHTHS = (1.0, 1.0905077326652577, 1.189207115002721, 1.2968395546510096, 1.4142135623730951,
            1.5422108254079407, 1.681792830507429, 1.8340080864093424)  # fmt: skip
SCALES = 128
SMALLEST = -4 * SPACING  # the exponent of scale 1, in eighths of an octave


def scale_of(index: np.ndarray) -> np.ndarray:
    """2^(index / 8) by arithmetic that is the same everywhere.

    Parameters
    ----------
    index : array of whole numbers of either sign
    """
    octave, eighth = np.divmod(np.asarray(index), SPACING)
    return np.ldexp(np.array(_EIGHTHS)[eighth], octave)


def index_of(scale: np.ndarray) -> np.ndarray:
    """The index whose `scale_of` is nearest, in ratio, to each positive number (int64)."""
    return np.rint(SPACING * np.log2(scale)).astype(np.int64)


def _exp_minus(y: np.ndarray) -> np.ndarray:
    """exp(-y) for y >= 0."""
    y = np.minimum(y, 600.0)
    halvings = np.floor(y / 0.6931471805599453)
    rest = y - halvings * 0.6931471805599453
    value = np.full_like(y, _TAYLOR[-1])
    for term in _TAYLOR[-2::-1]:
        value = term - rest * value
    return np.ldexp(value, -halvings.astype(np.int64))


def tail(x: np.ndarray, blend: float) -> np.ndarray:
    """P(X > x), x >= 0, of a Gaussian and a Laplace law of variance 1, mixed 1 - blend : blend."""
    x = np.minimum(x, 600.0)
    z = x / 1.4142135623730951
    t = 1 / (1 + 0.3275911 * z)
    series = np.zeros_like(t)
    for a in _ERF[::-1]:
        series = (series + a) * t
    gauss = 0.5 * series * _exp_minus(z * z)
    laplace = 0.5 * _exp_minus(x * 1.4142135623730951)
    return (1 - blend) * gauss + blend * laplace


@lru_cache(maxsize=1024)
def law(index: int, blend: int, precision: int) -> np.ndarray:
    """Frequencies of 0, +-1, +-2, ..., and of the escape, for a rounded variable of a given scale.

    Index 0 stands for a variable that is always 0; the scale of index k is 2^((k - 33) / 8). Of
    the variable's law `blend` eighths are a Laplace law, the rest a Gaussian.

    Returns
    -------
    (2 t + 2,) int64 array for the levels -t ... t, then the escape; of sum 2^precision
    """
    total = 1 << precision
    if index == 0:
        return np.array([total, 0], np.int64)
    scale = float(scale_of(index - 1 + SMALLEST))
    reach = int(min(10 * scale + 2, 1 << 15))
    above = tail((np.arange(reach + 1) + 0.5) / scale, blend / 8)  # P(X > t + 1/2)
    mass = above[:-1] - above[1:]  # of 1 ... reach
    rounded = np.floor(mass * total + 0.5).astype(np.int64)
    zero = np.flatnonzero(rounded == 0)
    last = int(zero[0]) if len(zero) else reach
    side = np.maximum(rounded[:last], 1)
    escape = max(1, int(2 * above[last] * total + 0.5))
    center = total - 2 * int(side.sum()) - escape
    while center < 1:  # a narrow table of a wide law
        side, last = side[:-1], last - 1
        escape = max(1, int(2 * above[last] * total + 0.5))
        center = total - 2 * int(side.sum()) - escape
    return np.concatenate([side[::-1], [center], side, [escape]])


@numba.njit(nogil=True, cache=True)
def _count(levels, low, counts):
    for level in levels:
        counts[level - low] += 1
