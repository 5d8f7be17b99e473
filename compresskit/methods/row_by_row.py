"""What the exact greedy methods share: an inverse for every row, and one step of any of them."""

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.stats import InputStats

WORK = 2**32  # m n^3 above which it would be minutes


def inverse_of(
    weight: Tensor, stats: InputStats | None, damp: float, instead: str
) -> tuple[Tensor, Tensor]:
    """The weight in float32, without dead inputs, and (E[x x^T] + damping)^-1 in float64.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats or None
        None: isotropic ones
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal
    instead : str
        the method for larger matrices, which a refusal names

    Raises
    ------
    ValueError : as `moments.checked` and `linalg.upper_factor`; or m n^3 above 2^32
    """
    weight, stats = checked(weight, stats)
    rows, columns = weight.shape
    if rows * columns**3 > WORK:
        raise ValueError(
            f"{rows} rows of {columns} weights; an inverse for each row stops at"
            f" rows * columns^3 = 2^32, for instance a (64, 400) matrix; use {instead} for larger"
            " ones"
        )
    weight, second = without_dead_inputs(weight, stats, damp)
    upper = linalg.upper_factor(second)  # refuses what is singular
    upper = torch.linalg.solve_triangular(upper, torch.eye(columns).to(upper), upper=True)
    return weight, upper.T @ upper


def fix(work: Tensor, inverse: Tensor, free: Tensor, which: Tensor, error: Tensor) -> None:
    """Take `error` off weight q of each row, let the free ones answer, and down-date the inverse.

    w -= e / C_qq C_q where free, then C -= C_q C_q^T / C_qq. In place.

    Parameters
    ----------
    work : (k, n) tensor
        the weights as they are now
    inverse : (k, n, n) tensor
        C of each row, over the free weights
    free : (k, n) bool tensor
        False for q from here on
    which : (k,) integer tensor
        q of each row
    error : (k,) tensor
    """
    row = torch.arange(len(work), device=work.device)
    free[row, which] = False
    column = inverse[row, which]
    against = column / column[row, which][:, None]
    work -= error[:, None] * against * free
    inverse.baddbmm_(against[:, :, None], column[:, None, :], alpha=-1)
