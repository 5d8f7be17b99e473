"""Which tensor of a model gets which type: the mixes that files in circulation are named after."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compresskit.formats.gguf.blocks import TYPES
from compresskit.formats.gguf.quantizers import FALLBACK

#: What "general.file_type" calls a file by the type that most of its tensors have.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q4_K_M": 15, "Q6_K": 18, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip


def q4_k_m(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """llama.cpp's mix Q4_K_M: Q4_K, but Q6_K where a rough tensor has been found to cost most.

    Q6_K get the output matrix (the embedding, if that is the output too) and, in the first and
    the last eighth of the blocks and every third one between, `attn_v` and `ffn_down`. Vectors,
    and matrices not named "...weight", stay F32. Where 256 does not divide the length of a row,
    Q5_0 takes the place of Q4_K and Q8_0 that of Q6_K; where 32 does not either, F16.

    Parameters
    ----------
    shapes : mapping
        tensor name, as in a GGUF file of a Llama-type model -> shape, rows last

    Returns
    -------
    dict : tensor name -> a key of `TYPES`, in the order of `shapes`

    Raises
    ------
    ValueError : experts or fused attention, for which llama.cpp has rules of their own

    Notes
    -----
    The rule is a habit, not an optimum: no sensitivity of the model at hand enters. Not included
    is what llama.cpp asks of the architecture's name: Falcon, and the 70 B models.

    References
    ----------
    `llama_tensor_get_type_impl`, `tensor_allows_quantization` and `tensor_type_fallback` in
    src/llama-quant.cpp of llama.cpp (commit 007dbbf).

    Examples
    --------
    >>> q4_k_m({"token_embd.weight": (1000, 512), "blk.0.attn_q.weight": (512, 512)})
    {'token_embd.weight': 'Q6_K', 'blk.0.attn_q.weight': 'Q4_K'}
    """
    for name in shapes:
        if any(part in name for part in ("_exps", "_shexp", "attn_qkv", "attn_kv_b")):
            raise ValueError(
                f"{name!r}: experts and fused attention are not covered; q4_k_m knows attn_q,"
                " attn_k, attn_v, attn_output, ffn_gate, ffn_up and ffn_down"
            )
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    rich = {head} | _rich(shapes, "attn_v.weight") | _rich(shapes, "ffn_down.weight")
    return {
        name: _type(shape, "Q6_K" if name in rich else "Q4_K") if _quantized(name, shape) else "F32"
        for name, shape in shapes.items()
    }


def _rich(shapes: Mapping[str, tuple[int, ...]], part: str) -> set[str]:
    """The tensors of that part, one per block, which the rule gives more bits."""
    names = [name for name in shapes if re.fullmatch(rf"blk\.\d+\.{re.escape(part)}", name)]
    names.sort(key=lambda name: int(name.split(".")[1]))  # a file may have block 10 after block 1
    n = len(names)
    return {
        name
        for i, name in enumerate(names)
        if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    }


def _quantized(name: str, shape: tuple[int, ...]) -> bool:
    while shape and shape[0] == 1:  # one row is a vector, as in ggml
        shape = shape[1:]
    kept = "_norm.weight" in name or "ffn_gate_inp.weight" in name
    return len(shape) > 1 and name.endswith("weight") and not kept


def _type(shape: tuple[int, ...], wanted: str) -> str:
    """`wanted`, or the first of llama.cpp's fallbacks whose blocks divide a row."""
    choices = (wanted, FALLBACK[wanted], "F16")
    return next(type for type in choices if shape[-1] % TYPES[type].size == 0)
