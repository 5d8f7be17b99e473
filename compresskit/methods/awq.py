"""AWQ: scale the inputs that carry most up before rounding, by the power that errs least."""

import torch
from torch import Tensor

from compresskit.affine import Fit, Quantized, QuantSpec, minmax
from compresskit.basis import InBasis, Scales
from compresskit.code import Array, check_float
from compresskit.methods.moments import checked
from compresskit.methods.round_to_nearest import round_to_nearest
from compresskit.stats import InputStats


def awq(
    weight: Tensor,
    stats: InputStats | None = None,
    *,
    spec: QuantSpec,
    grid: int = 20,
    clip: bool = False,
    fit: Fit = minmax,
    scale_dtype: torch.dtype = torch.float16,
) -> InBasis:
    """Q diag(1/s) with Q = round(W diag(s)), s_j ~ (E|x_j|)^a, a the best of 0, 1/grid, ..., < 1.

    Column j errs by (step of its group) rho / s_j, with |rho| <= 1/2: a larger s_j protects it,
    until the step of its group grows with it. So the power is found by trial, and judged by the
    layer's squared output error, which the second moments give exactly: tr(dW E[x x^T] dW^T).

    Parameters
    ----------
    weight : (m, n) tensor
        float32, float16 or bfloat16, on any device
    stats : InputStats
        moments of x; None: isotropic ones, all s_j = 1 and Q is that of `round_to_nearest`
    spec : QuantSpec
        the grid of W diag(s)
    grid : int
        number of powers tried
    clip : bool
        afterwards clip each group of each row of W diag(s) to the range, among 1.0, 0.95, ...,
        0.55 of its largest |w|, whose own output error is least
    fit : callable
        `affine.minmax`, `affine.percentile` or `affine.mse`: what range a grid covers
    scale_dtype : torch.dtype
        how s and the scales of the grid are stored

    Returns
    -------
    InBasis
        of a `Quantized` in `Scales`: n numbers more than rounding to nearest

    Raises
    ------
    ValueError : weights or moments that are not finite or do not fit together; `grid` below 1;
        `clip` with one grid for the whole matrix

    Notes
    -----
    O(grid m n^2) time.
    Lin et al., "AWQ", arXiv 2306.00978, section 3.2 and eq. 4-5. As their published code
    (mit-han-lab/llm-awq): the powers never reach 1; the search for clipping follows that for s.
    Otherwise than it: s stays with the code instead of being folded into what precedes the
    layer, and serves one layer (theirs serves all that read the same input, and is judged by the
    output of their block); the groups' errors in the search for clipping come from the diagonal
    blocks of E[x x^T] instead of 512 tokens, which is the same number when these are the tokens
    of the moments; and they leave queries and keys unclipped, which here is the plan's choice.
    Book: chapter "Rounding with second-order information".

    Examples
    --------
    >>> stats = InputStats.of(torch.tensor([[8.0, 0.1], [-8.0, 0.1]]))
    >>> code = awq(torch.tensor([[0.3, 1.0]]), stats, spec=QuantSpec(2))
    >>> code.basis.scale.decode()
    tensor([2.1523, 0.4644])
    """
    weight, stats = checked(weight, stats)
    if not torch.isfinite(stats.mean_abs).all():
        raise ValueError(
            "E|x| is not finite: after a rotation it is unknown. Collect the moments of the rotated"
            " inputs, or use a method that needs the second moments alone, such as gptq"
        )
    if type(grid) is not int or grid < 1:
        raise ValueError(f"grid={grid!r}; it must be a number of powers, for instance 20")
    if clip and spec.group_size == "tensor":
        raise ValueError(
            'clip=True with group_size="tensor": groups are clipped one by one, so each needs a'
            " scale of its own; give a number such as 128, or None"
        )
    check_float("scale_dtype", scale_dtype)

    def rounded(basis: Scales) -> InBasis:
        scaled = basis.into(weight)
        code = round_to_nearest(scaled, spec=spec, fit=fit, scale_dtype=scale_dtype)
        return InBasis(code, basis)

    power = stats.second.diagonal().mean()
    second = stats.second / power if power > 0 else stats.second  # so that no error overflows
    best, least = None, torch.inf
    for step in range(grid):
        scale = awq_scale(stats.mean_abs, step / grid)
        code = rounded(Scales(Array(scale.to(scale_dtype))))
        delta = weight - code.decode()
        error = ((delta @ second) * delta).sum().item()  # in float32: it need only rank
        if best is None or error < least:
            best, least = code, error
    if not clip:
        return best
    basis = best.basis
    clipped = _clipped(basis.into(weight), stats.in_basis(basis), spec, fit, scale_dtype)
    return InBasis(clipped, basis)


def awq_scale(mean_abs: Tensor, power: float) -> Tensor:
    """s = mean_abs^power, at least 1e-4, over sqrt(max s * min s), so that max s * min s = 1.

    Parameters
    ----------
    mean_abs : (n,) tensor
        E|x|, not negative
    power : float
        from 0 (all s are 1) to 1
    """
    scale = mean_abs.pow(power).clamp(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def _clipped(
    weight: Tensor, stats: InputStats, spec: QuantSpec, fit: Fit, scale_dtype: torch.dtype
) -> Quantized:
    """`weight` rounded after each of its groups is clipped to its best range."""
    columns = weight.shape[1]
    size = min(spec.group_size or columns, columns)
    places = torch.arange(columns, device=weight.device)
    groups = places.split(size)
    most = torch.stack([weight[:, group].abs().amax(1) for group in groups], dim=1)

    def clipped(limit: Tensor) -> Tensor:
        limit = limit[:, places // size]
        return weight.clamp(-limit, limit)

    def errors(approximation: Tensor) -> Tensor:  # (m, groups)
        delta = weight - approximation
        blocks = [(delta[:, g] @ stats.second[g][:, g] * delta[:, g]).sum(1) for g in groups]
        return torch.stack(blocks, dim=1)

    best, least = most, torch.full_like(most, torch.inf)
    for step in range(10):
        limit = most * (1 - step / 20)
        code = round_to_nearest(clipped(limit), spec=spec, fit=fit, scale_dtype=scale_dtype)
        error = errors(code.decode())
        best = torch.where(error < least, limit, best)
        least = torch.minimum(error, least)
    return round_to_nearest(clipped(best), spec=spec, fit=fit, scale_dtype=scale_dtype)
