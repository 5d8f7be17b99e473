"""Experiments of chapter 12: which weights can go, by which criterion, and what the file weighs.

Each is a function of its settings alone: a small classifier is trained with a seed, weights are
removed, the rest may be trained further, and the result is scored on the test set and stored.
(Over 200 lines: one-shot, tuned, gradual, whole units, and what all of them count.)
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure, methods, surgery
from compresskit.affine import Quantized, QuantSpec
from compresskit.code import Array, Bits
from compresskit.layers import as_matrix
from compresskit.model import Method, collect, compress, decoded, layers, size_table
from compresskit.recipes.train import CLASSIFIERS, Lessons, classifier
from compresskit.sparse import Pattern, Sparse, mask_code, pooled_masks
from compresskit.stats import InputStats
from compresskit.train import (
    Cubic,
    Shuffled,
    converted,
    expected_l0,
    fit,
    gated,
    gradual,
    masked,
    proximal_l1,
    support,
    unmasked,
)

NETWORKS = ("mnist1d_mlp", "mnist1d_cnn", "digits_cnn")
SCORES = ("random", "magnitude", "Wanda")
#: What is compared with what; "global" pools all layers.
AMONG = ("row", "layer", "global", "2:4", "1:4")
UNITS = ("random units", "units by norm")
TUNING = 20  # epochs, at a third of the learning rate of the training
GRID = QuantSpec(4)  # of the values that are kept, one scale and zero point per row


@cache
def trained(network: str, seed: int) -> tuple[nn.Module, data.Dataset, dict[str, InputStats]]:
    """A classifier trained from this seed, its samples, and its moments on the training inputs.

    Parameters
    ----------
    network : str
        a name in `NETWORKS`
    seed : int
        of the initial weights and the batches
    """
    lessons = _lessons(network, seed)
    samples = getattr(data, lessons.samples)()
    model = classifier(lessons, samples)
    return model, samples, collect(model, samples.train_x.split(500))


def one_shot(*, network: str, seed: int, score: str, among: str, sparsity: float) -> dict:
    """Remove weights from a trained classifier, all at once, and leave the others as they are.

    Parameters
    ----------
    network : str
        a name in `NETWORKS`
    seed : int
        of the network; random scores are drawn from another one
    score : str
        a name in `SCORES`
    among : str
        a name in `AMONG`
    sparsity : float
        share of the weights of all layers that goes; the patterns n:m have their own

    Returns
    -------
    dict: "accuracy" on the test set, "kept" of all "weights" of the matrices, "bytes" of the whole
    model with the kept values in "float32", "float16" and "int4", and "accuracy_int4", all masks
    in their shortest code
    """
    model, samples, _ = trained(network, seed)
    return record(model, masks(network, seed, score, among, sparsity), samples)


def tuned(*, network: str, seed: int, score: str, among: str, sparsity: float) -> dict:
    """As `one_shot`, with the kept weights trained for `TUNING` epochs after it.

    Parameters
    ----------
    network, seed, score, among, sparsity :
        as for `one_shot`; the score "gradual" removes the weights of smallest magnitude little by
        little in the first two thirds of these epochs, and "none" removes none

    Returns
    -------
    dict as of `one_shot`, and the "epochs"
    """
    model, samples, _ = trained(network, seed)
    if score == "none":
        small = masked(model, {n: torch.ones_like(m) for n, m in support(model).items()})
        continued(small, network, seed)
        return record(unmasked(small), None, samples) | {"epochs": TUNING}
    if score == "gradual":
        small, batches = model, _batches(network, seed)
        every = max(1, len(batches) // 30)
        schedule = Cubic(sparsity, first=1, count=len(batches) * 2 // 3 // every, every=every)
        small, _ = gradual(
            model,
            _loss(network),
            batches,
            schedule=schedule,
            pooled=among == "global",
            fit=partial(fit, **_options(network, seed)),
        )
    else:
        small = masked(model, masks(network, seed, score, among, sparsity))
        continued(small, network, seed)
    small = unmasked(small)
    return record(small, support(small), samples) | {"epochs": TUNING}


def shrunk(*, network: str, seed: int, score: str, sparsity: float, epochs: int = 0) -> dict:
    """Remove whole neurons or channels: a smaller dense network of as many weights.

    Parameters
    ----------
    network : str
        a name in `NETWORKS`
    seed : int
        as for `one_shot`
    score : str
        a name in `UNITS`; the norm is the sum of absolute weights of the rows that make a unit
    sparsity : float
        of every layer the same share of units goes, the least share with which at most 1 -
        sparsity of the weights is left
    epochs : int
        of training after it
    """
    model, samples, _ = trained(network, seed)
    scores = surgery.filter_norms(model)
    if score == "random units":
        generator = torch.Generator().manual_seed(1000 + seed)
        scores = {n: torch.rand(len(s), generator=generator) for n, s in scores.items()}
    total = _weights(model)
    for percent in range(101):
        small = surgery.remove(model, surgery.weakest(scores, percent / 100))
        if _weights(small) <= (1 - sparsity) * total:
            break
    if epochs:
        continued(small, network, seed, epochs)
    return record(small, None, samples) | {"weights": total}


def penalized(*, network: str, seed: int, way: str, strength: float) -> dict:
    """Draw weights to 0 by a penalty for half of the tuning, and train what is left for the rest.

    Parameters
    ----------
    network : str
        a name in `NETWORKS`
    seed : int
        as for `one_shot`
    way : str
        "L1", a soft threshold after every update, or "L0", a random gate on every weight
    strength : float
        of L1 as in `train.proximal_l1`; of L0 in units of the loss, if all gates were open

    Returns
    -------
    as `tuned`, the "sparsity" that came out, and of as many weights kept by "magnitude" over all
    layers at once, and by the "gradual" schedule, the accuracy after as many epochs
    """
    model, samples, _ = trained(network, seed)
    batches, options = _batches(network, seed, TUNING // 2), _options(network, seed)
    model = copy.deepcopy(model)
    if way == "L1":
        proximal_l1(model, _loss(network), batches, strength=strength, fit=partial(fit, **options))
    else:
        model = _through_gates(model, network, strength, batches, options)
    small = masked(model, support(model))
    continued(small, network, seed, TUNING // 2)
    small = unmasked(small)
    found = record(small, support(small), samples)
    sparsity = 1 - found["kept"] / found["weights"]
    rivals = {
        score: tuned(network=network, seed=seed, score=score, among="global", sparsity=sparsity)
        for score in ("magnitude", "gradual")
    }
    return found | {"sparsity": sparsity} | {name: r["accuracy"] for name, r in rivals.items()}


def masks(network: str, seed: int, score: str, among: str, sparsity: float) -> dict[str, Tensor]:
    """{layer name: mask} by a criterion, of a network of `trained`.

    Parameters
    ----------
    network, seed, score, among, sparsity : as for `one_shot`
    """
    model, _, stats = trained(network, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    scores = {}
    for name, layer in layers(model).items():
        weight = as_matrix(layer)
        scores[name] = {
            "random": lambda w=weight: torch.rand(w.shape, generator=generator),
            "magnitude": weight.abs,
            "Wanda": lambda w=weight, n=name: w.abs() * stats[n].rms,
        }[score]()
    if among == "global":
        return pooled_masks(scores, sparsity)
    pattern = Pattern(sparsity, among=among) if among in ("row", "layer") else _n_of_m(among)
    return {name: pattern.mask(score) for name, score in scores.items()}


def continued(model: nn.Module, network: str, seed: int, epochs: int = TUNING) -> None:
    """Train `model` in place, as the network was, at a third of the learning rate.

    Parameters
    ----------
    model : nn.Module
    network : str
        a name in `NETWORKS`
    seed : int
        of the order of the examples
    epochs : int
    """
    fit(model, _loss(network), _batches(network, seed, epochs), **_options(network, seed))


def record(model: nn.Module, kept: Mapping[str, Tensor] | None, samples: data.Dataset) -> dict:
    """Accuracy, counts and bytes of a model with these weights kept, as `one_shot` says.

    Parameters
    ----------
    model : nn.Module
    kept : mapping
        layer name -> mask; None: a dense model
    samples : data.Dataset
        on whose test part it is scored
    """
    stored = {kind: compress(model, _plan(model, kept, kind)) for kind in _KINDS}
    accuracy = {
        kind: measure.accuracy(decoded(stored[kind]), samples.test_x, samples.test_y)
        for kind in ("float32", "int4")
    }
    total = _weights(model)
    return {
        "accuracy": accuracy["float32"],
        "accuracy_int4": accuracy["int4"],
        "kept": total if kept is None else sum(int(mask.sum()) for mask in kept.values()),
        "weights": total,
        "bytes": {kind: size_table(small).nbytes for kind, small in stored.items()},
    }


def _through_gates(
    model: nn.Module, network: str, strength: float, batches: Shuffled, options: dict
) -> nn.Module:
    """Weights times the test-time gates of hard-concrete training; gates move faster than weights.

    Of 0.1 per update a gate needs some fifty to close; weight decay would draw it half open.
    """
    gates = gated(model)
    plain, total = _loss(network), _weights(model)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return plain(model, batch) + strength * expected_l0(model) / total

    named = dict(gates.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("log_alpha")], "lr": 0.1}
        | {"weight_decay": 0.0},
        {"params": [p for n, p in named.items() if not n.endswith("log_alpha")]},
    ]
    fit(gates, loss, batches, parameters=groups, **options)
    return decoded(converted(gates)).requires_grad_(True)


_KINDS = {"float32": torch.float32, "float16": torch.float16, "int4": None}


def _plan(model: nn.Module, kept: Mapping[str, Tensor] | None, kind: str) -> dict[str, Method]:
    dtype, names = _KINDS[kind], layers(model)
    if kept is None:
        if kind == "float32":
            return {}
        dense = partial(methods.round_to_nearest, spec=GRID) if dtype is None else _halved
        return dict.fromkeys(names, dense)
    if dtype is None:
        return {name: partial(_rounded, mask=kept[name]) for name in names}
    return {name: partial(methods.masked, mask=kept[name], dtype=dtype) for name in names}


def _halved(weight: Tensor, stats: InputStats | None = None):
    """Every weight in float16."""
    return Array(weight.to(torch.float16))


def _rounded(weight: Tensor, stats: InputStats | None = None, *, mask: Tensor) -> Quantized:
    """The kept weights rounded to 4 bits, the others 0 and not stored."""
    dense = methods.round_to_nearest(weight * mask, spec=GRID)
    levels = Bits(dense.levels.tensor[mask], GRID.bits)
    return replace(dense, levels=Sparse(levels, mask_code(mask)))


def _n_of_m(name: str) -> Pattern:
    kept, group = name.split(":")
    return Pattern.n_of_m(int(kept), int(group))


def _weights(model: nn.Module) -> int:
    return sum(as_matrix(layer).numel() for layer in layers(model).values())


def _lessons(network: str, seed: int) -> Lessons:
    return replace(CLASSIFIERS[network], seed=seed)


def _batches(network: str, seed: int, epochs: int = TUNING) -> Shuffled:
    lessons, (_, samples, _) = CLASSIFIERS[network], trained(network, seed)
    steps = epochs * (len(samples.train_x) // lessons.batch)
    return Shuffled(
        samples.train_x, samples.train_y, size=lessons.batch, steps=steps, seed=2000 + seed
    )


def _loss(network: str):
    smoothing = CLASSIFIERS[network].smoothing

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, label_smoothing=smoothing)

    return loss


def _options(network: str, seed: int) -> dict:
    lessons = CLASSIFIERS[network]
    return {"rate": lessons.rate / 3, "decay": lessons.decay, "clip": None, "seed": seed}
