"""Compressed models in one file, written whole or not at all and checked before it is believed.

The file is a safetensors file, so any reader of that format can list it. Parameters that were not
compressed are ordinary tensors. The bytes of each leaf of each code are a U8 tensor named
"layer:path". The metadata entry "compresskit" is a JSON text: format version, the formula tree of
every code, a SHA-256 of every tensor, and one of the file itself with that one sum set to zeros.

(Over 200 lines, because what is written here and what is checked there must be read side by side.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from compresskit.affine import Quantized
from compresskit.basis import InBasis, Permutation, Rotation, Scales
from compresskit.code import Array, Bits, Code, Leaf, Packed, Sum, Trits
from compresskit.codebook import Codebook
from compresskit.entropy import Adaptive, Huffman, Rans
from compresskit.files import replacing
from compresskit.formats.bf16 import Floats
from compresskit.formats.gguf import Blocks
from compresskit.integer import Integer
from compresskit.layers import Compressed
from compresskit.lowrank import Adapter, LowRank
from compresskit.model import compress, uncompressed
from compresskit.sparse import Golomb, GroupRanks, RunLengths, Sparse

VERSION = 1
NODES = {
    cls.__name__: cls
    for cls in (
        Codebook, InBasis, Integer, LowRank, Permutation, Quantized, Rotation, Scales, Sparse, Sum
    )
}  # fmt: skip
LEAVES = {
    cls.__name__: cls
    for cls in (
        Adaptive, Array, Bits, Blocks, Floats, Golomb, GroupRanks, Huffman, Packed, Rans,
        RunLengths, Trits,
    )
}  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NO_SUM = "0" * 64
# PEFT's names of an adapter's files and tensors, and the options that must be as usual.
_ADAPTER_WEIGHTS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT, _A, _B = "base_model.model.", "lora_A.weight", "lora_B.weight"
_MAGNITUDE = "lora_magnitude_vector"
_PLAIN = {
    "bias": "none", "lora_bias": False, "fan_in_fan_out": False, "modules_to_save": None,
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip


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

    Raises
    ------
    ValueError : a parameter of a dtype that the format does not have, such as complex64
    """
    codes = {n: m.code for n, m in model.named_modules() if isinstance(m, Compressed)}
    tensors = {name: _storable(name, tensor) for name, tensor in uncompressed(model).items()}
    for name, code in codes.items():
        for leaf_path, leaf in code.leaves().items():
            octets = np.frombuffer(leaf.to_bytes(), np.uint8).copy()
            tensors[f"{name}:{leaf_path}"] = torch.from_numpy(octets)
    header = {
        "file": _NO_SUM,  # the first of its kind in the file, whatever the note may hold
        "format": VERSION,
        "codes": {name: _tree(code) for name, code in codes.items()},
        "checksums": {name: _sum(_octets(tensor)) for name, tensor in tensors.items()},
        "note": dict(note or {}),
    }
    data = serialized(tensors, {"compresskit": json.dumps(header)})
    data = data.replace(_NO_SUM.encode(), _sum(data).encode(), 1)
    _contents(data)  # what cannot be read back is not written
    with replacing(Path(path)) as file:
        file.write(data)
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
    if any(tensor.is_meta for tensor in uncompressed(model).values()):
        raise ContainerError("the model is on the meta device; call model.to_empty(device='cpu')")
    plan = {n: lambda w, s, code=code: code.to(w.device) for n, code in contents.codes.items()}
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

    Nothing is unpickled, and nothing decoded but entropy-coded masks. Memory stays within a few
    times the file's size, but for integers of few bits and for masks: in memory each of their
    entries takes a byte or four, also where less than a bit of it is stored. Such a mask has at
    most 2^28 entries.

    Raises
    ------
    ContainerError : (a `ValueError`) one message, whatever is wrong
    FileNotFoundError : no such file
    """
    data = Path(path).read_bytes()
    try:
        return _contents(data)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, MemoryError,
            RecursionError, OverflowError, safetensors.SafetensorError) as error:  # fmt: skip
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        reason = reason or type(error).__name__
        raise ContainerError(f"{path} is not a sound compresskit file: {reason}") from error


def save_adapters(
    adapters: Mapping[str, Adapter], folder: str | Path, *, dropout: float = 0.0
) -> int:
    """Write the adapters of one model alone, in the layout that the library PEFT reads.

    Parameters
    ----------
    adapters : mapping
        layer name -> Adapter; ranks and scales may differ between layers
    folder : str or Path
        made if it is not there; gets `adapter_model.safetensors` and `adapter_config.json`, each
        written whole or not at all
    dropout : float
        noted for whoever trains on

    Returns
    -------
    int : bytes of both files

    Raises
    ------
    ValueError : no adapter, or a mixture of kinds (with and without magnitudes, or scalings),
        which the layout cannot say
    """
    if not adapters:
        raise ValueError("no adapter to write; train.lora.adapters(model) gives those of a model")
    kinds = {(a.magnitude is not None, a.rank_stabilized) for a in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(
            "adapters with and without magnitudes, or with different scalings; write each kind to"
            " a folder of its own"
        )
    ((dora, stabilized),) = kinds
    tensors = {}
    for name, adapter in adapters.items():
        found = {_A: adapter.a, _B: adapter.b, _MAGNITUDE: adapter.magnitude}
        for key, tensor in found.items():
            if tensor is not None:
                tensors[f"{_PEFT}{name}.{key}"] = _storable(name, tensor.detach())
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: adapter.alpha for name, adapter in adapters.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(adapters),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": stabilized,
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    files = {
        _ADAPTER_WEIGHTS: serialized(tensors, {"format": "pt"}),
        _ADAPTER_CONFIG: json.dumps(config, indent=2).encode(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with replacing(folder / name) as file:
            file.write(data)
    return sum(map(len, files.values()))


def load_adapters(folder: str | Path) -> dict[str, Adapter]:
    """The adapters that `save_adapters`, or PEFT's `save_pretrained`, wrote.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    dict : layer name -> Adapter, in float32

    Raises
    ------
    ContainerError : (a `ValueError`) damaged files, another method's adapters, or what this
        package does not do: adapters of embeddings or convolutions, trained biases, whole layers
    FileNotFoundError : no such files
    """
    folder = Path(folder)
    text, data = ((folder / name).read_bytes() for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS))
    try:
        return _adapters(json.loads(text), dict(safetensors.deserialize(data)))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError,
            OverflowError, safetensors.SafetensorError) as error:  # fmt: skip
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise ContainerError(f"{folder} holds no sound adapters: {reason}") from error


def _adapters(config: dict, tensors: Mapping[str, dict]) -> dict[str, Adapter]:
    if config["peft_type"] != "LORA":
        raise ValueError(f"peft_type {config['peft_type']!r}; only LORA is read")
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None, [], {}):
            raise ValueError(f"{name}={config[name]!r}; only {plain!r} is read")
    found: dict[str, dict[str, Tensor]] = {}
    for name, raw in tensors.items():
        stem = name.removesuffix(".weight") if _MAGNITUDE in name else name
        key = next((key for key in (_A, _B, _MAGNITUDE) if stem.endswith(f".{key}")), None)
        if key is None or not stem.startswith(_PEFT):
            raise ValueError(f"a tensor {name!r}, which belongs to no adapter of a linear layer")
        layer = stem.removeprefix(_PEFT).removesuffix(f".{key}")
        tensor = _tensor(raw)
        if not tensor.is_floating_point():
            raise ValueError(f"{name!r} is {tensor.dtype}; adapters are floating-point numbers")
        found.setdefault(layer, {})[key] = tensor.float()
    if not found:
        raise ValueError("no adapter in it")
    return {layer: _adapter(layer, found[layer], config) for layer in sorted(found)}


def _adapter(layer: str, parts: Mapping[str, Tensor], config: dict) -> Adapter:
    """One layer's adapter; a pattern counts where it is the end of the layer's name, as in PEFT."""
    dora = bool(config.get("use_dora", False))
    if parts.keys() != {_A, _B} | ({_MAGNITUDE} if dora else set()):
        raise ValueError(f"{layer!r} has {sorted(parts)}, with use_dora={dora}")

    def setting(pattern: str, usual: str) -> float:
        for end, value in (config.get(pattern) or {}).items():
            if not re.fullmatch(r"[\w.-]+", end):  # a file's own pattern might never end
                raise ValueError(f"{pattern} has {end!r}; only names of layers are read")
            if f".{layer}".endswith(f".{end}"):
                return value
        return config[usual]

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    stabilized = bool(config.get("use_rslora", False))
    adapter = Adapter(parts[_A], parts[_B], float(alpha), stabilized, parts.get(_MAGNITUDE))
    if adapter.rank != rank:
        raise ValueError(f"{layer!r} has rank {adapter.rank}; its configuration says {rank}")
    return adapter


def _contents(data: bytes) -> Contents:
    """The inverse of what `save` writes, and of nothing else."""
    tensors = dict(safetensors.deserialize(data))  # it checks offsets, overlaps and lengths
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"]["compresskit"]
    header = json.loads(text)
    if type(header["format"]) is not int or header["format"] != VERSION:
        raise ValueError(f"format {header['format']!r}; this version reads format {VERSION}")
    if json.dumps(header) != text or not isinstance(header["note"], dict):
        raise ValueError("the header is not as this package writes it")
    _verify(data, tensors, header)
    codes = {name: _code(tree, tensors, f"{name}:") for name, tree in header["codes"].items()}
    if json.dumps({name: _tree(code) for name, code in codes.items()}) != json.dumps(
        header["codes"]
    ):
        raise ValueError("the header describes its codes otherwise than this package does")
    used = {f"{name}:{path}" for name, code in codes.items() for path in code.leaves()}
    if any(tensors[name]["dtype"] != "U8" or len(tensors[name]["shape"]) != 1 for name in used):
        raise ValueError("the arrays of codes are not stored as bytes")
    parameters = {name: _tensor(t) for name, t in tensors.items() if name not in used}
    return Contents(codes, parameters, header["note"])


def _verify(data: bytes, tensors: dict[str, dict], header: dict) -> None:
    if tensors.keys() != header["checksums"].keys():
        raise ValueError("the arrays in the file are not those in its header")
    for name, tensor in tensors.items():
        if _sum(tensor["data"]) != header["checksums"][name]:
            raise ValueError(f"the bytes of {name!r} do not have their checksum")
    start = data.index(header["file"].encode())
    parts = data[:start], _NO_SUM.encode(), memoryview(data)[start + len(_NO_SUM) :]
    if _sum(*parts) != header["file"]:
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


def _tensor(raw: dict) -> Tensor:
    dtype = DTYPES[raw["dtype"]]
    if not raw["data"]:
        return torch.empty(raw["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(raw["data"]), dtype=dtype).reshape(raw["shape"])


def _storable(name: str, tensor: Tensor) -> Tensor:
    """A copy with storage of its own, which safetensors wants of every tensor."""
    if tensor.dtype not in DTYPES.values():
        kinds = [str(dtype).removeprefix("torch.") for dtype in DTYPES.values()]
        raise ValueError(f"{name!r} is {tensor.dtype}; a file holds {', '.join(kinds)}")
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def _octets(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _sum(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
