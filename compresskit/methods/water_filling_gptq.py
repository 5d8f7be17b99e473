"""GPTQ with a step for each column, as water-filling has it: the same error from every input."""

from torch import Tensor

from compresskit.affine import Quantized
from compresskit.methods.lattice import coded_lattice
from compresskit.stats import InputStats


def water_filling_gptq(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    bits: float,
    damp: float = 0.001,
    shrink: bool = True,
    block: int = 128,
) -> Quantized:
    """Feedback as in `gptq`, steps in proportion to 1 / V_jj, levels coded; V V^T = E[x x^T].

    Each column then adds the same error D = (V_jj step_j)^2 / 12, as reverse water-filling asks,
    and at fine steps the rate is 0.254 bit above the rate-distortion function of a Gaussian
    matrix, whatever the inputs' moments are.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats
        moments of x; None: isotropic ones, and the result is that of `entropy_gptq`
    bits : float
        what the code may take per weight, everything counted; the steps are the finest that do
    damp : float
        as for `gptq`
    shrink : bool
        minimize error + 2 D nats, a nat being paid for every 2 s^2 of a weight's square, s^2 the
        mean square of the matrix. Completing the square, that is rounding W S (S + D/s^2)^-1 with
        feedback by S + D/s^2: inputs that matter less than their bits cost are not coded
    block : int
        columns between two matrix products

    Returns
    -------
    Quantized
        levels in a `Rans` leaf under `Scales("both")`, steps 2^(k/8), k in an `Adaptive` leaf

    Raises
    ------
    ValueError : as `gptq`; a rate that scales and steps alone exceed

    Notes
    -----
    Steps are spaced by 2^(1/8), which costs 0.001 bit. Columns that no input reaches become 0 and
    cost nothing. The rounding is done anew for each of about five steps tried; O(m n^2 + n^3).

    References
    ----------
    Steps by water-filling: arXiv 2603.04956. Book: chapter "How close to Shannon can a layer
    get?", where both statements are derived.
    """
    return coded_lattice(
        weight, stats, bits=bits, damp=damp, shrink=shrink, block=block, filling=True
    )
