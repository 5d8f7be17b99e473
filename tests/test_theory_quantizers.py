import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, stats

from compresskit.theory import (
    SPACE_FILLING_BITS,
    SPACE_FILLING_DB,
    bennett_integral,
    entropy,
    entropy_coded_uniform,
    gaussian_rate,
    lloyd_max_quantizer,
    panter_dite,
    quantizer_distortion,
)

NORMAL = stats.norm()
LAWS = {
    "normal": NORMAL,
    "shifted normal": stats.norm(5, 0.01),
    "laplace": stats.laplace(scale=3),
    "uniform": stats.uniform(-1, 2),
    "logistic": stats.logistic(),
    "exponential": stats.expon(),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


@pytest.mark.parametrize(
    ("levels", "distortion", "outermost"),
    [(2, 0.3634, 0.7980), (4, 0.1175, 1.510), (8, 0.03454, 2.152), (16, 0.009497, 2.733)],
)
def test_the_tables_of_max_1960(levels, distortion, outermost):
    found = lloyd_max_quantizer(NORMAL, levels)
    assert found.distortion == pytest.approx(distortion, rel=6e-4)  # four digits, the last one off
    assert found.values[-1] == pytest.approx(outermost, abs=6e-4)


def test_two_levels_of_a_normal_are_known_in_closed_form():
    found = lloyd_max_quantizer(stats.norm(scale=3), 2)
    np.testing.assert_allclose(found.values, 3 * math.sqrt(2 / math.pi) * np.array([-1, 1]))
    assert found.distortion == pytest.approx(9 * (1 - 2 / math.pi))


@every_law
@pytest.mark.parametrize("levels", [1, 2, 3, 16, 100])
def test_both_conditions_hold_by_another_quadrature(law, levels):
    found = lloyd_max_quantizer(law, levels)
    ends = [law.support()[0], *found.thresholds, law.support()[1]]
    np.testing.assert_array_equal(found.thresholds, (found.values[1:] + found.values[:-1]) / 2)
    for i in {0, levels // 2, levels - 1}:
        mass = law.cdf(ends[i + 1]) - law.cdf(ends[i])
        a, b = max(ends[i], law.ppf(1e-20)), min(ends[i + 1], law.isf(1e-20))
        points = [law.median()] if a < law.median() < b else None
        moment = integrate.quad(lambda x: x * law.pdf(x), a, b, points=points, limit=200)[0]
        assert found.values[i] == pytest.approx(moment / mass, abs=1e-7 * law.std())
        assert found.probabilities[i] == pytest.approx(mass, rel=1e-9)


@every_law
def test_the_distortion_is_the_variance_less_that_of_the_levels(law):
    for levels in (1, 5, 64):
        found = lloyd_max_quantizer(law, levels)
        spread = found.probabilities @ (found.values - law.mean()) ** 2
        assert found.distortion == pytest.approx(law.var() - spread, abs=1e-12 * law.var())


@every_law
def test_moving_any_level_makes_it_worse(law):
    found = lloyd_max_quantizer(law, 6)
    for i in range(6):
        for sign in (-1, 1):
            moved = found.values.copy()
            moved[i] += sign * 1e-3 * law.std()
            assert quantizer_distortion(law, moved) > found.distortion


def test_a_uniform_law_gets_a_uniform_grid():
    found = lloyd_max_quantizer(stats.uniform(), 8)
    np.testing.assert_allclose(found.values, (np.arange(8) + 0.5) / 8, atol=1e-14)
    assert found.distortion == pytest.approx(1 / 768)


def test_the_distortion_is_that_of_a_sample():
    values = np.array([2.0, -1.0, 0.3])
    x = np.random.default_rng(0).normal(size=400_000)
    sample = np.min((x[:, None] - values) ** 2, axis=1)
    slack = 4 * sample.std() / math.sqrt(len(x))
    assert abs(quantizer_distortion(NORMAL, values) - sample.mean()) < slack


@pytest.mark.parametrize(
    ("law", "constant"),
    [
        (stats.norm(scale=2), 4 * math.sqrt(3) * math.pi / 2),
        (stats.laplace(scale=1 / math.sqrt(2)), 4.5),  # 27 * 4 b^2 / 12 at b^2 = 1/2
        (stats.uniform(0, 3), 9 / 12),
    ],
)
def test_panter_dite_in_closed_form(law, constant):
    assert panter_dite(law, 1) == pytest.approx(constant, rel=1e-8)
    assert panter_dite(law, [1, 16]).tolist() == pytest.approx([constant, constant / 256], rel=1e-8)


@every_law
def test_lloyd_max_approaches_panter_dite(law):
    short = [1 - lloyd_max_quantizer(law, k).distortion / panter_dite(law, k) for k in (64, 128)]
    assert abs(short[0]) < 0.04
    assert abs(short[1]) <= 0.55 * abs(short[0]) + 1e-10  # it closes as 1/k


def test_bennetts_integral_is_least_at_the_cube_root():
    best = bennett_integral(NORMAL, stats.norm(scale=math.sqrt(3)).pdf, 16)
    assert best == pytest.approx(panter_dite(NORMAL, 16), rel=1e-9)
    for scale in (1.5, 1.7, 1.8, 3):
        found = bennett_integral(NORMAL, stats.norm(scale=scale).pdf, 16)
        exact = scale**3 * math.sqrt(2 * math.pi / (scale**2 - 2)) * math.sqrt(2 * math.pi) / 3072
        assert best < found < math.inf
        assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("scale", [1, 1.4, math.sqrt(2)])
def test_bennetts_integral_diverges_where_the_points_are_too_dense_in_the_middle(scale):
    assert bennett_integral(NORMAL, stats.norm(scale=scale).pdf, 16) == math.inf


@pytest.mark.parametrize("step", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_coded_grid_by_direct_summation(step, shift):
    i = np.arange(-200, 201)
    low, high = ((i + shift + h) * step for h in (-0.5, 0.5))
    p = np.where(i < 0, NORMAL.cdf(high) - NORMAL.cdf(low), NORMAL.sf(low) - NORMAL.sf(high))
    first = NORMAL.pdf(low) - NORMAL.pdf(high)  # E[X; cell]
    second = p + low * NORMAL.pdf(low) - high * NORMAL.pdf(high)
    y = (i + shift) * step
    found = entropy_coded_uniform(NORMAL, step, shift=shift)
    assert found.rate == pytest.approx(entropy(p / p.sum()), rel=1e-10)
    assert found.distortion == pytest.approx((second - 2 * y * first + y * y * p).sum(), rel=1e-9)
    centered = entropy_coded_uniform(NORMAL, step, shift=shift, decode="centroid")
    kept = (first[p > 1e-15] ** 2 / p[p > 1e-15]).sum()
    assert centered.distortion == pytest.approx(1 - kept, rel=1e-9)


def test_the_gap_of_the_coded_grid_tends_to_the_constant_from_above():
    gaps = []
    for step in (1.0, 0.5, 0.25, 0.125):
        rate, distortion = entropy_coded_uniform(NORMAL, step)
        gaps.append(rate - gaussian_rate(distortion, 1.0) - SPACE_FILLING_BITS)
    assert gaps[-1] == pytest.approx(0, abs=1e-3)
    assert all(3.8 < a / b < 4.2 for a, b in pairwise(gaps))  # as the square


def test_the_constants_are_one_in_two_units():
    assert SPACE_FILLING_DB == pytest.approx(20 * math.log10(2) * SPACE_FILLING_BITS)
    assert (round(SPACE_FILLING_BITS, 4), round(SPACE_FILLING_DB, 3)) == (0.2546, 1.533)


REFUSED = {
    "levels=0": lambda: lloyd_max_quantizer(NORMAL, 0),
    "levels=2.0": lambda: lloyd_max_quantizer(NORMAL, 2.0),
    "variance inf": lambda: lloyd_max_quantizer(stats.t(1.5), 4),
    "not integrable": lambda: panter_dite(stats.t(2), 4),
    "or barely.*such as laplace": lambda: panter_dite(stats.t(3), 4),
    "levels=-3.0; .*16": lambda: panter_dite(NORMAL, -3),
    "levels=0.0; .*16": lambda: panter_dite(NORMAL, 0),
    r"levels=\[16. inf\]; .*16": lambda: panter_dite(NORMAL, [16, math.inf]),
    "levels=0.0; give": lambda: bennett_integral(NORMAL, stats.norm(scale=2).pdf, 0),
    "infinite at 0.0": lambda: lloyd_max_quantizer(stats.beta(0.5, 0.5), 2),
    "infinite at 1.0, .*such as norm": lambda: panter_dite(stats.beta(1, 0.5), 2),
    "infinite at 0.0, an end": lambda: quantizer_distortion(stats.gamma(0.5), [0.2, 0.7]),
    "infinite at 0.0, .*bounded": lambda: bennett_integral(stats.gamma(0.5), stats.expon.pdf, 4),
    "infinite at 0.0, .*norm": lambda: entropy_coded_uniform(stats.beta(0.5, 0.5), 0.1),
    "values has shape": lambda: quantizer_distortion(NORMAL, []),
    "infinite number": lambda: quantizer_distortion(NORMAL, [0.0, np.inf]),
    "step=0": lambda: entropy_coded_uniform(NORMAL, 0.0),
    "step=nan": lambda: entropy_coded_uniform(NORMAL, math.nan),
    "step=inf; .*for instance 1": lambda: entropy_coded_uniform(NORMAL, math.inf),
    "shift=nan; .*0.5": lambda: entropy_coded_uniform(NORMAL, 1.0, shift=math.nan),
    "shift=inf": lambda: entropy_coded_uniform(NORMAL, 1.0, shift=math.inf),
    "decode='left'": lambda: entropy_coded_uniform(NORMAL, 1.0, decode="left"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_answer_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
