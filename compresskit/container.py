"""Compressed models in one file, written whole or not at all and checked before it is believed.

The file is a safetensors file, so any reader of that format can list it. Parameters that were not
compressed are ordinary tensors. The bytes of each leaf of each code are a U8 tensor named
"layer:path". The metadata entry "compresskit" is a JSON text: format version, the formula tree of
every code, a SHA-256 of every tensor, and one of the file itself with that one sum set to zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from compresskit.affine import Quantized
from compresskit.code import Array, Bits, Code, Leaf, Sum
from compresskit.layers import Compressed
from compresskit.model import compress, layers, tables, uncompressed

VERSION = 1
NODES = {cls.__name__: cls for cls in (Quantized, Sum)}
LEAVES = {cls.__name__: cls for cls in (Array, Bits)}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NO_SUM = "0" * 64


class ContainerError(ValueError):
    """The file is damaged, or not a container, or not one for this model."""


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Parameters
    ----------
    codes : dict
        layer name -> Code
    parameters : dict
        name -> Tensor, as they were
    note : dict
        what the writer added
    """

    codes: dict[str, Code]
    parameters: dict[str, Tensor]
    note: dict


def save(model: nn.Module, path: str | Path, *, note: Mapping | None = None) -> int:
    """Write the codes and the other parameters of `model`; return the size of the file in bytes.

    The bytes go to a temporary file beside `path` that takes its name when it is complete: a
    killed process leaves an older file as it was.

    Parameters
    ----------
    model : nn.Module
        as `compresskit.model.compress` returns it
    path : str or Path
    note : mapping
        anything that JSON can say about the model
    """
    codes = {n: m.code for n, m in model.named_modules() if isinstance(m, Compressed)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in uncompressed(model).items()}
    for name, code in codes.items():
        for leaf_path, leaf in code.leaves().items():
            octets = bytearray(leaf.to_bytes())
            stored = torch.frombuffer(octets, dtype=torch.uint8) if octets else torch.empty(0)
            tensors[f"{name}:{leaf_path}"] = stored.to(torch.uint8)
    header = {
        "format": VERSION,
        "codes": {name: _tree(code) for name, code in codes.items()},
        "checksums": {name: _sum(_octets(tensor)) for name, tensor in tensors.items()},
        "note": dict(note or {}),
        "file": _NO_SUM,
    }
    text = json.dumps(header)
    data = to_safetensors(tensors, {"compresskit": text})
    data = data.replace(_NO_SUM.encode(), _sum(data).encode(), 1)
    _write(Path(path), data)
    return len(data)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """A copy of `model` with the codes and parameters of the file.

    Parameters
    ----------
    path : str or Path
    model : nn.Module
        the architecture, with any weights; not changed

    Raises
    ------
    ContainerError : (a `ValueError`) the file is damaged, or holds other layers or shapes than
        `model`
    """
    contents = read(path)
    known = layers(model) | tables(model)
    strange = [name for name in contents.codes if name not in known]
    if strange:
        raise ContainerError(f"{path} holds codes for {strange}; the model has {list(known)}")
    plan = {name: lambda w, s, code=code: code for name, code in contents.codes.items()}
    try:
        model = compress(model, plan)
    except ValueError as error:
        raise ContainerError(f"{path} does not fit the model: {error}") from error
    target = uncompressed(model)
    wrong = {
        name
        for name in target.keys() | contents.parameters.keys()
        if _kind(target.get(name)) != _kind(contents.parameters.get(name))
    }
    if wrong:
        name = min(wrong)
        raise ContainerError(
            f"{path} does not fit the model: {name!r} is {_kind(contents.parameters.get(name))} in"
            f" the file and {_kind(target.get(name))} in the model"
        )
    with torch.no_grad():
        for name, tensor in contents.parameters.items():
            target[name].copy_(tensor)
    return model


def read(path: str | Path) -> Contents:
    """The codes and parameters in a file, after every checksum and every shape was verified.

    Nothing is unpickled and nothing is allocated that the file does not pay for with bytes.

    Raises
    ------
    ContainerError : (a `ValueError`) one message, whatever is wrong
    FileNotFoundError : no such file
    """
    data = Path(path).read_bytes()
    try:
        tensors, header = _parsed(data)
        _verify(data, tensors, header)
        used = {f"{name}:{leaf}" for name, tree in header["codes"].items() for leaf in _paths(tree)}
        codes = {}
        for name, tree in header["codes"].items():
            codes[name] = _code(tree, tensors, f"{name}:")
            codes[name].decode()  # a code whose parts do not fit each other is refused here
        parameters = {n: _tensor(t) for n, t in tensors.items() if n not in used}
        return Contents(codes, parameters, header["note"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError,
            RecursionError, OverflowError, safetensors.SafetensorError) as error:  # fmt: skip
        message = f"{path} is not a sound compresskit file: {error or type(error).__name__}"
        raise ContainerError(message) from error


def _parsed(data: bytes) -> tuple[dict[str, dict], dict]:
    """The raw tensors and our header. Offsets, overlaps and lengths are safetensors' to check."""
    tensors = dict(safetensors.deserialize(data))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["compresskit"])
    if header["format"] != VERSION:
        raise ValueError(f"format {header['format']!r}; this version reads format {VERSION}")
    return tensors, header


def _verify(data: bytes, tensors: dict[str, dict], header: dict) -> None:
    if tensors.keys() != header["checksums"].keys():
        raise ValueError("the arrays in the file are not those in its header")
    for name, tensor in tensors.items():
        if _sum(tensor["data"]) != header["checksums"][name]:
            raise ValueError(f"the bytes of {name!r} do not have their checksum")
    stored = header["file"].encode()
    if (
        len(stored) != len(_NO_SUM)
        or _sum(data.replace(stored, _NO_SUM.encode(), 1)) != stored.decode()
    ):
        raise ValueError("the file does not have its checksum: its header was changed")


def _tree(code: Code) -> dict:
    """A code as JSON: its class, its plain fields, its children."""
    if isinstance(code, Leaf):
        return {"leaf": type(code).__name__, **code.header()}
    plain = {f.name: getattr(code, f.name) for f in fields(code)}
    children = {name: _tree(child) for name, child in code.children().items()}
    return {"node": type(code).__name__, **plain, **children}


def _code(tree: dict, tensors: Mapping[str, dict], prefix: str) -> Code:
    """The inverse of `_tree`, over the file's bytes."""
    if "leaf" in tree:
        leaf = LEAVES[tree["leaf"]]
        return leaf.from_bytes(bytes(tensors[prefix.rstrip(".")]["data"]), tree)
    node = NODES[tree["node"]]
    names = {f.name for f in fields(node)}
    if names != tree.keys() - {"node"}:
        raise ValueError(f"a {node.__name__} has the fields {sorted(names)}, not {sorted(tree)}")
    values = {name: tree[name] for name in names}
    for name, value in values.items():
        if isinstance(value, dict):
            values[name] = _code(value, tensors, f"{prefix}{name}.")
    return node(**values)


def _paths(tree: dict, prefix: str = "") -> list[str]:
    if "leaf" in tree:
        return [prefix.rstrip(".")]
    children = ((name, value) for name, value in tree.items() if isinstance(value, dict))
    return [path for name, value in children for path in _paths(value, f"{prefix}{name}.")]


def _tensor(raw: dict) -> Tensor:
    dtype = DTYPES[raw["dtype"]]
    if not raw["data"]:
        return torch.empty(raw["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(raw["data"]), dtype=dtype).reshape(raw["shape"])


def _octets(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _write(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, make sure it is on the disk, then rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
