"""compresskit.theory: identities, outside references, extreme numbers, refusals.

The theorems themselves, with their false variants, are in test_ch02_theorems.py.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit import theory

TINY = 5e-324  # the smallest positive double
steady = settings(max_examples=150, deadline=None, derandomize=True)


def normalized(weights):
    return weights / weights.sum(-1, keepdims=True)


def distributions(shape):
    """Rows that sum to 1, zeros and very small entries included."""
    entry = st.one_of(st.just(0.0), st.floats(1e-300, 1.0), st.floats(0.01, 1.0))
    weights = arrays(np.float64, shape, elements=entry)
    return weights.filter(lambda w: (w.sum(-1) > 1e-3).all()).map(normalized)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, 0.5), size=500)
    return p, rng.dirichlet(np.full(6, 0.5), size=500)


# --- agreement with an outside reference


@pytest.mark.parametrize(("unit", "base"), [("bits", 2), ("nats", math.e)])
def test_entropy_and_kl_are_those_of_scipy(pairs, unit, base):
    p, q = pairs
    ours, theirs = theory.entropy(p, unit=unit), scipy.stats.entropy(p, base=base, axis=-1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    ours, theirs = theory.kl_divergence(p, q, unit=unit), scipy.stats.entropy(p, q, base, axis=-1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_kl_is_that_of_torch(pairs):
    p, q = map(torch.from_numpy, pairs)
    theirs = torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)
    ours = theory.kl_divergence(p, q, unit="nats")
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-10)


def test_two_gaussians_on_a_fine_grid_have_the_divergence_of_the_closed_form():
    x = np.linspace(-30, 30, 60_001)
    p, q = (normalized(scipy.stats.norm.pdf(x, mean, scale)) for mean, scale in [(0, 1), (1, 2)])
    exact = math.log(2) + (1 + 1) / (2 * 4) - 0.5
    assert theory.kl_divergence(p, q, unit="nats") == pytest.approx(exact, rel=1e-9)


# --- identities


@steady
@given(distributions((2, 5)))
def test_kl_is_cross_entropy_minus_entropy(rows):
    p, q = rows
    kl, cross = theory.kl_divergence(p, q), theory.cross_entropy(p, q)
    if math.isinf(kl):
        assert math.isinf(cross)
    else:  # logs reach 1000, each with relative error 2^-53
        assert kl == pytest.approx(cross - theory.entropy(p), abs=1e-11)


@steady
@given(distributions((2, 5)))
def test_every_quantity_stays_in_its_range(rows):
    p, q = rows
    assert 0 <= theory.entropy(p) <= math.log2(5) + 1e-12
    assert 0 <= theory.total_variation(p, q) <= 1 + 1e-12
    assert theory.kl_divergence(p, q) >= 0
    assert theory.kl_divergence(p, p) == 0


@steady
@given(distributions((2, 5)), st.permutations(range(5)))
def test_relabeling_the_outcomes_changes_nothing(rows, order):
    p, q = rows
    assert theory.kl_divergence(p[order], q[order]) == pytest.approx(
        theory.kl_divergence(p, q), rel=1e-12
    )
    assert theory.entropy(p[order]) == pytest.approx(theory.entropy(p), rel=1e-12)


@steady
@given(distributions((3, 2, 4)))
def test_each_row_of_an_array_is_treated_on_its_own(p):
    q = np.roll(p, 1, axis=0)
    stacked = theory.kl_divergence(p, q)
    assert stacked.shape == (3, 2)
    for row in np.ndindex(3, 2):
        assert stacked[row] == theory.kl_divergence(p[row], q[row])
    moved = theory.entropy(np.moveaxis(p, -1, 0), axis=0)
    np.testing.assert_allclose(moved, theory.entropy(p), rtol=1e-14)


def test_binary_entropy_is_the_entropy_of_a_coin():
    p = np.linspace(0, 1, 101)
    coins = np.stack([p, 1 - p], axis=-1)
    np.testing.assert_allclose(theory.binary_entropy(p), theory.entropy(coins), atol=1e-15)


def test_a_nat_is_1_over_ln_2_bits(pairs):
    p, q = pairs
    for bits, nats in [
        (theory.entropy(p), theory.entropy(p, unit="nats")),
        (theory.cross_entropy(p, q), theory.cross_entropy(p, q, unit="nats")),
        (theory.binary_entropy(p), theory.binary_entropy(p, unit="nats")),
    ]:
        np.testing.assert_allclose(bits * math.log(2), nats, rtol=1e-13)
    kl = theory.kl_divergence(p, q)
    nats = kl * math.log(2)
    for bound in (theory.pinsker_bound, theory.bretagnolle_huber_bound):
        np.testing.assert_allclose(bound(kl), bound(nats, unit="nats"), rtol=1e-13)


def test_rate_and_distortion_are_inverse_functions():
    rate = np.linspace(0, 20, 81)
    np.testing.assert_allclose(
        theory.gaussian_rate(theory.gaussian_distortion(rate, 3.0), 3.0), rate, atol=1e-12
    )


def test_one_bit_is_6_dB_of_sqnr():
    distortion = theory.gaussian_distortion([3.0, 4.0], 1.0)
    drop = [theory.sqnr_db([1.0], [math.sqrt(d)]) for d in distortion]
    assert drop[1] - drop[0] == pytest.approx(20 * math.log10(2), rel=1e-12)


# --- water-filling

variances_and_share = st.tuples(
    arrays(np.float64, st.integers(1, 8), elements=st.floats(0, 1e6)), st.floats(0, 1.5)
)


@steady
@given(variances_and_share)
def test_water_filling_spends_exactly_the_distortion_it_is_given(case):
    variances, share = case
    total = variances.sum()
    fill = theory.reverse_water_filling(variances, share * total)
    assert fill.distortions.sum() == pytest.approx(min(share, 1.0) * total, rel=1e-12, abs=1e-300)
    np.testing.assert_array_equal(fill.distortions, np.minimum(fill.level, variances))
    np.testing.assert_array_equal(fill.rates, theory.gaussian_rate(fill.distortions, variances))


def test_water_filling_of_many_distortions_is_one_row_each():
    variances = [4.0, 0.0, 1.0, 0.25]
    distortions = np.linspace(0, 6, 13).reshape(13, 1)
    many = theory.reverse_water_filling(variances, distortions)
    assert many.level.shape == (13, 1)
    assert many.rates.shape == (13, 1, 4)
    for i, d in enumerate(distortions[:, 0]):
        one = theory.reverse_water_filling(variances, d)
        assert isinstance(one.level, float)
        assert one.level == many.level[i, 0]
        np.testing.assert_array_equal(one.rates, many.rates[i, 0])


def test_water_filling_at_the_ends_costs_all_or_nothing():
    free = theory.reverse_water_filling([4.0, 1.0, 0.0], 5.0)
    assert free.level == 4.0
    assert free.rates.tolist() == [0.0, 0.0, 0.0]
    assert theory.reverse_water_filling([4.0, 1.0, 0.0], 99.0).rates.sum() == 0
    exact = theory.reverse_water_filling([4.0, 1.0, 0.0], 0.0)
    assert exact.rates.tolist() == [math.inf, math.inf, 0.0]


def test_ties_share_the_level():
    fill = theory.reverse_water_filling([1.0, 1.0, 1.0, 9.0], 4.0)
    assert fill.level == 1.0
    assert fill.distortions.tolist() == [1.0] * 4


def test_white_inputs_make_the_layer_a_gaussian_source():
    rate = theory.linear_layer_rate(0.5, 2.0 * np.eye(8), 8 * 0.01)
    assert rate == pytest.approx(theory.gaussian_rate(0.01, 0.5 * 2.0), rel=1e-12)


def test_the_layers_rate_does_not_depend_on_the_basis_of_its_inputs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    second = x.T @ x / 50
    turned = rotation @ second @ rotation.T
    for distortion in [0.01, 1.0, 30.0]:
        rate = theory.linear_layer_rate(0.1, second, distortion)
        turned_rate = theory.linear_layer_rate(0.1, turned, distortion)
        assert turned_rate == pytest.approx(rate, rel=1e-9)
    both = theory.linear_layer_rate(0.1, second, np.array([0.01, 1.0]))
    assert both[0] == theory.linear_layer_rate(0.1, second, 0.01)


def test_eigenvalues_that_rounding_made_negative_cost_nothing():
    exact = theory.linear_layer_rate(1.0, np.diag([1.0, 0.0]), 1e-8)
    assert theory.linear_layer_rate(1.0, [1.0, 0.0], 1e-8) == exact  # eigenvalues alone
    assert theory.linear_layer_rate(1.0, np.diag([1.0, -1e-6]), 1e-8) == exact


# --- extreme numbers


def test_zero_times_log_zero_is_zero():
    assert theory.entropy([1.0, 0.0]) == 0
    assert math.copysign(1, theory.entropy([1.0, 0.0])) == 1  # no minus zero in print
    assert theory.cross_entropy([0.0, 1.0], [0.0, 1.0]) == 0
    assert theory.kl_divergence([0.0, 1.0], [0.0, 1.0]) == 0
    assert theory.kl_divergence([0.0, 1.0], [0.5, 0.5]) == 1


def test_what_the_model_calls_impossible_costs_infinitely_many_bits():
    assert theory.kl_divergence([0.5, 0.5], [0.0, 1.0]) == math.inf
    assert theory.cross_entropy([0.5, 0.5], [0.0, 1.0]) == math.inf
    assert theory.pinsker_bound(math.inf) == math.inf
    assert theory.bretagnolle_huber_bound(math.inf) == 1


def test_subnormal_probabilities_neither_overflow_nor_vanish():
    assert theory.entropy([TINY, 1.0]) == pytest.approx(1074 * TINY)
    assert theory.kl_divergence([0.5, 0.5], [TINY, 1.0]) == pytest.approx(0.5 * 1073 - 0.5)
    assert theory.cross_entropy([0.5, 0.5], [TINY, 1.0]) == pytest.approx(0.5 * 1074)
    assert theory.kl_divergence([TINY, 1.0], [0.5, 0.5]) == pytest.approx(1)
    assert theory.binary_entropy(1e-300) == pytest.approx(1e-300 * (300 * math.log2(10) + 1.4427))
    assert theory.gaussian_rate(TINY, 1.0) == 537
    assert theory.gaussian_rate(1.0, 1.7e308) == pytest.approx(511.96, abs=0.01)
    assert theory.gaussian_distortion(2000.0, 1.0) == 0


def exact_coins(p, q):
    """KL of the coins with heads p and q, decimal fractions, in nats to 50 digits."""
    with localcontext(prec=50):
        p, q = Decimal(p), Decimal(q)
        return float(p * (p / q).ln() + (1 - p) * ((1 - p) / (1 - q)).ln())


def digits_kept(divergence):
    """Is `divergence` right to a few 1e-16 / step for coins whose heads differ by step?"""
    for step in ["1e-3", "1e-6", "1e-9", "1e-12"]:
        heads = Decimal("0.3") + Decimal(step)  # like 0.3, not a float64: off by up to 3e-17
        p, q = np.array([float(heads), float(1 - heads)]), np.array([0.3, 0.7])
        exact = exact_coins(heads, "0.3")
        if abs(divergence(p, q) / exact - 1) > 4e-16 / float(step):
            return False
    return True


def test_coins_that_differ_by_a_step_lose_only_the_digits_of_one_over_the_step():
    assert digits_kept(lambda p, q: theory.kl_divergence(p, q, unit="nats"))
    assert not digits_kept(lambda p, q: (p * np.log(p / q)).sum())  # loses them twice


def test_sums_that_miss_1_move_the_divergence_by_no_more_than_they_miss_it():
    p, q = np.array([0.3, 0.7]), np.array([0.4, 0.6])
    exact = theory.kl_divergence(p, q, unit="nats")
    for miss in [-9e-7, 9e-7]:  # a scaled q has the same p - q up to miss and shifts ln q by it
        assert abs(theory.kl_divergence(p, q * (1 + miss), unit="nats") - exact) < 1e-12
        assert abs(theory.kl_divergence(p * (1 + miss), q, unit="nats") - exact) < abs(miss)


def test_no_rate_buys_no_distortion_except_of_a_constant():
    assert theory.gaussian_rate(0.0, 1.0) == math.inf
    assert theory.gaussian_rate(0.0, 0.0) == 0
    assert theory.gaussian_rate(2.0, 1.0) == 0
    assert theory.gaussian_distortion(math.inf, 1.0) == 0


def test_sqnr_of_no_error_is_infinite_and_of_no_signal_minus_infinite():
    assert theory.sqnr_db([1.0, 2.0], [0.0, 0.0]) == math.inf
    assert theory.sqnr_db([0.0, 0.0], [1.0, 2.0]) == -math.inf
    assert theory.sqnr_db([1e-200], [1e-210]) == pytest.approx(200)  # squares would underflow


def test_torch_tensors_of_any_dtype_are_accepted():
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.bfloat16)
    assert theory.entropy(p) == 1.5
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    float32 = theory.entropy(torch.softmax(logits, -1))  # sums miss 1 by a few 1e-7
    np.testing.assert_allclose(float32, theory.entropy(torch.softmax(logits.double(), -1)), 1e-6)
    assert theory.linear_layer_rate(1.0, torch.eye(3), 3 / 4) == 1


def test_a_vector_gives_a_float_and_a_matrix_an_array():
    assert type(theory.entropy([0.5, 0.5])) is float
    assert type(theory.gaussian_rate(0.5, 1.0)) is float
    assert theory.entropy([[0.5, 0.5]]).shape == (1,)
    assert theory.gaussian_rate([0.5], 1.0).shape == (1,)


# --- refusals

GOOD = [0.5, 0.5]


@pytest.mark.parametrize(
    "call",
    [
        theory.entropy,
        lambda p: theory.kl_divergence(p, GOOD),
        lambda q: theory.cross_entropy(GOOD, q),
        lambda q: theory.total_variation(GOOD, q),
    ],
)
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([1.5, -0.5], "holds -0.5; give numbers of at least 0"),
        ([math.nan, 1.0], "holds NaN"),
        ([0.5, 0.50001], r"sums to 1.00001 along axis -1, which is not 1 within 1e-06; divide"),
        ([math.inf, 0.0], "sums to inf"),
        ([], "sums to 0.0"),
    ],
)
def test_what_is_no_distribution_is_refused(call, bad, why):
    with pytest.raises(ValueError, match=why):
        call(bad)


def test_the_row_that_does_not_sum_to_one_is_the_one_named():
    with pytest.raises(ValueError, match=r"sums to 0\.75 along axis 0"):
        theory.entropy([[0.5, 0.25], [0.5, 0.5]], axis=0)


@pytest.mark.parametrize(
    "pair", [theory.kl_divergence, theory.cross_entropy, theory.total_variation]
)
def test_two_shapes_are_refused(pair):
    with pytest.raises(ValueError, match=r"p has shape \(2,\) and q \(1, 2\); give equal shapes"):
        pair(GOOD, [GOOD])


@pytest.mark.parametrize(
    "call",
    [
        lambda unit: theory.entropy(GOOD, unit=unit),
        lambda unit: theory.cross_entropy(GOOD, GOOD, unit=unit),
        lambda unit: theory.kl_divergence(GOOD, GOOD, unit=unit),
        lambda unit: theory.binary_entropy(0.5, unit=unit),
        lambda unit: theory.pinsker_bound(0.5, unit=unit),
        lambda unit: theory.bretagnolle_huber_bound(0.5, unit=unit),
    ],
)
def test_an_unknown_unit_is_refused(call):
    with pytest.raises(ValueError, match='unit=\'bans\' is unknown; use "bits" or "nats"'):
        call("bans")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: theory.pinsker_bound(-0.1), "kl holds -0.1"),
        (lambda: theory.bretagnolle_huber_bound([0.1, math.nan]), "kl holds NaN"),
        (lambda: theory.binary_entropy(1.25), "p holds 1.25, not a probability"),
        (lambda: theory.binary_entropy(-0.25), "p holds -0.25"),
        (lambda: theory.gaussian_distortion(-1.0, 1.0), "rate holds -1.0"),
        (lambda: theory.gaussian_distortion(1.0, -1.0), "variance holds -1.0"),
        (lambda: theory.gaussian_rate(-1.0, 1.0), "distortion holds -1.0"),
        (lambda: theory.gaussian_rate(1.0, math.nan), "variance holds NaN"),
        (lambda: theory.reverse_water_filling([1.0], -1.0), "distortion holds -1.0"),
        (lambda: theory.reverse_water_filling([1.0, -1.0], 1.0), "variances holds -1.0"),
        (lambda: theory.reverse_water_filling([], 1.0), r"shape \(0,\); give a vector"),
        (lambda: theory.reverse_water_filling([[1.0]], 1.0), r"shape \(1, 1\); give a vector"),
        (lambda: theory.linear_layer_rate(1.0, np.ones((2, 3)), 1.0), "give a square matrix"),
        (lambda: theory.linear_layer_rate(1.0, [[1.0, 0.5], [0.0, 1.0]], 1.0), "not symmetric"),
        (lambda: theory.linear_layer_rate(1.0, [[0.0, 1.0], [1.0, 0.0]], 1.0), "eigenvalue -1"),
        (lambda: theory.linear_layer_rate(-1.0, np.eye(2), 1.0), "weight_variance holds -1.0"),
        (lambda: theory.linear_layer_rate(1.0, np.eye(2), -1.0), "distortion holds -1.0"),
        (lambda: theory.sqnr_db([1.0], [1.0, 2.0]), r"signal has shape \(1,\), error \(2,\)"),
        (
            lambda: theory.linear_layer_rate([1.0, 4.0], np.eye(2), 1.0),
            r"weight_variance has shape \(2,\); give one number",
        ),
        (lambda: theory.linear_layer_rate(1.0, [[math.inf]], 1.0), "second_moment holds an infin"),
        (lambda: theory.gaussian_distortion(math.inf, math.inf), "variance holds an infinite"),
        (lambda: theory.reverse_water_filling([math.inf], math.inf), "variances holds an infinite"),
        (lambda: theory.sqnr_db([math.nan], [1.0]), "signal holds NaN"),
        (lambda: theory.sqnr_db([math.inf], [1.0]), "signal holds an infinite number"),
        (lambda: theory.sqnr_db([1.0], [math.inf]), "error holds an infinite number"),
    ],
)
def test_a_number_outside_its_range_is_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call()
