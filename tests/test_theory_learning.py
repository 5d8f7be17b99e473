"""compresskit.theory.learning: hand-made cases, exact complexities, outside references, refusals.

The bounds themselves, with their false variants, are in test_ch04_theorems.py.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from compresskit import theory


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def all_signs(n):
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


# --- risks and distances


def test_gibbs_risk_is_how_often_a_drawn_label_is_wrong(rng):
    p, labels = rng.dirichlet(np.ones(4), size=3), np.array([0, 3, 3])
    drawn = np.stack([rng.choice(4, size=40_000, p=row) for row in p])
    wrong = (drawn != labels[:, None]).mean()
    assert theory.gibbs_risk(p, labels) == pytest.approx(wrong, abs=0.006)  # 4 standard errors


def test_gibbs_risk_is_linear_in_the_predictor(rng):
    p, q = rng.dirichlet(np.ones(3), size=(2, 50))
    y = rng.integers(3, size=50)
    mixed = theory.gibbs_risk(0.3 * p + 0.7 * q, y)
    risks = 0.3 * theory.gibbs_risk(p, y) + 0.7 * theory.gibbs_risk(q, y)
    assert mixed == pytest.approx(risks, rel=1e-12)


def test_a_batch_of_sequences_has_one_risk():
    p = torch.softmax(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), -1)
    y = torch.zeros(2, 5, dtype=torch.int64)
    assert theory.gibbs_risk(p, y) == pytest.approx(1 - p[..., 0].mean().item(), abs=1e-6)


def test_the_divergence_term_is_in_nats(rng):
    p, q = rng.dirichlet(np.ones(3), size=(2, 20))
    nats = scipy.stats.entropy(p, q, axis=-1).mean()  # SciPy's default is nats
    assert theory.divergence_term(p, q) == pytest.approx(math.sqrt(nats / 2), rel=1e-12)
    assert theory.divergence_term([[0.5, 0.5]], [[1.0, 0.0]]) == math.inf


def test_mean_total_variation_averages_rows():
    assert theory.mean_total_variation([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]) == 0.5


# --- confidence


def test_no_bits_is_one_hypothesis():
    assert theory.occam_term(0, 100, 0.1) == theory.confidence_term(100, 0.1)


def test_one_more_bit_is_half_the_probability_of_failure():
    one = theory.occam_term(1, 100, 0.1)
    assert one == pytest.approx(theory.confidence_term(100, 0.05), rel=1e-12)


def test_four_times_the_inputs_halve_the_confidence_term():
    ratio = theory.confidence_term(100, 0.05) / theory.confidence_term(400, 0.05)
    assert ratio == pytest.approx(2, rel=1e-12)


def test_a_bound_is_the_sum_of_its_terms(rng):
    p, q = rng.dirichlet(np.ones(3), size=(2, 50))
    bound = theory.distillation_bound(p, q, teacher_risk=0.1, complexity=0.2, delta=0.05)
    assert bound.complexity == 0.4
    assert bound.distance == theory.divergence_term(p, q)
    assert bound.confidence == theory.confidence_term(50, 0.05)
    assert bound.total == pytest.approx(0.1 + 0.4 + bound.distance + bound.confidence, rel=1e-12)
    sample = theory.distillation_bound(
        p, q, teacher_risk=0.1, complexity=0.2, delta=0.05, measured="sample"
    )
    assert sample.confidence == pytest.approx(3 * theory.confidence_term(50, 0.025), rel=1e-12)


def test_fresh_inputs_cost_no_complexity_and_no_pinsker(rng):
    p, q = rng.dirichlet(np.ones(3), size=(2, 50))
    fresh = theory.fresh_sample_bound(p, q, teacher_risk=0.1, delta=0.05)
    seen = theory.distillation_bound(p, q, teacher_risk=0.1, complexity=0.0, delta=0.05)
    assert fresh.complexity == 0
    assert fresh.distance == theory.mean_total_variation(p, q) < seen.distance


# --- complexities that are known exactly


def within(estimate, exact):
    """Is `exact` within four standard errors?"""
    return abs(estimate.mean - exact) <= 4 * estimate.standard_error + 1e-15


def test_one_function_has_no_complexity(rng):
    g = rng.normal(size=12)
    assert theory.rademacher_finite(g[None]) == pytest.approx(0, abs=1e-15)
    assert within(theory.rademacher(lambda e: e @ g / 12, 12, draws=2000, seed=0), 0)


def test_all_sign_vectors_have_complexity_1():
    assert theory.rademacher_finite(all_signs(6)) == 1
    assert theory.rademacher(lambda e: np.abs(e).mean(), 6, draws=5, seed=0) == (1.0, 0.0)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 15])
def test_two_opposite_constants_have_the_complexity_of_a_random_walk(n):
    exact = np.abs(all_signs(n).sum(1)).mean() / n
    assert theory.rademacher_signs(n) == pytest.approx(exact, rel=1e-12)
    pair = [[0.7] * n, [-0.7] * n]
    assert theory.rademacher_finite(pair) == pytest.approx(0.7 * exact, rel=1e-12)
    draws = theory.rademacher(lambda e: 0.7 * abs(e.mean()), n, draws=2000, seed=1)
    assert within(draws, theory.rademacher_signs(n, 0.7))


def test_a_long_random_walk_has_the_spread_of_a_gaussian():
    n = 5000
    assert theory.rademacher_signs(n) == pytest.approx(math.sqrt(2 / (math.pi * n)), rel=1e-4)


def test_listing_the_signs_agrees_with_the_definition(rng):
    values = rng.normal(size=(5, 8))
    exact = (all_signs(8) @ values.T).max(1).mean() / 8
    assert theory.rademacher_finite(values) == pytest.approx(exact, rel=1e-12)
    estimate = theory.rademacher(lambda e: (values @ e).max() / 8, 8, draws=3000, seed=2)
    assert within(estimate, exact)


def test_a_wrong_supremum_is_noticed(rng):
    values = rng.normal(size=(5, 8))
    mean = theory.rademacher(lambda e: (values @ e).mean() / 8, 8, draws=3000, seed=2)
    assert not within(mean, theory.rademacher_finite(values))


def test_the_standard_error_covers_as_often_as_it_should(rng):
    values = rng.normal(size=(4, 8))
    exact, hits = theory.rademacher_finite(values), 0
    for seed in range(200):
        found = theory.rademacher(lambda e: (values @ e).max() / 8, 8, draws=50, seed=seed)
        hits += abs(found.mean - exact) <= 1.96 * found.standard_error
    assert 0.90 <= hits / 200 <= 0.99  # 95 % expected


def test_the_ball_of_linear_functions_attains_its_supremum(rng):
    x, signs = rng.normal(size=(9, 3)), np.ones(9)
    best = signs @ x
    w = 2.0 * best / np.linalg.norm(best)
    assert theory.linear_supremum(x, 2.0)(signs) == pytest.approx((x @ w).mean(), rel=1e-12)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_the_bound_of_the_ball_is_within_root_two_of_the_exact_value(rng, d):
    x = rng.normal(size=(10, d))
    supremum = theory.linear_supremum(x, 2.0)
    exact = np.mean([supremum(e) for e in all_signs(10)])
    assert exact <= theory.linear_bound(x, 2.0) <= math.sqrt(2) * exact


def test_orthogonal_inputs_attain_the_bound_of_the_ball():
    exact = theory.linear_supremum(np.eye(5), 3.0)(np.ones(5))
    assert theory.linear_bound(np.eye(5), 3.0) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("m", [1, 2, 16, 200])
def test_massart_bounds_a_finite_class(rng, m):
    values = rng.uniform(0, 1, size=(m, 10))
    assert theory.rademacher_finite(values) <= theory.massart_bound(values) + 1e-15


def test_a_network_of_no_hidden_layer_is_a_linear_one_up_to_the_constant():
    network = theory.network_complexity([], math.sqrt(10) * 2.0, 1.5, 400)
    linear = theory.softmax_complexity(2.0 * math.sqrt(10), 1.5, 1, 400)
    assert network / linear == pytest.approx(math.sqrt(2 * math.log(2)) + 1, rel=1e-12)


# --- refusals

HALF = [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: theory.gibbs_risk(HALF, [2]), "labels from 2 to 2 for 2 classes; use integers"),
        (lambda: theory.gibbs_risk(HALF, [-1]), "use integers from 0 to 1"),
        (lambda: theory.gibbs_risk(HALF, [0.5]), "use integers from 0 to 1"),
        (lambda: theory.gibbs_risk(HALF, [0, 1]), r"labels \(2,\); give one label for each row"),
        (lambda: theory.gibbs_risk(np.ones((0, 1)), []), "give one label"),
        (lambda: theory.gibbs_risk([[0.5, 0.6]], [0]), "sums to 1.1"),
        (lambda: theory.confidence_term(0, 0.1), "a count of 0; use an integer of at least 1"),
        (lambda: theory.confidence_term(2.5, 0.1), "a count of 2.5"),
        (lambda: theory.confidence_term(5, 0.0), "delta=0.0; use a probability above 0"),
        (lambda: theory.confidence_term(5, math.nan), "delta=nan"),
        (lambda: theory.occam_term(-1, 5, 0.1), "bits holds -1"),
        (lambda: theory.occam_term(math.inf, 5, 0.1), "bits holds an infinite"),
        (
            lambda: theory.distillation_bound(
                HALF, HALF, teacher_risk=1.5, complexity=0, delta=0.1
            ),
            "teacher_risk=1.5; a Gibbs risk lies between 0 and 1",
        ),
        (
            lambda: theory.distillation_bound(
                HALF, HALF, teacher_risk=0.5, complexity=-1, delta=0.1
            ),
            "complexity holds -1",
        ),
        (
            lambda: theory.distillation_bound(
                HALF, HALF, teacher_risk=0.5, complexity=0, delta=0.1, measured="both"
            ),
            'measured=\'both\' is unknown; use "expected" or "sample"',
        ),
        (
            lambda: theory.fresh_sample_bound([0.5, 0.5], [0.5, 0.5], teacher_risk=0, delta=0.1),
            r"teacher has shape \(2,\)",
        ),
        (lambda: theory.rademacher(np.max, 3, draws=1, seed=0), "draws=1; use 2 or more"),
        (lambda: theory.rademacher(np.max, 0, draws=2, seed=0), "a count of 0"),
        (lambda: theory.rademacher_finite(np.ones((2, 21))), "21 inputs have 2"),
        (lambda: theory.rademacher_finite([1.0]), r"shape \(1,\); give a matrix"),
        (lambda: theory.rademacher_signs(3, -1.0), "scale holds -1"),
        (lambda: theory.massart_bound([[math.inf]]), "values holds an infinite"),
        (lambda: theory.linear_supremum([[1.0]], -1.0), "radius holds -1"),
        (lambda: theory.linear_bound(np.ones((0, 3)), 1.0), r"inputs has shape \(0, 3\)"),
        (lambda: theory.softmax_complexity(1.0, 1.0, 0, 10), "a count of 0"),
        (lambda: theory.network_complexity([-1.0], 1.0, 1.0, 10), "norms holds -1"),
        (lambda: theory.network_complexity([1.0], -2.0, 1.0, 10), "last holds -2"),
        (lambda: theory.softmax_complexity(1.0, -3.0, 10, 10), "input_norm holds -3"),
    ],
)
def test_a_number_outside_its_range_is_refused(call, why):
    with pytest.raises(ValueError, match=why):
        call()
