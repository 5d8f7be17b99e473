"""Weights of two values, one for each sign: BitNet."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Quantized
from compresskit.code import Array, Bits
from compresskit.integer import Integer
from compresskit.stats import InputStats


def sign(
    weight: Tensor, stats: InputStats | None = None, *, inputs: str | None = None
) -> Quantized | Integer:
    """mean |W| sign(W - mean W), with one mean for the whole matrix.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        ignored: nothing here depends on the inputs
    inputs : str
        None: weights alone. "token" (or "tensor"): inputs rounded to 8 bits by their largest
        magnitude, 127 steps from 0, and multiplied in integers (W1A8)

    Returns
    -------
    Quantized with 1-bit levels; with `inputs`, an Integer around it

    Raises
    ------
    ValueError : a weight that is no matrix, empty or not finite; `inputs` as Integer refuses them

    Notes
    -----
    O(m n) time. Subtracting the mean makes the latent weights zero-mean before their signs are
    taken, so that about as many are positive as negative. A weight equal to the mean counts as
    negative, as in the paper. Where the mean is 0, mean |W| is the scale of least squared error.
    Made for weights that are trained with it (see `compresskit.train.quantization_aware`): applied
    afterwards it leaves 60 % of a Gaussian matrix's norm as error.
    Book: chapter "Training for low precision".

    References
    ----------
    Wang et al., "BitNet", arXiv 2310.11453, section 2.1, equations 1 to 3.

    Examples
    --------
    >>> sign(torch.tensor([[1.0, -0.2, 0.3, -0.9]])).decode()  # the mean is 0.05, mean |W| 0.6
    tensor([[ 0.6000, -0.6000,  0.6000, -0.6000]])
    """
    linalg.check_weight(weight)
    weight = weight.detach().float()
    levels = weight > weight.mean(dtype=torch.float64)
    step = 2 * weight.abs().mean(dtype=torch.float64).float()
    code = Quantized(
        levels=Bits(levels.to(torch.uint8), 1),
        scale=Array(step.reshape(1, 1)),
        zero=Array(torch.full((1, 1), 0.5, dtype=torch.float16, device=weight.device)),
        group_size=weight.shape[1],
    )
    return code if inputs is None else Integer(code, inputs, steps=127.0)
