"""OBS: each row in its own order, always the weight whose removal costs least now."""

import torch
from torch import Tensor

from compresskit.methods.row_by_row import fix, inverse_of
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats

_HELD = 2**25  # elements of the inverses held at a time


def obs(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    pattern: Pattern,
    damp: float = 0.01,
    dtype: torch.dtype = torch.float32,
) -> Sparse:
    """Repeat: q = argmin w_q^2 / C_qq; w -= w_q / C_qq C_q, until the pattern has no more to take.

    C is the inverse of E[x x^T] + damping over the weights of the row that are still there. After
    each step it loses one of them, C -= C_q C_q^T / C_qq. So every step is the least expensive one,
    and the best response to it; the sum of the costs is the row's error.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device; a small one
    stats : InputStats
        moments of x; None: isotropic ones, and the result is `magnitude`
    pattern : Pattern
        single weights among those of a row, or n:m; of n:m the weight that costs least is taken
        among all groups of the row that have one to give
    damp : float
        this fraction of the mean of E[x_j^2] is added to the diagonal
    dtype : torch.dtype
        how the values that stay are stored

    Raises
    ------
    ValueError : as `sparsegpt`; a pattern among the weights of the whole matrix or of rows or
        columns; or m n^3 above 2^32, which would take minutes

    Notes
    -----
    O(m n^3) time in float64, because every row has an inverse of its own; `sparsegpt`, which visits
    the columns of all rows in one order, needs O(m n^2 + n^3).
    Hassibi and Stork, "Second order derivatives for network pruning" (NIPS 1992), with the layer's
    squared output error for the loss: Frantar and Alistarh, "Optimal Brain Compression" (NeurIPS
    2022), Algorithm 1 and section 4.
    Book: chapter "One-shot pruning of trained transformers".

    Examples
    --------
    Of two inputs that are always equal, one weight can carry both.

    >>> stats = InputStats.of(torch.ones(1, 2))
    >>> code = obs(torch.tensor([[1.0, 0.5]]), stats, pattern=Pattern(0.5), damp=1e-6)
    >>> code.decode()
    tensor([[1.5000, 0.0000]])
    """
    if pattern.unit != "weight" or pattern.among == "layer":
        raise ValueError(
            f"{pattern}; OBS takes single weights, among those of a row or of m neighbors in it,"
            f" for instance Pattern({pattern.sparsity}) or Pattern.n_of_m(2, 4)"
        )
    given, inverse = inverse_of(weight, stats, damp, instead="sparsegpt")
    # How many weights go from each group is the same whatever their scores are.
    removed = (~pattern.mask(given[:1]))[0].long()
    size = len(removed) if pattern.among == "row" else pattern.among
    group = torch.arange(len(removed), device=given.device) // size
    allowed = torch.zeros_like(removed).index_add_(0, group, removed)[: group[-1] + 1]
    parts = given.split(max(1, _HELD // len(removed) ** 2))
    found = [_greedy(part, inverse, group, allowed) for part in parts]
    work, kept = (torch.cat(halves) for halves in zip(*found, strict=True))
    return Sparse.of(work, kept, dtype=dtype)


def _greedy(given: Tensor, inverse: Tensor, group: Tensor, allowed: Tensor) -> tuple[Tensor, ...]:
    """(k, n) weights of `given` after all removals, and which of them are still there."""
    work, inverse = given.to(inverse), inverse.repeat(len(given), 1, 1)
    kept = torch.ones_like(given, dtype=torch.bool)
    left = allowed.repeat(len(given), 1)  # (k, groups)
    row = torch.arange(len(given), device=given.device)
    for _ in range(int(allowed.sum())):
        cost = work.square() / inverse.diagonal(dim1=1, dim2=2)
        next_ = torch.where(kept & (left > 0)[:, group], cost, torch.inf).argmin(1)
        left[row, group[next_]] -= 1
        fix(work, inverse, kept, next_, work[row, next_])
    return work.to(given) * kept, kept
