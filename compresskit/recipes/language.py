"""Training of the book's byte model, resumable to the same weights after a kill."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure
from compresskit.models.decoder import Decoder
from compresskit.recipes.recipe import Recipe, Windows, initialized


def score(model: Decoder, ids: Tensor) -> float:
    """Bits per byte of a text, over all bytes but the first, in windows of the whole context."""
    context = model.config.context
    return measure.bits_per_byte(model, ids, window=context, stride=context // 2)


def train(
    recipe: Recipe, splits: data.Splits, checkpoint: Path, *, report: Callable[[dict], None]
) -> tuple[Decoder, list[dict[str, float]]]:
    """Minimize the mean cross-entropy on the training split; keep the best by calibration split.

    Parameters
    ----------
    recipe : what to do
    splits : its test part is not touched
    checkpoint : file to resume from if it exists; it is replaced at every evaluation
    report : called with each new entry of the curve

    Returns
    -------
    the model of the best evaluation, and the curve: step, bits per byte of both splits

    Raises
    ------
    ValueError : the checkpoint was made by another recipe
    """
    model = initialized(recipe)
    optimizer = _optimizer(model, recipe)
    state: dict[str, Any] = {"recipe": asdict(recipe), "step": 0, "curve": [], "best": None}
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{checkpoint} was made by another recipe; delete it to start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    windows, calibration = Windows(splits.train, recipe), data.text(splits.calibration)
    sample = data.text(splits.train)[: len(calibration)]
    model.train()
    with torch.random.fork_rng(devices=[]):
        for step in range(state["step"], recipe.steps):
            _update(model, optimizer, windows[step], recipe, step)
            if (step + 1) % recipe.every and step + 1 < recipe.steps:
                continue
            entry = {
                "step": step + 1,
                "train": score(model, sample),
                "calibration": score(model, calibration),
            }
            if all(entry["calibration"] < old["calibration"] for old in state["curve"]):
                state["best"] = {k: v.clone() for k, v in model.state_dict().items()}
            state["curve"].append(entry)
            state |= {"step": step + 1, "model": model.state_dict()}
            state["optimizer"] = optimizer.state_dict()
            _replace(checkpoint, state)
            report(entry)
    model.load_state_dict(state["best"])
    return model.eval(), state["curve"]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    decayed = [n for n, p in named.items() if p.ndim == 2 and n != "embed.weight"]
    groups = [
        {"params": [named[n] for n in decayed], "weight_decay": recipe.decay},
        {"params": [p for n, p in named.items() if n not in decayed]},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0)


def _update(
    model: Decoder, optimizer: torch.optim.Optimizer, batch: Tensor, recipe: Recipe, step: int
) -> None:
    torch.manual_seed(recipe.seed + 7_919 * (step + 1))  # the dropout of this step
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate_at(step)
    logits = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _replace(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path` and rename it, so that a kill leaves the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
