"""Scalar quantizers of a known law: the best of k levels, its high-resolution limit, and the
uniform grid with an entropy code. Rates in bits, distortions in the square of the source's unit.

A law is a frozen distribution of `scipy.stats`, such as `norm()` or `laplace(scale=0.1)`: what is
used are its `pdf`, `cdf`, `sf`, `ppf`, `isf`, `mean()` and `var()`. Integrals are Gauss-Legendre
sums over panels that end at the quantiles 10^-1, 10^-2, ... of both tails and at the median, where
a density may have a kink. A density that is infinite at an end of its support is refused.

(Over 200 lines, more than half of them statements and refusals.)
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import integrate, linalg

from compresskit.theory.checks import array, finite, result
from compresskit.theory.information import entropy

SPACE_FILLING_BITS = 0.5 * math.log2(math.pi * math.e / 6)
"""0.2546: what a uniform grid with an ideal entropy code costs above R(D) as its step goes to 0."""
SPACE_FILLING_DB = 10 * math.log10(math.pi * math.e / 6)
"""1.533: the same, as distortion at equal rate."""

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(20)
_TAILS = 10.0 ** -np.arange(1, 41)


class ScalarQuantizer(NamedTuple):
    """What `lloyd_max_quantizer` returns: levels, the thresholds between them, E(X - Q)^2, and the
    probability of each level."""

    values: np.ndarray
    thresholds: np.ndarray
    distortion: float
    probabilities: np.ndarray


class CodedQuantizer(NamedTuple):
    """What `entropy_coded_uniform` returns: entropy of the levels in bits, and E(X - Q)^2."""

    rate: float
    distortion: float


def lloyd_max_quantizer(law, levels):
    """The k levels with y_i = E[X | t_(i-1) < X < t_i] and t_i halfway between y_i and y_(i+1).

    Necessary for the least E(X - Q(X))^2, and sufficient where the density is log-concave (normal,
    logistic, Laplace, uniform): then there is one solution. Newton's method on the centroid
    condition, from the quantiles of the density proportional to pdf^(1/3).

    Parameters
    ----------
    law : scipy.stats frozen distribution
        with a bounded density and a finite variance
    levels : int
        1 to 4096

    Returns
    -------
    ScalarQuantizer

    Raises
    ------
    ValueError
        `levels` out of range, a variance that is not finite, a density that is infinite at an end
        of its support, or no convergence

    References
    ----------
    Lloyd 1957 (published 1982); Max 1960; uniqueness: Fleischer 1964, Trushkin 1982. Book: chapter
    7.

    Examples
    --------
    >>> from scipy.stats import norm
    >>> round(lloyd_max_quantizer(norm(), 4).distortion, 4)
    0.1175
    """
    if type(levels) is not int or not 1 <= levels <= 4096:
        raise ValueError(f"levels={levels!r}; it must be 1 to 4096, for instance 16")
    variance = _variance(law)
    values = _compander(law, levels)
    mass, moment = _moments(law, values)
    for _ in range(200):
        thresholds = (values[1:] + values[:-1]) / 2
        centers = moment / mass
        miss = values - centers
        if np.abs(miss).max() <= 1e-13 * math.sqrt(variance):
            break
        # d centers_i / d t = f(t) (t - centers_i) / mass_i, and d t / d values = 1/2 on each side
        density = law.pdf(thresholds)
        right = density * (thresholds - centers[:-1]) / mass[:-1] / 2
        left = density * (centers[1:] - thresholds) / mass[1:] / 2
        bands = np.zeros((3, levels))
        bands[0, 1:], bands[2, :-1] = -right, -left
        bands[1] = 1 - np.append(right, 0) - np.insert(left, 0, 0)
        step = linalg.solve_banded((1, 1), bands, miss)
        moved = values - step
        values = np.sort(centers) if (np.diff(moved) <= 0).any() else moved
        mass, moment = _moments(law, values)
    else:
        if np.abs(miss).max() > 1e-9 * math.sqrt(variance):
            raise ValueError(f"no convergence at {levels} levels; try fewer, or a smoother law")
    thresholds = (values[1:] + values[:-1]) / 2
    return ScalarQuantizer(values, thresholds, _distortion(law, values), mass)


def quantizer_distortion(law, values):
    """E(X - Q(X))^2 where Q(X) is the nearest of `values`.

    Parameters
    ----------
    law : scipy.stats frozen distribution
    values : (k,) array_like
        in any order, finite

    Raises
    ------
    ValueError
        no values, NaN or infinite ones, or a law without a finite variance or a bounded density

    Examples
    --------
    >>> from scipy.stats import uniform
    >>> round(quantizer_distortion(uniform(), [0.25, 0.75]) * 48, 9)
    1.0
    """
    values = finite(array(values, "values"), "values")
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values has shape {values.shape}; give a vector such as [-1.0, 1.0]")
    _variance(law)
    return _distortion(law, np.sort(values))


def bennett_integral(law, point_density, levels):
    """integral of f / lambda^2, over 12 k^2: the high-resolution distortion of k levels of density
    lambda.

    Parameters
    ----------
    law : scipy.stats frozen distribution
    point_density : callable
        x -> lambda(x), vectorized, with integral 1
    levels : int
        k, at least 1

    Returns
    -------
    float, infinite where the integrand does not vanish far out in the tails

    Raises
    ------
    ValueError
        `levels` below 1, or a density that is infinite at an end of its support

    References
    ----------
    Bennett, "Spectra of quantized signals", 1948. Book: chapter 7.

    Examples
    --------
    >>> from scipy.stats import norm
    >>> round(bennett_integral(norm(), norm(scale=3**0.5).pdf, 1), 4)  # sqrt(3) pi / 2
    2.7207
    """
    levels = float(_counts(levels))
    _bounded(law)
    far = 10.0 ** -np.arange(50, 301, 10)  # it may fall much more slowly than the density
    x, weight = _panels(law, np.concatenate([law.ppf(far), law.isf(far)]))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        terms = (weight * law.pdf(x) / point_density(x) ** 2).sum(1)
    vanishing = max(terms[0], terms[-1]) <= 1e-6 * terms.sum()
    return float(terms.sum()) / (12 * levels**2) if vanishing else math.inf


def panter_dite(law, levels):
    """(integral of f^(1/3))^3 / (12 k^2): the limit of k^2 D at the best k levels, divided by k^2.

    Parameters
    ----------
    law : scipy.stats frozen distribution
    levels : int or array_like
        k, at least 1

    Raises
    ------
    ValueError
        `levels` below 1, a density that is infinite at an end of its support, or an f^(1/3) that
        is not integrable or falls too slowly to be integrated to its end, as that of Student's t
        with 3 degrees of freedom

    References
    ----------
    Panter and Dite, "Quantization distortion in pulse-count modulation", 1951. Book: chapter 7.

    Examples
    --------
    >>> from scipy.stats import uniform
    >>> round(panter_dite(uniform(), 4) * 12 * 16, 9)
    1.0
    """
    levels = _counts(levels)
    _bounded(law)
    return result(_cube_root_mass(law) ** 3 / (12 * np.square(levels)))


def entropy_coded_uniform(law, step, *, shift=0.0, decode="midpoint"):
    """H(Q) and E(X - Q)^2 of cells of one width: what an ideal entropy code of their numbers costs.

    The cells are those of the numbers nearest to (i + shift) * step, over all integers i.

    Parameters
    ----------
    law : scipy.stats frozen distribution
    step : float
        finite, and above 1/10000 of the width that holds all but 2e-16 of the law
    shift : float
        finite; 0: a level at zero; 0.5: a threshold there
    decode : str
        "midpoint": each cell stands for its midpoint; "centroid": for its mean under the law

    Returns
    -------
    CodedQuantizer

    Raises
    ------
    ValueError
        `step` or `shift` out of its range, `decode` unknown, or a law without a finite variance or
        a bounded density

    References
    ----------
    Gish and Pierce, "Asymptotically efficient quantizing", 1968. Book: chapter 7.

    Examples
    --------
    >>> from scipy.stats import uniform
    >>> entropy_coded_uniform(uniform(), 0.25, shift=0.5).rate
    2.0
    """
    _variance(law)
    if decode not in ("midpoint", "centroid"):
        raise ValueError(f'decode={decode!r}; it must be "midpoint" or "centroid"')
    low, high = law.ppf(1e-16), law.isf(1e-16)
    if not (high - low) / 1e4 < step < math.inf:
        raise ValueError(
            f"step={step}; it must be finite and above {(high - low) / 1e4:.3g} for this law, for "
            f"instance {law.std():.3g}"
        )
    if not math.isfinite(shift):
        raise ValueError(f"shift={shift}; it must be finite, for instance 0.5")
    first, last = math.floor(low / step - shift), math.ceil(high / step - shift)
    values = (np.arange(first, last + 1) + shift) * step
    mass, moment = _moments(law, values)
    gain = 0.0  # a mean beats a midpoint by the square of their distance
    if decode == "centroid":
        gain = float(np.sum((moment - values * mass)[mass > 0] ** 2 / mass[mass > 0]))
    return CodedQuantizer(entropy(mass / mass.sum()), _distortion(law, values) - gain)


def _counts(levels):
    levels = array(levels, "levels")
    if not (np.isfinite(levels) & (levels >= 1)).all():
        raise ValueError(f"levels={levels}; give finite numbers of at least 1, for instance 16")
    return levels


def _variance(law):
    variance = float(law.var())
    if not (math.isfinite(variance) and variance > 0):
        raise ValueError(
            f"the law has variance {variance}; give one of finite, positive variance, such as "
            "norm()"
        )
    _bounded(law)
    return variance


def _bounded(law):
    for end in law.support():
        with np.errstate(all="ignore"):
            infinite = math.isfinite(end) and not math.isfinite(law.pdf(end))
        if infinite:
            raise ValueError(
                f"the density is infinite at {end}, an end of its support; give a law of bounded "
                "density, such as norm()"
            )


def _edges(law):
    """Panel ends inside the support: its ends, the median, and quantiles far into both tails."""
    low, high = law.support()
    inner = np.concatenate([law.ppf(_TAILS[::-1]), [law.median()], law.isf(_TAILS)])
    ends = [end for end in (low, high) if np.isfinite(end)]
    return np.unique(np.concatenate([inner[np.isfinite(inner)], ends]))


def _panels(law, cuts):
    """(panels, nodes) points and weights of a quadrature whose panels also end at `cuts`."""
    cuts = np.asarray(cuts, float)
    low, high = law.support()
    edges = np.union1d(_edges(law), cuts[np.isfinite(cuts) & (cuts > low) & (cuts < high)])
    center, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return center[:, None] + half[:, None] * _NODES, half[:, None] * _WEIGHTS


def _cells(law, values, terms):
    """Sums over each cell of `terms(x, its value) * pdf(x)`."""
    thresholds = (values[1:] + values[:-1]) / 2
    x, weight = _panels(law, thresholds)
    cell = np.searchsorted(thresholds, x[:, 0])
    weight = weight * law.pdf(x)
    return [
        np.bincount(cell, (weight * term).sum(1), len(values))
        for term in terms(x, values[cell][:, None])
    ]


def _moments(law, values):
    """P(Q = y_i) and E[X; Q = y_i] for each of the values."""
    return _cells(law, values, lambda x, y: (1.0, x))


def _distortion(law, values):
    return float(_cells(law, values, lambda x, y: ((x - y) ** 2,))[0].sum())


def _cube_root_mass(law):
    ends = _edges(law)
    pieces = [
        integrate.quad(lambda x: law.pdf(x) ** (1 / 3), a, b, limit=200)[0]
        for a, b in pairwise(ends)
    ]
    if max(pieces[0], pieces[-1]) > 1e-6 * sum(pieces):
        raise ValueError(
            "f^(1/3) is not integrable, or barely: the tails are too heavy; give a law whose tails "
            "fall faster, such as laplace()"
        )
    return sum(pieces)


def _compander(law, levels):
    """Quantiles (i + 1/2) / k of the density proportional to pdf^(1/3)."""
    x, weight = _panels(law, ())
    x, weight = x.ravel(), (weight * np.cbrt(law.pdf(x))).ravel()
    below = (np.cumsum(weight) - weight / 2) / weight.sum()
    return np.interp((np.arange(levels) + 0.5) / levels, below, x)
