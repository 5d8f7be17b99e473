"""The recipes of the committed weights: `python -m compresskit.recipes.train all`.

Each is deterministic for its seed on one machine; another processor may round otherwise. The
checksums in the records are those of the committed files, so a new training run replaces both.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure
from compresskit.models import classifiers, store
from compresskit.models.decoder import DecoderConfig
from compresskit.recipes import language
from compresskit.recipes.recipe import Recipe
from compresskit.train import fit


@dataclass(frozen=True)
class Lessons:
    """Recipe of a classifier: AdamW on random batches, a half cosine from `rate` to 0.

    Parameters
    ----------
    build, samples : names in `models.classifiers` and `data`
    seed : of the initial weights and the batches
    epochs, batch : passes over the training set, and examples in an update
    rate, decay : peak learning rate and weight decay
    smoothing : label smoothing of the cross-entropy
    """

    build: str
    samples: str
    seed: int = 0
    epochs: int = 100
    batch: int = 100
    rate: float = 3e-3
    decay: float = 0.01
    smoothing: float = 0.0


PYDOC_LM = Recipe(
    DecoderConfig(width=128, layers=6, heads=4, kv_heads=4, hidden=384, context=256, dropout=0.15)
)
CLASSIFIERS = {
    "mnist1d_mlp": Lessons("mnist1d_mlp", "mnist1d", rate=1e-2, decay=0.3, smoothing=0.1),
    "mnist1d_cnn": Lessons("mnist1d_cnn", "mnist1d", rate=1e-2, decay=0.3, smoothing=0.1),
    "digits_mlp": Lessons("digits_mlp", "digits"),
    "digits_cnn": Lessons("digits_cnn", "digits"),
}


def classifier(lessons: Lessons, samples: data.Dataset) -> nn.Module:
    """Train one classifier on the training part of `samples`; the test part is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lessons.seed)
        model = getattr(classifiers, lessons.build)()
        count = len(samples.train_x)
        batches = [
            rows
            for _ in range(lessons.epochs)
            for rows in torch.randperm(count).split(lessons.batch)
        ]

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        logits = model(samples.train_x[rows])
        return F.cross_entropy(logits, samples.train_y[rows], label_smoothing=lessons.smoothing)

    options = {"rate": lessons.rate, "decay": lessons.decay, "seed": lessons.seed}
    fit(model, loss, batches, clip=None, **options)
    return model.eval()


def make_classifier(name: str, *, folder: Path, epochs: int | None) -> dict[str, Any]:
    """Train the classifier `name`, keep it in `folder`, and return its record."""
    lessons = CLASSIFIERS[name]
    if epochs is not None:
        lessons = replace(lessons, epochs=epochs)
    samples = getattr(data, lessons.samples)()
    model = classifier(lessons, samples)
    quality = {
        "train": measure.accuracy(model, samples.train_x, samples.train_y),
        "test": measure.accuracy(model, samples.test_x, samples.test_y),
    }
    store.keep(model, name, {"recipe": asdict(lessons), "accuracy": quality}, folder=folder)
    return quality


def make_pydoc_lm(*, folder: Path, work: Path, steps: int | None) -> dict[str, Any]:
    """Train the byte model, or resume it from `work`; keep it in `folder`; return its quality."""
    recipe = PYDOC_LM if steps is None else replace(PYDOC_LM, steps=steps)
    splits = data.pydoc()

    def report(entry: dict[str, float]) -> None:
        sys.stderr.write(" ".join(f"{key} {value:.4g}" for key, value in entry.items()) + "\n")

    checkpoint = work / f"pydoc_lm_{recipe.steps}.ckpt"
    model, curve = language.train(recipe, splits, checkpoint, report=report)
    quality = {
        "calibration": min(entry["calibration"] for entry in curve),
        "test": language.score(model, data.text(splits.test)),
    }
    facts = {"recipe": asdict(recipe), "bits_per_byte": quality, "curve": curve}
    store.keep(model, "pydoc_lm", facts, folder=folder)
    return quality


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, train what it names, and write the files."""
    names = ["pydoc-lm", *(name.replace("_", "-") for name in CLASSIFIERS)]
    parser = argparse.ArgumentParser(description="Train the small models of the book.")
    parser.add_argument("what", choices=["all", *names], help="which model")
    parser.add_argument("--steps", type=int, help="fewer updates (epochs of a classifier): a trial")
    parser.add_argument("--out", type=Path, default=data.ASSETS, help="folder of the weights")
    parser.add_argument("--work", type=Path, default=Path("_build/models"), help="checkpoints")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the order of additions, and so the weights, depend on it
    for name in names if options.what == "all" else [options.what]:
        if name == "pydoc-lm":
            quality = make_pydoc_lm(folder=options.out, work=options.work, steps=options.steps)
        else:
            plain = name.replace("-", "_")
            quality = make_classifier(plain, folder=options.out, epochs=options.steps)
        sys.stderr.write(f"{name}: {quality}\n")


if __name__ == "__main__":
    main()
