"""Integer products: inputs rounded as well as weights, and 8-bit levels multiplied exactly.

(Over 200 lines, more than half of them statements and refusals: levels of the inputs, their exact
product and the code that puts both to use are one arithmetic.)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.affine import Quantized
from compresskit.code import Array, Bits, Code, Trits

INPUTS = ("token", "tensor", "static")
MOST_TERMS = (2**31 - 1) // 128**2  # 131071 products of two int8 numbers fit into an int32
MOST_INPUTS = (2**31 - 1) // (128 * 255)  # 65793 of an int8 number and a level less its zero point
_FLOAT_TERMS = 2**24 // 128**2  # 1024 of them fit into the 24 bits of a float32


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for int8 matrices, summed in int32 without any error.

    By `torch._int_mm` where that is exact: it is tried once per device on the largest levels,
    because on x86 processors without VNNI instructions it saturates pairs of products at 16 bits
    and says nothing. Elsewhere, and for an inner dimension of 1, which it gets wrong, by float32
    products of 1024 terms, whose sums are integers up to 2**24 and therefore exact, added up in
    int32.

    Parameters
    ----------
    a : (t, n) int8 tensor
    b : (n, m) int8 tensor
        on the same device

    Returns
    -------
    (t, m) int32 tensor

    Raises
    ------
    ValueError : not two int8 matrices that fit, or n above 131071, where (-128)^2 n is 2**31 or
        more and an int32 might overflow
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8 or a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"{a.dtype} of shape {tuple(a.shape)} and {b.dtype} of shape {tuple(b.shape)};"
            " two int8 matrices are needed, such as (32, 576) and (576, 1536)"
        )
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)}; the columns of the first must be as"
            " many as the rows of the second"
        )
    if a.shape[1] > MOST_TERMS:
        raise ValueError(
            f"sums of {a.shape[1]} products could overflow an int32; {MOST_TERMS} fit always:"
            " split the inner dimension and add the parts in int64"
        )
    if a.shape[1] > 1 and len(a) and b.shape[1] and _native_is_exact(a.device):
        return _native(a, b)
    total = torch.zeros(len(a), b.shape[1], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for start in range(0, a.shape[1], _FLOAT_TERMS):
            terms = slice(start, start + _FLOAT_TERMS)
            total += (a[:, terms].float() @ b[terms].float()).int()
    return total


def ternary_product(levels: Tensor, trits: Tensor) -> Tensor:
    """The product of integers with weights -1, 0 and 1, by additions and subtractions alone.

    Output i is the sum of the inputs whose weight is 1, less the sum of those whose weight is -1.
    A reference for what hardware could do, not a fast kernel: compare with `integer_matmul`.

    Parameters
    ----------
    levels : (t, n) int8 tensor
    trits : (m, n) tensor
        of 0, 1 and 2, which stand for -1, 0 and 1, as `Trits` holds them

    Returns
    -------
    (t, m) int32 tensor, equal to `integer_matmul(levels, (trits.char() - 1).T)`

    Raises
    ------
    ValueError : shapes that do not fit, levels that are not int8, or weights that are no trits
    """
    if levels.dtype != torch.int8 or levels.ndim != 2 or levels.shape[1:] != trits.shape[1:]:
        raise ValueError(
            f"{levels.dtype} of shape {tuple(levels.shape)} for trits of shape"
            f" {tuple(trits.shape)}; (t, n) int8 and (m, n) are needed"
        )
    if trits.numel() and not ((trits == 0) | (trits == 1) | (trits == 2)).all():
        raise ValueError("the weights must be 0, 1 or 2, which stand for -1, 0 and 1")
    out = torch.zeros(len(levels), len(trits), dtype=torch.int32, device=levels.device)
    for i, row in enumerate(trits):
        added, taken = levels[:, row == 2], levels[:, row == 0]
        out[:, i] = added.sum(1, dtype=torch.int32) - taken.sum(1, dtype=torch.int32)
    return out


def quantize_tokens(x: Tensor, *, steps: float = 127.5) -> tuple[Tensor, Tensor]:
    """round(x / scale) with a scale of its own for each row: max |x| / steps.

    Computed from `x` alone at each call: nothing is remembered, and rows do not affect each other.

    Parameters
    ----------
    x : (tokens, n) tensor
    steps : float
        how many steps the largest input is from 0. 127.5, as in torchao: the last of the levels
        -128 ... 127 has its cell end there, and every error is at most scale / 2. 127, as in
        LLM.int8(): a level lies there, the step is 0.4 % wider and -128 is not used

    Returns
    -------
    (tokens, n) int8 levels and (tokens, 1) float32 scales; a row that holds NaN or an infinity
    has a scale that is not finite

    Raises
    ------
    ValueError : `x` is no matrix, or `steps` not above 0 and at most 127.5
    """
    _check_tokens(x, steps)
    x = x.float()
    scale = x.abs().amax(1, keepdim=True) / steps
    return _levels(x, scale), scale


def quantize_tensor(
    x: Tensor, scale: Tensor | None = None, *, steps: float = 127.5
) -> tuple[Tensor, Tensor]:
    """round(x / scale) with one scale for all rows: the one given, or max |x| / steps.

    Parameters
    ----------
    x : (tokens, n) tensor
    scale : (1,) tensor
        fixed in advance ("static"); inputs beyond its range are clipped. None: computed from `x`,
        so that the largest input of any row sets the step of every other
    steps : float
        as for `quantize_tokens`

    Returns
    -------
    (tokens, n) int8 levels and (tokens, 1) float32 scales, equal but for rows that are not finite

    Raises
    ------
    ValueError : as `quantize_tokens`
    """
    _check_tokens(x, steps)
    x = x.float()
    largest = x.abs().amax(1, keepdim=True)
    if scale is None:
        scale = (largest.amax() if len(x) else largest.new_zeros(())) / steps
    scale = torch.where(largest.isfinite(), scale.float(), torch.nan)
    return _levels(x, scale), scale


@dataclass(frozen=True, eq=False)
class Integer(Code):
    """The matrix `weight`, which multiplies inputs that are rounded to 8 bits too.

    `decode()` is the weight alone. `product` is what such a layer computes: scale_x scale_w times
    an integer, with no rounding in between.

    Parameters
    ----------
    weight : Code
        Quantized, 8 bits or fewer (ternary and 1-bit levels too), one scale per row or in all
    inputs : str
        what shares one scale of the inputs: "token" or "tensor", computed at every call
        (dynamic), or "static", fixed in advance
    input_scale : Code
        (1,), for static inputs only
    threshold : float
        None, or: columns of inputs of which one is at least so large in magnitude are multiplied
        in floating point with the decoded weights (LLM.int8(); for "token" only)
    steps : float
        as for `quantize_tokens`

    Raises
    ------
    ValueError : any of them is something else, or there are more than 65793 inputs, whose
        products with levels less zero points may not fit an int32

    References
    ----------
    Jacob et al., arXiv 1712.05877, sections 2.2 and 2.3 (integer products, zero points). Dettmers
    et al., "LLM.int8()", arXiv 2208.07339, section 3. Book: chapter "Activations and outliers".
    """

    weight: Code
    inputs: str = "token"
    input_scale: Code | None = None
    threshold: float | None = None
    steps: float = 127.5

    quantizes_inputs = True

    def __post_init__(self):
        weight = self.weight
        if not (
            isinstance(weight, Quantized)
            and isinstance(weight.levels, Bits | Trits)
            and weight.levels.width <= 8
            and _whole_or_half(weight.zero, weight.levels.width)
            and weight.group_size == weight.shape[1]
        ):
            raise ValueError(
                "an integer product needs a Quantized weight of at most 8 bits, with zero points"
                " that are integers of at most 8 bits (or 1/2, of 1-bit levels) and one scale per"
                " row or in all: QuantSpec(8, symmetric=True)"
            )
        if weight.shape[1] > MOST_INPUTS:
            raise ValueError(
                f"{weight.shape[1]} inputs; an int32 holds the sums of up to {MOST_INPUTS}"
            )
        scale = self.input_scale
        static = isinstance(scale, Array) and scale.shape == (1,)
        if (
            self.inputs not in INPUTS
            or (self.inputs == "static") != static
            or not (static or scale is None)
        ):
            raise ValueError(
                f"inputs={self.inputs!r} with input_scale={type(scale).__name__}; it must be"
                ' "token" or "tensor" without one, or "static" with an Array of shape (1,)'
            )
        if self.threshold is not None and not (
            _positive(self.threshold) and self.inputs == "token"
        ):
            raise ValueError(
                f"threshold={self.threshold!r} with inputs={self.inputs!r}; it must be None, or a"
                ' number above 0, such as 6.0, with inputs="token"'
            )
        if not (_positive(self.steps) and self.steps <= 127.5):
            raise ValueError(f"steps={self.steps!r}; it must be above 0 and at most 127.5")

    def decode(self) -> Tensor:
        return self.weight.decode()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @torch.no_grad()  # rounding has no gradient worth the name; better none than half of one
    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Q(x) W^T + bias, where Q rounds to 8 bits; in float32, returned in the dtype of `x`.

        Tokens that hold NaN or an infinity give results that are not finite.

        Parameters
        ----------
        x : (..., n) tensor
        bias : (m,) tensor
            None: none

        Raises
        ------
        ValueError : another number of inputs
        """
        m, _ = self.shape
        tokens = self._tokens(x)
        if self.threshold is not None:
            y = self._decomposed(tokens)
        else:
            y = self._rescaled(*self._input_levels(tokens))
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], m)

    @torch.no_grad()
    def rounded(self, x: Tensor) -> Tensor:
        """Q(x): the inputs as `product` takes them, of the shape and dtype of `x`.

        Parameters
        ----------
        x : (..., n) tensor

        Raises
        ------
        ValueError : another number of inputs, or a code with a threshold, which rounds by column
        """
        if self.threshold is not None:
            raise ValueError(
                f"threshold={self.threshold}: some columns are not rounded; use threshold=None"
            )
        levels, scale = self._input_levels(self._tokens(x))
        return (levels * scale).to(x.dtype).reshape(x.shape)

    def _tokens(self, x: Tensor) -> Tensor:
        """The (tokens, n) inputs in `x`."""
        if not x.ndim or x.shape[-1] != self.shape[1]:
            raise ValueError(f"inputs of shape {tuple(x.shape)} for {self.shape[1]} columns")
        return x.reshape(-1, self.shape[1]).float()

    def _input_levels(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.inputs == "token":
            return quantize_tokens(tokens, steps=self.steps)
        fixed = None if self.input_scale is None else self.input_scale.decode()
        return quantize_tensor(tokens, fixed, steps=self.steps)

    def _decomposed(self, x: Tensor) -> Tensor:
        """Hot columns in floating point, the others in integers.

        As in the reference, a row's scale also sees the entries of hot columns that are small.
        """
        large = x.abs() >= self.threshold
        hot = large.any(0)
        levels, scale = quantize_tokens(x.masked_fill(large, 0), steps=self.steps)
        weight = self.weight
        columns = weight.levels.tensor[:, hot] - weight.zero.decode()
        y = self._rescaled(levels.masked_fill(hot, 0), scale)
        with torch.autocast(x.device.type, enabled=False):
            return y + F.linear(x[:, hot], weight.scale.decode() * columns)

    def _rescaled(self, levels: Tensor, scale: Tensor) -> Tensor:
        """scale_x scale_w (sum_j p_j q_j - z sum_j p_j), the bracket in exact integers.

        With a zero point of 1/2, the bracket is doubled and the result halved: both are exact.
        """
        stored, zero = self.weight.levels.tensor, self.weight.zero.decode()
        signed = (stored ^ 128).view(torch.int8)  # flipping the top bit subtracts 128
        whole = integer_matmul(levels, signed.T)
        sums = levels.sum(1, keepdim=True, dtype=torch.int32)
        if zero.is_floating_point():
            whole = (2 * (whole + 128 * sums) - (2 * zero.T).int() * sums) / 2
        else:
            whole = whole - sums * (zero.T - 128)
        return whole * scale * self.weight.scale.decode().T


def _check_tokens(x: Tensor, steps: float) -> None:
    if x.ndim != 2 or not (_positive(steps) and steps <= 127.5):
        raise ValueError(
            f"inputs of shape {tuple(x.shape)}, steps={steps!r}; give (tokens, n) inputs, and steps"
            " above 0 and at most 127.5"
        )


def _levels(x: Tensor, scale: Tensor) -> Tensor:
    """round(x / scale) as int8, and 0 where the scale is 0 (or too small to have an inverse)."""
    inverse = torch.where(scale > torch.finfo(torch.float32).tiny, 1 / scale, 0)
    return torch.round(x * inverse).nan_to_num(0).clamp(-128, 127).to(torch.int8)


def _whole_or_half(zero: Code, width: int) -> bool:
    """Whether a zero point is stored as integers of at most 8 bits, or is 1/2 of 1-bit levels."""
    if isinstance(zero, Bits):
        return zero.width <= 8
    if not isinstance(zero, Array) or zero.shape != (1, 1) or width > 1:
        return False
    # Looked at where that is free: on its way to another device it was looked at before.
    return zero.tensor.device.type != "cpu" or zero.tensor.item() == 0.5


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _native(a: Tensor, b: Tensor) -> Tensor:
    """The library's kernel. On CUDA it takes 17 rows or more, and multiples of 8 columns."""
    if not a.is_cuda:
        return torch._int_mm(a, b)
    return torch._int_mm(*_padded(a, b))[: len(a), : b.shape[1]]


def _padded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices with zeros appended: at least 24 rows, sizes multiples of 8, same product."""
    rows, inner, columns = (-size % 8 for size in (len(a), *b.shape))
    rows += 0 if len(a) > 16 else 24 - len(a) - rows
    # the second operand is wanted with its columns contiguous
    return F.pad(a, (0, inner, 0, rows)), F.pad(b.T.contiguous(), (0, inner, 0, columns)).T


@functools.cache
def _native_is_exact(device: torch.device) -> bool:
    """Whether the library's kernel multiplies the largest levels, one token and many, exactly."""
    if device.type not in ("cpu", "cuda"):
        return False
    a = torch.tensor([127, -128, 127, 127], dtype=torch.int8, device=device).repeat(40, 64)
    right = a.long().cpu() @ a.long().cpu().T
    return all(torch.equal(_native(a[:k], a.T).long().cpu(), right[:k]) for k in (1, 40))
