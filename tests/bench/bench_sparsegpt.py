"""Seconds of SparseGPT, beside the authors' code where its folder is given, in turn.

    python tests/bench/bench_sparsegpt.py [folder of github.com/IST-DASLab/sparsegpt] [threads]

Both start from the second moments: the factorization is included, collecting is not.
"""

import contextlib
import io
import sys
from pathlib import Path

import torch

from compresskit import measure
from compresskit.methods import sparsegpt, wanda
from compresskit.sparse import Pattern
from compresskit.stats import InputStats

SHAPES = (576, 1536), (1536, 576), (2048, 2048)
PATTERNS = {
    "50 %": (Pattern(0.5, among="layer"), (0.5, 0, 0)),
    "2:4": (Pattern.n_of_m(2, 4), (0.0, 2, 4)),
}


def theirs(folder, weight, second, sparsity, n, m):
    """A call of the authors' class on copies of its operands."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    from make_pruning_references import sparsegpt as imported

    code, _ = imported(folder)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)

    def call():
        layer.weight.data = weight.clone()
        job = code.SparseGPT(layer)
        job.H = second.clone()
        with contextlib.redirect_stdout(io.StringIO()):
            job.fasterprune(sparsity, prunen=n, prunem=m)

    return call


def main() -> None:
    """Print one line per function: median over rounds that alternate, and the quartiles' spread."""
    folder = next((a for a in sys.argv[1:] if not a.isdigit()), None)
    torch.set_num_threads(next((int(a) for a in sys.argv[1:] if a.isdigit()), 1))
    generator = torch.Generator().manual_seed(0)
    for rows, columns in SHAPES:
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        x = torch.randn(4096, columns, generator=generator)
        x @= torch.randn(columns, columns, generator=generator) / columns**0.5
        stats = InputStats.of(x)
        for name, (pattern, options) in PATTERNS.items():
            functions = {
                "SparseGPT": lambda w=weight, s=stats, p=pattern: sparsegpt(w, s, pattern=p),
                "Wanda": lambda w=weight, s=stats, p=pattern: wanda(w, s, pattern=p),
            }
            if folder:
                functions["the authors'"] = theirs(folder, weight, stats.second, *options)
            times = measure.latency(functions, warmup=1, repeats=7)
            last = list(times)[-1]
            for key, t in times.items():
                print(
                    f"{rows} x {columns} {name:5}{key:14}{t.median:8.3f} s"
                    f"  spread {(t.high - t.low) / t.median:4.0%}"
                    f"  {t.median / times[last].median:5.2f} of {last}"
                )


if __name__ == "__main__":
    main()
