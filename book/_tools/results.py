"""Runs too long for a page: `make results` writes them to book/results/, pages plot them as stored.

Each run is a function that yields tasks: settings, and a function that returns what they gave.
What is finished is kept in _build/results, so a run that was killed goes on where it was; the
settings decide what is the same, so empty that folder after a change of the code. Each file says
what was run, with what, and when.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import inspect
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from pathlib import Path

import torch
from normalize import write_atomically

from compresskit import affine, methods, models
from compresskit.affine import QuantSpec
from compresskit.formats import gguf
from compresskit.methods import round_to_nearest
from compresskit.model import Method, layers, tables
from compresskit.recipes import (
    adaptation,
    block_formats,
    criteria,
    deep_compression,
    distillation,
    frontier,
    inheritance,
    language_student,
    latency,
    lossless,
    lottery,
    low_precision,
    low_rank,
    one_shot,
    quantization,
    sentence_student,
)

HERE = Path(__file__).resolve().parents[1] / "results"
PARTIAL = HERE.parents[1] / "_build" / "results"
Tasks = Iterator[tuple[dict, Callable[[], dict]]]


def minilm_board(
    chapter: int, chosen: dict[str, Method | dict], calibration: str = "text", **fields
) -> Tasks:
    """One record per method (or plan): what it makes of all 36 matrices of MiniLM."""
    names = layers(models.minilm())
    for name, method in chosen.items():
        plan = method if isinstance(method, dict) else dict.fromkeys(names, method)
        task = partial(quantization.sentence_encoder, plan, calibration=calibration)
        settings = {"chapter": chapter, "model": "minilm", "stored": True}
        yield {"method": name, **settings, **fields, "calibration": calibration}, task


def uniform_quantizer() -> Tasks:
    """Chapter 6: every width and grid, min-max and least squares, on the 36 matrices of MiniLM."""
    fits = {"min-max": affine.minmax, "MSE": affine.mse}
    grids = {"tensor": "tensor", "row": None, "g128": 128, "g32": 32}
    return minilm_board(
        6,
        {
            f"round-to-nearest int{bits} {grid} {fit_name}": partial(
                round_to_nearest, spec=QuantSpec(bits, group_size=size), fit=fit
            )
            for bits in (8, 6, 5, 4, 3, 2)
            for grid, size in grids.items()
            for fit_name, fit in fits.items()
        },
    )


def first_compression() -> Tasks:
    """Chapter 1: 8 bits for the tables, 8 or 4 for the matrices."""
    encoder = models.minilm()
    eight = partial(round_to_nearest, spec=QuantSpec(8))
    four = partial(round_to_nearest, spec=QuantSpec(4, group_size=32))
    rows = dict.fromkeys(tables(encoder), eight)
    plans = {
        "all int8 row": rows | dict.fromkeys(layers(encoder), eight),
        "tables int8 row, matrices int4 g32": rows | dict.fromkeys(layers(encoder), four),
    }
    return minilm_board(1, plans)


def codebooks() -> Tasks:
    """Chapter 7: tables of values instead of even steps, and the uniform grid in equal blocks."""
    fixed = {"NF4": methods.nf4, "FP4": methods.fp4}
    for name, method in fixed.items():
        yield from minilm_board(7, {f"{name} g64": method}, bits=4, group="g64")
        plain = {f"{name} g64, float32 scales": partial(method, double_quant=False)}
        yield from minilm_board(7, plain, bits=4, group="g64")
    for bits in (2, 3, 4, 5, 6):
        table = partial(methods.lloyd_max, bits=bits)
        spec = QuantSpec(bits, group_size=64)
        chosen = {
            f"Lloyd-Max {bits} bits g64": partial(table, block=64),
            f"round-to-nearest int{bits} g64 min-max": partial(round_to_nearest, spec=spec),
        }
        yield from minilm_board(7, chosen, bits=bits, group="g64")
        whole = {
            f"Lloyd-Max {bits} bits matrix": table,
            f"k-means {bits} bits matrix": partial(methods.kmeans, bits=bits),
        }
        yield from minilm_board(7, whole, bits=bits, group="matrix")
        row = {f"Lloyd-Max {bits} bits row": partial(table, share="row")}
        yield from minilm_board(7, row, bits=bits, group="row")


def activations() -> Tasks:
    """Chapter 8: inputs in 8 bits too, and weights in a rotated basis."""
    chosen = {"int8 weights alone": partial(round_to_nearest, spec=QuantSpec(8, symmetric=True))}
    for inputs in ("token", "tensor", "static"):
        int8 = partial(methods.int8, inputs=inputs)
        chosen[f"int8, inputs per {inputs}"] = int8
        chosen[f"int8, inputs per {inputs}, smoothed"] = partial(methods.smooth, method=int8)
        if inputs != "static":  # the largest rotated inputs are not among the moments
            chosen[f"int8, inputs per {inputs}, rotated"] = partial(methods.hadamard, method=int8)
    for threshold in (6.0, 3.0):
        name = f"LLM.int8(), threshold {threshold:g}"
        chosen[name] = partial(methods.llm_int8, threshold=threshold)
    yield from minilm_board(8, chosen, bits=8, group="row")
    for bits in (4, 3, 2):
        plain = partial(round_to_nearest, spec=QuantSpec(bits, group_size=128))
        chosen = {
            f"round-to-nearest int{bits} g128": plain,
            f"round-to-nearest int{bits} g128, rotated": partial(methods.hadamard, method=plain),
        }
        yield from minilm_board(8, chosen, bits=bits, group="g128")


def second_order() -> Tasks:
    """Chapter 9: GPTQ and AWQ at 2 to 8 bits on MiniLM, and the controls."""
    for bits, (group, size) in itertools.product(
        (8, 6, 5, 4, 3, 2), {"row": None, "g128": 128}.items()
    ):
        chosen = {
            f"{name} int{bits} {group}": rounding(QuantSpec(bits, group_size=size))
            for name, rounding in quantization.ROUNDINGS.items()
            if "nearest" not in name and (size or "static" not in name)
        }
        yield from minilm_board(9, chosen, bits=bits, group=group)
    for bits, calibration in itertools.product((4, 3, 2), ("shuffled", "noise", "in order")):
        name = "GPTQ, activation order"
        chosen = {
            f"{name} int{bits} g128": quantization.ROUNDINGS[name](QuantSpec(bits, group_size=128))
        }
        yield from minilm_board(9, chosen, bits=bits, group="g128", calibration=calibration)


def smollm2_rounding() -> Tasks:
    """Chapter 9: the rotated SmolLM2 at 4 and 3 bits by every method, and the controls."""
    run = quantization.language_model
    order = "GPTQ, activation order"
    yield from grid(run, method=["none"], bits=[32], base=["rotated", "shipped"])
    yield from grid(run, bits=[4, 3], method=quantization.ROUNDINGS)
    yield from grid(run, bits=[4], method=["NF4"])
    yield from grid(run, bits=[4, 3], method=[order], calibration=["in order"])
    yield from grid(run, bits=[4], method=[order], calibration=["shuffled", "noise"])
    yield from grid(run, bits=[4], method=["round to nearest", order], base=["shipped"])


def trained_through_codes() -> Tasks:
    """Chapter 10: the byte model from random weights, in float32, ternary and as signs.

    Rates are tried with the first seed; the best by the calibration split gets the others.
    """
    run = low_precision.from_scratch
    yield from grid(run, seed=[0], rate=[3e-3, 1e-3], weights=low_precision.WEIGHTS)
    for seed, (weights, rate) in itertools.product((1, 2), low_precision.SCRATCH_RATES.items()):
        yield from grid(run, seed=[seed], rate=[rate], weights=[weights])


def trained_against_rounded() -> Tasks:
    """Chapter 10: the finished byte model rounded, and trained further through the same grids.

    Rates as in `trained_through_codes`.
    """
    run = low_precision.fine_tuned
    yield from grid(low_precision.rounded, method=["none"], bits=[32])
    yield from grid(low_precision.rounded, bits=[4, 3, 2], method=quantization.ROUNDINGS)
    yield from grid(low_precision.untrained, weights=["ternary", "sign"])
    ways = {"way": ["straight-through", "learned steps"], "bits": [4, 3, 2]}
    yield from grid(run, seed=[0], rate=[3e-4, 1e-3], **ways)
    yield from grid(run, seed=[0], rate=[3e-3], way=ways["way"], bits=[2])
    yield from grid(run, seed=[0], rate=[3e-4, 1e-3], way=["float32"], bits=[32])
    for seed, ((way, bits), rate) in itertools.product((1, 2), low_precision.TUNED_RATES.items()):
        yield from grid(run, seed=[seed], rate=[rate], way=[way], bits=[bits])


def gguf_types() -> Tasks:
    """Chapter 11: GGUF's types on MiniLM; where 256 does not divide a row, what llama.cpp takes."""
    found = layers(models.minilm())
    for name in ("BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "TQ2_0"):
        kind = gguf.TYPES[name]
        types = {
            layer: gguf.FALLBACK[name] if module.in_features % kind.size else name
            for layer, module in found.items()
        }
        fields = {"type": name, "mixed": len(set(types.values())) > 1}
        for weighted in (True, False) if name.endswith("_K") else (False,):
            rounding = partial(methods.block_format, weighted=weighted)
            plan = {layer: partial(rounding, type=type) for layer, type in types.items()}
            title = f"{name}, weighted" if weighted else name
            yield from minilm_board(11, {title: plan}, **fields, weighted=weighted)


def smollm2_files() -> Tasks:
    """Chapter 11: SmolLM2 in files of other blocks; the same types on the rotated base."""
    rewritten, rounded = block_formats.rewritten, block_formats.rounded
    yield from grid(rewritten, mix=["as shipped", *block_formats.MIXES])
    yield from grid(rounded, mix=block_formats.MIXES, weighted=[False])
    yield from grid(rounded, mix=["Q4_K_M"], weighted=[True])
    yield from grid(rounded, mix=["Q4_K_M"], weighted=[True], calibration=["shuffled"])


def pruning_criteria() -> Tasks:
    """Chapter 12: accuracy against sparsity by every criterion, with and without tuning."""
    networks = {"network": criteria.NETWORKS, "seed": range(5)}
    chosen = [("random", "layer"), ("magnitude", "global"), ("Wanda", "row")]
    chosen += [("magnitude", "layer"), ("magnitude", "row")]
    shares = (0.25, 0.5, 0.75, 0.9, 0.95)
    for score, among in chosen:
        arm = {"score": [score], "among": [among]}
        yield from grid(criteria.one_shot, **networks, **arm, sparsity=shares)
    for among, share in (("2:4", 0.5), ("1:4", 0.75)):
        arm = {"score": criteria.SCORES, "among": [among], "sparsity": [share]}
        yield from grid(criteria.one_shot, **networks, **arm)
    yield from grid(criteria.shrunk, **networks, score=criteria.UNITS, sparsity=shares)
    none = {"score": ["none"], "among": ["layer"], "sparsity": [0.0]}
    yield from grid(criteria.tuned, **networks, **none)
    for share in (0.9, 0.75):
        for score, among in [*chosen[:-1], ("gradual", "global")]:
            arm = {"score": [score], "among": [among], "sparsity": [share]}
            yield from grid(criteria.tuned, **networks, **arm)
        units = {"score": criteria.UNITS, "sparsity": [share], "epochs": [criteria.TUNING]}
        yield from grid(criteria.shrunk, **networks, **units)


def pruning_penalties() -> Tasks:
    """Chapter 12: L1 and L0 at two strengths, each against magnitude at as many weights."""
    strengths = {
        ("mnist1d_mlp", "L1"): (0.4, 0.5),
        ("mnist1d_mlp", "L0"): (20, 30),
        ("digits_cnn", "L1"): (0.75, 1.0),
        ("digits_cnn", "L0"): (20, 30),
    }
    for (network, way), chosen in strengths.items():
        arm = {"network": [network], "way": [way], "strength": chosen}
        yield from grid(criteria.penalized, seed=range(5), **arm)


def one_shot_encoder() -> Tasks:
    """Chapter 14: every criterion and pattern on MiniLM, rounded as well, and the controls."""
    run = partial(board, one_shot.sentence_encoder, chapter=14, model="minilm")
    patterns = {"pattern": one_shot.PATTERNS}
    yield from run(criterion=one_shot.CRITERIA, **patterns)
    yield from run(criterion=["SparseGPT, layer"], pattern=["50 %", "60 %", "70 %"])
    for calibration in ("shuffled", "noise", "in order"):
        yield from run(criterion=["Wanda", "SparseGPT"], **patterns, calibration=[calibration])
    grids = {"pattern": ["50 %", "2:4"], "bits": [4, 3]}
    yield from run(criterion=["SparseGPT"], **grids)
    yield from run(criterion=["magnitude", "Wanda", "SparseGPT"], **grids, joint=[False])


def one_shot_language_model() -> Tasks:
    """Chapter 14: every criterion and pattern on SmolLM2, and the controls."""
    run = one_shot.language_model
    yield from grid(run, criterion=["none"], pattern=["0 %"])
    for criterion in ("SparseGPT", "Wanda", "magnitude"):
        yield from grid(run, criterion=[criterion], pattern=one_shot.PATTERNS)
    controls = {"criterion": ["SparseGPT", "Wanda"], "pattern": ["50 %"]}
    yield from grid(run, **controls, calibration=["shuffled"])
    yield from grid(run, criterion=["random"], pattern=["50 %"])
    yield from grid(run, criterion=["SparseGPT, layer"], pattern=["50 %"])
    yield from grid(run, criterion=["SparseGPT"], pattern=["50 %", "2:4"], bits=[4])
    yield from grid(run, criterion=["SparseGPT"], pattern=["50 %"], calibration=["in order"])


def fine_tuned_after_pruning() -> Tasks:
    """Chapter 14: MiniLM pruned by each criterion, and its kept weights trained further."""
    criteria = {"criterion": ["magnitude", "Wanda", "SparseGPT"]}
    yield from grid(one_shot.fine_tuned, pattern=["70 %", "2:4"], **criteria, seed=[0], steps=[40])


def truncated() -> Tasks:
    """Chapter 15: low rank, low rank of few bits, and grids, at equal bytes; and the control."""
    for way, bits in itertools.product(low_rank.WAYS, (8, 6, 4, 3, 2)):
        if ("GPTQ" in way or "int4" in way or "then" in way) and bits in (8, 6):
            continue  # a rank above the largest, or a grid that leaves nothing to see
        fields = {"way": way, "budget": bits}
        yield from minilm_board(15, {f"{way}, {bits} bits": low_rank.plan(way, bits)}, **fields)
    for calibration in ("shuffled", "noise"):
        fields = {"way": "whitened SVD", "budget": 8, "calibration": calibration}
        plan = low_rank.plan("whitened SVD", 8)
        yield from minilm_board(15, {"whitened SVD, 8 bits": plan}, **fields)


def adapted(domain: str) -> Tasks:
    """Chapter 16: the byte model adapted to another text, in full and by adapters.

    Rates are tried with the first seed; the best by the calibration split gets the others.
    """
    yield from grid(adaptation.before, domain=[domain], base=["float32", "NF4"])
    for seeds, count in (([0], None), ([1, 2], 1)):
        for (way, rank, where), rates in adaptation.ARMS[domain].items():
            arm = {"way": [way], "rank": [rank], "layers": [where], "domain": [domain]}
            yield from grid(adaptation.adapted, seed=seeds, rate=rates[:count], **arm)


def subspaces() -> Tasks:
    """Chapter 16: how many random directions of all weights an adaptation needs."""
    for seeds, count in (([0], None), ([1, 2], 1)):
        for dimension, rates in adaptation.DIMENSIONS.items():
            arm = {"dimension": [dimension], "seed": seeds, "rate": rates[:count]}
            yield from grid(adaptation.within_subspace, **arm)


def board(function: Callable[..., dict], *, chapter: int, model: str, **choices) -> Tasks:
    """The tasks of `grid`, as records of the scoreboard."""
    for settings, task in grid(function, **choices):
        parts = [settings["criterion"], settings["pattern"]]
        if settings.get("bits"):
            parts += [f"int{settings['bits']}", "" if settings.get("joint", True) else "afterwards"]
        where = {"method": " ".join(filter(None, parts)), "chapter": chapter, "model": model}
        yield {**where, "stored": True, "calibration": "text", **settings}, task


def grid(function: Callable[..., dict], **choices: Iterable) -> Tasks:
    """One task for each combination of the choices, the last varying fastest."""
    for values in itertools.product(*choices.values()):
        settings = dict(zip(choices, values, strict=True))
        yield settings, partial(function, **settings)


def named(name: str, function: Callable[..., float]) -> Callable[..., dict]:
    """The same function, its number with a name."""

    @wraps(function)
    def record(**settings) -> dict:
        return {name: function(**settings)}

    return record


student_accuracy = named("accuracy", distillation.student_accuracy)


def soft_labels() -> Tasks:
    """Chapter 3: four ways to train a student, at four sizes of the training set."""
    counts = (50, 200, 1000, 4000)
    return grid(student_accuracy, count=counts, seed=range(10), way=distillation.WAYS)


def temperature_grid() -> Tasks:
    """Chapter 3: temperature against the weight of the soft term, at 1,000 examples."""
    soft = {"way": ["soft"], "count": [1000], "seed": range(5)}
    temperatures, alphas = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), (0.25, 0.5, 0.75, 0.9, 1.0)
    return grid(student_accuracy, **soft, temperature=temperatures, alpha=alphas)


def disguised_teachers() -> Tasks:
    """Chapter 3: students of answers from which part of what they say was removed."""
    accuracy = named("accuracy", distillation.disguised_accuracy)
    return grid(accuracy, count=[200, 1000], seed=range(10), disguise=distillation.DISGUISES)


def inherited_bound() -> Tasks:
    """Chapter 4: every term of the bounds, for four students at four sample sizes."""
    counts = (1_000, 4_000, 16_000, 64_000)
    students = inheritance.STUDENTS
    return grid(inheritance.bound_terms, count=counts, seed=range(5), student=students)


def small_students() -> Tasks:
    """Chapter 4: students of 2, 8 and 64 hidden units, from labels or from the teacher."""
    choices = {"width": (2, 8, 64), "way": ("labels", "teacher")}
    return grid(inheritance.small_student, seed=range(5), **choices)


def poor_teachers() -> Tasks:
    """Chapter 4: students of overfit teachers, of tiny ones, and of ensembles."""
    return grid(inheritance.pupil, seed=range(5), arm=inheritance.ARMS)


def pydoc_students() -> Tasks:
    """Chapter 5: students of the byte model, of a quarter and of half its size."""
    quarter, half = language_student.quarter_student, language_student.half_student
    seeds, losses = {"seed": range(3)}, {"losses": ["three losses"]}
    yield from grid(quarter, **seeds, way=language_student.WAYS, steps=[600])
    yield from grid(half, seed=[0], **losses, steps=[0])
    yield from grid(half, **seeds, losses=language_student.TRIPLE, steps=[120])
    yield from grid(half, **seeds, **losses, steps=[120], fresh=[True])
    yield from grid(half, **seeds, **losses, steps=[120], temperature=[1.0])
    yield from grid(quarter, seed=[3, 4], way=language_student.WAYS, steps=[600])


def lottery_tickets(build: str, seeds: int) -> Tasks:
    """Chapter 13: tickets, their controls at equal counts, and whether batches' order matters."""
    for seed in range(seeds):
        yield from grid(lottery.by_level, build=[build], seed=[seed], arm=lottery.ARMS)
        yield from grid(lottery.instability, build=[build], seed=[seed], arm=["ticket", "rewound"])


def lottery_rates() -> Tasks:
    """Chapter 13: tickets and new first weights at a third and three times the learning rate."""
    arms = {"arm": ["ticket", "reinitialized"], "levels": [[0, 8, 11, 14]]}
    yield from grid(
        lottery.by_level, build=["mnist1d_mlp"], rate=[3e-3, 3e-2], seed=range(5), **arms
    )


def deep_compression_stages() -> Tasks:
    """Chapter 18: every stage of Deep Compression on three classifiers."""
    choices = {"sparsity": (0.8, 0.9), "bits": (5, 3)}
    yield from grid(deep_compression.stages, network=criteria.NETWORKS, seed=range(5), **choices)


def lossless_coders() -> Tasks:
    """Chapter 18: coders of BF16 and general-purpose compressors on two models."""
    yield from grid(lossless.entropies, model=lossless.MODELS)
    coders = (*lossless.CODERS, *lossless.GENERAL)
    yield from grid(lossless.sizes, model=lossless.MODELS, coder=coders)


def layer_gaps() -> Tasks:
    """Chapter 19: bits above the limit for each matrix of MiniLM, by method and rate."""
    fixed = [("NF4", 4), ("Q4_0", 4)]
    graded = ("round to nearest", "GPTQ", "GPTQ, then rANS")
    coded = ("entropy-coded rounding", "entropy-coded GPTQ", "water-filling")
    coded += ("water-filling, shrunk",)
    for way, bits in fixed + [(w, b) for b in (4, 3, 2) for w in graded + coded]:
        yield from grid(frontier.gaps, way=[way], bits=[bits])
    for way in ("water-filling", "water-filling, shrunk"):
        yield from grid(frontier.gaps, way=[way], bits=[3], control=["shuffled"])


def gaps_by_tokens() -> Tasks:
    """Chapter 19: the same under calibration by more and more text, with more or less damping."""
    tokens, way = (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 80_000), ["water-filling, shrunk"]
    yield from grid(frontier.gaps, way=way, bits=[3], tokens=tokens)
    damps = (1e-4, 1e-2, 3e-2, 1e-1)
    yield from grid(frontier.gaps, way=way, bits=[3], tokens=(500, 2000, 8000, 80_000), damp=damps)


def coded_encoder() -> Tasks:
    """Chapter 19: the codes with and without a coder on MiniLM, and bits allocated to layers."""
    coded = ("entropy-coded rounding", "entropy-coded GPTQ", "water-filling")
    coded += ("water-filling, shrunk",)
    more = tuple(f"water-filling, shrunk, allocated{end}" for end in ("", ", relative"))
    for bits in (4, 3, 2):
        for way in ("GPTQ", "GPTQ, then rANS", *coded, *more):
            chosen = {way: frontier.plan(way, bits)}
            yield from minilm_board(19, chosen, way=way, bits=bits)
    for way, bits in (("water-filling, shrunk", 1.5), ("water-filling, shrunk", 1)):
        yield from minilm_board(19, {way: frontier.plan(way, bits)}, way=way, bits=bits)
    for calibration in ("shuffled", "noise"):
        way = "water-filling, shrunk"
        yield from minilm_board(19, {way: frontier.plan(way, 3)}, calibration, way=way, bits=3)


def coded_language_model() -> Tasks:
    """Chapter 19: perplexity of SmolLM2 in its rotated basis at whole numbers of real bits."""
    for bits in (3, 2, 4):
        yield from grid(frontier.language_model, way=["water-filling, shrunk"], bits=[bits])
    yield from grid(frontier.language_model, way=["entropy-coded GPTQ"], bits=[3])


RUNS: dict[str, Callable[[], Tasks]] = {
    "scoreboard/01_first_compression": first_compression,
    "scoreboard/06_uniform_quantizer": uniform_quantizer,
    "scoreboard/07_codebooks": codebooks,
    "scoreboard/08_int8": activations,
    "scoreboard/09_second_order": second_order,
    "09_smollm2": smollm2_rounding,
    "10_from_scratch": trained_through_codes,
    "10_qat": trained_against_rounded,
    "scoreboard/11_gguf": gguf_types,
    "11_smollm2": smollm2_files,
    "12_criteria": pruning_criteria,
    "12_penalties": pruning_penalties,
    "scoreboard/14_one_shot": one_shot_encoder,
    "13_lottery": partial(lottery_tickets, "mnist1d_mlp", 6),
    "13_lottery_digits": partial(lottery_tickets, "digits_mlp", 5),
    "13_lottery_rates": lottery_rates,
    "14_smollm2": one_shot_language_model,
    "14_fine_tuned": fine_tuned_after_pruning,
    "12_latency": latency.tasks,
    "03_soft_labels": soft_labels,
    "03_temperature_grid": temperature_grid,
    "03_disguised_teachers": disguised_teachers,
    "04_bound": inherited_bound,
    "04_small_students": small_students,
    "04_poor_teachers": poor_teachers,
    "05_minilm_student": sentence_student.tasks,
    "05_pydoc_students": pydoc_students,
    "scoreboard/15_truncated": truncated,
    "16_code": partial(adapted, "code"),
    "16_permuted": partial(adapted, "permuted"),
    "16_subspaces": subspaces,
    "18_lossless": lossless_coders,
    "18_deep_compression": deep_compression_stages,
    "19_gaps": layer_gaps,
    "19_tokens": gaps_by_tokens,
    "scoreboard/19_frontier": coded_encoder,
    "19_smollm2": coded_language_model,
}


def settings_of(settings: dict, task: Callable[[], dict]) -> dict:
    """All that a task was called with, its function's defaults too, as JSON has them."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(task, "func", task)).parameters.items()
        if name not in settings and isinstance(parameter.default, int | float | str | bool)
    }
    return json.loads(json.dumps({**settings, **defaults}))


def finished(name: str, tasks: Tasks, folder: Path) -> tuple[list[dict], float]:
    """All records of a run, and the seconds they took, those of a killed run taken up again."""
    path = folder / f"{name}.json"
    done = json.loads(path.read_text()) if path.is_file() else []
    records, used = [], []
    for given, task in tasks:
        given = json.loads(json.dumps(given))
        settings = {"function": name_of(task), **settings_of(given, task)}
        known = next((entry for entry in done if entry["settings"] == settings), None)
        if known is None:
            start = time.perf_counter()
            record = task()
            seconds = time.perf_counter() - start
            known = {"settings": settings, "record": record, "seconds": seconds}
            done.append(known)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(done))
        used.append(known)
        records.append({**settings_of(given, task), **known["record"]})
        print(f"{name}: {records[-1]}", file=sys.stderr)
    return records, sum(entry["seconds"] for entry in used)


def name_of(task: Callable[[], dict]) -> str:
    """What the function is called that a task binds settings to: it tells experiments apart."""
    return getattr(task, "func", task).__name__


def provenance(name: str, seconds: float) -> dict:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE.parent, check=False
    )
    return {
        "command": "make results",
        "run": name,
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }


def write(path: Path, records: list[dict], made: dict) -> None:
    """Write records and their provenance, all or nothing, with a checksum of the records."""
    body = json.dumps(records, sort_keys=True).encode()
    whole = {"made": made, "sha256": hashlib.sha256(body).hexdigest(), "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(whole, indent=1) + "\n")


def main() -> None:
    """Do the runs named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", choices=[[], *RUNS], default=[])
    torch.set_num_threads(1)  # the order of additions, and so the last digits, depend on it
    for name in parser.parse_args().runs or RUNS:
        records, seconds = finished(name, RUNS[name](), PARTIAL)
        write(HERE / f"{name}.json", records, provenance(name, seconds))
        (PARTIAL / f"{name}.json").unlink()
        print(f"{name}: {len(records)} records, {seconds:.0f} s of work")


if __name__ == "__main__":
    main()
