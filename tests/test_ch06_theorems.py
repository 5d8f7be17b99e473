"""Chapter 6: every theorem against a computation that does not use it, and false variants of it.

A check is a function of the formula under test. The true formula must pass it and a false one
(a dropped term, a wrong constant, a missing hypothesis) must be rejected by the same check.
"""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats

from compresskit import affine, measure
from compresskit.methods import round_to_nearest

DB_PER_BIT = 20 * math.log10(2)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def mean_square_error(density, step, reach):
    """E e^2 of rounding to multiples of `step`, integrated cell by cell over |x| <= reach.

    In eighths of a step, so that a kink of the density sits at an end point.
    """
    ends = np.arange(-8 * math.ceil(reach / step) - 4, 8 * math.ceil(reach / step) + 5) * step / 8
    middle, half = (ends[1:] + ends[:-1]) / 2, step / 16
    x = middle[:, None] + half * NODES
    error = step * np.round(x / step) - x
    return half * (WEIGHTS * error**2 * density(x)).sum()


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


# --- |e| <= step/2, and where -------------------------------------------------------------------


def check_granular_range(granular):
    """`granular(x, low, high, step)` says where round-and-clip is within step/2; exact."""
    for low, high, step in [(-2, 1, Fraction(1)), (0, 3, Fraction(1, 3)), (-8, 7, Fraction(3, 8))]:
        levels = [step * i for i in range(low, high + 1)]
        for x in (step * Fraction(i, 8) for i in range(8 * low - 24, 8 * high + 25)):
            error = abs(step * min(max(round(x / step), low), high) - x)
            assert error == min(abs(level - x) for level in levels)  # brute force
            assert (error <= step / 2) == granular(x, low, high, step)
            if x > (high + Fraction(1, 2)) * step:
                assert error == x - high * step
            if x < (low - Fraction(1, 2)) * step:
                assert error == low * step - x


@pytest.mark.theorem("thm-granular")
def test_the_error_is_at_most_half_a_step_exactly_within_half_a_step_of_the_end_levels():
    check_granular_range(
        lambda x, lo, hi, d: (lo - Fraction(1, 2)) * d <= x <= (hi + Fraction(1, 2)) * d
    )


@pytest.mark.false_variant("thm-granular")
def test_the_granular_range_neither_ends_at_the_end_levels_nor_a_full_step_beyond_them():
    rejects(check_granular_range, lambda x, lo, hi, d: lo * d <= x <= hi * d)
    rejects(check_granular_range, lambda x, lo, hi, d: (lo - 1) * d <= x <= (hi + 1) * d)


def check_finest_step(step_of):
    """`step_of(bits)`: the finest step, absmax = 1, at which levels -2^(b-1)..2^(b-1)-1 suffice."""
    for bits in range(2, 9):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        x = [Fraction(i, 1000) for i in range(-1000, 1001)]

        def worst(step, low=low, high=high, x=x):
            return max(abs(step * min(max(round(v / step), low), high) - v) for v in x)

        step = step_of(bits)
        finer = step * Fraction(999, 1000)
        assert worst(step) <= step / 2
        assert worst(finer) > finer / 2


@pytest.mark.theorem("prop-minmax-step")
def test_absmax_over_half_an_integer_is_the_finest_step_that_keeps_weights_within_half_a_step():
    check_finest_step(lambda bits: 1 / (2 ** (bits - 1) - Fraction(1, 2)))


@pytest.mark.false_variant("prop-minmax-step")
def test_neither_the_common_step_nor_the_mid_rise_step_is_the_finest_of_a_grid_with_zero():
    rejects(check_finest_step, lambda bits: Fraction(1, 2 ** (bits - 1) - 1))
    rejects(check_finest_step, lambda bits: Fraction(1, 2 ** (bits - 1)))


@pytest.mark.theorem("prop-minmax-step")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_on_a_uniform_source_all_three_conventions_have_an_error_of_step_squared_over_twelve(bits):
    half = 2 ** (bits - 1)
    for step, offset in [(1 / (half - 1), 0.0), (1 / (half - 0.5), 0.0), (1 / half, 0.5)]:
        k = np.arange(-4 * half, 4 * half + 1) / 4  # borders of quarter cells
        ends = np.unique(np.clip(k * step, -1, 1))
        x = (ends[1:] + ends[:-1])[:, None] / 2 + (ends[1:] - ends[:-1])[:, None] / 2 * NODES
        error = step * (np.round(x / step - offset) + offset) - x
        mse = (np.diff(ends)[:, None] / 4 * WEIGHTS * error**2).sum()  # density 1/2 on [-1, 1]
        assert mse == pytest.approx(step**2 / 12, rel=1e-12)


# --- zero points and integer arithmetic ---------------------------------------------------------


def check_zero_point(decode, *, inflate=1.0, extend=True):
    """Zero is exact and |e| <= step/2 on the whole range, for many ranges and widths."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        bits = int(rng.integers(1, 9))
        low, high = np.sort(rng.normal(size=2) * rng.choice([0.1, 1, 10]) + rng.choice([-3, 0, 3]))
        if extend:
            low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / (2**bits - 1) * (1 + (inflate - 1) * rng.random())
        x = np.concatenate([np.linspace(low, high, 401), [0.0] if extend else []])
        zero = np.clip(np.round(-low / step), 0, 2**bits - 1)
        level = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
        error = np.abs(decode(step, level, zero) - x)
        assert error.max() <= step / 2 * (1 + 1e-10)  # float64 rounding of x / step
        assert not extend or error[-1] == 0


@pytest.mark.theorem("thm-zero-point")
@pytest.mark.parametrize("inflate", [1.0, 1.3])
def test_a_rounded_zero_point_keeps_zero_exact_and_the_bound_half_a_step(inflate):
    check_zero_point(lambda step, level, zero: step * (level - zero), inflate=inflate)


@pytest.mark.false_variant("thm-zero-point")
def test_a_step_rounded_down_a_range_without_zero_or_a_misplaced_zero_break_the_bound():
    def right(step, level, zero):
        return step * (level - zero)

    with pytest.raises(AssertionError):
        check_zero_point(right, inflate=0.9)
    with pytest.raises(AssertionError):
        check_zero_point(right, extend=False)
    rejects(check_zero_point, lambda step, level, zero: step * level - zero)


def check_integer_matmul(corrected):
    """`corrected(a, b, za, zb)` equals the product of the shifted integers, exactly."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 256, size=(5, 384)), rng.integers(0, 256, size=(384, 7))
    za, zb = rng.integers(0, 256, size=(5, 1)), rng.integers(0, 256, size=(1, 7))
    direct = np.array(
        [
            [
                sum(int(x - z) * int(y - w) for x, y in zip(row, column, strict=True))
                for column, w in zip(b.T, zb[0], strict=True)
            ]
            for row, z in zip(a, za[:, 0], strict=True)
        ]
    )
    np.testing.assert_array_equal(corrected(a, b, za, zb), direct)


@pytest.mark.theorem("prop-integer-matmul")
def test_the_integer_product_with_zero_points_needs_two_sums_and_a_constant():
    check_integer_matmul(
        lambda a, b, za, zb: (
            a @ b - za * b.sum(0) - a.sum(1, keepdims=True) * zb + a.shape[1] * za * zb
        )
    )


@pytest.mark.false_variant("prop-integer-matmul")
def test_the_constant_of_the_integer_product_cannot_be_dropped():
    rejects(
        check_integer_matmul,
        lambda a, b, za, zb: a @ b - za * b.sum(0) - a.sum(1, keepdims=True) * zb,
    )


def check_accumulator(products):
    """A signed 32-bit sum holds `products` largest products of 8-bit levels and not one more."""
    largest = np.full(products + 1, 255, dtype=np.int32) ** 2
    sums = np.cumsum(largest, dtype=np.int32)  # wraps to a negative number when it is full
    assert (sums[:products] > 0).all()
    assert sums[products] < 0


@pytest.mark.theorem("prop-integer-matmul")
def test_a_32_bit_accumulator_holds_33025_products_of_8_bit_levels_and_not_one_more():
    check_accumulator(33025)


@pytest.mark.false_variant("prop-integer-matmul")
def test_a_32_bit_accumulator_holds_neither_2_to_the_15_nor_33026_products_at_most():
    rejects(check_accumulator, 2**15)
    rejects(check_accumulator, 33026)


# --- the law of the error -----------------------------------------------------------------------

SOURCES = {  # density, real part of the characteristic function, reach
    "gauss": (stats.norm.pdf, lambda u: np.exp(-(u**2) / 2), 12.0),
    "laplace": (stats.laplace.pdf, lambda u: 1 / (1 + u**2), 45.0),
    "shifted": (
        lambda x: stats.norm.pdf(x, 0.3, 0.5),
        lambda u: np.cos(0.3 * u) * np.exp(-(u**2) / 8),
        8.0,
    ),
    "triangle": (
        lambda x: np.maximum(0, 1 - np.abs(x)),
        lambda u: np.sinc(u / 2 / np.pi) ** 2,
        1.0,
    ),
}


def sripad_snyder(cf, step, terms=200_000):
    k = np.arange(1, terms + 1)
    series = ((-1.0) ** k / k**2 * cf(2 * np.pi * k / step))[::-1].sum()
    return step**2 / 12 + step**2 / np.pi**2 * series


def check_error_series(formula):
    for density, cf, reach in SOURCES.values():
        for step in (0.5, 1.0, 2.0, 4.0):  # kinks at multiples of step / 8
            exact = mean_square_error(density, step, reach)
            assert formula(cf, step) == pytest.approx(exact, rel=1e-12)


@pytest.mark.theorem("thm-sripad-snyder")
def test_the_series_gives_the_mean_square_error_of_four_laws_to_twelve_digits():
    check_error_series(sripad_snyder)


@pytest.mark.false_variant("thm-sripad-snyder")
def test_neither_step_squared_over_twelve_nor_a_series_without_signs_gives_it():
    rejects(check_error_series, lambda cf, step: step**2 / 12)
    k = np.arange(1, 200_001)  # as many terms as the true one
    rejects(
        check_error_series,
        lambda cf, step: (
            step**2 / 12 + step**2 / np.pi**2 * (cf(2 * np.pi * k / step) / k**2).sum()
        ),
    )


@pytest.mark.theorem("thm-sripad-snyder")
def test_the_series_holds_for_a_finite_sample_which_has_no_density():
    sample, step, terms = np.random.default_rng(2).standard_t(4, size=200), 1.7, 20_000
    error = step * np.round(sample / step) - sample
    k = np.arange(1, terms + 1)
    series = ((-1.0) ** k / k**2 * np.cos(2 * np.pi * np.outer(sample, k) / step)).sum() / len(
        sample
    )
    # what is cut off is at most step^2/pi^2 times sum of 1/k^2 over k > terms
    tail = step**2 / np.pi**2 / terms
    assert abs(step**2 / 12 + step**2 / np.pi**2 * series - np.mean(error**2)) <= tail


def vanishes(cf, step):
    """Part 2's condition for one law: phi(2 pi k / step) = 0 for k = 1, ..., 50."""
    return np.abs(cf(2 * np.pi * np.arange(1, 51) / step)).max() < 1e-15


def check_uniform_criterion(criterion):
    """`criterion(cf, step)` says whether e is uniform, for laws and steps of either kind."""

    def triangle(h):
        return (
            lambda x: np.maximum(0, 1 - np.abs(x) / h) / h,
            lambda u: np.sinc(u * h / 2 / np.pi) ** 2,
        )

    def box(h):
        return lambda x: (np.abs(x) < h) / (2 * h), lambda u: np.sinc(u * h / np.pi)

    gauss = SOURCES["gauss"][:2]
    points = np.linspace(-0.499, 0.499, 200)  # none on the edge of a box
    seen = set()
    for density, cf in (triangle(1), box(1.5), triangle(1.2), box(1.3), box(0.25), gauss):
        for step in (0.5, 1.0, 2.0):
            folded = step * sum(density(step * (n - points)) for n in range(-60, 61))
            uniform = bool(np.abs(folded - 1).max() < 1e-12)
            assert criterion(cf, step) == uniform
            seen.add(uniform)
    assert seen == {True, False}


@pytest.mark.theorem("thm-sripad-snyder")
def test_the_error_is_uniform_exactly_if_the_characteristic_function_vanishes_at_2_pi_k_over_step():
    check_uniform_criterion(vanishes)


@pytest.mark.false_variant("thm-sripad-snyder")
def test_neither_the_first_frequency_alone_nor_half_of_them_nor_small_values_decide():
    rejects(check_uniform_criterion, lambda cf, step: vanishes(cf, 2 * step))
    rejects(check_uniform_criterion, lambda cf, step: vanishes(cf, step / 2))
    rejects(check_uniform_criterion, lambda cf, step: abs(cf(2 * np.pi / step)) < 1e-2)


def check_gaussian_correlation(formula):
    for step in (1.0, 2.0, 3.0, 4.0):
        ends = np.arange(-80, 81) * step / 2
        x = ((ends[1:] + ends[:-1]) / 2)[:, None] + step / 4 * NODES
        error = step * np.round(x / step) - x
        exact = step / 4 * (WEIGHTS * x * error * stats.norm.pdf(x)).sum()
        assert formula(step) == pytest.approx(exact, rel=1e-9, abs=1e-14)


def gaussian_terms(step):
    k = np.arange(1, 40)
    return (-1.0) ** k * np.exp(-2 * np.pi**2 * k**2 / step**2)


@pytest.mark.theorem("cor-gaussian-error")
def test_the_error_of_a_gaussian_is_correlated_with_it_by_twice_the_alternating_sum():
    check_gaussian_correlation(lambda step: 2 * gaussian_terms(step).sum())


@pytest.mark.false_variant("cor-gaussian-error")
def test_the_error_of_a_gaussian_is_not_uncorrelated_and_the_factor_is_two():
    rejects(check_gaussian_correlation, lambda step: 0.0)
    rejects(check_gaussian_correlation, lambda step: gaussian_terms(step).sum())


def check_one_percent_rule(widest):
    """Delta^2/12 is right within 1 % for a Gaussian up to a step of `widest` sigmas."""
    for step in np.linspace(0.2, widest, 50):
        assert abs(mean_square_error(stats.norm.pdf, step, 12) / (step**2 / 12) - 1) <= 0.01


@pytest.mark.theorem("cor-gaussian-error")
def test_a_gaussian_obeys_step_squared_over_twelve_within_one_percent_up_to_two_sigmas():
    check_one_percent_rule(2.0)


@pytest.mark.false_variant("cor-gaussian-error")
def test_a_gaussian_does_not_obey_it_up_to_three_sigmas():
    rejects(check_one_percent_rule, 3.0)


# --- decibels per bit ---------------------------------------------------------------------------


def check_uniform_source(sqnr_db):
    for bits in range(1, 9):
        n, step = 2**bits, 2 / 2**bits
        x = -1 + step * (np.arange(n)[:, None] + 0.5 + NODES / 2)  # cell by cell
        error = step * (np.floor(x / step) + 0.5) - x
        mse = step / 4 * (WEIGHTS * error**2).sum()
        assert sqnr_db(bits, math.sqrt(3)) == pytest.approx(10 * math.log10(1 / 3 / mse), abs=1e-9)


@pytest.mark.theorem("thm-six-db")
def test_a_uniform_source_gains_exactly_20_log_2_decibels_a_bit():
    check_uniform_source(lambda bits, loading: DB_PER_BIT * bits + 10 * math.log10(3 / loading**2))


@pytest.mark.false_variant("thm-six-db")
def test_six_decibels_flat_or_a_missing_constant_are_noticed():
    rejects(check_uniform_source, lambda bits, loading: 6 * bits + 10 * math.log10(3 / loading**2))
    rejects(
        check_uniform_source, lambda bits, loading: DB_PER_BIT * bits - 20 * math.log10(loading)
    )


@pytest.mark.theorem("thm-six-db")
def test_at_a_fixed_loading_factor_a_gaussian_follows_the_law_as_long_as_nothing_is_clipped():
    loading = 7.0
    for bits in (4, 6, 8):  # step/sigma: 0.875 and finer, where step^2/12 is good to 1e-10
        measured = -10 * math.log10(mean_square_error(stats.norm.pdf, 2 * loading / 2**bits, 12))
        assert measured == pytest.approx(
            DB_PER_BIT * bits + 10 * math.log10(3 / loading**2), abs=1e-6
        )


# --- clipping -----------------------------------------------------------------------------------


def overload(density, clip):
    return 2 * integrate.quad(lambda x: (x - clip) ** 2 * density(x), clip, np.inf, epsabs=0)[0]


def distortion(density, clip, bits):
    return clip**2 / (3 * 4**bits) + overload(density, clip)


def gaussian_distortion(clip, bits):
    tail = (1 + clip**2) * stats.norm.sf(clip) - clip * stats.norm.pdf(clip)
    return clip**2 / (3 * 4**bits) + 2 * tail


def laplace_distortion(clip, bits):
    return clip**2 / (3 * 4**bits) + 2 * math.exp(-clip)


def best_clip(function, bits):
    found = optimize.minimize_scalar(
        lambda c: function(c, bits), bounds=(0.01, 30), method="bounded", options={"xatol": 1e-9}
    )
    return found.x, found.fun


def gaussian_clip(bits, constant=6):
    return optimize.brentq(
        lambda k: stats.norm.pdf(k) - k * stats.norm.sf(k) - k / (constant * 4**bits), 0.05, 12
    )


def check_gaussian_clip(clip_of):
    for bits in (2, 3, 4, 6, 8):
        best, value = best_clip(gaussian_distortion, bits)
        assert clip_of(bits) == pytest.approx(best, rel=1e-4)  # a minimum is flat: sqrt(eps)
        assert distortion(stats.norm.pdf, clip_of(bits), bits) == pytest.approx(value, rel=1e-7)


@pytest.mark.theorem("thm-clip")
def test_the_root_of_the_clip_equation_minimises_the_distortion_of_a_gaussian():
    check_gaussian_clip(gaussian_clip)


@pytest.mark.false_variant("thm-clip")
def test_another_constant_in_the_clip_equation_does_not():
    rejects(check_gaussian_clip, lambda bits: gaussian_clip(bits, constant=3))
    rejects(check_gaussian_clip, lambda bits: gaussian_clip(bits, constant=12))


def check_convex(error):
    """Second differences of `error(clip)` are positive on an even grid of clips."""
    assert (np.diff([error(c) for c in np.linspace(0.2, 4, 60)], 2) > 0).all()


@pytest.mark.theorem("thm-clip")
@pytest.mark.parametrize("density", [stats.norm.pdf, stats.laplace.pdf, stats.t(4).pdf])
def test_granular_plus_overload_distortion_is_convex_in_the_clip(density):
    check_convex(lambda clip: distortion(density, clip, 3))


@pytest.mark.false_variant("thm-clip")
def test_the_true_error_of_real_grids_is_not_convex_in_the_clip():
    """The theorem is about the high-resolution model. A finite sample has kinks and dips."""
    sample = np.random.default_rng(3).normal(size=64)

    def error(clip):
        step = clip / 3.5
        return np.mean((step * np.clip(np.round(sample / step), -4, 3) - sample) ** 2)

    rejects(check_convex, error)


def check_laplace_clip(clip_of):
    for bits in (2, 3, 4, 8):
        assert clip_of(bits) == pytest.approx(best_clip(laplace_distortion, bits)[0], rel=1e-4)


@pytest.mark.theorem("cor-laplace-clip")
def test_the_best_clip_of_a_laplace_source_is_lambert_w_of_three_times_four_to_the_bits():
    check_laplace_clip(lambda bits: special.lambertw(3 * 4**bits).real)


@pytest.mark.false_variant("cor-laplace-clip")
def test_lambert_w_of_another_multiple_is_not():
    rejects(check_laplace_clip, lambda bits: special.lambertw(6 * 4**bits).real)
    rejects(check_laplace_clip, lambda bits: math.log(3 * 4**bits))


@pytest.mark.theorem("cor-laplace-clip")
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_least_distortion_of_a_laplace_source_is_tau_plus_two_times_exp_minus_tau(bits):
    tau = special.lambertw(3 * 4**bits).real
    assert best_clip(laplace_distortion, bits)[1] == pytest.approx(
        (tau + 2) * math.exp(-tau), rel=1e-9
    )
    assert overload(stats.laplace.pdf, tau) == pytest.approx(2 * math.exp(-tau), rel=1e-7)


def check_slope(slope_of):
    """`slope_of(granular share)` is the gain in dB per bit at the optimal clip."""
    h = 1e-3
    for function in (gaussian_distortion, laplace_distortion):
        for bits in (2, 4, 6, 8):
            down, up = (best_clip(function, bits + d)[1] for d in (-h, h))
            clip, value = best_clip(function, bits)
            share = clip**2 / (3 * 4**bits) / value
            # central difference: truncation of order h^2, minima good to 1e-12
            assert slope_of(share) == pytest.approx(10 * math.log10(down / up) / (2 * h), rel=1e-4)


@pytest.mark.theorem("thm-slope")
def test_at_the_optimal_clip_a_bit_is_worth_six_decibels_times_the_granular_share():
    check_slope(lambda share: DB_PER_BIT * share)


@pytest.mark.false_variant("thm-slope")
def test_at_the_optimal_clip_a_bit_is_not_worth_six_decibels():
    rejects(check_slope, lambda share: DB_PER_BIT)
    rejects(check_slope, lambda share: DB_PER_BIT * (1 - share))


# --- groups -------------------------------------------------------------------------------------


def mean_square_maximum(n):
    """E max_i X_i^2 of n standard Gaussians, by integrating P(max^2 > t)."""
    return integrate.quad(
        lambda t: -np.expm1(n * np.log(special.erf(math.sqrt(t / 2)))), 1e-300, 90, limit=500
    )[0]


def check_maximum(bound):
    for n in (1, 2, 8, 32, 128, 1024, 10**6):
        assert mean_square_maximum(n) <= bound(n) <= mean_square_maximum(n) + 5


@pytest.mark.theorem("thm-max")
def test_the_squared_maximum_of_n_gaussians_is_on_average_at_most_two_plus_two_log_n():
    check_maximum(lambda n: 2 + 2 * math.log(n))


@pytest.mark.false_variant("thm-max")
def test_neither_the_two_nor_the_factor_of_the_logarithm_can_be_dropped():
    rejects(check_maximum, lambda n: 2 * math.log(n))
    rejects(check_maximum, lambda n: 2 + math.log(n))


@pytest.mark.theorem("thm-max")
def test_the_mean_square_maximum_agrees_with_a_sample():
    x = np.random.default_rng(4).normal(size=(20_000, 32))
    squares = np.square(x).max(1)
    five_errors = 5 * squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean() - mean_square_maximum(32)) < five_errors


def check_group_size(size_of):
    """`size_of(side)` minimises 10 log10(2 + 2 ln g) dB + 6.02 side/g dB over real g >= side."""
    for side in (8, 16, 20, 32):

        def cost(g, side=side):
            return 10 * math.log10(2 + 2 * math.log(g)) + DB_PER_BIT * side / g

        best = optimize.minimize_scalar(
            cost, bounds=(side, 4000), method="bounded", options={"xatol": 1e-6}
        ).x
        assert size_of(side) == pytest.approx(best, rel=1e-3)  # the minimum is very flat


def group_size(side, factor=2.0):
    a = factor * math.log(2) * side
    return -a * special.lambertw(-1 / (a * math.e), -1).real


@pytest.mark.theorem("prop-group-size")
def test_the_best_group_size_solves_g_equals_two_ln_two_side_times_one_plus_ln_g():
    check_group_size(group_size)
    a = 2 * math.log(2) * 16
    assert group_size(16) == pytest.approx(a * (1 + math.log(group_size(16))), rel=1e-12)


@pytest.mark.false_variant("prop-group-size")
def test_the_best_group_size_is_not_found_with_ln_two_alone_nor_on_the_other_branch():
    rejects(check_group_size, lambda side: group_size(side, factor=1.0))

    def other_branch(side):
        a = 2 * math.log(2) * side
        return -a * special.lambertw(-1 / (a * math.e), 0).real

    rejects(check_group_size, other_branch)


# --- the page's own solutions -------------------------------------------------------------------

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_uniform_quantizer.ipynb"


def solutions():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = re.findall(r"````\{solution\} (\S+)\n(.*?)\n````", text, re.DOTALL)
    return {
        label: "\n".join(re.findall(r"```python\n(.*?)```", body, re.DOTALL))
        for label, body in found
    }


def test_every_exercise_has_a_solution_and_every_solution_runs_something():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    exercises = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", text, re.MULTILINE)
    assert len(exercises) >= 6
    assert set(solutions()) == set(exercises)
    assert all("assert" in code for code in solutions().values())


@pytest.mark.parametrize("label", solutions())
def test_the_solution_passes_the_asserts_of_its_exercise(label):
    code = solutions()[label]
    names = {
        "np": np,
        "math": math,
        "torch": torch,
        "affine": affine,
        "measure": measure,
        "QuantSpec": affine.QuantSpec,
        "round_to_nearest": round_to_nearest,
    }
    exec(compile(code, label, "exec"), names)
