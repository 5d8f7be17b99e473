"""Chapter 7: every theorem against a computation that does not use it, and false variants of it.

A check is a function of the formula or the algorithm under test. The true one must pass it, and a
false one (a dropped term, a wrong constant, a missing hypothesis) must be rejected by the same
check.
"""

import json
import math
import re
from itertools import combinations, combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from compresskit import codebook, data, measure, model, models, theory
from compresskit.methods import fp4, kmeans, lloyd_max, nf4

NORMAL = stats.norm()
LAPLACE = stats.laplace(scale=math.sqrt(0.5))
LOGISTIC = stats.logistic()
GAP_BITS = 0.5 * math.log2(math.pi * math.e / 6)


def rejects(check, *false_variants):
    with pytest.raises(AssertionError):
        check(*false_variants)


def error(x, p, levels):
    """Mean squared error of the nearest levels, by looking at all of them."""
    return float(p @ np.min((x[:, None] - np.asarray(levels)) ** 2, axis=1))


def lists():
    """Small lists of weights with probabilities, none of them equally spaced."""
    rng = np.random.default_rng(0)
    for n in (4, 6, 8):
        for _ in range(6):
            x, p = np.sort(rng.normal(size=n)), rng.random(n) + 0.05
            yield x, p / p.sum()


def cuts(n, k):
    for inner in combinations(range(1, n), k - 1):
        yield [0, *inner, n]


# --- nearest level and centroid -----------------------------------------------------------------


def check_threshold(threshold):
    """`threshold(a, b)`: where to part two levels. Cells parted there have the least error."""
    for x, p in lists():
        for a, b in [(-0.7, 0.4), (0.1, 1.3), (-1.1, 1.5)]:
            chosen = np.where(x <= threshold(a, b), a, b)
            assert p @ (x - chosen) ** 2 <= error(x, p, [a, b]) + 1e-12


@pytest.mark.theorem("thm-lloyd-max")
def test_cells_that_part_at_midpoints_have_the_least_error():
    check_threshold(lambda a, b: (a + b) / 2)


@pytest.mark.false_variant("thm-lloyd-max")
def test_cells_that_part_elsewhere_do_not():
    rejects(check_threshold, lambda a, b: 0.52 * a + 0.48 * b)
    rejects(check_threshold, lambda a, b: 0.0)


def check_center(center):
    """`center(x, p)`: the level of a cell. No other level serves it better."""
    for x, p in lists():
        level = center(x, p)
        for other in np.linspace(x[0], x[-1], 201):
            assert p @ (x - level) ** 2 <= p @ (x - other) ** 2 + 1e-12


@pytest.mark.theorem("thm-lloyd-max")
def test_the_best_level_of_a_cell_is_its_mean():
    check_center(lambda x, p: p @ x / p.sum())


@pytest.mark.false_variant("thm-lloyd-max")
def test_neither_its_median_nor_its_midpoint_is():
    rejects(check_center, lambda x, p: x[np.searchsorted(np.cumsum(p), p.sum() / 2)])
    rejects(check_center, lambda x, p: (x[0] + x[-1]) / 2)


def check_error_identity(identity):
    """`identity(second, of_levels, D)` vanishes for the true optimum of many lists and sizes."""
    for x, p in lists():
        for k in range(1, len(x)):
            best = min(
                cuts(len(x), k),
                key=lambda e, x=x, p=p: sum(
                    p[a:b] @ (x[a:b] - p[a:b] @ x[a:b] / p[a:b].sum()) ** 2 for a, b in pairwise(e)
                ),
            )
            levels = [p[a:b] @ x[a:b] / p[a:b].sum() for a, b in pairwise(best)]
            q = np.repeat(levels, np.diff(best))
            assert math.isclose(p @ q, p @ x, abs_tol=1e-12)
            assert math.isclose(p @ (q * (x - q)), 0, abs_tol=1e-12)
            assert abs(identity(p @ x**2, p @ q**2, error(x, p, levels))) < 1e-12
            assert math.isclose(p @ (x * (q - x)), -error(x, p, levels), abs_tol=1e-12)


@pytest.mark.theorem("thm-lloyd-max")
def test_the_error_is_what_the_levels_lack_in_mean_square():
    check_error_identity(lambda second, of_levels, distortion: second - of_levels - distortion)


@pytest.mark.false_variant("thm-lloyd-max")
def test_the_levels_do_not_exceed_the_weights_as_they_would_under_independent_noise():
    rejects(
        check_error_identity, lambda second, of_levels, distortion: of_levels - second - distortion
    )
    rejects(check_error_identity, lambda second, of_levels, distortion: second - of_levels)


@pytest.mark.theorem("thm-lloyd-max")
@pytest.mark.parametrize("law", [NORMAL, LAPLACE, LOGISTIC], ids=["normal", "laplace", "logistic"])
@pytest.mark.parametrize("k", [2, 5, 16])
def test_no_codebook_that_lloyds_iteration_finds_from_anywhere_is_better_than_the_solution(law, k):
    """Uniqueness for log-concave densities is quoted in the text; here it is tried."""
    x = law.ppf((np.arange(20_000) + 0.5) / 20_000)
    p = np.full(len(x), 1 / len(x))
    least = error(x, p, codebook.optimal_values(torch.from_numpy(x), k).numpy())
    best = theory.lloyd_max_quantizer(law, k).distortion
    assert best * (1 - 0.02) < least < best  # 20,000 quantiles lack some of the tail
    rng = np.random.default_rng(k)
    for _ in range(5):
        start = torch.from_numpy(rng.choice(x, k, replace=False))
        found = codebook.lloyd(torch.from_numpy(x), start, steps=3000)
        assert error(x, p, found.numpy()) > least * (1 - 1e-9)  # float64 sums of 20,000 terms


# --- Lloyd's iteration --------------------------------------------------------------------------


def check_iteration(step):
    """One `step(x, p, levels)` after another: never up, down while it moves, and it stops."""
    for x, p in lists():
        for k in (2, 3):
            levels = np.linspace(x[0], x[-1], k + 2)[1:-1]
            before = error(x, p, levels)
            for _ in range(200):
                moved = step(x, p, levels)
                after = error(x, p, moved)
                assert after <= before + 1e-14
                if np.allclose(moved, levels, rtol=0, atol=1e-13):
                    break
                assert after < before
                levels, before = moved, after
            else:
                raise AssertionError("it does not stop")
            cell = np.argmin(np.abs(x[:, None] - levels), axis=1)
            for i in set(cell):
                assert math.isclose(levels[i], np.average(x[cell == i], weights=p[cell == i]))


def lloyd_step(x, p, levels, center=lambda x, p: np.average(x, weights=p), share=1.0):
    cell = np.argmin(np.abs(x[:, None] - levels), axis=1)
    means = [center(x[cell == i], p[cell == i]) if (cell == i).any() else y
             for i, y in enumerate(levels)]  # fmt: skip
    return levels + share * (np.array(means) - levels)


@pytest.mark.theorem("prop-lloyd-iteration")
def test_lloyds_iteration_goes_down_and_stops_where_both_conditions_hold():
    check_iteration(lloyd_step)
    check_iteration(
        lambda x, p, levels: codebook.lloyd(
            torch.from_numpy(x), torch.from_numpy(levels), weights=torch.from_numpy(p), steps=1
        ).numpy()
    )


@pytest.mark.false_variant("prop-lloyd-iteration")
def test_moving_levels_to_the_middle_of_their_cells_or_too_far_is_no_such_iteration():
    rejects(
        check_iteration, lambda x, p, y: lloyd_step(x, p, y, lambda x, p: (x.min() + x.max()) / 2)
    )
    rejects(check_iteration, lambda x, p, y: lloyd_step(x, p, y, share=2.05))


# --- exact clusters -----------------------------------------------------------------------------


def variation(x, p, a, b):
    return p[a:b] @ (x[a:b] - np.average(x[a:b], weights=p[a:b])) ** 2 if b > a else 0.0


def check_quadrangle(cost, order=np.sort):
    for x, p in lists():
        x = order(x)
        for a, b, c, d in combinations_with_replacement(range(len(x) + 1), 4):
            left = cost(x, p, a, c) + cost(x, p, b, d)
            assert left <= cost(x, p, a, d) + cost(x, p, b, c) + 1e-12


@pytest.mark.theorem("lem-quadrangle")
def test_crossing_two_intervals_never_costs_more_than_nesting_them():
    check_quadrangle(variation)


@pytest.mark.false_variant("lem-quadrangle")
def test_it_costs_more_for_unsorted_weights_and_for_the_root_of_the_variation():
    rejects(check_quadrangle, variation, lambda x: np.random.default_rng(1).permutation(x))
    rejects(check_quadrangle, lambda *a: variation(*a) ** 0.5)


def least_errors(x, p):
    """F(1), ..., F(n) by trying all cuts, and by trying all partitions for the small lists."""
    return np.array(
        [
            min(sum(variation(x, p, a, b) for a, b in pairwise(e)) for e in cuts(len(x), k))
            for k in range(1, len(x) + 1)
        ]
    )


def check_falling_returns(errors_of):
    for x, p in lists():
        F = errors_of(x, p)
        assert (np.diff(F, 2) >= -1e-12).all()
        for k in range(2, len(x)):
            price = (F[k - 2] - F[k]) / 2  # between the two differences around k
            total = F + price * np.arange(1, len(x) + 1)
            assert total[k - 1] <= total.min() + 1e-12


@pytest.mark.theorem("thm-convex-levels")
def test_each_level_gains_at_most_as_much_as_the_one_before_and_a_price_finds_every_number():
    check_falling_returns(least_errors)


def test_the_package_finds_these_errors():
    for x, p in lists():
        for k, least in enumerate(least_errors(x, p), 1):
            levels = codebook.optimal_values(
                torch.from_numpy(x), k, weights=torch.from_numpy(p)
            ).numpy()
            assert math.isclose(error(x, p, levels), least, rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.theorem("thm-convex-levels")
def test_no_partition_at_all_beats_the_best_cut():
    x, p = next(iter(lists()))
    for k in (2, 3):
        every = (np.array(np.unravel_index(i, (k,) * len(x))) for i in range(k ** len(x)))
        least = min(sum(variation(x[c == j], p[c == j], 0, (c == j).sum()) for j in range(k))
                    for c in every)  # fmt: skip
        assert math.isclose(least, least_errors(x, p)[k - 1])


@pytest.mark.false_variant("thm-convex-levels")
def test_cuts_of_an_unsorted_list_or_into_equal_counts_and_roots_have_other_returns():
    def unsorted(x, p):
        order = np.random.default_rng(1).permutation(len(x))
        return least_errors(x[order], p[order])

    def equal_counts(x, p):
        ends = [[round(i * len(x) / k) for i in range(k + 1)] for k in range(1, len(x) + 1)]
        return np.array([sum(variation(x, p, a, b) for a, b in pairwise(e)) for e in ends])

    rejects(check_falling_returns, unsorted)
    rejects(check_falling_returns, equal_counts)
    rejects(check_falling_returns, lambda x, p: np.sqrt(least_errors(x, p)))


# --- many levels --------------------------------------------------------------------------------


def companded(law, low, high, density, k):
    """k^2 times the error within [low, high] of midpoints between k-quantiles of `density`."""
    grid = np.linspace(low, high, 200_001)
    below = integrate.cumulative_simpson(density(grid), x=grid, initial=0)
    ends = np.interp(np.arange(k + 1) / k, below / below[-1], grid)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (ends[1:] + ends[:-1]) / 2, np.diff(ends) / 2
    x = middle[:, None] + half[:, None] * nodes
    return k**2 * (half[:, None] * weights * (x - middle[:, None]) ** 2 * law.pdf(x)).sum()


DENSITIES = {
    "even": lambda x: np.ones_like(x),
    "as the law": NORMAL.pdf,
    "as N(0, 3)": stats.norm(scale=math.sqrt(3)).pdf,
    "tilted": lambda x: 4 + x,
}


def check_bennett(integral):
    """`integral(f, lambda, low, high)`, lambda of mass 1, is the limit of k^2 D."""
    for density in DENSITIES.values():
        low, high = -1.5, 2.0
        mass = integrate.quad(density, low, high)[0]
        limit = integral(NORMAL.pdf, lambda x, d=density, m=mass: d(x) / m, low, high)
        got = [companded(NORMAL, low, high, density, k) for k in (100, 400)]
        assert abs(got[1] / limit - 1) < 2e-3
        assert abs(got[1] / limit - 1) < abs(got[0] / limit - 1) + 1e-6


@pytest.mark.theorem("thm-bennett")
def test_the_error_of_companded_cells_tends_to_bennetts_integral():
    check_bennett(lambda f, d, a, b: integrate.quad(lambda x: f(x) / d(x) ** 2, a, b)[0] / 12)


@pytest.mark.false_variant("thm-bennett")
def test_neither_another_power_of_the_density_nor_another_constant_will_do():
    rejects(
        check_bennett,
        lambda f, d, a, b: integrate.quad(lambda x: f(x) / d(x) ** 1.9, a, b)[0] / 12,
    )
    rejects(
        check_bennett,
        lambda f, d, a, b: integrate.quad(lambda x: f(x) / d(x) ** 2, a, b)[0] / 11.9,
    )


def check_panter_dite(limit):
    """`limit(law)` is that of k^2 D at the optimum; the rest is halved when k is doubled."""
    for law in (NORMAL, LAPLACE, LOGISTIC, stats.norm(2, 0.1)):
        short = []
        for k in (128, 256, 512):
            D = theory.lloyd_max_quantizer(law, k).distortion
            assert math.isclose(D, theory.quantizer_distortion(
                law, theory.lloyd_max_quantizer(law, k).values), rel_tol=1e-9)  # fmt: skip
            short.append(1 - D * k * k / limit(law))
        assert 0 < short[2] < 0.01
        for a, b in pairwise(short):
            assert 1.9 < a / b < 2.1


def cube_root_limit(law):
    a, b = law.ppf(1e-40), law.isf(1e-40)
    ends = np.linspace(a, b, 21)
    total = sum(integrate.quad(lambda x: law.pdf(x) ** (1 / 3), *e)[0] for e in pairwise(ends))
    return total**3 / 12


@pytest.mark.theorem("thm-panter-dite")
def test_the_best_error_times_k_squared_tends_to_the_cube_of_the_integral_of_the_cube_root():
    check_panter_dite(cube_root_limit)


@pytest.mark.false_variant("thm-panter-dite")
def test_the_limit_is_not_one_percent_more_nor_that_of_the_square_root():
    rejects(check_panter_dite, lambda law: cube_root_limit(law) * 1.01)
    rejects(check_panter_dite, square_root_limit)


def square_root_limit(law):
    ends = law.ppf(1e-30), law.isf(1e-30)
    return integrate.quad(lambda x: law.pdf(x) ** 0.5, *ends, limit=200)[0] ** 2 / 12


@pytest.mark.theorem("thm-panter-dite")
def test_the_finite_lower_bound_of_the_proof_holds_for_every_number_of_levels():
    """(sum of the pieces' lengths times cube roots of minima)^3 / 12 (k + M - 1)^2 <= D_k."""
    pieces = np.linspace(-6, 6, 301)
    minima = np.minimum(NORMAL.pdf(pieces[1:]), NORMAL.pdf(pieces[:-1]))
    total = (np.diff(pieces) * np.cbrt(minima)).sum()
    for k in (1, 2, 16, 256, 4096):
        bound = total**3 / (12 * (k + len(minima) - 1) ** 2)
        assert bound <= theory.lloyd_max_quantizer(NORMAL, k).distortion


def check_constants(gaussian, laplace, widening):
    """k^2 D / variance at the limit, and the factor by which the levels are wider than the law."""
    assert math.isclose(cube_root_limit(stats.norm(scale=0.3)), gaussian * 0.09, rel_tol=1e-6)
    assert math.isclose(cube_root_limit(stats.laplace(scale=2)), laplace * 8, rel_tol=1e-6)
    assert math.isclose(10 * math.log10(gaussian), 4.35, abs_tol=0.005)
    assert math.isclose(math.log2(gaussian) / 2, 0.722, abs_tol=5e-4)
    wide = theory.bennett_integral(NORMAL, stats.norm(scale=widening).pdf, 1)
    for other in (0.97, 1.03):
        assert wide < theory.bennett_integral(NORMAL, stats.norm(scale=other * widening).pdf, 1)
    values = theory.lloyd_max_quantizer(NORMAL, 512).values
    assert abs(np.std(values) / widening - 1) < 0.02  # at 512 levels; the ends are thin


@pytest.mark.theorem("cor-gaussian-levels")
def test_the_gaussian_constant_is_root_three_pi_over_two_and_the_laplace_constant_nine_halves():
    check_constants(math.sqrt(3) * math.pi / 2, 4.5, math.sqrt(3))


@pytest.mark.false_variant("cor-gaussian-levels")
def test_it_is_neither_that_of_the_coded_grid_nor_are_the_levels_as_dense_as_the_weights():
    rejects(check_constants, math.pi * math.e / 6, 4.5, math.sqrt(3))
    rejects(check_constants, math.sqrt(3) * math.pi / 2, 4.5, 1.5)
    rejects(check_constants, math.sqrt(3) * math.pi / 2, 9.0, math.sqrt(3))


def check_growing_loss(exponent):
    """Levels at the quantiles of f^exponent: k^2 D grows without bound (by 1.5 for each 4 k)."""
    for law in (NORMAL, LOGISTIC):
        got = []
        for k in (16, 64, 256, 1024):
            x = np.linspace(law.ppf(1e-30), law.isf(1e-30), 400_001)
            below = integrate.cumulative_simpson(law.pdf(x) ** exponent, x=x, initial=0)
            ends = np.interp(np.arange(1, k) / k, below / below[-1], x)
            ends = np.concatenate([[law.ppf(1e-30)], ends, [law.isf(1e-30)]])
            p = np.diff(law.cdf(ends))
            if exponent == 1:
                assert math.isclose(theory.entropy(p / p.sum()), math.log2(k), rel_tol=1e-6)
            nodes, weights = np.polynomial.legendre.leggauss(60)
            c, h = (ends[1:] + ends[:-1]) / 2, np.diff(ends) / 2
            t = c[:, None] + h[:, None] * nodes
            w = h[:, None] * weights * law.pdf(t)
            mean = (w * t).sum(1) / w.sum(1)
            got.append(k * k * (w * (t - mean[:, None]) ** 2).sum())
        assert all(b > 1.5 * a for a, b in pairwise(got))


@pytest.mark.theorem("prop-equal-mass")
def test_cells_of_equal_mass_fall_behind_without_bound():
    check_growing_loss(1)


@pytest.mark.false_variant("prop-equal-mass")
def test_cells_of_equal_mass_of_the_cube_root_do_not():
    rejects(check_growing_loss, 1 / 3)


# --- with an entropy code -----------------------------------------------------------------------


def coded_grid(law, step):
    """H(Q), D and KL(f || cell averages) in nats, by quadrature on each cell."""
    cells = np.arange(math.floor(law.ppf(1e-14) / step), math.ceil(law.isf(1e-14) / step) + 1)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    halves = np.array([-0.25, 0.25])  # a density may have a kink at 0
    x = step * (cells[:, None, None] + halves[:, None] + nodes / 4)
    f = law.pdf(x)
    w = step / 4 * weights
    p = (w * f).sum((1, 2))
    mean = (p / step)[:, None, None]
    kl = (w * (f * np.log(f / mean))).sum()
    D = (w * f * (x - step * cells[:, None, None]) ** 2).sum()
    return -(p * np.log2(p)).sum(), D, kl


def check_rate_identity(rate):
    """`rate(h, step, kl)` in bits, kl in nats, is the entropy of the levels, at every step."""
    for law in (NORMAL, LAPLACE, LOGISTIC):
        for step in (0.1, 0.5, 1.0, 3.0):
            H, _, kl = coded_grid(law, step)
            h = law.entropy() / math.log(2)
            assert math.isclose(rate(h, step, kl), H, abs_tol=1e-9)
            assert h - math.log2(step) <= H
            found = theory.entropy_coded_uniform(law, step)
            assert math.isclose(found.rate, H, abs_tol=1e-9)


@pytest.mark.theorem("thm-space-filling")
def test_the_entropy_of_the_grid_is_h_less_the_log_of_the_step_plus_a_divergence():
    check_rate_identity(lambda h, step, kl: h - math.log2(step) + kl / math.log(2))


@pytest.mark.false_variant("thm-space-filling")
def test_without_the_divergence_or_with_nats_for_bits_it_is_wrong():
    rejects(check_rate_identity, lambda h, step, kl: h - math.log2(step))
    rejects(check_rate_identity, lambda h, step, kl: h - math.log2(step) + kl)


def check_habit(bound):
    """`bound(kl)` is never below |12 D / step^2 - 1|, and vanishes with the step."""
    for law in (NORMAL, LAPLACE, LOGISTIC, stats.norm(0.3, 1)):
        for step in (0.05, 0.2, 1.0, 2.0, 4.0, 8.0):
            _, D, kl = coded_grid(law, step)
            assert abs(12 * D / step**2 - 1) <= bound(max(kl, 0)) + 1e-9
        assert bound(coded_grid(law, 1e-3)[2]) < 0.01


@pytest.mark.theorem("thm-space-filling")
def test_the_distance_from_a_twelfth_of_the_squared_step_is_bounded_by_the_divergence():
    check_habit(lambda kl: 3 * math.sqrt(kl / 2))


@pytest.mark.false_variant("thm-space-filling")
def test_the_bound_does_not_hold_with_two_fifths_of_it_or_a_higher_power_of_the_divergence():
    rejects(check_habit, lambda kl: 1.2 * math.sqrt(kl / 2))
    rejects(check_habit, lambda kl: 0.5 * kl)


def check_gap(constant):
    for law in (NORMAL, LAPLACE, LOGISTIC):
        gaps = []
        for step in (0.2, 0.1, 0.05):
            H, D, _ = coded_grid(law, step)
            bound = law.entropy() / math.log(2) - 0.5 * math.log2(2 * math.pi * math.e * D)
            gaps.append(H - bound - constant)
        assert abs(gaps[-1]) < 2e-3
        assert abs(gaps[-1]) < abs(gaps[0]) / 3


@pytest.mark.theorem("thm-space-filling")
def test_the_gap_to_the_shannon_lower_bound_tends_to_0_254_bit_for_three_laws():
    check_gap(GAP_BITS)


@pytest.mark.false_variant("thm-space-filling")
def test_it_tends_neither_to_the_gap_of_lloyd_max_nor_to_a_thousandth_of_a_bit_less():
    rejects(check_gap, math.log2(math.sqrt(3) * math.pi / 2) / 2)
    rejects(check_gap, 0.2535)


# --- tables in blocks ---------------------------------------------------------------------------


def check_block_table(importance):
    """Values fitted to w / s with `importance(s)` are the best table of 3: all partitions tried."""
    for seed in range(4):
        g = np.random.default_rng(seed)
        scale = np.repeat(g.uniform(0.1, 5, 3) * np.sign(g.normal(size=3)), 3)
        w = g.normal(size=9) * scale
        u = w / scale
        least = math.inf
        for e in cuts(9, 3):
            order = np.argsort(u)
            total = 0.0
            for a, b in pairwise(e):
                i = order[a:b]
                level = (scale[i] @ w[i]) / (scale[i] @ scale[i])  # least squares, directly
                total += ((w[i] - scale[i] * level) ** 2).sum()
            least = min(least, total)
        table = codebook.optimal_values(
            torch.from_numpy(u), 3, weights=torch.from_numpy(importance(scale))
        ).numpy()
        found = np.min((w[:, None] - scale[:, None] * table) ** 2, axis=1).sum()
        assert math.isclose(found, least, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.theorem("prop-block-table")
def test_the_best_table_weighs_normalized_weights_by_the_square_of_their_scales():
    check_block_table(np.square)


@pytest.mark.false_variant("prop-block-table")
def test_neither_equal_importances_nor_a_lower_power_of_the_scales_gives_it():
    rejects(check_block_table, np.ones_like)
    rejects(check_block_table, lambda s: np.abs(s) ** 1.8)


@pytest.mark.theorem("prop-block-table")
@pytest.mark.parametrize("kind", ["normal", "student", "outliers"])
def test_no_fixed_table_of_sixteen_beats_the_fitted_one_with_the_same_scales(kind):
    g = torch.Generator().manual_seed(3)
    w = torch.randn(64, 256, generator=g)
    if kind == "student":
        w = w / torch.rand(64, 256, generator=g).sqrt()
    if kind == "outliers":
        w.view(-1)[::1000] *= 50
    fitted = lloyd_max(w, block=64, value_dtype=torch.float32)
    best = (w - fitted.decode()).double().square().sum()
    for table in (nf4(w), fp4(w), round_in_blocks(w, fitted.scale.decode())):
        assert best <= (w - getattr(table, "decode", lambda t=table: t)()).double().square().sum()


def round_in_blocks(w, scale):
    """Sixteen even levels with these scales."""
    even = torch.linspace(-1, 1, 16)
    x = w.reshape(-1, 64) / scale[:, None]
    return (scale[:, None] * even[codebook.nearest(x, even).long()]).reshape(w.shape)


def test_weight_sharing_from_an_even_start_loses_levels_to_a_single_outlier():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    w[0, 0] = 300.0
    assert kmeans(w, bits=4).index.tensor.unique().numel() < 5
    assert lloyd_max(w, bits=4).index.tensor.unique().numel() == 16


# --- the page's own solutions -------------------------------------------------------------------

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "07_codebooks_and_the_limit.ipynb"


def page_text():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def solutions():
    found = re.findall(r"````\{solution\} (\S+)\n(.*?)\n````", page_text(), re.DOTALL)
    return {
        label: "\n".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
        for label, body in found
    }


@pytest.fixture(scope="module")
def names():
    """What the page has defined when a reader comes to the exercises, as far as they use it."""

    def db(ratio):
        return 10 * math.log10(ratio)

    def above_limit(rate, distortion):
        return db(distortion / theory.gaussian_distortion(rate, 1.0))

    def squared_error(w, levels):
        index = codebook.nearest(w, levels.to(w))
        return (w - levels.to(w)[index.long()]).double().square().sum().item()

    encoder = models.minilm()
    name = "encoder.layer.2.output.dense"
    moments = model.collect(encoder, [encoder.batches(data.pydoc().calibration)[-1][:6, :64]])
    return {
        "np": np, "math": math, "torch": torch, "theory": theory, "codebook": codebook,
        "measure": measure, "nf4": nf4, "lloyd_max": lloyd_max, "law": stats, "normal": NORMAL,
        "db": db, "above_limit": above_limit, "squared_error": squared_error,
        "down": encoder.get_submodule(name).weight.detach(), "stats": moments[name],
    }  # fmt: skip


def test_every_exercise_has_a_solution_and_every_solution_runs_something():
    exercises = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", page_text(), re.MULTILINE)
    assert len(exercises) >= 6
    assert set(solutions()) == set(exercises)
    assert all("assert" in code for code in solutions().values())


@pytest.mark.parametrize("label", solutions())
def test_the_solution_passes_the_asserts_of_its_exercise(label, names):
    exec(compile(solutions()[label], label, "exec"), dict(names))
