"""Experiments of chapter 4: what students of MNIST-1D inherit, on inputs that no teacher has seen.

MNIST-1D is a program, so there are as many fresh labeled inputs as one likes. Here they are drawn
independently, each label with probability 1/10, and scaled by the constants of the book's data set.
All students see the teacher's probabilities at temperature 1 and nothing else, which is what the
bound is about. A seed decides the sample, the first weights and the order of the batches.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, models, theory
from compresskit.affine import QuantSpec
from compresskit.methods import round_to_nearest
from compresskit.model import compress, decoded, layers, size_table
from compresskit.models import classifiers
from compresskit.recipes.distillation import trained
from compresskit.train import cached_logits, distill, fit

CLASSES = 10
HELD_OUT, HELD_OUT_SEED = 10_000, 99_999  # a share measured on so many has a spread of 0.005
FEW, FEW_SEED = 1_000, 500  # labeled examples of an overfit teacher, and where their seeds begin
DELTA = 0.05
LINEAR_RADIUS, RADIUS = 8.0, 12.0  # chosen on another sample, as the bounds demand
HIDDEN = {"small network": (32, 32), "network": (128, 128)}
STUDENTS = ("linear", "new head", *HIDDEN)
ARMS = (
    "labels",
    "overfit, its inputs",
    "overfit",
    "overfit, five",
    "regularized",
    "tiny",
    "book's",
)


class Sample(NamedTuple):
    """Inputs (n, 40) and labels (n,)."""

    x: Tensor
    y: Tensor


@cache
def sample(count: int, seed: int) -> Sample:
    """`count` independent inputs of MNIST-1D with labels, none of them in the book's data set."""
    templates, _, _ = _generator()
    labels = np.random.default_rng([seed, count]).integers(CLASSES, size=count)
    center, scale = _constants()
    lines = (_lines(templates["y"][labels], 1_000_003 + seed) - center) / scale
    return Sample(torch.tensor(lines, dtype=torch.float32), torch.tensor(labels))


@cache
def _generator():
    from mnist1d.data import get_dataset_args, get_templates, transform

    return get_templates(), get_dataset_args(), transform


@cache
def _constants() -> tuple[float, float]:
    """Mean and standard deviation of the 5000 lines of `data.mnist1d` before they were scaled."""
    lines = _lines(np.repeat(_generator()[0]["y"], 500), 42)
    return lines.mean(), lines.std()


def _lines(labels: Sequence[int], seed: int) -> np.ndarray:
    templates, settings, transform = _generator()
    states = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)  # the program of MNIST-1D draws from it
        drawn = [transform(templates["x"][y], templates["t"], settings)[0] for y in labels]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    return np.stack(drawn)


class Ball(nn.Module):
    """x -> W x with ||W||_F <= radius, without a bias: the class whose complexity is bounded."""

    def __init__(self, inputs: int, outputs: int, radius: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.normal_(self.weight, std=0.01)
        self.radius = radius

    @property
    def matrix(self) -> Tensor:
        """W: the parameter, or its multiple on the sphere if it lies outside of the ball."""
        return self.weight * (self.radius / self.weight.norm()).clamp(max=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


def unit_lines(x: Tensor) -> Tensor:
    """(n, 41): each input at length 1, and a constant 1; their norm is sqrt(2)."""
    return torch.cat([F.normalize(x, dim=1), torch.ones(len(x), 1)], dim=1)


class Discriminants:
    """x -> (n, 9) unit vectors: Fisher's discriminants of the features of a teacher.

    Fixed by the teacher and the data that it was trained on, so a student that is linear in them
    belongs to a class that was chosen before any distillation sample was drawn.
    """

    def __init__(self, teacher: nn.Sequential, x: Tensor, y: Tensor):
        self.trunk = teacher[:-1]
        features = self._features(x)
        means = torch.stack([features[y == k].mean(0) for k in range(CLASSES)])
        within = torch.cov((features - means[y]).T)
        within.diagonal().add_(0.01 * within.diagonal().mean())
        root = torch.linalg.cholesky(within)
        white = torch.linalg.solve_triangular(root, (means - means.mean(0)).T, upper=False)
        directions = torch.linalg.svd(white, full_matrices=False).U[:, : CLASSES - 1]
        self.center = features.mean(0)
        self.matrix = torch.linalg.solve_triangular(root.T, directions, upper=True)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return self.trunk(x).double()

    def __call__(self, x: Tensor) -> Tensor:
        return F.normalize((self._features(x) - self.center) @ self.matrix, dim=1).float()


@cache
def book_teacher() -> nn.Sequential:
    """The convolutional net of the book, trained on the 4000 training examples of MNIST-1D."""
    return models.mnist1d_cnn()


@cache
def book_discriminants() -> Discriminants:
    """Those of `book_teacher`, from the examples that it was trained on."""
    samples = data.mnist1d()
    return Discriminants(book_teacher(), samples.train_x, samples.train_y)


LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": unit_lines,
    "new head": lambda x: book_discriminants()(x),
}


def network(*widths: int, seed: int) -> nn.Sequential:
    """A ReLU network (inputs, hidden ..., classes) with first weights that depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages: list[nn.Module] = []
        for n, m in itertools.pairwise(widths):
            stages += [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(*stages[:-1])


def taught(
    student: nn.Module,
    teachers: nn.Module | Sequence[nn.Module] | Tensor,
    x: Tensor,
    *,
    seed: int,
    steps: int = 1_000,
    rate: float = 1e-2,
    inputs: Tensor | None = None,
) -> nn.Module:
    """`student` after minimizing the mean KL(teacher || student) over x, temperature 1, no labels.

    Parameters
    ----------
    student : nn.Module
        trained in place
    teachers : nn.Module, sequence or Tensor
        a model, an ensemble, or their logits at x
    x : (n, 40) Tensor
    seed : int
        of the order of the batches
    steps, rate : int, float
        updates of 100 inputs each, and their largest learning rate
    inputs : (n, d) Tensor
        what the student sees in place of x
    """
    logits = teachers if isinstance(teachers, Tensor) else cached_logits(teachers, x)
    unused = torch.zeros(len(x), dtype=torch.int64)
    distill(
        student,
        logits,
        x if inputs is None else inputs,
        unused,
        steps=steps,
        temperature=1.0,
        alpha=1.0,
        rate=rate,
        seed=seed,
        fit=partial(fit, decay=1e-2),
    )
    return student.eval()


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """(n, classes) float64 softmax of the model's logits."""
    return torch.softmax(model(x).double(), -1)


def error(p: Tensor, y: Tensor) -> float:
    """Share of rows whose most probable class is not the label."""
    return (p.argmax(-1) != y).double().mean().item()


def rounded(model: nn.Module, bits: int = 4) -> nn.Module:
    """A copy with weights of so many bits, one scale per row; biases stay as they are."""
    method = partial(round_to_nearest, spec=QuantSpec(bits, symmetric=True))
    return compress(model, dict.fromkeys(layers(model), method), {})


def norm_complexity(model: nn.Sequential, input_norm: float, count: int) -> float:
    """`theory.network_complexity` with the norms that this network happens to have.

    A bias is one more column, and its input one more constant unit in every layer.
    """
    matrices = []
    for layer in layers(model).values():
        whole = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().double()
        matrices.append(whole)
    *hidden, last = matrices
    norms = [float((w.square().sum() + 1).sqrt()) for w in hidden]  # +1 keeps the constant unit
    return theory.network_complexity(norms, float(last.norm(dim=1).sum()), input_norm, count)


@cache
def lesson(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample's inputs and labels, and the logits of the book's teacher for it."""
    x, y = sample(count, seed)
    return x, y, cached_logits(book_teacher(), x)


def graded(p: Tensor) -> dict:
    """Error and risk of probabilities (HELD_OUT, classes), and how far from the book's teacher."""
    _, y, logits = lesson(HELD_OUT, HELD_OUT_SEED)
    truth = torch.softmax(logits.double(), -1)
    return {
        "error": error(p, y),
        "risk": theory.gibbs_risk(p, y),
        "fresh_tv": theory.mean_total_variation(truth, p),
    }


def held_out(look: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """The inputs on which students are graded, as `look` prepares them."""
    return look(lesson(HELD_OUT, HELD_OUT_SEED)[0])


def bound_terms(*, student: str, count: int, seed: int) -> dict:
    """Every term of the bounds for one student of the book's teacher, and what it is worth.

    Parameters
    ----------
    student : str
        "linear": on the inputs at length 1, with ||W|| <= 8; "new head": on the teacher's
        discriminants, with ||W|| <= 12; "small network" and "network": two hidden layers of 32
        and of 128
    count : int
        inputs without labels
    seed : int

    Returns
    -------
    dict
        on the sample `distance` sqrt(mean KL / 2) and `tv`, mean total variation; `complexity`,
        twice the upper bound; `confidence`; `error`, `risk`, `fresh_tv` of `graded`. Networks
        also in 4 bits: `bits` of all weights and scales, the Occam term `occam`, `coded_tv` on the
        sample, `coded_risk`
    """
    x, _, logits = lesson(count, seed)
    p = torch.softmax(logits.double(), -1)
    look, widest, steps = LOOKS.get(student, lambda x: x), 1.0, 2_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if student == "linear":
            model, widest, steps = Ball(41, CLASSES, LINEAR_RADIUS), 2**0.5, 1_000
        elif student == "new head":
            model, steps = Ball(CLASSES - 1, CLASSES, RADIUS), 1_000
        else:
            model = network(40, *HIDDEN[student], CLASSES, seed=seed)
    taught(model, logits, x, seed=seed, steps=steps, inputs=look(x))
    if isinstance(model, Ball):
        complexity = theory.softmax_complexity(model.radius, widest, CLASSES, count)
    else:
        longest = float(x.norm(dim=1).square().max() + 1) ** 0.5
        complexity = norm_complexity(model, longest, count)
    seen = probabilities(model, look(x))
    found = graded(probabilities(model, held_out(look))) | {
        "distance": theory.divergence_term(p, seen),
        "tv": theory.mean_total_variation(p, seen),
        "complexity": 2 * complexity,
        "confidence": theory.confidence_term(count, DELTA),
    }
    if isinstance(model, Ball):
        return found
    small = rounded(model)
    bits, restored = 8 * size_table(small).nbytes, decoded(small)
    return found | {
        "bits": bits,
        "occam": theory.occam_term(bits, count, DELTA),
        "coded_tv": theory.mean_total_variation(p, probabilities(restored, x)),
        "coded_risk": graded(probabilities(restored, held_out()))["risk"],
    }


def small_student(*, width: int, way: str, seed: int, count: int = 4_000) -> dict:
    """`graded` student with one hidden layer of `width`, from "labels" or from the "teacher"."""
    x, y, logits = lesson(count, seed)
    student = network(40, width, CLASSES, seed=seed)
    if way == "labels":
        trained(student, x, y, steps=1_000, seed=seed, decay=1e-2)
    elif way == "teacher":
        taught(student, logits, x, seed=seed)
    else:
        raise ValueError(f'way={way!r}; use "labels" or "teacher"')
    return graded(probabilities(student, held_out()))


@cache
def poor_teacher(kind: str, seed: int, place: int = 0) -> nn.Module:
    """A teacher that is not to be trusted.

    "overfit": a convolutional net after 500 steps on `FEW` labels, with neither decay nor
    smoothing; `place` changes its first weights and the order, not the labels. "regularized": the
    same with decay 0.3 and smoothing 0.1. "tiny": four hidden units, 4000 labels. None of them has
    seen the inputs `lesson(4_000, seed)` on which its student imitates it.
    """
    if kind == "tiny":
        x, y, _ = lesson(4_000, FEW_SEED + seed)
        small = network(40, 4, CLASSES, seed=seed)
        return trained(small, x, y, steps=1_000, seed=seed, decay=1e-2)
    x, y, _ = lesson(FEW, FEW_SEED + seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000 * place + seed)
        model = classifiers.mnist1d_cnn()
    decay, smoothing = {"overfit": (0.0, 0.0), "regularized": (0.3, 0.1)}[kind]
    return trained(model, x, y, steps=500, seed=place, rate=5e-3, decay=decay, smoothing=smoothing)


def pupil(*, arm: str, seed: int) -> dict:
    """`graded` student with two hidden layers of 128, in one of the `ARMS`.

    Returns
    -------
    dict
        with a teacher also its `teacher_error` and `teacher_risk`; of an overfit one `few_error`,
        its error on the examples that it learned from, `same_wrong`, how often the student repeats
        its wrong answers, and `same_wrong_other`, how often those of the overfit teacher of other
        examples
    """
    x = lesson(4_000, seed)[0]
    few, labels, _ = lesson(FEW, FEW_SEED + seed)
    student = network(40, 128, 128, CLASSES, seed=seed)
    if arm == "labels":
        trained(student, few, labels, steps=1_000, seed=seed, decay=1e-2)
        return graded(probabilities(student, held_out()))
    if arm == "overfit, five":
        teacher = [poor_teacher("overfit", seed, place) for place in range(5)]
    elif arm == "book's":
        teacher = book_teacher()
    elif arm in ARMS:
        teacher = poor_teacher(arm.split(",")[0], seed)
    else:
        raise ValueError(f"arm={arm!r}; the arms are {', '.join(map(repr, ARMS))}")
    taught(student, teacher, few if arm == "overfit, its inputs" else x, seed=seed)
    given = torch.softmax(cached_logits(teacher, held_out()).double(), -1)
    p, of_teacher = probabilities(student, held_out()), graded(given)
    found = graded(p) | {f"teacher_{name}": of_teacher[name] for name in ("error", "risk")}
    if arm == "overfit":
        found["few_error"] = error(probabilities(teacher, few), labels)
        y = lesson(HELD_OUT, HELD_OUT_SEED)[1]
        other = probabilities(poor_teacher("overfit", seed + 1), held_out())
        for name, answers in (("same_wrong", given), ("same_wrong_other", other)):
            wrong = answers.argmax(1) != y
            same = (p.argmax(1) == answers.argmax(1))[wrong]
            found[name] = same.double().mean().item()
    return found


def ascent(
    build: Sequence[int],
    x: Tensor,
    teacher: Tensor,
    signs: np.ndarray,
    *,
    seed: int,
    steps: int = 300,
    rate: float = 1e-2,
) -> float:
    """A large value of sum e_i TV(t(x_i), s(x_i)) / n over the networks s of some widths.

    What gradient ascent finds from one start: a lower bound on the supremum.

    Parameters
    ----------
    build : sequence of int
        widths, as for `network`
    x : (n, d) Tensor
    teacher : (n, classes) Tensor
        probabilities
    signs : (n,) array
    seed : int
        of the first weights
    steps, rate : int, float
        of Adam's updates, on all inputs at once
    """
    student = network(*build, seed=seed)
    weights = torch.tensor(signs, dtype=torch.float32) / (2 * len(signs))
    teacher = teacher.float()

    def loss(model: nn.Module, _: int) -> Tensor:
        apart = (torch.softmax(model(x), -1) - teacher).abs().sum(-1)
        return -(weights * apart).sum()

    fit(student, loss, range(steps), rate=rate)
    with torch.no_grad():
        return -loss(student, 0).item()
