"""Every statement of chapter 4 as a check, and false variants of it which that check rejects.

Probabilities are computed by listing all samples, and suprema by listing all students, so the
check of a bound that holds "with probability at least 1 - delta" involves no chance.
"""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from compresskit import theory

ROUNDING = 1e-12  # sums of at most a few thousand float64 terms of size about 1
DELTAS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1 - 1e-9)


class World:
    """Finitely many inputs with their probabilities and labels, a teacher, a class of students.

    `teacher` is (inputs, k), `students` (m, inputs, k); `n` inputs are drawn independently.
    """

    def __init__(self, inputs, labels, teacher, students, n):
        self.inputs, self.labels, self.n = np.asarray(inputs), np.asarray(labels), n
        self.teacher, self.students = np.asarray(teacher), np.asarray(students)
        stacked = np.broadcast_to(self.teacher, self.students.shape)
        self.tv = theory.total_variation(stacked, self.students)
        self.kl = theory.kl_divergence(stacked, self.students, unit="nats")

    def expected(self, values):
        return values @ self.inputs

    def risk(self, p):
        right = np.take_along_axis(p, np.broadcast_to(self.labels, p.shape[:-1])[..., None], -1)
        return self.expected(1 - right[..., 0])

    def samples(self):
        """Every sample of n inputs with its probability."""
        for places in itertools.product(range(len(self.inputs)), repeat=self.n):
            yield list(places), self.inputs[list(places)].prod()

    def complexity(self):
        """R_n of the distances from the teacher, exactly."""
        return sum(p * theory.rademacher_finite(self.tv[:, places]) for places, p in self.samples())


def memorizers(size, n):
    """Teacher right everywhere; for each set of inputs a student that is wrong on exactly it."""
    sets = np.array(list(itertools.product([0.0, 1.0], repeat=size)))
    right = np.tile([1.0, 0.0], (size, 1))
    students = np.stack([1 - sets, sets], axis=-1)
    return World(np.full(size, 1 / size), np.zeros(size, int), right, students, n)


def one_student(chance, n):
    """Teacher right everywhere, the only student wrong on one of two inputs."""
    right = [[1.0, 0.0], [1.0, 0.0]]
    return World([chance, 1 - chance], [0, 0], right, [[[0.0, 1.0], [1.0, 0.0]]], n)


def close_coins(step=0.01):
    """One input, one student: where Pinsker's inequality is almost an equality."""
    return World([1.0], [0], [[0.5 + step, 0.5 - step]], [[[0.5, 0.5]]], 1)


def random_worlds(count=25, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        k, m, size = rng.integers(2, 5), rng.integers(1, 6), 3
        p = rng.dirichlet(np.full(k, 0.5), size=(m + 1, size))
        inputs = rng.dirichlet(np.ones(size))
        yield World(inputs, rng.integers(k, size=size), p[0], p[1:], int(rng.integers(1, 4)))


def worlds():
    yield from random_worlds()
    yield memorizers(8, 2)
    yield close_coins()
    for n in (1, 2, 4):
        for chance in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
            yield one_student(chance, n)


WORLDS = [(world, world.complexity()) for world in worlds()]


def check_bound(bound, cases=WORLDS, sharp=True):
    """Does R(s) <= bound fail with probability at most delta, for all students at once?

    bound(world, places, risk of the teacher, complexity, delta) -> one number per student. With
    `sharp`, it must also come within 1 % of the excess risk where one input is all there is.
    """
    sharpest = math.inf
    for world, complexity in cases:
        t, s = world.risk(world.teacher), world.risk(world.students)
        for delta in DELTAS:
            failed = 0.0
            for places, probability in world.samples():
                allowed = bound(world, places, t, complexity, delta)
                failed += probability * bool((s > allowed + ROUNDING).any())
                if len(world.inputs) == 1:  # no chance: the distance must be Pinsker's
                    sharpest = min(sharpest, ((allowed - t) / (s - t)).min())
            if failed > delta + ROUNDING:
                return False
    return not sharp or sharpest < 1.01


def with_terms(distance=None, complexity=2.0, confidence=None):
    """The bound of the theorem, with one or the other term replaced."""
    distance = distance or (lambda kl, tv: np.sqrt(kl.mean(-1) / 2))
    confidence = confidence or (lambda n, delta: math.sqrt(math.log(1 / delta) / (2 * n)))

    def bound(world, places, teacher, rademacher, delta):
        apart = distance(world.kl[:, places], world.tv[:, places])
        return teacher + apart + complexity * rademacher + confidence(world.n, delta)

    return bound


# --- the theorem


@pytest.mark.theorem("thm-distillation-bound")
def test_all_students_at_once_keep_the_bound_except_with_probability_delta():
    assert check_bound(with_terms())


@pytest.mark.theorem("thm-distillation-bound")
def test_the_bound_with_total_variation_in_place_of_its_root_holds_as_well():
    assert check_bound(with_terms(distance=lambda kl, tv: tv.mean(-1)))


@pytest.mark.theorem("thm-distillation-bound")
def test_the_package_adds_up_the_terms_of_the_theorem():
    def packaged(world, places, teacher, rademacher, delta):
        return np.array(
            [
                theory.distillation_bound(
                    world.teacher[places],
                    s[places],
                    teacher_risk=teacher,
                    complexity=rademacher,
                    delta=delta,
                ).total
                for s in world.students
            ]
        )

    few = [case for case in WORLDS if case[0].n < 4 and len(case[0].students) < 9]
    assert check_bound(packaged, few)
    ours = with_terms()
    for world, complexity in few:
        for places, _ in itertools.islice(world.samples(), 5):
            arguments = (world, places, world.risk(world.teacher), complexity, 0.1)
            np.testing.assert_allclose(packaged(*arguments), ours(*arguments), rtol=1e-12)


@pytest.mark.false_variant("thm-distillation-bound")
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(with_terms(complexity=1.0), id="the factor 2 of the complexity is missing"),
        pytest.param(with_terms(complexity=0.0), id="the student was not chosen by the sample"),
        pytest.param(
            with_terms(confidence=lambda n, delta: math.sqrt(math.log(1 / delta) / (8 * n))),
            id="half the confidence term",
        ),
        pytest.param(
            with_terms(confidence=lambda n, delta: math.log(1 / delta) / (2 * n)),
            id="a fast rate",
        ),
        pytest.param(with_terms(confidence=lambda n, delta: 0.0), id="no confidence term"),
        pytest.param(
            with_terms(distance=lambda kl, tv: np.sqrt(kl.mean(-1) / math.log(2) / 2)),
            id="the divergence in bits, without ln 2: true, but never sharp",
        ),
        pytest.param(
            with_terms(distance=lambda kl, tv: np.sqrt(math.log(2) * kl.mean(-1) / 2)),
            id="ln 2 for a divergence in nats",
        ),
        pytest.param(with_terms(distance=lambda kl, tv: kl.mean(-1) / 2), id="no root"),
        pytest.param(
            with_terms(distance=lambda kl, tv: np.sqrt(kl.mean(-1)) / 2), id="KL / 4 for KL / 2"
        ),
        pytest.param(
            with_terms(distance=lambda kl, tv: 2 * tv.mean(-1)),
            id="the l1 distance for the total variation: true, but never sharp",
        ),
    ],
)
def test_false_bounds_on_the_students_risk_are_rejected(variant):
    assert not check_bound(variant)


@pytest.mark.false_variant("thm-distillation-bound")
def test_a_teacher_fitted_to_the_sample_breaks_the_bound():
    """It shrugs where the sample is and is right elsewhere; the only student always shrugs."""
    size, n, delta = 50, 3, 0.05
    student, right = np.full((size, 2), 0.5), np.tile([1.0, 0.0], (size, 1))
    for fresh in (True, False):
        failures = []
        for start in range(size):
            places = [(start + i) % size for i in range(n)]
            teacher = right.copy()
            if not fresh:
                teacher[places] = 0.5
            bound = theory.distillation_bound(
                teacher[places],
                student[places],
                teacher_risk=theory.gibbs_risk(teacher, np.zeros(size)),
                complexity=0.0,
                delta=1 - delta,
            )
            failures.append(theory.gibbs_risk(student, np.zeros(size)) > bound.total)
        assert failures == [not fresh] * size  # always, where delta = 0.05 would allow 2 in 50


@pytest.mark.false_variant("thm-distillation-bound")
@pytest.mark.parametrize("risk", ["cross-entropy", "arg max"])
def test_risks_that_are_not_linear_in_the_prediction_break_the_bound(risk):
    if risk == "cross-entropy":
        t, s, truth = np.array([[1 - 1e-3, 1e-3], [1 - 1e-12, 1e-12], [0.9, 0.1]])
        excess = theory.cross_entropy(truth, s, unit="nats") - theory.cross_entropy(
            truth, t, unit="nats"
        )
    else:
        t, s = np.array([[0.51, 0.49], [0.49, 0.51]])
        excess = float(t.argmax() == 0) - float(s.argmax() == 0)
    assert theory.divergence_term(t[None], s[None]) < 0.1
    assert excess > 0.9


# --- from distance to risk


def check_population(bound):
    """|R(s) - R(t)| <= bound(mean TV, mean KL in nats), and almost attained."""
    sharpest = 0.0
    for world, _ in WORLDS:
        for s, tv, kl in zip(world.students, world.tv, world.kl, strict=True):
            gap = abs(world.risk(s) - world.risk(world.teacher))
            allowed = bound(world.expected(tv), np.where(world.inputs > 0, kl, 0) @ world.inputs)
            if gap > allowed + ROUNDING:
                return False
            if allowed > 0:
                sharpest = max(sharpest, gap / allowed)
    return sharpest > 0.999


@pytest.mark.theorem("prop-inherit-risk")
def test_risks_differ_by_no_more_than_the_expected_distance():
    assert check_population(lambda tv, kl: tv)
    assert check_population(lambda tv, kl: math.sqrt(kl / 2))


@pytest.mark.theorem("prop-inherit-risk")
def test_two_classes_attain_it_for_the_labels_that_the_teacher_rates_higher():
    rng = np.random.default_rng(1)
    t, s = rng.dirichlet(np.ones(2), size=(2, 40))
    labels = (t - s).argmax(1)
    gap = theory.gibbs_risk(s, labels) - theory.gibbs_risk(t, labels)
    assert gap == pytest.approx(theory.mean_total_variation(t, s), rel=1e-12)


@pytest.mark.false_variant("prop-inherit-risk")
@pytest.mark.parametrize(
    "variant",
    [
        lambda tv, kl: tv / 2,
        lambda tv, kl: 2 * tv,  # the l1 distance: true, but never attained
        lambda tv, kl: math.sqrt(kl) / 2,
        lambda tv, kl: kl,
        lambda tv, kl: math.sqrt(kl / math.log(2) / 2),  # in bits, without ln 2: never attained
        lambda tv, kl: tv**2,
    ],
)
def test_false_distances_between_risks_are_rejected(variant):
    assert not check_population(variant)


def check_argmax(factor):
    """err <= factor R for random predictors, and almost attained by one that is narrowly wrong."""
    rng = np.random.default_rng(2)
    sharpest = 0.0
    for k in (2, 3, 10):
        for p in [
            *rng.dirichlet(np.full(k, 0.7), size=500),
            np.r_[0.4999, 0.5001, np.zeros(k - 2)],
        ]:
            wrong, risk = float(p.argmax() != 0), 1 - p[0]
            if wrong > factor * risk + ROUNDING:
                return False
            sharpest = max(sharpest, wrong / (factor * risk))
    return sharpest > 0.999


@pytest.mark.theorem("prop-inherit-argmax")
def test_the_most_probable_class_is_wrong_at_most_twice_as_often_as_a_drawn_one():
    assert check_argmax(2)


@pytest.mark.false_variant("prop-inherit-argmax")
@pytest.mark.parametrize("factor", [1, 1.9, 3])
def test_false_prices_of_an_argmax_are_rejected(factor):
    assert not check_argmax(factor)


# --- the lemmas


def check_symmetrization(factor):
    """E sup (E g - mean of g) <= factor R_n, and almost attained by one input of 10."""
    sharpest = 0.0
    for world in [*(w for w, _ in WORLDS), memorizers(10, 1)]:
        if not world.tv.any():
            continue
        largest = sum(
            p * (world.expected(world.tv) - world.tv[:, places].mean(-1)).max()
            for places, p in world.samples()
        )
        complexity = world.complexity()
        if largest > factor * complexity + ROUNDING:
            return False
        if complexity > ROUNDING:  # not for a single function
            sharpest = max(sharpest, largest / (factor * complexity))
    return sharpest > 0.85


@pytest.mark.theorem("lem-symmetrization")
def test_the_expected_supremum_is_at_most_two_complexities():
    assert check_symmetrization(2)


@pytest.mark.false_variant("lem-symmetrization")
@pytest.mark.parametrize("factor", [1, 1.7, 3])
def test_false_factors_of_the_complexity_are_rejected(factor):
    assert not check_symmetrization(factor)


def check_differences(constant):
    """ln P(mean of n coins >= p + u) <= -constant n u^2, exactly; almost attained far out."""
    sharpest = 0.0
    for n, p in itertools.product([1, 2, 5, 40, 100_000], [0.1, 0.5, 0.9]):
        shares = [0.02] if n > 1000 else np.arange(1, n + 1) / n - p
        for u in shares:
            if not 0 < u <= 1 - p:
                continue
            hits = math.ceil(n * (p + u) - 1e-9)
            exact = scipy.stats.binom.logsf(hits - 1, n, p)
            if exact > -constant * n * u * u + 1e-9:
                return False
            sharpest = max(sharpest, constant * n * u * u / -exact)
    return sharpest > 0.94


@pytest.mark.theorem("lem-bounded-differences")
def test_a_mean_of_coins_is_far_off_no_more_often_than_stated():
    assert check_differences(2)


@pytest.mark.theorem("lem-bounded-differences")
def test_a_supremum_is_far_above_its_mean_no_more_often_than_stated():
    for world, _ in WORLDS:
        cases = [
            ((world.expected(world.tv) - world.tv[:, places].mean(-1)).max(), p)
            for places, p in world.samples()
        ]
        mean = sum(value * p for value, p in cases)
        for u in (0.05, 0.1, 0.2, 0.4, 0.8):
            above = sum(p for value, p in cases if value >= mean + u)
            assert above <= math.exp(-2 * u * u * world.n) + ROUNDING


@pytest.mark.false_variant("lem-bounded-differences")
@pytest.mark.parametrize("constant", [2.2, 4, 1.8, 0.5])
def test_false_exponents_are_rejected(constant):
    assert not check_differences(constant)


def softmax(u):
    e = np.exp(u - u.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def check_lipschitz(constant):
    """|TV(t, softmax(u)) - TV(t, softmax(v))| <= constant ||u - v||, and almost attained."""
    rng, sharpest = np.random.default_rng(3), 0.0
    for k in (2, 3, 6):
        u = rng.normal(size=(4000, k)) * 3
        u[:400] = [0.0, 0.0, *[-40.0] * (k - 2)]  # a border between two classes
        v = u + rng.normal(size=u.shape) * 10.0 ** rng.uniform(-3, 1, size=(4000, 1))
        t = rng.dirichlet(np.full(k, 0.1), size=4000)
        t[:400] = np.eye(k)[0]
        v[:400] = u[:400] + 1e-3 * (np.eye(k)[0] - np.eye(k)[1])
        apart = abs(theory.total_variation(t, softmax(u)) - theory.total_variation(t, softmax(v)))
        ratio = (apart / np.linalg.norm(u - v, axis=1)).max()
        if ratio > constant + 1e-9:  # differences of 1e-4 have lost 12 of 16 digits at most
            return False
        sharpest = max(sharpest, ratio / constant)
    return sharpest > 0.999


@pytest.mark.theorem("lem-tv-softmax")
def test_total_variation_moves_at_most_a_quarter_root_two_per_unit_of_logits():
    assert check_lipschitz(math.sqrt(2) / 4)


@pytest.mark.false_variant("lem-tv-softmax")
@pytest.mark.parametrize("constant", [0.25, 0.3, 0.5, 1.0])
def test_false_lipschitz_constants_are_rejected(constant):
    assert not check_lipschitz(constant)


def check_contraction(factor):
    """E sup sum e_i h_i(f(x_i)) <= factor E sup sum e_ik f_k(x_i) for h of constant 1; attained."""
    rng, sharpest = np.random.default_rng(4), 0.0
    classes = [np.array([[[0.0, 0.0]], [[1.0, 1.0]]])]  # (m, n, k): attains it
    classes += [rng.normal(size=(m, n, 2)) for m in (2, 5) for n in (1, 2, 3) for _ in range(10)]
    for f in classes:
        m, n, k = f.shape
        anchor = np.zeros((n, k)) if m == 2 and n == 1 else rng.normal(size=(n, k))
        h = np.linalg.norm(f - anchor, axis=-1)
        left = n * theory.rademacher_finite(h)
        right = n * k * theory.rademacher_finite(f.reshape(m, n * k))
        if left > factor * right + ROUNDING:
            return False
        sharpest = max(sharpest, left / (factor * right))
    return sharpest > 0.999


@pytest.mark.theorem("lem-contraction")
def test_lipschitz_functions_of_vectors_cost_a_factor_of_root_two():
    assert check_contraction(math.sqrt(2))


@pytest.mark.false_variant("lem-contraction")
@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0])
def test_false_factors_of_the_contraction_are_rejected(factor):
    assert not check_contraction(factor)


# --- complexities of classes of students


def check_linear(bound):
    """2 R of softmax(W phi) at most bound(B, rho, K, n) for phi = n orthonormal vectors, K = 2?

    The teacher is sure of the first class, so the distance is the student's p_2. For signs e take
    the W whose rows are -e and e times B / sqrt(2 n): then p_2 = 1/2 + a e_i for each i, and the
    sum over e_i p_2 is n a + sum e_i / 2, with mean n a. So the complexity is at least a.
    This reaches half of the bound, so a factor between 1/2 and 1 is not decided here.
    """
    for n, radius in itertools.product([1, 4, 16, 100], [0.05, 0.5]):
        step = radius / math.sqrt(2 * n)
        a = theory.total_variation([1.0, 0.0], softmax(np.array([-step, step]))) - 0.5
        if 2 * a > bound(radius, 1.0, 2, n) + ROUNDING:
            return False
    return True


@pytest.mark.theorem("prop-inherit-linear")
def test_linear_students_are_no_more_complex_than_their_norm_allows():
    assert check_linear(lambda b, rho, k, n: b * rho * math.sqrt(k / n))
    assert check_linear(lambda b, rho, k, n: 2 * theory.softmax_complexity(b, rho, k, n))


@pytest.mark.false_variant("prop-inherit-linear")
@pytest.mark.parametrize(
    "variant",
    [
        lambda b, rho, k, n: b * rho * math.sqrt(k / n) / 3,
        lambda b, rho, k, n: b * rho * k / n,  # a fast rate
        lambda b, rho, k, n: b**2 * rho * math.sqrt(k / n),
        lambda b, rho, k, n: math.sqrt(k / n) / 100,  # no norm at all
    ],
)
def test_false_complexities_of_linear_students_are_rejected(variant):
    assert not check_linear(variant)


# --- the other bounds


@pytest.mark.theorem("cor-inherit-sample")
def test_the_complexity_of_the_sample_serves_as_well():
    def bound(world, places, teacher, _, delta):
        sample = theory.rademacher_finite(world.tv[:, places])
        luck = 3 * math.sqrt(math.log(2 / delta) / (2 * world.n))
        return teacher + np.sqrt(world.kl[:, places].mean(-1) / 2) + 2 * sample + luck

    assert check_bound(bound, sharp=False)


@pytest.mark.false_variant("cor-inherit-sample")
def test_the_sample_may_not_hide_all_of_its_complexity():
    def bound(world, places, teacher, _, delta):
        return teacher + world.tv[:, places].mean(-1) + math.log(2 / delta) / (8 * world.n)

    assert not check_bound(bound, sharp=False)


@pytest.mark.false_variant("cor-inherit-sample")
def test_the_complexity_of_the_sample_alone_leaves_out_luck():
    """One student has no complexity, and the sample may still miss the input where it errs."""

    def bound(world, places, teacher, _, delta):
        sample = theory.rademacher_finite(world.tv[:, places])
        return teacher + np.sqrt(world.kl[:, places].mean(-1) / 2) + 2 * sample

    assert not check_bound(bound, sharp=False)


@pytest.mark.theorem("cor-inherit-sample")
@pytest.mark.false_variant("cor-inherit-sample")
@pytest.mark.parametrize(("factor", "holds"), [(2, True), (1, True), (0.5, False), (0, False)])
def test_tables_of_thirty_inputs_need_some_of_the_complexity(factor, holds):
    """A table is right on the sample and wrong elsewhere; one for each sample is in the class.

    Inputs are continuous, so a table's risk is 1 beside a teacher that is right everywhere; the
    class follows all signs on the sample, which makes the complexity 1/2. A factor between 1/2
    and 2 is not decided by this class.
    """
    n, delta = 30, 0.05
    patterns = np.array(list(itertools.product([0.0, 1.0], repeat=10)))
    complexity = theory.rademacher_finite(patterns)  # of all patterns, whatever their length
    assert complexity == pytest.approx(0.5, rel=1e-12)
    bound = factor * complexity + 3 * theory.confidence_term(n, delta / 2)
    assert (bound >= 1) == holds


ALONE = [case for case in WORLDS if len(case[0].students) == 1]


@pytest.mark.theorem("prop-inherit-fresh")
def test_one_student_on_fresh_inputs_needs_no_complexity():
    assert check_bound(with_terms(distance=lambda kl, tv: tv.mean(-1), complexity=0.0), ALONE)


@pytest.mark.false_variant("prop-inherit-fresh")
@pytest.mark.parametrize("divisor", [4, 8])
def test_false_confidences_on_fresh_inputs_are_rejected(divisor):
    def luck(n, delta):
        return math.sqrt(math.log(1 / delta) / (divisor * n))

    tv = with_terms(distance=lambda kl, tv: tv.mean(-1), complexity=0.0, confidence=luck)
    assert not check_bound(tv, ALONE)


@pytest.mark.false_variant("prop-inherit-fresh")
def test_many_students_on_one_sample_are_not_fresh():
    tv = with_terms(distance=lambda kl, tv: tv.mean(-1), complexity=0.0)
    assert not check_bound(tv, [(memorizers(8, 3), 0.0)])


def check_occam(term):
    """256 students with words of 8 bits: do all keep R(t) + mean TV + term(bits, n, delta)?"""

    def bound(world, places, teacher, _, delta):
        return teacher + world.tv[:, places].mean(-1) + term(8, world.n, delta)

    return check_bound(bound, [(memorizers(8, n), 0.0) for n in (2, 4)], sharp=False)


@pytest.mark.theorem("prop-inherit-occam")
def test_students_with_short_files_keep_the_bound_all_at_once():
    assert check_occam(theory.occam_term)
    assert check_occam(lambda b, n, d: math.sqrt((b * math.log(2) - math.log(d)) / (2 * n)))


@pytest.mark.false_variant("prop-inherit-occam")
@pytest.mark.parametrize(
    "variant",
    [
        lambda b, n, d: theory.confidence_term(n, d),  # no bits
        lambda b, n, d: theory.occam_term(math.log2(b), n, d),  # bits of the number of bits
        lambda b, n, d: theory.occam_term(b, n, d) ** 2 / 4,  # a fast rate
    ],
)
def test_false_prices_of_bits_are_rejected(variant):
    assert not check_occam(variant)


# --- what the bound is silent about


def orders(inputs, s1, s2):
    """The signs of R(s1) - R(s2) under all rules y(x), by listing the rules."""
    size, k = s1.shape
    signs = set()
    for labels in itertools.product(range(k), repeat=size):
        right = np.arange(size), list(labels)
        signs.add(int(np.sign(inputs @ (s2[right] - s1[right]))))
    return signs


def check_orders(possible):
    """Is possible(t, s1, s2) the set of all signs of R(s1) - R(s2)? Also for two equal students."""
    rng = np.random.default_rng(5)
    for case in range(60):
        k, size = int(rng.integers(2, 5)), 3
        t, s1, s2 = rng.dirichlet(np.full(k, 0.5), size=(3, size))
        if case % 3 == 0:
            s1 = 0.99 * t + 0.01 * s1  # close to the teacher, and still worse under some labels
        if case % 10 == 0:
            s2 = s1
        if possible(t, s1, s2) != orders(rng.dirichlet(np.ones(size)), s1, s2):
            return False
    return True


@pytest.mark.theorem("prop-inherit-silent")
def test_of_two_different_students_either_may_have_the_smaller_risk():
    assert check_orders(lambda t, s1, s2: {-1, 1} if (s1 != s2).any() else {0})


@pytest.mark.theorem("prop-inherit-silent")
def test_the_rule_of_the_proof_makes_the_first_student_better_by_the_mean_largest_difference():
    rng = np.random.default_rng(6)
    for k in (2, 3, 10):
        s1, s2 = rng.dirichlet(np.full(k, 0.5), size=(2, 40))
        labels = (s1 - s2).argmax(-1)
        lead = theory.gibbs_risk(s2, labels) - theory.gibbs_risk(s1, labels)
        assert lead == pytest.approx((s1 - s2).max(-1).mean(), rel=1e-12)
        assert lead > 0


def by(distance):
    """The claim that the student at the smaller distance from the teacher has the smaller risk."""

    def possible(t, s1, s2):
        return {int(np.sign(distance(t, s1) - distance(t, s2)))}

    return possible


@pytest.mark.false_variant("prop-inherit-silent")
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(by(theory.mean_total_variation), id="the closer student is the better one"),
        pytest.param(by(theory.divergence_term), id="the smaller divergence, the smaller risk"),
        pytest.param(lambda t, s1, s2: {-1, 1}, id="equal students, too"),
        pytest.param(
            lambda t, s1, s2: (
                {0}
                if (s1 == s2).all()
                else by(theory.mean_total_variation)(t, s1, s2)
                if (abs(t - s1).max() < 0.02)
                else {-1, 1}
            ),
            id="one that is within 0.02 of the teacher cannot be the worse",
        ),
    ],
)
def test_distances_do_not_order_risks(variant):
    assert not check_orders(variant)
