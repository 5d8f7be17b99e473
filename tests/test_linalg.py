"""Damping, factors, spectra: identities and refusals."""

import pytest
import torch

from compresskit import linalg


@pytest.fixture
def moment():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.T @ x / len(x)


def test_damping_adds_to_every_eigenvalue(moment):
    shift = 0.1 * moment.trace() / 8
    expected = linalg.eigenvalues(moment) + shift
    torch.testing.assert_close(linalg.eigenvalues(linalg.damped(moment, 0.1)), expected)


def test_the_factor_multiplies_back(moment):
    factor = linalg.cholesky(moment)
    torch.testing.assert_close(factor @ factor.T, moment)
    assert torch.equal(factor, factor.tril())


def test_eigenvalues_ascend_and_keep_trace_and_determinant(moment):
    values = linalg.eigenvalues(moment)
    assert (values.diff() >= 0).all()
    torch.testing.assert_close(values.sum(), moment.trace())
    torch.testing.assert_close(values.prod(), moment.det())


def test_a_singular_matrix_is_named_not_shifted():
    with pytest.raises(ValueError, match=r"smallest eigenvalue .*damp it first"):
        linalg.cholesky(torch.diag(torch.tensor([1.0, 0.0])))


def test_a_damped_singular_matrix_is_accepted():
    assert (
        linalg.cholesky(linalg.damped(torch.diag(torch.tensor([1.0, 0.0])), 0.01)).isfinite().all()
    )


@pytest.mark.parametrize("fraction", [-0.1, float("nan")])
def test_a_negative_fraction_is_refused(moment, fraction):
    with pytest.raises(ValueError, match="0 or more"):
        linalg.damped(moment, fraction)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("function", [linalg.cholesky, linalg.eigenvalues])
def test_what_is_not_square_is_refused(function, shape):
    with pytest.raises(ValueError, match="square"):
        function(torch.zeros(shape))


def test_a_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        linalg.eigenvalues(torch.full((2, 2), torch.nan))
