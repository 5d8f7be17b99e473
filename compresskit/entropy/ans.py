"""Interleaved rANS: whole numbers at the price of their surprise under a table, many at a time.

A state x takes in a symbol of frequency f, of 2^precision, as x' = 2^precision (x // f) + c +
x % f, c the frequencies of the symbols before it together, which multiplies it by about the
symbol's improbability. Before a step that would carry it beyond 2^63, its low 32 bits go out as a
word. Decoding runs the same steps backwards, so symbols are encoded from the last to the first.

(Over 200 lines with the loops, the two models, and what a reader must refuse.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
from torch import Tensor

from compresskit.code import Leaf
from compresskit.entropy import range_coder, tables
from compresskit.entropy.streams import Reader, check_size, each, numbers, signed, small, varint
from compresskit.entropy.symbols import Stream, stored, symbols

_LOWEST = 1 << 31  # states lie between this and 2^63
_BLENDS = (0, 2, 4, 6, 8)  # eighths of a Laplace law
_WIDEST = 9  # octaves of scale above which low bits are written as they are


@dataclass(frozen=True)
class Scales:
    """A parametric model: each symbol is a rounded variable whose scale its row and column give.

    No table is stored. The law is a mixture of a Gaussian and a Laplace law of one variance around
    one whole number; scale and mixture are fitted to the symbols, and the scales, spaced by
    2^(1/8), are themselves coded. The first axis of the symbols is their rows, all others
    together their columns.

    Parameters
    ----------
    by : "matrix", "row", "column" or "both"
        what has a scale of its own; for groups of consecutive levels give them as rows

    Examples
    --------
    >>> import torch
    >>> from compresskit.entropy import rans
    >>> noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    >>> levels = (noise * torch.arange(1, 65)[:, None] / 8).round().int()
    >>> rans(levels, Scales("row")).nbytes < 0.95 * rans(levels).nbytes
    True
    """

    by: str = "matrix"

    def __post_init__(self):
        if self.by not in ("matrix", "row", "column", "both"):
            raise ValueError(f'by={self.by!r}; it must be "matrix", "row", "column" or "both"')


@dataclass(frozen=True, eq=False)
class Rans(Stream):
    """Whole numbers of any shape as one rANS stream; `rans` makes it.

    Parameters
    ----------
    tensor : (bytes,) uint8 tensor
        the stream: the model, the coded symbols, the escaped ones
    size : tuple
        the shape of what it stands for
    model : str
        "static", a table of frequencies in the stream; or "scales", as for `Scales`

    Notes
    -----
    Decoding gives int32 on the device of the stream; it runs on the CPU. A stream that was cut or
    changed gives other symbols or a `ValueError`.
    """

    model: str

    def __post_init__(self):
        super().__post_init__()
        if self.model not in _READ:
            raise ValueError(f"model={self.model!r}; there are {', '.join(_READ)}")

    def levels(self, data: bytes, count: int) -> np.ndarray:
        reader = Reader(data)
        out = _READ[self.model](reader, check_size(self.size)[0])
        reader.finish()
        return out


def rans(levels: Tensor | Leaf, model: Scales | None = None) -> Rans:
    """Whole numbers in about as many bits as the cross-entropy with the model, and the model.

    Parameters
    ----------
    levels : (...,) integer or bool tensor, or a leaf of such
        each of at most 32 bits
    model : Scales
        None: the frequencies of the symbols themselves, in a table in the stream, which costs
        about 2 bytes for each symbol that occurs often enough to be worth it

    Returns
    -------
    Rans
        of the size of its bytes

    Raises
    ------
    ValueError : not whole numbers, more than 32 bits, more than 2^30 of them

    Notes
    -----
    States of 63 bits and words of 32: a step exceeds log2(2^precision / f) bits by less than
    2^-14, each lane ends in 8 bytes. One lane for every 16 kB, up to 8, so that they weigh little;
    then parts, which are coded on threads of their own.

    References
    ----------
    Duda, "Asymmetric numeral systems", arXiv 1311.2540; interleaving: Giesen, "Interleaved
    entropy coders", arXiv 1402.3392. Book: chapter "Huffman, arithmetic coding, ANS".

    Examples
    --------
    A coin that falls on one side nine times in ten has 0.469 bit.

    >>> import torch
    >>> coin = torch.arange(100_000) * 7919 % 10 == 0
    >>> round(8 * rans(coin).nbytes / len(coin), 3)
    0.471
    """
    flat, size = symbols(levels)
    if model is not None and not isinstance(model, Scales):
        raise ValueError(f"model={model!r}; it must be None or a Scales")
    if not len(flat):
        stream = b""
    elif model is None:
        stream = _static(flat)
    else:
        stream = _scaled(flat, size, model)
    return Rans(stored(stream, levels), size, "static" if model is None else "scales")


# --- models ---------------------------------------------------------------------------------------


def _static(flat: np.ndarray) -> bytes:
    values, counts = tables.counted(flat)
    chosen, counts = tables.alphabet(values, counts, largest=1 << 15)
    if len(counts) == 1 and not chosen.width:
        return chosen.to_bytes()
    best = None
    for precision in tables.PRECISIONS:
        if len(counts) > 1 << precision:
            continue
        frequency = tables.quantized(counts, precision)
        cost = float(counts @ (precision - np.log2(frequency)))
        if best is None or cost < 0.9999 * best[0] - 16:
            best = cost, precision, frequency
    cost, precision, frequency = best
    head = chosen.to_bytes() + varint(precision) + small(frequency)
    place, table, low = tables.placed(flat, values, chosen)
    body = encode(place, table, low, frequency[None], precision, cost / 8)
    return head + body + tables.escapes(flat, chosen)


def _read_static(reader: Reader, size: tuple[int, ...]) -> np.ndarray:
    _, count = check_size(size)
    chosen = tables.Alphabet.read(reader)
    if chosen.entries == 1 and not chosen.width:
        return np.full(count, chosen.values[0], np.int32)
    precision = reader.varint(16)
    frequency = reader.small(chosen.entries)
    if not chosen.entries or frequency.sum() != 1 << precision:
        raise ValueError("frequencies that do not add up: the stream was changed")
    values = np.append(chosen.values, 0).astype(np.int32)
    if chosen.width:
        places = decode(reader, count, frequency[None], precision, None)
        return tables.restored(places, chosen, reader)
    return decode(reader, count, frequency[None], precision, None, values)


def _scaled(flat: np.ndarray, size: tuple[int, ...], model: Scales) -> bytes:
    matrix = flat.astype(np.int64).reshape(size[0] if len(size) > 1 else 1, -1)
    center = int(np.rint(matrix.mean()))
    matrix = matrix - center
    spread = float(np.sqrt(np.square(matrix, dtype=np.float64).mean()))
    shift = max(0, int(np.ceil(np.log2(spread + 1e-9))) - _WIDEST)
    low, matrix = matrix & ((1 << shift) - 1), (matrix >> shift)
    rows, columns, blend, precision = fitted(matrix, model.by)
    context = _contexts(rows, columns, matrix.shape)
    frequency, reach = _frequencies(context, blend, precision)
    levels = np.ascontiguousarray(matrix.T).reshape(-1)
    place = np.clip(levels + reach, -1, 2 * reach + 1).astype(np.int32)
    outside = (place < 0) | (place > 2 * reach)
    place[outside] = 2 * reach + 1
    rare = outside | (frequency[context, place] == 0)
    place[rare] = 2 * reach + 1
    cost = float((precision - np.log2(frequency[context, place])).sum())
    head = signed(center) + varint(shift) + varint(_BLENDS.index(blend)) + varint(precision)
    for part in (rows, columns):
        data = range_coder.encode(part)
        head += varint(len(part)) + varint(len(data)) + data
    same = np.arange(2 * reach + 2, dtype=np.int32)
    body = encode(place, same, 0, frequency, precision, cost / 8, context)
    tail = varint(int(np.count_nonzero(rare)))
    if rare.any():
        least, width = int(levels[rare].min()), int(np.ptp(levels[rare])).bit_length()
        tail += signed(least) + varint(width) + numbers(levels[rare] - least, width)
    return head + body + tail + numbers(np.ascontiguousarray(low.T).reshape(-1), shift)


def _read_scaled(reader: Reader, size: tuple[int, ...]) -> np.ndarray:
    _, count = check_size(size)
    shape = (size[0], count // size[0]) if len(size) > 1 else (1, count)
    center, shift = reader.signed(), reader.varint(34)
    blend, precision = _BLENDS[reader.varint(len(_BLENDS) - 1)], reader.varint(16)
    if precision not in tables.PRECISIONS:
        raise ValueError(f"a precision of {precision} bits: the stream was changed")
    parts = []
    for length in shape:
        given = reader.varint()
        if given not in (1, length):
            raise ValueError(f"{given} scales for {length} rows or columns: the stream was changed")
        part = range_coder.decode(bytes(reader.take(reader.varint())), given)
        if not (0 <= part.min() and part.max() < tables.SCALES):
            raise ValueError("a scale that does not exist: the stream was changed")
        parts.append(part)
    context = _contexts(*parts, shape)
    frequency, reach = _frequencies(context, blend, precision)
    place = decode(reader, count, frequency, precision, context)
    out = place.astype(np.int64) - reach
    rare = place == 2 * reach + 1
    if reader.varint(count) != int(np.count_nonzero(rare)):
        raise ValueError("another number of escaped symbols: the stream was changed")
    if rare.any():
        least, width = reader.signed(), reader.varint(34)
        out[rare] = reader.numbers(width, int(np.count_nonzero(rare))) + least
    out = (out << shift) + reader.numbers(shift, count) + center
    return np.ascontiguousarray(out.astype(np.int32).reshape(shape[::-1]).T).reshape(-1)


_READ = {"static": _read_static, "scales": _read_scaled}


def _contexts(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(entries,) the index of the scale of each entry, column after column.

    That of a column plus that of a row; a column of index 0 is 0 in every row.
    """
    found = np.minimum(columns[:, None] + rows, tables.SCALES - 1)
    found = np.where(columns[:, None] > 0, found, 0).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(found, shape[::-1])).reshape(-1)


def _frequencies(context: np.ndarray, blend: int, precision: int) -> tuple[np.ndarray, int]:
    """(scales, 2 reach + 2) frequencies of the levels -reach ... reach and the escape.

    Rows of scales that do not occur are 0.
    """
    used = np.flatnonzero(np.bincount(context, minlength=tables.SCALES))
    laws = [tables.law(int(index), blend, precision) for index in used]
    reach = max(len(f) // 2 - 1 for f in laws)
    out = np.zeros((tables.SCALES, 2 * reach + 2), np.int64)
    for index, f in zip(used, laws, strict=True):
        own = len(f) // 2 - 1
        out[index, reach - own : reach + own + 1] = f[:-1]
        out[index, -1] = f[-1]
    return out, reach


def fitted(matrix: np.ndarray, by: str) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The scales that make whole numbers cheapest, found by turns from their mean squares.

    Returns
    -------
    indices of rows, indices of columns, blend in eighths, precision
    """
    square = np.square(matrix, dtype=np.float64)
    whole = _index(square.mean())
    rows = _index(square.mean(1)) - whole if by in ("row", "both") else np.zeros(1, np.int64)
    columns = _index(square.mean(0)) if by in ("column", "both") else whole.reshape(1)
    silent = square.max(0) == 0 if len(columns) > 1 else square.max() == 0
    columns = np.where(silent, 0, (columns + rows.min()).clip(1, tables.SCALES - 1))
    rows = rows - rows.min()
    top = int(columns.max()) + int(rows.max())
    precision = 14 if top < 5 * tables.SPACING - tables.SMALLEST else 16
    levels = np.ascontiguousarray(matrix.T)
    best, r, c = None, rows, columns
    for blend in _BLENDS:
        price = _prices(blend, precision, int(np.abs(matrix).max()))
        r, c = r.copy(), c.copy()
        for _ in range(8):
            before = r.copy(), c.copy()
            _cheapest_columns(levels, price, r, c)
            if len(r) > 1:
                _cheapest_rows(levels, price, r, c)
            if np.array_equal(r, before[0]) and np.array_equal(c, before[1]):
                break
        cost = _cost(levels, price, r, c)
        if best is None or cost < best[0]:
            best = cost, r, c, blend
        else:
            break  # a mixture further away is worse still
    _, rows, columns, blend = best
    least = int(rows.min())
    columns = np.where(columns > 0, (columns + least).clip(1, tables.SCALES - 1), 0)
    return rows - least, columns, blend, precision


def _index(square: np.ndarray) -> np.ndarray:
    """Indices of the scales of what was rounded, from mean squares: 1/12 of these is rounding."""
    true = np.sqrt(np.maximum(square - 1 / 12, square / 16 + 1e-9))
    return tables.index_of(true) - tables.SMALLEST + 1


@lru_cache(maxsize=8)
def _prices(blend: int, precision: int, reach: int) -> np.ndarray:
    """(scales, 2 reach + 1) bits of each level; of one without a frequency, those of the escape."""
    reach = min(reach, 1 << 12)
    out = np.empty((tables.SCALES, 2 * reach + 1), np.float32)
    for index in range(tables.SCALES):
        f = tables.law(index, blend, precision)
        own, bits = len(f) // 2 - 1, precision - np.log2(np.maximum(f, 0.5))
        out[index] = bits[-1] + 12
        take = min(own, reach)
        out[index, reach - take : reach + take + 1] = bits[own - take : own + take + 1]
    return out


# --- the coder ------------------------------------------------------------------------------------


def encode(
    levels: np.ndarray,
    table: np.ndarray,
    low: int,
    frequency: np.ndarray,
    precision: int,
    nbytes: float,
    context: np.ndarray | None = None,
) -> bytes:
    """The places table[levels - low] under frequency[context]: what `decode` reads.

    Parameters
    ----------
    levels : (n,) integer array
    table : (k,) int32 array
    low : int
    frequency : (contexts, places) int64 array
        the rows that are used have the sum 2^precision
    precision : int
    nbytes : float
        what the coded symbols will take, by which the number of lanes is chosen
    context : (n,) uint8 array
        None: 0 everywhere
    """
    states = 1 + int(nbytes) // 16384
    lanes = 1 << min(states.bit_length() - 1, 3)
    parts = max(1, min(states // lanes, len(levels) >> 17))
    before = np.cumsum(frequency, 1) - frequency
    packed = (frequency | before << 32).astype(np.uint64)
    ends = np.linspace(0, len(levels), parts + 1).astype(np.int64)
    none = np.zeros(0, np.uint8)

    def one(start, stop):
        words = np.empty(2 * lanes + (stop - start) // 2 + 64, np.uint32)
        part = none if context is None else context[start:stop]
        used = _encode(levels[start:stop], part, table, low, packed, precision, lanes, words)
        return words[len(words) - used :].astype("<u4").tobytes()

    coded = each(one, itertools.pairwise(ends))
    head = varint(lanes) + varint(parts) + b"".join(varint(len(part) // 4) for part in coded)
    return head + b"".join(coded)


def decode(
    reader: Reader,
    count: int,
    frequency: np.ndarray,
    precision: int,
    context: np.ndarray | None = None,
    values: np.ndarray | None = None,
) -> np.ndarray:
    """(count,) int32 places that `encode` wrote, or the values at these places.

    Raises
    ------
    ValueError : words are missing or left over, or a state does not return to where it began
    """
    lanes, parts = reader.varint(64), reader.varint(1 << 15)
    if not lanes or not parts:
        raise ValueError("a stream without a state: it was changed")
    lengths = [reader.varint() for _ in range(parts)]
    words = [reader.array("<u4", length) for length in lengths]
    before = np.cumsum(frequency, 1) - frequency
    packed = (frequency | before << 32).astype(np.uint64)
    slots = np.zeros((len(frequency), 1 << precision), np.uint16)
    for index in np.flatnonzero(frequency.sum(1)):
        slots[index] = np.repeat(np.arange(frequency.shape[1]), frequency[index])
    if values is None:
        values = np.arange(frequency.shape[1], dtype=np.int32)
    out = np.empty(count, np.int32)
    ends = np.linspace(0, count, parts + 1).astype(np.int64)
    none = np.zeros(0, np.uint8)

    def one(part, start, stop):
        which = none if context is None else context[start:stop]
        return _decode(part, which, slots, packed, values, precision, lanes, out[start:stop])

    if not all(each(one, zip(words, ends[:-1], ends[1:], strict=True))):
        raise ValueError("the stream does not end where it should: it was cut or changed")
    return out


@numba.njit(nogil=True, cache=True)
def _encode(levels, context, table, low, packed, precision, lanes, words):
    """Fill `words` from its end; the number of words, of which the first 2 * lanes are states."""
    states = np.full(lanes, _LOWEST, np.uint64)
    at = len(words)
    shift, full = np.uint64(precision), np.uint64(63 - precision)
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    several = len(context) > 0
    row = 0
    for i in range(len(levels) - 1, -1, -1):
        if several:
            row = context[i]
        pair = packed[row, table[np.int64(levels[i]) - low]]
        frequency, before = pair & mask, pair >> half
        lane = i & (lanes - 1)
        x = states[lane]
        if x >= frequency << full:
            at -= 1
            words[at] = np.uint32(x & mask)
            x >>= half
        quotient = x // frequency
        states[lane] = (quotient << shift) + before + (x - quotient * frequency)
    for lane in range(lanes - 1, -1, -1):
        at -= 2
        words[at] = np.uint32(states[lane] & mask)
        words[at + 1] = np.uint32(states[lane] >> half)
    return len(words) - at


@numba.njit(nogil=True, cache=True)
def _decode(words, context, slots, packed, values, precision, lanes, out):
    """Fill `out`; whether all words were used and all states are back at their start."""
    if len(words) < 2 * lanes or lanes & (lanes - 1):
        return False
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    shift, inside = np.uint64(precision), np.uint64((1 << precision) - 1)
    lowest = np.uint64(_LOWEST)
    states = np.empty(lanes, np.uint64)
    for lane in range(lanes):
        states[lane] = np.uint64(words[2 * lane]) | np.uint64(words[2 * lane + 1]) << half
    at, end = 2 * lanes, len(words)
    several = len(context) > 0
    row = 0
    for i in range(len(out)):
        if several:
            row = context[i]
        lane = i & (lanes - 1)
        x = states[lane]
        slot = x & inside
        place = slots[row, slot]
        pair = packed[row, place]
        x = (pair & mask) * (x >> shift) + slot - (pair >> half)
        if x < lowest:
            if at == end:
                return False
            x = x << half | np.uint64(words[at])
            at += 1
        states[lane] = x
        out[i] = values[place]
    for lane in range(lanes):
        if states[lane] != lowest:
            return False
    return at == end


@numba.njit(nogil=True, cache=True)
def _price(price, index, level):
    reach = price.shape[1] >> 1
    if level < -reach or level > reach:
        return price[0, 0]  # of what no column of index 0 holds: an escape
    return price[min(index, price.shape[0] - 1), level + reach]


@numba.njit(nogil=True, cache=True)
def _cheapest_columns(levels, price, rows, columns):
    """Move each column's index, by up to six at a time, to where its symbols are cheapest."""
    wide = len(columns)
    for j in range(wide):
        if columns[j] == 0:
            continue
        center, best, found = columns[j], np.inf, columns[j]
        for index in range(max(1, center - 6), min(price.shape[0] - 1, center + 6) + 1):
            total = 0.0
            for t in range(j if wide > 1 else 0, j + 1 if wide > 1 else len(levels)):
                for i in range(levels.shape[1]):
                    shifted = index + rows[i if len(rows) > 1 else 0]
                    total += _price(price, shifted, levels[t, i])
            if total < best:
                best, found = total, index
        columns[j] = found


@numba.njit(nogil=True, cache=True)
def _cheapest_rows(levels, price, rows, columns):
    for i in range(len(rows)):
        center, best, found = rows[i], np.inf, rows[i]
        for index in range(max(0, center - 3), center + 4):
            total = 0.0
            for t in range(len(levels)):
                column = columns[t if len(columns) > 1 else 0]
                if column > 0:
                    total += _price(price, column + index, levels[t, i])
            if total < best:
                best, found = total, index
        rows[i] = found


@numba.njit(nogil=True, cache=True)
def _cost(levels, price, rows, columns):
    total = 0.0
    for t in range(len(levels)):
        column = columns[t if len(columns) > 1 else 0]
        if column > 0:
            for i in range(levels.shape[1]):
                total += _price(price, column + rows[i if len(rows) > 1 else 0], levels[t, i])
    return total
