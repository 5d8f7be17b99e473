"""Chapter 9: every theorem against a computation that does not use it, and false variants of it.

(That one factorization holds all the inverses, `thm-gptq-cholesky`, is tested with the method, in
test_gptq.py, against explicit down-dating.)
"""

import itertools

import numpy as np
import pytest
import torch

from compresskit import linalg
from compresskit.affine import QuantSpec
from compresskit.basis import Scales
from compresskit.code import Array
from compresskit.methods import gptq, round_to_nearest
from compresskit.stats import InputStats


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def matrix(n, seed=0, rho=None):
    """Second moments of `n` inputs: a random mixture, or neighbors with correlation `rho`."""
    rng = np.random.default_rng(seed)
    if rho is not None:
        return rho ** np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    x = rng.normal(size=(4 * n, n)) @ rng.normal(size=(n, n))
    return x.T @ x / len(x)


def factor(second):
    return linalg.upper_factor(torch.from_numpy(np.ascontiguousarray(second))).numpy()


def feedback(w, V, step=1.0):
    """Rule 3 on an unlimited grid: (rows, n) decoded, and the step errors e_i."""
    q, e = np.zeros_like(w), np.zeros_like(w)
    for i in range(w.shape[1]):
        target = w[:, i] - (q[:, :i] - w[:, :i]) @ V[:i, i] / V[i, i]
        q[:, i] = step * np.round(target / step)
        e[:, i] = q[:, i] - target
    return q, e


def least_squares(second, fixed, values):
    """The least delta^T S delta with delta[fixed] = values: by solving for the other ones."""
    delta = np.zeros(len(second))
    delta[fixed] = values
    rest = [j for j in range(len(second)) if j not in fixed]
    cross = second[np.ix_(rest, fixed)] @ np.atleast_1d(values)
    delta[rest] = -np.linalg.solve(second[np.ix_(rest, rest)], cross)
    return delta, delta @ second @ delta


# --- one weight is fixed, the others answer -----------------------------------------------------


def check_one_step(rule):
    """`rule(S, q, d)` -> (delta, cost); against the solution of the reduced normal equations."""
    for seed in range(5):
        second = matrix(7, seed)
        for q in range(7):
            delta, cost = rule(second, q, 0.3)
            expected, least = least_squares(second, [q], 0.3)
            np.testing.assert_allclose(delta, expected, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(cost, least, rtol=1e-8)


def obs(second, q, d):
    inverse = np.linalg.inv(second)
    return d * inverse[:, q] / inverse[q, q], d**2 / inverse[q, q]


@pytest.mark.theorem("thm-obs")
def test_the_best_answer_to_a_forced_change_is_a_column_of_the_inverse():
    check_one_step(obs)


@pytest.mark.false_variant("thm-obs")
def test_the_matrix_itself_or_the_price_without_an_answer_are_rejected():
    def of_the_matrix(second, q, d):
        delta = d * second[:, q] / second[q, q]
        return delta, delta @ second @ delta

    def without_an_answer(second, q, d):
        return obs(second, q, d)[0], d**2 * second[q, q]

    def multiplied(second, q, d):
        return obs(second, q, d)[0], d**2 * np.linalg.inv(second)[q, q]

    for variant in (of_the_matrix, without_an_answer, multiplied):
        rejects(check_one_step, variant)


def check_next_step(update):
    """`update(C, q)` is the inverse over the coordinates other than q; and costs add up."""
    for seed in range(5):
        second = matrix(6, seed)
        for q in range(6):
            free = [j for j in range(6) if j != q]
            smaller = update(np.linalg.inv(second), q)[np.ix_(free, free)]
            np.testing.assert_allclose(
                smaller, np.linalg.inv(second[np.ix_(free, free)]), rtol=1e-7, atol=1e-9
            )
            first, cost = obs(second, q, 0.3)
            for p in free:
                _, both = least_squares(second, [q, p], np.array([0.3, first[p] + 0.2]))
                more = 0.2**2 / smaller[free.index(p), free.index(p)]
                np.testing.assert_allclose(both, cost + more, rtol=1e-7)


@pytest.mark.theorem("lem-downdate")
def test_the_next_inverse_is_the_old_one_less_a_rank_one_matrix():
    check_next_step(lambda c, q: c - np.outer(c[q], c[q]) / c[q, q])


@pytest.mark.false_variant("lem-downdate")
def test_the_corner_of_the_old_inverse_is_rejected():
    rejects(check_next_step, lambda c, q: c)
    rejects(check_next_step, lambda c, q: c - np.outer(c[q], c[q]))


# --- what is left -------------------------------------------------------------------------------


def check_loss(formula):
    """`formula(V, e)` is delta^T S delta of each row, whatever the grid."""
    rng = np.random.default_rng(0)
    for seed, step in ((0, 1.0), (1, 0.3), (2, 5.0)):
        second = matrix(12, seed)
        V = factor(second)
        w = rng.normal(0, 3, size=(30, 12))
        q, e = feedback(w, V, step)
        loss = (((q - w) @ second) * (q - w)).sum(1)
        np.testing.assert_allclose(formula(V, e), loss, rtol=1e-8)
        assert (loss <= step**2 / 4 * (np.diag(V) ** 2).sum() * (1 + 1e-12)).all()


def check_expected(prediction):
    """`prediction(S, V)` times step^2 / 12 is the mean loss for weights uniform modulo the step.

    20,000 rows: the mean of the loss has a relative standard error below 0.7 % (that of one
    uniform square is 0.89 / sqrt(20000)), so 3 % are more than four of them.
    """
    rng = np.random.default_rng(1)
    for second in (matrix(10, 0), matrix(10, 1), matrix(10, rho=0.9)):
        V = factor(second)
        w = rng.uniform(-0.7, 0.7, size=(20_000, 10)) * 10
        q, _ = feedback(w, V, 0.7)
        loss = (((q - w) @ second) * (q - w)).sum(1).mean()
        assert abs(loss / (0.7**2 / 12 * prediction(second, V)) - 1) < 0.03


@pytest.mark.theorem("thm-gptq-error")
def test_the_loss_is_the_sum_of_the_steps_and_its_mean_is_known_in_advance():
    check_loss(lambda V, e: e**2 @ np.diag(V) ** 2)
    check_expected(lambda second, V: (np.diag(V) ** 2).sum())


@pytest.mark.theorem("thm-gptq-error")
def test_the_errors_of_the_steps_are_uniform_and_independent():
    second = matrix(6, 3)
    w = np.random.default_rng(2).uniform(-4, 4, size=(40_000, 6))
    _, e = feedback(w, factor(second))
    # Four standard errors of a correlation, and of a share of 1/8.
    assert np.abs(np.corrcoef(e.T) - np.eye(6)).max() < 4 / 200
    assert np.abs(np.corrcoef((e**2).T) - np.eye(6)).max() < 4 / 200
    shares = [np.histogram(column, bins=8, range=(-0.5, 0.5))[0] / 40_000 for column in e.T]
    assert np.abs(np.array(shares) - 1 / 8).max() < 4 * (7 / 64 / 40_000) ** 0.5


@pytest.mark.theorem("thm-gptq-error")
def test_the_sum_lies_between_the_determinant_and_the_trace():
    for seed in range(20):
        second = matrix(8, seed)
        total = (np.diag(factor(second)) ** 2).sum()
        assert 8 * np.linalg.det(second) ** (1 / 8) <= total < np.trace(second)
    flat = np.diag([3.0, 1.0, 2.0])
    assert (np.diag(factor(flat)) ** 2).sum() == pytest.approx(6)
    # Equal V_ii, S not diagonal: the lower bound is attained.
    V = np.array([[1.0, 0.7], [0.0, 1.0]])
    assert (np.diag(factor(V @ V.T)) ** 2).sum() == pytest.approx(2 * np.linalg.det(V @ V.T) ** 0.5)


@pytest.mark.theorem("thm-gptq-error")
def test_rounding_to_nearest_pays_the_trace():
    second = matrix(10, 0)
    w = np.random.default_rng(1).uniform(-4, 4, size=(20_000, 10))
    delta = np.round(w) - w
    loss = ((delta @ second) * delta).sum(1).mean()
    assert abs(loss * 12 / np.trace(second) - 1) < 0.05


@pytest.mark.false_variant("thm-gptq-error")
def test_no_square_the_diagonal_the_first_inverse_or_the_wrong_triangle_are_rejected():
    rejects(check_loss, lambda V, e: e**2 @ np.diag(V))
    rejects(check_loss, lambda V, e: e**2 @ np.diag(V @ V.T))
    for prediction in (
        lambda second, V: np.trace(second),
        lambda second, V: (1 / np.diag(np.linalg.inv(second))).sum(),  # never down-dated
        lambda second, V: len(V) * np.linalg.det(second) ** (1 / len(V)),  # the lower bound
        lambda second, V: (np.diag(np.linalg.cholesky(second)) ** 2).sum(),  # the reverse order
    ):
        rejects(check_expected, prediction)


@pytest.mark.theorem("thm-gptq-error")
def test_the_package_keeps_the_prediction_where_nothing_is_clipped():
    # 8 bits over a range of 2.2 times the weights: the updates stay inside.
    generator = torch.Generator().manual_seed(0)
    second = torch.from_numpy(matrix(64, 5)).float()
    weight = torch.rand(400, 64, generator=generator) * 2 - 1
    stats = InputStats(1, second, torch.ones(64), torch.ones(64))
    wide = 2.2

    def fit(groups, spec):
        return torch.full(groups.shape[:-1], -wide), torch.full(groups.shape[:-1], wide)

    code = gptq(weight, stats, spec=QuantSpec(8), fit=fit, scale_dtype=torch.float32)
    delta = code.decode().double() - weight
    damped = stats.damped(0.01).double()
    loss = ((delta @ damped) * delta).sum()
    V = linalg.upper_factor(damped)
    uniform_power = (code.scale.decode().double() ** 2).sum() / 12
    assert abs(loss / (uniform_power * (V.diagonal() ** 2).sum()) - 1) < 0.03
    left_by_all = (1 / torch.linalg.inv(damped).diagonal()).sum()
    for wrong in (left_by_all, damped.trace()):
        assert abs(loss / (uniform_power * wrong) - 1) > 0.1


@pytest.mark.theorem("prop-rounding-isotropic")
def test_uncorrelated_inputs_of_any_size_leave_nothing_to_cancel():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator)
    # Of random sizes: rising ones would only reverse the columns, and groups would stay groups.
    power = torch.rand(40, generator=generator) * 9 + 0.1
    stats = InputStats(1, torch.diag(power), torch.ones(40), torch.ones(40))
    natural = {"order": "natural"}
    for spec, options in (
        (QuantSpec(3), natural),
        (QuantSpec(4, group_size=16), natural),
        (QuantSpec(3), {"order": "activation"}),
        (QuantSpec(4, group_size=10), {"order": "activation", "static_groups": True}),
    ):
        code = gptq(weight, stats, spec=spec, **options)
        assert torch.equal(code.decode(), round_to_nearest(weight, spec=spec).decode())
    mixed = torch.from_numpy(matrix(40)).float()  # the control: correlated inputs change it
    stats = InputStats(1, mixed, torch.ones(40), torch.ones(40))
    changed = gptq(weight, stats, spec=QuantSpec(3)).decode()
    assert not torch.equal(changed, round_to_nearest(weight, spec=QuantSpec(3)).decode())


@pytest.mark.theorem("prop-rounding-isotropic")
def test_groups_of_reordered_columns_are_rounded_to_nearest_on_their_own_grids():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator)
    power = torch.rand(40, generator=generator) * 9 + 0.1
    stats = InputStats(1, torch.diag(power), torch.ones(40), torch.ones(40))
    spec = QuantSpec(4, group_size=10)
    decoded = gptq(weight, stats, spec=spec, order="activation").decode()
    visit = power.argsort(descending=True)
    reordered = round_to_nearest(weight[:, visit], spec=spec).decode()
    assert torch.equal(decoded[:, visit], reordered)
    assert not torch.equal(decoded, round_to_nearest(weight, spec=spec).decode())


# --- the lattice --------------------------------------------------------------------------------


def nearest_plane(basis, target):
    """Babai: vectors of `basis` (rows) decided from the last; Gram-Schmidt from the first."""
    orthogonal = []
    for b in basis:
        orthogonal.append(b - sum((b @ o) / (o @ o) * o for o in orthogonal))
    rest, coefficients = target.copy(), np.zeros(len(basis))
    for i in reversed(range(len(basis))):
        coefficients[i] = np.round(rest @ orthogonal[i] / (orthogonal[i] @ orthogonal[i]))
        rest = rest - coefficients[i] * basis[i]
    return coefficients


@pytest.mark.theorem("prop-rounding-babai")
def test_error_feedback_is_the_nearest_plane_algorithm():
    w = np.random.default_rng(3).normal(0, 4, size=(50, 7))
    for seed in range(3):
        V = factor(matrix(7, seed))
        q, _ = feedback(w, V)
        basis = V  # its row i is V^T e_i
        expected = [nearest_plane(basis[::-1], row @ V)[::-1] for row in w]
        assert np.array_equal(q, expected)
        other = [nearest_plane(basis, row @ V) for row in w]
        assert not np.array_equal(q, other)  # decided in the other order


@pytest.mark.theorem("prop-rounding-babai")
def test_the_errors_fill_a_box_and_a_parallelepiped_of_one_volume():
    V = factor(matrix(4, 1))
    w = np.random.default_rng(4).uniform(-5, 5, size=(5000, 4))
    errors = (feedback(w, V)[0] - w) @ V
    assert (np.abs(errors) <= np.diag(V) / 2 * (1 + 1e-12)).all()
    assert (np.abs(errors).max(0) > 0.99 * np.diag(V) / 2).all()
    assert np.prod(np.diag(V)) == pytest.approx(np.linalg.det(matrix(4, 1)) ** 0.5)
    assert (np.abs((np.round(w) - w) @ V) > np.diag(V) / 2).any()


# --- scaled columns -----------------------------------------------------------------------------


def modelled(w, power, s):
    """The error of proposition prop-awq, part 2, in units of kappa^2 / 12."""
    return np.max(np.abs(w) * s) ** 2 * np.sum(power / s**2)


@pytest.mark.theorem("prop-awq")
def test_scaling_changes_nothing_before_rounding():
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    basis = Scales(Array(torch.linspace(0.3, 4, 6)))
    torch.testing.assert_close(basis.apply(x) @ basis.into(w).T, x @ w.T)


@pytest.mark.theorem("prop-awq")
def test_the_error_of_scaled_columns_is_predicted_and_a_step_that_stays_is_not_assumed():
    rng = np.random.default_rng(5)
    power = np.exp(rng.normal(0, 1, 128))
    for s in (np.ones(128), power**0.3, power**0.9):
        w = rng.normal(size=(3000, 128))
        step = np.abs(w * s).max(1, keepdims=True) / 31.5
        delta = step * np.round(w * s / step) / s - w
        measured = (delta**2 * power).sum() * 12 * 31.5**2
        # The largest weight of a row errs by half a step, not at random: 2/128 more.
        assert abs(measured / sum(modelled(row, power, s) for row in w) - 1) < 0.05
        if s.std() > 0:  # a false variant: as if the step did not grow
            frozen = (np.abs(w).max(1) ** 2).sum() * np.sum(power / s**2)
            assert abs(measured / frozen - 1) > 0.1


@pytest.mark.theorem("prop-awq")
def test_equal_weights_gain_nothing_and_the_least_value_is_that_of_inverse_weights():
    rng = np.random.default_rng(6)
    power = rng.uniform(0.1, 5, 8)
    w = rng.normal(size=8)
    least = np.sum(power * w**2)
    assert modelled(w, power, 1 / np.abs(w)) == pytest.approx(least)
    for _ in range(200):
        s = np.exp(rng.normal(size=8))
        assert modelled(w, power, s) >= least * (1 - 1e-12)
        equal = np.full(8, 0.7)
        assert modelled(equal, power, s) >= modelled(equal, power, np.ones(8)) * (1 - 1e-12)


# --- what the page says about greed -------------------------------------------------------------


def test_greedy_feedback_can_miss_the_best_rounding():
    second = matrix(4, rho=0.9)
    V = factor(second)
    rng = np.random.default_rng(7)
    w = rng.uniform(-2, 2, size=(60, 4))
    q, _ = feedback(w, V)
    loss = (((q - w) @ second) * (q - w)).sum(1)
    corners = np.array(list(itertools.product((-1, 0, 1, 2), repeat=4)))
    best = []
    for row in w:
        delta = np.floor(row) + corners - row
        best.append(((delta @ second) * delta).sum(1).min())
    assert (loss >= np.array(best) - 1e-12).all()
    assert (loss > np.array(best) + 1e-9).any()
