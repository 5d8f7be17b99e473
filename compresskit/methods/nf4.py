"""NF4: four bits that index a table of Gaussian quantiles, in blocks with their own scale."""

from torch import Tensor

from compresskit.codebook import Codebook, absmax_code
from compresskit.stats import InputStats


def nf4(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    block: int = 64,
    double_quant: bool = True,
) -> Codebook:
    """max|w| of the block times the nearest of 16 fixed values, quantiles of a Gaussian.

    Quantiles give every index about equal use; they do not minimize the squared error.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        ignored
    block : int
        consecutive weights (of the rows, one after the other) that share a scale
    double_quant : bool
        store the scales in 8 bits, themselves in blocks of 256 after their mean is subtracted;
        otherwise in 32

    Returns
    -------
    Codebook
        4 + 8/block + 32/(256 block) bits per weight and 4 bytes; 4 + 32/block without double
        quantization

    Raises
    ------
    ValueError : not a matrix, empty, not finite, or `block` below 1

    Notes
    -----
    O(m n). The indices, and the decoded values to float32 rounding, are those of bitsandbytes:
    indices are chosen by the scale before it is itself quantized.

    References
    ----------
    Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs", 2023, section 3, appendix E.
    Book: chapter "Better codebooks and the limit".

    Examples
    --------
    >>> import torch
    >>> code = nf4(torch.tensor([[0.5, -2.0, 0.0, 1.0]]), double_quant=False)
    >>> code.decode()
    tensor([[ 0.4922, -2.0000,  0.0000,  0.8814]])
    >>> code.size_table()
    {'index': 2, 'scale': 4}
    """
    return absmax_code(weight, "nf4", block=block, double_quant=double_quant)
