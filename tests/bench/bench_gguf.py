"""GGUF block formats beside gguf-py, in one process: MB/s of float32 out or in, and the error.

    OMP_NUM_THREADS=1 python tests/bench/bench_gguf.py

The errors are ||w - w'|| / ||w||: of the weights in tests/data/gguf_blocks.npz, beside that of
their blocks by ggml in C; of Gaussian weights; of MiniLM's six matrices with rows of 1536. gguf-py
cannot quantize to K-quants, so these have no speed beside them. F32 has nothing to time: its
decoder returns a view.
"""

from pathlib import Path

import gguf as reference
import numpy as np
import torch

from compresskit import measure, models
from compresskit.formats.gguf import TYPES, Blocks, quantize
from compresskit.formats.gguf.k_quants import K_QUANTS
from compresskit.formats.gguf.legacy import QUANTIZERS

SHAPE = (1536, 2048)
FIXTURE = Path(__file__).parents[1] / "data" / "gguf_blocks.npz"


def main() -> None:
    """Print one line per format: medians over rounds in which both alternate."""
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    fixture = np.load(FIXTURE)
    matrices = [p.detach() for p in models.minilm().parameters() if p.shape[1:] == (1536,)]
    minilm = torch.cat([m for m in matrices if m.ndim == 2])
    size = 4e-6 * weight.numel()
    print(f"1 thread, {SHAPE[0]} x {SHAPE[1]}, {size:.1f} MB of float32; ours / reference (ratio)")
    columns = f"{'error, ours / C':>20}{'Gaussian':>10}{'MiniLM':>10}"
    print(f"{'':8}{'bits':>8}{columns}{'decode, MB/s':>24}{'quantize, MB/s':>24}")
    for name, kind in TYPES.items():
        if name == "F32":
            continue
        number = reference.GGMLQuantizationType[name]
        writes, searches = name in QUANTIZERS or name in K_QUANTS, name in K_QUANTS
        code = quantize(weight, name) if writes else _random(name)
        stored = code.tensor.numpy().reshape(SHAPE[0], -1)
        decoding = {
            "ours": code.decode,
            "theirs": _call(reference.quants.dequantize, stored, number),
        }
        times = measure.latency(decoding, warmup=2, repeats=15)
        row = f"{name:8}{kind.bits_per_weight:8.4f}{_fixture_error(name, fixture):>20}"
        row += "".join(f"{_error(name, w):>10}" for w in (weight, minilm))
        row += f"{_speeds(times, size):>24}"
        if writes:
            writing = {"ours": _call(quantize, weight, name)}
            if not searches:
                quantizing = _call(reference.quants.quantize, weight.numpy(), number)
                writing["theirs"] = quantizing
            times = measure.latency(writing, warmup=1, repeats=3 if searches else 9)
            row += f"{_speeds(times, size):>24}"
        print(row, flush=True)


def _call(function, *arguments):
    return lambda: function(*arguments)


def _random(name: str) -> Blocks:
    """Blocks of random bytes, where this package writes none; float16 scales below 2."""
    count = SHAPE[0] * SHAPE[1] // TYPES[name].size
    raw = torch.randint(0, 256, (count, TYPES[name].nbytes), dtype=torch.uint8)
    raw[:, -1] &= 0x3F
    raw[:, -3] &= 0x3F
    return Blocks(raw, name, SHAPE)


def _speeds(times: dict, size: float) -> str:
    speeds = {name: size / time.median for name, time in times.items()}
    if "theirs" not in speeds:
        return f"{speeds['ours']:.0f}"
    ratio = speeds["ours"] / speeds["theirs"]
    return f"{speeds['ours']:.0f} / {speeds['theirs']:.0f} ({ratio:.2f})"


def _relative(code: Blocks, weight: torch.Tensor) -> str:
    return f"{((code.decode() - weight).double().norm() / weight.double().norm()).item():.5f}"


def _error(name: str, weight: torch.Tensor) -> str:
    writes = name in QUANTIZERS or name in K_QUANTS
    return _relative(quantize(weight, name), weight) if writes else "-"


def _fixture_error(name: str, fixture: dict) -> str:
    weight = torch.from_numpy(fixture["x"])
    if name not in fixture:
        return _error(name, weight)
    stored = torch.from_numpy(fixture[name]).reshape(-1, TYPES[name].nbytes)
    in_c = _relative(Blocks(stored, name, tuple(weight.shape)), weight)
    return f"{_error(name, weight)} / {in_c}"


if __name__ == "__main__":
    main()
