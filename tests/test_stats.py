"""Input moments: what they are, how they merge, what they predict."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.stats import InputStats


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 1


def same(a: InputStats, b: InputStats, **tolerance):
    assert a.count == b.count
    for name in ("second", "mean_abs", "max_abs"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


def test_distortion_is_the_mean_squared_output_error(x):
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    measured = (x @ delta.T).double().square().sum(1).mean()
    torch.testing.assert_close(InputStats.of(x).distortion(delta), measured, rtol=1e-5, atol=0)


def test_distortion_in_directions_without_inputs_is_not_negative():
    """Few tokens, many inputs: float32 moments have eigenvalues slightly below 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, generator=generator)
    missing = torch.linalg.svd(x).Vh[8:]
    found = torch.stack([InputStats.of(x).distortion(row[None]) for row in missing])
    assert (found >= 0).all()
    assert (found < 1e-5).all()


def test_the_moments_are_what_their_names_say(x):
    stats = InputStats.of(x)
    assert stats.count == 300
    torch.testing.assert_close(stats.second[2, 3], (x[:, 2] * x[:, 3]).mean())
    torch.testing.assert_close(stats.rms, x.square().mean(0).sqrt())
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    assert torch.equal(stats.max_abs, x.abs().amax(0))


@given(st.lists(st.integers(1, 299), max_size=6, unique=True), st.randoms())
def test_any_cut_into_batches_in_any_order_gives_the_same_moments(cuts, random):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) * torch.arange(1, 7)
    parts = [InputStats.of(part) for part in x.tensor_split(sorted(cuts))]
    random.shuffle(parts)
    total = sum(parts[1:], start=parts[0])
    same(total, InputStats.of(x), rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_nothing_known_is_neutral(x):
    stats, nothing = InputStats.of(x), InputStats.isotropic(6)
    same(stats + nothing, stats)
    same(nothing + stats, stats)
    same(nothing + nothing, nothing)


def test_isotropic_distortion_is_the_frobenius_norm():
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    expected = delta.double().square().sum()
    torch.testing.assert_close(InputStats.isotropic(6).distortion(delta), expected)


def test_halves_are_summed_in_float32(x):
    same(InputStats.of(x.half()), InputStats.of(x.half().float()))


def test_damping_shifts_the_diagonal_by_a_share_of_its_mean(x):
    stats = InputStats.of(x)
    shift = stats.damped(0.25) - stats.second
    torch.testing.assert_close(shift, 0.25 * stats.rms.square().mean() * torch.eye(6))


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4)])
def test_inputs_that_are_no_tokens_are_refused(bad):
    with pytest.raises(ValueError, match=r"\(tokens, n\)"):
        InputStats.of(bad)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_inputs_without_finite_squares_are_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        InputStats.of(torch.tensor([[value, 0.0]]))


def test_moments_that_do_not_belong_together_are_refused(x):
    stats = InputStats.of(x)
    with pytest.raises(ValueError, match="6 and 3 inputs"):
        stats + InputStats.isotropic(3)
    with pytest.raises(ValueError, match="second moments of 6 inputs"):
        InputStats(1, stats.second, stats.mean_abs[:2], stats.max_abs)
    with pytest.raises(ValueError, match="square"):
        InputStats(1, stats.mean_abs, stats.mean_abs, stats.max_abs)


def test_moments_are_single_precision_in_a_model_that_runs_in_half():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = InputStats.of(x)
    assert torch.equal(inside.second, InputStats.of(x).second)
