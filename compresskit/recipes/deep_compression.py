"""Deep Compression, stage by stage: prune, share values, train them, code what is left.

A composition of parts that exist; each stage is scored and its bytes are counted by what they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from compresskit import data, measure
from compresskit.code import Array, Bits
from compresskit.codebook import Codebook, lloyd, nearest
from compresskit.entropy import adaptive, coded, huffman, rans
from compresskit.layers import as_matrix
from compresskit.model import compress, decoded, layers, size_table
from compresskit.recipes import criteria
from compresskit.sparse import Sparse, mask_code
from compresskit.train import converted, masked, shared_values, support, unmasked


def shared(weight: torch.Tensor, mask: torch.Tensor, bits: int) -> Codebook:
    """Kept weights in 2^bits clusters, found by Lloyd's iteration from evenly spaced values.

    Parameters
    ----------
    weight : (m, n) tensor
    mask : (m, n) bool tensor
    bits : int
        1 to 8
    """
    kept = weight.detach()[mask]
    start = torch.linspace(kept.min().item(), kept.max().item(), 1 << bits, dtype=torch.float64)
    values = lloyd(kept, start).float()
    index = Sparse(Bits(nearest(kept, values), bits), mask_code(mask))
    return Codebook(index, Array(values.half()))


def stages(*, network: str, seed: int, sparsity: float, bits: int) -> dict:
    """All stages for one trained classifier.

    Parameters
    ----------
    network : a name in `criteria.NETWORKS`
    seed : of the network
    sparsity : share of the weights of each layer that goes
    bits : of an index of a shared value

    Returns
    -------
    dict : stage -> {"accuracy" on the test set, "bytes" of the whole model, and the bytes of its
        "values", "indices", "masks" and "rest"}
    """
    model, samples, _ = criteria.trained(network, seed)
    found = {"trained": _scored(model, samples)}
    masks = criteria.masks(network, seed, "magnitude", "layer", sparsity)
    small = masked(model, masks)
    criteria.continued(small, network, seed)
    small = unmasked(small)
    masks = support(small)
    plan = {n: lambda w, s, m=m: Sparse.of(w, m) for n, m in masks.items()}
    found["pruned"] = _scored(compress(small, plan), samples)
    codes = {n: shared(as_matrix(layers(small)[n]), m, bits) for n, m in masks.items()}
    found["shared"] = _scored(compress(small, _given(codes)), samples)
    tuned = shared_values(small, codes)
    criteria.continued(tuned, network, seed)
    tuned = converted(tuned)
    found["values trained"] = _scored(tuned, samples)
    codes = {name: tuned.get_submodule(name).code for name in codes}
    dense = decoded(tuned)
    for name, coder in (("Huffman", huffman), ("rANS", rans), ("adaptive", adaptive)):
        plan = _given({n: coded(code, coder) for n, code in codes.items()})
        found[name] = _scored(compress(dense, plan), samples)
    return found


def _given(codes: Mapping[str, Codebook]) -> dict:
    return {name: lambda w, s, code=code: code for name, code in codes.items()}


def _scored(model: nn.Module, samples: data.Dataset) -> dict:
    """Accuracy, and where the bytes are."""
    table = size_table(model)
    parts = dict.fromkeys(("values", "indices", "masks"), 0)
    for module in model.modules():
        code = getattr(module, "code", None)
        for path, leaf in code.leaves().items() if code is not None else ():
            kind = "masks" if path.endswith("mask") else "indices" if "index" in path else "values"
            parts[kind] += leaf.nbytes
    accuracy = measure.accuracy(decoded(model), samples.test_x, samples.test_y)
    rest = table.nbytes - sum(parts.values())
    return {"accuracy": accuracy, "bytes": table.nbytes, **parts, "rest": rest}
