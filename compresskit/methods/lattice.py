"""Columns rounded to grids without ends, with feedback, at a rate that is measured in bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Quantized
from compresskit.code import Array, Bits
from compresskit.codebook import TABLES, Codebook
from compresskit.entropy import Scales, adaptive, rans
from compresskit.entropy.tables import index_of
from compresskit.methods.gptq import round_columns
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.stats import InputStats

_TRIALS, _CLOSE = 16, 0.004  # at most so many steps are tried, and what is near enough, in bits


def coded_lattice(
    weight: Tensor,
    stats: InputStats | None,
    *,
    bits: float,
    damp: float,
    shrink: bool,
    block: int,
    filling: bool,
) -> Quantized:
    """The finest grids whose code, everything counted, takes at most `bits` per weight.

    Parameters
    ----------
    weight, stats, bits, damp, shrink, block : as for `methods.water_filling_gptq`
    filling : bool
        steps in proportion to 1 / V_jj; otherwise one step for all

    Raises
    ------
    ValueError : as the methods
    """
    if not isinstance(bits, int | float) or not 0 < bits <= 16:
        raise ValueError(f"bits={bits!r}; a rate of up to 16 bits per weight is needed, like 3.0")
    weight, stats = checked(weight, stats)
    weight, second = without_dead_inputs(weight, stats, damp)
    second = second.double()
    variance = weight.double().square().mean().item()
    spread = linalg.upper_factor(second).diagonal().log2().mean().item()
    octave = 0.26 - bits + spread + (0.5 * math.log2(variance) if variance else 0.0)
    best, low, high, rate = None, -math.inf, math.inf, math.inf
    for _ in range(_TRIALS):
        code = _rounded(weight, second, 4.0**octave, variance * shrink, block, filling)
        rate = 8 * code.nbytes / weight.numel()
        if rate <= bits:
            high = octave
            if best is None or rate > best[0]:
                best = rate, code
        else:
            low = octave
        if 0 <= bits - rate <= _CLOSE or not variance or high - low < 1e-5:
            break
        octave += max(-2.0, min(2.0, rate - bits + 0.25 * _CLOSE))
        if not low < octave < high:
            octave = (low + high) / 2
    if best is None:
        raise ValueError(
            f"bits={bits}: scales and tables alone take more of a {tuple(weight.shape)} matrix;"
            f" the coarsest grid that was tried takes {rate:.2f} bits per weight"
        )
    return best[1]


def _rounded(
    weight: Tensor,
    second: Tensor,
    error: float,
    variance: float,
    block: int,
    filling: bool,
) -> Quantized:
    """With an error of about `error` per input; the price of a weight is that of `variance`."""
    wanted = weight
    if variance:
        price = error / variance * torch.eye(len(second)).to(second)
        wanted = torch.linalg.solve(second + price, second @ weight.double().T).T.float()
        second = second + price
    factor = linalg.upper_factor(second)
    own = factor.diagonal()
    index = torch.zeros(len(own), dtype=torch.int64, device=own.device)
    typical = own.square().mean().sqrt()
    if filling:
        typical = own.log2().mean().exp2()
        index = torch.from_numpy(index_of((typical / own).cpu().numpy())).to(own.device)
        index = index.clamp(-128, 127)
    step = ((12 * error) ** 0.5 / typical).float()
    steps = step * TABLES["eighths"].to(own.device)[index + 128]
    given = wanted.T.contiguous()
    lost, levels = torch.zeros_like(given), torch.empty_like(given)
    end = given.new_full((1, 1), 2.0**30)
    feedback = (factor / own).T.float().contiguous()
    round_columns(
        given, given.clone(), lost, levels, feedback, steps[:, None], -end, end, block=block
    )
    return _code(levels.T, index, step)


def _code(levels: Tensor, index: Tensor, step: Tensor) -> Quantized:
    columns = levels.shape[1]
    scale, group = Array(step.reshape(1, 1)), columns
    if index.any():
        places = adaptive((index + 128)[None])
        scale, group = Codebook(places, "eighths", Array(step.reshape(1)), block=columns), 1
    zero = Bits.of(torch.zeros(1, 1, device=levels.device), 1)
    return Quantized(rans(levels.to(torch.int32), Scales("both")), scale, zero, group)
