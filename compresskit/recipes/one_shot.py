"""What pruning in one shot, without training, leaves of the two real models.

The models, texts and moments are those of `compresskit.recipes.quantization`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compresskit import methods, models
from compresskit.affine import Quantized, QuantSpec, fit_grid
from compresskit.code import Bits
from compresskit.model import Method, layers
from compresskit.recipes import quantization
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats

#: What is removed, by the name that the tables of the book give it.
PATTERNS = {
    "50 %": Pattern(0.5),
    "60 %": Pattern(0.6),
    "70 %": Pattern(0.7),
    "2:4": Pattern.n_of_m(2, 4),
}

Prune = Callable[[Pattern], Method]

#: How it is chosen; kept weights are stored in half precision.
CRITERIA: dict[str, Prune] = {
    name: partial(partial, method, dtype=torch.float16)
    for name, method in {
        "random": methods.random,
        "magnitude": methods.magnitude,
        "Wanda": methods.wanda,
        "SparseGPT": methods.sparsegpt,
    }.items()
}


def prune(criterion: str, pattern: str, bits: int | None = None, joint: bool = True) -> Method:
    """A criterion and a pattern by their names, as a method.

    Parameters
    ----------
    criterion : a name of `CRITERIA`, or "SparseGPT, layer": blocks of columns compared as a whole
    pattern : a name of `PATTERNS`
    bits : of a grid per row, to which kept weights are rounded; None: half precision
    joint : whether SparseGPT rounds in the same pass, or all is rounded to nearest afterwards
    """
    chosen = PATTERNS[pattern]
    if criterion.endswith(", layer"):
        criterion, chosen = criterion.removesuffix(", layer"), replace(chosen, among="layer")
    spec = None if bits is None else QuantSpec(bits)
    if spec is not None and joint:
        return partial(methods.sparsegpt, pattern=chosen, spec=spec)
    method = CRITERIA[criterion](pattern=chosen)
    return method if spec is None else partial(rounded, method=method, spec=spec)


def rounded(
    weight: Tensor, stats: InputStats | None = None, *, method: Method, spec: QuantSpec
) -> Quantized:
    """Prune first, then round what is kept to the nearest points of a grid.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : as the method takes them
    method : one whose code is a `Sparse`
    spec : the grid, which is that of the pruned weights
    """
    pruned = method(weight, stats)
    values = pruned.decode()
    grid = fit_grid(values, spec)
    code = grid.code(grid.nearest(values))
    levels = Bits(code.levels.tensor[pruned.kept], code.levels.width)
    return replace(code, levels=Sparse(levels, pruned.mask))


def _plan(names, criterion: str, method: Method) -> dict[str, Method]:
    """Layers of one shape lose other weights by chance, not the same."""
    if criterion == "random":
        return {name: partial(method, seed=seed) for seed, name in enumerate(names)}
    return dict.fromkeys(names, method)


def sentence_encoder(
    *,
    criterion: str,
    pattern: str,
    calibration: str = "text",
    bits: int | None = None,
    joint: bool = True,
) -> dict:
    """Prune the 36 matrices of MiniLM: the fields of `quantization.sentence_encoder`.

    Parameters
    ----------
    criterion, pattern, bits, joint : as for `prune`
    calibration : as for `quantization.sentence_encoder`
    """
    plan = _plan(layers(models.minilm()), criterion, prune(criterion, pattern, bits, joint))
    return quantization.sentence_encoder(plan, calibration=calibration)


def language_model(
    *,
    criterion: str,
    pattern: str,
    calibration: str = "text",
    bits: int | None = None,
    joint: bool = True,
) -> dict:
    """Prune the 210 linear layers of SmolLM2, as shipped: as `quantization.language_model`.

    Parameters
    ----------
    criterion : as for `prune`, or "none" for the model as it is
    pattern, bits, joint : as for `prune`
    calibration : as for `quantization.sentence_encoder`
    """
    run = partial(quantization.compressed_language_model, base="shipped", calibration=calibration)
    if criterion == "none":
        return run(None)
    method = prune(criterion, pattern, bits, joint)
    return run(_plan(layers(quantization.smollm2("shipped")), criterion, method))
