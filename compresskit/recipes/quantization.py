"""What the methods of part III make of the two real models: sizes, errors, quality.

`sentence_encoder` and `language_model` are one experiment each, a function of its settings alone.
What they share (a model, its calibration, its reference answers) is computed once per process.

(Over 200 lines: two models, and the controls that both share.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit import data, measure, methods, models, surgery
from compresskit.affine import QuantSpec, mse
from compresskit.model import (
    Method,
    collect,
    compress,
    compress_in_order,
    decoded,
    layers,
    size_table,
)
from compresskit.recipes.sentence_student import paragraphs
from compresskit.stats import InputStats

WINDOW = 512

Rounding = Callable[[QuantSpec], Method]

#: How to round to a grid, by the name that the tables of the book give it.
ROUNDINGS: dict[str, Rounding] = {
    "round to nearest": lambda spec: partial(methods.round_to_nearest, spec=spec),
    "round to nearest, MSE": lambda spec: partial(methods.round_to_nearest, spec=spec, fit=mse),
    "AWQ": lambda spec: partial(methods.awq, spec=spec),
    "AWQ, clipped": lambda spec: partial(methods.awq, spec=spec, clip=True),
    "GPTQ": lambda spec: partial(methods.gptq, spec=spec),
    "GPTQ, activation order": lambda spec: partial(methods.gptq, spec=spec, order="activation"),
    "GPTQ, static groups": lambda spec: partial(
        methods.gptq, spec=spec, order="activation", static_groups=True
    ),
}


def shuffled(stats: InputStats, *, seed: int = 0) -> InputStats:
    """The same moments with the inputs' places dealt anew: right spectrum, wrong columns.

    Parameters
    ----------
    stats : InputStats
    seed : of the permutation
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(stats.second), generator=generator)
    return InputStats(
        stats.count, stats.second[order][:, order], stats.mean_abs[order], stats.max_abs[order]
    )


def noise(count: int, length: int, vocab: int, *, seed: int = 0) -> list[Tensor]:
    """Token ids drawn uniformly, one (1, length) tensor for each of `count` texts.

    Parameters
    ----------
    count : number of texts
    length : tokens in each
    vocab : number of tokens to draw from
    seed : of the draw
    """
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (1, length), generator=generator) for _ in range(count)]


def sizes_and_errors(
    model: nn.Module, small: nn.Module, stats: Mapping[str, InputStats]
) -> dict[str, float]:
    """Bytes and bits per weight of the compressed layers, and the median of their errors.

    Parameters
    ----------
    model : the original
    small : what `compress` made of it
    stats : true moments of the inputs of the original's layers, by name

    Returns
    -------
    dict: "bytes" of the whole model, "bits_per_weight" of its codes, and over its layers the median
    "error_db" of the output and the mean "gap_bits" to the rate-distortion limit at that error;
    both of the weights alone where a code quantizes its inputs as well
    """
    table = size_table(small)
    pairs = [
        (layer.weight, small.get_submodule(name).code, stats[name])
        for name, layer in layers(model).items()
        if name not in layers(small)
    ]
    return {
        "bytes": table.nbytes,
        "bits_per_weight": table.bits_per_weight,
        "error_db": statistics.median(measure.relative_error_db(*pair) for pair in pairs),
        "gap_bits": statistics.fmean(measure.gap(*pair) for pair in pairs),
    }


@cache
def minilm_and_moments() -> tuple[nn.Module, list[str], Tensor, dict[str, dict[str, InputStats]]]:
    """MiniLM, the held-out paragraphs, their embeddings, and moments by kind of calibration."""
    encoder, text = models.minilm(), data.pydoc()
    held_out = paragraphs(text.test)
    seen = encoder.batches(paragraphs(text.calibration))
    tokens = sum(ids.numel() for ids in seen)
    true = collect(encoder, seen)
    return (
        encoder,
        held_out,
        encoder.encode(held_out),
        {
            "text": true,
            "shuffled": {name: shuffled(stats) for name, stats in true.items()},
            "noise": collect(encoder, noise(tokens // 128, 128, encoder.config.vocab)),
        },
    )


def sentence_encoder(plan: Mapping[str, Method], *, calibration: str = "text") -> dict:
    """Compress MiniLM by a plan: its size, its layers' errors, and what is left of its embeddings.

    Parameters
    ----------
    plan : layer name -> method
    calibration : "text", its moments "shuffled", those of "noise", or "in order"

    Returns
    -------
    dict with the fields of `sizes_and_errors` (in the moments of the calibration text, whatever
    the methods were given), "cosine" and "top1" of held-out paragraphs, the paragraphs' own
    "cosines", and "seconds" of compression: with its two passes over the text for "in order",
    without the one that collects the moments for all others
    """
    encoder, held_out, reference, moments = minilm_and_moments()
    start = time.perf_counter()
    if calibration == "in order":
        seen = encoder.batches(paragraphs(data.pydoc().calibration))
        small = compress_in_order(encoder, plan, seen, stack="encoder.layer")
    else:
        small = compress(encoder, plan, moments[calibration])
    seconds = time.perf_counter() - start
    embeddings = decoded(small).encode(held_out)
    kept = measure.fidelity(reference, embeddings)
    cosines = F.cosine_similarity(reference, embeddings).tolist()
    return {
        **sizes_and_errors(encoder, small, moments["text"]),
        "cosine": kept.cosine,
        "top1": kept.top1,
        "cosines": [round(cosine, 5) for cosine in cosines],
        "seconds": round(seconds, 2),
    }


def windows(tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """A text cut into as many (1, 512) windows of token ids as it fills.

    Parameters
    ----------
    tokenizer : with `encode(text).ids`
    texts : its paragraphs
    """
    ids = torch.tensor(tokenizer.encode("\n\n".join(texts)).ids)
    return list(ids[: len(ids) // WINDOW * WINDOW].view(-1, 1, WINDOW))


@cache
def _language_model(base: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """SmolLM2 as shipped, or in a rotated basis; calibration and test windows."""
    model, tokenizer = models.smollm2()
    if base == "rotated":
        model = surgery.rotate(model, seed=0)
    text = data.pydoc()
    return model, windows(tokenizer, text.calibration), windows(tokenizer, text.test)


def smollm2(base: str) -> nn.Module:
    """The model of `compressed_language_model`, loaded once.

    Parameters
    ----------
    base : as for `language_model`
    """
    return _language_model(base)[0]


@cache
def _language_moments(base: str, calibration: str) -> dict[str, InputStats]:
    model, seen, _ = _language_model(base)
    if calibration == "shuffled":
        moments = _language_moments(base, "text")
        return {name: shuffled(stats) for name, stats in moments.items()}
    if calibration == "noise":
        seen = noise(len(seen), WINDOW, model.config.vocab)
    return collect(model, seen)


def language_model(
    *, method: str, bits: int, base: str = "rotated", calibration: str = "text", group: int = 64
) -> dict:
    """Compress the 210 linear layers of SmolLM2: sizes, errors, perplexity on held-out text.

    Parameters
    ----------
    method : a name of `ROUNDINGS`, "NF4", or "none" for the model as it is
    bits : per level
    base : "rotated" (its weights lie on no grid), or "shipped" (they do)
    calibration : as for `sentence_encoder`
    group : weights that share a scale; for NF4 its block

    Returns
    -------
    dict with the fields of `sizes_and_errors`, "perplexity", the "losses" of the windows in nats
    per token, "predicted" tokens, and "seconds" as in `sentence_encoder`
    """
    plan = None
    if method != "none":
        model, _, _ = _language_model(base)
        plan = dict.fromkeys(layers(model), _rounding(method, bits, group))
    return compressed_language_model(plan, base=base, calibration=calibration)


def compressed_language_model(
    plan: Mapping[str, Method] | None, *, base: str = "rotated", calibration: str = "text"
) -> dict:
    """Compress SmolLM2 by a plan: the fields that `language_model` returns.

    Parameters
    ----------
    plan : layer name -> method; None: the model as it is
    base : as for `language_model`
    calibration : as for `sentence_encoder`
    """
    model, seen, held_out = _language_model(base)
    small, record = model, {}
    if plan is not None:
        true = _language_moments(base, "text")
        given = None if calibration == "in order" else _language_moments(base, calibration)
        start = time.perf_counter()
        if given is None:
            small = compress_in_order(model, plan, seen, stack="blocks")
        else:
            small = compress(model, plan, given)
        seconds = time.perf_counter() - start
        record = {**sizes_and_errors(model, small, true), "seconds": round(seconds, 1)}
        small = decoded(small)
    return record | perplexity(small, held_out)


def perplexity(model: nn.Module, held_out: Sequence[Tensor]) -> dict:
    """Perplexity of a language model on windows of text.

    Parameters
    ----------
    model : ids (1, T) -> logits (1, T, vocab)
    held_out : (1, 512) windows of token ids

    Returns
    -------
    dict: "perplexity", the "losses" of the windows in nats per token, "predicted" tokens
    """
    losses = [
        measure.token_losses(model, ids[0], window=WINDOW, stride=WINDOW).double()
        for ids in held_out
    ]
    return {
        "perplexity": torch.cat(losses).mean().exp().item(),
        "losses": [round(loss.mean().item(), 5) for loss in losses],
        "predicted": sum(map(len, losses)),
    }


def _rounding(method: str, bits: int, group: int) -> Method:
    if method == "NF4":
        return partial(methods.nf4, block=group)
    return ROUNDINGS[method](QuantSpec(bits, group_size=group))
