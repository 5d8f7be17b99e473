"""Floating-point numbers in fewer bits and none of them lost: BF16, FP16 and FP32.

A number is a sign, an exponent and a mantissa. Of weights, signs and last bits of mantissas are
noise; exponents are not, and the first bits of a mantissa are a little less likely to be large.

(Over 200 lines with three models of one field, streaming, and what a reader must refuse.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numba
import numpy as np
import torch
from torch import Tensor

from compresskit.code import FLOATS
from compresskit.entropy import ans, range_coder, tables
from compresskit.entropy.prefix_codes import Huffman, huffman
from compresskit.entropy.streams import Reader, check_size, numbers, varint
from compresskit.entropy.symbols import Stream, stored

# dtype -> bits of the exponent, bits of the mantissa, whole numbers of its size
_FIELDS = {
    torch.bfloat16: (8, 7, torch.int16, np.uint16),
    torch.float16: (5, 10, torch.int16, np.uint16),
    torch.float32: (8, 23, torch.int32, np.uint32),
}
_HEAD = 3  # bits of the mantissa that are modeled
_PRECISION = 14
_BLENDS = (0, 2, 4, 6, 8)  # eighths of a Laplace law
_INDICES = 1 << 12  # scales 2^(k/8) from 2^-256 to 2^256


@dataclass(frozen=True, eq=False)
class Floats(Stream):
    """A floating-point tensor in a lossless stream; `encode` makes it.

    Parameters
    ----------
    tensor : (bytes,) uint8 tensor
    size : tuple
        the shape of what it stands for
    dtype : str
        "bfloat16", "float16" or "float32"
    coder : str
        "huffman", "rans" or "scales"
    """

    dtype: str
    coder: str

    def __post_init__(self):
        super().__post_init__()
        _check(FLOATS.get(self.dtype), self.coder)

    def levels(self, data: bytes, count: int) -> np.ndarray:
        """The patterns of bits, as whole numbers."""
        reader = Reader(data)
        out = _CODERS[self.coder][1](reader, check_size(self.size)[0], FLOATS[self.dtype])
        reader.finish()
        _, _, _, unsigned = _FIELDS[FLOATS[self.dtype]]
        return out.astype(unsigned).view(f"i{np.dtype(unsigned).itemsize}").astype(np.int32)

    def exact(self) -> Tensor:
        """The tensor at its own dtype, every bit as it was."""
        dtype = FLOATS[self.dtype]
        patterns = super().decode()
        if patterns.is_meta:
            return patterns.to(dtype)
        whole = _FIELDS[dtype][2]
        return patterns.to(whole).view(dtype)

    def decode(self) -> Tensor:
        return self.exact().float()


def encode(tensor: Tensor, *, coder: str = "scales") -> Floats:
    """The tensor without loss, to the last bit: NaN payloads, signed zeros and all.

    Parameters
    ----------
    tensor : (...,) tensor
        bfloat16, float16 or float32
    coder : str
        "huffman": exponents by Huffman's code, all other bits as they are (the idea of DFloat11).
        "rans": exponents and three bits of the mantissa together by rANS.
        "scales": the same symbols under a law whose scale the row and the column give, so that no
        table is stored and rows and columns of different size cost nothing

    Returns
    -------
    Floats
        whose `exact()` is the tensor, and `decode()` that in float32

    Raises
    ------
    ValueError : another dtype or coder

    References
    ----------
    Zhang et al., "70% size, 100% accuracy: lossless LLM compression via dynamic-length float"
    (DFloat11), arXiv 2504.11651. Book: chapter "Lossless compression and Deep Compression".

    Examples
    --------
    >>> weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    >>> code = encode(weight)
    >>> torch.equal(code.exact(), weight), round(8 * code.nbytes / weight.numel(), 1)
    (True, 10.5)
    """
    _check(tensor.dtype, coder)
    size, count = check_size(list(tensor.shape))
    _, _, whole, unsigned = _FIELDS[tensor.dtype]
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(whole).numpy().view(unsigned)
    stream = _CODERS[coder][0](flat, size, tensor.dtype) if count else b""
    return Floats(stored(stream, tensor), size, str(tensor.dtype).removeprefix("torch."), coder)


def write(blocks: Iterable[Tensor], file: BinaryIO, *, coder: str = "scales") -> int:
    """Code a tensor that may be larger than memory, block by block; the number of bytes written.

    Parameters
    ----------
    blocks : iterable of tensors
        for instance some rows at a time
    file : binary file
        open for writing
    coder : str
        as for `encode`
    """
    total = 0
    for block in blocks:
        leaf = encode(block, coder=coder)
        kinds = varint(list(FLOATS).index(leaf.dtype)) + varint(list(_CODERS).index(coder))
        head = varint(len(leaf.size)) + b"".join(map(varint, leaf.size)) + kinds
        frame = varint(len(head)) + head + varint(leaf.nbytes) + leaf.to_bytes()
        total += file.write(frame)
    return total


def read(file: BinaryIO) -> Iterator[Tensor]:
    """The blocks that `write` wrote, one after another.

    Raises
    ------
    ValueError : a file that was cut or changed
    """
    while True:
        first = file.read(1)
        if not first:
            return
        head = Reader(_exactly(file, first[0]))
        size = [head.varint() for _ in range(head.varint(8))]
        dtype, coder = head.varint(len(FLOATS) - 1), head.varint(len(_CODERS) - 1)
        head.finish()
        length = shift = 0
        while True:
            octet = _exactly(file, 1)[0]
            length |= (octet & 127) << shift
            shift += 7
            if octet < 128 or shift > 35:
                break
        data = _exactly(file, length)
        header = {"size": size, "dtype": list(FLOATS)[dtype], "coder": list(_CODERS)[coder]}
        yield Floats.from_bytes(data, header).exact()


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{len(data)} bytes where {count} should follow: the file was cut")
    return data


def _check(dtype: torch.dtype | None, coder: str) -> None:
    if dtype not in _FIELDS:
        raise ValueError(f"{dtype}; bfloat16, float16 and float32 are coded")
    if coder not in _CODERS:
        raise ValueError(f"coder={coder!r}; it must be one of {', '.join(map(repr, _CODERS))}")


# --- exponents by Huffman -------------------------------------------------------------------------


def _by_huffman(flat: np.ndarray, size: tuple[int, ...], dtype: torch.dtype) -> bytes:
    exponent_bits, mantissa_bits, *_ = _FIELDS[dtype]
    exponent = (flat >> mantissa_bits & ((1 << exponent_bits) - 1)).astype(np.uint8)
    coded = huffman(torch.from_numpy(exponent)).to_bytes()
    sign = flat.astype(np.int64) >> exponent_bits + mantissa_bits
    rest = sign << mantissa_bits | flat & ((1 << mantissa_bits) - 1)
    return varint(len(coded)) + coded + numbers(rest, mantissa_bits + 1)


def _read_huffman(reader: Reader, size: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    exponent_bits, mantissa_bits, *_ = _FIELDS[dtype]
    _, count = check_size(size)
    coded = bytes(reader.take(reader.varint()))
    exponent = Huffman.from_bytes(coded, {"size": [count]}).decode().numpy().astype(np.int64)
    if exponent.min() < 0 or exponent.max() >= 1 << exponent_bits:
        raise ValueError("an exponent of too many bits: the stream was changed")
    rest = reader.numbers(mantissa_bits + 1, count)
    sign, mantissa = rest >> mantissa_bits, rest & ((1 << mantissa_bits) - 1)
    return sign << exponent_bits + mantissa_bits | exponent << mantissa_bits | mantissa


# --- exponents and first bits of mantissas by rANS ------------------------------------------------


def _split(flat: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, int]:
    """Exponent and first bits of the mantissa; sign and last bits; how many bits these are."""
    exponent_bits, mantissa_bits, *_ = _FIELDS[dtype]
    last = mantissa_bits - _HEAD
    head = (flat >> last & ((1 << exponent_bits + _HEAD) - 1)).astype(np.int32)
    sign = flat.astype(np.int64) >> exponent_bits + mantissa_bits
    return head, sign << last | flat & ((1 << last) - 1), last + 1


def _joined(head: np.ndarray, rest: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    exponent_bits, mantissa_bits, *_ = _FIELDS[dtype]
    last = mantissa_bits - _HEAD
    if head.min() < 0 or head.max() >= 1 << exponent_bits + _HEAD:
        raise ValueError("an exponent of too many bits: the stream was changed")
    sign = rest >> last << exponent_bits + mantissa_bits
    return sign | head.astype(np.int64) << last | rest & ((1 << last) - 1)


def _by_rans(flat: np.ndarray, size: tuple[int, ...], dtype: torch.dtype) -> bytes:
    head, rest, width = _split(flat, dtype)
    coded = ans.rans(torch.from_numpy(head)).to_bytes()
    return varint(len(coded)) + coded + numbers(rest, width)


def _read_rans(reader: Reader, size: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    _, count = check_size(size)
    coded = bytes(reader.take(reader.varint()))
    head = ans.Rans.from_bytes(coded, {"size": [count], "model": "static"}).decode().numpy()
    return _joined(head, reader.numbers(_FIELDS[dtype][1] - _HEAD + 1, count), dtype)


# --- the same under a law of given scale ----------------------------------------------------------


def _by_scales(flat: np.ndarray, size: tuple[int, ...], dtype: torch.dtype) -> bytes:
    head, rest, width = _split(flat, dtype)
    shape = (size[0], len(flat) // size[0]) if len(size) > 1 else (1, len(flat))
    rows, columns = _scales(flat, shape, dtype)
    context, least = _contexts(rows, columns)
    levels = np.ascontiguousarray(head.reshape(shape).T).reshape(-1)
    least_level = int(levels.min())
    counts = np.zeros((int(context.max()) + 1, int(levels.max()) - least_level + 1), np.int64)
    _count_pairs(context, levels, least_level, counts)
    best = None
    for blend in _BLENDS:
        frequency, low = _frequencies(context, least, blend, dtype)
        bits = np.repeat(_price(frequency[:, -1:], extra=_FIELDS[dtype][0] + _HEAD),
                         counts.shape[1], 1)  # fmt: skip
        first, last = max(low, least_level), min(low + frequency.shape[1] - 1, least_level
                                                 + counts.shape[1])  # fmt: skip
        if first < last:
            inside = frequency[:, first - low : last - low]
            own = bits[:, first - least_level : last - least_level]
            own[inside > 0] = _price(inside[inside > 0])
        cost = float((counts * bits)[counts > 0].sum())
        if best is not None and cost >= best[0]:
            break  # a mixture further away is worse still
        best = cost, blend, frequency, low
    cost, blend, frequency, low = best
    place = levels - low
    place[(place < 0) | (place >= frequency.shape[1])] = frequency.shape[1] - 1
    place[frequency[context, place] == 0] = frequency.shape[1] - 1
    out = varint(_BLENDS.index(blend))
    for part in (rows, columns):
        data = range_coder.encode(part)
        out += varint(len(part)) + varint(len(data)) + data
    same = np.arange(frequency.shape[1], dtype=np.int32)
    out += ans.encode(place, same, 0, frequency, _PRECISION, cost / 8, context)
    escaped = levels[place == frequency.shape[1] - 1].astype(np.int64)
    out += varint(len(escaped)) + numbers(escaped, _FIELDS[dtype][0] + _HEAD)
    return out + numbers(np.ascontiguousarray(rest.reshape(shape).T).reshape(-1), width)


def _read_scales(reader: Reader, size: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    _, count = check_size(size)
    shape = (size[0], count // size[0]) if len(size) > 1 else (1, count)
    blend, parts = _BLENDS[reader.varint(len(_BLENDS) - 1)], []
    for length in shape:
        given = reader.varint()
        if given not in (1, length):
            raise ValueError(f"{given} scales for {length} rows or columns: the stream was changed")
        part = range_coder.decode(bytes(reader.take(reader.varint())), given)
        if part.min() < -_INDICES or part.max() > _INDICES:
            raise ValueError("a scale that does not exist: the stream was changed")
        parts.append(np.broadcast_to(part, length))
    context, least = _contexts(*parts)
    frequency, low = _frequencies(context, least, blend, dtype)
    place = ans.decode(reader, count, frequency, _PRECISION, context)
    head = (place + low).astype(np.int32)
    rare = place == frequency.shape[1] - 1
    escaped = reader.varint(count)
    if escaped != int(np.count_nonzero(rare)):
        raise ValueError("another number of escaped symbols: the stream was changed")
    head[rare] = reader.numbers(_FIELDS[dtype][0] + _HEAD, escaped)
    out = _joined(head, reader.numbers(_FIELDS[dtype][1] - _HEAD + 1, count), dtype)
    return np.ascontiguousarray(out.reshape(shape[::-1]).T).reshape(-1)


_CODERS = {
    "huffman": (_by_huffman, _read_huffman),
    "rans": (_by_rans, _read_rans),
    "scales": (_by_scales, _read_scales),
}


def _price(frequency: np.ndarray, extra: int = 0) -> np.ndarray:
    return _PRECISION - np.log2(np.maximum(frequency, 0.5)) + extra


@numba.njit(nogil=True, cache=True)
def _count_pairs(context, levels, low, counts):
    for i in range(len(levels)):
        counts[context[i], levels[i] - low] += 1


def _scales(flat: np.ndarray, shape: tuple[int, int], dtype: torch.dtype) -> tuple:
    """Indices of the scales of rows and columns, in eighths of an octave."""
    whole = _FIELDS[dtype][2]
    signs = torch.from_numpy(flat.view(f"i{flat.itemsize}"))
    values = signs.view(whole).view(dtype).float().nan_to_num(0.0, 0.0, 0.0)
    square = values.double().square().numpy().reshape(shape)
    row, column = np.ones((shape[0], 1)), np.ones((1, shape[1]))
    tiny = np.finfo(np.float64).tiny
    if min(shape) > 1:
        for _ in range(4):
            row = (square / column).mean(1, keepdims=True).clip(tiny)
            row /= np.exp(np.log(row).mean())
            column = (square / row).mean(0, keepdims=True).clip(tiny)
    else:
        column = np.full((1, shape[1]), square.mean().clip(tiny))

    def index(mean):
        return tables.index_of(np.sqrt(mean)).clip(-_INDICES // 2, _INDICES // 2)

    return index(row[:, 0]), index(column[0])


def _contexts(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, int]:
    """(entries,) uint8, column after column, the index of the scale less the least of all.

    At most 256 of them; what is smaller still is taken for the least.
    """
    index = columns[:, None] + rows
    least = max(int(index.min()), int(index.max()) - 255)
    return np.maximum(index - least, 0).astype(np.uint8).reshape(-1), least


def _frequencies(context: np.ndarray, least: int, blend: int, dtype: torch.dtype) -> tuple:
    """(contexts, places) frequencies, the escape last, and the symbol of the first place."""
    used = np.flatnonzero(np.bincount(context, minlength=256))
    laws = [_law(int(index) + least, blend, dtype) for index in used]
    low = min(first for first, _ in laws)
    places = max(first + len(f) - 1 for first, f in laws) - low
    out = np.zeros((int(used[-1]) + 1, places + 1), np.int64)
    for index, (first, f) in zip(used, laws, strict=True):
        out[index, first - low : first - low + len(f) - 1] = f[:-1]
        out[index, -1] = f[-1]
    return out, low


@lru_cache(maxsize=4096)
def _law(index: int, blend: int, dtype: torch.dtype) -> tuple[int, np.ndarray]:
    """First symbol, and the frequencies from it on, for numbers of scale 2^(index / 8)."""
    exponent_bits, *_ = _FIELDS[dtype]
    bias, cells = (1 << exponent_bits - 1) - 1, 1 << _HEAD
    top = index // tables.SPACING + bias + 5  # five octaves above the scale, and fourteen below
    first, last = max(1, top - 19), min((1 << exponent_bits) - 2, max(top, 2))
    first = min(first, last)
    symbol = np.arange(first * cells, (last + 1) * cells + 1)
    edge = np.ldexp(1 + (symbol % cells) / cells, symbol // cells - bias)
    above = 2 * tables.tail(edge / float(tables.scale_of(index)), blend / 8)
    mass = np.floor((above[:-1] - above[1:]) * (1 << _PRECISION) + 0.5).astype(np.int64)
    kept = np.flatnonzero(mass)
    if not len(kept):
        return first * cells, np.array([0, 1 << _PRECISION], np.int64)
    f = mass[kept[0] : kept[-1] + 1].clip(1)
    escape = (1 << _PRECISION) - int(f.sum())
    while escape < 1:
        f[np.argmax(f)] -= 1
        escape += 1
    return int(symbol[kept[0]]), np.append(f, escape)
