"""The compiled loops of the search in `k_quants`, over many sub-blocks at once.

A column of `x` and `w` is a sub-block (a lane): `run` weights and their importance. Of `count`
super-blocks, lane count j + b is sub-block j of super-block b. No sum runs across lanes, so a
result depends neither on a lane's neighbours nor on how wide the registers of a machine are.
float32 throughout.

(Over 200 lines with what each array is.)
"""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def _inverse(scale):
    """1 / scale, and 0 for the scales that float16 rounds to 0."""
    tiny = abs(scale) < np.float32(2.0**-30)
    return np.float32(0) if tiny else np.float32(1) / scale


@numba.njit(nogil=True, cache=True)
def _round_all(x, w, scale, offset, low, high, inverse, sums):
    """Round every weight to its nearest level; the error, and the sums of q, q^2 and x q, in w."""
    run, lanes = x.shape
    error, sum_q, sum_qq, sum_xq = sums[0], sums[1], sums[2], sums[3]
    zero = np.float32(0)
    for lane in range(lanes):
        inverse[lane] = _inverse(scale[lane])
        error[lane], sum_q[lane], sum_qq[lane], sum_xq[lane] = zero, zero, zero, zero
    for i in range(run):
        of_x, of_w = x[i], w[i]
        for lane in range(lanes):
            q = np.floor((of_x[lane] - offset[lane]) * inverse[lane] + np.float32(0.5))
            q = min(max(q, low), high)
            missed = scale[lane] * q + offset[lane] - of_x[lane]
            weighted = of_w[lane] * q
            error[lane] += of_w[lane] * missed * missed
            sum_q[lane] += weighted
            sum_qq[lane] += weighted * q
            sum_xq[lane] += weighted * of_x[lane]


@numba.njit(nogil=True, cache=True)
def free_fit(x, w, steps, low, high, shifted, starts):
    """The best scale and offset of each sub-block, as if they could be any real numbers.

    Parameters
    ----------
    x, w : (run, lanes) array
    steps : float32
        levels less one
    low, high : float32
        the first and the last level
    shifted : bool
        whether there are offsets, none of them positive
    starts : (k, 2) array
        shifted: width and lower end of the range to start from, in that of the weights;
        otherwise the first level's magnitude, in the largest magnitude of the weights

    Returns
    -------
    (2, lanes) array
    """
    run, lanes = x.shape
    zero = np.float32(0)
    bottom, top, extreme = np.zeros(lanes, np.float32), x[0].copy(), np.zeros(lanes, np.float32)
    sum_w, sum_x = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    best, found = np.zeros(lanes, np.float32), np.zeros((2, lanes), np.float32)
    for i in range(run):
        for lane in range(lanes):
            bottom[lane], top[lane] = min(bottom[lane], x[i, lane]), max(top[lane], x[i, lane])
            extreme[lane] = max(extreme[lane], abs(x[i, lane]))
            sum_w[lane] += w[i, lane]
            sum_x[lane] += w[i, lane] * x[i, lane]
            best[lane] += w[i, lane] * x[i, lane] * x[i, lane]  # the error of all zeros
    scale, offset = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    inverse, sums = np.empty(lanes, np.float32), np.empty((4, lanes), np.float32)
    error, sum_q, sum_qq, sum_xq = sums[0], sums[1], sums[2], sums[3]
    for start in starts:
        for lane in range(lanes):
            if shifted:
                spread = top[lane] - bottom[lane]
                scale[lane] = spread * start[0] / steps
                offset[lane] = min(zero, bottom[lane] + spread * start[1])
            else:
                scale[lane] = extreme[lane] * start[0] / -low
        for _ in range(4):
            _round_all(x, w, scale, offset, low, high, inverse, sums)
            for lane in range(lanes):
                if error[lane] < best[lane]:
                    best[lane] = error[lane]
                    found[0, lane], found[1, lane] = scale[lane], offset[lane]
                determinant = sum_w[lane] * sum_qq[lane] - sum_q[lane] * sum_q[lane]
                slope = sum_xq[lane] / sum_qq[lane] if sum_qq[lane] > zero else zero
                height = zero
                if shifted and determinant > zero:
                    height = (sum_qq[lane] * sum_x[lane] - sum_q[lane] * sum_xq[lane]) / determinant
                    if height < zero:
                        slope = sum_w[lane] * sum_xq[lane] - sum_x[lane] * sum_q[lane]
                        slope /= determinant
                scale[lane], offset[lane] = slope, min(height, zero)
    return found


@numba.njit(nogil=True, cache=True)
def stored_fit(x, w, count, low, high, least, most, shifted, free, divisors, reach):
    """The best of all candidates that can be stored.

    Parameters
    ----------
    x, w : (run, lanes) array
    count : int
        super-blocks
    low, high, shifted : float32, float32, bool
        as of `free_fit`
    least, most : float32
        the range of s; t goes from 0 to `most`
    free : (2, lanes) array
        of `free_fit`
    divisors : (k, 2) array
        candidates: d is the largest scale over the first, dmin the largest minimum over the second
    reach : int
        how far from the free scale s is tried

    Returns
    -------
    (count, 2) array of d and dmin, (2, lanes) array of s and t
    """
    run, lanes = x.shape
    subs = lanes // count
    zero, infinite = np.float32(0), np.float32(np.inf)
    sum_w, sum_x = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    largest = np.zeros((2, count), np.float32)
    for i in range(run):
        for lane in range(lanes):
            sum_w[lane] += w[i, lane]
            sum_x[lane] += w[i, lane] * x[i, lane]
    for j in range(subs):
        for b in range(count):
            for k in range(2):
                largest[k, b] = max(largest[k, b], abs(free[k, j * count + b]))
    s, t = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    d, m = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    scale, offset = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    inverse, sums = np.empty(lanes, np.float32), np.empty((4, lanes), np.float32)
    error, sum_q, sum_qq, sum_xq = sums[0], sums[1], sums[2], sums[3]
    chosen = np.empty((6, lanes), np.float32)  # error, s, t, and the sums q, qq, xq that go with
    half, best = np.zeros((count, 2), np.float32), np.full(count, infinite)
    integers, now = np.zeros((2, lanes), np.float32), np.zeros((count, 2), np.float32)
    for pair in divisors:
        for b in range(count):
            now[b, 0] = _unit(largest[0, b], pair[0], most)
            now[b, 1] = _unit(largest[1, b], pair[1], most)
        for _ in range(2):
            for j in range(subs):
                for b in range(count):
                    d[j * count + b], m[j * count + b] = now[b, 0], now[b, 1]
            chosen[0] = infinite
            for beside in range(-reach, reach + 1):
                for lane in range(lanes):
                    s[lane] = np.rint(free[0, lane] * _inverse(d[lane])) + np.float32(beside)
                    s[lane] = min(max(s[lane], least), most)
                    t[lane] = min(np.rint(-free[1, lane] * _inverse(m[lane])), most)
                    scale[lane], offset[lane] = d[lane] * s[lane], -(m[lane] * t[lane])
                for _ in range(2 if shifted else 1):
                    _round_all(x, w, scale, offset, low, high, inverse, sums)
                    for lane in range(lanes):
                        if error[lane] < chosen[0, lane]:
                            chosen[0, lane] = error[lane]
                            chosen[1, lane], chosen[2, lane] = s[lane], t[lane]
                            chosen[3, lane], chosen[4, lane] = sum_q[lane], sum_qq[lane]
                            chosen[5, lane] = sum_xq[lane]
                        height = (scale[lane] * sum_q[lane] - sum_x[lane]) / sum_w[lane]
                        t[lane] = min(max(np.rint(height * _inverse(m[lane])), zero), most)
                        offset[lane] = -(m[lane] * t[lane])
            for b in range(count):
                total = zero
                for j in range(subs):
                    total += chosen[0, j * count + b]
                if total < best[b]:
                    best[b] = total
                    half[b] = now[b]
                    for j in range(subs):
                        integers[0, j * count + b] = chosen[1, j * count + b]
                        integers[1, j * count + b] = chosen[2, j * count + b]
                now[b, 0], now[b, 1] = _refitted(chosen, sum_w, sum_x, b, count, now[b])
    return half, integers


@numba.njit(nogil=True, cache=True)
def levels(x, scale, offset, low, high):
    """(run, lanes) q - low: each weight's nearest level, as `_round_all` has it."""
    run, lanes = x.shape
    inverse, nearest = np.empty(lanes, np.float32), np.empty((run, lanes), np.uint8)
    for lane in range(lanes):
        inverse[lane] = _inverse(scale[lane])
    for i in range(run):
        for lane in range(lanes):
            q = np.floor((x[i, lane] - offset[lane]) * inverse[lane] + np.float32(0.5))
            nearest[i, lane] = np.uint8(min(max(q, low), high) - low)
    return nearest


@numba.njit(nogil=True, cache=True)
def _refitted(chosen, sum_w, sum_x, b, count, now):
    """d and dmin of least error for the integers s, t and q of super-block b, in float16."""
    ss, st, tt, sx, tx = np.zeros(5, np.float32)
    for lane in range(b, len(sum_w), count):
        s, t = chosen[1, lane], chosen[2, lane]
        ss += s * s * chosen[4, lane]
        st += s * t * chosen[3, lane]
        tt += t * t * sum_w[lane]
        sx += s * chosen[5, lane]
        tx += t * sum_x[lane]
    determinant = ss * tt - st * st
    if determinant > 0:
        d, m = (tt * sx - st * tx) / determinant, (st * sx - ss * tx) / determinant
        if d > 0 and m > 0:
            return _half(d), _half(m)
    return (_half(sx / ss) if ss > 0 and sx > 0 else now[0]), now[1]


@numba.njit(nogil=True, cache=True)
def _half(value):
    """The float16 nearest to a positive number, at most the largest one."""
    unit = np.float32(2.0**-24)  # between neighbours: 11 significant bits
    while unit * np.float32(2048) <= value and unit < np.float32(32):
        unit *= np.float32(2)
    return min(np.rint(value / unit) * unit, np.float32(65504))


@numba.njit(nogil=True, cache=True)
def _unit(largest, divisor, most):
    """The float16 nearest to largest / divisor, or the one above if `most` of it fall short.

    They do so only for subnormal numbers, which are far apart.
    """
    unit = _half(largest / divisor)
    short = unit * most < largest * np.float32(1 - 2.0**-9)
    return unit + np.float32(2.0**-24) if short else unit
