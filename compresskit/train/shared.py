"""Weights that share values: the gradient of a value is the sum over all weights that have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from compresskit.code import Array
from compresskit.codebook import Codebook
from compresskit.losses import straight_through
from compresskit.model import layers, named, tables
from compresskit.train.quantization_aware import Latent, registered


class SharedValues(Latent):
    """The table of a codebook as a parameter; which weight has which value stays as it is.

    Parameters
    ----------
    codebook : Codebook
        with a stored table and no scales
    """

    def __init__(self, codebook: Codebook):
        super().__init__()
        self.codebook, self.values = codebook, nn.Parameter(codebook.values.decode().clone())

    def code(self, weight: Tensor) -> Codebook:
        stored = self.values.detach().to(self.codebook.values.tensor.dtype)
        return replace(self.codebook, values=Array(stored))

    def forward(self, weight: Tensor) -> Tensor:
        stored = self.values.to(self.codebook.values.tensor.dtype).float()
        values = straight_through(stored, self.values)
        index, kept = self.codebook.index.decode().long(), self.codebook.index.kept
        out = values.gather(1, index) if values.ndim == 2 else values[index]
        out = out if kept is None else out.masked_fill(~kept, 0)
        return out.reshape(weight.shape).to(weight.dtype)


def shared_values(model: nn.Module, codes: Mapping[str, Codebook]) -> nn.Module:
    """A copy of `model` that computes with these codebooks and trains their tables.

    Parameters
    ----------
    model : nn.Module
    codes : mapping
        layer or table name -> Codebook of its matrix, without scales or an offset; its index may
        be `Sparse`, and weights that are not kept stay 0

    Returns
    -------
    nn.Module
        with a parameter per table in the place of a weight; `converted` makes codes of them

    Raises
    ------
    ValueError : an unknown layer; a codebook that names a standard table or has scales

    References
    ----------
    Han, Mao and Dally, "Deep compression", arXiv 1510.00149, section 3.3.
    """
    found = named(model, layers(model) | tables(model), codes)
    for name, code in codes.items():
        plain = code.scale is None and code.offset is None
        if not plain or not isinstance(code.values, Array):
            raise ValueError(f"the codebook of {name!r} needs a stored table and no scales")
        if tuple(code.shape) != tuple(found[name].weight.flatten(1).shape):
            raise ValueError(
                f"a codebook of shape {code.shape} for {name!r}, whose matrix is"
                f" {tuple(found[name].weight.flatten(1).shape)}"
            )
    model = registered(model, {name: SharedValues(code) for name, code in codes.items()})
    for name in codes:
        model.get_submodule(name).parametrizations.weight.original.requires_grad_(False)
    return model
