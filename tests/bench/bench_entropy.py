"""Throughput of rANS beside constriction, in one process: million symbols per second.

    python tests/bench/bench_entropy.py [threads]

On 4-bit levels of MiniLM's matrices, rounded by rows. Without constriction only this package is
timed.
"""

import sys

import numpy as np
import torch

from compresskit import measure, models
from compresskit.affine import QuantSpec
from compresskit.entropy import huffman, rans
from compresskit.methods import round_to_nearest
from compresskit.model import layers

try:
    import constriction
except ImportError:
    constriction = None

COUNT = 4_000_000


def main() -> None:
    """Print medians and quartiles of rounds that alternate, and the ratios of the medians."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    spec = QuantSpec(4, symmetric=True)
    parts = [
        round_to_nearest(layer.weight, spec=spec).levels.tensor.reshape(-1)
        for layer in layers(models.minilm()).values()
    ]
    levels = torch.cat(parts)[:COUNT]
    ours, prefix = rans(levels), huffman(levels)
    functions = {
        "rans encode": lambda: rans(levels),
        "rans decode": ours.decode,
        "huffman encode": lambda: huffman(levels),
        "huffman decode": prefix.decode,
    }
    sizes = {"rans": ours.nbytes, "huffman": prefix.nbytes}
    if constriction is not None:
        symbols = levels.numpy().astype(np.int32)
        p = np.bincount(symbols, minlength=16) / COUNT
        model = constriction.stream.model.Categorical(p, perfect=False)

        def encoded():
            coder = constriction.stream.stack.AnsCoder()
            coder.encode_reverse(symbols, model)
            return coder.get_compressed()

        words = encoded()
        assert np.array_equal(
            constriction.stream.stack.AnsCoder(words).decode(model, COUNT), symbols
        )
        functions["constriction encode"] = encoded
        functions["constriction decode"] = lambda: constriction.stream.stack.AnsCoder(words).decode(
            model, COUNT
        )
        sizes["constriction"] = words.nbytes
    print(f"{torch.get_num_threads()} thread(s), {COUNT / 1e6:g} million symbols")
    for name, nbytes in sizes.items():
        print(f"{name:22}{8 * nbytes / COUNT:8.4f} bits per symbol")
    times = measure.latency(functions, warmup=3, repeats=21)
    for name, t in times.items():
        spread = (t.high - t.low) / t.median
        line = f"{name:22}{COUNT / t.median / 1e6:8.0f} million/s  spread {spread:.0%}"
        peer = f"constriction {name.split()[1]}"
        if peer in times and name != peer:
            line += f"  {t.median / times[peer].median:.2f} of constriction's time"
        print(line)


if __name__ == "__main__":
    main()
