"""What pruning removes, and what it costs to say where. Rates in bits.

A law is a frozen distribution of `scipy.stats` with a density and a finite second moment, as in
`theory.quantizers`. Sparsity is the share of the weights that are gone.

(Over 200 lines, more than half of them statements and refusals.)
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from compresskit.theory.checks import nonnegative, result
from compresskit.theory.information import binary_entropy

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_EXACT = 64  # up to here the binomial coefficient itself is computed, as a whole number


class MaskBounds(NamedTuple):
    """What `mask_bits_bounds` returns: log2 C(n, k) lies between these two numbers of bits."""

    lower: float
    upper: float


def removed_energy(sparsity, law):
    """E[X^2; |X| <= t] / E X^2 where P(|X| <= t) = s: what magnitude pruning takes from a law.

    Parameters
    ----------
    sparsity : float or array_like
        s, from 0 to 1
    law : scipy.stats frozen distribution
        of the weights

    Raises
    ------
    ValueError
        a sparsity outside [0, 1], or a law without a finite, positive second moment

    References
    ----------
    Book: chapter 12. For N(0, 1) it is s - 2 t phi(t), t = Phi^-1((1 + s) / 2).

    Examples
    --------
    >>> from scipy.stats import norm
    >>> round(removed_energy(0.9, norm()), 4)
    0.5607
    """
    sparsity = _sparsity(sparsity)
    energy = [_energy(law, share) for share in sparsity.ravel()]
    return result(np.array(energy).reshape(sparsity.shape))


def n_of_m_removed_energy(kept, group, law):
    """E[X^2 P(B < m - n)] / E X^2, B ~ Bin(m - 1, P(|X'| < |X|)): the same for n of each m.

    A weight goes if fewer than m - n of the m - 1 others in its group are smaller, that is if n or
    more are larger.

    Parameters
    ----------
    kept : int
        n, from 0 to m
    group : int
        m, at least 1
    law : scipy.stats frozen distribution
        of the weights, which are independent

    Raises
    ------
    ValueError
        not 0 <= n <= m, m below 1, or a law without a finite, positive second moment

    References
    ----------
    Book: chapter 12.

    Examples
    --------
    >>> from scipy.stats import norm
    >>> round(n_of_m_removed_energy(2, 4, norm()), 4)
    0.1324
    """
    _check_group(kept, group)
    if kept == 0:
        return 1.0
    return _energy(law, 1.0, lambda larger: stats.binom.sf(kept - 1, group - 1, larger))


def mask_bits(count, kept):
    """log2 C(n, k): bits that name one of all the masks that keep k of n weights.

    Parameters
    ----------
    count : int
        n
    kept : int
        k, from 0 to n

    Raises
    ------
    ValueError
        not two whole numbers with 0 <= k <= n

    Examples
    --------
    >>> mask_bits(4, 2) == math.log2(6)
    True
    """
    _check_count(count, kept)
    if min(kept, count - kept) <= _EXACT:
        return math.log2(math.comb(count, kept))
    logs = [math.lgamma(n + 1) for n in (count, kept, count - kept)]
    return (logs[0] - logs[1] - logs[2]) / math.log(2)


def mask_bits_bounds(count, kept):
    """n h(k/n) - log2(8 k (n - k) / n) / 2 <= log2 C(n, k) <= the same with 2 pi for 8.

    Parameters
    ----------
    count : int
        n, at least 2
    kept : int
        k, from 1 to n - 1

    Returns
    -------
    MaskBounds
        less than 0.175 bits apart

    Raises
    ------
    ValueError
        not two whole numbers with 0 < k < n

    References
    ----------
    By Robbins, "A remark on Stirling's formula", 1955. Book: chapter 12.

    Examples
    --------
    >>> mask_bits_bounds(2, 1).lower
    1.0
    """
    _check_count(count, kept)
    if not 0 < kept < count:
        raise ValueError(f"kept={kept} of {count}; with none or all kept there is one mask, 0 bits")
    entropy = count * binary_entropy(kept / count)
    spread = kept * (count - kept) / count  # n s (1 - s)
    return MaskBounds(
        entropy - math.log2(8 * spread) / 2, entropy - math.log2(2 * math.pi * spread) / 2
    )


def pruned_entropy(sparsity, kept_entropy):
    """h(s) + (1 - s) H: the entropy of a weight that is 0 with probability s, else has entropy H.

    Parameters
    ----------
    sparsity : float or array_like
        from 0 to 1
    kept_entropy : float or array_like
        H of a weight, given that it is kept, in bits; the kept values do not include 0

    Raises
    ------
    ValueError
        a sparsity outside [0, 1], a negative entropy, NaN

    References
    ----------
    The chain rule of entropy. Book: chapter 12.

    Examples
    --------
    >>> pruned_entropy(0.5, 3.0)
    2.5
    """
    sparsity = _sparsity(sparsity)
    kept_entropy = nonnegative(kept_entropy, "kept_entropy")
    return result(binary_entropy(sparsity) + (1 - sparsity) * kept_entropy)


def bitmap_bits(sparsity, value_bits):
    """1 + (1 - s) v bits per weight: one bit that says kept or not, v bits for each kept value.

    Parameters
    ----------
    sparsity : float or array_like
        from 0 to 1
    value_bits : float or array_like
        v

    Raises
    ------
    ValueError
        a sparsity outside [0, 1], a negative number of bits, NaN

    Examples
    --------
    >>> bitmap_bits(0.5, 16)
    9.0
    """
    return result(1 + (1 - _sparsity(sparsity)) * nonnegative(value_bits, "value_bits"))


def csr_bits(sparsity, value_bits, index_bits, *, columns=math.inf, pointer_bits=32):
    """(1 - s) (v + i) + p / n bits per weight: a column number for each value, a pointer per row.

    Parameters
    ----------
    sparsity : float or array_like
        from 0 to 1
    value_bits : float or array_like
        v
    index_bits : float or array_like
        i, of a column number
    columns : float
        n; the infinite default leaves the pointers out. The one pointer more than there are rows
        is not counted
    pointer_bits : float
        p

    Raises
    ------
    ValueError
        a sparsity outside [0, 1], a negative number of bits, fewer than one column, NaN

    References
    ----------
    Compressed sparse row format. Book: chapter 12.

    Examples
    --------
    >>> csr_bits(0.75, 16, 16)
    8.0
    """
    if not columns >= 1:
        raise ValueError(f"columns={columns}; give at least 1, for instance 384")
    each = nonnegative(value_bits, "value_bits") + nonnegative(index_bits, "index_bits")
    pointers = nonnegative(pointer_bits, "pointer_bits") / columns
    return result((1 - _sparsity(sparsity)) * each + pointers)


def n_of_m_bits(kept, group, value_bits, *, index_bits=None):
    """n (v + i) / m bits per weight: n values of each m weights, each with its place in the group.

    Parameters
    ----------
    kept : int
        n, from 0 to m
    group : int
        m, at least 1
    value_bits : float
        v
    index_bits : float
        i; None: ceil(log2 m), as in hardware. The information is mask_bits(m, n) / n

    Raises
    ------
    ValueError
        not 0 <= n <= m, m below 1, a negative number of bits, NaN

    Examples
    --------
    >>> n_of_m_bits(2, 4, 16) / 16
    0.5625
    """
    _check_group(kept, group)
    if index_bits is None:
        index_bits = (group - 1).bit_length()
    each = nonnegative(value_bits, "value_bits") + nonnegative(index_bits, "index_bits")
    return result(kept / group * each)


def csr_break_even(value_bits, index_bits):
    """i / (v + i): from this sparsity on a column number for each value costs less than the zeros.

    Parameters
    ----------
    value_bits : float or array_like
        v, above 0, also what a weight of the dense matrix has
    index_bits : float or array_like
        i

    Raises
    ------
    ValueError
        no bits for the values, a negative number of them, NaN

    Examples
    --------
    >>> csr_break_even(32, 32)
    0.5
    """
    value_bits, index_bits = _values(value_bits), nonnegative(index_bits, "index_bits")
    return result(index_bits / (value_bits + index_bits))


def bitmap_break_even(value_bits):
    """1 / v, at most 1: from this sparsity on a bitmap and the kept values cost less than all.

    Parameters
    ----------
    value_bits : float or array_like
        v, above 0, also what a weight of the dense matrix has

    Raises
    ------
    ValueError
        no bits for the values, a negative number of them, NaN

    Examples
    --------
    >>> bitmap_break_even(4)
    0.25
    """
    return result(np.minimum(1 / _values(value_bits), 1.0))


def entropy_break_even(value_bits):
    """The s with h(s) = s v: from there on even the cheapest mask costs less than the zeros.

    Parameters
    ----------
    value_bits : float
        v, from 1e-6 to 512, also what a weight of the dense matrix has

    Raises
    ------
    ValueError
        other numbers of bits

    References
    ----------
    h(s) / s falls from infinity at 0 to 0 at 1, so there is one such s. Book: chapter 12.

    Examples
    --------
    >>> round(entropy_break_even(2.0), 6)  # half-way: h(1/2) = 1
    0.5
    """
    if not 1e-6 <= value_bits <= 512:
        raise ValueError(f"value_bits={value_bits}; it must be from 1e-6 to 512, for instance 16")

    def excess(odds):  # of log2 s / (1 - s), so that both ends can be resolved
        s = 1 / (1 + 2.0**-odds)
        return binary_entropy(s) / s - value_bits

    odds = optimize.brentq(excess, -value_bits - 8, 60, xtol=1e-12)
    return 1 / (1 + 2.0**-odds)


def golomb_parameter(share):
    """The smallest M >= 1 with p^M + p^(M + 1) <= 1: Golomb's code with it is the best of all codes
    of a run whose length has the probabilities (1 - p) p^r.

    Parameters
    ----------
    share : float
        p, of the symbol the runs are made of, for instance the sparsity; 0 <= p < 1

    Raises
    ------
    ValueError
        p outside [0, 1)

    References
    ----------
    Gallager and van Voorhis, "Optimal source codes for geometrically distributed integer
    alphabets", 1975. Book: chapter 12.

    Examples
    --------
    >>> golomb_parameter(0.9)
    7
    """
    share = _run_share(share)
    if share == 0:
        return 1
    return max(1, math.ceil(-math.log1p(share) / math.log(share)))


def golomb_bits(share, parameter=None):
    """b + p^j / (1 - p^M), b = ceil(log2 M), j = 2^b - M: the mean length of a Golomb code word.

    The word of a run of r = q M + d has q ones, a zero, and d in b - 1 bits if d < j, else in b.

    Parameters
    ----------
    share : float
        p, as for `golomb_parameter`
    parameter : int
        M, at least 1; None: the best one

    Returns
    -------
    float
        bits per run, that is per symbol that ends one; times (1 - p) it is bits per symbol, at
        least h(p)

    Raises
    ------
    ValueError
        p outside [0, 1), M not a whole number or below 1

    Examples
    --------
    >>> golomb_bits(0.5)
    2.0
    """
    share = _run_share(share)
    if parameter is None:
        parameter = golomb_parameter(share)
    if type(parameter) is not int or parameter < 1:
        raise ValueError(f"parameter={parameter!r}; it must be a whole number such as 7")
    width = (parameter - 1).bit_length()
    shorter = (1 << width) - parameter
    whole = -math.expm1(parameter * math.log(share)) if share else 1.0
    return width + share**shorter / whole


def _energy(law, share, weight=None):
    """E[X^2 weight(T(|X|)); T(|X|) >= 1 - share] / E X^2, where T(t) = P(|X| > t)."""
    second = float(law.var()) + float(law.mean()) ** 2
    if not (math.isfinite(second) and second > 0):
        raise ValueError(
            f"the law has the second moment {second}; give one of finite, positive moment, such as "
            "norm()"
        )
    if share in (0.0, 1.0) and weight is None:
        return float(share)
    tails = [0.5, *10.0 ** -np.arange(1, 17)]
    ends = [_magnitude(law, tail) for tail in (*(u for u in tails if u > 1 - share), 1 - share)]
    kinks = [abs(float(x)) for x in (*law.support(), law.median())]
    edges = np.unique([0.0, *ends, *(x for x in kinks if x < ends[-1])])
    center, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    t = center[:, None] + half[:, None] * _NODES
    terms = half[:, None] * _WEIGHTS * t**2 * (law.pdf(t) + law.pdf(-t))
    if weight is not None:
        terms = terms * weight(law.sf(t) + law.cdf(-t))
    return min(1.0, float(terms.sum()) / second)


def _magnitude(law, tail):
    """t with P(|X| > t) = tail, or 1e-16 if that is 0."""
    tail = max(tail, 1e-16)
    ends = (law.isf(tail / 2), law.ppf(tail / 2), law.isf(tail), law.ppf(tail))
    top = max(abs(float(end)) for end in ends)

    def beyond(t):
        return float(law.sf(t) + law.cdf(-t)) - tail

    return top if beyond(top) >= 0 else optimize.brentq(beyond, 0.0, top, xtol=1e-300, rtol=1e-14)


def _sparsity(sparsity):
    sparsity = nonnegative(sparsity, "sparsity")
    if (sparsity > 1).any():
        raise ValueError(f"sparsity holds {sparsity.max()}; give shares from 0 to 1, such as 0.9")
    return sparsity


def _values(value_bits):
    value_bits = nonnegative(value_bits, "value_bits")
    if not (value_bits > 0).all():
        raise ValueError("value_bits holds 0; give bits per value, for instance 16")
    return value_bits


def _run_share(share):
    if not 0 <= share < 1:
        raise ValueError(f"share={share}; it must be at least 0 and below 1, for instance 0.9")
    return float(share)


def _check_count(count, kept):
    if type(count) is not int or type(kept) is not int or not 0 <= kept <= count:
        raise ValueError(f"kept={kept!r} of {count!r}; two whole numbers, 0 <= kept <= count")


def _check_group(kept, group):
    if type(group) is not int or type(kept) is not int or group < 1 or not 0 <= kept <= group:
        raise ValueError(f"{kept!r} of {group!r}; two whole numbers, 0 <= n <= m, such as 2 and 4")
