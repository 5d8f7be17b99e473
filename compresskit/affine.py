"""Uniform scalar quantization: a real number as an integer level on an evenly spaced grid.

(Over 200 lines, two thirds of them statements, shapes and refusals: the grid, the ranges it may
cover and the code it becomes are one idea, and share their four private formulas.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.bits import check_width
from compresskit.code import Array, Bits, Code, check_float


@dataclass(frozen=True)
class QuantSpec:
    """Which grid; how to round to it is the method's business.

    Parameters
    ----------
    bits : int
        1 to 16; the grid has 2**bits levels
    symmetric : bool
        the grid is centered on 0 and its zero point a constant; otherwise each group stores one
    group_size : int, None or "tensor"
        how many consecutive inputs of a row share one scale (the last group of a row may be
        shorter); None: the whole row; "tensor": the whole matrix

    Raises
    ------
    ValueError : any of them outside its range

    Examples
    --------
    >>> QuantSpec(4, group_size=128).levels
    16
    """

    bits: int
    symmetric: bool = False
    group_size: int | str | None = None

    def __post_init__(self):
        check_width(self.bits)
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric={self.symmetric!r}; it must be True or False")
        size = self.group_size
        if size not in (None, "tensor") and not (type(size) is int and size >= 1):
            raise ValueError(
                f"group_size={size!r}; it must be a number of inputs such as 128, None for whole"
                ' rows, or "tensor" for one scale in all'
            )

    @property
    def levels(self) -> int:
        """Number of points of the grid, 2**bits."""
        return 1 << self.bits

    @property
    def center(self) -> float:
        """The zero point of a symmetric grid: half its levels, or 1/2 when there are only two.

        Two levels cannot be symmetric and contain 0, so the 1-bit grid is {-scale/2, scale/2}.
        """
        return 0.5 if self.bits == 1 else self.levels / 2


Fit = Callable[[Tensor, QuantSpec], tuple[Tensor, Tensor]]
"""(..., k) weights of each group, spec -> (...,) lower and (...,) upper end of the range."""


def minmax(groups: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range of each group: nothing is clipped, and |error| <= scale/2 for every weight."""
    return groups.amin(-1), groups.amax(-1)


def percentile(groups: Tensor, spec: QuantSpec, *, q: float = 99.9) -> tuple[Tensor, Tensor]:
    """The range that holds `q` percent of each group, by nearest rank; the rest is clipped.

    Symmetric: the q-th percentile of |w|, on both sides. Asymmetric: (100 - q)/2 percent of the
    weights are clipped on each side. A group too short to have that many is not clipped at all:
    at 99.9, one of fewer than about 500 (symmetric) or 1000 weights gets its min-max range.

    Raises
    ------
    ValueError : `q` not in (0, 100]
    """
    if not 0 < q <= 100:
        raise ValueError(f"q={q}; it must be above 0 and at most 100 percent, for instance 99.9")
    last = groups.shape[-1] - 1
    if spec.symmetric:
        reach = groups.abs().sort(-1).values[..., round(q / 100 * last)]
        return -reach, reach
    cut = round((1 - q / 100) / 2 * last)
    ordered = groups.sort(-1).values
    return ordered[..., cut], ordered[..., last - cut]


def mse(groups: Tensor, spec: QuantSpec, *, steps: int = 64) -> tuple[Tensor, Tensor]:
    """The range, among `steps` multiples of the min-max one, of least squared error per group.

    A narrower range clips a few large weights and buys a finer step for all others. On a
    symmetric grid the widest candidate puts the outermost level on the largest weight itself;
    min-max is always among the candidates, so the result is never worse than it (but for the
    rounding of the scale to its stored type, which is made afterwards).

    Parameters
    ----------
    groups : (..., k) tensor
    spec : QuantSpec
    steps : int
        number of candidates; the cost is that of as many roundings

    Raises
    ------
    ValueError : `steps` below 1
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; it must be 1 or more, for instance 64")
    low, high = minmax(groups, spec)
    widest = 1.0
    if spec.symmetric:
        widest = (spec.levels - spec.center - 0.5) / (spec.levels - spec.center - 1)
    best = torch.full_like(low, torch.inf)
    chosen = torch.ones_like(low)
    for ratio in sorted({1.0, *(widest * k / steps for k in range(1, steps + 1))}):
        scale, zero = _scale_and_zero(ratio * low, ratio * high, spec)
        rounded = _value(
            _nearest(groups, scale[..., None], zero[..., None], spec.levels),
            scale[..., None],
            zero[..., None],
        )
        error = (groups - rounded).square().sum(-1)
        chosen = torch.where(error < best, ratio, chosen)
        best = torch.minimum(error, best)
    return chosen * low, chosen * high


@dataclass(frozen=True, eq=False)
class Grid:
    """The grids of one (m, n) matrix: value = scale * (level - zero), one scale and zero per group.

    Parameters
    ----------
    spec : QuantSpec
    scale : (r, c) tensor
        a row per row of the matrix (or one for all), a column per group
    zero : (r, c) tensor
    group_size : int
        columns per group
    shape : tuple
        (m, n)
    scale_dtype : torch.dtype
        how `scale` is stored; its values are exact in that type
    """

    spec: QuantSpec
    scale: Tensor
    zero: Tensor
    group_size: int
    shape: tuple[int, int]
    scale_dtype: torch.dtype = torch.float16

    def by_column(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every column, (r, n); (r, 1) where one group is the whole row."""
        scale, zero = (_spread(t, self.group_size, self.shape[1]) for t in (self.scale, self.zero))
        return scale, zero

    def nearest(self, weight: Tensor) -> Tensor:
        """(m, n) levels of the grid points nearest to `weight`; ties go to the even level."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} on a grid for {self.shape}")
        scale, zero = self.by_column()
        return _nearest(weight.float(), scale, zero, self.spec.levels)

    def code(self, levels: Tensor) -> "Quantized":
        """`levels` (m, n) as a code, with what is needed to turn them back into weights."""
        zero = self.zero[:1, :1] if self.spec.symmetric else self.zero
        half = self.spec.symmetric and self.spec.bits == 1
        return Quantized(
            levels=Bits.of(levels, self.spec.bits),
            scale=Array(self.scale.to(self.scale_dtype)),
            zero=Array(zero.half()) if half else Bits.of(zero, self.spec.bits),
            group_size=self.group_size,
        )


def fit_grid(
    weight: Tensor,
    spec: QuantSpec,
    *,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> Grid:
    """The grid of each group of `weight`, its scale already as it will be stored.

    The scale is rounded *up* to `scale_dtype` before any level is chosen, so that the range
    stays covered and |error| <= scale/2 holds for the scale in the file, not for an ideal one.

    Parameters
    ----------
    weight : (m, n) tensor
    spec : QuantSpec
    fit : callable
        the range of each group: `minmax`, `percentile` or `mse`, options bound with `partial`
    scale_dtype : torch.dtype
        float16, bfloat16 or float32

    Raises
    ------
    ValueError : not a matrix, empty, not finite, or so large or small that `scale_dtype` cannot
        hold its largest scale

    Notes
    -----
    A group of much smaller weights than the others gets a scale of at least the smallest number
    of `scale_dtype` (6e-8 in float16), so it may lose them, by half of that each.
    The symmetric scale is reach / (levels - center - 1/2): the last cell ends where the range
    does. It is the 2 reach / (2**bits - 1) of the GPTQ reference code, finer than the common
    reach / (2**(bits-1) - 1). Book: chapter "The uniform quantizer".
    """
    check_float("scale_dtype", scale_dtype)
    linalg.check_weight(weight)
    weight = weight.detach().float()
    rows, columns = weight.shape
    if spec.group_size == "tensor":
        weight, size = weight.reshape(1, 1, -1), columns
        ranges = [fit(weight, spec)]
    else:
        size = min(spec.group_size or columns, columns)
        whole = columns // size * size
        ranges = [fit(weight[:, :whole].reshape(rows, -1, size), spec)]
        if whole < columns:  # the last group of each row is shorter
            ranges.append(fit(weight[:, None, whole:], spec))
    low, high = (torch.cat(ends, dim=1) for ends in zip(*ranges, strict=True))
    scale, zero = _scale_and_zero(low, high, spec, scale_dtype)
    return Grid(spec, scale, zero, size, (rows, columns), scale_dtype)


@dataclass(frozen=True, eq=False)
class Quantized(Code):
    """scale * (levels - zero), one scale and one zero point per group of columns.

    Parameters
    ----------
    levels : Code
        (m, n) integers; where it does not keep an entry (`Code.kept`) the value is 0
    scale : Code
        (m, c) or (1, c), with c = ceil(n / group_size) groups
    zero : Code
        the shape of `scale`, or (1, 1) when it is the same everywhere
    group_size : int
        columns per group
    """

    levels: Code
    scale: Code
    zero: Code
    group_size: int

    def __post_init__(self):
        levels, scale, zero = self.levels.shape, self.scale.shape, self.zero.shape
        size = self.group_size
        if len(levels) != 2 or type(size) is not int or not 1 <= size <= levels[1]:
            raise ValueError(
                f"levels of shape {levels} in groups of {size!r}; (m, n) and 1 to n are needed"
            )
        groups = -(-levels[1] // size)
        if scale not in ((levels[0], groups), (1, groups)) or zero not in (scale, (1, 1)):
            raise ValueError(
                f"levels of shape {levels} in groups of {size} need scales of shape"
                f" {(levels[0], groups)}, not {scale}, and zeros like them or (1, 1), not {zero}"
            )

    def decode(self) -> Tensor:
        size, columns = self.group_size, self.levels.shape[1]
        scale, zero = (_spread(c.decode(), size, columns) for c in (self.scale, self.zero))
        value, kept = _value(self.levels.decode(), scale, zero), self.levels.kept
        return value if kept is None else value.masked_fill(~kept, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape


def _scale_and_zero(
    low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Step and zero point of the grid that covers [low, high] and 0 with cells of one step."""
    if spec.symmetric:
        reach = torch.maximum(low.abs(), high.abs())
        zero = torch.full_like(reach, spec.center)
        return _round_up(reach / (spec.levels - spec.center - 0.5), dtype), zero
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _round_up((high - low) / (spec.levels - 1), dtype)
    return scale, torch.round(_ratio(-low, scale))


def _round_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest values of `dtype` that are not below `scale`, as float32."""
    stored = scale.to(dtype)
    if dtype != torch.float32:
        below = (stored.float() < scale).to(torch.int16)
        stored = (stored.view(torch.int16) + below).view(dtype)  # the next float up, as scale >= 0
    largest, stored = scale.max(), stored.float()
    if not torch.isfinite(stored).all() or stored.max() > 1.25 * largest:
        cure = "rescale the weight" if dtype == torch.float32 else "use scale_dtype=torch.float32"
        raise ValueError(f"a scale of {largest:.3g} is out of the range of {dtype}; {cure}")
    return stored


def _ratio(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale, and 0 where the scale is 0: an all-zero group has no step."""
    return torch.where(scale > 0, weight / scale, 0)


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    level = torch.round(_ratio(weight, scale) + zero.frac()) + zero.floor()
    return level.clamp(0, levels - 1)


def _value(level: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale * (level - zero)


def _spread(groups: Tensor, size: int, columns: int) -> Tensor:
    """(r, c) values of groups -> (r, columns), or unchanged where broadcasting does it."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(size, 1)[:, :columns]
