"""GPTQ: round a column, then let the columns to its right absorb the error."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.affine import Fit, Grid, Quantized, QuantSpec, fit_grid, minmax
from compresskit.basis import InBasis, Permutation
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.stats import InputStats


def gptq(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    spec: QuantSpec,
    order: str = "natural",
    damp: float = 0.01,
    static_groups: bool = False,
    block: int = 128,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> Quantized | InBasis:
    """q_i = nearest(w_i + sum_{j<i} (w_j - q_j) V_ji / V_ii), where V V^T = E[x x^T] + damping.

    V is upper triangular. Each column is rounded where the errors already made are best cancelled
    by the columns still free; what no later column can cancel is sum_i (e_i V_ii)^2, with e_i the
    rounding error of step i, and it is the whole error tr((W - Q) V V^T (W - Q)^T).

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        moments of x; None: isotropic ones, and the result is `round_to_nearest`
    spec : QuantSpec
        the grid. A row (or "tensor") grid is that of the given weights; the grid of a group is
        taken when the group is reached, from weights that have absorbed the errors so far
    order : "natural" or "activation"
        columns from left to right, or by falling E[x_j^2] ("act-order")
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal
    static_groups : bool
        take the grids of groups from the given weights, each over its own consecutive columns
    block : int
        columns rounded between two matrix products; a matter of speed alone
    fit : callable
        `affine.minmax`, `affine.percentile` or `affine.mse`: what range a grid covers
    scale_dtype : torch.dtype
        how the scales are stored

    Returns
    -------
    Quantized
        or, when groups run along columns in activation order, that inside an `InBasis`, which
        pays for the permutation

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together; an unknown `order`;
        `damp` so small that the second moments are not positive definite

    Notes
    -----
    O(m n^2 + n^3) time, O(m n + n^2) memory. Columns that no input reaches become 0,
    or the level nearest to it.
    Frantar et al., "GPTQ" (ICLR 2023), Algorithm 1, computes the same from the upper Cholesky
    factor U = V^-1 of the inverse. Factoring backwards gives V itself, and no inverse is formed;
    this form of the update is LDLQ of Chee et al., "QuIP" (NeurIPS 2023), who prove them equal.
    Book: chapter "Rounding with second-order information".

    Examples
    --------
    Two inputs that are always equal: what one weight loses, the other gains.

    >>> stats = InputStats.of(torch.ones(1, 2))
    >>> gptq(torch.tensor([[1.5, 0.4]]), stats, spec=QuantSpec(2, symmetric=True)).decode()
    tensor([[1., 1.]])
    """
    if order not in ("natural", "activation"):
        raise ValueError(f'order={order!r}; it must be "natural" or "activation"')
    if type(block) is not int or block < 1:
        raise ValueError(f"block={block!r}; it must be a number of columns, for instance 128")
    weight, stats = checked(weight, stats)
    rows, columns = weight.shape
    visit = torch.arange(columns, device=weight.device)
    if order == "activation":
        visit = stats.second.diagonal().argsort(descending=True, stable=True)
    weight, second = without_dead_inputs(weight, stats, damp)
    factor = linalg.upper_factor(second[visit][:, visit])
    # Row i, at j < i: how far an error of column j moves column i. Ones on the diagonal.
    feedback = (factor / factor.diagonal()).T.float().contiguous()
    given = weight[:, visit].T.contiguous()  # transposed, so that a column lies in one piece

    fitted = partial(fit_grid, fit=fit, scale_dtype=scale_dtype)
    target, error, levels = given.clone(), torch.zeros_like(given), torch.empty_like(given)
    moving = isinstance(spec.group_size, int) and spec.group_size < columns and not static_groups
    if not moving:
        grid = fitted(weight, spec)
        step, zero = (t.T if t.shape[1] == 1 else t.T[visit] for t in grid.by_column())
        round_columns(given, target, error, levels, feedback, step, *_ends(zero, spec), block)
        levels += zero
        return grid.code(levels[visit.argsort()].T)
    grids = []
    for start in range(0, columns, spec.group_size):
        group = slice(start, min(start + spec.group_size, columns))
        target[group] += feedback[group, :start] @ error[:start]
        # `target` is what each column will be moved to once the errors of the group itself are
        # known; at this point the best values of the whole group solve a triangular system.
        absorbed = torch.linalg.solve_triangular(
            feedback[group, group], target[group] - given[group], upper=False, unitriangular=True
        )
        grid = fitted((given[group] + absorbed).T, replace(spec, group_size=None))
        step, zero = grid.scale.T, grid.zero.T
        parts = (t[group] for t in (given, target, error, levels))
        round_columns(*parts, feedback[group, group], step, *_ends(zero, spec), block)
        levels[group] += zero
        grids.append(grid)
    scale, zero = (torch.cat([getattr(g, name) for g in grids], 1) for name in ("scale", "zero"))
    grid = Grid(spec, scale, zero, spec.group_size, (rows, columns), scale_dtype)
    code = grid.code(levels.T)
    return code if order == "natural" else InBasis(code, Permutation.of(visit))


def round_columns(
    given: Tensor,
    target: Tensor,
    error: Tensor,
    levels: Tensor,
    feedback: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    half: float = 0.0,
    block: int = 128,
) -> None:
    """Round columns of a matrix one after another, each with the feedback of those before.

    The formulas are those of `affine.Grid`, on few kernel launches.

    Parameters
    ----------
    given : (k, m) tensor
        the columns, transposed so that each lies in one piece
    target : (k, m) tensor
        `given` and the feedback of columns that were rounded before these; overwritten
    error, levels : (k, m) tensors
        filled with what each column loses, and with whole numbers (less `half`)
    feedback : (k, k) tensor
        row i, at j < i: how far an error of column j moves column i
    step : (k, m) or (k, 1) or (1, m) tensor
        a step of 0 stands for a column, or an entry, of zeros
    low, high : tensors
        the ends of the grid, of such shapes
    half : float
        1/2 for a grid of half-odd numbers
    block : int
        columns between two matrix products
    """
    divisor = torch.where(step > 0, step, torch.inf)  # an all-zero group has no step
    step, divisor, low, high = (t.expand_as(given) for t in (step, divisor, low, high))
    for start in range(0, len(given), block):
        stop = min(start + block, len(given))
        target[start:stop] += feedback[start:stop, :start] @ error[:start]
        for i in range(start, stop):
            moved = torch.addmv(target[i], error[start:i].T, feedback[i, start:i])
            level = torch.div(moved, divisor[i], out=levels[i])
            if half:
                level += half
            torch.clamp(level.round_(), low[i], high[i], out=level)
            if half:
                level -= half
            torch.addcmul(given[i], step[i], level, value=-1, out=error[i])


def _ends(zero: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, float]:
    """The least and the largest level less the zero point, and the zero point's half."""
    low = -zero.floor()
    return low, low + (spec.levels - 1), spec.center % 1 if spec.symmetric else 0.0
