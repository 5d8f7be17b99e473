"""The matrices that methods share: damping, factors, spectra, ranges, and Hadamard's rotations.

(Over 200 lines, more than half of them statements and refusals.)
"""

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

_LARGEST = 256  # a Paley factor is multiplied entry by entry: no single one may be the whole order


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


def upper_factor(matrix: Tensor) -> Tensor:
    """The upper triangular V with V V^T = matrix: Cholesky's factor, taken from the last row up.

    V^-1 is the upper factor U of the inverse, U^T U = matrix^-1, and V_ii^2 = 1/U_ii^2 is what is
    left of input i once those after it have explained what they can; neither takes an inverse.

    Parameters
    ----------
    matrix : (n, n) symmetric tensor

    Returns
    -------
    (n, n) float64 tensor

    Raises
    ------
    ValueError : as `cholesky`, and if an input is a combination of later ones up to the precision
        of float32, in which moments are kept
    """
    check_square(matrix)
    factor = cholesky(matrix.double().flip(0, 1)).flip(0, 1)
    left = (factor.diagonal().square() / matrix.diagonal()).min().item()
    if not left > 4 * torch.finfo(torch.float32).eps:
        raise ValueError(
            f"an input is a combination of others: {left:.1g} of its power is its own, and float32"
            " moments do not resolve that; damp the matrix, for instance with damped(matrix, 0.01)"
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


def range_finder(matrix: Tensor, size: int, *, power: int = 2, seed: int = 0) -> Tensor:
    """Orthonormal columns that nearly span what a matrix returns: of (A A^T)^power A G, G Gaussian.

    Parameters
    ----------
    matrix : (m, n) tensor
        float32 or float64
    size : int
        columns wanted, 1 to min(m, n)
    power : int
        0 or more. A step multiplies the matrix twice and raises the ratios of its singular values
        to a power higher by two, so that small ones stop disturbing
    seed : int
        of G, drawn on the CPU

    Returns
    -------
    (m, size) tensor Q with Q^T Q = I

    Raises
    ------
    ValueError : a size or power out of range

    Notes
    -----
    Orthonormalized after every product, without which small directions drown in rounding errors.
    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011,
    algorithm 4.4.
    """
    rows, columns = matrix.shape
    if not 1 <= size <= min(rows, columns) or power < 0:
        raise ValueError(
            f"size={size}, power={power} for a ({rows}, {columns}) matrix; size must be 1 to"
            f" {min(rows, columns)}, and power 0 or more, for instance 2"
        )
    draw = torch.randn(columns, size, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(matrix @ draw.to(matrix)).Q
    for _ in range(power):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis


def hadamard(n: int) -> Tensor:
    """(n, n) float32 matrix H of entries +1 and -1 with H H^T = n I.

    The Kronecker product of Sylvester's matrices of order 2 and of Paley's of order q + 1 up to
    256, for primes q with q mod 4 = 3; in particular of every order 2^k.

    Parameters
    ----------
    n : int
        1, 2, 4, 8, 12, 16, 20, 24, 32, ...

    Raises
    ------
    ValueError : there is none of this order, or no such product; the next possible one is named

    References
    ----------
    Sylvester, Phil. Mag. 34 (1867) 461-475; Paley, "On orthogonal matrices", J. Math. Phys. 12
    (1933) 311-320, lemma 2.
    """
    matrix = torch.ones(1, 1)
    for factor in _hadamard_factors(n):
        matrix = torch.kron(matrix, _hadamard_factor(factor))
    return matrix


def hadamard_order(n: int) -> int:
    """The smallest order, `n` or more, of which `hadamard` builds a matrix.

    Examples
    --------
    >>> [hadamard_order(n) for n in (3, 13, 28, 576, 1536)]
    [4, 16, 32, 576, 1536]
    """
    if n > 2:
        n += -n % 4  # there are no others
    while _factored(n) is None:
        n += 4 if n > 2 else 1
    return n


def hadamard_transform(x: Tensor, *, transposed: bool = False) -> Tensor:
    """H x / sqrt(n) along the last axis, or H^T x / sqrt(n), in n times the factors' sum.

    As H H^T = n I, either undoes the other, and lengths stay as they are.

    Parameters
    ----------
    x : (..., n) tensor
        n an order that `hadamard` builds; float16 and bfloat16 are computed in float32
    transposed : bool
        Sylvester's matrices are symmetric, Paley's are not

    Raises
    ------
    ValueError : no Hadamard matrix of order n can be built here

    Notes
    -----
    A Kronecker product acts on x, read as an array with an axis per factor, axis by axis. Each
    step below multiplies the last axis and moves it to the front.
    """
    n, dtype = x.shape[-1], x.dtype
    x = x.float() if dtype in (torch.float16, torch.bfloat16) else x
    with torch.autocast(x.device.type, enabled=False):
        for factor in reversed(_hadamard_factors(n)):
            matrix = _hadamard_factor(factor, x.device).to(x.dtype)
            x = x.unflatten(-1, (-1, factor)) @ (matrix if transposed else matrix.T)
            x = x.transpose(-1, -2).flatten(-2)
    return (x / n**0.5).to(dtype)


def _hadamard_factors(n: int) -> tuple[int, ...]:
    factors = _factored(n)
    if factors is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} can be built here; the next order for which there is"
            f" one is {hadamard_order(max(n, 1))}"
        )
    return factors


@lru_cache
def _factored(n: int) -> tuple[int, ...] | None:
    """Orders of Sylvester (at most 16, for speed) or Paley type with product n, if there are."""
    if n >= 1 and n & (n - 1) == 0:
        sixteens, rest = divmod(n.bit_length() - 1, 4)
        return ((2**rest,) if rest else ()) + (16,) * sixteens
    for order in _paley_orders():
        if n >= order and n % order == 0:
            rest = _factored(n // order)
            if rest is not None:
                return (*rest, order)
    return None


@lru_cache
def _paley_orders() -> tuple[int, ...]:
    """q + 1 for primes q with q mod 4 = 3, but for those that are powers of 2 as well."""
    return tuple(order for order in range(12, _LARGEST + 1, 4) if _is_prime(order - 1))


def _hadamard_factor(order: int, device: torch.device | None = None) -> Tensor:
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, device=device)
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
        while len(matrix) < order:
            matrix = torch.kron(two, matrix)
        return matrix
    q = order - 1
    places = torch.arange(q, device=device)
    character = -torch.ones(q, device=device)  # of differences i - j: 1 for squares modulo q
    character[places.square() % q] = 1
    character[0] = 0
    matrix = torch.ones(order, order, device=device)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = character[(places[:, None] - places) % q]
    matrix[1:, 1:].diagonal().fill_(1)
    return matrix


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, isqrt(q) + 1))


def check_square(matrix: Tensor) -> None:
    """Refuse anything but a square matrix (`ValueError`)."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"shape {tuple(matrix.shape)}; a square matrix is needed, like (64, 64)")


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one pass: least and largest hand both of them on."""
    return not x.numel() or bool(torch.isfinite(torch.stack(x.aminmax())).all())


def check_weight(weight: Tensor) -> None:
    """Refuse anything but a finite matrix with an entry or more (`ValueError`)."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(
            f"shape {tuple(weight.shape)}; a non-empty matrix is needed, like (64, 128)"
        )
    if not all_finite(weight):
        raise ValueError("the weight holds NaN or infinite values; find out where they come from")
