"""How far real layers stay from the rate-distortion function, by every kind of code in the book.

The models and texts are those of `compresskit.recipes.quantization`; held-out moments are those of
the test text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

from compresskit import allocate, data, measure, methods, models
from compresskit.affine import QuantSpec
from compresskit.code import Code
from compresskit.entropy import coded
from compresskit.model import Method, collect, layers
from compresskit.recipes import quantization
from compresskit.recipes.sentence_student import paragraphs
from compresskit.stats import InputStats

GROUP = 128

#: How a matrix is coded at a number of bits, by the name that the tables of the book give it.
WAYS: dict[str, Callable[[float], Method]] = {
    "round to nearest": lambda bits: partial(
        methods.round_to_nearest, spec=QuantSpec(int(bits), group_size=GROUP)
    ),
    "NF4": lambda bits: methods.nf4,
    "Q4_0": lambda bits: partial(methods.block_format, type="Q4_0"),
    "GPTQ": lambda bits: partial(methods.gptq, spec=QuantSpec(int(bits), group_size=GROUP)),
    "GPTQ, then rANS": lambda bits: partial(_coded_gptq, bits=int(bits)),
    "entropy-coded rounding": lambda bits: partial(_coded_rounding, bits=bits),
    "entropy-coded GPTQ": lambda bits: partial(methods.entropy_gptq, bits=bits),
    "water-filling": lambda bits: partial(methods.water_filling_gptq, bits=bits, shrink=False),
    "water-filling, shrunk": lambda bits: partial(methods.water_filling_gptq, bits=bits),
}


def _coded_gptq(weight, stats: InputStats | None = None, *, bits: int) -> Code:
    """GPTQ in groups of 128, its levels coded by rANS afterwards."""
    return coded(methods.gptq(weight, stats, spec=QuantSpec(bits, group_size=GROUP)))


def _coded_rounding(weight, stats: InputStats | None = None, *, bits: float) -> Code:
    """To nearest, on a grid without ends: what entropy coding gives without feedback."""
    return methods.entropy_gptq(weight, bits=bits)


@cache
def moments(tokens: int) -> dict[str, InputStats]:
    """Moments of MiniLM's layers over about so many tokens of the calibration and training texts.

    Parameters
    ----------
    tokens : int
        the calibration text comes first, then the training text; 0: the held-out test text
    """
    encoder, text = models.minilm(), data.pydoc()
    if not tokens:
        return collect(encoder, encoder.batches(paragraphs(text.test)))
    chosen, count = [], 0
    for paragraph in paragraphs(text.calibration) + paragraphs(text.train):
        if count >= tokens:
            break
        chosen.append(paragraph)
        count += sum(ids.numel() for ids in encoder.batches([paragraph]))
    return collect(encoder, encoder.batches(chosen))


def gaps(
    *, way: str, bits: float, tokens: int = 80_000, damp: float | None = None, control: str = ""
) -> dict:
    """Code MiniLM's 36 matrices: bytes, and bits above the limit at the errors they have.

    Parameters
    ----------
    way : a name of `WAYS`
    bits : per weight or per level, as the method takes it
    tokens : that the method is calibrated on, as for `moments`
    damp : of the calibrated methods; None: their own
    control : "shuffled": their moments with the inputs' places dealt anew

    Returns
    -------
    dict: the tokens "seen", and a list over the layers of "bits_per_weight", of the "gap" under the
    moments the method was given (unshuffled), of the gap "held_out", and of "error_db" held out
    """
    encoder, given, held_out = models.minilm(), moments(tokens), moments(0)
    method = WAYS[way](bits)
    if damp is not None:
        method = partial(method, damp=damp)
    record = {"seen": next(iter(given.values())).count}
    record |= {name: [] for name in ("bits_per_weight", "gap", "held_out", "error_db")}
    for name, layer in layers(encoder).items():
        weight = layer.weight.detach()
        seen = quantization.shuffled(given[name]) if control == "shuffled" else given[name]
        code = method(weight, seen)
        found = {
            "bits_per_weight": measure.bits_per_weight(code),
            "gap": measure.gap(weight, code, given[name]),
            "held_out": measure.gap(weight, code, held_out[name]),
            "error_db": measure.relative_error_db(weight, code, held_out[name]),
        }
        for key, value in found.items():
            record[key].append(round(value, 4))
    return record


def plan(way: str, bits: float) -> dict[str, Method]:
    """A method for each of MiniLM's 36 matrices.

    Parameters
    ----------
    way : a name of `WAYS`; with ", allocated" at its end, bits are divided over the layers for the
        least sum of output errors, with ", allocated, relative" for that of errors relative to
        the layers' outputs
    bits : per weight, over all layers
    """
    encoder, *_, seen = quantization.minilm_and_moments()
    weights = {name: layer.weight.detach() for name, layer in layers(encoder).items()}
    if ", allocated" not in way:
        return dict.fromkeys(weights, WAYS[way](bits))
    given = seen["text"]
    importance = None
    if way.endswith(", relative"):
        importance = {n: 1 / given[n].distortion(w).item() for n, w in weights.items()}
        importance = {n: f * weights[n].shape[0] for n, f in importance.items()}
    rates = allocate.water_filling(weights, given, bits, importance=importance)
    name = way.split(", allocated")[0]
    return {n: WAYS[name](rate) for n, rate in rates.items()}


def language_model(*, way: str, bits: float) -> dict:
    """Code the 210 linear layers of SmolLM2 in its rotated basis: as `quantization.language_model`.

    Parameters
    ----------
    way : a name of `WAYS`
    bits : as for `gaps`
    """
    names = layers(quantization.smollm2("rotated"))
    return quantization.compressed_language_model(dict.fromkeys(names, WAYS[way](bits)))
