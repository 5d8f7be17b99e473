"""What a student can inherit: each term of the bounds of chapter 4 as a function, in float64.

A predictor maps x to probabilities over k classes; its Gibbs risk is the chance that a label drawn
from them is wrong. Divergences are KL(teacher || student) in nats. Every bound holds with
probability at least 1 - delta over the draw of the sample, and only for a teacher, and a class of
students, that were chosen without looking at that sample.
(Over 200 lines: statement, hypotheses and source stand with each formula; the code is a third.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from compresskit.theory.checks import array, finite, nonnegative, pair, probabilities
from compresskit.theory.information import kl_divergence, total_variation


class RiskBound(NamedTuple):
    """A bound on a student's Gibbs risk, term by term; `total` is their sum.

    `distance` bounds the mean total variation on the sample (it is that mean itself in
    `fresh_sample_bound`), `complexity` and `confidence` what the sample may hide of it. A total of
    1 or more says nothing: the risk is never above 1.
    """

    teacher_risk: float
    distance: float
    complexity: float
    confidence: float

    @property
    def total(self) -> float:
        """The bound: teacher_risk + distance + complexity + confidence."""
        return sum(self)


def gibbs_risk(p, labels):
    """Mean of 1 - p(label): how often a label drawn from p is wrong.

    It is linear in p and lies in [0, 1]. The most probable label is wrong at most twice as often.

    Parameters
    ----------
    p : (..., k) array_like
        probabilities
    labels : (...) array_like of integers
        0 to k - 1

    Raises
    ------
    ValueError
        p is no distribution, shapes that do not fit, a label that is no class

    References
    ----------
    McAllester, "PAC-Bayesian stochastic model selection", 2003. Book: chapter 4.

    Examples
    --------
    >>> gibbs_risk([[0.75, 0.25], [0.5, 0.5]], [0, 1])
    0.375
    """
    p = probabilities(p, -1, "p")
    labels = array(labels, "labels")
    if labels.shape != p.shape[:-1] or labels.size == 0:
        raise ValueError(
            f"p has shape {p.shape} and labels {labels.shape}; give one label for each row of p"
        )
    if (labels != np.round(labels)).any() or (labels < 0).any() or (labels >= p.shape[-1]).any():
        raise ValueError(
            f"labels from {labels.min():g} to {labels.max():g} for {p.shape[-1]} classes; "
            f"use integers from 0 to {p.shape[-1] - 1}"
        )
    return float(1 - np.take_along_axis(p, labels.astype(int)[..., None], -1).mean())


def mean_total_variation(p, q):
    """Mean over the rows of max over events A of p(A) - q(A); from 0 to 1.

    The Gibbs risks of p and q on the same inputs differ by no more, whatever the labels are.
    Shapes and errors as for `total_variation`.

    Examples
    --------
    >>> mean_total_variation([[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
    0.25
    """
    return float(np.mean(total_variation(p, q)))


def divergence_term(teacher, student):
    """sqrt(mean KL(teacher || student) / 2), KL in nats: never below the mean total variation.

    Pinsker's inequality for each row, then Jensen's for the mean of the roots.

    Parameters
    ----------
    teacher, student : (n, k) array_like
        probabilities for the same inputs

    Returns
    -------
    float, without a unit; infinite if the student rules out what the teacher allows

    Examples
    --------
    >>> divergence_term([[0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [np.exp(-1), 1 - np.exp(-1)]])
    0.5
    """
    return float(np.sqrt(np.mean(kl_divergence(teacher, student, unit="nats")) / 2))


def confidence_term(count, delta):
    """sqrt(ln(1 / delta) / (2 count)): the mean of `count` numbers in [0, 1] is that far off.

    For one fixed function it is Hoeffding's inequality, for the supremum over a class around its
    expectation McDiarmid's; one side only, each with probability at least 1 - delta.

    Parameters
    ----------
    count : int
        independent inputs, at least 1
    delta : float
        probability of failure, above 0 and below 1

    Raises
    ------
    ValueError
        `count` or `delta` outside its range

    References
    ----------
    Hoeffding 1963, theorem 1. McDiarmid, "On the method of bounded differences", 1989, lemma 1.2.

    Examples
    --------
    >>> round(confidence_term(5000, 0.05), 4)
    0.0173
    """
    return math.sqrt(-math.log(_failure(delta)) / (2 * _count(count)))


def occam_term(bits, count, delta):
    """sqrt((bits ln 2 + ln(1 / delta)) / (2 count)), for every student of a prefix code at once.

    A student whose file has `bits` bits gets 2^-bits of the probability of failure; by Kraft's
    inequality that is enough for all. The code must be fixed before the sample is seen.

    Parameters
    ----------
    bits : float
        length of this student's code word: 8 times the bytes of its file
    count, delta : int, float
        as for `confidence_term`, which is the case of no bits

    References
    ----------
    Blumer et al., "Occam's razor", 1987; McAllester 1999 for weighted classes. Book: chapter 4.

    Examples
    --------
    >>> round(occam_term(8 * 1000, 100_000, 0.05), 3)
    0.167
    """
    bits = float(finite(nonnegative(bits, "bits"), "bits"))
    failure = bits * math.log(2) - math.log(_failure(delta))
    return math.sqrt(failure / (2 * _count(count)))


def distillation_bound(teacher, student, *, teacher_risk, complexity, delta, measured="expected"):
    """R(s) <= R(t) + sqrt(mean KL / 2) + 2 complexity + sqrt(ln(1 / delta) / 2n), for all students.

    With probability at least 1 - delta over the n inputs, for every student of the class at once,
    so also for one that was fitted to these very inputs. No labels are needed but for R(t).

    Parameters
    ----------
    teacher, student : (n, k) array_like
        their probabilities at the n inputs, i.i.d. and drawn after the teacher was fixed
    teacher_risk : float
        R(t), expected Gibbs risk of the teacher
    complexity : float
        Rademacher complexity of the functions x -> TV(teacher(x), student(x)) over the class of
        students, or an upper bound on it; not that of the students themselves. An estimate from
        below, such as a supremum searched by ascent, gives no bound, and a Monte Carlo mean one
        up to its standard error
    delta : float
        probability of failure
    measured : str
        "expected": `complexity` is its expectation over samples. "sample": it is that of these n
        inputs; the last term is then 3 sqrt(ln(2 / delta) / 2n)

    Returns
    -------
    RiskBound
        its `complexity` is 2 complexity

    Raises
    ------
    ValueError
        rows that are no distributions, a number outside its range

    References
    ----------
    Bartlett and Mendelson, "Rademacher and Gaussian complexities", 2002, theorem 8, for the
    uniform part (with other constants). Book: chapter 4.

    Examples
    --------
    >>> same = np.full((2000, 2), 0.5)
    >>> bound = distillation_bound(same, same, teacher_risk=0.5, complexity=0.0, delta=0.05)
    >>> bound.distance, round(bound.total, 4)
    (0.0, 0.5274)
    """
    count = _rows(teacher, student)
    complexity = float(finite(nonnegative(complexity, "complexity"), "complexity"))
    if measured == "expected":
        confidence = confidence_term(count, delta)
    elif measured == "sample":
        confidence = 3 * confidence_term(count, _failure(delta) / 2)
    else:
        raise ValueError(f'measured={measured!r} is unknown; use "expected" or "sample"')
    distance = divergence_term(teacher, student)
    return RiskBound(_risk(teacher_risk), distance, 2 * complexity, confidence)


def fresh_sample_bound(teacher, student, *, teacher_risk, delta):
    """R(s) <= R(t) + mean TV + sqrt(ln(1 / delta) / 2m): one student, m inputs it has not seen.

    There is no class any more, hence no complexity, and the total variation itself is measured, so
    neither Pinsker nor Jensen is needed. Arguments and errors as for `distillation_bound`.

    Returns
    -------
    RiskBound
        its `complexity` is 0

    Examples
    --------
    >>> same = np.full((2000, 2), 0.5)
    >>> round(fresh_sample_bound(same, same, teacher_risk=0.5, delta=0.05).confidence, 4)
    0.0274
    """
    confidence = confidence_term(_rows(teacher, student), delta)
    return RiskBound(_risk(teacher_risk), mean_total_variation(teacher, student), 0.0, confidence)


class Estimate(NamedTuple):
    """A mean of independent draws and the standard error of that mean."""

    mean: float
    standard_error: float


def rademacher(supremum: Callable[[np.ndarray], float], count, *, draws, seed) -> Estimate:
    """E sup over the class of (1/n) sum e_i g(x_i), e_i = +-1 fair and independent, by simulation.

    Unbiased if `supremum` finds the supremum; what finds only a large value, such as an ascent
    from a random start, gives a lower estimate. It is the complexity on the given inputs.

    Parameters
    ----------
    supremum : callable
        (n,) array of signs -> sup over g of sum e_i g(x_i) / n, a float
    count : int
        n
    draws : int
        independent sign vectors, at least 2
    seed : int
        of the signs

    Returns
    -------
    Estimate
        mean and standard error over the draws

    References
    ----------
    Bartlett and Mendelson, "Rademacher and Gaussian complexities", 2002, definition 2 (they take
    the absolute value, and 2/n for 1/n). Book: chapter 4.

    Examples
    --------
    >>> rademacher(lambda signs: abs(signs).mean(), 50, draws=10, seed=0)  # all sign vectors
    Estimate(mean=1.0, standard_error=0.0)
    """
    if draws != int(draws) or draws < 2:
        raise ValueError(f"draws={draws}; use 2 or more, for instance 100")
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(int(draws), _count(count)))
    found = np.array([supremum(row) for row in signs], dtype=np.float64)
    return Estimate(float(found.mean()), float(found.std(ddof=1) / math.sqrt(draws)))


def rademacher_finite(values):
    """E max over the rows g of (1/n) sum e_i g_i, exactly, by all 2^n sign vectors; O(m n 2^n).

    Parameters
    ----------
    values : (m, n) array_like
        m functions at n inputs, n at most 20

    Raises
    ------
    ValueError
        not a matrix, or too many inputs to list their signs

    Examples
    --------
    >>> rademacher_finite([[1.0, 1.0], [-1.0, -1.0]])
    0.5
    """
    values = _matrix(values, "values")
    n = values.shape[1]
    if n > 20:
        raise ValueError(f"{n} inputs have 2^{n} sign vectors; use at most 20, or `rademacher`")
    total = np.zeros((len(values), 1))  # all sums, one more input at a time
    for column in values.T:
        total = np.concatenate([total + column[:, None], total - column[:, None]], axis=1)
    return float(total.max(0).mean() / n)


def rademacher_signs(count, scale=1.0):
    """scale E|e_1 + ... + e_n| / n: the exact complexity of the two constants +scale and -scale.

    With k = ceil(n / 2), E|S_n| = 2 k binom(n, k) / 2^n, close to sqrt(2 n / pi).

    Parameters
    ----------
    count : int
        n
    scale : float
        at least 0

    Examples
    --------
    >>> rademacher_signs(3, 2.0)
    1.0
    """
    n = _count(count)
    half = (n + 1) // 2
    mean = 2 * half * math.comb(n, half) / 2**n  # integers, however long, divide exactly
    return float(finite(nonnegative(scale, "scale"), "scale")) * mean / n


def massart_bound(values):
    """r sqrt(2 ln m) / n, r the largest Euclidean norm of the m rows: no smaller than the exact E.

    Parameters
    ----------
    values : (m, n) array_like
        m functions at n inputs

    References
    ----------
    Massart, "Some applications of concentration inequalities to statistics", 2000, lemma 5.2.

    Examples
    --------
    >>> massart_bound([[1.0, 1.0], [-1.0, -1.0]]) > rademacher_finite([[1.0, 1.0], [-1.0, -1.0]])
    True
    """
    values = _matrix(values, "values")
    longest = np.linalg.norm(values, axis=1).max()
    return float(longest * math.sqrt(2 * math.log(len(values))) / values.shape[1])


def linear_supremum(inputs, radius):
    """signs -> radius ||sum e_i x_i|| / n: the supremum over x -> <w, x> with ||w|| <= radius.

    Parameters
    ----------
    inputs : (n, d) array_like
    radius : float
        at least 0

    Returns
    -------
    callable, for `rademacher`

    Examples
    --------
    >>> linear_supremum([[3.0, 0.0], [0.0, 4.0]], 2.0)(np.array([1.0, -1.0]))
    5.0
    """
    inputs, radius = _matrix(inputs, "inputs"), _length(radius, "radius")
    return lambda signs: float(radius * np.linalg.norm(signs @ inputs) / len(inputs))


def linear_bound(inputs, radius):
    """radius sqrt(sum ||x_i||^2) / n, at least the complexity of x -> <w, x>, ||w|| <= radius.

    At most sqrt(2) times as large as it, whatever the inputs. Arguments as for `linear_supremum`.

    References
    ----------
    Bartlett and Mendelson 2002, lemma 22; the factor: Khintchine's inequality with the constant of
    Latala and Oleszkiewicz, 1994.

    Examples
    --------
    >>> linear_bound([[3.0, 0.0], [0.0, 4.0]], 2.0)
    5.0
    """
    inputs = _matrix(inputs, "inputs")
    return float(_length(radius, "radius") * np.linalg.norm(inputs) / len(inputs))


def softmax_complexity(radius, input_norm, classes, count):
    """(radius input_norm / 2) sqrt(classes / count): for x -> TV(t(x), softmax(W x)), any fixed t.

    An upper bound for the class ||W||_F <= radius where E||x||^2 <= input_norm^2, which a bound on
    ||x|| implies. One half is sqrt(2) from the contraction of vectors times sqrt(2)/4, the
    Lipschitz constant of u -> TV(t, softmax(u)) in the Euclidean norm.

    Parameters
    ----------
    radius, input_norm : float
        at least 0
    classes, count : int
        k and n

    References
    ----------
    Maurer, "A vector-contraction inequality for Rademacher complexities", 2016.

    Examples
    --------
    >>> softmax_complexity(2.0, 1.0, 10, 1000)
    0.1
    """
    return (
        _length(radius, "radius")
        * _length(input_norm, "input_norm")
        / 2
        * math.sqrt(_count(classes) / _count(count))
    )


def network_complexity(norms, last, input_norm, count):
    """(last / 2) prod(norms) input_norm (sqrt(2 ln 2 depth) + 1) / sqrt(count): a ReLU network.

    An upper bound on the complexity of x -> TV(t(x), softmax(W_d relu(... relu(W_1 x)))).

    Parameters
    ----------
    norms : sequence of float
        bounds on the Frobenius norms of the hidden matrices W_1, ..., W_(d-1); no biases, or an
        input and a unit in every layer that are constant
    last : float
        sum of the bounds on the Euclidean norms of the rows of W_d
    input_norm : float
        bound on ||x||
    count : int
        n

    References
    ----------
    Golowich, Rakhlin and Shamir, "Size-independent sample complexity of neural networks", 2018,
    theorem 1, for each logit; then the contraction of `softmax_complexity`.

    Examples
    --------
    >>> network_complexity([1.0, 1.0], 1.0, 1.0, 100) > softmax_complexity(1.0, 1.0, 1, 100)
    True
    """
    norms = finite(nonnegative(norms, "norms"), "norms")
    depth = norms.size + 1
    growth = math.sqrt(2 * math.log(2) * depth) + 1
    size = _length(last, "last") / 2 * float(norms.prod()) * _length(input_norm, "input_norm")
    return size * growth / math.sqrt(_count(count))


def _count(count):
    if count != int(count) or count < 1:
        raise ValueError(f"a count of {count}; use an integer of at least 1")
    return int(count)


def _failure(delta):
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}; use a probability above 0 and below 1, such as 0.05")
    return delta


def _risk(risk):
    if not 0 <= risk <= 1:
        raise ValueError(f"teacher_risk={risk}; a Gibbs risk lies between 0 and 1")
    return float(risk)


def _length(value, name):
    return float(finite(nonnegative(value, name), name))


def _matrix(x, name):
    x = finite(array(x, name), name)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{name} has shape {x.shape}; give a matrix (m, n)")
    return x


def _rows(teacher, student):
    teacher, _ = pair(teacher, student, -1)
    if teacher.ndim != 2 or len(teacher) == 0:
        raise ValueError(f"teacher has shape {teacher.shape}; give probabilities (n, k)")
    return len(teacher)
