"""OBQ: against brute force over constrained least squares, and what it refuses."""

import sys

import pytest
import torch

from compresskit import affine
from compresskit.affine import QuantSpec, fit_grid
from compresskit.methods import gptq, obq, round_to_nearest
from compresskit.methods.moments import without_dead_inputs
from compresskit.stats import InputStats


def moments(second):
    return InputStats(1, second, torch.ones(len(second)), torch.ones(len(second)))


def layer(rows=8, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator)
    x @= torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), InputStats.of(x)


def cost_of(delta, second, fixed, values):
    """Least delta S delta with delta[fixed] = values, and its minimizer."""
    best = torch.zeros_like(delta)
    best[fixed] = values
    rest = [j for j in range(len(delta)) if j not in fixed]
    if rest:
        best[rest] = -torch.linalg.solve(second[rest][:, rest], second[rest][:, fixed] @ values)
    return best @ second @ best, best


def brute_force(weight, stats, spec):
    """Algorithm 3 by trying every free weight of a row and solving least squares anew each time."""
    second = stats.damped(0.01).double()
    grid = fit_grid(weight, spec)
    scale, zero = grid.scale[:, 0].double(), grid.zero[:, 0].double()
    decoded = torch.zeros_like(weight).double()
    for r, given in enumerate(weight.double()):
        delta, fixed = torch.zeros_like(given), []
        for _ in range(len(given)):
            trials = []
            for q in set(range(len(given))) - set(fixed):
                level = ((given[q] + delta[q]) / scale[r]).round() + zero[r]
                value = scale[r] * (level.clamp(0, spec.levels - 1) - zero[r])
                stray = (given[q] + delta[q] - value).abs() > scale[r] * 0.5001
                values = torch.stack([*(delta[j] for j in fixed), value - given[q]])
                cost, response = cost_of(delta, second, [*fixed, q], values)
                urgency = -(given[q] + delta[q] - value).abs() if stray else cost
                trials.append((urgency.item(), q, response))
            _, q, delta = min(trials, key=lambda trial: trial[0])
            fixed.append(q)
        decoded[r] = given + delta
    return decoded


@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(2, symmetric=True)], ids=str)
def test_it_is_what_brute_force_finds(spec):
    weight, stats = layer()
    got = obq(weight, stats, spec=spec).decode().double()
    expected = brute_force(weight, stats, spec)
    # A tie in float64 may part one row of eight from its twin.
    assert ((got - expected).abs().amax(1) < 1e-4).double().mean() >= 7 / 8


def test_a_fixed_order_is_noticed_by_the_same_comparison():
    weight, stats = layer()
    got = gptq(weight, stats, spec=QuantSpec(3)).decode().double()
    expected = brute_force(weight, stats, QuantSpec(3))
    assert ((got - expected).abs().amax(1) < 1e-4).double().mean() < 7 / 8


def test_it_beats_rounding_by_far():
    weight, stats = layer(rows=32, columns=48)
    spec = QuantSpec(3)
    error = {
        method: stats.distortion(weight - method(weight, stats, spec=spec).decode()).item()
        for method in (obq, round_to_nearest)
    }
    assert error[obq] < 0.5 * error[round_to_nearest]


def test_rows_do_not_depend_on_each_other_or_on_how_many_are_held(monkeypatch):
    weight, stats = layer(rows=5, columns=30)
    together = obq(weight, stats, spec=QuantSpec(3)).decode()
    alone = torch.cat([obq(row[None], stats, spec=QuantSpec(3)).decode() for row in weight])
    assert torch.equal(together, alone)
    for spec in (QuantSpec(3), QuantSpec(3, group_size="tensor")):
        together = obq(weight, stats, spec=spec).decode()
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["compresskit.methods.obq"], "_HELD", 2 * 30**2)
            assert torch.equal(obq(weight, stats, spec=spec).decode(), together)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4),
        QuantSpec(3, symmetric=True, group_size=5),
        QuantSpec(1, symmetric=True),
        QuantSpec(4, group_size="tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("fit", [affine.minmax, affine.mse])
def test_without_knowledge_of_the_inputs_it_is_rounding_bit_for_bit(spec, fit):
    weight, _ = layer()
    expected = round_to_nearest(weight, spec=spec, fit=fit).decode()
    for stats in (None, InputStats.isotropic(12)):
        assert torch.equal(obq(weight, stats, spec=spec, fit=fit).decode(), expected)


def test_dead_inputs_zero_rows_and_single_weights_are_taken():
    weight, stats = layer()
    weight[2] = 0
    second = stats.second.clone()
    second[4], second[:, 4] = 0, 0
    decoded = obq(weight, moments(second), spec=QuantSpec(4)).decode()
    assert not decoded[:, 4].any()
    assert not decoded[2].any()
    one = obq(torch.tensor([[0.7]]), InputStats.of(torch.ones(3, 1)), spec=QuantSpec(4))
    assert one.decode().item() == pytest.approx(0.7, abs=1e-3)  # a scale in half precision


def test_what_is_too_large_or_singular_or_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"a \(64, 400\) matrix; use gptq"):
        obq(torch.ones(512, 512), None, spec=QuantSpec(4))
    weight, stats = layer()
    few = InputStats.of(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"damped\(matrix, 0.01\)"):
        obq(weight, few, spec=QuantSpec(4), damp=0.0)
    assert torch.isfinite(obq(weight, few, spec=QuantSpec(4)).decode()).all()
    with pytest.raises(ValueError, match="moments of 12 inputs"):
        obq(weight[:, :5], stats, spec=QuantSpec(4))
    with pytest.raises(ValueError, match="second moments hold NaN"):
        obq(weight, moments(stats.second * torch.nan), spec=QuantSpec(4))
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN"):
        obq(weight, stats, spec=QuantSpec(4))


def test_filling_dead_moments_leaves_live_ones_and_their_damping_alone():
    weight, stats = layer()
    second = stats.second.clone()
    second[4], second[:, 4] = 0, 0
    zeroed, damped = without_dead_inputs(weight, moments(second), 0.01)
    expected = moments(second).damped(0.01)
    live = [j for j in range(12) if j != 4]
    assert torch.equal(damped[live][:, live], expected[live][:, live])
    assert damped[4, 4] > 0.5 * second.diagonal().mean()
    assert torch.equal(zeroed[:, live], weight[:, live])
