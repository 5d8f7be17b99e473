"""What low rank leaves of a sentence encoder, against grids of the same number of bytes.

The model, texts and moments are those of `compresskit.recipes.quantization`.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor

from compresskit import linalg, methods
from compresskit.affine import QuantSpec
from compresskit.lowrank import allocated_ranks, largest_rank, rank_for_bytes
from compresskit.methods.moments import checked, without_dead_inputs
from compresskit.model import Method, layers
from compresskit.recipes import quantization
from compresskit.stats import InputStats

GROUP = 128
DAMP = 1e-4
#: How a matrix is replaced, by the name that the tables of the book give it.
WAYS = (
    "SVD",
    "whitened SVD",
    "whitened SVD, ranks allocated",
    "whitened SVD, int8 factors",
    "whitened SVD, int4 factors",
    "rank, then int",
    "int, then rank",
    "GPTQ",
)


def plan(way: str, bits: float) -> dict[str, Method]:
    """A method for each of MiniLM's 36 matrices that takes about `bits` bits per weight.

    Parameters
    ----------
    way : str
        a name of `WAYS`. "GPTQ": a grid in groups of 128. "rank, then int": one bit per weight
        less for the grid, and its bytes for a whitened SVD in float16, of which the grid codes the
        remainder; "int, then rank": as large, and the rank is that of GPTQ's error
    bits : float
        per weight; for the last three a whole number, and what the grid's scales take comes on top

    Raises
    ------
    ValueError : an unknown way
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}; the ways are {', '.join(map(repr, WAYS))}")
    matrices = shapes()
    if way == "GPTQ":
        return dict.fromkeys(matrices, _gptq(int(bits), GROUP))
    if "then" in way:
        return {name: _both(way, int(bits), *shape) for name, shape in matrices.items()}
    if "allocated" in way:
        numbers = sum(int(bits / 16 * m * n) for m, n in matrices.values())
        ranks = allocated_ranks(spectra(), matrices, numbers)
        return {n: partial(methods.whitened_svd, rank=r, damp=DAMP) for n, r in ranks.items()}
    each = {"int8": 8, "int4": 4}.get(way.removesuffix(" factors").split(", ")[-1])
    options = {"factors": _factor(each)} if each else {}
    method = methods.svd if way == "SVD" else partial(methods.whitened_svd, damp=DAMP)
    found = {}
    for name, (rows, columns) in matrices.items():
        rank = rank_for_bytes(rows, columns, int(bits * rows * columns / 8), bits=each or 16)
        found[name] = partial(method, rank=rank, **options)
    return found


@cache
def shapes() -> dict[str, tuple[int, int]]:
    """The shapes of MiniLM's 36 matrices."""
    encoder, *_ = quantization.minilm_and_moments()
    return {name: tuple(layer.weight.shape) for name, layer in layers(encoder).items()}


@cache
def spectra() -> dict[str, Tensor]:
    """The singular values of MiniLM's 36 matrices, whitened by their inputs."""
    encoder, _, _, moments = quantization.minilm_and_moments()
    return {
        name: whitened_spectrum(layer.weight, moments["text"][name])
        for name, layer in layers(encoder).items()
    }


def whitened_spectrum(weight: Tensor, stats: InputStats, *, damp: float = DAMP) -> Tensor:
    """The singular values of W L, L L^T the damped second moments of the inputs.

    Parameters
    ----------
    weight : (m, n) tensor
    stats : InputStats
    damp : float
        as for `methods.whitened_svd`
    """
    weight, second = without_dead_inputs(*checked(weight, stats), damp)
    return torch.linalg.svdvals(weight.double() @ linalg.cholesky(second.double()))


def _gptq(bits: int, group: int | None) -> Method:
    return partial(methods.gptq, spec=QuantSpec(bits, group_size=group))


def _factor(bits: int) -> Method:
    """A grid per row of each factor; the second factor's inputs have the first one's moments."""
    return partial(methods.gptq, spec=QuantSpec(bits))


def _both(way: str, bits: int, rows: int, columns: int) -> Method:
    """A grid with one bit less, and a rank for the bytes of that bit."""
    rank = min(rank_for_bytes(rows, columns, rows * columns // 8), largest_rank(rows, columns))
    low = partial(methods.whitened_svd, rank=rank, damp=DAMP)
    grid = _gptq(bits - 1, GROUP)
    first, second = (low, grid) if way == "rank, then int" else (grid, low)
    return partial(methods.residual, first=first, second=second)
