"""Weights -1, 0 and 1 with one scale: BitNet b1.58."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Quantized
from compresskit.code import Array, Bits, Trits
from compresskit.integer import Integer
from compresskit.stats import InputStats

SCALES = ("absmean", "least squares")


def ternary(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    scale: str = "absmean",
    inputs: str | None = None,
) -> Quantized | Integer:
    """s clip(round(W / s), -1, 1) with one s for the whole matrix.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        ignored: nothing here depends on the inputs
    scale : str
        "absmean": s = mean |W|, as BitNet b1.58 has it. "least squares": the s of least squared
        error, which keeps the k largest weights in magnitude, k maximizing (their sum)^2 / k
    inputs : str
        None: weights alone. "token" (or "tensor"): inputs rounded to 8 bits by their largest
        magnitude, 127 steps from 0, and multiplied in integers (W1.58A8)

    Returns
    -------
    Quantized with `Trits`, five weights to a byte; with `inputs`, an Integer around it

    Raises
    ------
    ValueError : an unknown `scale`; a weight that is no matrix, empty or not finite; `inputs` as
        Integer refuses them

    Notes
    -----
    O(m n) time, and a sort for "least squares". Made for weights that are trained with it (see
    `compresskit.train.quantization_aware`): applied afterwards it leaves 51 % of a Gaussian
    matrix's norm as error, and by least squares 44 %. The scale is a float32; the paper's least
    value of it, 1e-5, is left out, so that ternary(c W) = c ternary(W) for every power of two c.
    Book: chapter "Training for low precision".

    References
    ----------
    Ma et al., "The era of 1-bit LLMs", arXiv 2402.17764, section 2 (absmean). Li and Liu,
    "Ternary weight networks", arXiv 1605.04711, section 2 (least squares).

    Examples
    --------
    >>> code = ternary(torch.tensor([[1.0, -0.2, 0.4, -0.8]]))
    >>> code.decode()  # mean |W| = 0.6, so what is above 0.3 is kept
    tensor([[ 0.6000,  0.0000,  0.6000, -0.6000]])
    >>> code.size_table()
    {'levels': 1, 'scale': 4, 'zero': 1}
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}; it must be one of {', '.join(map(repr, SCALES))}")
    linalg.check_weight(weight)
    weight = weight.detach().float()
    size = weight.abs()
    step = _absmean(size) if scale == "absmean" else _least_squares(size)
    levels = torch.where(step > 0, weight / step, 0).round().clamp(-1, 1) + 1
    code = Quantized(
        levels=Trits.of(levels),
        scale=Array(step.reshape(1, 1)),
        zero=Bits.of(torch.ones(1, 1, device=weight.device), 2),
        group_size=weight.shape[1],
    )
    return code if inputs is None else Integer(code, inputs, steps=127.0)


def _absmean(size: Tensor) -> Tensor:
    return size.mean(dtype=torch.float64).float()


def _least_squares(size: Tensor) -> Tensor:
    """The mean of the k largest, where k maximizes the square of their sum over k."""
    largest = size.flatten().double().sort(descending=True).values
    sums = largest.cumsum(0)
    means = sums / torch.arange(1, len(sums) + 1, device=size.device)
    return means[(sums * means).argmax()].float()
