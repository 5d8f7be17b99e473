"""OBS: against brute force over constrained least squares, and what it refuses."""

import itertools
import sys

import pytest
import torch

from compresskit.methods import magnitude, obs
from compresskit.sparse import Pattern
from compresskit.stats import InputStats

TWO_FOUR = Pattern.n_of_m(2, 4)


def moments(second):
    return InputStats(1, second, torch.ones(len(second)), torch.ones(len(second)))


def layer(rows=8, columns=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator)
    x @= torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), InputStats.of(x)


def least_squares(given, second, removed):
    """The row with zeros at `removed` and the least error against `given`; and that error."""
    rest = [j for j in range(len(given)) if j not in removed]
    best = torch.zeros_like(given)
    if rest:
        best[rest] = torch.linalg.solve(second[rest][:, rest], second[rest] @ given)
    return best, ((best - given) @ second @ (best - given)).item()


def step_by_step(given, second, allowed):
    """Greedy removal by solving least squares anew for every candidate: rows after each step."""
    removed, steps = [], []
    while True:
        trials = [
            (least_squares(given, second, [*removed, q])[1], q)
            for q in set(range(len(given))) - set(removed)
            if allowed([*removed, q])
        ]
        if not trials:
            return steps
        cost, q = min(trials)
        removed.append(q)
        steps.append((cost, q, least_squares(given, second, removed)[0]))


def at_most(pattern, columns):
    """Whether a list of removed places is still allowed."""
    if pattern.among == "row":
        return lambda removed: len(removed) <= round(pattern.sparsity * columns)
    size = pattern.among
    most = round(pattern.sparsity * size)

    def allowed(removed):
        for start in range(0, columns, size):
            there = min(size, columns - start)
            if sum(start <= q < start + size for q in removed) > max(0, most - (size - there)):
                return False
        return True

    return allowed


PATTERNS = [Pattern(0.5), Pattern(0.75), TWO_FOUR, Pattern.n_of_m(1, 3), Pattern.n_of_m(3, 5)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_is_what_brute_force_finds(pattern):
    weight, stats = layer()
    second = stats.damped(0.01).double()
    got = obs(weight, stats, pattern=pattern).decode().double()
    for given, row in zip(weight.double(), got, strict=True):
        *_, (_, _, expected) = step_by_step(given, second, at_most(pattern, 12))
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def test_removing_by_other_costs_is_noticed_by_the_same_comparison():
    """By the moment of the input instead of what the others leave of it, and in one fixed order."""
    weight, stats = layer()
    second = stats.damped(0.01).double()
    differs = torch.zeros(2)
    for given in weight.double():
        *_, (_, _, expected) = step_by_step(given, second, at_most(Pattern(0.5), 12))
        by_moment = (given.square() * second.diagonal()).argsort()[:6].tolist()
        for i, removed in enumerate((by_moment, list(range(6)))):
            differs[i] += not torch.allclose(least_squares(given, second, removed)[0], expected)
    assert (differs >= 4).all()  # of 8 rows


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_stays_is_the_least_squares_answer_to_what_went(pattern):
    weight, stats = layer(columns=11)
    second = stats.damped(0.01).double()
    code = obs(weight, stats, pattern=pattern)
    kept = code.mask.decode().bool()
    assert torch.equal(kept.sum(1), pattern.mask(weight).sum(1))
    for given, row, mask in zip(weight.double(), code.decode().double(), kept, strict=True):
        best, _ = least_squares(given, second, (~mask).nonzero().flatten().tolist())
        torch.testing.assert_close(row, best, rtol=1e-5, atol=1e-6)


def test_the_error_is_the_sum_of_the_saliencies():
    weight, stats = layer(rows=5, columns=10)
    second = stats.damped(0.01).double()
    got = obs(weight, stats, pattern=Pattern(0.6)).decode().double()
    for given, row in zip(weight.double(), got, strict=True):
        work, free, total = given.clone(), list(range(10)), 0.0
        for _, q, after in step_by_step(given, second, at_most(Pattern(0.6), 10)):
            inverse = torch.linalg.inv(second[free][:, free])
            place = free.index(q)
            total += (work[q].square() / inverse[place, place]).item()
            free.remove(q)
            work = after
        assert total == pytest.approx(((row - given) @ second @ (row - given)).item(), rel=1e-5)


def test_one_removal_is_optimal_and_several_are_never_better_than_the_best_mask():
    excess = []
    for seed in range(6):
        weight, stats = layer(rows=4, columns=6, seed=seed)
        second = stats.damped(0.01).double()
        for count in (1, 2, 3, 4):
            got = obs(weight, stats, pattern=Pattern(count / 6)).decode().double()
            for given, row in zip(weight.double(), got, strict=True):
                ours = ((row - given) @ second @ (row - given)).item()
                best = min(
                    least_squares(given, second, removed)[1]
                    for removed in itertools.combinations(range(6), count)
                )
                assert ours >= best * (1 - 1e-4)
                if count == 1:
                    assert ours == pytest.approx(best, rel=1e-4)
                excess.append(ours / best)
    assert max(excess) > 1.1  # greedy: not always optimal


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(0.0), Pattern(1.0), Pattern(0.31)], ids=str)
@pytest.mark.parametrize("columns", [12, 11, 2])
def test_without_knowledge_of_the_inputs_it_is_magnitude_bit_for_bit(pattern, columns):
    weight, _ = layer(columns=columns)
    weight[0, :2] = weight[0, :2].abs().max()  # a tie
    expected = magnitude(weight, pattern=pattern).decode()
    for stats in (None, InputStats.isotropic(columns)):
        assert torch.equal(obs(weight, stats, pattern=pattern).decode(), expected)


def test_rows_do_not_depend_on_each_other_or_on_how_many_are_held(monkeypatch):
    weight, stats = layer(rows=5, columns=30)
    for pattern in (Pattern(0.5), TWO_FOUR):
        together = obs(weight, stats, pattern=pattern).decode()
        alone = torch.cat([obs(row[None], stats, pattern=pattern).decode() for row in weight])
        assert torch.equal(together, alone)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["compresskit.methods.obs"], "_HELD", 2 * 30**2)
            assert torch.equal(obs(weight, stats, pattern=pattern).decode(), together)


def test_dead_inputs_go_first_and_zero_rows_stay_zero():
    weight, stats = layer()
    weight[2] = 0
    second = stats.second.clone()
    second[4], second[:, 4] = 0, 0
    code = obs(weight, moments(second), pattern=Pattern(1 / 12))
    assert not code.mask.decode()[:, 4][torch.arange(8) != 2].any()
    assert not code.decode()[2].any()
    assert torch.isfinite(code.decode()).all()


def test_values_are_stored_as_asked():
    weight, stats = layer()
    single, half = (
        obs(weight, stats, pattern=TWO_FOUR, dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert single.nbytes - half.nbytes == 2 * 48
    torch.testing.assert_close(half.decode().float(), single.decode(), rtol=1e-3, atol=1e-4)


def test_what_is_too_large_or_singular_or_not_finite_or_of_another_pattern_is_refused():
    weight, stats = layer()
    for pattern in (Pattern(0.5, among="layer"), Pattern(0.5, among="layer", unit="column")):
        with pytest.raises(ValueError, match=r"for instance Pattern\(0.5\) or Pattern.n_of_m"):
            obs(weight, stats, pattern=pattern)
    with pytest.raises(ValueError, match=r"a \(64, 400\) matrix; use sparsegpt"):
        obs(torch.ones(512, 512), None, pattern=TWO_FOUR)
    few = InputStats.of(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"damped\(matrix, 0.01\)"):
        obs(weight, few, pattern=TWO_FOUR, damp=0.0)
    assert torch.isfinite(obs(weight, few, pattern=TWO_FOUR).decode()).all()
    with pytest.raises(ValueError, match="moments of 12 inputs"):
        obs(weight[:, :5], stats, pattern=TWO_FOUR)
    with pytest.raises(ValueError, match="second moments hold NaN"):
        obs(weight, moments(stats.second * torch.nan), pattern=TWO_FOUR)
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN"):
        obs(weight, stats, pattern=TWO_FOUR)
