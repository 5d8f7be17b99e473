"""LLM.int8(): 8-bit integers, and floating point for the few inputs that are too large for them."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Quantized
from compresskit.code import Array, Bits
from compresskit.integer import Integer
from compresskit.stats import InputStats


def llm_int8(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    threshold: float = 6.0,
) -> Integer:
    """round(w / scale) with scale = max |w| / 127 per row, split at run time by the inputs.

    In each call the input columns with an entry of magnitude `threshold` or more are multiplied
    in floating point, with the decoded 8-bit weights; the others in integers, each token on its
    own scale. Which columns these are is decided by the inputs, so it costs no bytes.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device. The reference turns it into float16 first
    stats : InputStats
        ignored
    threshold : float
        in the units of the inputs; 0 stands for no outlier columns at all, as in the reference

    Returns
    -------
    Integer

    Raises
    ------
    ValueError : `threshold` negative or not finite; the weight is not a matrix, empty or not
        finite

    Notes
    -----
    O(m n) time. Outlier columns are multiplied with the decoded int8 weights, as the reference
    code does today; the paper kept these columns of the weight in float16.
    Book: chapter "Activations and outliers".

    References
    ----------
    Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 3.

    Examples
    --------
    >>> code = llm_int8(torch.tensor([[1.0, -0.5]]))
    >>> code.product(torch.tensor([100.0, 1.0]))  # 100 - 64/127
    tensor([99.4961])
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"threshold={threshold}; it must be 0 or more, for instance 6.0")
    linalg.check_weight(weight)
    weight = weight.detach().float()
    largest = weight.abs().amax(1, keepdim=True)
    normal = largest > torch.finfo(torch.float32).tiny
    levels = torch.round(weight * torch.where(normal, 127 / largest, 0))
    code = Quantized(
        levels=Bits.of(levels + 128, 8),
        scale=Array(largest / 127),
        zero=Bits.of(torch.full((1, 1), 128, device=weight.device), 8),
        group_size=weight.shape[1],
    )
    return Integer(code, "token", threshold=float(threshold) or None, steps=127)
