"""A range coder that learns: frequencies are counted as symbols pass, and no table is stored.

The coder keeps an interval of 64-bit numbers. A symbol takes the part of it that its frequency
says; when the interval is short, its first byte is settled and goes out. A carry may still change
bytes that went out before. First in, first out, so the decoder knows at each symbol what the
encoder had seen: both count alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from torch import Tensor

from compresskit.code import Leaf
from compresskit.entropy.streams import Reader, numbers, signed, varint
from compresskit.entropy.symbols import Stream, stored, symbols

_DIGITS = 12  # bits of a symbol that are learned; those below are written as they are
_RISE = 24  # what a count rises by where a symbol passes
_LIMIT = 1 << 16  # of all counts together; then they are halved, and the past weighs less


@dataclass(frozen=True, eq=False)
class Adaptive(Stream):
    """Whole numbers of any shape as the stream of an adaptive range coder; `adaptive` makes it.

    Parameters
    ----------
    tensor : (bytes,) uint8 tensor
    size : tuple
        the shape of what it stands for
    """

    def levels(self, data: bytes, count: int) -> np.ndarray:
        return decode(data, count)


def adaptive(levels: Tensor | Leaf) -> Adaptive:
    """Whole numbers under frequencies that both sides learn from the symbols before.

    For streams too short to pay for a table, and for statistics that drift. Learning costs about
    half a logarithm of the length for each symbol of the alphabet.

    Parameters
    ----------
    levels : (...,) integer or bool tensor, or a leaf of such
        each of at most 32 bits; of a span of more than 2^12 the lowest bits are written as they are

    Returns
    -------
    Adaptive

    Raises
    ------
    ValueError : as `rans`

    References
    ----------
    Martin, "Range encoding", 1979; frequencies in a tree of partial sums: Fenwick, 1994. Book:
    chapter "Huffman, arithmetic coding, ANS".

    Examples
    --------
    >>> import torch
    >>> adaptive(torch.zeros(1000, dtype=torch.uint8)).nbytes < 12
    True
    """
    flat, size = symbols(levels)
    return Adaptive(stored(encode(flat), levels), size)


def encode(levels: np.ndarray) -> bytes:
    """The stream of an array of whole numbers of at most 32 bits."""
    if not len(levels):
        return b""
    low = int(levels.min())
    span = int(levels.max()) - low
    rest = max(0, span.bit_length() - _DIGITS)
    shifted = levels.astype(np.int64) - low
    out = np.empty(64 + 3 * len(levels), np.uint8)
    used = _encode(shifted >> rest, (span >> rest) + 1, out)
    head = signed(low) + varint(span) + varint(used)
    return head + out[:used].tobytes() + numbers(shifted & ((1 << rest) - 1), rest)


def decode(data: bytes, count: int) -> np.ndarray:
    """(count,) int64 array; `ValueError` for a stream of another length."""
    out = np.zeros(count, np.int64)
    reader = Reader(data)
    if count:
        low, span = reader.signed(), reader.varint(1 << 32)
        rest = max(0, span.bit_length() - _DIGITS)
        coded = np.frombuffer(reader.take(reader.varint()), np.uint8)
        if not _decode(coded, (span >> rest) + 1, out):
            raise ValueError("the stream does not end where it should: it was cut or changed")
        out = (out << rest) + reader.numbers(rest, count) + low
        if not (-(1 << 31) <= out.min() and out.max() < 1 << 31):
            raise ValueError("a symbol of more than 32 bits: the stream was changed")
    reader.finish()
    return out


# Counts lie in a tree: entry i holds the sum of the counts i - (i & -i) ... i - 1.


@numba.njit(nogil=True, cache=True)
def _add(tree, place, amount):
    i = place + 1
    while i < len(tree):
        tree[i] += amount
        i += i & -i


@numba.njit(nogil=True, cache=True)
def _below(tree, place):
    total = 0
    while place > 0:
        total += tree[place]
        place -= place & -place
    return total


@numba.njit(nogil=True, cache=True)
def _find(tree, target):
    """The place whose counts hold the number `target`: the last with at most so many below it."""
    place, step = 0, 1
    while 2 * step < len(tree):
        step *= 2
    while step:
        if place + step < len(tree) and tree[place + step] <= target:
            place += step
            target -= tree[place]
        step >>= 1
    return place


@numba.njit(nogil=True, cache=True)
def _ones(size):
    tree = np.zeros(size + 1, np.int64)
    for i in range(1, size + 1):
        tree[i] = i & -i
    return tree


@numba.njit(nogil=True, cache=True)
def _learn(tree, counts, place, total):
    """Count a symbol; the new total."""
    counts[place] += _RISE
    _add(tree, place, _RISE)
    total += _RISE
    if total > _LIMIT:
        total = 0
        for i in range(len(counts)):
            counts[i] = (counts[i] + 1) >> 1
            total += counts[i]
        for i in range(1, len(tree)):
            tree[i] = 0
        for i in range(len(counts)):
            _add(tree, i, counts[i])
    return total


@numba.njit(nogil=True, cache=True)
def _encode(levels, size, out):
    tree, counts, total = _ones(size), np.ones(size, np.int64), size
    low, width = np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)
    short, byte, top = np.uint64(1) << np.uint64(48), np.uint64(8), np.uint64(56)
    at = 0
    for level in levels:
        part = width // np.uint64(total)
        before = low
        low += part * np.uint64(_below(tree, level))
        width = part * np.uint64(counts[level])
        if low < before:  # a carry into what went out
            i = at - 1
            while out[i] == 255:
                out[i] = 0
                i -= 1
            out[i] += 1
        while width < short:
            out[at] = np.uint8(low >> top)
            at += 1
            low <<= byte
            width <<= byte
        total = _learn(tree, counts, level, total)
    # The shortest number within the interval: zeros that follow need not be written.
    for kept in range(1, 9):
        shift = np.uint64(64 - 8 * kept)
        unit = (np.uint64(1) << shift) - np.uint64(1)
        end = (low + unit) & ~unit
        if end - low < width:
            if end < low:
                i = at - 1
                while out[i] == 255:
                    out[i] = 0
                    i -= 1
                out[i] += 1
            for k in range(kept):
                out[at] = np.uint8(end >> np.uint64(56 - 8 * k) & np.uint64(255))
                at += 1
            break
    while at and out[at - 1] == 0:
        at -= 1
    return at


@numba.njit(nogil=True, cache=True)
def _decode(data, size, out):
    tree, counts, total = _ones(size), np.ones(size, np.int64), size
    inside, width = np.uint64(0), np.uint64(0xFFFFFFFFFFFFFFFF)
    short, byte = np.uint64(1) << np.uint64(48), np.uint64(8)
    at = 0
    for _ in range(8):
        inside = inside << byte | np.uint64(data[at] if at < len(data) else 0)
        at += 1
    for i in range(len(out)):
        part = width // np.uint64(total)
        target = inside // part
        if target >= np.uint64(total):
            return False
        level = _find(tree, np.int64(target))
        out[i] = level
        inside -= part * np.uint64(_below(tree, level))
        width = part * np.uint64(counts[level])
        while width < short:
            inside = inside << byte | np.uint64(data[at] if at < len(data) else 0)
            at += 1
            width <<= byte
        if at > len(data) + 16:
            return False
        total = _learn(tree, counts, level, total)
    return at >= len(data)
