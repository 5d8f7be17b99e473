"""Chapter 14: every theorem against a computation that does not use it, and false variants of it.

(That SparseGPT's steps are explicit down-dating of the inverse, the first part of
`thm-oneshot-sparsegpt`, is tested with the method, in test_sparsegpt.py.)
"""

import itertools

import numpy as np
import pytest
import torch

from compresskit import linalg
from compresskit.methods import magnitude, obs, sparsegpt, wanda
from compresskit.sparse import Pattern
from compresskit.stats import InputStats


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def matrix(n, seed=0):
    """Second moments of `n` correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(6 * n, n)) @ rng.normal(size=(n, n)) * rng.uniform(0.3, 3, size=n)
    return x.T @ x / len(x)


def layer(n, seed=0, rows=6):
    second = torch.from_numpy(matrix(n, seed)).float()
    stats = InputStats(1, second, second.diagonal().sqrt(), torch.ones(n))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator), stats


def others(n, removed):
    return [j for j in range(n) if j not in removed]


def descent(second, given, removed, steps=4000):
    """Least squares with zeros at `removed` by gradient steps: no inverse and no factor."""
    kept = np.ones(len(given))
    kept[list(removed)] = 0
    after, rate = given * kept, 1 / np.linalg.eigvalsh(second)[-1]
    velocity = np.zeros_like(after)
    for _ in range(steps):  # with momentum for this condition number
        gradient = second @ (after - given) * kept
        velocity = 0.95 * velocity - rate * gradient
        after = after + velocity
    return after, (after - given) @ second @ (after - given)


# --- a set of weights goes ----------------------------------------------------------------------


def answer_of_a_set(second, w, removed):
    """(weights, cost) of the theorem's part 2."""
    removed, kept = list(removed), others(len(w), removed)
    inverse = np.linalg.inv(second)
    after = np.zeros_like(w)
    cross = second[np.ix_(kept, removed)] @ w[removed]
    after[kept] = w[kept] + np.linalg.solve(second[np.ix_(kept, kept)], cross)
    return after, w[removed] @ np.linalg.solve(inverse[np.ix_(removed, removed)], w[removed])


def check_set(rule):
    for seed in range(3):
        second, w = matrix(5, seed), np.random.default_rng(seed).normal(size=5)
        for removed in ((1,), (0, 3), (1, 2, 4)):
            after, cost = rule(second, w, removed)
            expected, least = descent(second, w, removed, steps=20000)
            np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(cost, least, rtol=1e-5)


@pytest.mark.theorem("thm-oneshot-set")
def test_the_answer_to_a_set_of_removals_is_a_linear_system_and_its_price_a_block_of_the_inverse():
    check_set(answer_of_a_set)


@pytest.mark.theorem("thm-oneshot-set")
def test_without_an_answer_the_cost_is_the_block_of_the_moments_itself():
    second, w = matrix(6), np.random.default_rng(0).normal(size=6)
    for removed in itertools.combinations(range(6), 3):
        after = w.copy()
        after[list(removed)] = 0
        squares = sum(second[i, i] * w[i] ** 2 for i in removed)
        cross = sum(second[i, j] * w[i] * w[j] for i, j in itertools.permutations(removed, 2))
        np.testing.assert_allclose((after - w) @ second @ (after - w), squares + cross, rtol=1e-9)


def check_one_by_one(update):
    """`update(C, q)` after each removal; the end and the sum of costs for every order."""
    second, w = matrix(6, 1), np.random.default_rng(1).normal(size=6)
    removed = (0, 2, 5)
    expected, price = answer_of_a_set(second, w, removed)
    for order in itertools.permutations(removed):
        after, inverse, costs = w.copy(), np.linalg.inv(second), 0.0
        for q in order:
            costs += after[q] ** 2 / inverse[q, q]
            after = after - after[q] / inverse[q, q] * inverse[q]
            inverse = update(inverse, q)
        np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(costs, price, rtol=1e-7)


@pytest.mark.theorem("thm-oneshot-set")
def test_one_by_one_in_any_order_ends_at_the_same_weights_for_the_same_sum():
    check_one_by_one(lambda c, q: c - np.outer(c[q], c[q]) / c[q, q])


@pytest.mark.false_variant("thm-oneshot-set")
def test_sums_of_single_prices_blocks_of_the_moments_and_stale_inverses_are_rejected():
    def single_prices(second, w, removed):
        inverse = np.linalg.inv(second)
        return answer_of_a_set(second, w, removed)[0], sum(
            w[q] ** 2 / inverse[q, q] for q in removed
        )

    def inverse_block(second, w, removed):
        r = list(removed)
        return answer_of_a_set(second, w, removed)[0], w[r] @ np.linalg.inv(second)[
            np.ix_(r, r)
        ] @ w[r]

    def no_answer(second, w, removed):
        after = w.copy()
        after[list(removed)] = 0
        return after, (after - w) @ second @ (after - w)

    for variant in (single_prices, inverse_block, no_answer):
        rejects(check_set, variant)
    rejects(check_one_by_one, lambda c, q: c)


# --- the diagonal -------------------------------------------------------------------------------


def check_price(explained):
    """`explained(S, j)` in 1 / C_jj = S_jj (1 - R_j^2)."""
    for seed in range(4):
        second = matrix(6, seed)
        inverse = np.linalg.inv(second)
        for j in range(6):
            share = explained(second, j)
            assert 0 <= share < 1
            np.testing.assert_allclose(1 / inverse[j, j], second[j, j] * (1 - share), rtol=1e-6)


def regression(second, j):
    """By regression on a sample with exactly these moments."""
    x = np.linalg.cholesky(second).T
    kept = others(len(second), [j])
    a = np.linalg.lstsq(x[:, kept], x[:, j], rcond=None)[0]
    return 1 - np.sum((x[:, j] - x[:, kept] @ a) ** 2) / np.sum(x[:, j] ** 2)


@pytest.mark.theorem("thm-oneshot-wanda")
def test_an_answer_saves_the_share_that_the_other_inputs_explain():
    check_price(regression)


@pytest.mark.false_variant("thm-oneshot-wanda")
def test_one_regressor_or_the_correlation_itself_are_rejected():
    def best_single(second, j):
        return max(
            second[j, k] ** 2 / second[j, j] / second[k, k] for k in others(len(second), [j])
        )

    rejects(check_price, best_single)
    rejects(check_price, lambda second, j: np.sqrt(regression(second, j)))


@pytest.mark.theorem("thm-oneshot-wanda")
def test_criteria_agree_for_every_weight_only_if_their_factors_are_equal():
    rng = np.random.default_rng(0)
    equal = np.full((4, 4), 0.6) + 0.4 * np.eye(4)  # equal R^2 and equal powers
    sizes = np.diag([1, 2, 3, 1.5])
    scaled = sizes @ equal @ sizes  # equal R^2, other powers

    def first(second, w):
        inverse = np.linalg.inv(second)
        return [
            int(np.argmin(s)) for s in (abs(w), w**2 * np.diag(second), w**2 / np.diag(inverse))
        ]

    for _ in range(200):
        w = rng.normal(size=4)
        assert len(set(first(equal, w))) == 1
        _, by_wanda, by_obs = first(scaled, w)
        assert by_wanda == by_obs
    # The proof's weights: where two factors differ they part the criteria, whatever else is there.
    for seed in range(20):
        second = matrix(4, seed)
        powers, left = np.diag(second), 1 / np.diag(np.linalg.inv(second))
        for a, f in ((np.ones(4), powers), (powers, left / powers)):
            i, k = int(np.argmin(f)), int(np.argmax(f))
            w = np.full(4, 1e3) / np.sqrt(a * np.minimum(f, 1))
            w[k], w[i] = np.sqrt(1 / a[k]), np.sqrt((1 + f[k] / f[i]) / 2 / a[i])
            assert np.argmin(a * w**2) == k
            assert np.argmin(a * f * w**2) == i


def masks(shape, among):
    """All boolean masks of a (1, n) row with half of each comparison group kept."""
    n = shape[1]
    size = n if among == "row" else among
    groups = [
        [set(c) for c in itertools.combinations(range(start, start + size), size // 2)]
        for start in range(0, n, size)
    ]
    for parts in itertools.product(*groups):
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[0, sorted(set().union(*parts))] = True
        yield kept


@pytest.mark.theorem("thm-oneshot-wanda")
@pytest.mark.parametrize("among", ["row", 4])
def test_for_uncorrelated_inputs_wandas_mask_is_the_best_of_all_and_nothing_can_answer(among):
    pattern = Pattern(0.5, among=among)
    for seed in range(4):
        weight, stats = layer(8, seed, rows=1)
        stats = InputStats(1, torch.diag(stats.second.diagonal()), stats.mean_abs, stats.max_abs)
        code = wanda(weight, stats, pattern=pattern)
        error = stats.distortion(weight - code.decode()).item()
        least = min(stats.distortion(weight * ~kept).item() for kept in masks(weight.shape, among))
        assert error == pytest.approx(least, rel=1e-6)
        for method in (obs, sparsegpt):
            torch.testing.assert_close(
                method(weight, stats, pattern=pattern).decode(), code.decode()
            )


@pytest.mark.false_variant("thm-oneshot-wanda")
def test_with_correlations_wandas_mask_is_not_the_best_and_magnitudes_not_without():
    above = []
    for seed in range(4):
        weight, stats = layer(8, seed, rows=1)
        code = wanda(weight, stats, pattern=Pattern(0.5))
        error = stats.distortion(weight - code.decode()).item()
        above.append(
            error / min(stats.distortion(weight * ~k).item() for k in masks((1, 8), "row"))
        )
    assert max(above) > 1.2
    weight, stats = layer(8)
    diagonal = InputStats(1, torch.diag(stats.second.diagonal()), stats.mean_abs, stats.max_abs)
    by_size = magnitude(weight, pattern=Pattern(0.5)).decode()
    by_power = wanda(weight, diagonal, pattern=Pattern(0.5)).decode()
    assert diagonal.distortion(weight - by_size) > 1.1 * diagonal.distortion(weight - by_power)


# --- the fixed order ----------------------------------------------------------------------------


def left_to_right(w, kept, V):
    """(weights after, w') by the theorem's recursion, for any mask."""
    after, asked = np.zeros_like(w), np.zeros_like(w)
    for i in range(len(w)):
        asked[i] = w[i] + (w - after)[:i] @ V[:i, i] / V[i, i]
        after[i] = asked[i] * kept[i]
    return after, asked


def factor(second):
    return linalg.upper_factor(torch.from_numpy(np.ascontiguousarray(second))).numpy()


def check_sum(price):
    """`price(S, V)` per squared weight at the time of its removal; random masks."""
    rng = np.random.default_rng(0)
    for seed in range(5):
        second = matrix(9, seed)
        V, w = factor(second), rng.normal(size=9)
        kept = rng.random(9) < 0.5
        kept[rng.integers(9)] = False
        after, asked = left_to_right(w, kept, V)
        cost = np.sum(price(second, V)[~kept] * asked[~kept] ** 2)
        np.testing.assert_allclose((after - w) @ second @ (after - w), cost, rtol=1e-8)


@pytest.mark.theorem("thm-oneshot-sparsegpt")
def test_the_error_is_the_sum_of_the_prices_at_the_time_of_removal():
    check_sum(lambda second, V: np.diag(V) ** 2)


@pytest.mark.false_variant("thm-oneshot-sparsegpt")
def test_the_prices_of_wanda_and_of_obs_are_rejected():
    rejects(check_sum, lambda second, V: np.diag(second))
    rejects(check_sum, lambda second, V: 1 / np.diag(np.linalg.inv(second)))


def residual(second, i, regressors):
    """What is left of input i after regression on the others named."""
    if not regressors:
        return second[i, i]
    block = second[np.ix_(regressors, regressors)]
    cross = second[regressors, i]
    return second[i, i] - cross @ np.linalg.solve(block, cross)


@pytest.mark.theorem("thm-oneshot-sparsegpt")
def test_its_prices_slide_from_those_of_obs_to_those_of_wanda():
    for seed in range(5):
        second = matrix(8, seed)
        V = factor(second)
        for i in range(8):
            least, most = residual(second, i, others(8, [i])), second[i, i]
            assert least * (1 - 1e-9) <= V[i, i] ** 2 <= most * (1 + 1e-9)
            np.testing.assert_allclose(
                V[i, i] ** 2, residual(second, i, list(range(i + 1, 8))), rtol=1e-8
            )
            if i == 0:
                np.testing.assert_allclose(V[0, 0] ** 2, least, rtol=1e-8)
        np.testing.assert_allclose(V[7, 7] ** 2, second[7, 7], rtol=1e-12)


@pytest.mark.theorem("thm-oneshot-sparsegpt")
def test_on_its_own_mask_it_is_never_better_than_least_squares_and_equal_if_removals_come_first():
    rng = np.random.default_rng(0)
    excess = []
    for seed in range(5):
        second = matrix(8, seed)
        V, w = factor(second), rng.normal(size=8)
        for kept in itertools.islice(itertools.product((False, True), repeat=8), 1, 255, 7):
            kept = np.array(kept)
            after, _ = left_to_right(w, kept, V)
            _, least = answer_of_a_set(second, w, np.flatnonzero(~kept).tolist())
            error = (after - w) @ second @ (after - w)
            assert error >= least * (1 - 1e-8)
            excess.append(error / least)
        for count in range(1, 8):
            kept = np.arange(8) >= count
            after, _ = left_to_right(w, kept, V)
            expected, least = answer_of_a_set(second, w, range(count))
            np.testing.assert_allclose(after, expected, rtol=1e-7, atol=1e-8)
    assert np.median(excess) > 1.05  # a false variant: that it is the answer to any mask
