"""Entropies, divergences and rate-distortion limits: each formula of chapter 2 once, in float64.

Probabilities are arrays whose entries along `axis` sum to 1 within 1e-6; all other axes are kept.
Whatever `numpy.asarray` takes is accepted, and torch tensors of any dtype and device. A scalar
result is a `float`, any other an array. Information is in bits unless `unit="nats"`, rates are in
bits; a distortion is a mean or total square, in the unit of the variances beside it. Nothing here
samples or iterates. (Longer than 200 lines because each public function carries its statement,
source and example; the code is a third of it.)
"""

from typing import NamedTuple

import numpy as np
from scipy.special import entr, rel_entr, xlog1py, xlogy

from compresskit.theory.checks import array, finite, nats, nonnegative, pair, probabilities, result


class WaterFilling(NamedTuple):
    """What `reverse_water_filling` returns: the level, and each component's distortion and rate."""

    level: float | np.ndarray
    distortions: np.ndarray
    rates: np.ndarray


def entropy(p, *, axis=-1, unit="bits"):
    """H(p) = -sum p log p, with 0 log 0 = 0: fewest bits per i.i.d. symbol of any lossless code.

    Parameters
    ----------
    p : (..., k) array_like
        probabilities
    axis : int
        the axis along which they sum to 1
    unit : str
        "bits" or "nats"

    Returns
    -------
    float or (...) ndarray
        between 0 and log k

    Raises
    ------
    ValueError
        a negative or NaN entry, a sum further than 1e-6 from 1, an unknown unit

    References
    ----------
    Shannon, "A mathematical theory of communication", 1948, section 6. Book: chapter 2.

    Examples
    --------
    >>> entropy([0.5, 0.25, 0.25])
    1.5
    """
    return result(entr(probabilities(p, axis, "p")).sum(axis) / nats(unit) + 0.0)


def cross_entropy(p, q, *, axis=-1, unit="bits"):
    """-sum p log q: mean ideal code length of symbols from p under the code for q.

    Infinite if some q = 0 < p. Shapes, units and errors as for `kl_divergence`.

    Examples
    --------
    >>> cross_entropy([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    1.75
    """
    p, q = pair(p, q, axis)
    return result(-xlogy(p, q).sum(axis) / nats(unit) + 0.0)


def kl_divergence(p, q, *, axis=-1, unit="bits"):
    """KL(p || q) = sum p log(p / q): the cost of the code for q where p is true; inf if q = 0 < p.

    Summed as p ln(p/q) - p + q, never negative (Gibbs' inequality, term by term). The sum is the
    same if p and q have equal sums; else it differs by sum q - sum p, at most 2e-6 nats. Where p
    and q differ by d, it is right to about 1e-16 / d; the literal sum only to 1e-16 / d^2.

    Parameters
    ----------
    p, q : (..., k) array_like
        probabilities, of equal shape
    axis : int
        the axis along which they sum to 1
    unit : str
        "bits" or "nats"

    Raises
    ------
    ValueError
        unequal shapes, a negative or NaN entry, a sum further than 1e-6 from 1, the unit

    References
    ----------
    Kullback and Leibler, "On information and sufficiency", 1951. Book: chapter 2.

    Examples
    --------
    >>> kl_divergence([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    0.25
    """
    p, q = pair(p, q, axis)
    terms = np.maximum(rel_entr(p, q) - (p - q), 0.0)  # rounding may leave -1e-17
    return result(terms.sum(axis) / nats(unit))


def total_variation(p, q, *, axis=-1):
    """max over events A of p(A) - q(A), which is half of sum |p - q|: a number from 0 to 1.

    Shapes and errors as for `kl_divergence`; there is no unit.

    Examples
    --------
    >>> total_variation([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
    0.25
    """
    p, q = pair(p, q, axis)
    return result(0.5 * np.abs(p - q).sum(axis))


def pinsker_bound(kl, *, unit="bits"):
    """sqrt(KL / 2), KL in nats: total variation is never larger. Above KL = 2 nats it says nothing.

    Parameters
    ----------
    kl : float or array_like
        at least 0
    unit : str
        that of `kl`, "bits" or "nats"

    Raises
    ------
    ValueError
        `kl` negative or NaN, unknown unit

    References
    ----------
    Pinsker 1964; this constant: Csiszar 1967, Kullback 1967, Kemperman 1969. Book: chapter 2.

    Examples
    --------
    >>> pinsker_bound(0.5, unit="nats")
    0.5
    """
    return result(np.sqrt(nonnegative(kl, "kl") * nats(unit) / 2))


def bretagnolle_huber_bound(kl, *, unit="bits"):
    """sqrt(1 - exp(-KL)), KL in nats: total variation is never larger; at most 1, for every KL.

    Below Pinsker's bound from KL = 1.594 nats on. Arguments and errors as for `pinsker_bound`.

    References
    ----------
    Bretagnolle and Huber, "Estimation des densites: risque minimax", 1979. Book: chapter 2.

    Examples
    --------
    >>> bretagnolle_huber_bound(float("inf"))
    1.0
    """
    return result(np.sqrt(-np.expm1(-nonnegative(kl, "kl") * nats(unit))))


def binary_entropy(p, *, unit="bits"):
    """h(p) = -p log p - (1 - p) log(1 - p), for each entry of p on its own.

    Raises
    ------
    ValueError
        an entry outside [0, 1] or NaN, unknown unit

    Examples
    --------
    >>> binary_entropy([0.0, 0.5, 1.0]).tolist()
    [0.0, 1.0, 0.0]
    """
    p = nonnegative(p, "p")
    if (p > 1).any():
        raise ValueError(f"p holds {p.max()}, not a probability; use numbers from 0 to 1")
    return result((entr(p) - xlog1py(1 - p, -p)) / nats(unit) + 0.0)


def gaussian_distortion(rate, variance):
    """D(R) = variance * 2^(-2R): the least mean squared error of a Gaussian at R bits per sample.

    Parameters
    ----------
    rate, variance : float or array_like
        at least 0, broadcast against each other; the variance is finite, the rate need not be

    Raises
    ------
    ValueError
        a negative or NaN entry, an infinite variance

    References
    ----------
    Shannon, "Coding theorems for a discrete source with a fidelity criterion", 1959. Chapter 2.

    Examples
    --------
    >>> gaussian_distortion(1.0, 4.0)
    1.0
    """
    variance = finite(nonnegative(variance, "variance"), "variance")
    return result(variance * np.exp2(-2 * nonnegative(rate, "rate")))


def gaussian_rate(distortion, variance):
    """R(D) = max(0, log2(variance / D) / 2) bits per sample: the inverse of `gaussian_distortion`.

    Infinite at D = 0, but 0 where the variance is 0 as well. Arguments and errors alike.

    Examples
    --------
    >>> gaussian_rate([1.0, 9.0], 4.0).tolist()
    [1.0, 0.0]
    """
    distortion = nonnegative(distortion, "distortion")
    variance = nonnegative(variance, "variance")
    coded = distortion < variance
    with np.errstate(divide="ignore"):  # log2(0) = -inf is the right answer at D = 0
        smaller = np.log2(np.where(coded, distortion, 1.0))  # logs first: the ratio may overflow
    return result((np.log2(np.where(coded, variance, 1.0)) - smaller) / 2)


def reverse_water_filling(variances, distortion):
    """Distortions min(level, variance) that sum to `distortion`: the fewest bits for n Gaussians.

    A component below the level gets no bits; every other one has distortion `level` and costs
    log2(variance / level) / 2 bits. The level is exact, by sorting, O(n log n). Where `distortion`
    reaches the sum of the variances, the level is the largest of them and all rates are 0.

    Parameters
    ----------
    variances : (n,) array_like
        of independent Gaussians, at least 0 and finite
    distortion : float or (...) array_like
        the TOTAL squared error over the n components

    Returns
    -------
    WaterFilling
        level (...), distortions (..., n), rates (..., n) in bits per component

    Raises
    ------
    ValueError
        a negative or NaN entry, or `variances` not finite or not a non-empty vector

    References
    ----------
    Kolmogorov 1956; Cover and Thomas, Elements of Information Theory, 2nd ed., theorem 10.3.3.

    Examples
    --------
    >>> fill = reverse_water_filling([4.0, 1.0, 0.25], 2.25)
    >>> fill.level, fill.rates.tolist()
    (1.0, [1.0, 0.0, 0.0])
    """
    variances = finite(nonnegative(variances, "variances"), "variances")
    distortion = nonnegative(distortion, "distortion")
    if variances.ndim != 1 or variances.size == 0:
        raise ValueError(f"variances has shape {variances.shape}; give a vector such as [4.0, 1.0]")
    ascending = np.sort(variances)
    n = ascending.size
    below = np.concatenate([[0.0], np.cumsum(ascending)])  # sum of the k smallest variances
    brim = below[:-1] + np.arange(n, 0, -1) * ascending  # total distortion at level ascending[k]
    k = np.searchsorted(brim, distortion, side="right")  # how many components are under water
    level = np.where(k == n, ascending[-1], (distortion - below[k]) / np.maximum(n - k, 1))
    distortions = np.minimum(level[..., None], variances)
    return WaterFilling(result(level), distortions, gaussian_rate(distortions, variances))


def linear_layer_rate(weight_variance, second_moment, distortion):
    """The fewest bits per weight at mean squared output error E||(W - W')x||^2 / m = distortion.

    For W (m, n) with independent N(0, weight_variance) entries and m large. In the eigenbasis of
    S = E[x x^T] a row of W is n independent Gaussians whose errors weigh lambda_i: its rate is that
    of `reverse_water_filling` for the variances weight_variance * lambda_i, here divided by n.

    Parameters
    ----------
    weight_variance : float
        one number, at least 0, for all weights
    second_moment : (n, n) or (n,) array_like
        S, or its eigenvalues alone: symmetric and positive semidefinite up to 1e-5 of its largest
        entry and eigenvalue (float32 moments); eigenvalues within that below 0 count as 0
    distortion : float or (...) array_like
        mean squared error of one output

    Returns
    -------
    float or (...) ndarray
        bits per weight

    Raises
    ------
    ValueError
        a negative, NaN or infinite number, a `weight_variance` that is not one number, S not
        square, not symmetric or not semidefinite

    References
    ----------
    Book: chapter 2, corollary on the rate of a linear layer.

    Examples
    --------
    >>> linear_layer_rate(1.0, [[4.0, 0.0], [0.0, 4.0]], 2.0)
    1.0
    """
    weight_variance = nonnegative(weight_variance, "weight_variance")
    if weight_variance.ndim != 0:
        raise ValueError(
            f"weight_variance has shape {weight_variance.shape}; give one number for all weights, "
            "such as 0.01"
        )
    moment = finite(array(second_moment, "second_moment"), "second_moment")
    if moment.ndim not in (1, 2) or moment.shape[0] != moment.shape[-1] or moment.size == 0:
        raise ValueError(
            f"second_moment has shape {moment.shape}; give a square matrix (n, n), or its"
            " eigenvalues (n,)"
        )
    if np.abs(moment - moment.T).max() > 1e-5 * np.abs(moment).max():
        raise ValueError("second_moment is not symmetric; give E[x x^T], e.g. (S + S.T) / 2")
    eigenvalues = moment if moment.ndim == 1 else np.linalg.eigvalsh((moment + moment.T) / 2)
    if eigenvalues.min() < -1e-5 * np.abs(eigenvalues).max():
        raise ValueError(
            f"second_moment has the eigenvalue {eigenvalues.min():.3g}, so it is no E[x x^T]; "
            "give a positive semidefinite matrix, e.g. x.T @ x / len(x)"
        )
    variances = weight_variance * np.maximum(eigenvalues, 0.0)
    return result(reverse_water_filling(variances, distortion).rates.mean(-1))


def sqnr_db(signal, error):
    """10 log10(sum signal^2 / sum error^2), signal to quantization noise in dB; inf for no error.

    Parameters
    ----------
    signal, error : array_like
        of equal shape: what there was, and what came back minus it

    Raises
    ------
    ValueError
        shapes that differ, an entry that is NaN or infinite

    Examples
    --------
    >>> sqnr_db([10.0, 0.0], [0.0, 1.0])
    20.0
    """
    signal = finite(array(signal, "signal"), "signal")
    error = finite(array(error, "error"), "error")
    if signal.shape != error.shape:
        raise ValueError(f"signal has shape {signal.shape}, error {error.shape}; give equal shapes")
    scale = np.abs(error).max(initial=0.0)
    if scale == 0:
        return float("inf")
    with np.errstate(divide="ignore"):  # a zero signal under noise is at -inf dB
        ratio = np.linalg.norm(signal / scale) / np.linalg.norm(error / scale)
        return float(20 * np.log10(ratio))
