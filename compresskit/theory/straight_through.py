"""What the straight-through gradient gets right and wrong where everything can be computed: noise
before the quantizer, and one weight that is trained."""

from typing import NamedTuple

import numpy as np

from compresskit.theory.checks import array, finite, result


class NoisyQuantizer(NamedTuple):
    """What `noisy_quantizer` returns: mean and variance of Q(w + z), and their derivatives in w."""

    mean: float | np.ndarray
    variance: float | np.ndarray
    mean_slope: float | np.ndarray
    variance_slope: float | np.ndarray


class SquaredLoss(NamedTuple):
    """What `straight_through_bias` returns: the expected loss E (Q(w + z) - t)^2 / 2, its
    derivative in w, and the mean of the straight-through gradient."""

    loss: float | np.ndarray
    gradient: float | np.ndarray
    straight_through: float | np.ndarray


class Oscillation(NamedTuple):
    """What `oscillation` returns: the shares of the steps that are spent on the lower and on the
    upper level, the mean of (Q - t)^2 / 2 over the steps, and its value on the nearer level."""

    lower: float | np.ndarray
    upper: float | np.ndarray
    loss: float | np.ndarray
    least: float | np.ndarray


def noisy_quantizer(weight, noise, *, levels, thresholds):
    """g(w) = E Q(w + z), V(w) = Var Q(w + z), g'(w) and V'(w), for a staircase Q.

    Q is `levels[i]` between `thresholds[i - 1]` and `thresholds[i]`. With jumps d_i at the
    thresholds theta_i, g' = sum d_i f(theta_i - w), where f is the density of the noise, and V' is
    the derivative of E Q^2 less 2 g g'.

    Parameters
    ----------
    weight : float or array_like
        w
    noise : scipy.stats frozen distribution
        of z, with a density: `norm(scale=0.5)`, `uniform(-0.5, 1)`
    levels : (k,) array_like
        rising, k at least 2
    thresholds : (k - 1,) array_like
        rising

    Returns
    -------
    NoisyQuantizer, each field of the shape of `weight`

    Raises
    ------
    ValueError
        levels or thresholds that do not rise or do not fit, numbers that are not finite

    References
    ----------
    Book: chapter 10, equation eq-noise-gradient.

    Examples
    --------
    >>> from scipy.stats import norm
    >>> noisy_quantizer(0.0, norm(), levels=[-1, 1], thresholds=[0]).variance
    1.0
    """
    weight = finite(array(weight, "weight"), "weight")
    levels, thresholds = _staircase(levels, thresholds)
    above = np.asarray(noise.sf(thresholds - weight[..., None]))
    density = np.asarray(noise.pdf(thresholds - weight[..., None]))
    mean = levels[0] + above @ np.diff(levels)
    mean_slope = density @ np.diff(levels)
    share = -np.diff(above, axis=-1, prepend=1, append=0)
    variance = (share * (levels - mean[..., None]) ** 2).sum(-1)
    middle = (levels[1:] + levels[:-1]) / 2
    variance_slope = 2 * (density * np.diff(levels) * (middle - mean[..., None])).sum(-1)
    return NoisyQuantizer(*map(result, (mean, variance, mean_slope, variance_slope)))


def straight_through_bias(weight, target, noise, *, levels, thresholds):
    """F = (g - t)^2/2 + V/2, F' = (g - t) g' + V'/2, and g - t, which is taken for it.

    Parameters
    ----------
    weight : float or array_like
        w
    target : float
        t
    noise : scipy.stats frozen distribution
        as for `noisy_quantizer`
    levels : (k,) array_like
        as there
    thresholds : (k - 1,) array_like
        as there

    Returns
    -------
    SquaredLoss

    Raises
    ------
    ValueError
        as `noisy_quantizer`

    References
    ----------
    Bengio, Leonard and Courville, arXiv 1308.3432 (the estimator). Book: chapter 10, theorem
    thm-straight-through-bias.

    Examples
    --------
    >>> from scipy.stats import norm  # a sign: the true gradient never changes its sign
    >>> at = straight_through_bias([-1, 1], 0.5, norm(), levels=[-1, 1], thresholds=[0])
    >>> at.gradient.round(3), at.straight_through.round(3)
    (array([-0.242, -0.242]), array([-1.183,  0.183]))
    """
    target = finite(array(target, "target"), "target")
    moments = noisy_quantizer(weight, noise, levels=levels, thresholds=thresholds)
    miss = moments.mean - target
    return SquaredLoss(
        result(miss**2 / 2 + np.asarray(moments.variance) / 2),
        result(miss * moments.mean_slope + np.asarray(moments.variance_slope) / 2),
        result(miss),
    )


def oscillation(lower, upper, target):
    """(b - t)/(b - a), (t - a)/(b - a), (t - a)(b - t)/2 and min(t - a, b - t)^2/2.

    What gradient descent with the straight-through gradient of (Q(w) - t)^2/2 tends to, if t lies
    between two neighboring levels a < b and its rate is not too large: w never settles.

    Parameters
    ----------
    lower : float or array_like
        a
    upper : float or array_like
        b
    target : float or array_like
        t, with a < t < b

    Returns
    -------
    Oscillation

    Raises
    ------
    ValueError
        a target that is not between the levels

    References
    ----------
    Book: chapter 10, theorem thm-straight-through-oscillation.

    Examples
    --------
    >>> oscillation(0, 1, 0.25)
    Oscillation(lower=0.75, upper=0.25, loss=0.09375, least=0.03125)
    """
    a, b, t = (
        finite(array(x, name), name)
        for x, name in ((lower, "lower"), (upper, "upper"), (target, "target"))
    )
    if not ((a < t) & (t < b)).all():
        raise ValueError(
            f"target={t} between the levels {a} and {b}; it must lie strictly between them, or the"
            " weight does settle: for instance 0.25 between 0 and 1"
        )
    share = (t - a) / (b - a)
    return Oscillation(
        result(1 - share),
        result(share),
        result((t - a) * (b - t) / 2),
        result(np.minimum(t - a, b - t) ** 2 / 2),
    )


def _staircase(levels, thresholds):
    levels = finite(array(levels, "levels"), "levels")
    thresholds = finite(array(thresholds, "thresholds"), "thresholds")
    rising = all(x.ndim == 1 and (np.diff(x) > 0).all() for x in (levels, thresholds))
    if not rising or len(levels) < 2 or len(levels) != len(thresholds) + 1:
        raise ValueError(
            f"levels of shape {levels.shape}, thresholds of shape {thresholds.shape}; both must"
            " rise, with one threshold between two levels: [-1, 1] and [0]"
        )
    return levels, thresholds
