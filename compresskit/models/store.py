"""Weights in the package: a safetensors file, and beside it a JSON record of how it came to be."""

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from compresskit import data


def keep(
    model: nn.Module, name: str, record: dict[str, Any], *, folder: Path = data.ASSETS
) -> None:
    """Write `name`.safetensors and `name`.json, the second with the SHA-256 of the first.

    Parameters
    ----------
    model : its state is stored in the dtype it has
    name : file name without suffix
    record : what else to say: the recipe, the curve, the quality reached
    folder : where to write; made if missing
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = save({key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()})
    facts = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "parameters": sum(p.numel() for p in model.parameters()),
        "made_with": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (folder / f"{name}.safetensors").write_bytes(content)
    (folder / f"{name}.json").write_text(json.dumps(facts | record, indent=1) + "\n")


def record(name: str, *, folder: Path = data.ASSETS) -> dict[str, Any]:
    """What the JSON file beside the weights of `name` says: recipe, seed, curve, checksum."""
    return json.loads((folder / f"{name}.json").read_text())


def restore(
    build: Callable[[dict[str, Any]], nn.Module],
    name: str,
    *,
    device: torch.device | str = "cpu",
    folder: Path = data.ASSETS,
) -> nn.Module:
    """Build a model from the record of `name` and give it the weights kept under that name.

    Parameters
    ----------
    build : makes the model, with any weights, from the record
    name : as given to `keep`
    device : where the model goes
    folder : where the two files lie

    Raises
    ------
    ValueError : the weights are missing, or are not those whose SHA-256 was recorded
    """
    weights = load(data.asset(f"{name}.safetensors", folder=folder))
    with torch.device("meta"):  # initial weights would only disturb the global random state
        model = build(record(name, folder=folder))
    model.load_state_dict({key: t.clone() for key, t in weights.items()}, assign=True)
    return model.eval().to(device)
