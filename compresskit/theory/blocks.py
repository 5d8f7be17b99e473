"""The mean squared error of a block of i.i.d. weights whose largest ones define its grid.

Given its extremes, the other weights of a block are again i.i.d., so the error is an integral and
no model. Laws are frozen distributions of `scipy.stats`, as in `theory.quantizers`; errors are in
the square of their unit. What is left out is the rounding of the step itself to a stored dtype.
"""

from typing import NamedTuple

import numpy as np

_OUTER = np.polynomial.legendre.leggauss(8)
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)  # per half cell


class BlockError(NamedTuple):
    """What the two functions below return: the mean squared error per weight, and what
    E step^2 / 12 would make of it."""

    exact: float
    high_resolution: float


def absmax_block_error(law, size, below, above):
    """E|e|^2 / B where the step is M / p, M = max |w_i| of B i.i.d. weights, and the levels are
    -p ... r times the step, turned so that the largest weight is the level -p.

    That is (B - 1) / B times the mean over M of E[e^2 | |X| < M]. In ggml's formats, Q4_0 has p = 8
    and r = 7, Q5_0 16 and 15, Q8_0 127 and 127.

    Parameters
    ----------
    law : scipy.stats frozen distribution
        symmetric about 0, with a density and a finite variance
    size : int
        B, at least 2
    below : int
        p, at least 1
    above : int
        r, from 1 to p

    Returns
    -------
    BlockError
        `high_resolution` is (B - 1) / B E M^2 / (12 p^2); it knows nothing of weights beyond the
        level r

    Raises
    ------
    ValueError
        a size or a number of levels out of its range, a law whose quartiles are not symmetric about
        0 (the rest is not compared) or that has no finite variance

    References
    ----------
    Book: chapter 11.

    Examples
    --------
    >>> from scipy.stats import uniform
    >>> found = absmax_block_error(uniform(-1, 2), 32, 127, 127)
    >>> round(found.exact / found.high_resolution, 6)  # a uniform weight stays uniform in its cell
    1.0
    """
    _check_size(size, 2)
    for name, count, most in (("below", below, 2**12), ("above", above, below)):
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"{name}={count!r}; it must be 1 to {most}, for instance {most}")
    quartiles = law.ppf([0.25, 0.75])
    if abs(quartiles.sum()) > 1e-9 * np.ptp(quartiles):
        raise ValueError(f"the law has quartiles {quartiles}; give a symmetric one, such as norm()")
    _check_variance(law)
    log_share, weight = _uniform()
    largest = law.isf(-np.expm1(log_share / size) / 2)  # P(M <= m) is the share
    error = _mean_square(law, -largest, largest / below, np.arange(below + above + 1), largest)
    others = (size - 1) / size
    return BlockError(
        float(others * (weight @ error)),
        float(others * (weight @ (largest / below) ** 2) / 12),
    )


def minmax_block_error(law, size, steps):
    """E|e|^2 / B where the levels of B i.i.d. weights are `steps` + 1 equidistant ones, from the
    least weight to the largest.

    That is (B - 2) / B times the mean over both extremes of E[e^2 | least < X < largest]. In ggml's
    formats, Q4_1 has 15 steps and Q5_1 31.

    Parameters
    ----------
    law : scipy.stats frozen distribution
        with a density and a finite variance
    size : int
        B, at least 3
    steps : int
        number of levels less 1, at least 1

    Returns
    -------
    BlockError
        `high_resolution` is (B - 2) / B E(max - min)^2 / (12 steps^2)

    Raises
    ------
    ValueError
        a size or a number of steps out of its range, or a law without a finite variance

    References
    ----------
    Book: chapter 11.

    Examples
    --------
    >>> from scipy.stats import norm
    >>> round(minmax_block_error(norm(), 32, 15).exact ** 0.5, 4)
    0.0782
    """
    _check_size(size, 3)
    if type(steps) is not int or not 1 <= steps <= 2**12:
        raise ValueError(f"steps={steps!r}; it must be 1 to {2**12}, for instance 15")
    _check_variance(law)
    log_share, weight = _uniform()
    above = -np.expm1(log_share / size)  # P(X > largest)
    below = (1 - above[:, None]) * -np.expm1(log_share / (size - 1))
    largest, least = law.isf(above)[:, None], law.ppf(below)
    step = (largest - least) / steps
    error = _mean_square(law, least, step, np.arange(steps + 1), largest)
    others = (size - 2) / size
    return BlockError(
        float(others * (weight @ error @ weight)),
        float(others * (weight @ step**2 @ weight) / 12),
    )


def _check_size(size, least):
    if type(size) is not int or size < least:
        raise ValueError(f"size={size!r}; it must be an int of at least {least}, for instance 32")


def _check_variance(law):
    if not np.isfinite(law.var()):
        raise ValueError("the law has no finite variance; give one that has, such as norm()")


def _uniform():
    """ln u and weights of a quadrature over u in (0, 1), finer towards both ends."""
    nodes, weights = _OUTER
    edges = np.concatenate([[0], 10.0 ** -np.arange(9, 0, -1), [0.5]])
    center, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    u = (center[:, None] + half[:, None] * nodes).ravel()
    weight = (half[:, None] * weights).ravel()
    return np.concatenate([np.log(u), np.log1p(-u)]), np.concatenate([weight, weight])


def _mean_square(law, start, step, index, end):
    """E[e^2 | start < X < end] on the levels start + step * index, the last of which may lie short
    of `end`; the arguments but `index` are arrays of one shape."""
    start, step, end = np.broadcast_arrays(start, step, end)
    square, mass = np.zeros(step.shape), np.zeros(step.shape)
    for i in index:  # two half cells for each level, since a density may have a kink on one
        level = start + step * i
        left = level - step / 2 if i else level
        right = np.where(i == index[-1], end, level + step / 2)
        for a, b in ((left, level), (level, right)):
            half = (b - a) / 2
            x = ((a + b) / 2)[..., None] + half[..., None] * _NODES
            share = law.pdf(x) * _WEIGHTS * half[..., None]
            square += (share * (x - level[..., None]) ** 2).sum(-1)
            mass += share.sum(-1)
    return square / mass
