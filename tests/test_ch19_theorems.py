"""Chapter 19: every theorem against a computation that does not use it, and false variants."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from compresskit import linalg, theory

ROUND = 0.5 * math.log2(math.pi * math.e / 6)


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def moments(seed, n=3):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, n)) * np.geomspace(3, 0.2, n)
    return a @ a.T + 0.02 * np.eye(n)


def factor(second):
    return linalg.upper_factor(torch.from_numpy(second)).numpy()


def rounded(w, v, steps, dither=None):
    """Levels and errors of columns rounded with feedback, straight from the definition."""
    e, levels = np.zeros_like(w), np.zeros_like(w)
    for i in range(w.shape[1]):
        target = w[:, i] + e[:, :i] @ v[:i, i] / v[i, i]
        u = 0 if dither is None else dither[:, i]
        levels[:, i] = np.rint(target / steps[i] + u)
        e[:, i] = target - steps[i] * (levels[:, i] - u)
    return levels, e


def measured_gap(second, steps, rows=200_000):
    w = np.random.default_rng(9).standard_normal((rows, len(second)))
    levels, e = rounded(w, factor(second), steps)
    counts = [np.unique(column, return_counts=True)[1] for column in levels.T]
    rate = np.mean([theory.entropy(c / rows) for c in counts])
    error = ((e * factor(second).diagonal()) ** 2).sum(1).mean()
    return rate - theory.linear_layer_rate(1.0, np.linalg.eigvalsh(second), error)


def check_gap(rule):
    """`rule` (diagonal, steps) -> gap at fine steps."""
    for seed in range(2):
        second = moments(seed)
        diagonal = factor(second).diagonal()
        for steps in (np.full(3, 0.03), 0.01 / diagonal, np.array([0.02, 0.06, 0.01])):
            assert measured_gap(second, steps) == pytest.approx(rule(diagonal, steps), abs=0.02)


@pytest.mark.theorem("thm-frontier-steps")
def test_what_steps_cost():
    check_gap(theory.feedback_gap)
    # (1) with dither, exactly, at coarse steps too
    second, steps = moments(3), np.array([2.0, 1.0, 3.0])
    rng = np.random.default_rng(0)
    w, u = rng.standard_normal((400_000, 3)), rng.uniform(-0.5, 0.5, (400_000, 3))
    v = factor(second)
    _, e = rounded(w, v, steps, u)
    together = np.corrcoef(np.hstack([w, e]).T) - np.eye(6)
    assert np.abs(together).max() < 0.01
    for column, step in zip(e.T, steps, strict=True):
        assert stats.kstest(column / step + 0.5, "uniform").statistic < 0.005
    output = np.linalg.solve(v.T, (e * v.diagonal()).T).T  # the errors of the weights
    error = ((output @ second) * output).sum(1).mean()
    assert error == pytest.approx(((v.diagonal() * steps) ** 2).sum() / 12, rel=0.01)


def dithered_rate(step):
    """H(level | dither) of one Gaussian weight, by integration over the dither."""

    def given(u):
        k = np.arange(-40, 41)
        p = np.diff(stats.norm.cdf((np.append(k, 41) - 0.5 - u) * step))
        p = p[p > 0]
        return -(p * np.log2(p)).sum()

    return integrate.quad(given, -0.5, 0.5)[0]


def test_the_rate_with_dither_lies_between_its_bounds_at_every_step():
    for step in (0.3, 1.0, 3.0):
        r = 0.5 * math.log2(2 * math.pi * math.e / step**2)
        assert r <= dithered_rate(step) <= r + 0.5 * math.log2(1 + step**2 / 12)

        def density(x, step=step):
            return (stats.norm.cdf(x + step / 2) - stats.norm.cdf(x - step / 2)) / step

        x = np.linspace(-12, 12, 20_001)
        f = density(x).clip(1e-300)
        smooth = integrate.trapezoid(-f * np.log2(f), x) - math.log2(step)
        assert dithered_rate(step) == pytest.approx(smooth, abs=1e-4)


@pytest.mark.false_variant("thm-frontier-steps")
def test_other_constants_and_means_are_rejected():
    def spread(logs):
        return np.log2(np.exp2(logs).mean()) - logs.mean()

    def part(d, s, power):
        return spread(power * np.log2(d * s))

    rejects(check_gap, lambda d, s: 0.5 * part(d, s, 2))  # the grid's shape for nothing
    rejects(check_gap, lambda d, s: ROUND + part(d, s, 2))  # without the half
    rejects(check_gap, lambda d, s: ROUND + 0.5 * part(d, s, 1))  # V, not its square
    rejects(check_gap, lambda d, s: ROUND + 0.5 * part(d, np.ones(3), 2))  # whatever the steps
    rejects(check_gap, lambda d, s: ROUND)


@pytest.mark.theorem("cor-frontier-two")
def test_no_steps_are_better_than_those_like_water():
    rng = np.random.default_rng(0)
    for _ in range(50):
        d = rng.uniform(0.1, 3, 6)
        assert theory.feedback_gap(d, 1 / d) == pytest.approx(ROUND)
        assert theory.feedback_gap(d, rng.uniform(0.1, 3, 6)) > ROUND
        means = np.mean(d**2), np.exp(np.mean(np.log(d**2)))
        assert theory.feedback_gap(d) == pytest.approx(ROUND + 0.5 * math.log2(means[0] / means[1]))
    assert theory.feedback_gap(np.full(5, 0.7)) == pytest.approx(ROUND)


POINTS = np.array(list(itertools.product(range(-3, 4), repeat=3)), dtype=float)


def check_price(rule):
    """`rule` (w, S, price) -> target, metric: the cheapest point is the nearest to it."""
    for seed in range(8):
        second, rng = moments(seed), np.random.default_rng(seed)
        w, price = 1.5 * rng.standard_normal(3), rng.uniform(0.3, 2)
        delta = POINTS - w
        cost = ((delta @ second) * delta).sum(1) + price * (POINTS**2).sum(1)
        target, metric = rule(w, second, price)
        away = POINTS - target
        distance = ((away @ metric) * away).sum(1)
        assert np.ptp(cost - distance) < 1e-9 * cost.max()
        assert cost.argmin() == distance.argmin()


def shrunk(w, second, price):
    metric = second + price * np.eye(3)
    return w @ second @ np.linalg.inv(metric), metric


@pytest.mark.theorem("thm-frontier-price")
def test_error_and_price_are_one_distance():
    check_price(shrunk)
    second, price = moments(1), 0.4
    target, metric = shrunk(np.eye(3)[0], second, price)
    values, vectors = np.linalg.eigh(second)
    by_parts = (np.eye(3)[0] @ vectors * values / (values + price)) @ vectors.T
    np.testing.assert_allclose(target, by_parts, atol=1e-12)
    constant = price * np.eye(3)[0] @ second @ np.linalg.inv(metric) @ np.eye(3)[0]
    q = POINTS[5]
    left = (np.eye(3)[0] - q) @ second @ (np.eye(3)[0] - q) + price * q @ q
    assert left == pytest.approx((q - target) @ metric @ (q - target) + constant)


@pytest.mark.false_variant("thm-frontier-price")
def test_damping_alone_shrinking_alone_and_twice_the_price_are_rejected():
    rejects(check_price, lambda w, s, p: (w, s + p * np.eye(3)))
    rejects(check_price, lambda w, s, p: (shrunk(w, s, p)[0], s))
    rejects(check_price, lambda w, s, p: shrunk(w, s, 2 * p))


@pytest.mark.theorem("prop-frontier-scales")
def test_rounded_scales_cost_little():
    for ratio in (0.5, 0.9, 2 ** (1 / 16), 3.0):
        true, model = stats.norm(scale=ratio), stats.norm()

        def term(x, true=true, model=model):
            return true.pdf(x) * (true.logpdf(x) - model.logpdf(x)) / math.log(2)

        kl = integrate.quad(term, -12 * ratio, 12 * ratio, limit=400)[0]
        assert theory.scale_mismatch(ratio) == pytest.approx(kl, abs=1e-7)
    rng = np.random.default_rng(0)
    for a in (1 / 16, 0.5, 2.0):
        worst = np.exp2(a * np.resize([-1, 1], 64))
        for off in (worst, np.exp2(rng.uniform(-a, a, 64))):
            assert theory.feedback_gap(np.ones(64), off) - ROUND <= a**2 * math.log(2)


@pytest.mark.theorem("prop-frontier-unseen")
def test_the_error_on_unseen_inputs():
    rng, n, tokens = np.random.default_rng(0), 4, 20
    true = moments(2, 4)
    root = np.linalg.cholesky(true)
    found = []
    for _ in range(20_000):
        x = rng.standard_normal((tokens, n)) @ root.T
        found.append(np.trace(np.linalg.solve(x.T @ x / tokens, true)) / n)
    mean, spread = np.mean(found), np.std(found) / len(found) ** 0.5
    assert abs(mean - theory.unseen_error(n, tokens)) < 4 * spread
    assert abs(mean - tokens / (tokens - n)) > 4 * spread


def test_formulas_refuse_what_has_none():
    with pytest.raises(ValueError, match="two equal shapes"):
        theory.feedback_gap([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="must be positive"):
        theory.feedback_gap([1.0, 0.0])
    with pytest.raises(ValueError, match=r"for instance 1\.1"):
        theory.scale_mismatch(0.0)
    with pytest.raises(ValueError, match="from 6 tokens on"):
        theory.unseen_error(4, 5)
    with pytest.raises(ValueError, match=r"for instance 0\.05"):
        theory.exponent_law(0.0)
    with pytest.raises(ValueError, match='"gaussian" or "laplace"'):
        theory.exponent_law(1.0, law="cauchy")
