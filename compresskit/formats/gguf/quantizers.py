"""Weights to blocks: the one door to every quantizer, where what they are given is checked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compresskit.formats.gguf.blocks import Blocks, block_type
from compresskit.formats.gguf.k_quants import K_QUANTS, searched
from compresskit.formats.gguf.legacy import QUANTIZERS
from compresskit.linalg import all_finite

#: The type that llama.cpp takes where 256 does not divide a row.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0"}
_PIECE = 1 << 18  # weights at a time on a CPU: few calls, temporaries of few megabytes


def quantize(array: Tensor | np.ndarray, type: str, *, importance: Tensor | None = None) -> Blocks:
    """The blocks of `type` that stand for `array`, by formula or by search.

    F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, TQ1_0 and TQ2_0 have the bytes of the reference,
    which reads the step off the extreme weights. For Q4_K, Q5_K and Q6_K, whose scales leave a
    choice, sum_ij importance_j (w_ij - w'_ij)^2 is made small by search (`k_quants.searched`).

    Parameters
    ----------
    array : (..., n) tensor or array
        floating point, on any device; taken for its float32 values
    type : str
        one of those above
    importance : (n,) tensor
        not negative: E[x_j^2] of the inputs, of which only the proportions count. None: all the
        same. Only for the types that search

    Returns
    -------
    Blocks on the device of `array`

    Raises
    ------
    ValueError : nothing in it, not floating point, not finite, too large for float16 scales; rows
        that are no whole number of blocks; a type that cannot be written; an importance that does
        not fit, or for a type without a choice

    Notes
    -----
    Memory on a CPU: a few megabytes besides what is returned, and a float32 copy of a float64
    `array`. Elsewhere the whole is one piece, of a few times its size.

    Examples
    --------
    >>> quantize(torch.linspace(-1, 1, 32), "Q8_0").decode()[:2]
    tensor([-0.9999, -0.9370])
    """
    kind = block_type(type)
    weight = _checked(array, type, kind.size)
    if type in K_QUANTS:
        stored = searched(
            weight.reshape(-1, weight.shape[-1]), type, _relative(importance, weight.shape[-1])
        )
        return Blocks(stored.to(weight.device), type, tuple(weight.shape))
    if type not in QUANTIZERS:
        raise ValueError(
            f"{type} can be read, not written; to write there are"
            f" {', '.join([*QUANTIZERS, *K_QUANTS])}"
        )
    if importance is not None:
        raise ValueError(
            f"importance for {type}, whose bytes follow from the weights alone; the types that"
            f" take it are {', '.join(K_QUANTS)}"
        )
    blocks = weight.reshape(-1, kind.size)
    step = max(_PIECE // kind.size, 1) if weight.device.type == "cpu" else len(blocks)
    stored = torch.empty((len(blocks), kind.nbytes), dtype=torch.uint8, device=weight.device)
    for start in range(0, len(blocks), step):
        stored[start : start + step] = QUANTIZERS[type](blocks[start : start + step].float())
    return Blocks(stored, type, tuple(weight.shape))


def _checked(array: Tensor | np.ndarray, type: str, size: int) -> Tensor:
    weight = torch.from_numpy(array) if isinstance(array, np.ndarray) else array.detach()
    if not weight.is_floating_point():
        raise ValueError(f"weights of {weight.dtype}; floating point is needed, as in float32")
    if not weight.ndim or not weight.numel():
        raise ValueError(f"weights of shape {tuple(weight.shape)}; one row or more is needed")
    if weight.shape[-1] % size:
        raise ValueError(
            f"rows of {weight.shape[-1]} weights; {type} takes multiples of {size}."
            f" {FALLBACK.get(type, 'F16')} is what llama.cpp falls back to"
        )
    if weight.dtype == torch.float64:
        weight = weight.float()
    if not all_finite(weight):
        raise ValueError("weights that are NaN or infinite; no block format stands for them")
    return weight


def _relative(importance: Tensor | None, n: int) -> Tensor:
    """(n,) float32 on the CPU, the largest 1."""
    if importance is None:
        return torch.ones(n)
    importance = importance.detach().cpu().double()
    if importance.shape != (n,):
        raise ValueError(
            f"importance of shape {tuple(importance.shape)} for rows of {n}; it must be ({n},)"
        )
    if not torch.isfinite(importance).all() or (importance < 0).any() or not importance.any():
        raise ValueError(
            "importance must be finite, not negative, and not all 0; None weighs all 1"
        )
    return (importance / importance.max()).float()
