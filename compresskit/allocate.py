"""A budget of bits over the layers of a model: where does the next bit lower the error most?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compresskit.stats import InputStats


def water_filling(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, InputStats],
    bits: float,
    *,
    importance: Mapping[str, float] | None = None,
    overhead: float = 0.25,
) -> dict[str, float]:
    """Bits per weight for each layer, `bits` on average, with the least sum of output errors.

    Every matrix is taken for a Gaussian one of its mean square under its inputs' moments. All of
    their components together are filled to one water level, so that a bit more would gain the
    same everywhere.

    Parameters
    ----------
    weights : mapping
        layer name -> (m, n) tensor
    moments : mapping
        layer name -> InputStats, of at least these layers
    bits : float
        per weight, over all layers
    importance : mapping
        layer name -> factor of its error in the sum; None: 1, the plain sum of squares
    overhead : float
        bits per weight by which the code misses the limit in every layer alike

    Returns
    -------
    dict : layer name -> bits per weight, `overhead` or more each

    Raises
    ------
    ValueError : no layer, other names or shapes, `bits` not above `overhead`, a factor not above 0

    Notes
    -----
    The sum of the layers' output errors is not the error of the model: a layer whose outputs are
    small may matter more. Book: chapter "How close to Shannon can a layer get?".

    References
    ----------
    Reverse water-filling: `theory.reverse_water_filling`.

    Examples
    --------
    Of two layers with equal inputs, the one with weights twice as large gets one bit more.

    >>> g = torch.Generator().manual_seed(0)
    >>> w = torch.randn(64, 64, generator=g)
    >>> still = InputStats.isotropic(64)
    >>> found = water_filling({"a": w, "b": 2 * w}, {"a": still, "b": still}, 3.0)
    >>> {name: round(rate, 3) for name, rate in found.items()}
    {'a': 2.5, 'b': 3.5}
    """
    if not weights or not weights.keys() <= moments.keys():
        missing = sorted(weights.keys() - moments.keys())
        raise ValueError(f"{len(weights)} layers, without moments: {missing}; collect them first")
    if not bits > overhead >= 0:
        raise ValueError(f"bits={bits} with an overhead of {overhead}; more bits are needed")
    importance = dict.fromkeys(weights, 1.0) | dict(importance or {})
    if importance.keys() != weights.keys() or not all(f > 0 for f in importance.values()):
        raise ValueError("importance must give known layers factors above 0")
    spectra = {}
    for name, weight in weights.items():
        if weight.ndim != 2 or weight.shape[1] != len(moments[name].second):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} and moments of"
                f" {len(moments[name].second)} inputs for {name!r}; they must fit together"
            )
        size = importance[name] * weight.double().square().mean().item()
        spectra[name] = (size * moments[name].spectrum.clamp(min=0)).cpu()
    total = sum(weight.numel() for weight in weights.values())

    def rates(level: float) -> dict[str, float]:
        return {
            name: 0.5 * torch.log2((spectrum / level).clamp(min=1)).mean().item()
            for name, spectrum in spectra.items()
        }

    def used(level: float) -> float:
        return sum(rate * weights[name].numel() for name, rate in rates(level).items()) / total

    top = max(spectrum.max().item() for spectrum in spectra.values())
    if not top > 0:
        raise ValueError("all weights or all inputs are 0; there is nothing to allocate bits for")
    low, high = -200.0, 0.0  # octaves below the largest component
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if used(top * 2.0**middle) > bits - overhead else (low, middle)
    return {name: rate + overhead for name, rate in rates(top * 2.0**high).items()}
