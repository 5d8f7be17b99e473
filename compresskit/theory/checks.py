"""What every function of `compresskit.theory` asks of its numbers."""

import numpy as np

SUM_TOLERANCE = 1e-6  # a float32 softmax over 50,000 classes misses 1 by a few 1e-7


def array(x, name):
    """`x` in float64, or a ValueError where it holds NaN."""
    if hasattr(x, "detach"):  # a torch tensor; NumPy has no bfloat16, so widen it there
        x = x.detach().cpu().double()
    x = np.asarray(x, dtype=np.float64)
    if np.isnan(x).any():
        raise ValueError(f"{name} holds NaN; give numbers")
    return x


def nonnegative(x, name):
    """`x` in float64, or a ValueError where it holds a number below 0."""
    x = array(x, name)
    if (x < 0).any():
        raise ValueError(f"{name} holds {x.min()}; give numbers of at least 0")
    return x


def finite(x, name):
    """`x`, or a ValueError where it holds an infinite number."""
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds an infinite number; give finite ones")
    return x


def probabilities(p, axis, name):
    """`p` in float64, or a ValueError where it does not sum to 1 along `axis`."""
    p = nonnegative(p, name)
    total = p.sum(axis)
    if (np.abs(total - 1) > SUM_TOLERANCE).any():
        raise ValueError(
            f"{name} sums to {np.ravel(total)[np.abs(np.ravel(total) - 1).argmax()]} along axis "
            f"{axis}, which is not 1 within {SUM_TOLERANCE}; divide by the sum first"
        )
    return p


def pair(p, q, axis):
    """Two arrays of probabilities of one shape, or a ValueError."""
    p, q = probabilities(p, axis, "p"), probabilities(q, axis, "q")
    if p.shape != q.shape:
        raise ValueError(f"p has shape {p.shape} and q {q.shape}; give equal shapes")
    return p, q


def nats(unit):
    """How many nats the unit has: 1 nat is 1 nat, 1 bit is ln 2."""
    if unit not in ("bits", "nats"):
        raise ValueError(f'unit={unit!r} is unknown; use "bits" or "nats"')
    return np.log(2.0) if unit == "bits" else 1.0


def result(x):
    """A `float` for a scalar, an array for anything else."""
    return float(x) if np.ndim(x) == 0 else np.asarray(x)
