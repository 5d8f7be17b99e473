"""Throughput of NF4 beside bitsandbytes, in one process: MB/s of float32 in or out.

    python tests/bench/bench_nf4.py [threads]

bitsandbytes is not among the book's packages; without it only this package is timed.
"""

import sys

import torch

from compresskit import measure
from compresskit.methods import nf4

try:
    from bitsandbytes import functional
except ImportError:
    functional = None

SHAPE = (1536, 2048)


def main() -> None:
    """Print one line per function: median over rounds that alternate, and the quartiles' spread."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    functions = {}
    for double in (False, True):
        name = "double quantized" if double else "single"
        code = nf4(weight, double_quant=double)
        functions[f"compresskit quantize, {name}"] = lambda d=double: nf4(weight, double_quant=d)
        functions[f"compresskit decode, {name}"] = code.decode
        if functional is None:
            continue
        options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": double}
        packed, state = functional.quantize_4bit(weight, **options)
        functions[f"bitsandbytes quantize, {name}"] = lambda o=options: functional.quantize_4bit(
            weight, **o
        )
        functions[f"bitsandbytes decode, {name}"] = lambda p=packed, s=state: (
            functional.dequantize_4bit(p, s)
        )
    size = 4e-6 * weight.numel()
    print(f"{torch.get_num_threads()} thread(s), {SHAPE[0]} x {SHAPE[1]}, {size:.1f} MB of float32")
    for name, t in measure.latency(functions, warmup=3, repeats=31).items():
        print(f"{name:40}{size / t.median:8.0f} MB/s  spread {(t.high - t.low) / t.median:.0%}")


if __name__ == "__main__":
    main()
