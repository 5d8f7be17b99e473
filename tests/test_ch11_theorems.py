"""Chapter 11: every theorem against a computation that does not use it, and false variants of it.

The quantizers here are the reference's formulas, written down once more in NumPy; that the
package's give the same bytes is tested in test_gguf_blocks.py.
"""

import itertools
from functools import cache

import numpy as np
import pytest
from scipy import stats

from compresskit.formats.gguf import TYPES
from compresskit.theory import absmax_block_error, minmax_block_error

HALF, SINGLE = np.float16, np.float32
NORMAL = stats.norm()


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def quantize(w, kind):
    """(blocks, 32) float32 -> the stored step, minimum and levels, as the reference makes them."""
    w = w.astype(SINGLE)
    least = np.zeros((len(w), 1), SINGLE)
    if kind in ("Q4_0", "Q5_0"):
        p = {"Q4_0": 8, "Q5_0": 16}[kind]
        step = np.take_along_axis(w, np.abs(w).argmax(1)[:, None], 1) / SINGLE(-p)
        levels = np.minimum(np.trunc(w * inverse(step) + SINGLE(p + 0.5)), 2 * p - 1) - p
    elif kind == "Q8_0":
        step = np.abs(w).max(1, keepdims=True) / SINGLE(127)
        levels = np.round(w * inverse(step))
    else:
        top = {"Q4_1": 15, "Q5_1": 31}[kind]
        least = w.min(1, keepdims=True)
        step = (w.max(1, keepdims=True) - least) / SINGLE(top)
        levels = np.minimum(np.trunc((w - least) * inverse(step) + SINGLE(0.5)), top)
    return step.astype(HALF), least.astype(HALF), levels


def inverse(step):
    return np.divide(SINGLE(1), step, out=np.zeros_like(step), where=step != 0)


def decode(step, least, levels):
    return step.astype(SINGLE) * levels.astype(SINGLE) + least.astype(SINGLE)


# --- the worst error ----------------------------------------------------------------------------

KINDS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 127}


def hard_blocks(kind, seed=0):
    """Blocks whose step lies anywhere between two float16, with weights near all thresholds."""
    p, rng = KINDS[kind], np.random.default_rng(seed)
    step = 2.0 ** rng.uniform(-6, 0, (4000, 1))
    w = step * (rng.integers(1 - p, p, (4000, 32)) + rng.choice([-0.499, 0.499], (4000, 32)))
    w[:, 0] = -p * step[:, 0]
    w[0, 1:3] = 0.999 * p * step[0]
    return w


def check_worst(bound):
    """`bound(p, beyond)` in steps holds for all weights, and is nearly reached by some.

    `beyond`: weights of the sign opposite to the largest, beyond the last threshold of Q4_0.
    """
    for kind, p in KINDS.items():
        w = hard_blocks(kind)
        step = np.abs(w).max(1, keepdims=True) / p
        error = np.abs(decode(*quantize(w, kind)) - w) / step
        last = p if kind == "Q8_0" else p - 1
        beyond = w / step > last + 0.5
        slack = 1e-4  # in steps: float32 has 2^-24 of 127 of them, twice
        assert (error[~beyond] <= bound(p, False) + slack).all()
        assert error[~beyond].max() > 0.98 * bound(p, False)
        if kind != "Q8_0":
            assert (error[beyond] <= bound(p, True) + slack).all()
            assert error[beyond].max() > 0.97 * bound(p, True)


@pytest.mark.theorem("prop-gguf-bound")
def test_half_a_step_is_exceeded_by_the_rounding_of_the_step():
    check_worst(lambda p, beyond: (1 if beyond else 0.5) + p / 2048)


@pytest.mark.false_variant("prop-gguf-bound")
def test_half_a_step_or_one_bound_for_all_weights_is_rejected():
    rejects(check_worst, lambda p, beyond: 1 if beyond else 0.5)
    rejects(check_worst, lambda p, beyond: 0.5 + p / 2048)
    rejects(check_worst, lambda p, beyond: 1 + p / 2048)


# --- the mean error -----------------------------------------------------------------------------


def check_mean(prediction):
    """`prediction(kind, B)` is the mean squared error of a Gaussian weight, the step not rounded.

    40,000 blocks of 32 or 4: five standard errors are 1 to 3 %; of 8 bits or 1 % of a step
    nothing is tested that a factor (B - 1) / B or the missing level would not change.
    """
    rng = np.random.default_rng(0)
    for kind, size in itertools.product(("Q4_0", "Q8_0", "Q4_1"), (4, 32)):
        x = rng.normal(size=(40_000, size))
        if kind == "Q4_1":
            least, step = x.min(1)[:, None], np.ptp(x, axis=1)[:, None] / 15
            error = least + step * np.round((x - least) / step) - x
        else:
            low, high = {"Q4_0": (-8, 7), "Q8_0": (-127, 127)}[kind]
            step = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1) / low
            error = step * np.clip(np.round(x / step), low, high) - x
        square = (error**2).mean(1)
        margin = 5 * square.std() / len(square) ** 0.5
        assert abs(square.mean() - prediction(kind, size)) < margin


def exact(kind, size):
    if kind == "Q4_1":
        return minmax_block_error(NORMAL, size, 15).exact
    return absmax_block_error(NORMAL, size, *{"Q4_0": (8, 7), "Q8_0": (127, 127)}[kind]).exact


@pytest.mark.theorem("thm-gguf-extremes")
def test_the_mean_error_is_an_average_over_the_extremes():
    check_mean(exact)


@pytest.mark.false_variant("thm-gguf-extremes")
def test_counting_the_extremes_themselves_or_a_full_grid_is_rejected():
    rejects(check_mean, lambda kind, size: exact(kind, size) * size / (size - 1))

    def one_extreme_only(kind, size):
        factor = (size - 1) / (size - 2) if kind == "Q4_1" else 1
        return exact(kind, size) * factor

    rejects(check_mean, one_extreme_only)

    def nothing_is_clipped(kind, size):
        if kind == "Q4_0":
            return absmax_block_error(NORMAL, size, 8, 8).exact
        return exact(kind, size)

    rejects(check_mean, nothing_is_clipped)


@pytest.mark.theorem("thm-gguf-extremes")
def test_given_its_extremes_a_block_is_iid():
    # The block's other weights over the largest one: their law given M, against that of a
    # truncated normal, by Kolmogorov's distance at 1.63 / sqrt(n) (1 % level).
    x = np.random.default_rng(1).normal(size=(200_000, 4))
    size = np.abs(x)
    largest = size.max(1)
    chosen = np.abs(largest - 1.5) < 0.01
    others = np.sort(x[chosen][size[chosen] < largest[chosen][:, None]])
    law = stats.truncnorm(-1.5, 1.5)
    assert stats.kstest(others, law.cdf).statistic < 1.63 / len(others) ** 0.5
    assert stats.kstest(others, NORMAL.cdf).statistic > 5 / len(others) ** 0.5


def check_variation(constant):
    """|int e^2 f - (step^2 / 12) int f| <= V step^3 times the constant, and it is reached."""
    rng, step = np.random.default_rng(2), 1.0
    x = (np.arange(24_000) + 0.5) / 4000 - 3  # six cells around -2.5, ..., 2.5: borders at integers
    e = np.round(x - 0.5) + 0.5 - x
    worst = 0.0
    for trial in range(300):
        cut = np.sort(rng.choice(np.r_[0.5 - 12**-0.5, 0.5 + 12**-0.5, rng.uniform(0, 1, 4)], 2))
        cut = cut + rng.integers(-3, 3, 2)
        height = rng.choice([0.0, 1.0, 3.0], 3) if trial else np.array([1.0, 0.0, 0.0])
        if not trial:
            cut = np.array([0.5 + 12**-0.5, 2.0])
        f = height[np.searchsorted(np.sort(cut), x)]
        variation = np.abs(np.diff(f)).sum()
        if variation:
            miss = abs(np.mean(e**2 * f) - step**2 / 12 * np.mean(f)) * 6
            assert miss <= constant * variation * (1 + 1e-3)
            worst = max(worst, miss / variation)
    assert worst > 0.999 * constant


@pytest.mark.theorem("lem-gguf-variation")
def test_a_density_of_small_variation_has_the_uniform_error():
    check_variation(1 / (36 * 3**0.5))


@pytest.mark.false_variant("lem-gguf-variation")
def test_half_or_twice_the_constant_is_rejected():
    rejects(check_variation, 1 / (72 * 3**0.5))
    rejects(check_variation, 1 / (18 * 3**0.5))


# --- the size of a block ------------------------------------------------------------------------

SIZES = (4, 8, 16, 32, 64, 128, 256)


@cache
def errors_by_size(name, steps):
    law = getattr(stats, name)()
    return np.array([minmax_block_error(law, g, steps).exact for g in SIZES])


def check_best_size(rule):
    """`rule(side, thresholds)` picks the power of two of least rate at equal error.

    `thresholds[i]` is size i times log2 of the ratio of errors when it is doubled.
    """
    for name, steps in (("norm", 3), ("norm", 15), ("laplace", 15)):
        error = errors_by_size(name, steps)
        sizes = np.array(SIZES)
        thresholds = sizes[:-1] * np.log2(error[1:] / error[:-1])
        assert (np.diff(thresholds) > 0).all()  # the hypothesis of part 3
        chosen = []
        for side in np.arange(5.4, 60, 0.7):
            # By hand: the levels that bring the error to 1e-3 for each size, plus the side bits.
            rate = 0.5 * np.log2(error / 1e-3) + side / sizes
            chosen.append(sizes[rate.argmin()])
            assert rule(side, thresholds) == chosen[-1]
        assert (np.diff(chosen) >= 0).all()
        assert len(set(chosen)) > 3


@pytest.mark.theorem("thm-gguf-block-size")
def test_the_best_size_lies_between_two_thresholds_and_grows_with_the_side_information():
    check_best_size(lambda side, thresholds: SIZES[np.sum(thresholds < side)])


@pytest.mark.false_variant("thm-gguf-block-size")
def test_thresholds_of_half_the_size_or_without_the_logarithm_s_base_are_rejected():
    rejects(check_best_size, lambda side, t: SIZES[np.sum(t / 2 < side)])
    rejects(check_best_size, lambda side, t: SIZES[np.sum(t * np.log(2) < side)])
    rejects(check_best_size, lambda side, t: SIZES[np.sum(t > side)])


# --- quantized twice ----------------------------------------------------------------------------

ENDS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127), "Q4_1": (0, 15), "Q5_1": (0, 31)}


def stored_blocks(kind, count=4000, seed=0):
    """Steps, minima and levels as a file may hold them: with the ends in use, and without."""
    rng = np.random.default_rng(seed)
    low, high = ENDS[kind]
    step = (2.0 ** rng.uniform(-13, 3, (count, 1))).astype(HALF)
    if low and kind != "Q8_0":
        step *= rng.choice([-1, 1], (count, 1)).astype(HALF)
    least = np.zeros((count, 1), HALF)
    if not low:
        ratio = rng.choice([-1, 1], (count, 1)) * 2.0 ** rng.uniform(-7.9, 11.9, (count, 1))
        least = (step.astype(float) * ratio).astype(HALF)
        least[np.abs(least) < 2.0**-14] = 0
        least[~np.isfinite(least)] = 0
    inner = rng.integers(0, 3, (count, 2))  # how far from the ends the levels stay
    levels = (
        low
        + inner[:, :1]
        + np.round(rng.random((count, 32)) * (high - low - inner.sum(1, keepdims=True)))
    )
    return step, least, levels


def check_comes_back(predicate):
    """Whether a stored block survives decoding and quantizing is what `predicate` says of it."""
    for kind in ENDS:
        block = stored_blocks(kind)
        again = quantize(decode(*block), kind)
        same = np.all([(a == b).all(1) for a, b in zip(block, again, strict=True)], axis=0)
        expected = np.array([predicate(kind, levels) for levels in block[2]])
        assert (same == expected).all()
        assert 20 < same.sum() < len(same) - 20


def both_ends(kind, levels):
    low, high = ENDS[kind]
    if kind == "Q8_0":
        return bool(np.abs(levels).max() == 127)
    if kind in ("Q4_0", "Q5_0"):
        return bool(levels.min() == low)
    return bool(levels.min() == low and levels.max() == high)


@pytest.mark.theorem("thm-gguf-idempotent")
def test_a_block_comes_back_byte_for_byte_just_when_its_end_levels_occur():
    check_comes_back(both_ends)


@pytest.mark.theorem("thm-gguf-idempotent")
@pytest.mark.parametrize("kind", ENDS)
def test_what_the_quantizer_wrote_comes_back(kind):
    w = np.random.default_rng(3).normal(0, 0.1, (4000, 32))
    block = quantize(w, kind)
    again = quantize(decode(*block), kind)
    assert all(np.array_equal(a, b) for a, b in zip(block, again, strict=True))


@pytest.mark.false_variant("thm-gguf-idempotent")
def test_one_end_any_end_or_always_are_rejected():
    rejects(check_comes_back, lambda kind, levels: True)
    rejects(check_comes_back, lambda kind, levels: bool(levels.min() == ENDS[kind][0]))
    rejects(check_comes_back, lambda kind, levels: bool(levels.max() == ENDS[kind][1]))
    rejects(
        check_comes_back,
        lambda kind, levels: bool(levels.min() == ENDS[kind][0] and levels.max() == ENDS[kind][1]),
    )


@pytest.mark.theorem("thm-gguf-idempotent")
def test_sums_that_float32_cannot_hold_do_lose_the_block():
    # |m| / d = 2^19, far beyond 2^12: 15 d + m is rounded.
    step = np.full((1, 1), 2.0**-13 * (1 + 2**-10), HALF)
    least = np.full((1, 1), 64.0 * (1 + 2**-10), HALF)
    levels = np.r_[0, 15, np.arange(30) % 16][None].astype(float)
    again = quantize(decode(step, least, levels), "Q4_1")
    assert not np.array_equal(again[0], step)


# --- scales of scales ---------------------------------------------------------------------------


def check_two_levels(bound):
    """`bound(L, eta, mu, step)` holds for every weight of the old range, and is reached."""
    rng = np.random.default_rng(4)
    reached = []
    for top in (3, 15, 31):
        for _ in range(400):
            s, m = rng.uniform(0.5, 2), rng.uniform(0, 8)
            eta, mu = rng.choice([0, 0.02, 0.1]), rng.choice([0, 0.02, 0.3])
            step, least = s + rng.choice([-1, 1]) * eta, m + rng.choice([-1, 1]) * mu
            w = np.linspace(-m, top * s - m, 2001)
            levels = np.clip(np.round((w + least) / step), 0, top)
            error = np.abs(step * levels - least - w).max()
            limit = bound(top, eta, mu, step)
            assert error <= limit * (1 + 1e-9) + 1e-12
            if top * eta + mu > step / 2:
                reached.append(error / limit)
    assert max(reached) > 0.999


def worst_of_two(top, eta, mu, step):
    return max(step / 2, top * eta + mu)


@pytest.mark.theorem("thm-gguf-two-level")
def test_a_rounded_scale_moves_the_last_level_by_all_of_them():
    check_two_levels(worst_of_two)


@pytest.mark.false_variant("thm-gguf-two-level")
def test_half_a_step_alone_or_a_last_level_that_moves_by_one_error_is_rejected():
    rejects(check_two_levels, lambda top, eta, mu, step: step / 2)
    rejects(check_two_levels, lambda top, eta, mu, step: max(step / 2, eta + mu))
    rejects(check_two_levels, lambda top, eta, mu, step: max(step / 2, top * eta))
    rejects(check_two_levels, lambda top, eta, mu, step: step / 2 + top * eta + mu)


@pytest.mark.theorem("thm-gguf-two-level")
def test_a_scale_above_the_threshold_keeps_every_weight_within_half_a_step():
    rng = np.random.default_rng(5)
    inside = outside = 0
    for top, bits in ((3, 4), (15, 6), (31, 6), (15, 4)):
        for _ in range(300):
            s, m = rng.uniform(0.05, 1, 8), rng.uniform(0, top / 2, 8)
            d, dmin = s.max() / (2**bits - 1), m.max() / (2**bits - 1)
            step, least = d * np.round(s / d), dmin * np.round(m / dmin)
            threshold = (top * s.max() + m.max()) / (2**bits - 1)
            for j in np.flatnonzero(step > 0):
                w = np.linspace(-m[j], top * s[j] - m[j], 501)
                levels = np.clip(np.round((w + least[j]) / step[j]), 0, top)
                error = np.abs(step[j] * levels - least[j] - w).max()
                if step[j] >= threshold:
                    inside += 1
                    assert error <= step[j] / 2 * (1 + 1e-9)
                else:
                    outside += error > step[j] / 2 * (1 + 1e-9)
    assert inside > 1000
    assert outside > 100


@pytest.mark.theorem("thm-gguf-two-level")
def test_the_rates_are_those_of_the_formats():
    def rate(bits, size, side, extra):
        return bits + side / size + extra / 256

    expected = {
        "Q2_K": rate(2, 16, 4 + 4, 32),
        "Q3_K": rate(3, 16, 6, 16),
        "Q4_K": rate(4, 32, 6 + 6, 32),
        "Q5_K": rate(5, 32, 6 + 6, 32),
        "Q6_K": rate(6, 16, 8, 16),
    }
    assert expected == {name: TYPES[name].bits_per_weight for name in expected}
