"""Experiments of chapter 13: lottery tickets of two small perceptrons, and what they owe to what.

All arms of a seed keep the same numbers of weights in every layer, and the last training of each
sees the same batches in the same order for as many updates (an arm that goes back to a later step
for that many fewer, so that weights and step agree; the arm that is trained as long as all rounds
together for more). How else they differ, `ARMS` says.

(Over 200 lines, half of them what the arms are and what the records mean.)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure
from compresskit.data import Dataset
from compresskit.model import layers
from compresskit.recipes.distillation import fresh
from compresskit.sparse import pooled_masks
from compresskit.train import Shuffled, Tickets, fit, iterative_magnitude, masked, unmasked

State = Mapping[str, Tensor]

TASKS: dict[str, tuple[Callable[[], Dataset], int]] = {  # data, updates of a training
    "mnist1d_mlp": (cache(data.mnist1d), 500),
    "digits_mlp": (cache(data.digits), 300),
}
ITERATIVE = ("ticket", "rewound", "fine-tuned")
ARMS: dict[str, str] = {
    "ticket": "iterative pruning, back to the first weights",
    "rewound": "iterative pruning, back to the weights after a twentieth of the first training",
    "fine-tuned": "iterative pruning, weights never put back, the learning rate's schedule is",
    "reinitialized": "the ticket's masks, other first weights of the same law",
    "signs": "the ticket's masks, other first weights with the signs of the ticket's",
    "random mask": "the ticket's first weights, masks drawn with as many weights in each layer",
    "one-shot": "the smallest weights of the first training removed at once, back to the first",
    "one-shot, as long": "removed at once, never put back, trained for as long as all rounds took",
}
ROUNDS, LEVELS, LONG = 18, (4, 8, 11, 14, 16, 18), (8, 14, 18)
RATE, SHARE, HEAD = 1e-2, 0.2, "head"


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of all trainings.

    Parameters
    ----------
    model : nn.Module
    batch : (inputs, labels)
    """
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(build: str, order: int, steps: int | None = None) -> Shuffled:
    """The batches of one training, of 100 examples each.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    order : int
        seed of their order
    steps : int
        None: as many as `TASKS` says
    """
    samples, usual = TASKS[build][0](), TASKS[build][1]
    return Shuffled(samples.train_x, samples.train_y, size=100, steps=steps or usual, seed=order)


@cache
def iterated(build: str, seed: int, arm: str, rate: float = RATE, rounds: int = ROUNDS) -> Tickets:
    """Iterative pruning by a fifth of each hidden layer and a tenth of the output layer per round.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    seed : int
        of the first weights and the order of the batches
    arm : str
        one of `ITERATIVE`
    rate : float
        largest learning rate
    rounds : int
    """
    task = batches(build, seed)
    back = {"ticket": 0, "rewound": len(task) // 20, "fine-tuned": None}[arm]
    return iterative_magnitude(
        fresh(build, seed),
        cross_entropy,
        task,
        rounds=rounds,
        rate=SHARE,
        rewind=back,
        pooled=False,
        halved=[HEAD],
        fit=partial(fit, rate=rate),
    )


def score(build: str, state: State) -> float:
    """Test accuracy of a model with these weights.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    state : mapping
        its state dict
    """
    model, samples = fresh(build, 0), TASKS[build][0]()
    model.load_state_dict(dict(state))
    return measure.accuracy(model, samples.test_x, samples.test_y)


def retrained(
    build: str,
    first: State,
    masks: Mapping[str, Tensor],
    *,
    order: int,
    start: int = 0,
    steps: int | None = None,
    rate: float = RATE,
) -> State:
    """The weights after a training from `first` with fixed masks.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    first : mapping
        state to start from
    masks : mapping
        layer name -> (m, n) bool tensor
    order : int
        seed of the batches' order
    start : int
        the step whose weights `first` holds
    steps : int
        None: as many as `TASKS` says
    rate : float
        largest learning rate
    """
    model = fresh(build, 0)
    model.load_state_dict(dict(first))
    model = masked(model, masks)
    fit(model, cross_entropy, batches(build, order, steps), rate=rate, start=start)
    return unmasked(model).state_dict()


def drawn(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Masks with as many kept weights in each layer, at places drawn without repetition.

    Parameters
    ----------
    masks : mapping
        layer name -> (m, n) bool tensor
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def at_once(weights: State, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the largest weights of each layer, as many as the given masks keep.

    Parameters
    ----------
    weights : mapping
        state of a trained model
    masks : mapping
        layer name -> (m, n) bool tensor
    """
    found = {}
    for name, mask in masks.items():
        share = 1 - int(mask.sum()) / mask.numel()
        found |= pooled_masks({name: weights[f"{name}.weight"].abs()}, share)
    return found


def with_signs(sizes: State, signs: State, names: Mapping) -> dict[str, Tensor]:
    """|sizes| sign(signs) for the weights of some layers; all else as in `sizes`.

    Parameters
    ----------
    sizes : mapping
    signs : mapping
        states of one architecture
    names : mapping
        whose keys are names of layers
    """
    keys = {f"{name}.weight" for name in names}
    return {k: t.abs() * signs[k].sign() if k in keys else t for k, t in sizes.items()}


def kept(masks: Mapping[str, Tensor]) -> list[int]:
    """Numbers of kept weights, layer by layer.

    Parameters
    ----------
    masks : mapping
        layer name -> (m, n) bool tensor
    """
    return [int(mask.sum()) for mask in masks.values()]


def by_level(
    *, build: str, seed: int, arm: str, rate: float = RATE, levels: Sequence[int] | None = None
) -> dict:
    """Test accuracy after a training of one arm, at several levels of sparsity.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    seed : int
        of the first weights and the order of the batches; arms with the same seed pair
    arm : str
        a name in `ARMS`
    rate : float
        largest learning rate
    levels : sequence of int
        rounds of the ticket whose counts are taken; None: every round for the iterative arms,
        `LONG` for the one that is trained as long as they are, `LEVELS` for the others

    Returns
    -------
    dict with `levels`, the kept weights of the layers `kept` at each, and `accuracy`
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r}; known are {', '.join(map(repr, ARMS))}")
    rounds = max(levels) if levels else ROUNDS
    found = iterated(build, seed, arm if arm in ITERATIVE else "ticket", rate, rounds)
    if levels is None:
        levels = LONG if arm == "one-shot, as long" else LEVELS
        levels = range(ROUNDS + 1) if arm in ITERATIVE else levels
    accuracy, counts = [], []
    for level in levels:
        masks, state = found.rounds[level].masks, found.rounds[level].weights
        if arm not in ITERATIVE:
            first, options = found.origin, {}
            other = fresh(build, 1_000 + seed).state_dict()
            if arm == "reinitialized":
                first = other
            elif arm == "signs":
                first = with_signs(other, first, masks)
            elif arm == "random mask":
                masks = drawn(masks, 1_000 * level + seed)
            else:
                masks = at_once(found.rounds[0].weights, masks)
            if arm == "one-shot, as long":
                first, options = found.rounds[0].weights, {"steps": level * TASKS[build][1]}
            state = retrained(build, first, masks, order=seed, rate=rate, **options)
        accuracy.append(score(build, state))
        counts.append(kept(masks))
    return {"levels": list(levels), "kept": counts, "accuracy": accuracy}


def barrier(build: str, first: State, second: State, *, points: int = 9) -> float:
    """How much accuracy is lost at worst on the line between two weights, against the line itself.

    max over t of (1 - t) a_0 + t a_1 - a(t), with the test accuracy a(t) of (1 - t) first +
    t second, t in equal steps from 0 to 1.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    first : mapping
    second : mapping
        states
    points : int
        values of t, the ends included
    """
    found = []
    for t in torch.linspace(0, 1, points).tolist():
        between = {name: torch.lerp(first[name], second[name], t) for name in first}
        found.append((t, score(build, between)))
    ends = found[0][1], found[-1][1]
    return max((1 - t) * ends[0] + t * ends[1] - value for t, value in found)


def instability(*, build: str, seed: int, arm: str) -> dict:
    """`barrier` between two trainings from the same weights, with batches in two orders.

    Parameters
    ----------
    build : str
        a name in `TASKS`
    seed : int
    arm : str
        "ticket": from the first weights; "rewound": from those after a twentieth of the training

    Returns
    -------
    dict with `levels`, 0 for the network without masks, and the `barrier` at each
    """
    found = iterated(build, seed, arm)
    start = len(batches(build, seed)) // 20 if arm == "rewound" else 0
    levels, losses = (0, *LEVELS[1::2]), []
    for level in levels:
        masks = found.rounds[level].masks
        # of the dense training too, the first steps are shared
        one, other = (
            retrained(build, found.origin, masks, order=order, start=start)
            for order in (seed, 500 + seed)
        )
        losses.append(barrier(build, one, other))
    return {"levels": list(levels), "barrier": losses}


def weights_of(build: str) -> dict[str, int]:
    """Number of weights of each pruned layer."""
    return {name: layer.weight.numel() for name, layer in layers(fresh(build, 0)).items()}
