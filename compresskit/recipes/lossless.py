"""What lossless coding makes of real weights in BF16, beside compressors that know nothing of them.

The matrices are those of MiniLM and of SmolLM2, rounded to BF16; SmolLM2's as shipped lie on grids
of 4 bits, and in a rotated basis on none.
"""

from __future__ import annotations

import lzma
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
import zstandard
from torch import Tensor

from compresskit import models, theory
from compresskit.formats import bf16
from compresskit.model import layers
from compresskit.recipes import quantization

MODELS = ("minilm", "smollm2 shipped", "smollm2 rotated")

#: Compressors of bytes: name -> (compress, decompress).
GENERAL: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    "zlib": (lambda data: zlib.compress(data, 6), zlib.decompress),
    "zstd": (
        lambda data: zstandard.ZstdCompressor(level=19).compress(data),
        lambda data: zstandard.ZstdDecompressor().decompress(data),
    ),
    "lzma": (lambda data: lzma.compress(data, preset=6), lzma.decompress),
}
CODERS = ("huffman", "rans", "scales")


@cache
def matrices(model: str) -> dict[str, Tensor]:
    """The matrices of all linear layers, in BF16.

    Parameters
    ----------
    model : a name in `MODELS`
    """
    whole = models.minilm() if model == "minilm" else quantization.smollm2(model.split()[1])
    return {name: layer.weight.detach().bfloat16() for name, layer in layers(whole).items()}


def planes(weight: Tensor) -> tuple[bytes, bytes]:
    """The high bytes (sign and first bits of the exponent) of BF16 numbers, and the low ones.

    Parameters
    ----------
    weight : bfloat16 tensor
    """
    low, high = weight.contiguous().reshape(-1).view(torch.uint8).reshape(-1, 2).T.contiguous()
    return high.numpy().tobytes(), low.numpy().tobytes()


def sizes(*, model: str, coder: str) -> dict:
    """Code all matrices one by one: bits per weight, and seconds.

    Parameters
    ----------
    model : a name in `MODELS`
    coder : a coder of `formats.bf16.encode`, or a name in `GENERAL`: two planes of bytes, each
        compressed by itself

    Returns
    -------
    dict: "bits_per_weight", "encode" and "decode" in GB of BF16 per second, and "weights"
    """
    count = nbytes = 0
    spent = {"encode": 0.0, "decode": 0.0}
    for weight in matrices(model).values():
        start = time.perf_counter()
        if coder in CODERS:
            code = bf16.encode(weight, coder=coder)
            middle = time.perf_counter()
            same = torch.equal(code.exact().view(torch.int16), weight.view(torch.int16))
            nbytes += code.nbytes
        else:
            pack, unpack = GENERAL[coder]
            given = planes(weight)
            packed = [pack(part) for part in given]
            middle = time.perf_counter()
            same = [unpack(part) for part in packed] == list(given)
            nbytes += sum(map(len, packed))
        spent["encode"] += middle - start
        spent["decode"] += time.perf_counter() - middle
        if not same:
            raise AssertionError(f"{coder} lost a bit")
        count += weight.numel()
    speeds = {name: round(2e-9 * count / seconds, 4) for name, seconds in spent.items()}
    return {"bits_per_weight": 8 * nbytes / count, "weights": count, **speeds}


def entropies(*, model: str) -> dict:
    """Order-0 entropies of all matrices together, in bits per weight: what no table beats.

    Parameters
    ----------
    model : a name in `MODELS`

    Returns
    -------
    dict: of the "exponent", of the "mantissa" and of "whole" numbers; and of whole numbers with a
    table for each matrix that costs nothing, "each"
    """
    counts = {"exponent": 1 << 8, "mantissa": 1 << 7, "whole": 1 << 16}
    counts = {name: np.zeros(size, np.int64) for name, size in counts.items()}
    each = total = 0
    for symbols in _symbols(model):
        found = np.bincount(symbols, minlength=1 << 16)
        counts["whole"] += found
        counts["exponent"] += np.bincount(symbols >> 7 & 255, minlength=1 << 8)
        counts["mantissa"] += np.bincount(symbols & 127, minlength=1 << 7)
        each += len(symbols) * theory.entropy(found / len(symbols))
        total += len(symbols)
    found = {name: theory.entropy(c / c.sum()) for name, c in counts.items()}
    return found | {"each": each / total}


def _symbols(model: str) -> Iterator[np.ndarray]:
    for weight in matrices(model).values():
        yield weight.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
