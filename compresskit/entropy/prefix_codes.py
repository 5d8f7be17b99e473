"""Canonical Huffman codes: the best whole number of bits for each symbol, of at most 20."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numba
import numpy as np
from torch import Tensor

from compresskit.code import Leaf
from compresskit.entropy import tables
from compresskit.entropy.streams import Reader, each, small, varint
from compresskit.entropy.symbols import Stream, stored, symbols

LONGEST = 20


def lengths(counts, *, longest: int = LONGEST) -> np.ndarray:
    """Bits of each symbol in a prefix code of least total length, none longer than `longest`.

    Parameters
    ----------
    counts : (k,) array_like
        0 or more; a symbol of count 0 gets no word, a single symbol one bit
    longest : int
        1 to 57, with 2^longest symbols or fewer

    Returns
    -------
    (k,) int64 array

    Raises
    ------
    ValueError : more symbols than words

    Notes
    -----
    Packages of two are merged `longest` times: a word of l bits is a coin of each of the values
    2^-1 ... 2^-l, and the 2 k - 2 cheapest packages of value 1/2 hold the coins of the best code.
    With no limit to feel, this is Huffman's code. O(k longest) after sorting.

    References
    ----------
    Huffman, "A method for the construction of minimum-redundancy codes", 1952; Larmore and
    Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37, 1990.

    Examples
    --------
    >>> lengths([5, 2, 1, 1]).tolist(), lengths([5, 2, 1, 1], longest=2).tolist()
    ([1, 2, 3, 3], [2, 2, 2, 2])
    """
    counts = np.asarray(counts)
    places = np.flatnonzero(counts)
    if not 1 <= longest <= 57 or len(places) > 1 << longest:
        raise ValueError(f"{len(places)} symbols in words of at most {longest} bits; give more")
    out = np.zeros(len(counts), np.int64)
    if len(places) < 2:
        out[places] = 1
        return out
    order = places[np.argsort(counts[places], kind="stable")]
    price = counts[order].astype(np.float64)
    out[order] = _package_merge(price, longest)
    return out


def canonical(bits) -> np.ndarray:
    """The words of the canonical prefix code: shorter ones first, then by symbol, counting up.

    Parameters
    ----------
    bits : (k,) array_like
        lengths; 0 for a symbol without a word

    Returns
    -------
    (k,) int64 array, the word of each symbol as a number

    Raises
    ------
    ValueError : the lengths have a Kraft sum above 1: there is no prefix code

    Examples
    --------
    >>> [f"{word:0{n}b}" for word, n in zip(canonical([2, 1, 3, 3]), [2, 1, 3, 3])]
    ['10', '0', '110', '111']
    """
    bits = np.asarray(bits, np.int64)
    longest = int(bits.max(initial=0))
    order = np.lexsort((np.arange(len(bits)), bits))
    order = order[bits[order] > 0]
    room = 1 << (longest - bits[order])  # words of the longest kind that begin with this one
    if room.sum() > 1 << longest:
        raise ValueError(f"lengths {bits[order][:8].tolist()}... have a Kraft sum above 1")
    out = np.zeros(len(bits), np.int64)
    out[order] = (np.cumsum(room) - room) >> (longest - bits[order])
    return out


@dataclass(frozen=True, eq=False)
class Huffman(Stream):
    """Whole numbers of any shape as a canonical Huffman stream with its table; `huffman` makes it.

    Parameters
    ----------
    tensor : (bytes,) uint8 tensor
        symbols, lengths of their words, words, escaped symbols
    size : tuple
        the shape of what it stands for

    Notes
    -----
    Decoding looks up as many bits as the longest word has, and is split over threads where the
    stream was. It gives int32.
    """

    def levels(self, data: bytes, count: int) -> np.ndarray:
        reader = Reader(data)
        out = _read(reader, count)
        reader.finish()
        return out


def huffman(levels: Tensor | Leaf) -> Huffman:
    """Whole numbers in the best whole number of bits each, and the table of lengths.

    At least the entropy, less than one bit more, and never less than one bit a symbol (two symbols
    or more): poor where one symbol is common.

    Parameters
    ----------
    levels : (...,) integer or bool tensor, or a leaf of such
        each of at most 32 bits; symbols too rare for a place in the table follow an escape

    Returns
    -------
    Huffman

    Raises
    ------
    ValueError : as `rans`

    References
    ----------
    As `lengths`; canonical words: Schwartz and Kallick, 1964. Book: chapter "Huffman, arithmetic
    coding, ANS".

    Examples
    --------
    >>> import torch
    >>> text = torch.tensor(list(b"abracadabra" * 100))
    >>> huffman(text).nbytes, huffman(text).decode().equal(text.int())
    (301, True)
    """
    flat, size = symbols(levels)
    return Huffman(stored(_write(flat) if len(flat) else b"", levels), size)


def _write(flat: np.ndarray) -> bytes:
    values, counts = tables.counted(flat)
    chosen, counts = tables.alphabet(values, counts, largest=1 << 17, least=1)
    head = chosen.to_bytes()
    if chosen.entries == 1 and not chosen.width:
        return head
    bits = lengths(counts)
    place, table, low = tables.placed(flat, values, chosen)
    words = canonical(bits)
    parts = max(1, len(flat) >> 18)
    ends = np.linspace(0, len(flat), parts + 1).astype(np.int64)

    def one(start, stop):
        out = np.empty((stop - start) * int(bits.max()) // 8 + 16, np.uint8)
        used = _put(place[start:stop], table, low, words, bits, out)
        return out[:used].tobytes()

    coded = each(one, itertools.pairwise(ends))
    head += small(bits) + varint(parts) + b"".join(varint(len(part)) for part in coded)
    return head + b"".join(coded) + tables.escapes(flat, chosen)


def _read(reader: Reader, count: int) -> np.ndarray:
    chosen = tables.Alphabet.read(reader)
    if not chosen.entries:
        raise ValueError("a code of no symbol: the stream was changed")
    if chosen.entries == 1 and not chosen.width:
        return np.full(count, chosen.values[0], np.int32)
    bits = reader.small(chosen.entries)
    if bits.max() > LONGEST:
        raise ValueError(f"a word of {bits.max()} bits: the stream was changed")
    words, longest = canonical(bits), int(bits.max())
    look_up = np.zeros(1 << longest, np.int32)  # place and length; 0 for what is no word
    for place in np.argsort(words << (longest - bits)):
        start = words[place] << (longest - bits[place])
        look_up[start : start + (1 << longest - bits[place])] = place << 5 | bits[place]
    parts = reader.varint(1 << 15)
    lengths_ = [reader.varint() for _ in range(parts)]
    data = [np.frombuffer(reader.take(n), np.uint8) for n in lengths_]
    out = np.empty(count, np.int32)
    values = np.append(chosen.values, 0).astype(np.int32)
    if chosen.width:
        values = np.arange(chosen.entries, dtype=np.int32)
    ends = np.linspace(0, count, parts + 1).astype(np.int64)

    def one(part, start, stop):
        return _get(part, look_up, longest, values, out[start:stop])

    if not parts or not all(each(one, zip(data, ends[:-1], ends[1:], strict=True))):
        raise ValueError("the stream does not end where it should: it was cut or changed")
    return tables.restored(out, chosen, reader) if chosen.width else out


@numba.njit(nogil=True, cache=True)
def _package_merge(price, longest):
    """Lengths for prices in ascending order: how many of the cheapest packages hold each coin."""
    k = len(price)
    packages = np.zeros((longest, 2 * k), np.float64)
    is_coin = np.zeros((longest, 2 * k), np.bool_)
    sizes = np.zeros(longest, np.int64)
    for level in range(longest):
        pairs = sizes[level - 1] // 2 if level else 0
        i, j, at = 0, 0, 0
        while i < k or j < pairs:
            pair = np.inf
            if j < pairs:
                pair = packages[level - 1, 2 * j] + packages[level - 1, 2 * j + 1]
            if i < k and price[i] <= pair:
                packages[level, at], is_coin[level, at] = price[i], True
                i += 1
            else:
                packages[level, at] = pair
                j += 1
            at += 1
        sizes[level] = at
    out = np.zeros(k, np.int64)
    take = 2 * k - 2
    for level in range(longest - 1, -1, -1):
        coins = 0
        for at in range(take):
            coins += is_coin[level, at]
        for i in range(coins):
            out[i] += 1
        take = 2 * (take - coins)
    return out


@numba.njit(nogil=True, cache=True)
def _put(levels, table, low, words, bits, out):
    """Write the words of the symbols, first bit first; the number of bytes."""
    held, count, at = np.uint64(0), 0, 0
    for i in range(len(levels)):
        place = table[np.int64(levels[i]) - low]
        held = held << np.uint64(bits[place]) | np.uint64(words[place])
        count += bits[place]
        while count >= 8:
            count -= 8
            out[at] = np.uint8(held >> np.uint64(count) & np.uint64(255))
            at += 1
    if count:
        out[at] = np.uint8(held << np.uint64(8 - count) & np.uint64(255))
        at += 1
    return at


@numba.njit(nogil=True, cache=True)
def _get(data, look_up, longest, values, out):
    """Fill `out`; whether every word was one, and the bytes end with the last of them."""
    held, count, at, end = np.uint64(0), 0, 0, len(data)
    mask = np.uint64((1 << longest) - 1)
    for i in range(len(out)):
        while count < longest:
            octet = data[at] if at < end else np.uint8(0)
            held = held << np.uint64(8) | np.uint64(octet)
            at += 1
            count += 8
        entry = look_up[held >> np.uint64(count - longest) & mask]
        bits = entry & 31
        if bits == 0 or at > end + 8:
            return False
        count -= bits
        out[i] = values[entry >> 5]
    return 8 * (at - end) <= count < 8 * (at - end) + 8
