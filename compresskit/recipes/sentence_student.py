"""A student of half the layers for the sentence encoder, and the controls that explain it.

The teacher embeds every piece of text once, before any training; the students see its vectors and
never the network. The word vectors are the teacher's and stay fixed in all of them: a few
hundred updates teach nobody 30,522 words. Settings were chosen on the calibration paragraphs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure, models
from compresskit.losses import feature_loss
from compresskit.models import SentenceEncoder
from compresskit.surgery import keep_layers
from compresskit.train import Run, fit

# way: (layers at the start, what the student is trained on)
WAYS = {
    "distilled": ("teacher", "teacher"),
    "from scratch": ("random", "teacher"),
    "without teacher": ("teacher", "crops"),
    "shuffled teacher": ("teacher", "shuffled"),
}
SHORTEST = 80  # characters: headings and one-line remarks are no paragraphs to test on
MULTIPLE = 8  # lengths of the pieces in tokens, so that many have the same and none is padded
LEAST = 2 * MULTIPLE  # tokens of the shortest piece
CROP_TEMPERATURE = 0.05
STEPS, RATE = 250, 1e-3  # of the stored run


@dataclass(frozen=True)
class Recipe:
    """What decides a student, besides the way and the seed.

    Parameters
    ----------
    places : layers of the teacher that are kept
    steps : updates
    tokens : about so many in each
    rate, warmup : largest learning rate, and updates in which it rises
    each : random pieces cut from every paragraph, besides the whole of it
    """

    places: tuple[int, ...] = (1, 3, 5)
    steps: int = STEPS
    tokens: int = 1024
    rate: float = RATE
    warmup: int = 20
    each: int = 4


def paragraphs(split: Sequence[str]) -> list[str]:
    """The paragraphs of a split of `data.pydoc()` that are long enough to be compared."""
    return [text for text in split if len(text) >= SHORTEST]


def pieces(
    teacher: SentenceEncoder, texts: Sequence[str], *, each: int = 4, seed: int = 0
) -> list[Tensor]:
    """Token ids of every text and of `each` random parts of it, one (N, T) tensor per length T.

    A piece is [CLS], consecutive tokens of one text, [SEP]; T is a multiple of 8, so up to seven
    tokens at the end are dropped. Texts of fewer than 16 tokens give none.

    Parameters
    ----------
    teacher : SentenceEncoder
        of which only the tokenizer is used
    texts : sequence of str
    each : int
    seed : int
        of the parts
    """
    generator = torch.Generator().manual_seed(seed)
    found: set[tuple[int, ...]] = set()
    for code in teacher.tokenizer.encode_batch(list(texts)):
        first, *inner, last = code.ids
        for number in range(each + 1):
            size = len(inner)
            if number and size + 2 >= LEAST:
                size = _draw(LEAST - 2, size + 1, generator)
            start = _draw(0, len(inner) - size + 1, generator)
            size = (size + 2) // MULTIPLE * MULTIPLE - 2
            if size + 2 >= LEAST:
                found.add((first, *inner[start : start + size], last))
    lengths = sorted({len(piece) for piece in found})
    return [torch.tensor(sorted(p for p in found if len(p) == n)) for n in lengths]


@torch.no_grad()
def answers(teacher: SentenceEncoder, groups: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's embeddings (N, width) of each (N, T) tensor of ids: computed once, and kept."""
    return [
        torch.cat([teacher(part) for part in ids.split(max(1, 4096 // ids.shape[1]))])
        for ids in groups
    ]


class Batches(Sequence):
    """`steps` batches (ids, targets) of about `tokens` tokens, each of pieces of one length.

    Batch t is a function of (seed, t) alone; every epoch has a new order. A batch that would be
    less than half full is left out of its epoch.

    Parameters
    ----------
    groups, targets : as `pieces` and `answers` return them
    tokens, steps, seed : int
    """

    def __init__(
        self,
        groups: Sequence[Tensor],
        targets: Sequence[Tensor],
        *,
        tokens: int,
        steps: int,
        seed: int,
    ):
        self.groups, self.targets, self.tokens = groups, targets, tokens
        self.steps, self.seed = steps, seed
        self._epoch, self._order = 0, self._shuffled(0)
        if not self._order:
            raise ValueError(f"no length has {tokens // 2} tokens of text; use fewer than {tokens}")

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        epoch, place = divmod(step, len(self._order))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        group, rows = self._order[place]
        return self.groups[group][rows], self.targets[group][rows]

    def _shuffled(self, epoch: int) -> list[tuple[int, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        every = []
        for number, ids in enumerate(self.groups):
            full = max(1, self.tokens // ids.shape[1])
            for rows in torch.randperm(len(ids), generator=generator).split(full):
                if 2 * len(rows) >= full:
                    every.append((number, rows))
        return [every[i] for i in torch.randperm(len(every), generator=generator)]


def initialized(
    teacher: SentenceEncoder, places: Sequence[int], *, start: str = "teacher", seed: int = 0
) -> SentenceEncoder:
    """A copy of the teacher with these layers only, its embeddings fixed.

    Parameters
    ----------
    teacher : SentenceEncoder
    places : sequence of int
        layers, counted from 0
    start : str
        "teacher": with the weights of those layers; "random": BERT's initial ones, matrices
        N(0, 0.02²), biases 0, norms the identity
    seed : int
        of the random weights

    Raises
    ------
    ValueError : another `start`
    """
    if start not in ("teacher", "random"):
        raise ValueError(f'start={start!r}; it must be "teacher" or "random"')
    student = keep_layers(teacher, "encoder.layer", places)
    student.embeddings.requires_grad_(False)
    if start == "random":
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in student.encoder.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.02, generator=generator)
                else:
                    parameter.fill_(float(name.endswith("LayerNorm.weight")))
    return student


def cosine_loss(student: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of 1 - cos(student's embedding, teacher's embedding)."""
    ids, targets = batch
    return feature_loss(student(ids), targets, kind="cosine")


def crop_loss(student: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """-ln of the chance to find a text's second crop among the batch's, given its first.

    Two random crops of two thirds of each text; chances are a softmax over cosines / 0.05. Nobody's
    embeddings are used. The crops draw from torch's global generator, which `fit` seeds.

    References
    ----------
    Gao et al., "SimCSE", arXiv 2104.08821, equation 1, with crops in place of dropout.
    """
    ids, _ = batch
    inner, size = ids[:, 1:-1], max(1, 2 * (ids.shape[1] - 2) // 3)
    views = []
    for _ in range(2):
        start = int(torch.randint(inner.shape[1] - size + 1, ()))
        crop = torch.cat([ids[:, :1], inner[:, start : start + size], ids[:, -1:]], dim=1)
        views.append(student(crop))
    similarity = views[0] @ views[1].T / CROP_TEMPERATURE
    return F.cross_entropy(similarity, torch.arange(len(ids), device=ids.device))


def train_student(
    teacher: SentenceEncoder,
    groups: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    way: str = "distilled",
    recipe: Recipe | None = None,
    seed: int = 0,
    loop: Callable[..., Run] = fit,
) -> tuple[SentenceEncoder, Run]:
    """Make a student and train it in one of `WAYS`; all of them see the same pieces in each step.

    Parameters
    ----------
    teacher : SentenceEncoder
        gives the embeddings and, except from scratch, the first layers; left as it is
    groups, targets : as `pieces` and `answers` return them
    way : str
        "distilled": the teacher's layers, trained on its embeddings; "from scratch": random
        layers, trained on its embeddings; "without teacher": its layers, trained to recognize
        crops of one text; "shuffled teacher": its layers, trained on embeddings of other pieces
    recipe : Recipe
    seed : int
        of the order, the random layers, the crops, the shuffle
    loop : callable
        `train.fit`, or a `partial` of it

    Returns
    -------
    the student, and the record of the loop

    Raises
    ------
    ValueError : an unknown way
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}; the ways are {', '.join(map(repr, WAYS))}")
    recipe = recipe or Recipe()
    start, source = WAYS[way]
    if source == "shuffled":
        targets = _shuffled(targets, seed)
    student = initialized(teacher, recipe.places, start=start, seed=seed)
    batches = Batches(groups, targets, tokens=recipe.tokens, steps=recipe.steps, seed=seed)
    run = loop(
        student,
        crop_loss if source == "crops" else cosine_loss,
        batches,
        rate=recipe.rate,
        warmup=recipe.warmup,
        seed=seed,
        parameters=student.encoder.parameters(),
    )
    return student.eval(), run


def bag_of_words(
    teacher: SentenceEncoder,
    groups: Sequence[Tensor],
    targets: Sequence[Tensor],
    texts: Sequence[str],
    *,
    ridge: float = 1e-3,
) -> Tensor:
    """The teacher's embeddings of `texts` as a linear function of their mean word vector.

    The student without any layer, fitted by least squares to the same answers: (texts, width).

    Parameters
    ----------
    teacher : SentenceEncoder
        whose word vectors are averaged
    groups, targets : as `pieces` and `answers` return them
    texts : sequence of str
    ridge : float
        added to the diagonal, relative to its mean
    """
    words = teacher.embeddings.word_embeddings.weight.detach().double()

    def features(ids: Tensor) -> Tensor:
        mean = words[ids].mean(1)
        return torch.cat([mean, torch.ones_like(mean[:, :1])], dim=1)

    x = torch.cat([features(ids) for ids in groups])
    second = x.T @ x
    second.diagonal().add_(ridge * second.diagonal().mean())
    weight = torch.linalg.solve(second, x.T @ torch.cat(list(targets)).double())
    result = teacher.embeddings.word_embeddings.weight.new_empty(len(texts), weight.shape[1])
    codes = teacher.tokenizer.encode_batch(list(texts))
    for row, code in zip(result, codes, strict=True):
        row.copy_(features(torch.tensor([code.ids]))[0] @ weight)
    return result


def score(reference: Tensor, embeddings: Tensor) -> dict[str, float]:
    """`measure.fidelity` and the standard errors of both parts over the texts, which are few."""
    kept = measure.fidelity(reference, embeddings)
    cosines = F.cosine_similarity(reference.double(), embeddings.double())
    count = len(cosines)
    return {
        "cosine": kept.cosine,
        "cosine_error": cosines.std().item() / math.sqrt(count),
        "top1": kept.top1,
        "top1_error": math.sqrt(kept.top1 * (1 - kept.top1) / count),
    }


def tasks(*, seeds: Sequence[int] = (0, 1, 2)) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """The settings of every student of the stored run, each with the function that measures it.

    First the students that are not trained; then distillation against training from scratch, with
    all seeds; then, with the first, other layers and shuffled answers; then contrastive training
    with two seeds, at a tenth of the rate, since at the full one it forgets what the layers knew,
    and that with the first.
    """
    every = [2 * i + 1 for i in range(3)]  # layers 1, 3, 5: the last is kept
    even = [2 * i for i in range(3)]
    for places in (every, even, [0, 1, 2], [0, 3, 5], []):
        settings = {"way": "dropped" if places else "bag of words", "places": places}
        yield settings, partial(untrained_fidelity, places=places)
    plan: list[dict] = []
    for seed in seeds:
        plan.append({"way": "distilled", "places": every, "seed": seed})
        plan.append({"way": "from scratch", "places": every, "seed": seed})
    first = {"places": every, "seed": seeds[0]}
    plan.append(first | {"way": "distilled", "places": even})
    plan.append(first | {"way": "shuffled teacher"})
    for seed in seeds[:2]:
        plan.append({"way": "without teacher", "places": every, "seed": seed, "rate": RATE / 10})
    plan.append(first | {"way": "without teacher"})
    for settings in plan:
        settings = {"steps": STEPS, "rate": RATE} | settings
        yield settings, partial(student_fidelity, **settings)


def student_fidelity(
    *, way: str, places: Sequence[int], seed: int, steps: int = STEPS, rate: float = RATE
) -> dict:
    """Fidelity on held-out paragraphs of one student: an entry of the stored run.

    Parameters
    ----------
    way, places, seed, steps, rate : as for `train_student` and `Recipe`
    """
    teacher, held_out, reference = _teacher()
    groups, targets, caching = _lessons()
    recipe = Recipe(places=tuple(places), steps=steps, rate=rate)
    begun = time.perf_counter()
    student, run = train_student(teacher, groups, targets, way=way, recipe=recipe, seed=seed)
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "caching_seconds": caching,
        "pieces": sum(map(len, groups)),
        "tokens": recipe.tokens,
        "first_loss": sum(run.losses[:20]) / 20,
        "last_loss": sum(run.losses[-20:]) / 20,
        "held_out": len(held_out),
        "sha256": _checksum(student),
        **score(reference, student.encode(held_out)),
    }


def untrained_fidelity(*, places: Sequence[int]) -> dict:
    """The same of a student that nobody trained; without layers, of `bag_of_words`."""
    teacher, held_out, reference = _teacher()
    if not places:
        return score(reference, bag_of_words(teacher, *_lessons()[:2], held_out))
    student = initialized(teacher, places)
    return _sizes(teacher, student) | score(reference, student.encode(held_out))


@cache
def _teacher() -> tuple[SentenceEncoder, list[str], Tensor]:
    teacher, held_out = models.minilm(), paragraphs(data.pydoc().test)
    return teacher, held_out, teacher.encode(held_out)


@cache
def _lessons() -> tuple[list[Tensor], list[Tensor], float]:
    teacher = _teacher()[0]
    groups = pieces(teacher, data.pydoc().train)
    begun = time.perf_counter()
    targets = answers(teacher, groups)
    return groups, targets, round(time.perf_counter() - begun, 1)


def _sizes(teacher: SentenceEncoder, student: SentenceEncoder) -> dict[str, float]:
    ids = torch.arange(16 * 64).view(16, 64) + 1_000
    with torch.no_grad():
        times = measure.latency({"teacher": lambda: teacher(ids), "student": lambda: student(ids)})
    return {
        "bytes": sum(p.numel() * p.element_size() for p in student.parameters()),
        "teacher_bytes": sum(p.numel() * p.element_size() for p in teacher.parameters()),
        "speedup": times["teacher"].median / times["student"].median,
    }


def _checksum(student: SentenceEncoder) -> str:
    """SHA-256 of the trained weights: the record of which ones were measured."""
    digest = hashlib.sha256()
    for parameter in student.encoder.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _shuffled(targets: Sequence[Tensor], seed: int) -> list[Tensor]:
    every = torch.cat(list(targets))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return list(every[order].split([len(part) for part in targets]))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
