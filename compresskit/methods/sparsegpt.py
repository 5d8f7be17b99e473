"""SparseGPT: remove weights of a column, then let the columns to its right absorb the error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Fit, Grid, Quantized, QuantSpec, fit_grid, minmax
from compresskit.code import Bits, check_float
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.sparse import Pattern, Sparse, lowest, mask_code
from compresskit.stats import InputStats


def sparsegpt(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    pattern: Pattern,
    spec: QuantSpec | None = None,
    damp: float = 0.01,
    block: int = 128,
    fit: Fit = minmax,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
) -> Sparse | Quantized:
    """Columns from left to right: w_i -> 0 or stays, w_j += (error of i) V_ij / V_jj for j > i.

    V is upper triangular with V V^T = E[x x^T] + damping. Removing w_i costs (w_i V_ii)^2, what no
    later column can make up for; so the weights with the smallest w_i^2 V_ii^2 go, where w holds
    the corrections so far. They are chosen anew for each block of columns, or for each group of
    an n:m pattern. The sum of these costs is the whole error tr((W - W') V V^T (W - W')^T).

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        moments of x; None: isotropic ones, under which nothing is corrected
    pattern : Pattern
        of single weights. "row" and "layer" compare within a block of columns, so that each block
        loses its share; the published method is "layer"
    spec : QuantSpec
        kept weights are rounded to this grid, in the same pass; its scales are those of the given
        weights. None: they are not rounded
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal
    block : int
        columns whose removals are chosen together; for an n:m pattern a matter of speed alone
    fit : callable
        `affine.minmax`, `affine.percentile` or `affine.mse`: what range a grid covers
    dtype : torch.dtype
        at which kept weights are stored; rounding to it is an error that is absorbed as well
    scale_dtype : torch.dtype
        how the scales are stored

    Returns
    -------
    Sparse
        or, with `spec`, a Quantized whose levels are Sparse

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together; a pattern of whole
        rows or columns; `damp` so small that the second moments are not positive definite

    Notes
    -----
    O(m n^2 + n^3) time, O(m n + n^2) memory. Weights of inputs that are always 0 go first.
    Frantar and Alistarh, "SparseGPT" (ICML 2023), Algorithm 1, in the form of `gptq`: a factor of
    the second moments, not of their inverse. Their code removes one weight more per block.
    Book: chapter "One-shot pruning of trained transformers".

    Examples
    --------
    Two inputs that are always equal: the one that stays takes over from the one that goes.

    >>> stats = InputStats.of(torch.ones(1, 2))
    >>> w = sparsegpt(torch.tensor([[1.0, 2.0]]), stats, pattern=Pattern(0.5), damp=1e-6).decode()
    >>> w.round(decimals=3)
    tensor([[0., 3.]])
    """
    check_float("dtype", dtype)
    if pattern.unit != "weight":
        raise ValueError(
            f"a pattern of whole {pattern.unit}s; use one of single weights, like Pattern(0.5), or"
            " magnitude or wanda"
        )
    if type(block) is not int or block < 1:
        raise ValueError(f"block={block!r}; it must be a number of columns, for instance 128")
    weight, stats = checked(weight, stats)
    weight, second = without_dead_inputs(weight, stats, damp)
    factor = linalg.upper_factor(second)
    # Row i, at j < i: how far an error of column j moves column i. Ones on the diagonal.
    feedback = (factor / factor.diagonal()).T.float().contiguous()
    left = factor.diagonal().float().square()[:, None]  # V_ii^2
    grid = None if spec is None else fit_grid(weight, spec, fit=fit, scale_dtype=scale_dtype)
    store = _to_dtype(dtype) if grid is None else _to_grid(grid)

    given = weight.T.contiguous()  # transposed, so that a column lies in one piece
    columns = len(given)
    target, error = given.clone(), torch.zeros_like(given)
    kept = torch.empty_like(given, dtype=torch.bool)
    stored = torch.empty_like(given)
    step = pattern.among if isinstance(pattern.among, int) else block
    block = -(-block // step) * step  # whole groups
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        target[start:stop] += feedback[start:stop, :start] @ error[:start]
        for first in range(start, stop, step):
            chunk = slice(first, min(first + step, stop))
            if first > start:
                target[chunk] += feedback[chunk, start:first] @ error[start:first]
            # Where each column will be moved to once the errors within the chunk are known is
            # `target`; at this point the best values of the chunk solve a triangular system.
            now = given[chunk] + torch.linalg.solve_triangular(
                feedback[chunk, chunk],
                target[chunk] - given[chunk],
                upper=False,
                unitriangular=True,
            )
            kept[chunk] = ~_removed(now.square() * left[chunk], pattern, chunk)
            for i in range(chunk.start, chunk.stop):
                earlier = slice(first, i)
                moved = torch.addmv(target[i], error[earlier].T, feedback[i, earlier])
                value = store(moved, kept[i], i, stored[i])
                torch.sub(given[i], value, out=error[i])
    kept, stored = kept.T.contiguous(), stored.T.contiguous()
    if grid is None:
        return Sparse.of(stored, kept, dtype=dtype)
    code = grid.code(stored)
    levels = Bits(code.levels.tensor[kept], code.levels.width)
    return replace(code, levels=Sparse(levels, mask_code(kept)))


def _removed(cost: Tensor, pattern: Pattern, chunk: slice) -> Tensor:
    """(k, m) which weights of the columns in `chunk` go.

    The shares of the blocks are rounded so that they add up to that of the pattern.
    """
    if isinstance(pattern.among, int):
        gone = round(pattern.sparsity * pattern.among) - (pattern.among - len(cost))
        return lowest(cost.T, max(gone, 0)).T
    rows = 1 if pattern.among == "row" else cost.shape[1]
    before, after = (round(pattern.sparsity * rows * n) for n in (chunk.start, chunk.stop))
    if pattern.among == "row":
        return lowest(cost.T, after - before).T
    return lowest(cost.T.reshape(1, -1), after - before).reshape(cost.T.shape).T


def _to_dtype(dtype: torch.dtype):
    """A kept weight is stored as it is, or in half precision."""

    def store(moved: Tensor, kept: Tensor, i: int, out: Tensor) -> Tensor:
        torch.mul(moved, kept, out=out)
        if dtype != torch.float32:
            out.copy_(out.to(dtype))
        return out

    return store


def _to_grid(grid: Grid):
    """A kept weight is rounded to the nearest point; what is stored is its level."""
    scale, zero = (part.expand(grid.shape).T for part in grid.by_column())
    divisor = torch.where(scale > 0, scale, torch.inf)
    shift, last = zero.frac(), grid.spec.levels - 1

    def store(moved: Tensor, kept: Tensor, i: int, out: Tensor) -> Tensor:
        level = (moved / divisor[i] + shift[i]).round_() + zero[i].floor()
        out.copy_(level.clamp_(0, last))
        return (out - zero[i]) * scale[i] * kept

    return store
