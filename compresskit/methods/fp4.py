"""FP4: four bits as a sign, two of exponent and one of mantissa, in blocks with their own scale."""

from torch import Tensor

from compresskit.codebook import Codebook, absmax_code
from compresskit.stats import InputStats


def fp4(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    block: int = 64,
    double_quant: bool = True,
) -> Codebook:
    """max|w| of the block times the nearest of +-{0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1}.

    Not the E2M1 of hardware, whose values are +-{0, 1/12, 1/6, 1/4, 1/3, 1/2, 2/3, 1}. Zero has
    two indices, so fifteen values are used.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        ignored
    block : int
        consecutive weights (of the rows, one after the other) that share a scale
    double_quant : bool
        as for `nf4`

    Returns
    -------
    Codebook
        of the same size as that of `nf4`

    Raises
    ------
    ValueError : not a matrix, empty, not finite, or `block` below 1

    Notes
    -----
    O(m n). Indices and decoded values as bitsandbytes, version 0.50.2.

    References
    ----------
    Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs", 2023, section 4 compares
    with NF4. Book: chapter "Better codebooks and the limit".
    """
    return absmax_code(weight, "fp4", block=block, double_quant=double_quant)
