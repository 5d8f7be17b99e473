"""Two codes, the second of what the first left over."""

from torch import Tensor

from compresskit.code import Sum
from compresskit.methods.factors import Method
from compresskit.methods.moments import checked
from compresskit.stats import InputStats


def residual(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    first: Method,
    second: Method,
    rounds: int = 1,
) -> Sum:
    """first(W) + second(W - first(W)), and again with what the second leaves to the first.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        handed to both
    first, second : callable
        (weight, stats) -> Code: a low rank and a grid for the remainder; or a grid and a low rank
        of its error (LQER)
    rounds : int
        1: each once. In every further round the first codes W - second, then the second what is
        left; the best round is returned (LoftQ's alternation)

    Returns
    -------
    Sum

    Raises
    ------
    ValueError : `rounds` below 1; not a matrix; what the two raise

    Notes
    -----
    Nothing promises that a further round is better: a grid is no projection. So rounds are judged
    by E|(W - code) x|^2, or by the squared error of the weights without `stats`.
    Zhang et al., "LQER", 2024; Li et al., "LoftQ", 2023, algorithm 1.
    Book: chapters "Truncated SVD", "LoRA and QLoRA".
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}; it must be 1 or more")
    weight, moments = checked(weight, stats)
    stats = None if stats is None else moments
    best, least = None, float("inf")
    rest = weight
    for _ in range(rounds):
        coarse = first(rest, stats)
        fine = second(weight - coarse.decode(), stats)
        delta = weight - coarse.decode() - fine.decode()
        error = delta.square().sum() if stats is None else stats.distortion(delta)
        if best is None or error < least:
            best, least = Sum(coarse, fine), error
        rest = weight - fine.decode()
    return best
