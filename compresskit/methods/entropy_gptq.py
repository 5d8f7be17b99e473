"""GPTQ on a grid without ends, its levels coded at the price of their surprise."""

from torch import Tensor

from compresskit.affine import Quantized
from compresskit.methods.lattice import coded_lattice
from compresskit.stats import InputStats


def entropy_gptq(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    bits: float,
    damp: float = 0.001,
    shrink: bool = False,
    block: int = 128,
) -> Quantized:
    """`gptq` with one step for the whole matrix, no smallest or largest level, and coded levels.

    Nothing is clipped, so the error is sum_i (V_ii e_i)^2 with |e_i| <= step / 2, and the rate is
    about h(w) - log2(step): by the arithmetic and geometric means of V_ii^2, half the logarithm of
    their ratio more than a step for each column needs (`water_filling_gptq`).

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats
        moments of x; None: isotropic ones
    bits : float
        what the code may take per weight, everything counted; the step is the finest that does
    damp : float
        as for `gptq`
    shrink : bool
        as for `water_filling_gptq`
    block : int
        columns between two matrix products

    Returns
    -------
    Quantized
        levels in a `Rans` leaf under `Scales("both")`

    Raises
    ------
    ValueError : as `gptq`; a rate that the scales of the model alone exceed

    Notes
    -----
    The rounding is done anew for each of about five steps tried. Book: chapter "How close to
    Shannon can a layer get?".
    """
    return coded_lattice(
        weight, stats, bits=bits, damp=damp, shrink=shrink, block=block, filling=False
    )
