"""The residual stream of a decoder in a rotated basis: the same function of other weights."""

import copy

import torch
from torch import Tensor, nn

from compresskit import linalg
from compresskit.basis import Rotation
from compresskit.code import Bits
from compresskit.layers import Compressed
from compresskit.models.decoder import Decoder


class ResidualRotation(nn.Module):
    """x -> V x for the residual stream, V a randomized Hadamard matrix; `undo` is V^T.

    Parameters
    ----------
    basis : Rotation
        square
    """

    def __init__(self, basis: Rotation):
        super().__init__()
        self.register_buffer("signs", basis.signs.decode().to(torch.uint8))

    @property
    def basis(self) -> Rotation:
        """V, over the module's present buffer."""
        return Rotation(Bits(self.signs, 1), len(self.signs))

    def forward(self, x: Tensor) -> Tensor:
        return self.basis.apply(x)

    def undo(self, x: Tensor) -> Tensor:
        """V^T x."""
        return self.basis.undo(x)


@torch.no_grad()
def rotate(model: Decoder, *, seed: int = 0) -> Decoder:
    """A copy of `model` that computes the same logits from a rotated residual stream V x.

    A root-mean-square norm without weights commutes with V, as it preserves lengths. So the
    norms' weights g and V go into the linear layers beside them: what reads the stream becomes
    W diag(g) V^T, what writes to it V W. The embedding, the last norm and the head, which is the
    embedding, stay as they are, between `ResidualRotation` and its inverse.

    Outliers, large values of a few coordinates of the stream in every token, are spread evenly
    over all of them; and weights that lay on a coarse grid lie on none.

    Parameters
    ----------
    model : Decoder
        in evaluation mode the result computes the same; dropout would act in another basis
    seed : int
        of the random signs in V

    Raises
    ------
    ValueError : no Decoder; one that is rotated already, whose layers are compressed, which
        shares weights between blocks, or of a width without a Hadamard matrix

    Notes
    -----
    The products are formed in float64 and rounded once to the weights' dtype.
    Ashkboos et al., "QuaRot", arXiv 2404.00456, section 4, stage 1a, fold V into the embedding
    and the head as well, which can be done where these are two matrices.
    Book: chapter "Activations and outliers".
    """
    _check(model)
    model = copy.deepcopy(model)
    basis = Rotation.random(model.config.width, seed=seed, device=model.embed.weight.device)

    def turn(norm: nn.Module, readers: list[nn.Linear], writer: nn.Linear) -> None:
        for layer in readers:
            layer.weight.copy_(basis.into(layer.weight.double() * norm.weight.double()))
        norm.weight.fill_(1)
        writer.weight.copy_(basis.apply(writer.weight.double().T).T)

    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        turn(block.attn_norm, [attn.q, attn.k, attn.v], attn.o)
        turn(block.mlp_norm, [mlp.gate, mlp.up], mlp.down)
    model.rotation = ResidualRotation(basis)
    return model


def _check(model: Decoder) -> None:
    if not isinstance(model, Decoder):
        raise ValueError(
            f"a {type(model).__name__}; only the residual stream of a Decoder, with its norms of"
            " lengths and no means, can be rotated, for instance of models.smollm2()[0]"
        )
    if model.rotation is not None:
        raise ValueError("this model is rotated already; rotate the one that it was made from")
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise ValueError("layers of this model are compressed; rotate it first, then compress it")
    parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
    if len(parameters) != len(set(parameters)):
        raise ValueError("this model shares weights between its parts; give each its own first")
    width = model.config.width
    if linalg.hadamard_order(width) != width:
        raise ValueError(
            f"a residual stream of width {width}, of which no Hadamard matrix can be built here;"
            f" the next width for which there is one is {linalg.hadamard_order(width)}"
        )
