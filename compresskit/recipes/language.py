"""Training of the book's byte model, resumable to the same weights after a kill."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure
from compresskit.models.decoder import Decoder
from compresskit.recipes.recipe import Recipe, Windows, initialized
from compresskit.train import fit


def score(model: Decoder, ids: Tensor) -> float:
    """Bits per byte of a text, over all bytes but the first, in windows of the whole context."""
    context = model.config.context
    return measure.bits_per_byte(model, ids, window=context, stride=context // 2)


def next_byte_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of every byte of (N, T + 1) windows after the first."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def decayed(model: Decoder, decay: float) -> list[dict]:
    """Two groups of parameters: AdamW decays the matrices, not the norms and the embedding."""
    named = dict(model.named_parameters())
    matrices = [name for name, p in named.items() if p.ndim == 2 and name != "embed.weight"]
    return [
        {"params": [named[name] for name in matrices], "weight_decay": decay},
        {"params": [p for name, p in named.items() if name not in matrices]},
    ]


def train(
    recipe: Recipe, splits: data.Splits, checkpoint: Path, *, report: Callable[[dict], None]
) -> tuple[Decoder, list[dict[str, float]]]:
    """Minimize the mean cross-entropy on the training split; keep the best by calibration split.

    Parameters
    ----------
    recipe : what to do
    splits : its test part is not touched
    checkpoint : file to resume from if it exists; it is replaced at every evaluation
    report : called with the scores of each new evaluation

    Returns
    -------
    the model of the best evaluation, and the curve: step, bits per byte of both splits

    Raises
    ------
    ValueError : the checkpoint was made by another recipe
    """
    model = initialized(recipe)
    calibration = data.text(splits.calibration)
    sample = data.text(splits.train)[: len(calibration)]

    def evaluate(model: nn.Module) -> dict[str, float]:
        scores = {"calibration": score(model, calibration), "train": score(model, sample)}
        report(scores)
        return scores

    run = fit(
        model,
        next_byte_loss,
        Windows(splits.train, recipe),
        rate=recipe.rate,
        warmup=recipe.warmup,
        betas=(0.9, 0.99),
        seed=recipe.seed,
        parameters=decayed(model, recipe.decay),
        evaluate=evaluate,
        every=recipe.every,
        checkpoint=checkpoint,
        recipe=asdict(recipe),
    )
    return model.eval(), run.curve
