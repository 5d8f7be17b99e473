"""What compression did: error, size, distance from the limit, quality, time.

(Over 200 lines, more than half of them definitions: every figure of the book is defined here.)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy import stats as distributions
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.code import Code
from compresskit.model import evaluating
from compresskit.stats import InputStats
from compresskit.theory import linear_layer_rate


def relative_error_db(
    weight: Tensor, approx: Tensor | Code, stats: InputStats | None = None
) -> float:
    """10 log10(E||(W - A) x||^2 / E||W x||^2): -20 dB is an error of 1 % of the output's power.

    Parameters
    ----------
    weight : (m, n) tensor
    approx : (m, n) tensor or Code
    stats : InputStats
        moments of x; None stands for isotropic inputs, that is ||W - A||_F^2 / ||W||_F^2

    Returns
    -------
    float, in dB; -inf when the output does not change
    """
    weight, delta = _delta(weight, approx)
    if stats is None:
        error, power = (t.double().square().sum().item() for t in (delta, weight))
    else:
        error, power = (stats.distortion(t).item() for t in (delta, weight))
    if not power > 0:
        raise ValueError("the output has no power, so no error is relative to it")
    if not math.isfinite(error / power):
        raise ValueError("the weight or its approximation holds values that are not finite")
    return 10 * math.log10(error / power) if error > 0 else -math.inf


def bits_per_weight(code: Code) -> float:
    """8 * bytes / weights: levels, scales, zero points, tables and padding, all of them."""
    return 8 * code.nbytes / math.prod(code.shape)


def gap(weight: Tensor, code: Code, stats: InputStats, *, damp: float = 0.0) -> float:
    """Bits per weight stored, less the fewest that its output error could have cost.

    The fewest is the rate-distortion function of a Gaussian matrix of the same mean square under
    the same input moments (`theory.linear_layer_rate`). Among sources of that variance the
    Gaussian is the hardest, so a real layer may in principle be coded below it.

    Parameters
    ----------
    weight : (m, n) tensor
    code : Code
    stats : InputStats
    damp : float
        measure the error, and the limit, under `stats.damped(damp)`; 0 is the true output error

    Returns
    -------
    float, in bits per weight; -inf when the output does not change, which no finite rate buys
    """
    weight, delta = _delta(weight, code)
    if damp:
        stats = replace(stats, second=stats.damped(damp))
    distortion = stats.distortion(delta).item() / len(weight)
    variance = weight.double().square().mean().item()
    if distortion == 0:
        return -math.inf
    return bits_per_weight(code) - linear_layer_rate(variance, stats.spectrum, distortion)


class Fidelity(NamedTuple):
    """How well embeddings were kept: mean cosine with the originals, and the share of items whose
    nearest neighbor is still the same item."""

    cosine: float
    top1: float


def fidelity(original: Tensor, approx: Tensor) -> Fidelity:
    """Agreement of two sets of embeddings, row by row.

    Parameters
    ----------
    original : (items, n) tensor
    approx : (items, n) tensor
    """
    if original.shape != approx.shape or original.ndim != 2 or len(original) < 2:
        raise ValueError(
            f"embeddings of shapes {tuple(original.shape)} and {tuple(approx.shape)};"
            " two equal shapes (items, n) with two items or more are needed"
        )
    a, b = (F.normalize(t.float(), dim=1) for t in (original, approx))
    neighbors = [(t @ t.T).fill_diagonal_(-2).argmax(1) for t in (a, b)]
    same = (neighbors[0] == neighbors[1]).float().mean().item()
    return Fidelity((a * b).sum(1).mean().item(), same)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, batch: int = 1000) -> float:
    """Share of the rows of `x` whose largest logit is that of their label in `y`."""
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{len(x)} inputs and {len(y)} labels; as many of each, and one or more")
    pairs = zip(x.split(batch), y.split(batch), strict=True)
    with evaluating(model):
        return sum((model(a).argmax(1) == b).sum().item() for a, b in pairs) / len(x)


@torch.no_grad()
def token_losses(model: nn.Module, tokens: Tensor, *, window: int, stride: int) -> Tensor:
    """-ln p(token | tokens before it in its window), in nats, each token at most once.

    Parameters
    ----------
    model : nn.Module
        (batch, length) token ids -> (batch, length, vocabulary) logits
    tokens : (length,) integer tensor
    window : int
        tokens that the model sees at a time
    stride : int
        1 to `window`: tokens by which the window moves. With stride = window no context is carried
        over and the first token of each window is not predicted; with a smaller one every token
        but the text's first is, after the first window from window - stride others or more

    Returns
    -------
    (predicted,) float32 tensor
    """
    if tokens.ndim != 1 or len(tokens) < 2 or not 1 <= stride <= window or window < 2:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)}, window={window}, stride={stride}; two tokens"
            " or more in one row, and 1 <= stride <= window, for instance 512 and 256"
        )
    losses, done = [], 1
    with evaluating(model):
        for start in range(0, len(tokens), stride):
            part = tokens[start : start + window]
            first = max(done - start, 1)
            if len(part) > first:
                logits = model(part[None])[0, first - 1 : -1].float()
                losses.append(F.cross_entropy(logits, part[first:].long(), reduction="none"))
            done = start + len(part)
            if done == len(tokens):
                break
    return torch.cat(losses)


def perplexity(model: nn.Module, tokens: Tensor, *, window: int = 512) -> float:
    """exp(mean loss in nats) over windows that share nothing: the usual figure, per token."""
    return token_losses(model, tokens, window=window, stride=window).double().mean().exp().item()


def bits_per_byte(
    model: nn.Module,
    tokens: Tensor,
    *,
    nbytes: int | None = None,
    window: int = 512,
    stride: int = 256,
) -> float:
    """Bits that an ideal coder driven by the model needs for a text, per byte of the text.

    Comparable between tokenizers and with file compressors.

    Parameters
    ----------
    model : nn.Module
        as for `token_losses`
    tokens : (length,) integer tensor
        the first is not predicted: put a token before the text to have all of it counted
    nbytes : int
        length of the predicted text in bytes; None: one byte per predicted token
    window : int
        as for `token_losses`
    stride : int
        as for `token_losses`
    """
    losses = token_losses(model, tokens, window=window, stride=stride).double()
    return losses.sum().item() / math.log(2) / (nbytes or len(losses))


class Interval(NamedTuple):
    """A mean and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's interval for the mean: mean -+ t_{n-1} s / sqrt(n).

    Of repetitions with this confidence, so many cover the true mean if the values are independent
    and about normal. The seeds of one experiment are such values; the test items are not varied,
    so the interval is about this test set.

    Parameters
    ----------
    values : sequence of float
        two or more
    confidence : float
        between 0 and 1

    Examples
    --------
    >>> [round(x, 2) for x in interval([1.0, 2.0, 3.0])]
    [2.0, -0.48, 4.48]
    """
    values = [float(value) for value in values]
    if len(values) < 2 or not all(map(math.isfinite, values)) or not 0 < confidence < 1:
        raise ValueError(
            f"{len(values)} values, confidence={confidence}; an interval needs two finite values or"
            " more, and a confidence between 0 and 1, such as 0.95"
        )
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    quantile = distributions.t.ppf((1 + confidence) / 2, len(values) - 1)
    half = float(quantile) * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


class Comparison(NamedTuple):
    """A mean difference, its interval, and "better", "worse" or "undecided"."""

    difference: float
    low: float
    high: float
    verdict: str


def compare(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    higher_is_better: bool = True,
) -> Comparison:
    """Is `first` better than `second`? The interval of the mean of first - second decides.

    The values are paired: the i-th of both come from the same seed, the same data, the same items.
    If the interval contains 0 the verdict is "undecided", which does not mean "equal".

    Parameters
    ----------
    first : sequence of float
    second : sequence of float
        as many
    confidence : float
        as for `interval`
    higher_is_better : bool
        False for losses and errors

    Examples
    --------
    >>> compare([0.8, 0.9, 0.85], [0.7, 0.75, 0.8]).verdict
    'undecided'
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values do not pair; give as many of each")
    pairs = zip(first, second, strict=True)
    mean, low, high = interval([a - b for a, b in pairs], confidence=confidence)
    verdict = "undecided"
    if low > 0 or high < 0:
        verdict = "better" if (low > 0) == higher_is_better else "worse"
    return Comparison(mean, low, high, verdict)


class Timing(NamedTuple):
    """Seconds per call: the median, and the quartiles around it."""

    median: float
    low: float
    high: float


def latency(
    functions: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    repeats: int = 20,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions side by side: in turn, round after round, so that a busy spell hits all.

    Parameters
    ----------
    functions : mapping
        name -> function without arguments. One that works on a GPU must end with a
        synchronization, or only its launch is timed
    warmup : int
        rounds that are not counted
    repeats : int
        rounds that are
    clock : callable
        seconds

    Returns
    -------
    dict, name -> Timing
    """
    if not functions or warmup < 0 or repeats < 1:
        raise ValueError(
            f"{len(functions)} functions, warmup={warmup}, repeats={repeats};"
            " at least one function and one counted round are needed"
        )
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(warmup + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            if round_ >= warmup:
                times[name].append(clock() - start)
    return {name: _spread(seconds) for name, seconds in times.items()}


def _spread(seconds: list[float]) -> Timing:
    if len(seconds) == 1:
        return Timing(*seconds * 3)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high)


def _delta(weight: Tensor, approx: Tensor | Code) -> tuple[Tensor, Tensor]:
    if isinstance(approx, Code):
        approx = approx.decode()
    if weight.shape != approx.shape:
        raise ValueError(f"shapes {tuple(weight.shape)} and {tuple(approx.shape)} must be equal")
    weight = weight.detach().float()
    return weight, weight - approx.detach().float().to(weight.device)
