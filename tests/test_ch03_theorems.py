"""Every theorem of chapter 3 as a check, and false variants of it which that check rejects.

A check takes the disputed formula and returns whether it survives: it must hold on every case and,
where it is a bound, come near to being attained. Derivatives come from automatic differentiation
or from differences, never from the formula that is in dispute.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from compresskit.losses import distillation_loss, forward_kl, softmax_temperature
from compresskit.theory import entropy, kl_divergence

ROUNDING = 1e-12  # sums of at most a few dozen float64 terms of size about 1
TEMPERATURES = [0.3, 0.7, 1.0, 2.0, 5.0, 20.0]


def softmax(logits, temperature=1.0):
    return softmax_temperature(torch.as_tensor(logits, dtype=torch.float64), temperature).numpy()


def some_logits(count=60, seed=0):
    """Vectors of 2 to 12 logits, from nearly equal to far apart, some with a tie at the top."""
    rng = np.random.default_rng(seed)
    for scale in np.geomspace(0.01, 30, count):
        logits = scale * rng.normal(size=rng.integers(2, 13))
        yield logits
        yield np.append(logits, logits.max())


# --- the ends of the scale


def check_limits(cold, hot):
    """Mass off the m largest <= cold(K, m, gap, T); |K p - 1| <= hot(range, T); both nearly met."""
    nearest = [0.0, 0.0]
    cases = [*some_logits(), np.array([0.0, -0.5]), np.array([0.0, 0.0, -1.0, -1.0])]
    for v, T in itertools.product(cases, [*TEMPERATURES, 300.0]):
        p = softmax(v, T)
        top = v == v.max()
        K, m = len(v), int(top.sum())
        if m < K:
            off, bound = p[~top].sum(), cold(K, m, v.max() - v[~top].max(), T)
            if off > bound + ROUNDING:
                return False
            if bound > 1e-9:
                nearest[0] = max(nearest[0], off / bound)
        away, bound = np.abs(K * p - 1).max(), hot(np.ptp(v), T)
        if away > bound + ROUNDING:
            return False
        nearest[1] = max(nearest[1], away / bound)
    return min(nearest) > 0.7


def cold_bound(K, m, gap, T):
    return (K - m) / m * math.exp(-gap / T)


def hot_bound(r, T):
    return math.expm1(min(r / T, 700))


@pytest.mark.theorem("prop-temperature-limits")
def test_cold_answers_share_the_top_and_hot_ones_are_nearly_uniform():
    assert check_limits(cold_bound, hot_bound)


@pytest.mark.theorem("prop-temperature-limits")
def test_ties_are_shared_at_every_temperature():
    for T in TEMPERATURES:
        p = softmax([3.0, 1.0, 3.0, 3.0 - 1e-3], T)
        assert p[0] == p[2] > p[3]
    assert softmax([3.0, 1.0, 3.0], 0.01) == pytest.approx([0.5, 0, 0.5], abs=1e-80)


@pytest.mark.false_variant("prop-temperature-limits")
@pytest.mark.parametrize(
    ("cold", "hot"),
    [
        (lambda K, m, gap, T: math.exp(-gap / T) / m, hot_bound),  # one class off the top
        (lambda K, m, gap, T: (K - m) / m * math.exp(-gap * T), hot_bound),
        (lambda K, m, gap, T: (K - m) / m**2 * math.exp(-gap / T), hot_bound),  # ties not shared
        (cold_bound, lambda r, T: r / T / 2),
        (cold_bound, lambda r, T: math.expm1(min(r / T**2, 700))),
        (cold_bound, lambda r, T: 10 * math.expm1(min(r / T, 700))),  # true, but never near
    ],
)
def test_false_limits_are_rejected(cold, hot):
    assert not check_limits(cold, hot)


# --- entropy and temperature


def variance(v, p):
    return p @ v**2 - (p @ v) ** 2


def check_entropy_slope(slope):
    """slope(variance, T) is dH/dT in nats, by central differences."""
    for v, T in itertools.product(some_logits(20), TEMPERATURES):
        low, high = (entropy(softmax(v, T * s), unit="nats") for s in (1 - 1e-4, 1 + 1e-4))
        found = (high - low) / (2e-4 * T)
        # the third derivative costs about 1e-8 of scale, rounding 1e-16 / 1e-4
        if abs(found - slope(variance(v, softmax(v, T)), T)) > 1e-6 * abs(found) + 1e-9:
            return False
    return True


@pytest.mark.theorem("thm-temperature-entropy")
def test_entropy_rises_at_the_speed_of_the_variance_over_the_cube():
    assert check_entropy_slope(lambda var, T: var / T**3)


@pytest.mark.theorem("thm-temperature-entropy")
def test_entropy_rises_strictly_from_the_log_of_the_ties_to_the_log_of_the_classes():
    for v in some_logits(20, seed=1):
        values = [entropy(softmax(v, T)) for T in np.geomspace(0.05, 500, 60)]
        assert all(b > a - ROUNDING for a, b in itertools.pairwise(values))
        assert values[0] >= math.log2((v == v.max()).sum()) - ROUNDING
        assert values[-1] <= math.log2(len(v)) + ROUNDING
    assert entropy(softmax([2.0, 2.0, 2.0], 0.5)) == pytest.approx(math.log2(3), abs=1e-14)
    assert entropy(softmax([0.0, 5.0, 5.0], 0.05)) == pytest.approx(1.0, abs=1e-12)
    assert entropy(softmax([0.0, 5.0, 5.0], 1e5)) == pytest.approx(math.log2(3), abs=1e-8)


@pytest.mark.false_variant("thm-temperature-entropy")
@pytest.mark.parametrize(
    "variant",
    [
        lambda var, T: var / T**2,
        lambda var, T: var / T,
        lambda var, T: var / T**3 / math.log(2),  # bits for nats
        lambda var, T: math.sqrt(var) / T**3,
        lambda var, T: -var / T**3,
    ],
)
def test_false_slopes_of_the_entropy_are_rejected(variant):
    assert not check_entropy_slope(variant)


# --- temperature and information


def check_bijection(exponent):
    """p at T' is p at T to the power exponent(T, T'), renormalized."""
    for v in some_logits(20, seed=2):
        v = v.clip(-8, 8)  # so that no probability leaves the range of float64
        for T, other in itertools.product(TEMPERATURES, repeat=2):
            powers = softmax(v, T) ** exponent(T, other)
            if not np.allclose(powers / powers.sum(), softmax(v, other), rtol=1e-9, atol=1e-15):
                return False
            p = softmax(v, T)
            if not np.allclose(T * np.log(p / p[0]), v - v[0], rtol=0, atol=1e-9):
                return False
    return True


@pytest.mark.theorem("prop-temperature-bijection")
def test_one_temperature_determines_every_other():
    assert check_bijection(lambda T, other: T / other)


def information(labels, answers, classes):
    """I(Y; p) in bits for a finite sample taken as the population, by counting equal answers."""
    _, keys = np.unique(answers, axis=0, return_inverse=True)
    joint = np.zeros((classes, keys.max() + 1))
    np.add.at(joint, (labels, keys.ravel()), 1 / len(labels))
    product = joint.sum(1, keepdims=True) * joint.sum(0)
    return kl_divergence(joint.ravel(), product.ravel())


@pytest.mark.theorem("prop-temperature-bijection")
def test_softening_changes_no_mutual_information_until_it_is_rounded():
    rng = np.random.default_rng(3)
    kinds = rng.normal(size=(8, 4)).round(3)  # eight inputs' logits
    which = rng.integers(8, size=2000)
    labels = rng.integers(4, size=8)[which]
    values = [
        information(labels, np.round([softmax(kinds[k], T) for k in which], 9), 4)
        for T in TEMPERATURES
    ]
    assert values == pytest.approx([values[0]] * len(values), abs=1e-12)
    assert values[0] > 1
    coarse = np.round([softmax(kinds[k], 1000.0) for k in which], 2)
    assert information(labels, coarse, 4) < 0.01  # all answers are 0.25 in two digits


@pytest.mark.false_variant("prop-temperature-bijection")
@pytest.mark.parametrize(
    "variant", [lambda T, other: other / T, lambda T, other: T - other + 1, lambda T, other: T]
)
def test_false_ways_back_from_one_temperature_to_another_are_rejected(variant):
    assert not check_bijection(variant)


# --- hard labels as samples


def check_label_noise(claimed):
    """E||mean of n one-hot labels - p||^2 is claimed(p, n): all outcomes, weighted, no sampling."""
    rng = np.random.default_rng(4)
    for k, n in [(2, 1), (3, 1), (3, 2), (4, 3)]:
        p = rng.dirichlet(np.ones(k))
        exact = 0.0
        for labels in itertools.product(range(k), repeat=n):
            error = np.eye(k)[list(labels)].mean(0) - p
            exact += math.prod(p[y] for y in labels) * (error @ error)
        if not math.isclose(exact, claimed(p, n), rel_tol=1e-10):
            return False
    return True


@pytest.mark.theorem("prop-label-noise")
def test_a_hard_label_has_the_gini_impurity_as_its_noise():
    assert check_label_noise(lambda p, n: (1 - p @ p) / n)


@pytest.mark.false_variant("prop-label-noise")
@pytest.mark.parametrize(
    "variant",
    [
        lambda p, n: 1 - p @ p,
        lambda p, n: (1 - p @ p) / n**2,
        lambda p, n: entropy(p, unit="nats") / n,
        lambda p, n: (1 - p.max()) / n,
    ],
)
def test_false_noises_of_a_label_are_rejected(variant):
    assert not check_label_noise(variant)


@pytest.mark.theorem("prop-label-noise")
def test_a_hard_label_tells_no_more_bits_than_an_index():
    for alphabet in (2, 5):
        channel = np.random.default_rng(5).dirichlet(np.full(alphabet, 0.1), size=50)  # p(y | s)
        joint = channel / 50
        product = np.outer(joint.sum(1), joint.sum(0))
        assert kl_divergence(joint.ravel(), product.ravel()) <= math.log2(alphabet) + ROUNDING


# --- the variance of the risk


def check_soft_risk(excess):
    """Var of the hard risk less that of the soft one is excess(inputs, posteriors, losses, n).

    Every sample of n inputs and labels from a world of three inputs and three classes is visited.
    """
    rng = np.random.default_rng(6)
    for n in (1, 2):
        inputs = rng.dirichlet(np.ones(3))
        posteriors, losses = rng.dirichlet(np.ones(3), size=3), rng.exponential(size=(3, 3))
        soft_losses = (posteriors * losses).sum(1)
        chances, hard, soft = [], [], []
        for sample in itertools.product(itertools.product(range(3), range(3)), repeat=n):
            chances.append(math.prod(inputs[x] * posteriors[x, y] for x, y in sample))
            hard.append(np.mean([losses[x, y] for x, y in sample]))
            soft.append(np.mean([soft_losses[x] for x, y in sample]))
        chances, hard, soft = map(np.array, (chances, hard, soft))
        if not math.isclose(chances @ hard, chances @ soft, rel_tol=1e-12):
            return False
        found = variance(hard, chances) - variance(soft, chances)
        if not math.isclose(found, excess(inputs, posteriors, losses, n), rel_tol=1e-9):
            return False
    return True


def label_variance(inputs, posteriors, losses):
    means = (posteriors * losses).sum(1)
    return inputs @ ((posteriors * losses**2).sum(1) - means**2)


@pytest.mark.theorem("thm-soft-risk")
def test_soft_labels_remove_exactly_the_variance_of_the_label_given_the_input():
    assert check_soft_risk(lambda x, p, loss, n: label_variance(x, p, loss) / n)


@pytest.mark.false_variant("thm-soft-risk")
@pytest.mark.parametrize(
    "variant",
    [
        lambda x, p, loss, n: label_variance(x, p, loss),
        lambda x, p, loss, n: 0.0,
        lambda x, p, loss, n: x @ (1 - (p**2).sum(1)) / n,  # impurity of the label, not of the loss
        lambda x, p, loss, n: label_variance(np.full(3, 1 / 3), p, loss) / n,
    ],
)
def test_false_savings_of_variance_are_rejected(variant):
    assert not check_soft_risk(variant)


def check_teacher_bias(claimed):
    """Mean of the soft risk with a teacher t less that of the hard risk, over all samples of 2."""
    rng = np.random.default_rng(7)
    inputs = rng.dirichlet(np.ones(3))
    posteriors, teacher = rng.dirichlet(np.ones(3), size=(2, 3))
    losses = rng.exponential(size=(3, 3))
    found = 0.0
    for sample in itertools.product(itertools.product(range(3), range(3)), repeat=2):
        chance = math.prod(inputs[x] * posteriors[x, y] for x, y in sample)
        soft = np.mean([teacher[x] @ losses[x] for x, _ in sample])
        found += chance * (soft - np.mean([losses[x, y] for x, y in sample]))
    return math.isclose(found, claimed(inputs, posteriors, teacher, losses), rel_tol=1e-9)


@pytest.mark.theorem("thm-soft-risk")
def test_a_wrong_teacher_is_off_by_the_mean_of_its_error_times_the_loss():
    assert check_teacher_bias(lambda x, p, t, loss: x @ ((t - p) * loss).sum(1))


@pytest.mark.false_variant("thm-soft-risk")
@pytest.mark.parametrize(
    "variant",
    [
        lambda x, p, t, loss: 0.0,
        lambda x, p, t, loss: x @ ((p - t) * loss).sum(1),
        lambda x, p, t, loss: x @ (np.abs(t - p) * loss).sum(1),
        lambda x, p, t, loss: ((t - p) * loss).sum(1).mean(),
    ],
)
def test_false_biases_of_a_teacher_are_rejected(variant):
    assert not check_teacher_bias(variant)


# --- the gradient, and the factor T²


def pairs(seed=8, count=40):
    """Student and teacher logits of 2 to 12 classes, not centered, sizes from 0.01 to 30."""
    rng = np.random.default_rng(seed)
    for scale in np.geomspace(0.01, 30, count):
        k = rng.integers(2, 13)
        yield scale * rng.normal(size=k) + rng.normal(), scale * rng.normal(size=k) - 1


def gradient(z, v, temperature):
    """Of KL(p || q) in nats in the student's logits, by automatic differentiation."""
    z = torch.tensor(z, requires_grad=True)
    log_p = (torch.tensor(v) / temperature).log_softmax(-1)
    loss = (log_p.exp() * (log_p - (z / temperature).log_softmax(-1))).sum()
    return torch.autograd.grad(loss, z)[0].numpy()


def check_gradient(formula):
    """formula(q, p, T) is the gradient, for every pair and temperature."""
    return all(
        np.allclose(gradient(z, v, T), formula(softmax(z, T), softmax(v, T), T), atol=ROUNDING)
        for (z, v), T in itertools.product(pairs(), TEMPERATURES)
    )


@pytest.mark.theorem("thm-kd-gradient")
def test_each_logit_is_pulled_by_the_difference_of_the_probabilities_over_the_temperature():
    assert check_gradient(lambda q, p, T: (q - p) / T)


@pytest.mark.false_variant("thm-kd-gradient")
@pytest.mark.parametrize(
    "variant",
    [
        lambda q, p, T: q - p,
        lambda q, p, T: (q - p) / T**2,
        lambda q, p, T: (p - q) / T,
        lambda q, p, T: q / T * (np.log(q / p) - (q * np.log(q / p)).sum()),  # student first
    ],
)
def test_false_gradients_are_rejected(variant):
    assert not check_gradient(variant)


def check_whole_gradient(formula):
    """formula(q at 1, e_y, q at T, p at T, alpha, T) is the gradient of the distillation loss."""
    for (z, v), T, alpha in itertools.product(pairs(count=12), TEMPERATURES, [0.0, 0.3, 1.0]):
        free = torch.tensor(z, requires_grad=True)
        y = len(z) // 2
        loss = distillation_loss(free, torch.tensor(v), torch.tensor(y), temperature=T, alpha=alpha)
        found = torch.autograd.grad(loss, free)[0].numpy()
        claimed = formula(softmax(z), np.eye(len(z))[y], softmax(z, T), softmax(v, T), alpha, T)
        if not np.allclose(found, claimed, atol=ROUNDING * T**2):
            return False
    return True


@pytest.mark.theorem("thm-kd-gradient")
def test_one_temperature_is_left_in_the_gradient_of_the_whole_loss():
    assert check_whole_gradient(lambda q1, e, q, p, a, T: (1 - a) * (q1 - e) + a * T * (q - p))


@pytest.mark.false_variant("thm-kd-gradient")
@pytest.mark.parametrize(
    "variant",
    [
        lambda q1, e, q, p, a, T: (1 - a) * (q1 - e) + a * T**2 * (q - p),
        lambda q1, e, q, p, a, T: (1 - a) * (q1 - e) + a / T * (q - p),  # the factor forgotten
        lambda q1, e, q, p, a, T: a * (q1 - e) + (1 - a) * T * (q - p),  # the other convention
        lambda q1, e, q, p, a, T: (1 - a) * (q - e) + a * T * (q - p),  # the label softened too
    ],
)
def test_false_gradients_of_the_whole_loss_are_rejected(variant):
    assert not check_whole_gradient(variant)


def centered(v):
    return np.asarray(v) - np.mean(v)


def check_high_temperature(bound):
    """|p_i - (1 + v_i / T) / K| <= bound(M, K, T) for T >= M, and within a factor 4 of it."""
    nearest = 0.0
    one_up = [np.append(np.full(k, -1.0 / k), 1.0) for k in (1, 3, 30, 300)]
    halves = [np.array([0.0, 1, -1, 1, -1]), np.array([1.0, 1, -2])]
    for v in (*some_logits(), *one_up, *halves):
        v = centered(v)
        M, K = np.abs(v).max(), len(v)
        for T in M * np.array([1.0, 1.1, 2, 10, 100]):
            if not 1e-6 < T < 1e6:
                continue
            error = np.abs(softmax(v, T) - (1 + v / T) / K).max()
            if error > bound(M, K, T) + ROUNDING / K:
                return False
            nearest = max(nearest, error / bound(M, K, T))
    return nearest > 0.25


@pytest.mark.theorem("lem-high-temperature")
def test_hot_probabilities_are_linear_in_centered_logits_to_second_order():
    assert check_high_temperature(lambda M, K, T: 2 * M**2 / (K * T**2))


@pytest.mark.false_variant("lem-high-temperature")
@pytest.mark.parametrize(
    "variant",
    [
        lambda M, K, T: M**2 / (2 * K * T**2),  # one class far up alone is at 0.7
        lambda M, K, T: 2 * M**3 / (K * T**3) / 4,
        lambda M, K, T: 2 * M**2 / (K**2 * T**2),
        lambda M, K, T: 2 * M**2 / T**2,  # true, but K times too weak
    ],
)
def test_false_linearizations_are_rejected(variant):
    assert not check_high_temperature(variant)


def check_t_squared(power, direction, value, constants=(4, 8)):
    """T**power times gradient and loss tend to `direction` and `value` with errors as stated."""
    for z, v in pairs():
        dz, dv, K = centered(z), centered(v), len(z)
        M = max(np.abs(dz).max(), np.abs(dv).max())
        for T in M * np.array([1.0, 3.0, 30.0, 300.0]):
            slope = T**power * gradient(z, v, T)
            loss = T**power * forward_kl(torch.tensor(z), torch.tensor(v), temperature=T).item()
            if (
                np.abs(slope - direction(dz, dv, K)).max()
                > constants[0] * M**2 / (K * T) + 1e-9 * M
            ):
                return False
            if abs(loss - value(dz, dv, K)) > constants[1] * M**3 / T + 1e-9 * M**2:
                return False
    return True


def regression(z, v, K):
    return (z - v) / K


def half_square(z, v, K):
    return ((z - v) ** 2).sum() / (2 * K)


@pytest.mark.theorem("thm-t-squared")
def test_with_the_factor_the_limit_is_regression_on_centered_logits():
    assert check_t_squared(2, regression, half_square)


@pytest.mark.false_variant("thm-t-squared")
@pytest.mark.parametrize(
    ("power", "direction", "value"),
    [
        (1, regression, half_square),
        (3, regression, half_square),
        (2, lambda z, v, K: z - v, half_square),  # K forgotten
        (2, lambda z, v, K: softmax(z) - softmax(v), half_square),  # "the gradient at T = 1"
        (2, regression, lambda z, v, K: ((z - v) ** 2).sum() / K),
        (2, regression, lambda z, v, K: kl_divergence(softmax(v), softmax(z), unit="nats")),
    ],
)
def test_false_limits_of_the_scaled_loss_are_rejected(power, direction, value):
    assert not check_t_squared(power, direction, value)


@pytest.mark.false_variant("thm-t-squared")
@pytest.mark.parametrize("constants", [(0.5, 8), (4, 0.1)])
def test_much_smaller_errors_are_rejected(constants):
    assert not check_t_squared(2, regression, half_square, constants)


@pytest.mark.theorem("thm-t-squared")
def test_logits_need_not_have_mean_zero():
    z, v = next(itertools.islice(pairs(), 20, None))
    shifted = 1e6 * gradient(z + 5.0, v - 7.0, 1000.0)
    np.testing.assert_allclose(shifted, 1e6 * gradient(z, v, 1000.0), rtol=1e-6)


# --- which way round


def grid_kl(p, q, step):
    return (p * np.log((p + 1e-300) / (q + 1e-300))).sum() * step


def mixtures():
    """Grid, step, weights, components and the mixture, for some mixtures of normal densities."""
    x = np.linspace(-40, 40, 16_001)
    rng = np.random.default_rng(9)
    cases = [([0.5, 0.5], [-2.5, 2.5], [0.7, 0.7]), ([0.9, 0.1], [0.0, 8.0], [1.0, 0.5])]
    cases += [(rng.dirichlet(np.ones(3)), rng.normal(size=3) * 3, rng.uniform(0.5, 2, 3))] * 3
    for w, m, s in cases:
        parts = scipy.stats.norm.pdf(x, np.c_[m], np.c_[s])
        yield x, x[1] - x[0], np.array(w), parts, np.array(w) @ parts


def check_covering(moments):
    """N(moments(w, means, variances)) has less KL(p || q) than nearby and random normals."""
    rng = np.random.default_rng(10)
    for x, step, w, parts, p in mixtures():
        means = parts @ x * step
        mean, deviation = moments(w, means, parts @ x**2 * step - means**2)
        best = grid_kl(p, scipy.stats.norm.pdf(x, mean, deviation), step)
        nearby = [(a, b) for a in (-0.02, 0, 0.02) for b in (0.98, 1, 1.02) if (a, b) != (0, 1)]
        rivals = [*nearby, *zip(rng.normal(size=20), rng.uniform(0.5, 2, 20), strict=True)]
        for a, b in rivals:
            q = scipy.stats.norm.pdf(x, mean + a * deviation, b * deviation)
            if grid_kl(p, q, step) <= best:
                return False
    return True


def of_the_mixture(w, means, variances):
    mean = w @ means
    return mean, math.sqrt(w @ (variances + means**2) - mean**2)


@pytest.mark.theorem("prop-kl-directions")
def test_teacher_first_takes_the_mean_and_the_variance_of_the_mixture():
    assert check_covering(of_the_mixture)


@pytest.mark.false_variant("prop-kl-directions")
@pytest.mark.parametrize(
    "variant",
    [
        lambda w, m, s2: (m[w.argmax()], math.sqrt(s2[w.argmax()])),  # the largest mode
        lambda w, m, s2: (w @ m, math.sqrt(w @ s2)),  # the spread of the means forgotten
        lambda w, m, s2: (m.mean(), of_the_mixture(w, m, s2)[1]),
    ],
)
def test_false_covers_are_rejected(variant):
    assert not check_covering(variant)


def check_seeking(price):
    """KL(component || mixture) <= price(weight), attained when the components are far apart."""
    nearest = 0.0
    for _, step, w, parts, p in mixtures():
        for weight, part in zip(w, parts, strict=True):
            cost = grid_kl(part, p, step)
            if cost > price(weight) + 1e-9:
                return False
            nearest = max(nearest, cost / price(weight))
    return nearest > 0.95


@pytest.mark.theorem("prop-kl-directions")
def test_one_mode_costs_the_surprise_of_its_weight():
    assert check_seeking(lambda w: -math.log(w))


@pytest.mark.false_variant("prop-kl-directions")
@pytest.mark.parametrize(
    "variant", [lambda w: 1 - w, lambda w: -math.log2(w), lambda w: -w * math.log(w)]
)
def test_false_prices_of_a_mode_are_rejected(variant):
    assert not check_seeking(variant)
