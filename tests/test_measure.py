"""Measurements against their definitions, on cases with known answers."""

import itertools
import math

import pytest
import torch
from scipy import stats as distributions
from torch import nn

from compresskit import measure, theory
from compresskit.affine import QuantSpec
from compresskit.code import Array, Bits
from compresskit.methods import round_to_nearest
from compresskit.stats import InputStats


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator)
    x = torch.randn(5000, 32, generator=generator) @ mix
    return torch.randn(256, 32, generator=generator), InputStats.of(x), x


def test_relative_error_is_that_of_the_outputs(layer):
    weight, stats, x = layer
    approx = round_to_nearest(weight, spec=QuantSpec(3))
    y, z = x @ weight.T, x @ approx.decode().T
    expected = 10 * torch.log10((y - z).square().sum() / y.square().sum()).item()
    assert measure.relative_error_db(weight, approx, stats) == pytest.approx(expected, abs=1e-3)


def test_a_tenth_of_the_weight_is_twenty_decibels_down(layer):
    weight, stats, _ = layer
    assert measure.relative_error_db(weight, 1.1 * weight, stats) == pytest.approx(-20, abs=1e-4)
    assert measure.relative_error_db(weight, 1.1 * weight) == pytest.approx(-20, abs=1e-4)
    assert measure.relative_error_db(weight, weight) == -math.inf
    assert measure.relative_error_db(weight, weight, stats) == -math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_not_reported_as_small(layer, value):
    weight, stats, _ = layer
    broken = weight.clone()
    broken[0, 0] = value
    for moments in (None, stats):
        with pytest.raises(ValueError, match="not finite"):
            measure.relative_error_db(weight, broken, moments)


def test_an_error_that_the_inputs_hardly_meet_is_small_and_has_a_gap_all_the_same():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    missing = torch.linalg.svd(x).Vh[-4:]
    assert measure.relative_error_db(weight, weight + missing, InputStats.of(x)) < -50
    measure.gap(weight, Array(weight + missing), InputStats.of(x))  # no refusal of a -1e-8


def test_bits_per_weight_count_every_leaf():
    code = round_to_nearest(torch.randn(8, 16), spec=QuantSpec(3, group_size=4))
    assert measure.bits_per_weight(code) == 3 + 16 / 4 + 3 / 4


def test_the_gap_of_white_inputs_is_rate_less_half_log_of_the_snr(layer):
    weight, _, _ = layer
    code = round_to_nearest(weight, spec=QuantSpec(4))
    snr = -measure.relative_error_db(weight, code)
    limit = snr / (20 * math.log10(2))
    found = measure.gap(weight, code, InputStats.isotropic(32))
    assert found == pytest.approx(measure.bits_per_weight(code) - limit, abs=1e-5)


def test_no_code_of_a_gaussian_matrix_beats_the_limit(layer):
    weight, stats, _ = layer
    for bits, size in itertools.product((1, 2, 3, 4, 6, 8), (None, 8)):
        code = round_to_nearest(weight, spec=QuantSpec(bits, group_size=size))
        assert measure.gap(weight, code, stats) > 0.254  # a scalar quantizer: at least that


def test_the_gap_does_not_depend_on_units(layer):
    weight, stats, x = layer
    code = round_to_nearest(weight, spec=QuantSpec(4), scale_dtype=torch.float32)
    scaled = round_to_nearest(8 * weight, spec=QuantSpec(4), scale_dtype=torch.float32)
    a = measure.gap(weight, code, stats)
    assert measure.gap(8 * weight, scaled, InputStats.of(4 * x)) == pytest.approx(a, abs=1e-5)


def test_an_exact_code_has_an_infinite_limit(layer):
    weight, stats, _ = layer
    assert measure.gap(weight, Array(weight), stats) == -math.inf


def test_damping_raises_the_error_and_the_limit_alike(layer):
    weight, stats, _ = layer
    code = round_to_nearest(weight, spec=QuantSpec(4))
    assert measure.gap(weight, code, stats, damp=100.0) == pytest.approx(
        measure.gap(weight, code, InputStats.isotropic(32)), abs=0.01
    )  # damped that much, the moments are isotropic


def test_fidelity_of_rotated_embeddings_and_of_shuffled_ones():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 8, generator=generator)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert measure.fidelity(a, 3 * a) == pytest.approx((1, 1))
    assert measure.fidelity(a, a @ rotation).top1 == 1  # neighbors are kept, directions are not
    assert abs(measure.fidelity(a, a @ rotation).cosine) < 0.9
    assert measure.fidelity(a, a.flip(0)).top1 < 0.2


class Bigram(nn.Module):
    """Logits that depend on the last token only, and a record of what was asked."""

    def __init__(self, table):
        super().__init__()
        self.table, self.lengths = table, []

    def forward(self, tokens):
        self.lengths.append(tokens.shape[1])
        return self.table[tokens.long()]


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 7), (8, 1), (100, 100)])
@pytest.mark.parametrize("length", [2, 7, 8, 9, 33])
def test_each_token_is_predicted_once_from_its_window(window, stride, length):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 5, generator=generator)
    tokens = torch.randint(0, 5, (length,), generator=generator)
    losses = measure.token_losses(Bigram(table), tokens, window=window, stride=stride)
    single = -table.log_softmax(1)[tokens[:-1], tokens[1:]]
    if stride == window:  # the first token of each window has nothing before it
        single = single[[i for i in range(length - 1) if (i + 1) % window]]
    torch.testing.assert_close(losses, single)


class Sums(nn.Module):
    """Logits that depend on every token of the window so far."""

    def forward(self, tokens):
        total = tokens.cumsum(1).float()
        return torch.stack([torch.sin(total * k) for k in range(1, 6)], -1)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 7), (6, 1)])
def test_a_token_is_predicted_from_all_of_its_window(window, stride):
    tokens = torch.randint(0, 5, (23,), generator=torch.Generator().manual_seed(0))
    expected, done = [], 1
    for start in range(0, 23, stride):
        end = min(start + window, 23)
        for position in range(max(done, start + 1), end):
            logits = Sums()(tokens[None, start:position])[0, -1]
            expected.append(-logits.log_softmax(0)[tokens[position]])
        done = max(done, end)
    found = measure.token_losses(Sums(), tokens, window=window, stride=stride)
    torch.testing.assert_close(found, torch.stack(expected))


def test_measuring_neither_trains_nor_drops_anything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[1].eval()
    x, before = torch.randn(50, 4), model[0].running_mean.clone()
    first = measure.accuracy(model, x, x.argmax(1))
    assert measure.accuracy(model, x, x.argmax(1)) == first
    assert torch.equal(model[0].running_mean, before)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model = Bigram(torch.zeros(7, 7))
    tokens = torch.arange(70) % 7
    assert measure.perplexity(model, tokens, window=10) == pytest.approx(7)
    assert measure.bits_per_byte(model, tokens) == pytest.approx(math.log2(7))
    assert measure.bits_per_byte(model, tokens, nbytes=2 * 69) == pytest.approx(math.log2(7) / 2)


def test_bits_per_byte_of_the_true_model_is_the_entropy_rate():
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.5, 0.25, 0.25])
    tokens = torch.multinomial(p, 60_000, replacement=True, generator=generator)
    found = measure.bits_per_byte(Bigram(p.log().expand(3, 3)), tokens)
    assert found == pytest.approx(theory.entropy(p), abs=0.01)  # 3 standard errors: 0.006


def test_accuracy_counts():
    x = torch.eye(4)
    assert measure.accuracy(nn.Identity(), x, torch.tensor([0, 1, 2, 0]), batch=3) == 0.75


def test_latency_reports_median_and_quartiles_of_the_counted_rounds():
    ticks = iter([50, 60, 0, 99, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5])
    times = measure.latency({"a": list}, warmup=2, repeats=6, clock=lambda: next(ticks))
    assert times == {"a": (3.5, 2.25, 4.75)}
    calls = []
    measure.latency(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=1, repeats=2
    )
    assert calls == ["a", "b"] * 3  # in turn


REFUSALS = {
    "unequal shapes": (
        lambda: measure.relative_error_db(torch.ones(2, 2), torch.ones(2, 3)), "must be equal"),
    "no power": (
        lambda: measure.relative_error_db(torch.zeros(2, 2), torch.ones(2, 2)), "no power"),
    "one item": (lambda: measure.fidelity(torch.ones(1, 2), torch.ones(1, 2)), "two items"),
    "no labels": (
        lambda: measure.accuracy(nn.Identity(), torch.ones(2, 2), torch.ones(3)), "3 labels"),
    "one token": (lambda: measure.perplexity(nn.Identity(), torch.ones(1)), "two tokens"),
    "a long stride": (
        lambda: measure.token_losses(nn.Identity(), torch.ones(9), window=4, stride=5), "stride=5"),
    "nothing to time": (lambda: measure.latency({}), "at least one function"),
    "no round": (lambda: measure.latency({"a": list}, repeats=0), "repeats=0"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), list(REFUSALS.values()), ids=REFUSALS.keys())
def test_nonsense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bits_of_a_leaf_alone():
    assert measure.bits_per_weight(Bits.of(torch.zeros(8, 2), 3)) == 3


def test_the_interval_covers_the_mean_as_often_as_it_says():
    """2,000 draws of 5 normal values; a tenth of them may miss, with standard deviation 0.7 %."""
    generator = torch.Generator().manual_seed(0)
    draws = 3 + 2 * torch.randn(2_000, 5, generator=generator, dtype=torch.float64)
    found = [measure.interval(row, confidence=0.9) for row in draws.tolist()]
    assert sum(i.low <= 3 <= i.high for i in found) / 2_000 == pytest.approx(0.9, abs=0.02)
    # the normal quantile in place of Student's covers less than 84 % of the time
    short = 1.6449 / 2.1318  # quantiles of the normal and of Student's law with 4 degrees
    kept = sum(abs(i.mean - 3) <= short * (i.high - i.mean) for i in found)
    assert kept / 2_000 < 0.86


def test_the_interval_is_that_of_scipy():
    values = [0.3, 0.7, 0.45, 0.52]
    reference = distributions.ttest_1samp(values, 0).confidence_interval(0.99)
    assert measure.interval(values, confidence=0.99)[1:] == pytest.approx(tuple(reference))


def test_a_comparison_is_paired():
    """A difference that is small beside the seeds' spread, and the same for all of them."""
    seeds = [0.2, 0.5, 0.9]
    shifted = [s + d for s, d in zip(seeds, (0.009, 0.010, 0.011), strict=True)]
    found = measure.compare(shifted, seeds)
    assert found.verdict == "better"
    assert found.difference == pytest.approx(0.01)
    assert measure.compare(shifted, seeds, higher_is_better=False).verdict == "worse"
    assert measure.compare(seeds, shifted).verdict == "worse"
    assert measure.compare(shifted, seeds[::-1]).verdict == "undecided"


def test_equal_values_are_undecided():
    assert measure.compare([0.5, 0.6], [0.5, 0.6]) == (0, 0, 0, "undecided")


@pytest.mark.parametrize(
    ("values", "confidence"), [([1.0], 0.9), ([1.0, math.nan], 0.9), ([1.0, 2.0], 1.0)]
)
def test_an_interval_needs_two_finite_values(values, confidence):
    with pytest.raises(ValueError, match="needs two finite values or more, and a confidence"):
        measure.interval(values, confidence=confidence)


def test_values_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="3 and 2 values do not pair"):
        measure.compare([1, 2, 3], [1, 2])
