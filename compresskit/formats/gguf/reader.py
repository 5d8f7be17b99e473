"""Read a GGUF file: its metadata, and a directory of tensors whose bytes stay in the file.

A file holds, little-endian: "GGUF", a version, the numbers of tensors and of metadata entries; the
entries (key, type, value); for each tensor its name, dimensions (the length of a row first), type
and offset; then, from the next multiple of the alignment on, the bytes of the tensors. Every count,
length and offset is a claim that is checked against the size of the file before it is used.

(Over 200 lines, because a refusal for each claim stands beside the line that reads it.)

References
----------
The specification: docs/gguf.md of ggml. Its reader: ggml/src/gguf.cpp of llama.cpp.
Book: chapter "Block formats in the wild".
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from compresskit.formats.gguf.blocks import TYPES, Blocks, BlockType

VERSIONS = (2, 3)  # 1 had 32-bit counts; 3 differs from 2 by allowing big-endian files only
ALIGNMENT = 32  # of files that name none
DEPTH = 8  # arrays within arrays within ...; no known writer goes beyond 1
MAX_KEY = 65535  # bytes
MAX_DIMS = 4

#: The types of metadata values, by number: plain numbers here, then text and arrays.
NUMBERS = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
BOOL = 7
STRING = 8
ARRAY = 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_KINDS = {kind.number: kind for kind in TYPES.values()}


class GGUFError(ValueError):
    """The file is damaged, or no GGUF file, or one that this package does not read."""


@dataclass(frozen=True, eq=False)
class File:
    """What a GGUF file holds.

    Parameters
    ----------
    metadata : dict
        key -> str; bool; a number as a NumPy scalar of the stored type (`np.uint32` ...); an
        array of numbers as an array of the stored type; of strings as a list of str; of arrays
        as a list
    tensors : dict
        name -> `Blocks`, in the file's order; their bytes are read when they are used
    version : int
    alignment : int
        bytes; the data of each tensor starts at a multiple of it
    """

    metadata: dict[str, object] = field(repr=False)
    tensors: dict[str, Blocks] = field(repr=False)
    version: int
    alignment: int


class Entry(NamedTuple):
    """One line of the directory: where a tensor lies.

    Parameters
    ----------
    name : str
    kind : BlockType
    dims : tuple of int
        the length of a row last, as in PyTorch
    offset : int
        bytes from the start of the data
    nbytes : int
    """

    name: str
    kind: BlockType
    dims: tuple[int, ...]
    offset: int
    nbytes: int


class Directory(NamedTuple):
    """All of a file but its data.

    Parameters
    ----------
    version : int
    alignment : int
    metadata : dict
    entries : list of Entry
    start : int
        where in the file the data begins, in bytes
    """

    version: int
    alignment: int
    metadata: dict[str, object]
    entries: list[Entry]
    start: int


def read(path: str | Path) -> File:
    """The metadata and tensors of a GGUF file; tensors are mapped into memory, not copied.

    Changing a tensor in place changes the copy in memory, never the file. While tensors are in
    use the file may be replaced (as `write` does), but not be shortened or overwritten in place.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    GGUFError : (a `ValueError`) one message that says what is wrong, and at which byte
    FileNotFoundError : no such file

    Notes
    -----
    Versions 2 and 3, little-endian. Time and memory are proportional to the metadata, whatever
    the file claims: no array is made before its bytes are known to be there. Of the tensor types
    of ggml those in `TYPES` are read.
    """
    path = Path(path)
    size = path.stat().st_size
    if not path.is_file():
        raise GGUFError(f"{path} is not a regular file; give the path of a .gguf file")
    # Mode "c": pages that are written to are copied, so tensors are writable and the file is safe.
    data = np.asarray(np.memmap(path, np.uint8, mode="c")) if size else np.empty(0, np.uint8)
    try:
        return parse(data)
    except GGUFError as error:
        raise GGUFError(f"{path}: {error}") from None


def parse(data: np.ndarray) -> File:
    """The GGUF file whose bytes are `data`; its tensors share their memory.

    Parameters
    ----------
    data : (size,) array, uint8

    Raises
    ------
    GGUFError : as for `read`
    """
    found = directory(memoryview(data), len(data))
    tensors = {}
    for entry in found.entries:
        start = found.start + entry.offset if entry.nbytes else 0
        stored = data[start : start + entry.nbytes]
        blocks = torch.from_numpy(stored.reshape(-1, entry.kind.nbytes))
        tensors[entry.name] = Blocks(blocks, entry.kind.name, entry.dims)
    return File(found.metadata, tensors, found.version, found.alignment)


def directory(data: memoryview, size: int) -> Directory:
    """What the first bytes of a file say about the rest, checked.

    Parameters
    ----------
    data : (at most size,) bytes
        the file up to its data, or more
    size : int
        bytes in the file

    Raises
    ------
    GGUFError : as for `read`
    """
    cursor = _Cursor(data)
    version = _version(cursor)
    tensor_count = cursor.count("tensors", least=8 + 4 + 4 + 8)
    entry_count = cursor.count("metadata entries", least=8 + 4 + 1)
    metadata = {}
    for _ in range(entry_count):
        key = cursor.name(metadata, "key", MAX_KEY)
        metadata[key] = _value(cursor, cursor.number(_U32), key, depth=0)
    alignment = check_alignment(metadata)
    entries = {}
    for _ in range(tensor_count):
        name = cursor.name(entries, "tensor", size)
        entries[name] = _entry(cursor, name, alignment)
    start = -(-cursor.at // alignment) * alignment
    _check_places(entries.values(), size - start)
    return Directory(version, alignment, metadata, list(entries.values()), start)


def check_alignment(metadata: dict) -> int:
    """The alignment that the metadata asks for, in bytes; 32 if it says nothing.

    Parameters
    ----------
    metadata : dict

    Raises
    ------
    GGUFError : not a UINT32, or not a power of two that is a multiple of 8
    """
    value = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    # The specification asks for a multiple of 8, ggml's reader for a power of two.
    if type(value) is not np.uint32 or value < 8 or value & (value - np.uint32(1)):
        kind = "" if type(value) is np.uint32 else f" ({type(value).__name__})"
        raise GGUFError(
            f"general.alignment is {_short(value)}{kind}; it must be a UINT32 and a power of two"
            f" from 8 on, like {ALIGNMENT}"
        )
    return int(value)


class _Cursor:
    """A place in the bytes of a file; it never passes their end."""

    def __init__(self, data: memoryview):
        self.data = data
        self.at = 0

    def take(self, nbytes: int, what: str) -> int:
        """Where the next `nbytes` bytes begin; moves behind them."""
        left = len(self.data) - self.at
        if nbytes > left:
            raise GGUFError(
                f"byte {self.at}: {what} takes {nbytes} bytes, but {left} are left in the file"
            )
        start = self.at
        self.at += nbytes
        return start

    def number(self, layout: struct.Struct) -> int:
        return layout.unpack_from(self.data, self.take(layout.size, "a number"))[0]

    def count(self, what: str, *, least: int) -> int:
        """How many things of at least `least` bytes follow."""
        count = self.number(_U64)
        left = len(self.data) - self.at
        if count * least > left:
            raise GGUFError(
                f"byte {self.at - 8}: {count} {what}, but the {left} bytes that are left in the"
                f" file hold at most {left // least}"
            )
        return count

    def string(self) -> str:
        length = self.number(_U64)
        start = self.take(length, "a string")
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise GGUFError(
                f"byte {start + error.start}: a string is not valid UTF-8 ({error.reason})"
            ) from None

    def name(self, known: dict, what: str, longest: int) -> str:
        """A string that is not empty, not too long and not among the `known` ones."""
        start = self.at
        name = self.string()
        if not name or self.at - start - 8 > longest:
            raise GGUFError(
                f"byte {start}: the name of a {what} has {self.at - start - 8} bytes; it must have"
                f" 1 to {longest}"
            )
        if name in known:
            raise GGUFError(f"byte {start}: a second {what} {_short(name)}; names must differ")
        return name


def _version(cursor: _Cursor) -> int:
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise GGUFError(f"it starts with {magic!r}, {len(cursor.data)} bytes in all, not b'GGUF'")
    cursor.take(4, "the magic")
    version = cursor.number(_U32)
    if version & 0xFFFF == 0 and version:
        raise GGUFError("it is big-endian; only little-endian files are read, convert it first")
    if version not in VERSIONS:
        raise GGUFError(f"version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} are read")
    return version


def _value(cursor: _Cursor, kind: int, key: str, *, depth: int) -> object:
    if kind == STRING:
        return cursor.string()
    if kind == ARRAY:
        return _array(cursor, key, depth=depth + 1)
    value = _numbers(cursor, _dtype(cursor, kind, key), 1, key)[0]
    return bool(value) if kind == BOOL else value


def _array(cursor: _Cursor, key: str, *, depth: int) -> object:
    if depth > DEPTH:
        raise GGUFError(
            f"byte {cursor.at}: the arrays in {_short(key)} are nested more than {DEPTH} deep"
        )
    kind = cursor.number(_U32)
    if kind == STRING:
        return [cursor.string() for _ in range(cursor.count("strings", least=8))]
    if kind == ARRAY:
        count = cursor.count("arrays", least=4 + 8)
        return [_array(cursor, key, depth=depth + 1) for _ in range(count)]
    dtype = _dtype(cursor, kind, key)
    return _numbers(cursor, dtype, cursor.count("numbers", least=dtype.itemsize), key)


def _dtype(cursor: _Cursor, kind: int, key: str) -> np.dtype:
    if kind not in NUMBERS:
        raise GGUFError(
            f"byte {cursor.at - 4}: {_short(key)} has a value of type {kind}; types are 0 to 12"
        )
    return NUMBERS[kind]


def _numbers(cursor: _Cursor, dtype: np.dtype, count: int, key: str) -> np.ndarray:
    """(count,) numbers, copied."""
    start = cursor.take(count * dtype.itemsize, "a value")
    if dtype == NUMBERS[BOOL]:
        top = np.frombuffer(cursor.data, np.uint8, count, start).max(initial=0)
        if top > 1:
            raise GGUFError(f"byte {start}: {_short(key)} holds a bool of {top}, not 0 or 1")
    return np.frombuffer(cursor.data, dtype, count, start).copy()


def _entry(cursor: _Cursor, name: str, alignment: int) -> Entry:
    start = cursor.at
    rank = cursor.number(_U32)
    if rank > MAX_DIMS:
        raise GGUFError(
            f"byte {start}: tensor {_short(name)} has {rank} dimensions; {MAX_DIMS} are allowed"
        )
    dims = tuple(cursor.number(_U64) for _ in range(rank))[::-1]
    number = cursor.number(_U32)
    kind = _KINDS.get(number)
    if kind is None:
        known = ", ".join(f"{kind.number} ({kind.name})" for kind in _KINDS.values())
        raise GGUFError(f"tensor {_short(name)} has type {number}; these types are read: {known}")
    if math.prod(max(n, 1) for n in dims) >= 2**63:  # zeros too: strides are products as well
        raise GGUFError(f"tensor {_short(name)} of shape {dims} has more than 2^63 - 1 elements")
    if (dims[-1] if dims else 1) % kind.size:
        raise GGUFError(
            f"tensor {_short(name)} has rows of {dims[-1] if dims else 1} weights; {kind.name}"
            f" takes multiples of {kind.size}"
        )
    offset = cursor.number(_U64)
    if offset % alignment:
        raise GGUFError(
            f"tensor {_short(name)} lies at offset {offset}; that must be a multiple of the"
            f" alignment {alignment}"
        )
    return Entry(name, kind, dims, offset, math.prod(dims) // kind.size * kind.nbytes)


def _check_places(entries, size: int) -> None:
    """Every tensor within the `size` bytes of data, and no two in the same place."""
    end, before = 0, ""
    for entry in sorted((e for e in entries if e.nbytes), key=lambda entry: entry.offset):
        if entry.offset + entry.nbytes > size:
            raise GGUFError(
                f"tensor {_short(entry.name)} takes {entry.nbytes} bytes at offset {entry.offset},"
                f" but the file has {max(size, 0)} bytes of data"
            )
        if entry.offset < end:
            raise GGUFError(
                f"tensors {_short(before)} and {_short(entry.name)} overlap at offset"
                f" {entry.offset}"
            )
        end, before = entry.offset + entry.nbytes, entry.name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
