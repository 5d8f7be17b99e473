"""Experiment of chapter 5: students of the book's byte model, a quarter of its size or half.

All ways see equally many windows of 255 or 256 bytes. Of a window that the teacher wrote, the 31
bytes that continue its prompt do not count, so those ways learn from 224 bytes where the others
learn from 256. The quarter-size students start from the same
random weights for a seed; the half-size ones keep every second block of the teacher.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, models
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.recipes import language
from compresskit.recipes.recipe import Recipe, initialized
from compresskit.surgery import keep_layers
from compresskit.train import (
    IGNORED,
    Shuffled,
    cached_logits,
    distill,
    distill_triple,
    fit,
    written,
)

SMALL = DecoderConfig(width=64, layers=6, heads=2, kv_heads=2, hidden=192, context=256)
WAYS = ("hard", "token-level", "sequence-level", "token-level on samples")
TRIPLE = {
    "three losses": (5.0, 2.0, 1.0),
    "without hidden states": (5.0, 2.0, 0.0),
    "without soft labels": (0.0, 2.0, 1.0),
    "hard labels only": (0.0, 2.0, 0.0),
}
PROMPT = 32  # bytes of real text that each of the teacher's samples continues
teacher = cache(models.pydoc_lm)


def windows(ids: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (N, length) of the windows of a text; label t is the byte after input t."""
    cut = ids.unfold(0, length + 1, stride)
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


@cache
def real_text() -> tuple[Tensor, Tensor]:
    """The training split in windows of the model's context, each half overlapping the next."""
    context = SMALL.context
    return windows(data.text(data.pydoc().train), context, context // 2)


@cache
def teacher_samples(count: int = 1_200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels (count, context - 1): real prompts, continued by the teacher.

    The labels of the prompt's bytes are ignored, so that only what the teacher wrote is learned.
    """
    ids = data.text(data.pydoc().train)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - PROMPT, (count,), generator=generator)
    prompts = torch.stack([ids[start:][:PROMPT] for start in starts])
    length = SMALL.context - PROMPT
    return written(teacher(), prompts, length, batch=400, generator=generator)


@cache
def answers(text: str) -> Tensor:
    """The teacher's logits in half precision on "real" text or on its own "samples"."""
    inputs, _ = real_text() if text == "real" else teacher_samples()
    return cached_logits(teacher(), inputs, batch=16, dtype=torch.float16)


def quarter_student(*, way: str, seed: int, steps: int = 1_000, rate: float = 3e-3) -> dict:
    """Train a student with a quarter of the parameters and score it in bits per byte.

    Parameters
    ----------
    way : str
        "hard": on the bytes of real text; "token-level": on the teacher's predictions for them;
        "sequence-level": on the bytes of the teacher's samples; "token-level on samples": on the
        teacher's predictions for those
    seed : int
        of the first weights and the order of the windows
    steps : int
        updates of 8 windows
    rate : float
        largest learning rate
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}; the ways are {', '.join(map(repr, WAYS))}")
    text = "real" if way in ("hard", "token-level") else "samples"
    inputs, labels = real_text() if text == "real" else teacher_samples()
    student = initialized(Recipe(SMALL, seed=seed))
    options = {"rate": rate, "seed": seed}
    if way.startswith("token-level"):
        options |= {"steps": steps, "batch": 8, "temperature": 1.0, "alpha": 1.0}
        distill(student, answers(text), inputs, labels, **options)
    else:
        fit(student, next_byte, Shuffled(inputs, labels, size=8, steps=steps, seed=seed), **options)
    return scores(student)


def half_student(
    *,
    losses: str,
    seed: int,
    steps: int = 250,
    rate: float = 1e-3,
    temperature: float = 2.0,
    fresh: bool = False,
) -> dict:
    """Train every second block of the teacher on real text and score it in bits per byte.

    Parameters
    ----------
    losses : str
        which of DistilBERT's three, a name in `TRIPLE`
    seed : int
        of the order of the windows, and of the first weights if they are `fresh`
    steps : int
        updates of 8 windows; 0 scores the blocks as they were taken
    rate : float
        largest learning rate
    temperature : float
        of the soft labels
    fresh : bool
        random first weights instead of the teacher's
    """
    if losses not in TRIPLE:
        raise ValueError(f"losses={losses!r}; known are {', '.join(map(repr, TRIPLE))}")
    student = keep_layers(teacher(), "blocks", [0, 2, 4])
    if fresh:
        student = initialized(Recipe(student.config, seed=seed))
    if steps:
        inputs, labels = real_text()
        weights = TRIPLE[losses]
        options = {"steps": steps, "rate": rate, "seed": seed, "temperature": temperature}
        distill_triple(student, teacher(), inputs, labels, weights=weights, **options)
    return scores(student)


def next_byte(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy, in nats, of the labels that count."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def scores(model: Decoder) -> dict:
    """Size and bits per byte of a trained student on the calibration and the test split."""
    splits, model = data.pydoc(), model.eval()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "calibration": language.score(model, data.text(splits.calibration)),
        "test": language.score(model, data.text(splits.test)),
    }
