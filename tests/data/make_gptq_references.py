"""What the authors' code rounds the fixture's weights to: makes gptq.npz.

    git clone https://github.com/IST-DASLab/gptq    (commit 2d65066)
    python make_gptq_references.py <its folder> <an npz file with W (rows, 512) and X (1024, 512)>

The layer was drawn at random: correlated inputs, three of them outliers, one always zero. All
rows are rounded, the first 32 stored: rows do not depend on each other. With `--time` nothing is
made; three shapes are timed against this package's `gptq` instead, in turn, scales in float32.
"""

import sys
import time
import types

import numpy as np
import torch

RUNS = {
    f"b{bits}_g{size}_{order}": (bits, size, order, {})
    for bits in (4, 3, 2)
    for size in ("row", "128")
    for order in ("noact", "act")
} | {
    "b4_g128_noact_sym": (4, "128", "noact", {"sym": True}),
    "b4_g128_act_static": (4, "128", "act", {"static_groups": True}),
    "b3_g64_noact": (3, "64", "noact", {}),
    "b4_grow_noact_mse": (4, "row", "noact", {"mse": True}),
    "b4_g128_noact_percdamp0.1": (4, "128", "noact", {"percdamp": 0.1}),
    "b8_grow_noact": (8, "row", "noact", {}),
}


def authors_code(folder):
    # It asks transformers for one class, to compare types with.
    sys.modules["transformers"] = types.SimpleNamespace(Conv1D=type("Conv1D", (), {}))
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda: None  # it calls this before it looks at the clock
    sys.path.insert(0, folder)
    import gptq
    import quant

    return gptq, quant


def run(code, weight, x, bits, size, order, *, sym=False, mse=False, **options):
    """(decoded weight, levels in the order of the columns, seconds) of the authors' class."""
    gptq, quant = code
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    job = gptq.GPTQ(layer)
    job.quantizer = quant.Quantizer()
    job.quantizer.configure(bits, perchannel=True, sym=sym, mse=mse)
    for sequence in x.reshape(8, -1, weight.shape[1]):
        job.add_batch(sequence[None], None)
    visit = torch.arange(weight.shape[1])
    if order == "act":
        moment = job.H.diagonal().clone()
        visit = moment.where(moment > 0, 1).argsort(descending=True)
    columns = []

    def recording(x, scale, zero, top):
        columns.append((torch.round(x / scale) + zero).clamp(0, top))
        return quant.quantize(x, scale, zero, top)

    gptq.quantize = recording
    start = time.perf_counter()
    group = -1 if size == "row" else int(size)
    job.fasterquant(groupsize=group, actorder=order == "act", **options)
    seconds = time.perf_counter() - start
    levels = torch.empty_like(weight)
    levels[:, visit] = torch.cat(columns, 1)
    return layer.weight.data, levels, seconds


def make(code, source):
    data = np.load(source)
    weight, x = (torch.from_numpy(data[name]).float() for name in ("W", "X"))
    second = x.T @ x / len(x)
    found = {"weight": weight[:32].numpy(), "second": second[tuple(torch.triu_indices(512, 512))]}
    for name, (bits, size, order, options) in RUNS.items():
        decoded, levels, _ = run(code, weight, x, bits, size, order, **options)
        delta, given = ((t[:32].double() @ x.double().T) for t in (weight - decoded, weight))
        found[f"error_{name}"] = (delta.square().sum() / given.square().sum()).numpy()
        # Groups inside a block are taken from stale weights there, and its range search is
        # another one: of these two runs only the error is kept.
        if size != "64" and not options.get("mse"):
            levels = levels[:32].numpy().astype(np.uint8).reshape(-1, 1)
            found[f"levels_{name}"] = np.packbits(np.unpackbits(levels, axis=1)[:, 8 - bits :])
    np.savez_compressed("gptq.npz", **found)


def compare_times(code):
    from compresskit.affine import QuantSpec
    from compresskit.methods import gptq
    from compresskit.stats import InputStats

    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((576, 1536), (1536, 576), (2048, 2048)):
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        x = torch.randn(4096, columns, generator=generator)
        x @= torch.randn(columns, columns, generator=generator) / columns**0.5
        stats = InputStats.of(x)
        for size in ("row", "128"):
            spec = QuantSpec(4, group_size=None if size == "row" else int(size))
            theirs, ours = [], []
            for _ in range(5):
                theirs.append(run(code, weight, x, 4, size, "noact")[2])
                start = time.perf_counter()
                gptq(weight, stats, spec=spec, scale_dtype=torch.float32)
                ours.append(time.perf_counter() - start)
            a, b = np.median(theirs), np.median(ours)
            print(f"{rows} x {columns}, {size}: {a:.3f} s, here {b:.3f} s, ratio {b / a:.2f}")


if __name__ == "__main__":
    if "--time" in sys.argv:
        compare_times(authors_code(sys.argv[1]))
    else:
        make(authors_code(sys.argv[1]), sys.argv[2])
