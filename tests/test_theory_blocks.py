import math

import numpy as np
import pytest
from scipy import integrate, stats

from compresskit.theory import absmax_block_error, minmax_block_error

NORMAL = stats.norm()
SYMMETRIC = {
    "normal": NORMAL,
    "narrow": stats.norm(scale=0.02),
    "laplace": stats.laplace(),
    "uniform": stats.uniform(-1, 2),
    "t": stats.t(5),
}
FORMATS = {"Q4_0": (8, 7), "Q5_0": (16, 15), "Q8_0": (127, 127), "ternary": (1, 1)}


def blocks(law, size, count, seed=0):
    return law.rvs(size=(count, size), random_state=np.random.default_rng(seed))


def squares_absmax(x, below, above):
    largest = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    step = largest / -below
    return ((step * np.clip(np.round(x / step), -below, above) - x) ** 2).mean(1)


def squares_minmax(x, steps):
    least, step = x.min(1)[:, None], np.ptp(x, axis=1)[:, None] / steps
    return ((least + step * np.round((x - least) / step) - x) ** 2).mean(1)


def agrees(sample, exact):
    """Within five standard errors of the sample's mean."""
    return abs(sample.mean() - exact) < 5 * sample.std() / len(sample) ** 0.5


@pytest.mark.parametrize("law", SYMMETRIC.values(), ids=SYMMETRIC)
@pytest.mark.parametrize("levels", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("size", [2, 32])
def test_absmax_blocks_have_the_error_of_sampled_ones(law, levels, size):
    exact = absmax_block_error(law, size, *levels).exact
    assert agrees(squares_absmax(blocks(law, size, 20_000), *levels), exact)


@pytest.mark.parametrize("law", [*SYMMETRIC.values(), stats.expon(3)], ids=[*SYMMETRIC, "expon"])
@pytest.mark.parametrize("steps", [1, 3, 15])
@pytest.mark.parametrize("size", [3, 32])
def test_minmax_blocks_have_the_error_of_sampled_ones(law, steps, size):
    exact = minmax_block_error(law, size, steps).exact
    assert agrees(squares_minmax(blocks(law, size, 20_000), steps), exact)


@pytest.mark.parametrize("size", [2, 32, 4096])
def test_the_mean_square_of_the_largest_of_n_normals(size):
    # E M^2 by the tail formula: another integral, of another function.
    tail = integrate.quad(
        lambda t: -np.expm1(size * np.log(1 - 2 * stats.norm.sf(np.sqrt(t)))), 0, 90, limit=500
    )[0]
    found = absmax_block_error(NORMAL, size, 127, 127).high_resolution
    assert found * 12 * 127**2 * size / (size - 1) == pytest.approx(tail, rel=1e-6)


def test_two_uniform_weights_on_three_levels_by_hand():
    # Given the larger magnitude m the other weight is uniform on [-m, m], and the levels -m, 0, m
    # leave it an error that is uniform on [-m/2, m/2]: m^2 / 12. E m^2 = 1/2, over two weights.
    found = absmax_block_error(stats.uniform(-1, 2), 2, 1, 1)
    assert found.exact == pytest.approx(1 / 48, rel=1e-9)
    assert found.high_resolution == pytest.approx(1 / 48, rel=1e-9)


def test_three_uniform_weights_between_their_extremes_by_hand():
    # E (max - min)^2 of three uniform ones is 3/10; the middle one has range^2 / 12, over three.
    found = minmax_block_error(stats.uniform(), 3, 1)
    assert found.exact == pytest.approx(0.3 / 36, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_errors_scale_with_the_square_of_the_weights(scale):
    for function, counts in ((absmax_block_error, (8, 7)), (minmax_block_error, (15,))):
        one, other = (function(stats.norm(scale=s), 32, *counts) for s in (1, scale))
        np.testing.assert_allclose(np.array(other) / scale**2, one, rtol=1e-9)


def test_a_shift_does_not_matter_between_extremes():
    moved = minmax_block_error(stats.norm(7), 32, 15)
    np.testing.assert_allclose(moved, minmax_block_error(NORMAL, 32, 15), rtol=1e-9)


def test_the_missing_level_costs_two_percent_in_q4_0_and_nothing_in_a_full_grid():
    missing, full = (absmax_block_error(NORMAL, 32, 8, above) for above in (7, 8))
    assert missing.high_resolution == full.high_resolution
    assert missing.exact > 1.02 * full.exact
    assert full.exact == pytest.approx(full.high_resolution, rel=2e-3)


def test_sizes_levels_and_laws_that_cannot_be_are_refused():
    for size in (1, 32.0, True, -4):
        with pytest.raises(ValueError, match="at least 2, for instance 32"):
            absmax_block_error(NORMAL, size, 8, 7)
    with pytest.raises(ValueError, match="at least 3, for instance 32"):
        minmax_block_error(NORMAL, 2, 15)
    with pytest.raises(ValueError, match="below=0; it must be 1 to"):
        absmax_block_error(NORMAL, 32, 0, 0)
    with pytest.raises(ValueError, match="above=9; it must be 1 to 8, for instance 8"):
        absmax_block_error(NORMAL, 32, 8, 9)
    with pytest.raises(ValueError, match="steps=0; it must be 1 to"):
        minmax_block_error(NORMAL, 32, 0)
    for law in (stats.norm(1), stats.expon()):
        with pytest.raises(ValueError, match="give a symmetric one, such as norm"):
            absmax_block_error(law, 32, 8, 7)
    for function, counts in ((absmax_block_error, (8, 7)), (minmax_block_error, (15,))):
        with pytest.raises(ValueError, match="has no finite variance"):
            function(stats.cauchy(), 32, *counts)
    assert math.isfinite(minmax_block_error(stats.t(2.5), 32, 15).exact)
