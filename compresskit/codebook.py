"""Non-uniform scalar quantization: a real number as an index into a table of values.

(Over 200 lines, half of them statements and refusals: the code, the standard tables, and the two
ways to fit a table, to the optimum and by Lloyd's iteration, are one idea.)
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from torch import Tensor

from compresskit import linalg
from compresskit.code import Array, Bits, Code, Leaf
from compresskit.entropy.tables import scale_of


def _dynamic(signed: bool) -> Tensor:
    """+-10^(e-6) (0.1 + 0.9 (j + 1/2) / 2^e) for e = 0..6 and j < 2^e, and 0 and 1.

    Without a sign j < 2^(e+1), and 2^(e+1) for 2^e.

    Rounded to float32 at every step at which bitsandbytes rounds, for the same last bits.
    """
    f = np.float32
    found = [f([0, 1])]
    for e in range(7):
        count = 2**e if signed else 2 ** (e + 1)
        j, step = np.arange(count + 1), float((f(1) - f(0.1)) / f(count))
        ends = f(np.where(2 * j < count, float(f(0.1)) + j * step, 1 - (count - j) * step))
        means = f(10.0 ** (e - 6)) * ((ends[:-1] + ends[1:]) / f(2))
        found += [means, -means] if signed else [means]
    return torch.from_numpy(np.sort(np.concatenate(found)))


# By two exponent bits and one more; the sign comes before them.
_FP4 = [0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
TABLES = {
    # Dettmers et al., "QLoRA", appendix E: quantiles of a Gaussian, with an exact zero.
    "nf4": torch.tensor(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
         -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
         0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ),
    "fp4": torch.tensor([*_FP4, 0.0, *(-value for value in _FP4[1:])]),
    "dynamic8": _dynamic(signed=True),
    "dynamic8 unsigned": _dynamic(signed=False),
    # 2^((i - 128) / 8): steps and scales to within 4.4 %.
    "eighths": torch.from_numpy(scale_of(np.arange(-128, 128))).float(),
}  # fmt: skip
"""The tables that formats agree on: part of the formula, so a code that names one pays nothing."""
SECOND_BLOCK = 256  # scales that share a scale of their own, in double quantization


@dataclass(frozen=True, eq=False)
class Codebook(Code):
    """scale * values[index] + offset: one table, one scale per block of consecutive entries.

    Parameters
    ----------
    index : Code
        whole numbers of any shape, each below the length of the table; where it does not keep an
        entry (`Code.kept`) the value is 0
    values : Code or str
        (k,) one table for all, or (r, k) one for each of the r rows of `index`; or the name of a
        standard table in `TABLES`, which takes no bytes
    scale : Code
        (ceil(entries / block),), by blocks of the flattened `index`; None: no scales
    offset : Code
        () one number, added to all; None: none
    block : int
        entries per scale; None exactly if there are no scales

    Raises
    ------
    ValueError : shapes that do not belong together, an unknown name, an index beyond the table

    Notes
    -----
    Decoding is O(entries). Book: chapter "Better codebooks and the limit".

    Examples
    --------
    >>> code = Codebook(Bits.of(torch.tensor([0, 15, 7]), 4), "nf4")
    >>> code.decode(), code.nbytes
    (tensor([-1.,  1.,  0.]), 2)
    """

    index: Code
    values: Code | str
    scale: Code | None = None
    offset: Code | None = None
    block: int | None = None

    def __post_init__(self):
        sparse = self.index.kept is not None
        if not (sparse or isinstance(self.index, Leaf)) or isinstance(self.index, Array):
            raise ValueError(
                f"an index in a {type(self.index).__name__}; whole numbers are needed, as in Bits"
            )
        parts = [part for part in (self.values, self.scale, self.offset) if isinstance(part, Code)]
        if not all(isinstance(part, Leaf | Codebook) for part in parts):
            raise ValueError(
                f"values, scale and offset in {[type(part).__name__ for part in parts]}; they must"
                " be stored arrays, or codebooks of such"
            )
        shape, table = self.index.shape, self._table_shape()
        entries = int(np.prod(shape))
        rows = len(table) == 1 or (len(table) == 2 and table[:1] == tuple(shape[:1]))
        if not rows or 0 in table:
            raise ValueError(
                f"values of shape {table} for an index of shape {shape}; give (k,) or (rows, k)"
            )
        if (self.scale is None) != (self.block is None):
            raise ValueError(f"block={self.block!r}; a block goes with scales and scales with one")
        if self.scale is not None:
            if type(self.block) is not int or self.block < 1:
                raise ValueError(f"block={self.block!r}; it must be 1 or more, for instance 64")
            blocks = -(-entries // self.block)
            if self.scale.shape != (blocks,):
                raise ValueError(
                    f"{entries} entries in blocks of {self.block} need scales of shape"
                    f" {(blocks,)}, not {self.scale.shape}"
                )
        if self.offset is not None and self.offset.shape != ():
            raise ValueError(f"an offset of shape {self.offset.shape}; one number, (), is needed")
        if isinstance(self.index, Bits) and 1 << self.index.width > table[-1]:
            _check_index(self.index.tensor, table[-1])

    def decode(self) -> Tensor:
        index = self.index.tensor if isinstance(self.index, Bits) else self.index.decode()
        _check_index(index, self._table_shape()[-1])  # whoever made it, memory is not read beyond
        if isinstance(self.values, str):
            values = TABLES[self.values].to(index.device)
        else:
            values = self.values.decode()
        scale = None if self.scale is None else self.scale.decode()
        out = _look_up(index, values, scale, self.block)
        out = out if self.offset is None else out + self.offset.decode()
        kept = self.index.kept
        return out if kept is None else out.masked_fill(~kept, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.shape

    def _table_shape(self) -> tuple[int, ...]:
        if not isinstance(self.values, str):
            return self.values.shape
        if self.values not in TABLES:
            raise ValueError(f"no table {self.values!r}; there are {', '.join(TABLES)}")
        return tuple(TABLES[self.values].shape)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The index of the entry of `values` nearest to each entry of `x`; ties go to the smaller one.

    Parameters
    ----------
    x : (...,) tensor
    values : (k,) tensor
        in any order; of equal ones the first or the last is chosen

    Returns
    -------
    (...,) tensor, uint8 up to 256 values and int32 above
    """
    x = x.detach().contiguous()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    values = values.detach().to(x)
    ascending, order = values.sort(stable=True)
    thresholds = (ascending[1:] + ascending[:-1]) / 2
    if x.device.type == "cpu" and len(values) <= 32 and x.dtype == torch.float32:
        level = torch.empty(x.shape, dtype=torch.uint8)
        flat = x.reshape(-1).numpy()
        _count_below(flat, thresholds.numpy(), level.reshape(-1).numpy())
    else:
        level = torch.bucketize(x, thresholds, out_int32=True)
    if not torch.equal(order, torch.arange(len(values), device=x.device)):
        level = order[level.long()]
    return level.to(torch.uint8 if len(values) <= 256 else torch.int32)


def block_scales(x: Tensor, block: int) -> Tensor:
    """max|x| over each `block` consecutive entries of the flattened `x`; the last may be shorter.

    Parameters
    ----------
    x : (...,) tensor
    block : int

    Returns
    -------
    (ceil(entries / block),) tensor

    Raises
    ------
    ValueError : `block` below 1
    """
    return _in_blocks(x, block).abs().amax(1)


def normalized(x: Tensor, scale: Tensor, block: int) -> Tensor:
    """`x` with each block multiplied by 1 / scale, so that it lies in [-1, 1]; zeros stay zeros.

    Parameters
    ----------
    x : (...,) tensor
    scale : (ceil(entries / block),) tensor
        as from `block_scales`
    block : int
    """
    blocks = _in_blocks(x, block) * (1 / scale.clamp(min=1e-38))[:, None]
    return blocks.reshape(-1)[: x.numel()].reshape(x.shape)


def double_quantized(scale: Tensor) -> Codebook:
    """Scales in 8 bits: their mean, plus blocks of 256 of what remains in the dynamic table.

    Parameters
    ----------
    scale : (count,) tensor

    Notes
    -----
    Dettmers et al., "QLoRA", 2023, section 3: 32 bits per scale become 8 + 32/256.
    """
    offset = scale.mean()
    rest = scale - offset
    second = block_scales(rest, SECOND_BLOCK)
    index = nearest(normalized(rest, second, SECOND_BLOCK), TABLES["dynamic8"])
    return Codebook(Bits(index, 8), "dynamic8", Array(second), Array(offset), SECOND_BLOCK)


def absmax_code(weight: Tensor, table: str, *, block: int, double_quant: bool) -> Codebook:
    """scale * table[index], each weight to the nearest entry after division by its block's max|w|.

    Parameters
    ----------
    weight : (m, n) tensor
    table : str
        a 4-bit table of `TABLES`
    block : int
        consecutive weights of the flattened matrix that share a scale
    double_quant : bool
        store the scales by `double_quantized`, else in float32

    Raises
    ------
    ValueError : not a matrix, empty, not finite, or `block` below 1
    """
    linalg.check_weight(weight)
    weight = weight.detach().float()
    scale = block_scales(weight, block)
    index = nearest(normalized(weight, scale, block), TABLES[table])
    scales = double_quantized(scale) if double_quant else Array(scale)
    return Codebook(Bits(index, 4), table, scales, block=block)


def optimal_values(values: Tensor, k: int, *, weights: Tensor | None = None) -> Tensor:
    """The k numbers with the least sum of weights * (distance of each value to the nearest)^2.

    Exact one-dimensional k-means. In sorted order every cluster is an interval, so the best
    partition is a shortest path; each level is given a price, the best number of levels falls as
    the price rises, and one shortest path finds it for all numbers of levels at once. The price
    that yields k is found by bisection. Where no price does, because several numbers of levels
    are equally good, two paths are spliced into one of k.

    Parameters
    ----------
    values : (...,) tensor
        finite; computed in float64 on the CPU
    k : int
        1 or more; if there are fewer distinct values, the last is repeated
    weights : tensor
        of the shape of `values`, at least 0, not all 0; None: all 1

    Returns
    -------
    (k,) float64 tensor on the device of `values`, ascending

    Raises
    ------
    ValueError : nothing given, not finite, negative weights, `k` below 1

    Notes
    -----
    O(n log n) for each price, about ten prices; O(n) memory, whatever k is. The optimum up to
    rounding in float64.

    References
    ----------
    Wu, "Optimal quantization by matrix searching", 1991; the price per level, and the splice:
    Aggarwal, Schieber and Tokuyama, 1994; Gronlund et al., "Fast exact k-means, k-medians and
    Bregman divergence clustering in 1D", 2017.

    Examples
    --------
    >>> optimal_values(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), 2)
    tensor([ 0.5000, 11.0000], dtype=torch.float64)
    """
    if type(k) is not int or k < 1:
        raise ValueError(f"k={k!r}; it must be 1 or more levels, for instance 16")
    x, w = _sorted(values, weights)
    ends = _partition(x, w, min(k, len(x)))
    sums = np.add.reduceat(w * x, ends[:-1]) / np.add.reduceat(w, ends[:-1])
    return torch.from_numpy(np.pad(sums, (0, k - len(sums)), mode="edge")).to(values.device)


def lloyd(
    values: Tensor, start: Tensor, *, weights: Tensor | None = None, steps: int = 1000
) -> Tensor:
    """Lloyd's iteration: give each value to its nearest level, move each level to its mean, repeat.

    The error never grows, so it ends, at a local optimum that depends on `start`.

    Parameters
    ----------
    values : (...,) tensor
        finite; computed in float64 on the CPU
    start : (k,) tensor
    weights : tensor
        of the shape of `values`, at least 0, not all 0; None: all 1
    steps : int
        at most so many; it stops when nothing moves any more

    Returns
    -------
    (k,) float64 tensor on the device of `values`, ascending; a level that is nearest to no value
    stays where it is

    Raises
    ------
    ValueError : as `optimal_values`; `start` empty or not finite

    References
    ----------
    Lloyd, "Least squares quantization in PCM", 1957 (published 1982), method I.

    Examples
    --------
    >>> lloyd(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), torch.tensor([0.0, 1.0]))
    tensor([ 0.5000, 11.0000], dtype=torch.float64)
    """
    if start.ndim != 1 or not len(start) or not torch.isfinite(start).all():
        raise ValueError(f"start has shape {tuple(start.shape)}; one or more finite levels needed")
    x, w = _sorted(values, weights)
    levels = np.sort(start.detach().cpu().double().numpy())
    mass, moment = (np.concatenate([[0.0], np.cumsum(t)]) for t in (w, w * x))
    for _ in range(steps):
        ends = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2, side="right")
        ends = np.concatenate([[0], ends, [len(x)]])
        share = np.diff(mass[ends])
        moved = np.where(share > 0, np.diff(moment[ends]) / np.where(share > 0, share, 1), levels)
        if np.array_equal(moved, levels):
            break
        levels = np.sort(moved)
    return torch.from_numpy(levels).to(values.device)


def _sorted(values: Tensor, weights: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of positive weight, ascending, and the total weight of each."""
    x = values.detach().cpu().double().reshape(-1).numpy()
    w = np.ones_like(x)
    if weights is not None:
        if weights.shape != values.shape:
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} for values of shape"
                f" {tuple(values.shape)}; they must be equal"
            )
        w = weights.detach().cpu().double().reshape(-1).numpy()
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"{len(x)} values; one or more are needed, all of them finite")
    if not np.isfinite(w).all() or (w < 0).any() or not w.any():
        raise ValueError("weights must be finite, not negative, and not all 0; None weighs all 1")
    x, w = x[w > 0], w[w > 0]
    order = np.argsort(x, kind="stable")
    x, w = x[order], w[order]
    first = np.flatnonzero(np.concatenate([[True], x[1:] > x[:-1]]))
    return x[first], np.add.reduceat(w, first)


def _partition(x: np.ndarray, w: np.ndarray, k: int) -> np.ndarray:
    """The k + 1 ends of the k intervals of least weighted within-interval variation."""
    n = len(x)
    x = x - np.average(x, weights=w)  # the variation is the same, the rounding less
    mass, moment = (np.concatenate([[0.0], np.cumsum(t)]) for t in (w, w * x))
    low, high = 0.0, 2 * float(w @ (x * x)) + np.finfo(float).tiny
    many, few = np.arange(n + 1), np.array([0, n])  # the paths at prices 0 and `high`
    price = high / k**3  # high resolution: the error falls as 1/k^2, its slope as 1/k^3
    for turn in range(200):
        if len(many) - 1 == k:
            return many
        if len(few) - 1 == k:
            return few
        ends = _shortest_path(mass, moment, price)
        count = len(ends) - 1
        if count >= k:
            low, many = price, ends
        if count <= k:
            high, few = price, ends
        if high - low <= 1e-15 * high:
            break
        guess = price * (count / k) ** 3
        halfway = np.sqrt(low * high) if low else high / 1024
        price = guess if turn % 3 < 2 and low < guess < high else max(halfway, (low + high) / 1e9)
    spare = k - (len(few) - 1)  # the first i intervals of `many`, then those of `few`
    for i in range(len(few) - 1):
        if many[i + spare + 1] <= few[i + 1]:  # and few[i] <= many[i + spare], or i - 1 had it
            return np.concatenate([many[: i + spare + 1], few[i + 1 :]])
    raise AssertionError("two shortest paths always cross")


@numba.njit(nogil=True, cache=True)
def _shortest_path(mass, moment, price):
    """Ends of the intervals that minimize sum (price - moment^2 / mass), in O(n log n).

    The cost of intervals satisfies the quadrangle inequality, so a later start that is better at
    one end is better at all later ends: the queue holds, in order, the starts that may still win
    and from which end on each of them does.
    """
    n = len(mass) - 1
    best, previous = np.zeros(n + 1), np.zeros(n + 1, np.int64)
    start, since = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64)
    head, tail = 0, 0
    for end in range(1, n + 1):
        while head < tail and since[head + 1] <= end:
            head += 1
        previous[end] = start[head]
        best[end] = _path_cost(best, mass, moment, start[head], end) + price
        if end == n:
            break
        while tail > head and _path_cost(best, mass, moment, end, since[tail]) <= _path_cost(
            best, mass, moment, start[tail], since[tail]
        ):
            tail -= 1
        low, high = max(since[tail], end) + 1, n + 1  # the first end at which this start wins
        while low < high:
            middle = (low + high) // 2
            if _path_cost(best, mass, moment, end, middle) <= _path_cost(
                best, mass, moment, start[tail], middle
            ):
                high = middle
            else:
                low = middle + 1
        if low <= n:
            tail += 1
            start[tail], since[tail] = end, low
    count, end = 0, n
    while end > 0:
        count, end = count + 1, previous[end]
    ends = np.zeros(count + 1, np.int64)
    end = n
    for place in range(count, 0, -1):
        ends[place], end = end, previous[end]
    return ends


@numba.njit(nogil=True, cache=True)
def _path_cost(best, mass, moment, start, end):
    weight = mass[end] - mass[start]
    if weight <= 0:
        return best[start]
    total = moment[end] - moment[start]
    return best[start] - total * total / weight


@numba.njit(nogil=True, cache=True)
def _count_below(x, thresholds, out):
    """How many thresholds lie below each number; in pieces that stay in the nearest cache."""
    count = np.empty(1024, np.float32)
    for first in range(0, len(x), 1024):
        piece = x[first : first + 1024]
        for i in range(len(piece)):
            count[i] = 0
        for threshold in thresholds:
            for i in range(len(piece)):
                count[i] += np.float32(1) if piece[i] > threshold else np.float32(0)
        for i in range(len(piece)):
            out[first + i] = np.uint8(count[i])


@numba.njit(nogil=True, cache=True)
def _scaled_look_up(index, values, scale, block, out):
    for b in range(len(scale)):
        factor, of_block = scale[b], index[b * block : (b + 1) * block]
        decoded = out[b * block : (b + 1) * block]
        for i in range(len(of_block)):
            decoded[i] = factor * values[of_block[i]]


def _look_up(index: Tensor, values: Tensor, scale: Tensor | None, block: int | None) -> Tensor:
    """scale * values[index], by blocks; on the CPU compiled, elsewhere by torch."""
    if values.ndim == 2:
        out = values.gather(1, index.reshape(len(index), -1).long()).reshape(index.shape)
    elif index.device.type == "cpu" and scale is not None and not _trained(values, scale):
        out = torch.empty(index.shape)
        values, scale = values.detach().numpy(), scale.detach().numpy()
        arrays = index.contiguous().reshape(-1).numpy(), values, scale
        _scaled_look_up(*arrays, min(block, max(index.numel(), 1)), out.reshape(-1).numpy())
        return out
    else:
        out = values[index.long()]
    if scale is None:
        return out
    flat = _in_blocks(out, block) * scale[:, None]
    return flat.reshape(-1)[: out.numel()].reshape(out.shape)


def _trained(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """(count, block) the entries of `x` in order, the last row filled with zeros."""
    if type(block) is not int or block < 1:
        raise ValueError(f"block={block!r}; it must be 1 or more, for instance 64")
    flat = x.reshape(-1)
    block = min(block, max(len(flat), 1))  # of one block longer than the tensor, what there is
    missing = -len(flat) % block
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).reshape(-1, block)


def _check_index(index: Tensor, size: int) -> None:
    whole = not (index.is_floating_point() or index.is_complex())
    if index.numel() and whole and not index.is_meta:
        low, high = (int(end) for end in index.aminmax())
        whole = 0 <= low and high < size
    if not whole:
        raise ValueError(f"an index that is not a whole number from 0 to {size - 1}")
