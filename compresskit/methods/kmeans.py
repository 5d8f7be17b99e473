"""Weight sharing: weights in clusters found by Lloyd's iteration, one stored value per cluster."""

import torch
from torch import Tensor

from compresskit.codebook import Codebook, lloyd
from compresskit.methods.lloyd_max import fitted
from compresskit.stats import InputStats


def kmeans(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    bits: int = 4,
    start: str = "linear",
    share: str = "matrix",
    steps: int = 1000,
    value_dtype: torch.dtype = torch.float16,
) -> Codebook:
    """A table to which sum_ij E x_j^2 (W_ij - table[i_ij])^2 can be led downhill from a start.

    A local minimum, never better than the `lloyd_max` of the same arguments.

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device; the table is computed on the CPU
    stats : InputStats
        as for `lloyd_max`
    bits : int
        1 to 8
    start : str
        "linear": evenly spaced from the smallest to the largest weight; "density": at the
        quantiles (i + 1/2) / 2^bits
    share : str
        "matrix": one table; "row": one for each row
    steps : int
        of the iteration, at most
    value_dtype : torch.dtype
        how the table is stored

    Returns
    -------
    Codebook
        of the same size as that of `lloyd_max`

    Raises
    ------
    ValueError : as `lloyd_max`; `start` unknown, `steps` below 0

    Notes
    -----
    O(m n log(m n)) for sorting; an iteration then is O(2^bits log(m n)).

    References
    ----------
    Han, Mao and Dally, "Deep compression", 2016, section 3: its linear and density-based starts.
    Book: chapter "Better codebooks and the limit".
    """
    if start not in ("linear", "density"):
        raise ValueError(f'start={start!r}; it must be "linear" or "density"')
    if type(steps) is not int or steps < 0:
        raise ValueError(f"steps={steps!r}; it must be 0 or more, for instance 1000")

    def fit(values, weights):
        k = 1 << bits
        share_below = (torch.arange(k, dtype=torch.float64) + 0.5) / k
        if start == "linear":
            low, high = values.min().item(), values.max().item()
            first = torch.linspace(low, high, k, dtype=torch.float64)
        else:
            place = (share_below * values.numel()).long().to(values.device)
            first = values.reshape(-1).sort().values[place]
        return lloyd(values, first, weights=weights, steps=steps)

    return fitted(weight, stats, fit, bits, share, None, False, value_dtype)
