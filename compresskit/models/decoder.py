"""A decoder-only transformer: one class for the book's byte model and for a real Llama-type model.

p(x_1 ... x_T) = prod_t p(x_t | x_1 ... x_{t-1}); the parts are those of Llama: root-mean-square
norms before each sub-layer, rotary positions, grouped-query causal attention, a gated
feed-forward layer (SwiGLU), and one matrix that is both embedding and output head. (Over 200
lines: a model is read as one piece, and here with what it writes.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a `Decoder`.

    Parameters
    ----------
    vocab : number of tokens (256: bytes)
    width : length of a token's vector
    layers : number of blocks
    heads, kv_heads : query heads, and key/value heads shared by `heads / kv_heads` queries each
    hidden : inner width of the feed-forward layer
    context : number of tokens the model was trained to see at once
    theta : base of the rotary frequencies
    eps : added under the root of the norms
    dropout : fraction of each sub-layer's output dropped in training mode

    Raises
    ------
    ValueError : the heads do not divide the width evenly, or the kv heads the heads
    """

    vocab: int = 256
    width: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 6
    hidden: int = 512
    context: int = 256
    theta: float = 1e4
    eps: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} does not split into {self.heads} heads of even size; "
                f"use a multiple of {2 * self.heads}, such as {32 * self.heads}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; "
                f"use a divisor, such as {self.heads} or 1"
            )


def rotary(x: Tensor, *, theta: float, start: int = 0) -> Tensor:
    """Rotate the pair (x_i, x_{i+d/2}) at position t by the angle t theta^(-2i/d).

    A product of two rotated vectors depends on the difference of their positions only.

    Parameters
    ----------
    x : (..., T, d) tensor, d even
    theta : base of the frequencies
    start : position of the first of the T vectors

    Returns
    -------
    (..., T, d) tensor, of the same norms

    References
    ----------
    Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2; the pairing is that of Llama's
    published weights (first half with second half).
    """
    length, size = x.shape[-2:]
    frequency = theta ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)
    angle = torch.outer(position, frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class RMSNorm(nn.Module):
    """x -> weight * x / sqrt(mean(x^2) + eps), the mean taken over the last axis.

    References
    ----------
    Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Past:
    """The keys and values (N, kv_heads, T, d) of the tokens that an attention layer has seen."""

    def __init__(self):
        self.keys = self.values = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new tokens and return all of them."""
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d) + causal mask) V per head, with rotary Q and K.

    References
    ----------
    Ainslie et al., "GQA", arXiv 2305.13245: several query heads share one key/value head.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.size, self.theta = config.width // config.heads, config.theta
        self.groups = config.heads // config.kv_heads
        kv_width = self.size * config.kv_heads
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.o = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.size)).transpose(1, 2)  # (N, heads, T, d)
            for linear in (self.q, self.k, self.v)
        )
        start = 0 if past is None else len(past)
        q, k = (rotary(t, theta=self.theta, start=start) for t in (q, k))
        if past is not None:
            k, v = past.extend(k, v)
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        # One new token sees all before it; several at once, of which none is past, see theirs.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        return self.o(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """x -> down(silu(gate x) * up x).

    References
    ----------
    Shazeer, arXiv 2002.05202, eq. 6.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x -> x + attn(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.attn_norm = RMSNorm(config.width, config.eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = SwiGLU(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.attn_norm(x), past))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """Token ids (N, T) -> logits (N, T, vocab) of each next token.

    The head is the embedding matrix itself (`F.linear(x, embed.weight)`), stored once; it is
    therefore no `nn.Linear`, and a plan over linear layers does not meet it.

    Raises
    ------
    ValueError : more tokens at once than `config.context`: beyond it predictions are poor
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.register_module("rotation", None)  # `compresskit.surgery.rotate` sets it

    def forward(self, ids: Tensor, pasts: list[Past] | None = None) -> Tensor:
        before = len(pasts[0]) if pasts else 0
        if before + ids.shape[1] > self.config.context:
            raise ValueError(
                f"{before + ids.shape[1]} tokens at once; this model was trained on windows of "
                f"{self.config.context}: cut the text into such windows"
            )
        if before and ids.shape[1] > 1:
            raise ValueError(
                f"{ids.shape[1]} tokens after {before} that are past; give them singly"
            )
        x = self.drop(self.embed(ids))
        x = x if self.rotation is None else self.rotation(x)
        for block, past in zip(self.blocks, pasts or [None] * len(self.blocks), strict=True):
            x = block(x, past)
        x = x if self.rotation is None else self.rotation.undo(x)
        return F.linear(self.norm(x), self.embed.weight)


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each prompt by tokens drawn from the model's own predictions, one at a time.

    Each step computes the new tokens only; keys and values of those before are kept.

    Parameters
    ----------
    model : Decoder
    prompts : (N, T) integer tensor
    length : int
        tokens to draw; prompt and continuation together fit the model's context
    temperature : float
        of the predictions: 1 draws from the model's distribution, 0 takes the likeliest token
    generator : torch.Generator
        on the model's device; None: the global one

    Returns
    -------
    (N, T + length) tensor: the prompts and their continuations

    Raises
    ------
    ValueError
        an empty prompt, no token to draw, a sum beyond the context, a negative temperature
    """
    if prompts.ndim != 2 or 0 in prompts.shape or length < 1 or not temperature >= 0:
        raise ValueError(
            f"prompts of shape {tuple(prompts.shape)}, length={length}, temperature={temperature};"
            " give (N, T) ids with T >= 1, length >= 1 and temperature >= 0, for instance 1.0"
        )
    if prompts.shape[1] + length > model.config.context:
        raise ValueError(
            f"{prompts.shape[1]} + {length} tokens do not fit a context of {model.config.context}"
        )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        pasts, ids = [Past() for _ in model.blocks], prompts
        logits = model(ids, pasts)[:, -1].float()
        for step in range(length):
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                chances = (logits / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)
            ids = torch.cat([ids, token], dim=1)
            if step + 1 < length:
                logits = model(token, pasts)[:, -1].float()
    finally:
        for module, training in modes.items():
            module.training = training
    return ids
