"""Integers of any width as bytes: the only bit-twiddling in the package."""

import numpy as np
import torch
from torch import Tensor

WIDTHS = range(1, 17)
_CHUNK = 1 << 16  # values per pass: the intermediate words stay in the processor's cache
_SHIFTS = np.arange(3, -1, -1, dtype=np.uint64)  # four values share one 64-bit word
_POWERS = np.array([81, 27, 9, 3, 1], np.uint8)
_TRITS = (np.arange(243)[:, None] // _POWERS % 3).astype(np.uint8)  # the five digits of a byte


def pack(values: Tensor, width: int) -> bytes:
    """The concatenated `width`-bit binary expansions of `values`, most significant bit first.

    Eight values fill `width` whole bytes. They are folded into two 64-bit words of four values
    each, and the last `width` bytes of that 128-bit number are the block's bytes.

    Parameters
    ----------
    values : (...,) integer tensor, each in [0, 2**width)
    width : bits per value, 1 to 16

    Returns
    -------
    bytes, ceil(values.numel() * width / 8) of them; the last is padded with zero bits

    Raises
    ------
    ValueError : `width` out of range, values not integers, or a value that does not fit

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 3]), 2).hex()  # 01 10 11, then two bits of padding
    '6c'
    """
    check_width(width)
    flat = _integers(values)
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << width):
        raise ValueError(
            f"values span {flat.min()} to {flat.max()}; {width} bits hold 0 to {(1 << width) - 1}"
        )
    out = np.empty((-(-flat.size // 8), width), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        blocks = -(-part.size // 8)
        words = np.zeros((blocks * 8,), np.uint64)
        words[: part.size] = part
        words = words.reshape(blocks, 2, 4)
        words <<= _SHIFTS * np.uint64(width)
        high, low = np.bitwise_or.reduce(words, axis=2).T
        pair = np.empty((blocks, 2), ">u8")
        pair[:, 0] = high >> np.uint64(64 - 4 * width)
        pair[:, 1] = (high << np.uint64(4 * width)) | low  # a shift by 64 gives 0 in NumPy
        out[start // 8 : start // 8 + blocks] = pair.view(np.uint8)[:, 16 - width :]
    return out.tobytes()[: packed_size(flat.size, width)]


def unpack(data: bytes, width: int, count: int) -> Tensor:
    """The inverse of `pack`: the `count` values of `width` bits that `data` holds.

    Returns
    -------
    (count,) tensor, uint8 for widths up to 8 and int32 above

    Raises
    ------
    ValueError : `width` or `count` out of range, a length that does not fit them, or set bits in
        the padding (a stream has one meaning and a meaning one stream)

    Examples
    --------
    >>> unpack(bytes.fromhex("6c"), 2, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    check_width(width)
    if count < 0:
        raise ValueError(f"count={count}; it must be 0 or more")
    if len(data) != packed_size(count, width):
        raise ValueError(
            f"{len(data)} bytes given; {count} values of {width} bits take"
            f" {packed_size(count, width)}"
        )
    blocks = -(-count // 8)
    octets = np.zeros((blocks, width), np.uint8)
    octets.reshape(-1)[: len(data)] = np.frombuffer(data, np.uint8)
    out = np.empty((blocks, 2, 4), np.uint8 if width <= 8 else np.int32)
    mask = np.uint64((1 << width) - 1)
    for start in range(0, blocks, _CHUNK // 8):
        part = octets[start : start + _CHUNK // 8]
        wide = np.zeros((len(part), 16), np.uint8)
        wide[:, 16 - width :] = part
        top, bottom = wide.view(">u8").astype(np.uint64).T
        high = (top << np.uint64(64 - 4 * width)) | (bottom >> np.uint64(4 * width))
        words = np.stack([high, bottom], axis=1)[:, :, None]
        out[start : start + len(part)] = (words >> (_SHIFTS * np.uint64(width))) & mask
    flat = out.reshape(-1)
    if data and data[-1] & ((1 << (-count * width % 8)) - 1):
        raise ValueError("the padding after the last value holds set bits; `pack` writes zeros")
    return torch.from_numpy(flat[:count].copy())


def pack_trits(values: Tensor) -> bytes:
    """The base-3 digits `values`, five to a byte, the first of five the most significant.

    Parameters
    ----------
    values : (...,) integer tensor of 0, 1 and 2

    Returns
    -------
    bytes, ceil(values.numel() / 5) of them, each at most 242; the last is filled up with zeros

    Raises
    ------
    ValueError : values not integers, or one that is no trit

    Examples
    --------
    >>> list(pack_trits(torch.tensor([2, 2, 2, 2, 2, 1])))  # 3**5 - 1, and 1 followed by 0000
    [242, 81]
    """
    flat = _integers(values)
    if flat.size and (flat.min() < 0 or flat.max() > 2):
        raise ValueError(f"values span {flat.min()} to {flat.max()}; a trit is 0, 1 or 2")
    fives = np.zeros((-(-flat.size // 5), 5), np.uint8)
    fives.reshape(-1)[: flat.size] = flat
    return (fives @ _POWERS).tobytes()


def unpack_trits(data: bytes, count: int) -> Tensor:
    """The inverse of `pack_trits`: the `count` trits that `data` holds.

    Returns
    -------
    (count,) uint8 tensor

    Raises
    ------
    ValueError : `count` below 0, a length that does not fit it, a byte above 242, or trits other
        than 0 in the padding

    Examples
    --------
    >>> unpack_trits(bytes([242, 81]), 6)
    tensor([2, 2, 2, 2, 2, 1], dtype=torch.uint8)
    """
    if count < 0 or len(data) != -(-count // 5):
        raise ValueError(
            f"{len(data)} bytes given for {count} trits; n trits, n 0 or more, take ceil(n / 5)"
        )
    octets = np.frombuffer(data, np.uint8)
    if octets.size and octets.max() > 242:
        raise ValueError(f"a byte of {octets.max()}; five trits make at most 242")
    flat = _TRITS[octets].reshape(-1)
    if flat[count:].any():
        raise ValueError("the padding after the last trit is not 0; `pack_trits` writes zeros")
    return torch.from_numpy(flat[:count].copy())


def packed_size(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take: ceil(count * width / 8)."""
    return -(-count * width // 8)


def check_width(width: int) -> None:
    """Refuse a bit width outside 1 to 16 (`ValueError`)."""
    if isinstance(width, bool) or not isinstance(width, int) or width not in WIDTHS:
        raise ValueError(f"width={width!r}; it must be an integer from 1 to 16, for instance 4")


def _integers(values: Tensor) -> np.ndarray:
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"values are {values.dtype}; they must be integers: round them first")
    return values.detach().cpu().contiguous().numpy().reshape(-1)
