"""What the fields of a floating-point number hold: chapter 18. Entropies are in bits."""

import numpy as np
from scipy import stats

from compresskit.theory.checks import finite

_REACH = 60  # octaves below the scale: what is smaller has no mass in float64


def exponent_law(scale, *, digits=0, law="gaussian"):
    """Probabilities of the exponent floor(log2 |X|) and of the first digits of the mantissa.

    Of a variable of mean 0 and standard deviation `scale`, exponents without end.

    Parameters
    ----------
    scale : float
        positive
    digits : int
        0 or more
    law : str
        "gaussian" or "laplace"

    Returns
    -------
    (exponents, 2^digits) ndarray of sum 1, from 60 octaves below the scale to 8 above it

    Raises
    ------
    ValueError : a scale that is not positive, another law, negative `digits`

    Examples
    --------
    >>> from compresskit.theory import entropy
    >>> round(entropy(exponent_law(1.0).ravel()), 3), round(entropy(exponent_law(4.0).ravel()), 3)
    (2.545, 2.545)
    """
    if not finite(scale, "scale") > 0:
        raise ValueError(f"scale={scale}; it must be positive, for instance 0.05")
    if law not in ("gaussian", "laplace") or digits < 0:
        raise ValueError(f'law={law!r}, digits={digits}; "gaussian" or "laplace", and 0 or more')
    octave = int(np.floor(np.log2(scale)))
    cells = 1 << digits
    places = np.arange((_REACH + 9) * cells + 1)
    edges = np.ldexp(1 + places % cells / cells, places // cells - _REACH + octave)
    found = {"gaussian": stats.norm(scale=scale), "laplace": stats.laplace(scale=scale / 2**0.5)}
    above = 2 * found[law].sf(edges)
    mass = above[:-1] - above[1:]
    return (mass / mass.sum()).reshape(-1, cells)
