"""Write a GGUF file: whole or not at all, and only what the reader takes back.

(Over 200 lines with the rules by which a Python value gets one of the thirteen stored types.)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compresskit.files import replacing
from compresskit.formats.gguf.blocks import TYPES, Blocks
from compresskit.formats.gguf.reader import (
    ALIGNMENT,
    ARRAY,
    DEPTH,
    NUMBERS,
    STRING,
    VERSIONS,
    check_alignment,
    directory,
)

MAX_NAME = 63  # bytes: ggml keeps names in 64 bytes with a zero at the end, and refuses longer ones
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NUMBER_OF = {dtype: number for number, dtype in NUMBERS.items()}
_LEAST_FLOAT32 = np.finfo(np.float32).smallest_normal  # below, fewer than 24 bits are kept
_INTEGERS = [np.dtype(name) for name in ("int32", "int64", "uint64")]


def write(
    path: str | Path, metadata: Mapping[str, object], tensors: Mapping[str, Blocks | Tensor]
) -> int:
    """Write a GGUF file, version 3, little-endian; return its size in bytes.

    The bytes go to a temporary file beside `path` that takes its name when it is complete: a
    killed process leaves an older file as it was. So a file that was read may be written over.

    Parameters
    ----------
    path : str or Path
    metadata : mapping
        key -> value, in the order of the file. What `read` gives is written with the types it
        had. Of plain values, a bool is BOOL; a whole number UINT32, or INT32 if negative; a float
        FLOAT32; where 32 bits do not hold it, the type of 64 bits; a list an ARRAY of the one type
        that its elements share, whole numbers as INT32 (as the reference does); an empty list,
        even one that was read as an array of no arrays, an array of no strings.
        "general.alignment" is obeyed, and 32 without it
    tensors : mapping
        name -> `Blocks`, or a tensor: float32, float16 and bfloat16 become F32, F16 and BF16

    Raises
    ------
    ValueError : a value, name, shape or dtype that the format does not have. Nothing is written.

    Notes
    -----
    Nothing is added to the metadata: programs that run models want "general.architecture",
    "general.file_type" (see `mixes.FILE_TYPES`) and, with quantized tensors,
    "general.quantization_version" = 2.
    """
    blocks = {name: _blocks(name, tensor) for name, tensor in tensors.items()}
    entries = {key: _entry(key, value) for key, value in metadata.items()}
    alignment = _alignment(metadata)
    header = bytearray(b"GGUF" + struct.pack("<IQQ", VERSIONS[-1], len(blocks), len(entries)))
    header += b"".join(entries.values())
    offsets = {}
    end = 0
    for name, code in blocks.items():
        offsets[name] = end
        header += _string(name) + struct.pack("<I", len(code.shape))
        header += struct.pack(f"<{len(code.shape)}Q", *reversed(code.shape))
        header += struct.pack("<IQ", TYPES[code.type].number, end)
        end = _aligned(end + code.nbytes, alignment)
    start = _aligned(len(header), alignment)
    directory(memoryview(header), start + end)  # what cannot be read back is not written
    with replacing(Path(path)) as file:
        file.write(header)
        for name, code in blocks.items():
            file.seek(start + offsets[name])  # over a gap, which reads as zeros
            file.write(memoryview(code.tensor.detach().cpu().contiguous().numpy()))
        file.truncate(start + end)
    return start + end


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    return check_alignment({"general.alignment": _scalar(value) if type(value) is int else value})


def _blocks(name: str, tensor: Blocks | Tensor) -> Blocks:
    if not isinstance(name, str) or not 1 <= len(_encoded(name)) <= MAX_NAME:
        raise ValueError(
            f"tensor name {name!r}; ggml takes 1 to {MAX_NAME} bytes, like 'blk.0.ffn_up.weight'"
        )
    if isinstance(tensor, Blocks):
        return tensor
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name!r} is {kind}; a file takes Blocks, and tensors of float32, float16, bfloat16"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    stored = flat.reshape(tensor.numel(), tensor.element_size())
    return Blocks(stored, FLOATS[tensor.dtype], tuple(tensor.shape))


def _entry(key: str, value: object) -> bytes:
    if not isinstance(key, str):
        raise ValueError(f"metadata key {key!r}; it must be a str like 'general.name'")
    try:
        number, body = _packed(value, depth=0)
    except ValueError as error:
        raise ValueError(f"metadata {key!r}: {error}") from None
    return _string(key) + struct.pack("<I", number) + body


def _packed(value: object, *, depth: int) -> tuple[int, bytes]:
    """The number of the stored type, and the bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim):
        number, count, body = _array(value, depth=depth + 1)
        return ARRAY, struct.pack("<IQ", number, count) + body
    scalar = _scalar(value)
    return _NUMBER_OF[scalar.dtype], scalar.tobytes()


def _array(values: Sequence | np.ndarray, *, depth: int) -> tuple[int, int, bytes]:
    """The number of the type of the elements, how many there are, and their bytes."""
    if depth > DEPTH:
        raise ValueError(f"arrays nested more than {DEPTH} deep")
    if isinstance(values, np.ndarray) and values.ndim == 1:
        stored = _known(values)
        return _NUMBER_OF[stored.dtype], len(stored), stored.tobytes()
    nested = [isinstance(value, list | tuple | np.ndarray) for value in values]
    if any(nested):
        if not all(nested):
            raise ValueError("a list of both arrays and other values; elements need one type")
        return ARRAY, len(values), b"".join(_packed(v, depth=depth)[1] for v in values)
    text = [isinstance(value, str) for value in values]
    if all(text):  # none included
        return STRING, len(values), b"".join(map(_string, values))
    if any(text):
        raise ValueError("a list of both str and other values; elements need one type")
    stored = _together(values)
    return _NUMBER_OF[stored.dtype], len(stored), stored.tobytes()


def _together(values: Sequence) -> np.ndarray:
    """Plain numbers, or NumPy scalars of one type, as an array of one stored type."""
    kinds = {type(value) for value in values}
    if kinds == {int}:
        for dtype in _INTEGERS:
            if np.iinfo(dtype).min <= min(values) and max(values) <= np.iinfo(dtype).max:
                return np.array(values, dtype)
        raise ValueError(f"whole numbers {min(values)} to {max(values)}; 64 bits do not hold them")
    if kinds <= {int, float}:
        return np.array(values, np.result_type(*map(_real, values)))
    if len(kinds) > 1:
        names = sorted(kind.__name__ for kind in kinds)
        raise ValueError(f"a list of {', '.join(names)}; elements need one type")
    return np.array([_scalar(value) for value in values])


def _scalar(value: object) -> np.generic:
    """One number or truth value, of a stored type."""
    if type(value) is bool:
        return np.bool_(value)
    if type(value) is int:
        for dtype in (np.uint32, np.uint64) if value >= 0 else (np.int32, np.int64):
            if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
                return dtype(value)
        raise ValueError(f"{value}; whole numbers go from -2**63 to 2**64 - 1")
    if type(value) is float:
        return _real(value)
    if isinstance(value, np.generic | np.ndarray):
        return _known(np.asarray(value))[()]
    raise ValueError(
        f"a {type(value).__name__}; values are str, bool, int, float, NumPy numbers, and lists"
    )


def _real(value: float) -> np.float32 | np.float64:
    """A float32 if that is as near as 24 bits can be, and equal for a whole number."""
    try:
        wide = np.float64(value)
    except OverflowError:
        raise ValueError(f"a whole number of {len(str(value))} digits among reals") from None
    if type(value) is int and int(wide) != value:
        raise ValueError(f"{value} among reals; float64 does not hold it")
    with np.errstate(over="ignore", under="ignore"):
        narrow = np.float32(wide)
    exact = narrow == wide or np.isnan(wide)
    near = type(value) is float and np.isfinite(narrow) and abs(narrow) >= _LEAST_FLOAT32
    return narrow if exact or near else wide


def _known(array: np.ndarray) -> np.ndarray:
    """The same numbers, little-endian; `ValueError` if the format has no such type."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _NUMBER_OF:
        names = ", ".join(known.name for known in _NUMBER_OF)
        raise ValueError(f"numbers of type {array.dtype}; the format has {names}")
    return array.astype(dtype)


def _string(text: str) -> bytes:
    data = _encoded(text)
    return struct.pack("<Q", len(data)) + data


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a string that UTF-8 does not hold: {error.reason}") from None
