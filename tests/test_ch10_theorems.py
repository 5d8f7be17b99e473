"""Chapter 10: every theorem against a computation that does not use it, and false variants."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

from compresskit import losses, theory


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


# --- the bias of the straight-through gradient --------------------------------------------------

LEVELS, THRESHOLDS = np.array([-1.0, -0.2, 0.5, 2.0]), np.array([-0.7, 0.1, 1.0])


def staircase(x):
    return LEVELS[np.searchsorted(THRESHOLDS, x)]


def expected(value, law, w):
    """E value(Q(w + z)), by quadrature of the density over each step of the staircase."""
    reach = 12.0
    ends = [-reach, *np.clip(THRESHOLDS - w, -reach, reach), reach]
    pieces = [
        integrate.quad(law.pdf, a, b, epsabs=1e-13, epsrel=1e-13)[0]
        for a, b in itertools.pairwise(ends)
    ]
    return np.dot(pieces, value(LEVELS))


def check_noisy_gradient(formula):
    """`formula(loss, law, w)` is dF/dw of F(w) = E loss(Q(w + z)), for any loss."""
    losses_tried = (
        lambda q: (q - 0.3) ** 2 / 2,
        lambda q: np.abs(q - 0.3),
        lambda q: np.exp(q),
    )
    for loss, law in itertools.product(
        losses_tried, (stats.norm(scale=0.6), stats.logistic(0, 0.3))
    ):
        for w in (-1.1, 0.0, 0.4, 1.3):
            h = 1e-4
            slope = (expected(loss, law, w + h) - expected(loss, law, w - h)) / (2 * h)
            assert abs(formula(loss, law, w) - slope) < 1e-6  # h^2 of curvature


@pytest.mark.theorem("thm-straight-through-bias")
def test_the_derivative_is_the_sum_of_the_jumps_of_the_loss():
    def jumps(loss, law, w):
        return np.diff(loss(LEVELS)) @ law.pdf(THRESHOLDS - w)

    check_noisy_gradient(jumps)


def check_squared(gradient):
    """`gradient(w, t, law)` is dF/dw of the squared loss."""

    def formula(loss, law, w):
        return gradient(w, 0.3, law)

    for law in (stats.norm(scale=0.6), stats.logistic(0, 0.3)):
        for w in (-1.1, 0.0, 0.4, 1.3):
            h = 1e-4
            slope = (
                expected(lambda q: (q - 0.3) ** 2 / 2, law, w + h)
                - expected(lambda q: (q - 0.3) ** 2 / 2, law, w - h)
            ) / (2 * h)
            assert abs(gradient(w, 0.3, law) - slope) < 1e-6


def moments(w, law):
    return theory.noisy_quantizer(w, law, levels=LEVELS, thresholds=THRESHOLDS)


def of_the_theorem(w, t, law):
    m = moments(w, law)
    return (m.mean - t) * m.mean_slope + m.variance_slope / 2


@pytest.mark.theorem("thm-straight-through-bias")
def test_the_squared_loss_has_a_term_for_the_mean_and_one_for_the_variance():
    check_squared(of_the_theorem)


@pytest.mark.theorem("thm-straight-through-bias")
def test_the_mean_straight_through_gradient_is_what_autograd_returns():
    generator = torch.Generator().manual_seed(0)
    z = 0.6 * torch.randn(400_000, generator=generator, dtype=torch.float64)
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    value = torch.from_numpy(staircase((w.detach() + z).numpy()))
    passed = losses.straight_through(value, w + z)
    ((passed - 0.3) ** 2 / 2).mean().backward()
    m = moments(0.4, stats.norm(scale=0.6))
    error = (m.variance / 400_000) ** 0.5
    assert abs(w.grad.item() - (m.mean - 0.3)) < 4 * error
    assert abs(w.grad.item() - of_the_theorem(0.4, 0.3, stats.norm(scale=0.6))) > 40 * error


@pytest.mark.false_variant("thm-straight-through-bias")
def test_the_straight_through_gradient_or_one_without_the_variance_are_rejected():
    def without_the_variance(w, t, law):
        m = moments(w, law)
        return (m.mean - t) * m.mean_slope

    def whole_variance(w, t, law):
        m = moments(w, law)
        return (m.mean - t) * m.mean_slope + m.variance_slope

    def straight(w, t, law):
        return moments(w, law).mean - t

    for variant in (without_the_variance, whole_variance, straight):
        rejects(check_squared, variant)

    def mean_slope_only(loss, law, w):  # h'(g) g', the chain rule applied to the mean
        m = moments(w, law)
        return (loss(m.mean + 1e-6) - loss(m.mean - 1e-6)) / 2e-6 * m.mean_slope

    rejects(check_noisy_gradient, mean_slope_only)


def check_dither(loss_of_weight):
    """`loss_of_weight(h, w)` is E h(Q(w + z)), z uniform over one step of the integers; exact."""
    for h in (lambda q: (q - Fraction(1, 3)) ** 2 / 2, lambda q: abs(q - 2), lambda q: 3 * q - 1):
        for w in (Fraction(i, 16) for i in range(-40, 41)):
            # The average over a grid of z that is finer than, and offset from, all thresholds.
            draws = [Fraction(2 * k + 1, 64) - Fraction(1, 2) for k in range(32)]
            values = [math.floor(w + z + Fraction(1, 2)) for z in draws]
            assert loss_of_weight(h, w) == sum(map(h, values)) / 32


def interpolated(h, w):
    k = math.floor(w)
    return (1 - (w - k)) * h(Fraction(k)) + (w - k) * h(Fraction(k + 1))


@pytest.mark.theorem("thm-straight-through-bias")
def test_uniform_dither_interpolates_the_loss_between_grid_points():
    check_dither(interpolated)


@pytest.mark.false_variant("thm-straight-through-bias")
def test_the_loss_of_the_weight_itself_is_rejected():
    rejects(check_dither, lambda h, w: h(w))


@pytest.mark.theorem("thm-straight-through-bias")
def test_uniform_dither_misses_half_the_slope_of_the_variance():
    step, levels = 0.4, 0.4 * np.arange(-20, 21)
    given = {"levels": levels, "thresholds": (levels[1:] + levels[:-1]) / 2}
    for w in (-1.13, 0.03, 0.29, 1.5):
        at = theory.straight_through_bias(w, 0.3, stats.uniform(-step / 2, step), **given)
        p = w / step - math.floor(w / step)
        assert at.straight_through == pytest.approx(w - 0.3)
        assert at.gradient - at.straight_through == pytest.approx(step * (0.5 - p))
        assert at.loss == pytest.approx((w - 0.3) ** 2 / 2 + step**2 * p * (1 - p) / 2)


@pytest.mark.theorem("thm-straight-through-bias")
def test_of_a_sign_the_true_optimum_is_at_infinity_and_the_other_at_the_mean():
    given = {"levels": [-1, 1], "thresholds": [0]}
    for sigma, t in ((1.0, 0.5), (0.3, -0.8)):
        law = stats.norm(scale=sigma)
        w = np.linspace(-4 * sigma, 4 * sigma, 81)
        at = theory.straight_through_bias(w, t, law, **given)
        assert (np.sign(at.gradient) == -np.sign(t)).all()
        stop = sigma * stats.norm.ppf((1 + t) / 2)
        there = theory.straight_through_bias(stop, t, law, **given)
        assert there.straight_through == pytest.approx(0, abs=1e-12)
        assert there.loss == pytest.approx((1 - t * t) / 2)
        assert at.loss.min() < 1.01 * (1 - abs(t)) ** 2 / 2 < there.loss


@pytest.mark.theorem("thm-straight-through-bias")
def test_independent_dithers_add_their_variances_on_the_diagonal():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3))
    second = x.T @ x / 50
    w, t = np.array([0.3, -1.2, 2.6]), np.array([0.1, -1.0, 2.2])
    low = np.floor(w)
    p = w - low
    loss = 0.0
    for up in itertools.product((0, 1), repeat=3):  # all eight outcomes
        chance = np.prod(np.where(up, p, 1 - p))
        delta = low + up - t
        loss += chance * delta @ second @ delta / 2
    formula = (w - t) @ second @ (w - t) / 2 + (np.diag(second) * p * (1 - p)).sum() / 2
    assert loss == pytest.approx(formula)
    off = (w - t) @ second @ (w - t) / 2 + (second @ (p * (1 - p))).sum() / 2
    assert abs(loss - off) > 0.01  # a false variant: variances weighted by whole rows


# --- a weight that never settles ----------------------------------------------------------------


def path(start, target, rate, steps, low=None, high=None):
    """Levels that descent with the straight-through gradient visits on the integers; exact."""
    w, visited = start, []
    for _ in range(steps):
        q = math.floor(w + Fraction(1, 2))
        if low is not None:
            q = min(max(q, low), high)
        visited.append(q)
        w = w - rate * (q - target)
    return visited, w


CASES = [
    (Fraction(0), Fraction(3, 10), Fraction(1, 4)),
    (Fraction(2, 7), Fraction(5, 7), Fraction(1)),
    (Fraction(-12, 5), Fraction(1, 9), Fraction(1, 3)),
    (Fraction(9), Fraction(17, 6), Fraction(9, 10)),
]


def check_visits(share_of_upper):
    """`share_of_upper(t - a)` is where the share of the upper level tends to, within 1/K."""
    for start, target, rate in CASES:
        a = math.floor(target)
        visited, _ = path(start, target, rate, 2000)
        late = visited[200:]  # after the descent to the two levels
        assert set(late) == {a, a + 1}
        share = Fraction(late.count(a + 1), len(late))
        assert abs(share - share_of_upper(target - a)) < Fraction(1, len(late))


def check_mean_loss(mean_loss):
    for start, target, rate in CASES:
        visited, _ = path(start, target, rate, 2000)
        late = visited[200:]
        mean = sum((q - target) ** 2 for q in late) / 2 / len(late)
        d = target - math.floor(target)
        assert abs(mean - mean_loss(d, 1 - d)) < Fraction(1, len(late))


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_shares_of_the_levels_make_the_target_their_mean():
    check_visits(lambda part: part)


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_mean_loss_is_half_the_product_of_the_distances():
    check_mean_loss(lambda left, right: left * right / 2)


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_mean_of_any_steps_is_the_target_up_to_what_the_weight_moved():
    for start, target, rate in CASES:
        for steps in (1, 7, 300):
            visited, end = path(start, target, rate, steps)
            assert Fraction(sum(visited), steps) - target == (start - end) / (rate * steps)


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_weight_stays_in_an_interval_of_the_rate_times_the_gap():
    for start, target, rate in CASES:
        a = math.floor(target)
        edge = a + Fraction(1, 2)
        low, high = edge - rate * (a + 1 - target), edge + rate * (target - a)
        w, inside = start, False
        for _ in range(500):
            w -= rate * (math.floor(w + Fraction(1, 2)) - target)
            assert not inside or low <= w < high
            inside = inside or low <= w < high
        assert inside


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_levels_visited_are_those_of_a_rotation_of_the_circle():
    start, target, rate = Fraction(2, 5), Fraction(3, 10), Fraction(1, 4)
    w, origin = start, Fraction(1, 2) - rate * Fraction(7, 10)
    for k in range(100):
        angle = ((start - origin) / rate + k * target) % 1
        assert (w - origin) / rate == angle
        w -= rate * (math.floor(w + Fraction(1, 2)) - target)


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_every_step_is_at_least_the_rate_times_the_shorter_distance():
    for start, target, rate in CASES:
        a = math.floor(target)
        least = rate * min(target - a, a + 1 - target)
        ends = [path(start, target, rate, k)[1] for k in range(100)]
        steps = [abs(after - before) for before, after in itertools.pairwise(ends)]
        assert min(steps) == least  # attained once it hops between the two


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_from_beyond_a_clipped_range_it_comes_to_hop_between_the_two_as_well():
    for start in (Fraction(-9), Fraction(9)):
        visited, _ = path(start, Fraction(3, 10), Fraction(1), 400, low=-2, high=1)
        assert set(visited[-200:]) == {0, 1}
        assert visited[-200:].count(1) == 60


@pytest.mark.false_variant("thm-straight-through-oscillation")
def test_settling_equal_shares_swapped_shares_or_the_least_loss_are_rejected():
    for share in (
        lambda part: Fraction(round(part)),  # it settles on the nearer level
        lambda part: Fraction(1, 2),
        lambda part: 1 - part,
    ):
        rejects(check_visits, share)
    for loss in (
        lambda left, right: min(left, right) ** 2 / 2,
        lambda left, right: left * right,
        lambda left, right: Fraction(1, 24),  # half of step^2 / 12
    ):
        rejects(check_mean_loss, loss)


@pytest.mark.theorem("thm-straight-through-oscillation")
def test_the_hypotheses_are_needed():
    # A rate above 1: more than two levels are visited.
    visited, _ = path(Fraction(0), Fraction(3, 10), Fraction(19, 10), 500)
    assert len(set(visited[100:])) > 2
    # A target beyond the last level: the weight runs away.
    _, end = path(Fraction(0), Fraction(5, 2), Fraction(1, 4), 1000, low=-2, high=1)
    assert end > 100


# --- the gradient of a learned step -------------------------------------------------------------


def check_learned_step(surrogate):
    """`surrogate(u, low, high)`, u = w / s, is what autograd returns for the step."""
    low, high = -4, 3
    w = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for step in (0.3, 0.71, 2.0):
        scale = torch.full((601, 1), step, dtype=torch.float64, requires_grad=True)
        zero = torch.full((1, 1), float(-low), dtype=torch.float64)
        value = losses.fake_quantize(w[:, None], scale, zero, levels=high - low + 1)
        value.sum().backward()
        expected = [surrogate(u, low, high) for u in (w / step).tolist()]
        np.testing.assert_allclose(scale.grad[:, 0].numpy(), expected, atol=1e-12)


def lsq(u, low, high):
    return low if u < low else high if u > high else round(u) - u


@pytest.mark.theorem("prop-learned-step")
def test_the_package_returns_the_gradient_of_the_learned_step():
    check_learned_step(lsq)


@pytest.mark.false_variant("prop-learned-step")
def test_the_level_and_a_gradient_that_forgets_clipping_are_told_from_it():
    rejects(check_learned_step, lambda u, low, high: min(max(round(u), low), high))
    rejects(check_learned_step, lambda u, low, high: round(u) - u)


@pytest.mark.theorem("prop-learned-step")
def test_the_true_derivative_is_the_level():
    for w, s in itertools.product((-2.9, -0.52, 0.17, 1.4, 9.0), (0.3, 0.71, 2.0)):
        h = 1e-7
        value = [d * np.clip(np.round(w / d), -4, 3) for d in (s - h, s + h)]
        level = np.clip(np.round(w / s), -4, 3)
        assert (value[1] - value[0]) / (2 * h) == pytest.approx(level, abs=1e-6)


def quantization_integrals(law, step, low, high):
    """E e^2/2, E[e q], E[e x; inside] of e = s q(x/s) - x, by quadrature cell by cell."""
    ends = np.concatenate([[-40], (np.arange(low, high) + 0.5) * step, [40]])
    ends = np.union1d(ends, [low * step, high * step, 0.0])
    total = np.zeros(3)
    for a, b in itertools.pairwise(ends):
        q = min(max(round((a + b) / 2 / step), low), high)
        inside = low * step <= (a + b) / 2 <= high * step
        for i, f in enumerate(
            (
                lambda x, q=q: (step * q - x) ** 2 / 2,
                lambda x, q=q: (step * q - x) * q,
                lambda x, q=q, inside=inside: (step * q - x) * x * inside,
            )
        ):
            total[i] += integrate.quad(lambda x, f=f: f(x) * law.pdf(x), a, b, epsabs=1e-13)[0]
    return total


@pytest.mark.theorem("prop-learned-step")
def test_of_the_rounding_error_itself_the_surrogate_misses_one_term():
    law = stats.norm()
    for step, low, high in ((0.9, -2, 1), (0.4, -4, 3), (1.7, -8, 7)):
        h = 1e-4
        plus, minus = (quantization_integrals(law, step + d, low, high)[0] for d in (h, -h))
        _, true, missed = quantization_integrals(law, step, low, high)
        assert (plus - minus) / (2 * h) == pytest.approx(true, abs=1e-6)
        # The surrogate by Monte Carlo with the package's own gradient.
        x = torch.randn(500_000, 1, generator=torch.Generator().manual_seed(0)).double()
        scale = torch.tensor([[step]], dtype=torch.float64, requires_grad=True)
        value = losses.fake_quantize(x, scale, torch.tensor([[-low]]), levels=high - low + 1)
        ((value - x.detach()) ** 2 / 2).mean().backward()
        assert scale.grad.item() == pytest.approx(true - missed / step, abs=5e-3)  # 4 sigma


@pytest.mark.theorem("prop-learned-step")
def test_without_clipping_the_surrogate_always_shrinks_the_step():
    for step in (0.2, 1.0, 3.0):
        loss, true, missed = quantization_integrals(stats.norm(), step, -45, 45)
        assert true - missed / step == pytest.approx(2 * loss / step, rel=1e-6)


# --- the best signs and the best ternary weights ------------------------------------------------


def check_best(rule, values):
    """`rule(w)` -> (scale, levels), the best of all levels in `values`; by brute force."""
    rng = np.random.default_rng(1)
    for w in (*rng.normal(size=(6, 6)), *rng.laplace(size=(6, 6)), np.array([3.0, 1, 1, 1, 1, 1])):
        scale, levels = rule(w)
        least = np.inf
        for q in itertools.product(values, repeat=len(w)):
            q = np.array(q)
            if q.any():
                best = max(q @ w / (q @ q), 0)
                least = min(least, np.sum((w - best * q) ** 2))
        assert np.sum((w - scale * levels) ** 2) == pytest.approx(least)


def best_signs(w):
    return np.abs(w).mean(), np.where(w < 0, -1, 1)


def best_ternary(w):
    order = np.argsort(-np.abs(w))
    gained = np.cumsum(np.abs(w)[order]) ** 2 / np.arange(1, len(w) + 1)
    k = gained.argmax() + 1
    levels = np.zeros(len(w))
    levels[order[:k]] = np.sign(w[order[:k]])
    return np.abs(w[order[:k]]).mean(), levels


@pytest.mark.theorem("prop-sign-ternary")
def test_the_best_signs_and_ternary_weights_are_those_of_all_that_exist():
    check_best(best_signs, (-1, 1))
    check_best(best_ternary, (-1, 0, 1))


@pytest.mark.false_variant("prop-sign-ternary")
def test_absmean_the_root_mean_square_and_all_weights_are_not_the_best():
    def absmean(w):
        scale = np.abs(w).mean()
        return scale, np.clip(np.round(w / scale), -1, 1)

    def refitted(w):
        levels = absmean(w)[1]
        return (levels @ w) / (levels @ levels), levels

    rejects(lambda rule: check_best(rule, (-1, 0, 1)), absmean)
    rejects(lambda rule: check_best(rule, (-1, 0, 1)), refitted)
    rejects(lambda rule: check_best(rule, (-1, 0, 1)), best_signs)
    rejects(
        lambda rule: check_best(rule, (-1, 1)),
        lambda w: (np.sqrt((w**2).mean()), np.where(w < 0, -1, 1)),
    )


@pytest.mark.theorem("prop-sign-ternary")
def test_the_best_support_ends_at_half_the_scale():
    rng = np.random.default_rng(2)
    for w in rng.normal(size=(20, 50)):
        scale, levels = best_ternary(w)
        assert np.abs(w)[levels != 0].min() >= scale / 2 >= np.abs(w)[levels == 0].max()


@pytest.mark.theorem("prop-sign-ternary")
def test_the_errors_of_a_gaussian_are_those_of_the_page():
    w = np.random.default_rng(3).normal(size=1_000_000)
    scale, levels = best_signs(w)
    assert np.mean((w - scale * levels) ** 2) == pytest.approx(1 - 2 / math.pi, abs=3e-3)
    scale, levels = best_ternary(w)
    best = theory.lloyd_max_quantizer(stats.norm(), 3)
    assert np.mean((w - scale * levels) ** 2) == pytest.approx(best.distortion, abs=1.5e-3)
    assert scale == pytest.approx(best.values[-1], abs=5e-3)

    def error(threshold, c):
        tail, density = stats.norm.sf(threshold), stats.norm.pdf(threshold)
        return 1 - 4 * c * density + 2 * c * c * tail

    mean = math.sqrt(2 / math.pi)
    sample = np.abs(w).mean() * np.clip(np.round(w / np.abs(w).mean()), -1, 1)
    assert np.mean((w - sample) ** 2) == pytest.approx(error(mean / 2, mean), abs=3e-3)
    fitted = stats.norm.pdf(mean / 2) / stats.norm.sf(mean / 2)
    assert best.distortion < error(mean / 2, fitted) < error(mean / 2, mean)


# --- trits ---------------------------------------------------------------------------------------


def check_capacity(trits_in):
    """`trits_in(bits)` is the number of ternary symbols that fit; by exact integers."""
    for bits in range(1, 400):
        most = 0
        while 3 ** (most + 1) <= 2**bits:
            most += 1
        assert trits_in(bits) == most


@pytest.mark.theorem("prop-trits")
def test_as_many_trits_fit_as_the_logarithm_says():
    check_capacity(lambda bits: math.floor(bits / math.log2(3)))


@pytest.mark.false_variant("prop-trits")
def test_two_bits_each_or_rounding_to_the_nearest_number_are_told_from_it():
    rejects(check_capacity, lambda bits: bits // 2)
    rejects(check_capacity, lambda bits: round(bits / math.log2(3)))


@pytest.mark.theorem("prop-trits")
def test_whole_bytes_do_not_beat_five_each_below_22():
    most = {n: math.floor(8 * n / math.log2(3)) for n in range(1, 23)}
    assert all(most[n] == 5 * n for n in range(1, 22))
    assert most[22] == 111


@pytest.mark.theorem("prop-trits")
def test_no_ternary_law_has_more_entropy_and_71_times_less_memory_needs_97_percent_zeros():
    rng = np.random.default_rng(4)
    for p in rng.dirichlet([1, 1, 1], 500):
        assert theory.entropy(p) <= math.log2(3)

    def entropy(zeros):
        return theory.entropy([zeros, (1 - zeros) / 2, (1 - zeros) / 2])

    zeros = optimize.brentq(lambda p: entropy(p) - 16 / 71.4, 0.5, 1 - 1e-9)
    assert 0.97 < zeros < 0.98
