"""Experiments of chapter 16: the book's byte model adapted to a text it was not trained on.

Python's manual is what it knows. The new texts are program code (the sources of NumPy, as
installed), and the manual under a permutation of the bytes, which asks for a change of no low rank.
Quality is in bits per byte; rates are chosen by the calibration split of the first seed alone.

(Over 200 lines: one experiment, what it holds in memory, and how many directions it needs.)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from compresskit import data, methods, models
from compresskit.code import Code, packed
from compresskit.model import compress, decoded, layers
from compresskit.models.decoder import DecoderConfig
from compresskit.models.packages import folder
from compresskit.recipes import language
from compresskit.recipes.language_student import next_byte, windows
from compresskit.stats import InputStats
from compresskit.train import AdamW8bit, Shuffled, Subspace, fit, lora

#: Parts of NumPy whose sources are the new text.
PARTS = ("lib", "linalg", "polynomial", "ma", "fft", "random")
#: Bytes of each held-out text that are scored.
HELD_OUT = 40_000
ALPHA = 16.0
WAYS = ("full", "full, 8-bit Adam", "matrices", "LoRA", "QLoRA", "rsLoRA", "DoRA")
#: (way, rank, layers with adapters) -> rates that are tried with the first seed, the best first.
ARMS = {
    "code": {
        ("full", 0, "all"): (3e-3, 1e-3, 1e-2),
        ("matrices", 0, "all"): (3e-3, 1e-3, 1e-2),
        ("full, 8-bit Adam", 0, "all"): (3e-3,),
        **{("LoRA", r, "all"): (1e-2, 3e-3, 3e-2) for r in (1, 2, 4, 8, 16, 64)},
        ("LoRA", 40, "q, v"): (3e-2, 1e-2, 3e-3),
        ("QLoRA", 8, "all"): (1e-2,),
        ("QLoRA", 64, "all"): (1e-2,),
        ("rsLoRA", 64, "all"): (3e-3, 1e-2, 1e-3),
        ("DoRA", 8, "all"): (1e-2,),
    },
    "permuted": {
        ("full", 0, "all"): (3e-3, 1e-3, 1e-2),
        ("matrices", 0, "all"): (3e-3, 1e-3, 1e-2),
        **{("LoRA", r, "all"): (3e-3, 1e-2, 3e-2) for r in (1, 8, 64)},
    },
}
#: Directions -> rates that are tried with the first seed, the best first.
DIMENSIONS = {
    100: (1.0, 0.1, 1e-2),
    1_000: (0.1, 0.3, 1.0),
    10_000: (0.1, 0.3, 3e-2),
    100_000: (3e-2, 1e-2, 3e-3),
}


@cache
def code_text() -> data.Splits:
    """Paragraphs of the sources of the installed NumPy, tests left out, split by their hashes."""
    root = folder("numpy", "numpy")
    files = [path for part in PARTS for path in (root / part).glob("*.py")]
    return data.assign(data.paragraphs({p.name: p.read_text(encoding="utf-8") for p in files}))


def permutation(seed: int = 0) -> Tensor:
    """A permutation of the 256 bytes, (256,)."""
    return torch.randperm(256, generator=torch.Generator().manual_seed(seed))


@cache
def texts(domain: str) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Training windows and their labels, and the calibration and test bytes.

    Parameters
    ----------
    domain : str
        "code", "permuted" or "manual", the text the model knows

    Raises
    ------
    ValueError : another name
    """
    if domain not in ("code", "permuted", "manual"):
        raise ValueError(f'domain={domain!r}; it must be "code", "permuted" or "manual"')
    splits = code_text() if domain == "code" else data.pydoc()
    ids = [data.text(part) for part in splits]
    if domain == "permuted":
        ids = [permutation()[part] for part in ids]
    train, calibration, test = ids
    context = models.pydoc_lm().config.context
    held_out = calibration[:HELD_OUT], test[:HELD_OUT]
    return windows(train, context, context // 2), *held_out


def four_bit(model: nn.Module) -> nn.Module:
    """The model with its linear layers in NF4, scales quantized too, packed in memory."""

    def method(weight: Tensor, stats: InputStats | None) -> Code:
        return packed(methods.nf4(weight, stats))

    return compress(model, dict.fromkeys(layers(model), method))


def adapted(
    *,
    domain: str,
    way: str,
    seed: int,
    rate: float,
    rank: int = 0,
    layers: str = "all",
    steps: int = 200,
) -> dict:
    """Train the byte model on another text, and score it there and at home.

    Parameters
    ----------
    domain : str
        as for `texts`
    way : str
        "full": every weight is trained; "matrices": those of the linear layers; "LoRA" and its
        kin: adapters of `rank` on them; "QLoRA": on a base in NF4
    seed : int
        of the batches, of dropout and of the adapters
    rate : float
    rank : int
        0 where there are no adapters
    layers : str
        "all" linear layers carry adapters, or "q, v"
    steps : int
        updates of 8 windows of 256 bytes

    Returns
    -------
    dict: "calibration" and "test" of the new text and "home", the test split of the old one, in
    bits per byte; "trained", the number of trained parameters
    """
    if way not in WAYS or (rank > 0) != way.endswith("oRA"):
        raise ValueError(f"way={way!r}, rank={rank}; the ways are {WAYS}, with a rank for LoRA")
    model = prepared(way, rank, layers, seed)
    (inputs, labels), calibration, test = texts(domain)
    run = fit(
        model,
        next_byte,
        Shuffled(inputs, labels, size=8, steps=steps, seed=seed),
        rate=rate,
        warmup=steps // 20,
        seed=seed,
        optimizer=AdamW8bit if "8-bit" in way else torch.optim.AdamW,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if way.endswith("oRA"):
        model = lora.merged(model)
    model = model.eval()
    return {
        "calibration": language.score(model, calibration),
        "test": language.score(model, test),
        "home": language.score(model, texts("manual")[2]),
        "trained": trained,
        "loss": sum(run.losses[-20:]) / 20,
    }


def prepared(way: str, rank: int = 0, where: str = "all", seed: int = 0) -> nn.Module:
    """The byte model, ready to be trained in one of the `WAYS`.

    Parameters
    ----------
    way, rank, seed : as for `adapted`
    where : str
        as `layers` there
    """
    model = models.pydoc_lm()
    names = [n for n in layers(model) if where == "all" or n.endswith((".q", ".v"))]
    if not way.endswith("oRA"):
        chosen = {f"{name}.weight" for name in names}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(way.startswith("full") or name in chosen)
        return model
    options = {"rank": rank, "alpha": ALPHA, "seed": seed}
    options |= {"rank_stabilized": way == "rsLoRA", "decompose": way == "DoRA"}
    adapters = lora.start(model, names, **options)
    base = four_bit(model) if way.startswith("Q") else model
    return lora.attach(base, adapters)


def before(*, domain: str, base: str = "float32") -> dict:
    """The byte model as it is, or rounded to NF4, on a text.

    Parameters
    ----------
    domain : str
    base : str
        "float32" or "NF4"
    """
    model = models.pydoc_lm()
    model = decoded(four_bit(model)) if base == "NF4" else model
    _, calibration, test = texts(domain)
    scores = {"calibration": calibration, "test": test, "home": texts("manual")[2]}
    return {name: language.score(model.eval(), ids) for name, ids in scores.items()}


def within_subspace(*, dimension: int, seed: int, rate: float, steps: int = 200) -> dict:
    """Adapt the byte model to code along random directions of all its weights.

    Parameters
    ----------
    dimension : int
    seed : int
        of the directions and the batches
    rate : float
    steps : int
    """
    model = Subspace(models.pydoc_lm(), dimension, seed=seed)
    (inputs, labels), calibration, test = texts("code")
    batches = Shuffled(inputs, labels, size=8, steps=steps, seed=seed)
    fit(model, next_byte, batches, rate=rate, warmup=steps // 20, seed=seed)
    model = model.moved().eval()
    return {
        "calibration": language.score(model, calibration),
        "test": language.score(model, test),
    }


def activations(
    config: DecoderConfig, batch: int, *, rank: int = 0, dropout: bool = True
) -> dict[str, int]:
    """Bytes that a forward pass of a `Decoder` in float32 keeps for the backward pass, by part.

    Parameters
    ----------
    config : DecoderConfig
        as many key/value heads as heads
    batch : int
        windows of the whole context
    rank : int
        of adapters on all linear layers; 0: every weight is trained
    dropout : bool
        masks are kept too, as factors in float32

    Returns
    -------
    dict of bytes. Training all weights needs a norm's x / rms(x) for its own gain, and masks and
    norms at both ends; adapters do not, but A x of every layer
    """
    tokens, width, depth = batch * config.context, config.width, config.layers
    full = rank == 0
    floats = {
        "inputs of the norms": width * (2 * depth + full),
        "normed inputs before the gain": width * (2 * depth + 1) * full,
        "inputs of q, k, v and of gate, up": 2 * width * depth,
        "q, k, v and the mixture": 4 * width * depth,
        "inputs of o": width * depth,
        "gate, its silu, up, and their product": 4 * config.hidden * depth,
        "dropout masks": width * (2 * depth + full) * dropout,
        "input of the output layer": width * full,
        "A x": 7 * rank * depth,
        "norms and log-sums of the attention": 2 * depth + full + config.heads * depth,
        "log-probabilities": config.vocab,
    }
    table = {name: 4 * tokens * count for name, count in floats.items()}
    angles = 4 * 4 * config.context * (config.width // config.heads // 2) * depth
    return table | {"angles": angles, "labels and the mean's count": 8 * tokens + 4}
