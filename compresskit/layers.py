"""Layers and matrices: the only file that asks what kind of module it has before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.code import Code


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is one linear map of its inputs: nn.Linear, or nn.Conv2d with groups=1.

    A subclass counts only if it computes the same: a `forward` of its own would be lost.
    """
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and type(module).forward is nn.Conv2d.forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_table(module: nn.Module) -> bool:
    """Whether `module` looks rows up in a matrix: nn.Embedding that does not rescale them.

    Its inputs are indices, one-hot vectors in effect, so no moments are collected for it.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return type(module).forward is nn.Embedding.forward


def as_matrix(layer: nn.Module) -> Tensor:
    """The (m, n) matrix: of a convolution, channels by patch entries; of a table, its rows."""
    return layer.weight.detach().flatten(1)


def tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors that the layer's matrix multiplies, (tokens, n).

    Parameters
    ----------
    layer : nn.Module
        for which `is_layer` holds
    x : tensor
        (..., n) for a linear layer; (batch, channels, height, width) for a convolution, where
        each output position is a token and n = channels * kernel height * kernel width
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = _padded(layer, x if x.ndim == 4 else x[None])
    patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def compressed(layer: nn.Module, code: Code) -> Compressed:
    """The layer or table with `code` for its matrix; its bias stays as it is.

    Raises
    ------
    ValueError : the code's shape is not that of the layer's matrix, or it quantizes inputs and the
        layer is not linear
    """
    expected = tuple(as_matrix(layer).shape)
    if code.shape != expected:
        raise ValueError(f"a code of shape {code.shape} for a layer whose matrix is {expected}")
    if code.quantizes_inputs and not isinstance(layer, nn.Linear):
        raise ValueError(
            f"a code that quantizes its inputs for a {type(layer).__name__}; only nn.Linear layers"
            " take one, others take the code of the weight alone"
        )
    kinds = {nn.Linear: CompressedLinear, nn.Embedding: CompressedEmbedding}
    found = [kind for base, kind in kinds.items() if isinstance(layer, base)]
    return (found[0] if found else CompressedConv2d)(code, layer)


class Compressed(nn.Module):
    """A layer whose weight is a code; the code's arrays are buffers of the module.

    So `.to(device)`, `state_dict` and `deepcopy` work as everywhere in PyTorch. `.half()`, `.to`
    another dtype and the like change the dtype of the bias and of the decoded weight, never what
    is stored. The weight is decoded at every call: honest, and slow. `compresskit.model.decoded`
    decodes once.

    Parameters
    ----------
    code : Code
    layer : nn.Module
        what it replaces
    """

    def __init__(self, code: Code, layer: nn.Module):
        super().__init__()
        # Classes and plain fields of the formula; the bytes are in the buffers alone.
        self._formula = code.to("meta")
        for path, leaf in code.leaves().items():
            # Contiguous, as a file gives them back: products add in an order that follows strides.
            tensor = leaf.tensor.detach().clone(memory_format=torch.contiguous_format)
            self.register_buffer(_buffer_name(path), tensor)
        bias = getattr(layer, "bias", None)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.kernel_shape = tuple(layer.weight.shape)
        self.dtype = layer.weight.dtype

    @property
    def code(self) -> Code:
        """The code over this module's present buffers."""
        return self._formula.map(
            lambda path, leaf: replace(leaf, tensor=getattr(self, _buffer_name(path)))
        )

    @property
    def weight(self) -> Tensor:
        """The decoded weight, in the shape and dtype of the layer that was replaced."""
        return self.code.decode().reshape(self.kernel_shape).to(self.dtype)

    def restored(self) -> nn.Module:
        """A dense layer of the original kind with the decoded weight."""
        weight = self.weight
        layer = self._dense().to(weight)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{type(self._formula).__name__}, {self.code.nbytes:,} bytes"

    def _dense(self) -> nn.Module:
        raise TypeError(f"{type(self).__name__} does not say which layer it stands for")

    def _apply(self, fn, recurse: bool = True) -> Compressed:
        stored = {_buffer_name(p): leaf.tensor for p, leaf in self.code.leaves().items()}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        device = next(iter(stored.values())).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=device)).dtype
        return self


class CompressedLinear(Compressed):
    """x -> W x + bias, multiplied as its code does it (`Code.product`)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.code.product(x, self.bias)

    def _dense(self) -> nn.Linear:
        out, inputs = self.kernel_shape
        return nn.utils.skip_init(nn.Linear, inputs, out, bias=self.bias is not None)


class CompressedEmbedding(Compressed):
    """index -> row of code.decode()."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)

    def _dense(self) -> nn.Embedding:
        return nn.utils.skip_init(nn.Embedding, *self.kernel_shape)


class CompressedConv2d(Compressed):
    """A convolution whose kernels, as an (out, in * height * width) matrix, are `code.decode()`."""

    def __init__(self, code: Code, layer: nn.Conv2d):
        super().__init__(code, layer)
        self.options = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.restored()(x)

    def _dense(self) -> nn.Conv2d:
        out, inputs, *size = self.kernel_shape
        bias = self.bias is not None
        return nn.utils.skip_init(nn.Conv2d, inputs, out, size, bias=bias, **self.options)


def _buffer_name(path: str) -> str:
    """State dictionaries reserve the dot; a code that is itself a leaf has the empty path."""
    return "code__" + path.replace(".", "__")


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """`x` with the border that the convolution adds, whatever its padding mode."""
    if isinstance(layer.padding, str):
        spans = zip(layer.dilation, layer.kernel_size, strict=True)
        total = [d * (k - 1) if layer.padding == "same" else 0 for d, k in spans]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in layer.padding]
    border = [*sides[1], *sides[0]]  # F.pad counts from the last dimension
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, border, mode=mode)
