"""The ways of distillation, as losses that are given to the loop.

(Over 200 lines: six ways, of which most lines say what the arguments mean.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.losses import (
    TopK,
    distillation_loss,
    ensemble_logits,
    feature_loss,
    mutual_losses,
    topk_kl,
    topk_targets,
)
from compresskit.model import evaluating
from compresskit.models.decoder import Decoder, sample
from compresskit.train.loop import Run, Shuffled, fit

IGNORED = -100  # the label of a position that no loss counts, PyTorch's own


def cached_logits(
    teachers: nn.Module | Sequence[nn.Module],
    inputs: Tensor,
    *,
    batch: int = 256,
    top: int | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor | TopK:
    """The teacher's answers to all inputs, computed once: what offline distillation trains on.

    Parameters
    ----------
    teachers : nn.Module or sequence
        several make an ensemble: the logits are then the logarithm of their mean probability
    inputs : (N, ...) Tensor
    batch : int
        inputs computed at once
    top : int
        keep only this many classes of each position, and the mass of all others together: int32
        indices, and logarithms of probabilities
    temperature : float
        with `top`: that of the kept probabilities, which serve no other. All logits serve every one
    dtype : torch.dtype
        in which logits or logarithms are kept, such as float16

    Returns
    -------
    (N, ..., classes) Tensor, or TopK
    """
    several = isinstance(teachers, Sequence) or type(teachers) is nn.ModuleList
    models = list(teachers) if several else [teachers]
    if not models:
        raise ValueError("no teacher; give a model, or a list of one or more")
    parts = []
    for part in inputs.split(batch):
        logits = []
        for model in models:
            with torch.no_grad(), evaluating(model):
                logits.append(model(part))
        whole = logits[0] if len(logits) == 1 else ensemble_logits(logits)
        if top is None:
            parts.append((whole.to(dtype),))
        else:
            kept = topk_targets(whole, top, temperature=temperature)
            parts.append((kept.indices.int(), kept.log_probs.to(dtype), kept.log_rest.to(dtype)))
    fields = [torch.cat(field) for field in zip(*parts, strict=True)]
    return fields[0] if top is None else TopK(*fields, float(temperature))


def distill(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | Tensor | TopK,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 100,
    temperature: float = 4.0,
    alpha: float = 0.9,
    top: int | None = None,
    rate: float = 1e-3,
    seed: int = 0,
    fit: Callable[..., Run] = fit,
) -> Run:
    """Train `student` on (1 - alpha) CE(labels) + alpha T^2 KL(teacher_T || student_T), offline.

    The teacher answers each input once, before the training. alpha = 0 is training on labels, with
    the same batches, and asks no teacher.

    Parameters
    ----------
    student : nn.Module
        trained in place
    teacher : nn.Module, sequence, Tensor or TopK
        a model, an ensemble of them, or what `cached_logits` returned for `inputs`
    inputs : (N, ...) Tensor
    labels : (N, ...) Tensor
        class of each position; -100: the position does not count
    steps : int
        updates
    batch : int
        rows of `inputs` in each
    temperature : float
        T
    alpha : float
        weight of the soft term, 0 to 1
    top : int
        keep only so many of the teacher's classes (`topk_targets`)
    rate : float
        largest learning rate
    seed : int
        of the order of the rows and of dropout
    fit : callable
        the loop; bind its other options by `partial(fit, decay=0.1, checkpoint=..., every=100)`

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        a cache made at another temperature or with another number of classes
    FloatingPointError
        the student's logits are no longer finite

    References
    ----------
    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", arXiv 1503.02531,
    section 2. Book: chapters 3 to 5.
    """
    targets = teacher
    if alpha == 0:
        targets = labels  # something of the right length: no teacher is asked
    elif not isinstance(teacher, Tensor | TopK):
        targets = cached_logits(teacher, inputs, top=top, temperature=temperature)
    elif isinstance(teacher, TopK):
        kept = teacher.indices.shape[-1]
        if teacher.temperature != temperature or top not in (None, kept):
            raise ValueError(
                f"the cache holds {kept} classes at temperature {teacher.temperature}, but"
                f" temperature={temperature} and top={top}; give temperature={teacher.temperature}"
                " and no top, or make another cache"
            )
    elif top is not None:
        targets = topk_targets(teacher, top, temperature=temperature)
    lumped = isinstance(targets, TopK)
    fields = targets[:3] if lumped else [targets]
    rows = Shuffled(inputs, labels, *fields, size=batch, steps=steps, seed=seed)

    def loss(model: nn.Module, row: tuple[Tensor, ...]) -> Tensor:
        x, y, *target = row
        logits = _finite_logits(model, x, y)
        if alpha and not lumped:
            return distillation_loss(logits, target[0], y, temperature=temperature, alpha=alpha)
        # With alpha = 0 the teacher does not matter: this is the cross-entropy, with its checks.
        hard = distillation_loss(logits, logits, y, temperature=1.0, alpha=0.0)
        if not alpha:
            return hard
        kept = TopK(*target, float(temperature))
        soft = topk_kl(logits, kept, temperature=temperature, keep=y != IGNORED)
        return (1 - alpha) * hard + alpha * temperature**2 * soft

    recipe = {"distill": [len(inputs), batch, temperature, alpha, top]}
    return fit(student, loss, rows, rate=rate, seed=seed, recipe=recipe)


def written(
    teacher: Decoder,
    prompts: Tensor,
    length: int,
    *,
    batch: int = 256,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Text that a language model writes after each prompt, as inputs and labels for a student.

    Parameters
    ----------
    teacher : Decoder
    prompts : (N, T) integer tensor
    length : int
        tokens to write after each
    batch : int
        prompts continued at once
    temperature, generator : as for `models.decoder.sample`

    Returns
    -------
    (N, T + length - 1) inputs and labels: label t is the token after input t, or -100 where that
    is a token of the prompt, which the teacher did not write
    """
    text = torch.cat(
        [
            sample(teacher, part, length, temperature=temperature, generator=generator)
            for part in prompts.split(batch)
        ]
    )
    inputs, labels = text[:, :-1].clone(), text[:, 1:].clone()
    labels[:, : prompts.shape[1] - 1] = IGNORED
    return inputs, labels


def distill_sequences(
    student: nn.Module,
    teacher: Decoder,
    prompts: Tensor,
    length: int,
    *,
    steps: int,
    batch: int = 8,
    soft: bool = False,
    rate: float = 1e-3,
    seed: int = 0,
    fit: Callable[..., Run] = fit,
) -> Run:
    """Train `student` on text that the teacher writes: on its tokens, or on its predictions there.

    With tokens, the expected loss is the cross-entropy of the two distributions of whole texts
    (book, chapter 5); the predictions for the same text have the same expectation, token by
    token, and less noise.

    Parameters
    ----------
    student : nn.Module
        trained in place
    teacher : Decoder
    prompts : (N, T) integer tensor
        the text that each of the teacher's continues
    length : int
        tokens that the teacher writes after each, at temperature 1
    steps, batch, rate, seed, fit : as for `distill`; `seed` also decides what the teacher writes
    soft : bool
        learn its predictions (token level, T = 1) instead of the tokens it drew (sequence level)

    References
    ----------
    Kim and Rush, "Sequence-level knowledge distillation", arXiv 1606.07947, sections 3.1 and 3.2;
    they take the teacher's likeliest text, found by beam search, in place of a random one.
    """
    generator = torch.Generator(device=prompts.device).manual_seed(seed)
    inputs, labels = written(teacher, prompts, length, generator=generator)
    options = {"steps": steps, "batch": batch, "temperature": 1.0, "rate": rate, "seed": seed}
    alpha = 1.0 if soft else 0.0
    return distill(student, teacher, inputs, labels, alpha=alpha, fit=fit, **options)


def distill_mutual(
    students: Sequence[nn.Module],
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 100,
    temperature: float = 1.0,
    weight: float = 1.0,
    rate: float = 1e-3,
    seed: int = 0,
    fit: Callable[..., Run] = fit,
) -> Run:
    """Train several students at once, each on the labels and on the others' present answers.

    All are updated together from the same batch (Zhang et al. update them in turn); there is no
    teacher. With weight = 0, and clip = None, each is trained alone: clipping is of the gradients
    of all students together.

    Parameters
    ----------
    students : sequence of nn.Module
        two or more, of any architecture, trained in place
    inputs, labels, steps, batch, rate, seed, fit : as for `distill`
    temperature : float
        T of the others' answers
    weight : float
        of the mean divergence from the others, beside the cross-entropy

    Returns
    -------
    Run, whose losses are sums over the students

    References
    ----------
    Zhang, Xiang, Hospedales and Lu, "Deep mutual learning", arXiv 1706.00384, eqs. 4 to 8.
    """
    rows = Shuffled(inputs, labels, size=batch, steps=steps, seed=seed)

    def loss(models: nn.ModuleList, row: tuple[Tensor, ...]) -> Tensor:
        x, y = row
        logits = [_finite_logits(model, x, y) for model in models]
        return mutual_losses(logits, y, temperature=temperature, weight=weight).sum()

    recipe = {"mutual": [len(inputs), batch, temperature, weight]}
    return fit(nn.ModuleList(students), loss, rows, rate=rate, seed=seed, recipe=recipe)


def distill_triple(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 8,
    hidden: tuple[str, str] = ("norm", "norm"),
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    temperature: float = 2.0,
    rate: float = 1e-3,
    seed: int = 0,
    fit: Callable[..., Run] = fit,
) -> Run:
    """Train `student` on DistilBERT's three losses: soft labels, hard labels, hidden directions.

    soft * T^2 KL(teacher_T || student_T) + hard * CE(labels) + direction * (1 - cos(h_S, h_T)),
    where the h are outputs of one module of each network. The teacher runs beside the student:
    hidden states of a whole data set are too large to keep.

    Parameters
    ----------
    student, teacher : nn.Module
        the student is trained in place; `surgery.keep_layers` makes one from the teacher's layers
    inputs, labels, steps, batch, rate, seed, fit : as for `distill`
    hidden : (str, str)
        names of the modules of student and teacher whose outputs are compared, of equal width
    weights : (float, float, float)
        of the soft, the hard and the direction term; a zero leaves the term out
    temperature : float
        T

    Returns
    -------
    Run

    References
    ----------
    Sanh et al., "DistilBERT", arXiv 1910.01108, section 3; the weights 5, 2, 1 and T = 2 are those
    of the training command published with its code.
    """
    soft, hard, direction = weights
    if min(weights) < 0 or soft + hard + direction <= 0:
        raise ValueError(f"weights={weights}; none below 0, and one above it, such as (5, 2, 1)")
    rows = Shuffled(inputs, labels, size=batch, steps=steps, seed=seed)

    def loss(model: nn.Module, row: tuple[Tensor, ...]) -> Tensor:
        x, y = row
        with outputs(model, hidden[0]) as mine:
            logits = _finite_logits(model, x, y)
        with torch.no_grad(), evaluating(teacher), outputs(teacher, hidden[1]) as theirs:
            target = teacher(x)
        total = logits.new_zeros(())
        if labels_weight := soft + hard:
            share = soft / labels_weight
            total = total + labels_weight * distillation_loss(
                logits, target, y, temperature=temperature, alpha=share
            )
        if direction:
            counted = y != IGNORED
            pair = mine[-1][counted], theirs[-1][counted]
            total = total + direction * feature_loss(*pair, kind="cosine")
        return total

    recipe = {"triple": [len(inputs), batch, temperature, *weights, *hidden]}
    return fit(student, loss, rows, rate=rate, seed=seed, recipe=recipe)


@contextmanager
def outputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Within, every output of the submodule `name`, a tensor, is appended to the yielded list."""
    names = [known for known, _ in model.named_modules() if known]
    if name not in names:
        raise ValueError(f"no module {name!r}; there are {', '.join(names[:8])}, ...")
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(f"{name!r} returns a {type(output).__name__}; name one with a tensor")
        seen.append(output)

    handle = model.get_submodule(name).register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def _finite_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What `model` answers. The losses refuse what is not finite too, but cannot know why it is."""
    logits = model(x)
    if not logits.detach()[y != IGNORED].isfinite().all():
        raise FloatingPointError(
            "the student's logits are not finite: its inputs are not, or the run has diverged; use"
            " a lower rate or a warmup"
        )
    return logits
