"""What the authors' code prunes the fixture's weights to: makes sparsegpt.npz and wanda.npz.

    git clone https://github.com/IST-DASLab/sparsegpt    (commit 147d215)
    git clone https://github.com/locuslab/wanda          (commit 8e8fc87)
    python make_pruning_references.py <the first> <the second> <an npz file with W and X>

W (rows, 512) and X (1024, 512) are those of make_gptq_references.py, and the first 32 rows are
pruned; the weights and the moments are in gptq.npz. Masks say what is kept, a bit for each weight.
"""

import sys
import types
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import torch

RUNS = {  # (sparsity, n, m), bits
    "s50": ((0.5, 0, 0), None),
    "s70": ((0.7, 0, 0), None),
    "2of4": ((0.0, 2, 4), None),
    "4of8": ((0.0, 4, 8), None),
    "s50_b4": ((0.5, 0, 0), 4),
    "2of4_b4": ((0.0, 2, 4), 4),
}


def without_their_imports():
    for name in ("transformers", "datasets"):  # for classes and texts that are not used here
        sys.modules[name] = types.SimpleNamespace(
            Conv1D=type("Conv1D", (), {}),
            load_dataset=None,
            AutoTokenizer=None,
            LlamaTokenizer=None,
        )
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda: None
        torch.cuda.empty_cache = lambda: None
        torch.Tensor.cuda = lambda tensor: tensor


def sparsegpt(folder):
    """Their two modules."""
    without_their_imports()
    sys.path.insert(0, folder)
    import quant
    import sparsegpt

    return sparsegpt, quant


def run_sparsegpt(code, weight, x, sparsity, n, m, bits=None, **options):
    """(decoded, scale, zero) of their class; n of m weights are *removed*, as they write it."""
    sparsegpt, quant = code
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    job = sparsegpt.SparseGPT(layer)
    if bits:
        job.quantizer = quant.Quantizer()
        job.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
    for sequence in x.reshape(8, -1, weight.shape[1]):
        job.add_batch(sequence[None], None)
    with redirect_stdout(StringIO()):
        job.fasterprune(sparsity, prunen=n, prunem=m, **options)
    grid = (job.quantizer.scale, job.quantizer.zero) if bits else (None, None)
    return layer.weight.data, *grid


def wanda(folder):
    """Their module, with one layer and X where it expects a language model and its inputs."""
    without_their_imports()
    sys.path.insert(0, folder)
    from lib import prune

    return prune


def run_wanda(prune, weight, x, function, sparsity, n, m):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            self.map.weight.data = weight.clone()

        def forward(self, x, attention_mask, position_ids):
            return (self.map(x),)

    block = Block()
    model = types.SimpleNamespace(
        model=types.SimpleNamespace(layers=[block]),
        config=types.SimpleNamespace(use_cache=False),
        seqlen=0,
        hf_device_map={},
    )
    sequences = x.reshape(8, -1, weight.shape[1])
    prune.get_loaders = lambda *a, **k: (None, None)
    prune.prepare_calibration_input = lambda *a: (sequences, [None] * 8, None, None)
    args = types.SimpleNamespace(nsamples=8, seed=0, sparsity_ratio=sparsity, use_variant=False)
    with redirect_stdout(StringIO()):
        getattr(prune, function)(args, model, None, prune_n=n, prune_m=m)
    return block.map.weight.data


def relative_error(weight, x, decoded):
    delta, given = (weight - decoded).double() @ x.double().T, weight.double() @ x.double().T
    return (delta.square().sum() / given.square().sum()).numpy()


def make(sparsegpt_code, wanda_code, source):
    data = np.load(source)
    weight, x = (torch.from_numpy(data[name]).float() for name in ("W", "X"))
    weight = weight[:32]
    found = {}
    for name, (pattern, bits) in RUNS.items():
        decoded, scale, zero = run_sparsegpt(sparsegpt_code, weight, x, *pattern, bits)
        found[f"kept_{name}"] = np.packbits((decoded != 0).numpy())
        found[f"error_{name}"] = relative_error(weight, x, decoded)
        if bits:
            levels = (decoded / scale.reshape(-1, 1) + zero.reshape(-1, 1)).round()
            levels = np.unpackbits(levels.numpy().astype(np.uint8)[..., None], axis=-1)
            found[f"levels_{name}"] = np.packbits(levels[..., 4:])
        else:  # of 16 rows the values that stay
            found[f"values_{name}"] = decoded[:16][decoded[:16] != 0].numpy()
    np.savez_compressed("sparsegpt.npz", **found)
    found = {}
    for name, (pattern, _) in list(RUNS.items())[:4]:
        for function in ("wanda", "magnitude"):
            decoded = run_wanda(wanda_code, weight, x, f"prune_{function}", *pattern)
            found[f"{function}_{name}"] = np.packbits((decoded != 0).numpy())
    np.savez_compressed("wanda.npz", **found)


if __name__ == "__main__":
    make(sparsegpt(sys.argv[1]), wanda(sys.argv[2]), sys.argv[3])
