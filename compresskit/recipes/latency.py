"""Experiment of chapter 12: how much faster zeros make a product, and how much a smaller matrix.

Everything is timed against the dense layer or model of the same round, in processor time of one
thread: where a machine does other things as well, the clock on the wall would count those too,
and long calls would suffer more than short ones. Weights are random where they are one layer's,
and so is which of them are zero; times depend on the pattern and not on the values. A copy of the
dense layer or model is timed as well: what is as near to 1 as its ratio is not told from it.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import measure, models, surgery
from compresskit.layers import as_matrix
from compresskit.model import layers, replaced
from compresskit.sparse import Pattern, Sparse
from compresskit.surgery import remove, unit_scores, units, weakest

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
BATCHES = (1, 32)
SHAPES = ((384, 1536), (576, 1536), (2048, 2048))  # inputs, outputs
MODELS = ("digits_cnn", "minilm", "pydoc_lm")
TOKENS = 32  # in each text that a transformer gets


def against_first(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    repeats: int = 10,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, dict[str, float]]:
    """The time of each function, and its ratio to that of the first, whose spread is over rounds.

    Parameters
    ----------
    functions : name -> function without arguments
    rounds : in each of which the median of every function is taken, and of these the ratio
    repeats : calls of each function, in turn, in a round
    clock : seconds; by default of processor time, over all threads

    Returns
    -------
    name -> {"ms": median over the rounds, "ratio": likewise, "low", "high": the least and the
    largest ratio of a round}
    """
    measure.latency(functions, warmup=1, repeats=1, clock=clock)
    seen = [
        measure.latency(functions, warmup=0, repeats=repeats, clock=clock) for _ in range(rounds)
    ]
    first = next(iter(functions))
    result = {}
    for name in functions:
        ratios = [times[name].median / times[first].median for times in seen]
        result[name] = {
            "ms": 1e3 * statistics.median(times[name].median for times in seen),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return result


def compressed_rows(weight: Tensor) -> Tensor:
    """The same matrix as a `torch.sparse_csr` tensor, with places in 64 bits."""
    with warnings.catch_warnings():  # that this format is in beta state
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        return weight.to_sparse_csr()


class SparseLinear(nn.Module):
    """x -> W x + bias with W in compressed sparse rows, in the fastest way that PyTorch offers.

    W is multiplied from the left, and its places are 32-bit integers: `F.linear` with 64-bit
    ones, what one gets without asking, is the slower the more inputs there are at once.

    Parameters
    ----------
    weight : (m, n) tensor
        mostly zeros
    bias : (m,) tensor, or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.matrix = Sparse.of(weight, weight != 0).csr()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if len(tokens) == 1:
            product = (self.matrix @ tokens[0])[None]
        else:
            product = (self.matrix @ tokens.T).T
        product = product if self.bias is None else product + self.bias
        return product.reshape(*x.shape[:-1], -1)


def layer_functions(
    inputs: int, outputs: int, sparsity: float, batch: int
) -> dict[str, Callable[[], Tensor]]:
    """One linear layer without bias in every form, as functions without arguments.

    Parameters
    ----------
    inputs, outputs : of the dense layer
    sparsity : share of zeros, or of the outputs that the smaller layer lacks
    batch : number of inputs at once
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(batch, inputs, generator=generator)
    masked = weight * Pattern(sparsity, among="layer").mask(weight.abs())
    small = weight[: outputs - round(sparsity * outputs)].clone()
    found = {
        "dense": partial(F.linear, x, weight),
        "dense again": partial(F.linear, x, weight.clone()),
        "zeros": partial(F.linear, x, masked),
        "CSR": partial(SparseLinear(masked, None), x),
        "CSR, F.linear": partial(F.linear, x, compressed_rows(masked)),
        "smaller": partial(F.linear, x, small),
    }
    if sparsity == 0.5:
        pairs = weight * Pattern.n_of_m(2, 4).mask(weight.abs())
        found["2:4 zeros"] = partial(F.linear, x, pairs)
    return found


@torch.no_grad()
def layer(inputs: int, outputs: int, sparsity: float, batch: int) -> dict:
    """Times of one layer's forms; "zeros" and "2:4 zeros" are dense matrices that hold them.

    (PyTorch's kernels for 2:4 are for GPUs alone.)

    Parameters
    ----------
    inputs, outputs, sparsity, batch : as for `layer_functions`
    """
    return {"times": against_first(layer_functions(inputs, outputs, sparsity, batch))}


@cache
def original(name: str) -> nn.Module:
    """A model of the book by its name in `compresskit.models`."""
    return getattr(models, name)()


@torch.no_grad()
def forms(name: str, sparsity: float) -> dict[str, nn.Module]:
    """A model dense, with zeros, with sparse layers (where all are linear), and in smaller ones.

    Zeros are the smallest weights of each row, units that are removed those of the least energy;
    of heads, as of neurons, `sparsity` is the share that goes, but one stays.

    Parameters
    ----------
    name : one of `MODELS`
    sparsity : share of the weights, and of the units or blocks, that goes
    """
    model = original(name)
    masked = copy.deepcopy(model)
    for linear in layers(masked).values():
        kept = Pattern(sparsity).mask(as_matrix(linear).abs())
        linear.weight.mul_(kept.view(linear.weight.shape))
    found = {"dense": model, "dense again": copy.deepcopy(model), "zeros": masked}
    if name != "digits_cnn":
        found["CSR"] = copy.deepcopy(masked)
        for path, linear in layers(masked).items():
            replaced(found["CSR"], path, SparseLinear(linear.weight.detach(), linear.bias))
    kinds = units(model)
    scores = unit_scores(model)
    for label, wanted in {"smaller": None, "neurons": "neuron", "heads": "head"}.items():
        chosen = {n: s for n, s in scores.items() if wanted in (None, kinds[n].kind)}
        if wanted is None or (chosen and len(chosen) < len(scores)):
            found[label] = remove(model, weakest(chosen, sparsity))
    if name == "pydoc_lm" and sparsity <= 0.8:
        blocks = len(model.blocks)
        kept = range(max(1, blocks - round(sparsity * blocks)))
        found["fewer blocks"] = surgery.keep_layers(model, "blocks", kept)
    return found


@torch.no_grad()
def whole(model: str, sparsity: float, batch: int) -> dict:
    """Times of a model's forms, and how many weights the layers of each have.

    Parameters
    ----------
    model : a name for `forms`
    sparsity : as for `forms`
    batch : images, or texts of `TOKENS` tokens
    """
    generator = torch.Generator().manual_seed(0)
    if model == "digits_cnn":
        x = torch.rand(batch, 64, generator=generator)
    else:
        x = torch.randint(256, (batch, TOKENS), generator=generator)
    found = forms(model, sparsity)
    functions = {name: partial(form, x) for name, form in found.items()}
    repeats = 20 if model == "digits_cnn" else 3  # a call of the small one is soon disturbed
    times = against_first(functions, rounds=7, repeats=repeats)
    weights = {
        name: sum(linear.weight.numel() for linear in layers(form).values())
        for name, form in found.items()
        if name != "CSR"
    }
    return {"times": times, "weights": weights}


def tasks() -> Iterator[tuple[dict, Callable[[], dict]]]:
    """Every layer and every model, at every sparsity and batch size."""
    for (inputs, outputs), s, batch in itertools.product(SHAPES, SPARSITIES, BATCHES):
        settings = {"inputs": inputs, "outputs": outputs, "sparsity": s, "batch": batch}
        yield settings, partial(layer, **settings)
    for model, s, batch in itertools.product(MODELS, SPARSITIES, BATCHES):
        settings = {"model": model, "sparsity": s, "batch": batch}
        yield settings, partial(whole, **settings)
