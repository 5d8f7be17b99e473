"""OBQ: each row in its own order, always the weight whose rounding costs least now."""

from dataclasses import replace

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Fit, Grid, Quantized, QuantSpec, fit_grid, minmax
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.stats import InputStats

_WORK = 2**32  # m n^3 above which it would be minutes
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
    weight, stats = checked(weight, stats)
    rows, columns = weight.shape
    if rows * columns**3 > _WORK:
        raise ValueError(
            f"{rows} rows of {columns} weights; OBQ inverts a matrix per row and stops at"
            " rows * columns^3 = 2^32, for instance a (64, 400) matrix; use gptq for larger ones"
        )
    weight, second = without_dead_inputs(weight, stats, damp)
    upper = linalg.upper_factor(second)  # refuses what is singular
    upper = torch.linalg.solve_triangular(upper, torch.eye(columns).to(upper), upper=True)
    grid = fit_grid(weight, spec, fit=fit, scale_dtype=scale_dtype)
    some = max(1, _HELD // columns**2)
    levels = [
        _greedy(part, _of_rows(grid, start, len(part)), upper.T @ upper)
        for start, part in zip(range(0, rows, some), weight.split(some), strict=True)
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
        free[row, next_] = False
        against = inverse[row, next_] / diagonal[row, next_][:, None]
        work -= error[row, next_][:, None] * against * free
        inverse.baddbmm_(against[:, :, None], inverse[row, next_][:, None, :], alpha=-1)
    return levels


def _of_rows(grid: Grid, start: int, count: int) -> Grid:
    """The grids of `count` rows."""
    part = slice(start, start + count) if len(grid.scale) > 1 else slice(None)
    shape = (count, grid.shape[1])
    return replace(grid, scale=grid.scale[part], zero=grid.zero[part], shape=shape)
