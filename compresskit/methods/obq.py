"""OBQ: each row in its own order, always the weight whose rounding costs least now."""

from dataclasses import replace

import torch
from torch import Tensor

from compresskit.affine import Fit, Grid, Quantized, QuantSpec, fit_grid, minmax
from compresskit.methods.row_by_row import fix, inverse_of
from compresskit.stats import InputStats

_HELD = 2**25  # elements of the inverses held at a time


def obq(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    spec: QuantSpec,
    damp: float = 0.01,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized:
    """Repeat: q = argmin (w_q - nearest(w_q))^2 / C_qq; w -= (w_q - nearest(w_q)) / C_qq C_q.

    C is the inverse of E[x x^T] + damping over the weights of the row that are still free. After
    each step it loses one of them, C -= C_q C_q^T / C_qq. So every step is the least expensive one,
    and the best response to it; the sum of the costs is the row's error.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device; a small one
    stats : InputStats
        moments of x; None: isotropic ones, and the result is `round_to_nearest`
    spec : QuantSpec
        the grid, taken from the given weights
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal
    fit : callable
        `affine.minmax`, `affine.percentile` or `affine.mse`: what range a grid covers
    scale_dtype : torch.dtype
        how the scales are stored

    Raises
    ------
    ValueError : as `gptq`; or m n^3 above 2^32, which would take minutes

    Notes
    -----
    O(m n^3) time in float64, because every row has an inverse of its own; `gptq`, which visits the
    columns of all rows in one order, needs O(m n^2 + n^3). A weight that the updates have pushed
    more than half a step off its grid is rounded at once, while others can still make up for it.
    Frantar and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), Algorithm 3 and section 5.
    Book: chapter "Rounding with second-order information".
    """
    weight, inverse = inverse_of(weight, stats, damp, instead="gptq")
    grid = fit_grid(weight, spec, fit=fit, scale_dtype=scale_dtype)
    some = max(1, _HELD // weight.shape[1] ** 2)
    levels = [
        _greedy(part, _of_rows(grid, start, len(part)), inverse)
        for start, part in zip(range(0, len(weight), some), weight.split(some), strict=True)
    ]
    return grid.code(torch.cat(levels))


def _greedy(given: Tensor, grid: Grid, inverse: Tensor) -> Tensor:
    """(k, n) levels of `given`, all rows at the same time, each in its own order."""
    step, zero = (t.expand_as(given) for t in grid.by_column())
    levels = torch.empty_like(given)
    free = torch.ones_like(given, dtype=torch.bool)
    row = torch.arange(len(given), device=given.device)
    work, inverse = given.to(inverse), inverse.repeat(len(given), 1, 1)
    for _ in range(given.shape[1]):
        nearest = grid.nearest(work)
        error = work - step * (nearest - zero)
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        strays = error.abs() > step * (0.5 + 1e-4)
        urgency = torch.where(strays, -error.abs(), error.square() / diagonal)
        next_ = torch.where(free, urgency, torch.inf).argmin(1)
        levels[row, next_] = nearest[row, next_]
        fix(work, inverse, free, next_, error[row, next_])
    return levels


def _of_rows(grid: Grid, start: int, count: int) -> Grid:
    """The grids of `count` rows."""
    part = slice(start, start + count) if len(grid.scale) > 1 else slice(None)
    shape = (count, grid.shape[1])
    return replace(grid, scale=grid.scale[part], zero=grid.zero[part], shape=shape)
