"""The block formats of GGUF files as a method among others."""

from torch import Tensor

from compresskit import linalg
from compresskit.formats.gguf.blocks import Blocks
from compresskit.formats.gguf.k_quants import K_QUANTS
from compresskit.formats.gguf.quantizers import quantize
from compresskit.methods.moments import checked
from compresskit.stats import InputStats


def block_format(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    type: str = "Q4_K",
    weighted: bool = True,
) -> Blocks:
    """The blocks of `type` that make sum_ij E[x_j^2] (w_ij - w'_ij)^2 small, where it has a choice.

    Of the second moments only the diagonal is used: the error of a layer whose inputs are
    uncorrelated.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device; n a whole number of blocks
    stats : InputStats
        moments of x; None, and for the types without a choice: not used
    type : str
        Q4_K, Q5_K or Q6_K, whose scales are searched for; or another one that
        `formats.gguf.quantize` writes, whose bytes follow from the weights
    weighted : bool
        False: the plain squared error, whatever `stats` says

    Returns
    -------
    Blocks

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together; as `gguf.quantize`

    Notes
    -----
    llama.cpp weighs by the same moments when given an "importance matrix" (--imatrix), times a
    function of the weight itself.
    Book: chapter "Block formats in the wild".

    Examples
    --------
    >>> import torch
    >>> block_format(torch.randn(4, 512)).nbytes  # 8 blocks of 144 bytes
    1152
    """
    if stats is None:
        linalg.check_weight(weight)
        return quantize(weight, type)
    weight, stats = checked(weight, stats)
    moments = stats.second.diagonal()
    use = weighted and type in K_QUANTS and bool(moments.any())
    return quantize(weight, type, importance=moments if use else None)
