"""Experiments of chapters 3 and 4: small students of small teachers on MNIST-1D.

The pages run a few seeds of them, `make results` runs many and stores the records. A seed decides
the examples that are drawn, the student's first weights, and the order of its batches, so that two
ways of training with the same seed differ in the way alone.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure, models
from compresskit.models import classifiers
from compresskit.train import Shuffled, cached_logits, distill, fit

DISGUISES = ("none", "class", "permuted", "flat", "shuffled")
WAYS = ("hard", "smoothed", "soft", "soft, same data")
mnist1d = cache(data.mnist1d)


def fresh(build: str, seed: int) -> nn.Module:
    """A model of `models.classifiers` with first weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(classifiers, build)()


def drawn(count: int, seed: int) -> Tensor:
    """(count,) indices of training examples, without repetition; the first of a larger draw."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    return torch.randperm(len(mnist1d().train_x), generator=generator)[:count]


def trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int,
    seed: int,
    rate: float = 1e-2,
    decay: float = 0.3,
    smoothing: float = 0.0,
) -> nn.Module:
    """`model` after training on hard labels, in batches of 100."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=smoothing)

    fit(model, loss, Shuffled(x, y, size=100, steps=steps, seed=seed), rate=rate, decay=decay)
    return model.eval()


@cache
def teacher(count: int, seed: int, steps: int = 1_000) -> nn.Module:
    """A convolutional net that saw only `count` examples: those of `drawn(count, seed)`."""
    rows = drawn(count, seed)
    x, y = mnist1d().train_x[rows], mnist1d().train_y[rows]
    return trained(fresh("mnist1d_cnn", 100 + seed), x, y, steps=steps, seed=seed, smoothing=0.1)


def student_accuracy(
    *,
    way: str,
    count: int,
    seed: int,
    temperature: float = 4.0,
    alpha: float = 0.9,
    steps: int = 1_000,
    build: str = "mnist1d_mlp",
    rate: float = 1e-2,
    decay: float = 0.3,
) -> float:
    """Test accuracy of a student trained on `count` examples of MNIST-1D.

    Parameters
    ----------
    way : str
        "hard": on the labels; "smoothed": on labels smoothed by 0.1; "soft": on labels and the
        book's teacher, which has seen all 4,000 examples; "soft, same data": on labels and a
        teacher that has seen only the same ones
    count : int
        training examples
    seed : int
    temperature, alpha : float
        of `losses.distillation_loss`
    steps : int
        updates, of 100 examples each or of all if there are fewer
    build : str
        student in `models.classifiers`
    rate, decay : float
        of AdamW, the same for all ways
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}; the ways are {', '.join(map(repr, WAYS))}")
    samples, rows = mnist1d(), drawn(count, seed)
    x, y = samples.train_x[rows], samples.train_y[rows]
    student = fresh(build, seed)
    options = {"steps": steps, "seed": seed, "rate": rate}
    if way in ("hard", "smoothed"):
        smoothing = 0.1 if way == "smoothed" else 0.0
        trained(student, x, y, smoothing=smoothing, decay=decay, **options)
    else:
        source = book_teacher() if way == "soft" else teacher(count, seed)
        loop: Callable = partial(fit, decay=decay)
        distill(student, source, x, y, temperature=temperature, alpha=alpha, fit=loop, **options)
    return measure.accuracy(student, samples.test_x, samples.test_y)


def disguise_answers(logits: Tensor, labels: Tensor, disguise: str, seed: int) -> Tensor:
    """The teacher's (N, 10) logits with part of what they say removed.

    Parameters
    ----------
    logits, labels : of N examples
    disguise : str
        "none"; "class": the mean over the examples with the same label, so that nothing is said
        about the example; "permuted": that mean with its wrong classes exchanged, so that nothing
        is said about which classes resemble each other; "flat": with its wrong classes all equal,
        which is label smoothing; "shuffled": whole answers, dealt to other examples
    seed : int
        of the exchanges and the deal
    """
    if disguise not in DISGUISES:
        raise ValueError(f"disguise={disguise!r}; known are {', '.join(map(repr, DISGUISES))}")
    generator = torch.Generator().manual_seed(seed)
    if disguise == "none":
        return logits
    if disguise == "shuffled":
        return logits[torch.randperm(len(logits), generator=generator)]
    table = logits.new_zeros(10, 10)
    for label in labels.unique().tolist():
        mean = logits[labels == label].mean(0)
        others = torch.arange(10) != label
        if disguise == "permuted":
            mean[others] = mean[others][torch.randperm(9, generator=generator)]
        elif disguise == "flat":
            mean[others] = mean[others].mean()
        table[label] = mean
    return table[labels]


def disguised_accuracy(
    *,
    disguise: str,
    count: int,
    seed: int,
    temperature: float = 4.0,
    alpha: float = 0.9,
    steps: int = 1_000,
) -> float:
    """Test accuracy of a student whose teacher's answers were disguised.

    Parameters
    ----------
    disguise : as for `disguise_answers`
    count, seed, temperature, alpha, steps : as for `student_accuracy`, whose "soft" is "none"
    """
    samples, rows = mnist1d(), drawn(count, seed)
    x, y = samples.train_x[rows], samples.train_y[rows]
    answers = disguise_answers(cached_logits(book_teacher(), x), y, disguise, seed)
    student = fresh("mnist1d_mlp", seed)
    options = {"temperature": temperature, "alpha": alpha, "steps": steps, "seed": seed}
    distill(student, answers, x, y, rate=1e-2, fit=partial(fit, decay=0.3), **options)
    return measure.accuracy(student, samples.test_x, samples.test_y)


book_teacher = cache(models.mnist1d_cnn)
