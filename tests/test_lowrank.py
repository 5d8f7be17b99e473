"""Low rank: the node, ranks and budgets, the four methods, and layers of two factors."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from compresskit import container, linalg, surgery
from compresskit.affine import QuantSpec
from compresskit.code import Array, Bits, Packed, Sum, packed
from compresskit.lowrank import (
    LowRank,
    allocated_ranks,
    largest_rank,
    rank_for_bytes,
    rank_for_energy,
)
from compresskit.methods import (
    gptq,
    int8,
    nf4,
    randomized_svd,
    residual,
    round_to_nearest,
    svd,
    whitened_svd,
)
from compresskit.model import compress, layers
from compresskit.stats import InputStats


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(n, seed=0, tokens=400):
    return draw(tokens, n, seed=seed) @ draw(n, n, seed=seed + 1)


def squared(x):
    return x.double().square().sum().item()


exact = partial(svd, dtype=torch.float32)

# --- the node -----------------------------------------------------------------------------------


def test_it_multiplies_twice_and_never_forms_the_matrix():
    left, right, x, bias = draw(6, 2), draw(2, 9, seed=1), draw(4, 9, seed=2), draw(6, seed=3)
    code = LowRank(Array(left), Array(right))
    assert code.shape == (6, 9)
    assert code.rank == 2
    assert code.size_table() == {"left": 48, "right": 72}
    assert torch.equal(code.decode(), left @ right)
    assert torch.equal(code.product(x, bias), (x @ right.T) @ left.T + bias)

    class Silent(Array):
        def decode(self):
            raise AssertionError("decoded")

    with pytest.raises(AssertionError, match="decoded"):
        LowRank(Silent(left), Array(right)).decode()


def test_factors_that_do_not_fit_are_refused():
    for left, right in (((6, 2), (3, 9)), ((6,), (1, 9)), ((6, 2), (2, 9, 1))):
        with pytest.raises(ValueError, match="must be"):
            LowRank(Array(torch.zeros(left)), Array(torch.zeros(right)))


def test_a_factor_that_rounds_its_inputs_makes_the_product_round_them():
    code = svd(draw(12, 16), rank=3, factors=int8)
    assert code.quantizes_inputs
    assert not svd(draw(12, 16), rank=3).quantizes_inputs


# --- ranks and budgets --------------------------------------------------------------------------


def test_the_largest_rank_is_the_last_with_fewer_numbers():
    for m, n in itertools.product(range(1, 12), repeat=2):
        k = largest_rank(m, n)
        assert k * (m + n) < m * n <= (k + 1) * (m + n)


def test_a_rank_from_energy_is_the_smallest_that_holds_it():
    values = torch.linalg.svdvals(draw(20, 30))
    for share in (0.01, 0.3, 0.5, 0.9, 0.999, 1.0):
        k = rank_for_energy(values, share)
        assert squared(values[:k]) >= share * squared(values) * (1 - 1e-12)
        assert k == 1 or squared(values[: k - 1]) < share * squared(values)
    assert rank_for_energy(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2
    assert rank_for_energy(torch.zeros(3), 0.5) == 1
    for bad in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share"):
            rank_for_energy(values, bad)
    with pytest.raises(ValueError, match="fall"):
        rank_for_energy(values.flip(0), 0.5)


def test_a_rank_from_bytes_is_the_largest_that_fits():
    weight = draw(40, 60)
    for nbytes, dtype in ((1000, torch.float16), (1000, torch.float32), (3000, torch.bfloat16)):
        rank = rank_for_bytes(40, 60, nbytes, bits=8 * dtype.itemsize)
        assert svd(weight, rank=rank, dtype=dtype).nbytes <= nbytes
        assert svd(weight, rank=rank + 1, dtype=dtype).nbytes > nbytes
    assert rank_for_bytes(40, 60, 10**9) == largest_rank(40, 60)
    with pytest.raises(ValueError, match="factors of rank 1 take 200 bytes"):
        rank_for_bytes(40, 60, 199)


def best_ranks(spectra, shapes, numbers):
    """Every choice of ranks that fits, tried."""
    names, best = list(spectra), (-1.0, None)
    ends = [min(largest_rank(*shapes[n]), len(spectra[n])) for n in names]
    for ranks in itertools.product(*(range(1, end + 1) for end in ends)):
        if sum(r * sum(shapes[n]) for n, r in zip(names, ranks, strict=True)) <= numbers:
            kept = sum(squared(spectra[n][:r]) for n, r in zip(names, ranks, strict=True))
            best = max(best, (kept, ranks))
    return best[0]


def test_allocation_is_optimal_where_nothing_is_left_over():
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 8)}
    spectra = {n: torch.linalg.svdvals((i + 1) * draw(8, 8, seed=i)) for i, n in enumerate(shapes)}
    for total in range(3, 10):
        ranks = allocated_ranks(spectra, shapes, 16 * total)
        assert sum(ranks.values()) == total
        kept = sum(squared(spectra[n][:r]) for n, r in ranks.items())
        assert kept == pytest.approx(best_ranks(spectra, shapes, 16 * total))


def test_allocation_with_other_shapes_loses_less_than_one_gain():
    shapes = {"a": (6, 9), "b": (12, 7), "c": (9, 9)}
    spectra = {n: torch.linalg.svdvals(draw(*s, seed=5)) for n, s in shapes.items()}
    for numbers in range(60, 160, 7):
        ranks = allocated_ranks(spectra, shapes, numbers)
        assert sum(r * sum(shapes[n]) for n, r in ranks.items()) <= numbers
        kept = sum(squared(spectra[n][:r]) for n, r in ranks.items())
        gain = max(squared(v[:1]) for v in spectra.values())
        assert kept > best_ranks(spectra, shapes, numbers) - gain


def test_allocation_refuses_what_it_cannot_do():
    shapes, spectra = {"a": (8, 8)}, {"a": torch.ones(8)}
    with pytest.raises(ValueError, match="numbers=15"):
        allocated_ranks(spectra, shapes, 15)
    with pytest.raises(ValueError, match="same names"):
        allocated_ranks(spectra, {"b": (8, 8)}, 100)
    with pytest.raises(ValueError, match="smaller than its factors"):
        allocated_ranks({"a": torch.ones(1)}, {"a": (1, 8)}, 100)


# --- methods ------------------------------------------------------------------------------------


def test_the_error_of_svd_is_what_is_left_out():
    weight = draw(20, 33)
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 5, 12):
        delta = weight - exact(weight, rank=rank).decode()
        assert squared(delta) == pytest.approx(squared(values[rank:]), rel=1e-5)
        assert torch.linalg.matrix_norm(delta, 2).item() == pytest.approx(values[rank].item(), 1e-5)
        assert torch.linalg.matrix_rank(exact(weight, rank=rank).decode(), rtol=1e-5) == rank


def test_nothing_of_the_rank_is_nearer_found_by_gradient_descent():
    weight = draw(9, 7)
    left, right = draw(9, 2, seed=1).requires_grad_(), draw(2, 7, seed=2).requires_grad_()
    optimizer = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def error():
        optimizer.zero_grad()
        value = (weight - left @ right).square().sum()
        value.backward()
        return value

    optimizer.step(error)
    least = squared(weight - exact(weight, rank=2).decode())
    assert least <= error().item() * (1 + 1e-6)
    assert error().item() == pytest.approx(least, rel=1e-3)


def test_the_output_error_of_whitened_svd_is_what_is_left_out():
    weight, stats = draw(20, 33), InputStats.of(correlated(33))
    root = linalg.cholesky(stats.damped(1e-4).double())
    values = torch.linalg.svdvals(weight.double() @ root)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-3)):
        code = whitened_svd(weight, stats, rank=6, dtype=dtype)
        delta = (weight - code.decode()).double()
        damped = ((delta @ stats.damped(1e-4).double()) * delta).sum().item()
        assert damped == pytest.approx(squared(values[6:]), rel=tolerance)
    plain = svd(weight, rank=6)
    whitened = whitened_svd(weight, stats, rank=6)
    assert stats.distortion(weight - whitened.decode()) < 0.7 * stats.distortion(
        weight - plain.decode()
    )


def test_the_whitened_factors_inputs_are_uncorrelated():
    weight, stats = draw(20, 33), InputStats.of(correlated(33))
    right = whitened_svd(weight, stats, rank=6, dtype=torch.float32).right.decode().double()
    inner = right @ stats.damped(1e-4).double() @ right.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4 * inner.max()
    assert (inner.diagonal().diff() < 0).all()


def test_any_root_gives_the_same_matrix():
    weight, stats = draw(12, 17).double(), InputStats.of(correlated(17))
    second = stats.damped(1e-4).double()
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.sqrt() @ vectors.T
    left, s, right = torch.linalg.svd(weight @ root, full_matrices=False)
    other = (left[:, :4] * s[:4]) @ right[:4] @ torch.linalg.inv(root)
    ours = whitened_svd(weight.float(), stats, rank=4, dtype=torch.float32).decode()
    torch.testing.assert_close(ours.double(), other, rtol=1e-3, atol=1e-4)


def test_randomized_svd_comes_near_the_optimum_and_power_helps():
    weight = draw(60, 90)
    least = squared(weight - exact(weight, rank=8).decode())
    errors = {
        power: squared(
            weight - randomized_svd(weight, rank=8, power=power, dtype=torch.float32).decode()
        )
        for power in (0, 1, 4, 16)
    }
    assert least * (1 - 1e-6) <= errors[16] < errors[4] < errors[1] < errors[0]
    assert errors[16] < 1.005 * least
    low = draw(60, 8) @ draw(8, 90, seed=1)
    found = randomized_svd(low, rank=8, power=0, dtype=torch.float32)
    assert squared(low - found.decode()) < 1e-9 * squared(low)


def test_the_range_finder_is_orthonormal_and_refuses_what_it_cannot_do():
    basis = linalg.range_finder(draw(30, 20), 7, power=3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(7))
    assert torch.equal(basis, linalg.range_finder(draw(30, 20), 7, power=3))
    assert not torch.equal(basis, linalg.range_finder(draw(30, 20), 7, power=3, seed=1))
    for size, power in ((0, 1), (21, 1), (5, -1)):
        with pytest.raises(ValueError, match="size must be"):
            linalg.range_finder(draw(30, 20), size, power=power)
    with pytest.raises(ValueError, match="oversample=-1"):
        randomized_svd(draw(30, 20), rank=3, oversample=-1)


@pytest.mark.parametrize("method", [svd, whitened_svd, randomized_svd])
def test_a_rank_whose_factors_outweigh_the_matrix_is_refused(method):
    for rank in (0, 6, 20, 2.0, True):
        with pytest.raises(ValueError, match="use 1 to 5"):
            method(draw(10, 12), rank=rank)
    assert method(draw(10, 12), rank=5).nbytes < 2 * 120


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_range_that_half_precision_does_not_hold_is_refused(factor):
    with pytest.raises(ValueError, match="bfloat16"):
        svd(draw(10, 12) * factor, rank=2)
    code = svd(draw(10, 12) * factor, rank=2, dtype=torch.bfloat16)
    usual = svd(draw(10, 12), rank=2).decode() * factor
    assert squared(code.decode() - usual) < 1e-4 * squared(usual)


def test_factors_are_quantized_for_what_each_of_them_sees():
    weight, stats = draw(48, 64), InputStats.of(correlated(64))
    grid = partial(round_to_nearest, spec=QuantSpec(3))
    careful = partial(gptq, spec=QuantSpec(3))
    floating = whitened_svd(weight, stats, rank=16, dtype=torch.float32)
    errors = {
        name: stats.distortion(
            floating.decode() - whitened_svd(weight, stats, rank=16, factors=f).decode()
        )
        for name, f in (("nearest", grid), ("gptq", careful))
    }
    assert errors["gptq"] < 0.8 * errors["nearest"]
    assert whitened_svd(weight, stats, rank=16, factors=grid).nbytes < 0.25 * floating.nbytes


def test_a_remainder_is_coded_and_rounds_never_harm():
    weight, stats = draw(24, 32), InputStats.of(correlated(32))
    low = partial(whitened_svd, rank=3)
    grid = partial(round_to_nearest, spec=QuantSpec(3, group_size=16))
    code = residual(weight, stats, first=grid, second=low)
    assert isinstance(code, Sum)
    assert torch.equal(code.first.decode(), grid(weight, stats).decode())
    assert torch.equal(code.second.decode(), low(weight - code.first.decode(), stats).decode())
    errors = [
        stats.distortion(
            weight - residual(weight, stats, first=grid, second=low, rounds=r).decode()
        ).item()
        for r in (1, 2, 5)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[0] < stats.distortion(weight - grid(weight, stats).decode())
    with pytest.raises(ValueError, match="rounds=0"):
        residual(weight, stats, first=grid, second=low, rounds=0)


# --- layers -------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10, bias=False))


def test_a_factorised_layer_keeps_its_bias_and_can_be_trained(tmp_path):
    net, x = network(), draw(8, 20)
    small = compress(net, {name: partial(svd, rank=4) for name in layers(net)})
    assert torch.equal(small[0].bias, net[0].bias)
    container.save(small, tmp_path / "net")
    assert torch.equal(container.load(tmp_path / "net", net)(x), small(x))
    pair = surgery.factorized(small)
    assert [type(m) for m in pair[0]] == [nn.Linear, nn.Linear]
    assert pair[0][0].bias is None
    assert torch.equal(pair[0][1].bias, net[0].bias)
    assert pair[2][1].bias is None
    torch.testing.assert_close(pair(x), small(x))
    numbers = sum(p.numel() for p in pair.parameters())
    assert numbers == 4 * (20 + 30) + 30 + 4 * (30 + 10)
    pair(x).square().sum().backward()
    assert all(p.grad is not None for p in pair.parameters())
    with pytest.raises(ValueError, match="LowRank"):
        surgery.factorized(net)


# --- integers packed in memory ------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("shape", [(5, 7), (0,), (1,), (3, 2, 5)])
def test_packed_integers_are_those_they_were_made_of(width, shape):
    values = torch.randint(0, 1 << width, shape, generator=torch.Generator().manual_seed(0))
    leaf = Bits.of(values, width)
    small = Packed.of(leaf)
    assert torch.equal(small.decode().int(), leaf.decode())
    assert small.to_bytes() == leaf.to_bytes()
    assert small.nbytes == leaf.nbytes
    assert small.tensor.untyped_storage().nbytes() == leaf.nbytes
    again = Packed.from_bytes(small.to_bytes(), small.header())
    assert torch.equal(again.tensor, small.tensor)
    assert again.shape == tuple(shape)


def test_a_packed_code_decodes_the_same_in_half_the_memory(tmp_path):
    net, x = network(), draw(8, 20)
    usual = compress(net, dict.fromkeys(layers(net), nf4))
    small = compress(net, dict.fromkeys(layers(net), lambda w, s: packed(nf4(w, s))))
    assert torch.equal(small(x), usual(x))
    held = [sum(b.nbytes for b in m[0].buffers()) for m in (usual, small)]
    assert held[0] - held[1] == 300
    assert small[0].code.nbytes == usual[0].code.nbytes
    container.save(small, tmp_path / "net")
    assert torch.equal(container.load(tmp_path / "net", net)(x), small(x))


def test_packed_refuses_what_it_does_not_hold():
    with pytest.raises(ValueError, match="divide a byte"):
        Packed(torch.zeros(3, dtype=torch.uint8), 3, (8,))
    for tensor in (torch.zeros(3, dtype=torch.uint8), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"are \(4,\)"):
            Packed(tensor, 4, (8,))
    with pytest.raises(ValueError, match="bytes"):
        Packed.from_bytes(b"\x00", {"width": 4, "size": [8]})


def test_the_spectrum_of_a_gaussian_follows_marchenko_and_pastur():
    from compresskit import theory

    for m, n in ((300, 300), (200, 600)):
        values = torch.linalg.svdvals(draw(m, n)).square().numpy()
        for share in (0.1, 0.5, 0.9):
            ours = theory.gaussian_energy(m, n, share)
            got = values[: round(share * min(m, n))].sum() / values.sum()
            assert ours == pytest.approx(got, abs=0.01)
    assert theory.gaussian_energy(5, 5, 0) == 0
    assert theory.gaussian_energy(5, 5, 1) == 1
    with pytest.raises(ValueError, match="share"):
        theory.gaussian_energy(5, 5, 1.1)


def test_theory_refuses_what_is_no_spectrum():
    from compresskit import theory

    for bad in ([1.0, 2.0], [[2.0, 1.0]], []):
        with pytest.raises(ValueError, match="fall"):
            theory.truncation(bad, 0)
    with pytest.raises(ValueError, match="rank=3"):
        theory.truncation([2.0, 1.0], 3)
    with pytest.raises(ValueError, match="2 or more"):
        theory.random_range([2.0, 1.0, 0.5], 2, 1)
    with pytest.raises(ValueError, match="power=-1"):
        theory.random_range_spectral([2.0, 1.0, 0.5], 2, 2, power=-1)
    assert theory.truncation(np.array([3.0, 2.0, 1.0]), 1) == (5.0, 2.0)
    assert theory.random_range_spectral([0.0, 0.0, 0.0], 2, 2) == 0
    assert theory.degrees_of_freedom(5, 7, 5) == 35
    assert theory.noise_share(4, 4, 4) == 1
