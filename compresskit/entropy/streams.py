"""How the coders write what is not coded: numbers of any size, and tables of small ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from compresskit import bits
from compresskit.code import check_shape

MOST = 1 << 30
"""Symbols of one stream: a few bytes may stand for many of them, so what a reader allocates for
them must have a limit: 4 GiB."""


def varint(value: int) -> bytes:
    """A whole number, 0 or more, seven bits to a byte, the lowest first; the last byte is < 128."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """A whole number of either sign: 0, -1, 1, -2 ... as the `varint` of 0, 1, 2, 3 ..."""
    return varint(2 * value if value >= 0 else -2 * value - 1)


class Reader:
    """The bytes of a stream from front to back; `ValueError` where there are too few."""

    def __init__(self, data: bytes):
        self.data, self.at = memoryview(data), 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError(
                f"{len(self.data) - self.at} bytes left where {count} are needed: the stream was"
                " cut or changed"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self, most: int = MOST) -> int:
        """A number from 0 to `most`, as `varint` writes it."""
        value = shift = 0
        while True:
            octet = self.take(1)[0]
            value |= (octet & 127) << shift
            shift += 7
            if octet < 128:
                break
            if shift > 63:
                raise ValueError("a number of more than 64 bits: the stream was changed")
        if value > most:
            raise ValueError(f"{value} where {most} is the largest: the stream was changed")
        return value

    def signed(self) -> int:
        """A number as `signed` writes it, of at most 34 bits."""
        value = self.varint(1 << 34)
        return -(value + 1 >> 1) if value & 1 else value >> 1

    def array(self, dtype: str, count: int) -> np.ndarray:
        """`count` numbers of a little-endian NumPy type."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype)

    def numbers(self, width: int, count: int) -> np.ndarray:
        """`count` numbers of `width` bits each, 0 to 34, as `numbers` writes them."""
        out = np.zeros(count, np.int64)
        for start in range(0, width, 16):
            part = min(16, width - start)
            data = bytes(self.take(bits.packed_size(count, part)))
            out |= bits.unpack(data, part, count).numpy().astype(np.int64) << start
        return out

    def small(self, count: int) -> np.ndarray:
        """`count` numbers, 1 or more, as `small` writes them."""
        data = np.frombuffer(self.take(self.varint()), np.uint8)
        out = np.empty(count, np.int64)
        if not _read_gamma(data, out):
            raise ValueError("a table ends before its last entry: the stream was cut or changed")
        return out

    def finish(self) -> None:
        """Refuse bytes that nothing asked for."""
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes too many at the end of the stream")


def numbers(values: np.ndarray, width: int) -> bytes:
    """Numbers of `width` bits each, 0 to 34: first the lowest 16 bits of all, then the next."""
    out = b""
    for start in range(0, width, 16):
        part = min(16, width - start)
        low = values >> start & ((1 << part) - 1)
        out += bits.pack(torch.from_numpy(low.astype(np.int64)), part)
    return out


def small(values: np.ndarray) -> bytes:
    """Numbers, 1 or more, in Elias' gamma code: n - 1 zeros, then the n binary digits of each.

    References
    ----------
    Elias, "Universal codeword sets and representations of the integers", IEEE Trans. Inform.
    Theory 21, 1975.
    """
    values = np.ascontiguousarray(values, np.int64)
    digits = np.frexp(values.astype(np.float64))[1]  # exact below 2^53
    out = np.zeros(-(-int((2 * digits - 1).sum()) // 8), np.uint8)
    _write_gamma(values, digits.astype(np.int64), out)
    return varint(len(out)) + out.tobytes()


def each(task: Callable, arguments: Iterable[tuple]) -> list:
    """task(*a) for each a, on as many threads as torch uses; compiled loops run side by side."""
    arguments = list(arguments)
    workers = min(len(arguments), torch.get_num_threads(), os.cpu_count() or 1)
    if workers < 2:
        return [task(*a) for a in arguments]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda a: task(*a), arguments))


def check_size(size) -> tuple[tuple[int, ...], int]:
    """A shape and its number of symbols; `ValueError` above `MOST` of them."""
    size, count = check_shape(size)
    if count > MOST:
        raise ValueError(f"{count} symbols; a stream holds at most {MOST}: code parts")
    return tuple(size), count


@numba.njit(nogil=True, cache=True)
def _write_gamma(values, digits, out):
    at = 0
    for i in range(len(values)):
        at += digits[i] - 1
        for d in range(digits[i] - 1, -1, -1):
            if values[i] >> d & 1:
                out[at >> 3] |= np.uint8(128 >> (at & 7))
            at += 1


@numba.njit(nogil=True, cache=True)
def _read_gamma(data, out):
    at, end = 0, 8 * len(data)
    for i in range(len(out)):
        zeros = 0
        while at < end and not data[at >> 3] >> (7 - (at & 7)) & 1:
            at += 1
            zeros += 1
        if at + zeros + 1 > end or zeros > 40:
            return False
        value = 0
        for _ in range(zeros + 1):
            value = 2 * value + (data[at >> 3] >> (7 - (at & 7)) & 1)
            at += 1
        out[i] = value
    for place in range(at, end):
        if data[place >> 3] >> (7 - (place & 7)) & 1:
            return False
    return end - at < 8
