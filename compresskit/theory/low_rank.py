"""What rank can and cannot do: errors, bounds of random ranges, and the spectrum of noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import integrate

from compresskit.theory.checks import array, nonnegative


class Truncation(NamedTuple):
    """The least errors of a matrix of rank k.

    Parameters
    ----------
    squared : float
        of the Frobenius norm, squared: the sum of the squared singular values left out
    spectral : float
        of the largest singular value: the first one left out
    """

    squared: float
    spectral: float


def truncation(singular, rank: int) -> Truncation:
    """Eckart, Young and Mirsky: what no matrix of this rank can be below.

    Parameters
    ----------
    singular : (q,) array
        all singular values, largest first
    rank : int
        0 to q

    Raises
    ------
    ValueError : values that rise or are negative, or a rank out of range
    """
    left = _checked(singular, rank)[rank:]
    return Truncation(float(np.square(left).sum()), float(left[0]) if len(left) else 0.0)


def random_range(singular, rank: int, oversample: int) -> float:
    """(1 + k/(p - 1)) times the least squared error: a bound for a random range.

    On E||A - Q Q^T A||_F^2, where Q is a basis of A G and G a Gaussian matrix with k + p columns.

    Parameters
    ----------
    singular : (q,) array
        all singular values of A, largest first
    rank : int
        k; the bound holds for every k of 2 or more with k + p columns
    oversample : int
        p, 2 or more

    Raises
    ------
    ValueError : as `truncation`; a rank or `oversample` below 2

    References
    ----------
    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011,
    theorem 10.5.
    """
    _check_oversampling(rank, oversample)
    return (1 + rank / (oversample - 1)) * truncation(singular, rank).squared


def random_range_spectral(singular, rank: int, oversample: int, power: int = 0) -> float:
    """At most E||A - Q Q^T A||, the largest singular value, after `power` power steps.

    Parameters
    ----------
    singular, rank, oversample : as for `random_range`
    power : int
        q, 0 or more

    References
    ----------
    Halko, Martinsson and Tropp, 2011, theorem 10.6 and corollary 10.10.
    """
    _check_oversampling(rank, oversample)
    if power < 0:
        raise ValueError(f"power={power}; it must be 0 or more, for instance 2")
    root = 2 * power + 1
    values = _checked(singular, rank)
    top = float(values[0])
    if not top:
        return 0.0
    raised = (values / top) ** root
    squared, first = truncation(raised, rank)
    bound = (1 + math.sqrt(rank / (oversample - 1))) * first
    bound += math.e * math.sqrt(rank + oversample) / oversample * math.sqrt(squared)
    return top * bound ** (1 / root)


def noise_share(rows: int, columns: int, rank: int) -> float:
    """At most this share of the energy of white noise lies in its best `rank` directions: 4r/n.

    r (sqrt(m) + sqrt(n))^2 / (m n), since no singular value of large Gaussian matrices is above
    sqrt(m) + sqrt(n): 4r/n of a square one, and 1 at most.

    Parameters
    ----------
    rows, columns : int
        m and n
    rank : int

    References
    ----------
    Davidson and Szarek, 2001, theorem II.13 (the largest singular value's mean).
    """
    edge = (math.sqrt(rows) + math.sqrt(columns)) ** 2
    return min(1.0, rank * edge / (rows * columns))


def gaussian_energy(rows: int, columns: int, share: float) -> float:
    """The share of a Gaussian matrix's energy in this share of its largest singular values.

    The limit for large sizes, by the law of Marchenko and Pastur.

    Parameters
    ----------
    rows, columns : int
        m and n, of which only the ratio counts
    share : float
        of the min(m, n) singular values, from 0 to 1

    Raises
    ------
    ValueError : a share out of range, or a size below 1

    References
    ----------
    Marchenko and Pastur, "Distribution of eigenvalues for some sets of random matrices", 1967.
    """
    if not 0 <= share <= 1 or min(rows, columns) < 1:
        raise ValueError(
            f"share={share} of a ({rows}, {columns}) matrix; use 0 to 1, for instance 0.5"
        )
    ratio = min(rows, columns) / max(rows, columns)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def mass(above: float, weight: int) -> float:
        # x = middle + half sin(t) takes the roots at both ends out of the integrand
        middle, half = (low + high) / 2, (high - low) / 2

        def density(t: float) -> float:
            x = middle + half * math.sin(t)
            root = (half * math.cos(t)) ** 2
            return x**weight * root / (2 * math.pi * ratio * x) if x > 0 else 0.0

        begin = math.asin(min(1.0, max(-1.0, (above - middle) / half)))
        return integrate.quad(density, begin, math.pi / 2, limit=200)[0]

    if share in (0, 1):
        return float(share)
    bottom, top = low, high
    for _ in range(60):
        at = (bottom + top) / 2
        bottom, top = (at, top) if mass(at, 0) > share else (bottom, at)
    return mass(bottom, 1) / mass(low, 1)


def degrees_of_freedom(rows: int, columns: int, rank: int) -> int:
    """k(m + n - k): numbers that a matrix of rank k is determined by; its factors hold k^2 more.

    Parameters
    ----------
    rows, columns, rank : int
    """
    return rank * (rows + columns - rank)


def vanished(update, step) -> float:
    """The share of an update's entries that leave a weight on the grid where it was.

    A weight on a grid point, moved by less than half a step, is rounded back to it.

    Parameters
    ----------
    update : array
    step : number or array
        the grid's step, of each entry or of all

    Examples
    --------
    >>> vanished([0.1, -0.4, 0.6, 2.0], 1.0)
    0.5
    """
    small = np.abs(array(update, "update")) < nonnegative(step, "step") / 2
    return float(small.mean())


def _checked(singular, rank: int) -> np.ndarray:
    values = nonnegative(singular, "singular")
    falling = values.ndim == 1 and values.size and (np.diff(values) <= 0).all()
    if not falling:
        raise ValueError("singular values must fall, as those of numpy.linalg.svd do")
    if not 0 <= rank <= len(values):
        raise ValueError(f"rank={rank} of {len(values)} singular values; use 0 to {len(values)}")
    return values


def _check_oversampling(rank: int, oversample: int) -> None:
    if rank < 2 or oversample < 2:
        raise ValueError(
            f"rank={rank}, oversample={oversample}; the bound needs 2 or more of both, such as 10"
        )
