from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from compresskit.theory import noisy_quantizer, oscillation, straight_through_bias

LEVELS = np.array([-2.0, -0.5, 0.0, 3.0])
THRESHOLDS = np.array([-1.0, -0.3, 1.0])
LAWS = {
    "normal": stats.norm(scale=0.7),
    "shifted": stats.norm(0.4, 0.7),
    "laplace": stats.laplace(scale=0.4),
    "uniform": stats.uniform(-0.6, 1.2),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
WEIGHTS = [-3.0, -0.81, 0.0, 0.23, 2.0]


def expectation(function, law, weight):
    """E function(Q(w + z)), integrated between the thresholds."""
    low, high = max(law.support()[0], -20), min(law.support()[1], 20)
    cuts = THRESHOLDS - weight
    ends = [low, *cuts[(cuts > low) & (cuts < high)], high]
    return sum(
        function(LEVELS[np.searchsorted(THRESHOLDS, weight + (a + b) / 2)])
        * integrate.quad(law.pdf, a, b, points=[0] if a < 0 < b else None)[0]
        for a, b in pairwise(ends)
    )


@every_law
def test_mean_and_variance_are_those_of_an_integral(law):
    for w in WEIGHTS:
        found = noisy_quantizer(w, law, levels=LEVELS, thresholds=THRESHOLDS)
        mean = expectation(lambda q: q, law, w)
        assert found.mean == pytest.approx(mean, abs=1e-8)  # that of quad
        square = expectation(lambda q: q * q, law, w)
        assert found.variance == pytest.approx(square - mean**2, abs=1e-7)


@every_law
def test_slopes_are_central_differences(law):
    h, given = 1e-6, {"levels": LEVELS, "thresholds": THRESHOLDS}
    for w in WEIGHTS:
        slopes = noisy_quantizer(w, law, **given)
        ahead, behind = (noisy_quantizer(w + d, law, **given) for d in (h, -h))
        # (1e-16 / h) of rounding, h^2 of curvature
        assert slopes.mean_slope == pytest.approx((ahead.mean - behind.mean) / 2 / h, abs=1e-7)
        change = (ahead.variance - behind.variance) / 2 / h
        assert slopes.variance_slope == pytest.approx(change, abs=1e-7)


@every_law
def test_the_gradient_is_a_central_difference_of_the_loss_and_the_other_one_is_not(law):
    given = {"levels": LEVELS, "thresholds": THRESHOLDS}
    h = 1e-6
    for w in WEIGHTS[1:4]:
        at = straight_through_bias(w, 0.4, law, **given)
        ahead, behind = (straight_through_bias(w + d, 0.4, law, **given).loss for d in (h, -h))
        assert at.gradient == pytest.approx((ahead - behind) / 2 / h, abs=1e-7)
        assert abs(at.straight_through - at.gradient) > 1e-3


def test_arrays_and_tensors_give_arrays_and_scalars_floats():
    given = {"levels": [-1, 1], "thresholds": [0]}
    one = noisy_quantizer(0.3, stats.norm(), **given)
    many = noisy_quantizer(torch.tensor([[0.3, 1.0]], dtype=torch.float64), stats.norm(), **given)
    assert all(type(x) is float for x in one)
    assert all(x.shape == (1, 2) for x in many)
    assert [x[0, 0] for x in many] == list(one)
    loss = straight_through_bias([0.3, 1.0], 0.5, stats.norm(), **given)
    assert all(x.shape == (2,) for x in loss)


def test_without_noise_near_a_threshold_there_is_neither_slope_nor_variance():
    narrow = stats.uniform(-0.1, 0.2)
    at = noisy_quantizer(0.5, narrow, levels=[-1, 1], thresholds=[0])
    assert at == (1.0, 0.0, 0.0, 0.0)


def test_the_shares_of_an_oscillation_make_the_target_their_mean():
    a, b, t = np.array([-1.0, 0.0]), np.array([2.0, 0.5]), np.array([0.5, 0.1])
    found = oscillation(a, b, t)
    np.testing.assert_allclose(found.lower * a + found.upper * b, t)
    np.testing.assert_allclose(found.lower + found.upper, 1)
    mean = found.lower * (a - t) ** 2 / 2 + found.upper * (b - t) ** 2 / 2
    np.testing.assert_allclose(found.loss, mean)
    assert (found.least <= found.loss).all()
    half = oscillation(0, 1, 0.5)
    assert half.loss == half.least


@pytest.mark.parametrize("target", [0.0, 1.0, 2.0, -1.0])
def test_a_target_that_is_not_between_the_levels_is_refused(target):
    with pytest.raises(ValueError, match="strictly between"):
        oscillation(0, 1, target)


@pytest.mark.parametrize(
    ("levels", "thresholds"),
    [
        ([1, -1], [0]),
        ([1], []),
        ([0, 1], [0, 1]),
        ([0, 0], [0]),
        ([0, 1, 2], [1, 0]),
        ([[0, 1]], [0]),
    ],
)
def test_a_staircase_that_does_not_rise_is_refused(levels, thresholds):
    with pytest.raises(ValueError, match="must rise"):
        noisy_quantizer(0.0, stats.norm(), levels=levels, thresholds=thresholds)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(bad):
    given = {"levels": [-1, 1], "thresholds": [0]}
    with pytest.raises(ValueError, match="weight"):
        noisy_quantizer([0.0, bad], stats.norm(), **given)
    with pytest.raises(ValueError, match="target"):
        straight_through_bias(0.0, bad, stats.norm(), **given)
    with pytest.raises(ValueError, match="levels"):
        noisy_quantizer(0.0, stats.norm(), levels=[0, bad], thresholds=[0])
    with pytest.raises(ValueError, match="upper"):
        oscillation(0, bad, 0.5)
