"""How far rounding with feedback stays from the rate-distortion function: chapter 19.

Rates are in bits per weight.
"""

import math

import numpy as np

from compresskit.theory.checks import finite, result


def _numbers(x, name):
    return finite(np.asarray(x, np.float64), name)


_ROUND = 0.5 * math.log2(math.pi * math.e / 6)


def feedback_gap(diagonal, steps=None):
    """1/2 log2(pi e / 6) + 1/2 log2(AM / GM of (V_ii step_i)^2): the gap of fine coded grids.

    Of a Gaussian matrix whose columns are rounded with feedback and whose levels are coded at their
    entropy, to the rate-distortion function of the layer. It is least, 0.2546 bit, where steps are
    in proportion to 1 / V_ii.

    Parameters
    ----------
    diagonal : (n,) array_like
        of the triangular factor V of the inputs' second moments; positive
    steps : (n,) array_like
        positive; None: one step for all

    Returns
    -------
    float, in bits per weight

    Raises
    ------
    ValueError : another shape, or a number that is not positive

    References
    ----------
    Lifar, Savkin, Ordentlich and Polyanskiy, "WaterSIC", arXiv 2603.04956. Book: chapter 19.

    Examples
    --------
    >>> round(feedback_gap([1.0, 4.0]), 3), round(feedback_gap([1.0, 4.0], [4.0, 1.0]), 3)
    (0.798, 0.255)
    """
    diagonal = _numbers(diagonal, "diagonal")
    steps = np.ones_like(diagonal) if steps is None else _numbers(steps, "steps")
    if diagonal.ndim != 1 or steps.shape != diagonal.shape or not len(diagonal):
        raise ValueError(
            f"a diagonal of shape {diagonal.shape} and steps of shape {steps.shape}; two equal"
            " shapes (n,) are needed"
        )
    if not (diagonal > 0).all() or not (steps > 0).all():
        raise ValueError("the diagonal and the steps must be positive")
    logs = 2 * np.log2(diagonal * steps)
    top = logs.max()
    return result(_ROUND + 0.5 * (top + np.log2(np.exp2(logs - top).mean()) - logs.mean()))


def scale_mismatch(ratio):
    """KL between Gaussians of one mean whose standard deviations have this ratio, true to believed.

    Parameters
    ----------
    ratio : float or array_like
        positive

    Returns
    -------
    float or ndarray, in bits per symbol

    Raises
    ------
    ValueError : a ratio that is not positive

    Examples
    --------
    >>> round(scale_mismatch(2 ** (1 / 16)), 4)
    0.0028
    """
    square = _numbers(ratio, "ratio") ** 2
    if not np.all(square > 0):
        raise ValueError(f"ratio={ratio}; it must be positive, for instance 1.1")
    return result((square - 1 - np.log(square)) / (2 * math.log(2)))


def unseen_error(inputs, tokens):
    """E tr(S^-1 T) / n = N / (N - n - 1): the error on new inputs, over that on the N seen ones.

    For weights whose errors have a covariance in proportion to S^-1, as water-filling makes them,
    S the second moments of N independent Gaussian inputs of moments T.

    Parameters
    ----------
    inputs : int
        n
    tokens : int
        N, above n + 1

    Raises
    ------
    ValueError : too few tokens

    References
    ----------
    The mean of an inverse Wishart matrix. Book: chapter 19.

    Examples
    --------
    >>> unseen_error(384, 770)
    2.0
    """
    if not 1 <= inputs < tokens - 1:
        raise ValueError(
            f"{tokens} tokens for {inputs} inputs; the mean is finite from {inputs + 2} tokens on"
        )
    return tokens / (tokens - inputs - 1)
