"""Experiments of chapter 10: the book's byte model trained through codes of few bits.

From scratch, in float32, with ternary weights (BitNet b1.58) and with signs (BitNet), at equal
steps; and from the finished model, against what rounding after the training makes of it. Quality
is in bits per byte; the rate of an arm is to be chosen by the calibration split alone.

(Over 200 lines: two experiments on one model, and what both count.)
"""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial

from torch import Tensor, nn

from compresskit import data, methods, models, theory
from compresskit.affine import QuantSpec
from compresskit.code import Trits
from compresskit.layers import Compressed
from compresskit.model import Method, collect, compress, decoded, layers, size_table
from compresskit.models.decoder import Decoder
from compresskit.recipes import language
from compresskit.recipes.language_student import next_byte, windows
from compresskit.recipes.quantization import ROUNDINGS
from compresskit.recipes.recipe import Recipe, Windows, initialized
from compresskit.stats import InputStats
from compresskit.train import Shuffled, converted, fit, learned_steps, quantization_aware

#: What the linear layers compute with while they are trained; inputs of 8 bits for both BitNets.
WEIGHTS: dict[str, Method | None] = {
    "float32": None,
    "ternary": partial(methods.ternary, inputs="token"),
    "sign": partial(methods.sign, inputs="token"),
}
#: The best rates of the first seed, by the calibration split, for which `make results` tries more.
SCRATCH_RATES = {"float32": 3e-3, "ternary": 3e-3, "sign": 3e-3}
TUNED_RATES = {
    ("straight-through", 4): 3e-4,
    ("straight-through", 3): 3e-4,
    ("straight-through", 2): 1e-3,
    ("learned steps", 4): 3e-4,
    ("learned steps", 3): 3e-4,
    ("learned steps", 2): 1e-3,
    ("float32", 32): 3e-4,
}
GROUP = 64
WAYS = ("straight-through", "learned steps", "float32")


@cache
def finished() -> tuple[Decoder, tuple[Tensor, Tensor], dict[str, InputStats]]:
    """The byte model, the training text in windows, and its moments on the calibration text."""
    model, text = models.pydoc_lm(), data.pydoc()
    context = model.config.context
    seen, _ = windows(data.text(text.calibration), context, context)
    return (
        model,
        windows(data.text(text.train), context, context // 2),
        collect(model, seen.split(16)),
    )


def from_scratch(*, weights: str, seed: int, rate: float, steps: int = 400) -> dict:
    """Train the byte model from random weights and score it.

    Parameters
    ----------
    weights : str
        what its linear layers compute with, a name in `WEIGHTS`; the embedding, which is the
        output layer too, stays float32
    seed : int
        of the first weights and the windows
    rate : float
        largest learning rate
    steps : int
        updates of 8 windows of 256 bytes

    Returns
    -------
    dict with the fields of `scores`, and for ternary weights those of `trits`
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}; known are {', '.join(map(repr, WEIGHTS))}")
    shape = replace(models.pydoc_lm().config, dropout=0.0)
    recipe = Recipe(shape, seed=seed, steps=steps, rate=rate, warmup=steps // 20)
    model, method = initialized(recipe), WEIGHTS[weights]
    if method:
        model = quantization_aware(model, dict.fromkeys(layers(model), method))
    fit(
        model,
        language.next_byte_loss,
        Windows(data.pydoc().train, recipe),
        rate=rate,
        warmup=recipe.warmup,
        betas=(0.9, 0.99),
        seed=seed,
        parameters=language.decayed(model, recipe.decay),
    )
    if method:
        model = converted(model)
    return scores(model) | trits(model)


def fine_tuned(*, way: str, bits: int, seed: int, rate: float, steps: int = 120) -> dict:
    """Train the finished byte model further, through a grid of few bits, and score it.

    Parameters
    ----------
    way : str
        "straight-through": the min-max grid of the present weights at every step; "learned
        steps": the grid's steps are trained too (LSQ); "float32": without a grid, the control
    bits : int
        per level; groups of 64, asymmetric. 32 for the control
    seed : int
        of the order of the windows and of dropout
    rate : float
        largest learning rate
    steps : int
        updates of 8 windows of 256 bytes
    """
    if way not in WAYS or (way == "float32") != (bits == 32):
        known = ", ".join(map(repr, WAYS))
        raise ValueError(f"way={way!r}, bits={bits}; the ways are {known}, the last for bits=32")
    model, (inputs, labels), _ = finished()
    names = layers(model)
    if way == "straight-through":
        rounding = partial(methods.round_to_nearest, spec=QuantSpec(bits, group_size=GROUP))
        model = quantization_aware(model, dict.fromkeys(names, rounding))
    elif way == "learned steps":
        model = learned_steps(model, dict.fromkeys(names, QuantSpec(bits, group_size=GROUP)))
    else:
        model = quantization_aware(model, {})
    batches = Shuffled(inputs, labels, size=8, steps=steps, seed=seed)
    fit(model, next_byte, batches, rate=rate, warmup=steps // 10, seed=seed)
    return scores(model if way == "float32" else converted(model))


def rounded(*, method: str, bits: int) -> dict:
    """Round the finished byte model after its training, and score it.

    Parameters
    ----------
    method : str
        a name of `quantization.ROUNDINGS`, or "none"
    bits : int
        per level; groups of 64, asymmetric
    """
    model, _, stats = finished()
    if method != "none":
        chosen = ROUNDINGS[method](QuantSpec(bits, group_size=GROUP))
        model = compress(model, dict.fromkeys(layers(model), chosen), stats)
    return scores(model)


def untrained(*, weights: str) -> dict:
    """The finished byte model with ternary weights or signs that it was never trained with.

    Parameters
    ----------
    weights : str
        "ternary" or "sign"
    """
    model, _, stats = finished()
    return scores(compress(model, dict.fromkeys(layers(model), WEIGHTS[weights]), stats))


def scores(model: nn.Module) -> dict:
    """Bits per byte on the calibration and the test split, and the size.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict: "calibration", "test", "bits_per_weight" of the codes (32 where there are none) and
    "bytes" of the whole model
    """
    splits, table = data.pydoc(), size_table(model)
    dense = decoded(model).eval()
    return {
        "calibration": language.score(dense, data.text(splits.calibration)),
        "test": language.score(dense, data.text(splits.test)),
        "bits_per_weight": table.bits_per_weight if table.compressed_nbytes else 32.0,
        "bytes": table.nbytes,
    }


def trits(model: nn.Module) -> Mapping[str, float]:
    """What the ternary levels of a model take: as stored, at their entropy, and truly coded.

    Parameters
    ----------
    model : nn.Module
        the layers counted are those whose levels are `Trits`

    Returns
    -------
    dict, empty without such layers; in bits per weight over all of them: "stored"; "entropy", of
    each layer's own frequencies; "huffman", the bytes of five trits through the Huffman coder of
    zlib with its tables; and "zeros", the share of them
    """
    found = [
        leaf
        for module in model.modules()
        if isinstance(module, Compressed)
        for leaf in module.code.leaves().values()
        if isinstance(leaf, Trits)
    ]
    if not found:
        return {}
    count = sum(leaf.tensor.numel() for leaf in found)
    counts = [leaf.tensor.flatten().bincount(minlength=3) for leaf in found]
    entropy = sum(
        theory.entropy(n / n.sum()) * leaf.tensor.numel()
        for n, leaf in zip(counts, found, strict=True)
    )
    return {
        "stored": 8 * sum(leaf.nbytes for leaf in found) / count,
        "entropy": float(entropy) / count,
        "huffman": 8 * sum(len(huffman(leaf.to_bytes())) for leaf in found) / count,
        "zeros": sum(n[1].item() for n in counts) / count,
    }


def huffman(octets: bytes) -> bytes:
    """Bytes coded one by one by zlib's Huffman coder, tables included, no repeats looked for.

    Parameters
    ----------
    octets : bytes
    """
    coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(octets) + coder.flush()
