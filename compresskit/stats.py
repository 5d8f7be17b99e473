"""What a layer's inputs look like: the few moments that every calibrated method needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compresskit import linalg
from compresskit.basis import Basis


@dataclass(frozen=True, eq=False)
class InputStats:
    """Moments of the inputs x in R^n of one linear map, averaged over tokens.

    Per token and without a factor 2, so that neither the batch shape nor a convention for the
    Hessian can change them, and `distortion` is a mean squared error as it stands.

    Parameters
    ----------
    count : int
        number of tokens seen; 0 stands for "nothing known" (`isotropic`)
    second : (n, n) tensor
        E[x x^T]; half the Hessian of the layer's squared output error
    mean_abs : (n,) tensor
        E|x|
    max_abs : (n,) tensor
        max |x|

    Raises
    ------
    ValueError : shapes that do not belong together, a negative count
    """

    count: int
    second: Tensor
    mean_abs: Tensor
    max_abs: Tensor

    def __post_init__(self):
        linalg.check_square(self.second)
        n = len(self.second)
        if self.mean_abs.shape != (n,) or self.max_abs.shape != (n,) or self.count < 0:
            raise ValueError(
                f"count {self.count}, mean_abs {tuple(self.mean_abs.shape)} and max_abs"
                f" {tuple(self.max_abs.shape)} beside second moments of {n} inputs;"
                f" a count of 0 or more and two shapes ({n},) are needed"
            )

    @classmethod
    def of(cls, x: Tensor) -> InputStats:
        """Of one batch of inputs.

        Parameters
        ----------
        x : (tokens, n) tensor
            float32, float16 or bfloat16; the moments are float32

        Raises
        ------
        ValueError : not a matrix, no token, or values that are not finite
        """
        if x.ndim != 2 or not len(x):
            raise ValueError(f"shape {tuple(x.shape)}; (tokens, n) with a token or more is needed")
        x = x.detach().float()
        with torch.autocast(x.device.type, enabled=False):  # the model may run under one
            second = x.T @ x / len(x)
        if not linalg.all_finite(second):
            raise ValueError("the inputs, or their squares, are not finite in float32")
        return cls(len(x), second, x.abs().mean(0), x.abs().amax(0))

    @classmethod
    def isotropic(cls, n: int) -> InputStats:
        """No knowledge of the inputs: E[x x^T] = I. Adding seen inputs to it gives those alone."""
        return cls(0, torch.eye(n), torch.ones(n), torch.ones(n))

    def __add__(self, other: InputStats) -> InputStats:
        """Of the union of two samples: averages weighted by their token counts.

        Associative and commutative up to float32 rounding, so the order and the size of the
        batches do not matter.
        """
        if len(self.second) != len(other.second):
            raise ValueError(f"moments of {len(self.second)} and {len(other.second)} inputs")
        if not self.count or not other.count:
            return self if self.count else other
        total = self.count + other.count
        share = other.count / total
        return InputStats(
            total,
            torch.lerp(self.second, other.second, share),
            torch.lerp(self.mean_abs, other.mean_abs, share),
            torch.maximum(self.max_abs, other.max_abs),
        )

    @property
    def rms(self) -> Tensor:
        """(n,) root mean square of each input."""
        return self.second.diagonal().sqrt()

    @cached_property
    def spectrum(self) -> Tensor:
        """(n,) eigenvalues of `second` in ascending order, in float64; computed once."""
        return linalg.eigenvalues(self.second)

    def damped(self, fraction: float = 0.01) -> Tensor:
        """(n, n) `second` plus `fraction` of its mean eigenvalue on the diagonal."""
        return linalg.damped(self.second, fraction)

    def distortion(self, delta: Tensor) -> Tensor:
        """E||delta x||^2 = tr(delta E[x x^T] delta^T), a scalar float64 tensor, never negative.

        In float64, because an error may lie in directions that the inputs hardly have.

        Parameters
        ----------
        delta : (m, n) tensor
            a weight error
        """
        second = self.second.double()
        delta = delta.to(second)
        return ((delta @ second) * delta).sum().clamp(min=0)

    def in_basis(self, basis: Basis) -> InputStats:
        """Of V x: the second moments are V E[x x^T] V^T, exactly.

        Absolute values follow only if each new coordinate is a multiple of an old one; in a
        rotated basis these moments do not determine E|V x| and max |V x|, which are then NaN.

        Parameters
        ----------
        basis : Basis
            of shape (N, n)

        Raises
        ------
        ValueError : a basis of another number of inputs
        """
        if basis.shape[1] != len(self.second):
            raise ValueError(
                f"a basis of {basis.shape[1]} inputs and moments of {len(self.second)};"
                " they must be the same inputs"
            )
        second = basis.apply(basis.apply(self.second).T)
        absolute = self.mean_abs, self.max_abs
        if basis.monomial:
            mean_abs, max_abs = map(basis.apply, absolute)
        else:
            mean_abs, max_abs = (a.new_full((len(second),), torch.nan) for a in absolute)
        return InputStats(self.count, (second + second.T) / 2, mean_abs, max_abs)

    def to(self, device: torch.device | str) -> InputStats:
        """The same moments on `device`."""
        tensors = (t.to(device) for t in (self.second, self.mean_abs, self.max_abs))
        return InputStats(self.count, *tensors)
