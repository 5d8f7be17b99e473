"""What pruning in one shot leaves of the two real models, and what training brings back.

The models, texts and moments are those of `compresskit.recipes.quantization`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit import data, measure, methods, models
from compresskit.affine import Quantized, QuantSpec, fit_grid
from compresskit.code import Bits
from compresskit.model import Method, compress, decoded, layers
from compresskit.recipes import quantization, sentence_student
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats
from compresskit.train import converted, fit, masked, support

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
        if chosen.among != "row":
            raise ValueError(
                f"{criterion!r} with {pattern!r}; its blocks lose a share, like '50 %'"
            )
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


def fine_tuned(
    *, criterion: str, pattern: str, seed: int, steps: int = 60, rate: float = 3e-4
) -> dict:
    """Prune MiniLM, then train the kept weights to give the dense model's embeddings again.

    The texts are those of the training split, which no criterion has seen; removed weights stay 0.

    Parameters
    ----------
    criterion, pattern : as for `prune`
    seed : of the order of the texts
    steps : updates, of about 1,024 tokens each
    rate : the largest learning rate

    Returns
    -------
    dict : "cosine", "top1" and the held-out paragraphs' "cosines" after the training, the
        "cosine_before", and "seconds" of the training
    """
    encoder, held_out, reference, moments = quantization.minilm_and_moments()
    plan = _plan(layers(encoder), criterion, prune(criterion, pattern))
    pruned = decoded(compress(encoder, plan, moments["text"]))
    before = measure.fidelity(reference, pruned.encode(held_out)).cosine
    student = masked(pruned.requires_grad_(), support(pruned))
    student.embeddings.requires_grad_(False)
    start = time.perf_counter()
    batches = sentence_student.Batches(*_lessons(), tokens=1024, steps=steps, seed=seed)
    fit(student, sentence_student.cosine_loss, batches, rate=rate, warmup=steps // 10, seed=seed)
    seconds = time.perf_counter() - start
    embeddings = decoded(converted(student)).encode(held_out)
    after = measure.fidelity(reference, embeddings)
    cosines = F.cosine_similarity(reference, embeddings).tolist()
    return {
        "cosine_before": before,
        "cosine": after.cosine,
        "top1": after.top1,
        "cosines": [round(cosine, 5) for cosine in cosines],
        "seconds": round(seconds, 1),
    }


@cache
def _lessons() -> tuple[list[Tensor], list[Tensor]]:
    encoder = quantization.minilm_and_moments()[0]
    groups = sentence_student.pieces(encoder, data.pydoc().train)
    return groups, sentence_student.answers(encoder, groups)


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
