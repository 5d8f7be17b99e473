"""Any method in a randomly rotated basis, where no input stands out."""

from collections.abc import Callable

from torch import Tensor

from compresskit.basis import InBasis, Rotation
from compresskit.code import Code
from compresskit.methods.moments import checked
from compresskit.stats import InputStats


def hadamard(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    method: Callable[[Tensor, InputStats | None], Code],
    seed: int = 0,
) -> InBasis:
    """M V with M = method(W V^T), V = H D P: a randomized Hadamard rotation of the inputs.

    V spreads each weight, and each input, over all coordinates: with probability 1 - d no entry
    of V x exceeds |x| sqrt(2 ln(2 N / d) / N) in absolute value, whatever x is. A grid then has
    nothing to stretch for.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        moments of x, handed on as those of V x; None, or none seen: `method` gets None
    method : callable
        (weight, stats) -> Code; bind options with `functools.partial`. It gets second moments
        only: E|x| and max |x| are unknown after a rotation (NaN)
    seed : int
        of the random signs, which are stored as N bits. Layers with the same inputs and the same
        seed share V, which could then be applied once

    Returns
    -------
    InBasis
        of what `method` returns for (m, N), N >= n the next order with a Hadamard matrix: choose
        layers with N = n, or pay for N - n more columns

    Raises
    ------
    ValueError : weights or second moments that are not finite or do not fit together, and what
        `method` raises

    Notes
    -----
    For each row and, when the layer runs, for each token, N times the sum of the factors of the
    Hadamard matrix (12 + 16 + 2 for N = 384), beside what `method` takes.
    A matrix whose entries are Gaussian already gains nothing.
    Chee et al., "QuIP", arXiv 2307.13304, section 4 (why incoherence helps); Ashkboos et
    al., "QuaRot", arXiv 2404.00456 (Hadamard matrices; there V is folded into the layer before
    where it can be, as `surgery.rotate` does).
    Book: chapter "Activations and outliers".
    """
    wide, moments = checked(weight, stats)
    basis = Rotation.random(wide.shape[1], seed=seed, device=wide.device)
    seen = stats is not None and stats.count > 0
    return InBasis(method(basis.into(wide), moments.in_basis(basis) if seen else None), basis)
