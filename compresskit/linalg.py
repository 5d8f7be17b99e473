"""Symmetric matrices: the damping, factors and spectra that calibrated methods share."""

import torch
from torch import Tensor


def damped(matrix: Tensor, fraction: float) -> Tensor:
    """matrix + fraction * mean(diag(matrix)) * I.

    The mean of the diagonal is that of the eigenvalues, and the largest is at most n times it: the
    condition number of a damped semidefinite matrix is at most 1 + n/fraction, in any units.

    Parameters
    ----------
    matrix : (n, n) symmetric tensor
    fraction : 0 or more; 0.01 is the usual choice for second moments of activations

    Raises
    ------
    ValueError : not square, or a negative `fraction`
    """
    check_square(matrix)
    if not fraction >= 0:
        raise ValueError(f"fraction={fraction}; it must be 0 or more, for instance 0.01")
    return matrix + fraction * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)


def cholesky(matrix: Tensor) -> Tensor:
    """The lower triangular L with L L^T = matrix.

    Raises
    ------
    ValueError : `matrix` is not positive definite; the smallest eigenvalue is named. It is never
        shifted behind the caller's back: ask for more damping instead.
    """
    check_square(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed or not torch.isfinite(factor).all():
        smallest = eigenvalues(matrix)[0].item()
        raise ValueError(
            f"the matrix is not positive definite (smallest eigenvalue {smallest:.3g});"
            " damp it first, for instance with damped(matrix, 0.01)"
        )
    return factor


def eigenvalues(matrix: Tensor) -> Tensor:
    """(n,) eigenvalues of a symmetric matrix in ascending order, computed in float64.

    Raises
    ------
    ValueError : not square, or not finite
    """
    check_square(matrix)
    if not torch.isfinite(matrix).all():
        raise ValueError("the matrix holds values that are not finite; check the data behind it")
    return torch.linalg.eigvalsh(matrix.double())


def check_square(matrix: Tensor) -> None:
    """Refuse anything but a square matrix (`ValueError`)."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"shape {tuple(matrix.shape)}; a square matrix is needed, like (64, 64)")
