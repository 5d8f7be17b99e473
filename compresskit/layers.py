"""Layers and matrices: the only file that asks what kind of module it has before it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.code import Code


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is one linear map of its inputs: nn.Linear, or nn.Conv2d with groups=1."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def is_table(module: nn.Module) -> bool:
    """Whether `module` looks rows up in a matrix: nn.Embedding that does not rescale them.

    Its inputs are indices, one-hot vectors in effect, so no moments are collected for it.
    """
    return isinstance(module, nn.Embedding) and module.max_norm is None


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
    ValueError : the code's shape is not that of the layer's matrix
    """
    expected = tuple(as_matrix(layer).shape)
    if code.shape != expected:
        raise ValueError(f"a code of shape {code.shape} for a layer whose matrix is {expected}")
    if isinstance(layer, nn.Linear):
        return CompressedLinear(code, layer.bias)
    if isinstance(layer, nn.Embedding):
        return CompressedEmbedding(code)
    return CompressedConv2d(code, layer)


class Compressed(nn.Module):
    """A layer whose weight is a code; the code's arrays are buffers of the module.

    So `.to(device)`, `state_dict` and `deepcopy` work as everywhere in PyTorch. (`.half()` does
    too, on floating-point leaves only, and changes what is stored.) The weight is decoded at
    every call: honest, and slow. `compresskit.model.decoded` decodes once.
    """

    def __init__(self, code: Code, bias: Tensor | None = None):
        super().__init__()
        self._formula = code
        for path, leaf in code.leaves().items():
            self.register_buffer(_buffer_name(path), leaf.tensor)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def code(self) -> Code:
        """The code over this module's present buffers."""
        return self._formula.map(
            lambda path, leaf: replace(leaf, tensor=getattr(self, _buffer_name(path)))
        )

    def extra_repr(self) -> str:
        return f"{type(self._formula).__name__}, {self.code.nbytes:,} bytes"


class CompressedLinear(Compressed):
    """x -> code.decode() x + bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.code.decode().to(x.dtype), self.bias)

    def restored(self) -> nn.Linear:
        """A dense layer with the decoded weight."""
        weight = self.code.decode()
        layer = nn.Linear(*reversed(weight.shape), self.bias is not None, device=weight.device)
        return _filled(layer, weight, self.bias)


class CompressedEmbedding(Compressed):
    """index -> row of code.decode()."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.code.decode())

    def restored(self) -> nn.Embedding:
        """A dense table with the decoded rows."""
        return nn.Embedding.from_pretrained(self.code.decode())


class CompressedConv2d(Compressed):
    """A convolution whose kernels, as an (out, in * height * width) matrix, are `code.decode()`."""

    def __init__(self, code: Code, layer: nn.Conv2d):
        super().__init__(code, layer.bias)
        self.kernel_shape = tuple(layer.weight.shape)
        self.options = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }

    def forward(self, x: Tensor) -> Tensor:
        return self.restored().to(x.dtype)(x)

    def restored(self) -> nn.Conv2d:
        """A dense layer with the decoded kernels."""
        out, channels, *size = self.kernel_shape
        weight = self.code.decode().reshape(self.kernel_shape)
        layer = nn.utils.skip_init(
            nn.Conv2d, channels, out, size, bias=self.bias is not None, **self.options
        )
        return _filled(layer.to(weight.device), weight, self.bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


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
