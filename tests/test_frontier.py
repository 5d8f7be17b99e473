"""Codes near the limit: rates that are met, loops that agree, allocation, and shared values."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from compresskit import allocate, linalg, measure
from compresskit.affine import QuantSpec
from compresskit.code import Array, Bits
from compresskit.codebook import Codebook
from compresskit.entropy import Rans
from compresskit.methods import entropy_gptq, gptq, round_to_nearest, water_filling_gptq
from compresskit.recipes import deep_compression, frontier, lossless
from compresskit.sparse import Sparse, mask_code
from compresskit.stats import InputStats
from compresskit.train import converted, fit, shared_values

BOTH = pytest.mark.parametrize("method", [entropy_gptq, water_filling_gptq])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def layer():
    """A weight, and inputs of very different sizes that share most of their power."""
    mixing = draw(96, 96, seed=1) * torch.logspace(0, -2, 96)
    return draw(128, 96), InputStats.of(draw(4000, 96, seed=2) @ mixing.T + 0.01)


@BOTH
@pytest.mark.parametrize("bits", [1.0, 2.5, 4, 7.0])
@pytest.mark.parametrize("shrink", [False, True])
def test_the_rate_that_was_asked_for_is_met_in_bytes(method, bits, shrink, layer):
    code = method(*layer, bits=bits, shrink=shrink)
    assert 0 <= bits - measure.bits_per_weight(code) < 0.03
    assert isinstance(code.levels, Rans)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_step_toward_the_limit_comes_nearer(bits, layer):
    def gap(code):
        return measure.gap(layer[0], code, layer[1])

    grid = gap(gptq(*layer, spec=QuantSpec(bits, group_size=32)))
    one = gap(entropy_gptq(*layer, bits=bits))
    water = gap(water_filling_gptq(*layer, bits=bits, shrink=False))
    priced = gap(water_filling_gptq(*layer, bits=bits))
    assert grid > one > water > priced


@BOTH
@pytest.mark.parametrize("shrink", [False, True])
def test_levels_are_those_of_the_loop_in_double_precision(method, shrink, layer):
    weight, stats = layer
    code = method(weight, stats, bits=4, shrink=shrink)
    steps = code.scale.decode().double().expand(1, 96)[0]
    second, target = stats.damped(0.001).double(), weight.double()
    if shrink:  # the error per input is what the steps stand for
        low, high = 1e-12, 10.0
        for _ in range(80):
            error = math.sqrt(low * high)
            price = error / weight.double().square().mean() * torch.eye(96).double()
            own = linalg.upper_factor(second + price).diagonal()
            mean = own.log2().mean().exp2() if method is water_filling_gptq else None
            typical = own.square().mean().sqrt() if mean is None else mean
            base = steps.log2().mean().exp2()
            finer = math.sqrt(12 * error) / typical < base
            low, high = (error, high) if finer else (low, error)
        target = torch.linalg.solve(second + price, second @ target.T).T
        second = second + price
    factor = linalg.upper_factor(second)
    lost, levels = torch.zeros_like(target), torch.zeros_like(target)
    for i in range(96):
        moved = target[:, i] + lost[:, :i] @ factor[:i, i] / factor[i, i]
        levels[:, i] = (moved / steps[i]).round()
        lost[:, i] = target[:, i] - steps[i] * levels[:, i]
    same = (levels.int() == code.levels.decode()).float().mean()
    assert same > (0.8 if shrink else 0.97)


def test_steps_follow_the_inverse_diagonal_to_an_eighth_of_an_octave(layer):
    weight, stats = layer
    code = water_filling_gptq(weight, stats, bits=4, shrink=False)
    own = linalg.upper_factor(stats.damped(0.001).double()).diagonal()
    logs = (code.scale.decode()[0].double() * own).log2()
    assert logs.max() - logs.min() <= 1 / 8 + 1e-6


@BOTH
def test_without_correlation_the_levels_are_the_nearest(method):
    weight = draw(40, 30)
    code = method(weight, None, bits=5, shrink=False)
    step = code.scale.decode().reshape(-1)[0]
    assert torch.equal(code.levels.decode(), (weight / step).round().int())


def test_columns_that_no_input_reaches_are_zero_and_cost_nothing(layer):
    weight, _ = layer
    x = draw(3000, 96, seed=5)
    x[:, ::2] = 0
    code = water_filling_gptq(weight, InputStats.of(x), bits=2)
    assert not code.decode()[:, ::2].any()
    live = water_filling_gptq(weight[:, 1::2], InputStats.of(x[:, 1::2]), bits=4)
    errors = [(weight - code.decode())[:, 1::2], weight[:, 1::2] - live.decode()]
    powers = [e.square().mean().item() for e in errors]
    assert powers[0] == pytest.approx(powers[1], rel=0.25)  # half the columns, all the bits


@BOTH
def test_bad_rates_are_refused(method, layer):
    for bits in (0, -1, math.nan, 17, "3"):
        with pytest.raises(ValueError, match="up to 16 bits per weight"):
            method(*layer, bits=bits)
    with pytest.raises(ValueError, match="scales and tables alone take more"):
        method(*layer, bits=0.01)


def test_allocated_bits_have_one_water_level(layer):
    weight, stats = layer
    weights = {"a": weight, "b": 3 * weight[:50]}
    given = dict.fromkeys(weights, stats)
    found = allocate.water_filling(weights, given, 3.0, overhead=0.2)
    sizes = {name: w.numel() for name, w in weights.items()}
    spent = sum(found[n] * sizes[n] for n in sizes) / sum(sizes.values())
    assert spent == pytest.approx(3.0, abs=1e-6)
    levels = {}
    for name, w in weights.items():
        variance = w.double().square().mean()
        parts = variance * stats.spectrum
        low, high = 1e-12, parts.max().item()
        for _ in range(200):
            level = math.sqrt(low * high)
            rate = 0.5 * torch.log2((parts / level).clamp(min=1)).mean().item() + 0.2
            low, high = (level, high) if rate > found[name] else (low, level)
        levels[name] = level
    assert levels["a"] == pytest.approx(levels["b"], rel=1e-4)
    more = allocate.water_filling(weights, given, 3.0, importance={"a": 100.0})
    assert more["a"] > found["a"] + 0.5


def test_bad_allocations_are_refused(layer):
    weight, stats = layer
    with pytest.raises(ValueError, match="collect them first"):
        allocate.water_filling({"a": weight}, {}, 3.0)
    with pytest.raises(ValueError, match="more bits are needed"):
        allocate.water_filling({"a": weight}, {"a": stats}, 0.2)
    with pytest.raises(ValueError, match="factors above 0"):
        allocate.water_filling({"a": weight}, {"a": stats}, 3.0, importance={"b": 1.0})
    with pytest.raises(ValueError, match="fit together"):
        allocate.water_filling({"a": weight[:, 1:]}, {"a": stats}, 3.0)
    with pytest.raises(ValueError, match="nothing to allocate"):
        allocate.water_filling({"a": 0 * weight}, {"a": stats}, 3.0)


def shared(seed=0):
    mask = draw(4, 6, seed=seed) > -0.3
    index = torch.randint(4, (int(mask.sum()),), generator=torch.Generator().manual_seed(seed))
    return Codebook(Sparse(Bits.of(index, 2), mask_code(mask)), Array(draw(4, seed=3).half()))


def test_shared_values_train_and_the_stored_code_computes_what_was_trained():
    net = nn.Sequential(nn.Linear(6, 4))
    code = shared()
    tuned = shared_values(net, {"0": code})
    x, y = draw(64, 6, seed=7), draw(64, 4, seed=8)
    torch.testing.assert_close(tuned(x), x @ code.decode().T + net[0].bias)

    def loss(model, batch):
        return (model(x) - y).square().mean()

    before = loss(tuned, None).item()
    fit(tuned, loss, list(range(50)), rate=0.05)
    assert loss(tuned, None).item() < before
    small = converted(tuned)
    torch.testing.assert_close(small(x), tuned(x), rtol=0, atol=0)
    after = small[0].code
    assert torch.equal(after.decode() == 0, code.decode() == 0)
    assert torch.equal(after.index.values.tensor, code.index.values.tensor)
    assert not torch.equal(after.values.tensor, code.values.tensor)
    assert after.nbytes == code.nbytes


def test_codebooks_that_cannot_be_trained_are_refused():
    net = nn.Sequential(nn.Linear(6, 4))
    standard = Codebook(Bits.of(torch.zeros(4, 6), 4), "nf4")
    with pytest.raises(ValueError, match="a stored table and no scales"):
        shared_values(net, {"0": standard})
    other = Codebook(Bits.of(torch.zeros(3, 6), 2), Array(draw(4)))
    with pytest.raises(ValueError, match=r"whose matrix is \(4, 6\)"):
        shared_values(net, {"0": other})


def test_every_way_of_the_frontier_is_a_method(layer):
    weight, stats = draw(64, 128), InputStats.of(draw(500, 128, seed=4))
    for name, way in frontier.WAYS.items():
        code = way(3)(weight, stats)
        assert code.shape == weight.shape, name
    plain = gptq(weight, stats, spec=QuantSpec(3, group_size=128))
    smaller = frontier.WAYS["GPTQ, then rANS"](3)(weight, stats)
    assert torch.equal(smaller.decode(), plain.decode())
    assert smaller.nbytes < plain.nbytes


def test_records_of_layer_gaps(monkeypatch):
    net = nn.Sequential(nn.Linear(40, 48, bias=False))
    monkeypatch.setattr(frontier.models, "minilm", lambda: net)
    seen = {"0": InputStats.of(draw(400, 40, seed=1))}
    monkeypatch.setattr(frontier, "moments", lambda tokens: seen)
    record = frontier.gaps(way="water-filling, shrunk", bits=5, tokens=400, damp=0.01)
    assert record["seen"] == 400
    assert record["gap"] == record["held_out"]
    assert record["bits_per_weight"][0] <= 5


def test_stages_of_deep_compression_lose_bytes_and_the_last_two_no_accuracy(monkeypatch):
    monkeypatch.setattr(deep_compression.criteria, "TUNING", 1)
    monkeypatch.setattr(
        deep_compression.criteria,
        "continued",
        partial(deep_compression.criteria.continued, epochs=1),
    )
    found = deep_compression.stages(network="digits_cnn", seed=0, sparsity=0.8, bits=3)
    sizes = [found[s]["bytes"] for s in ("trained", "pruned", "shared", "values trained")]
    assert sizes[0] > 3 * sizes[1] > 4 * sizes[2]
    assert sizes[2] == sizes[3]
    for last in ("Huffman", "rANS", "adaptive"):
        assert found[last]["accuracy"] == found["values trained"]["accuracy"]
        assert found[last]["bytes"] <= sizes[3]
    for stage in found.values():
        parts = sum(stage[k] for k in ("values", "indices", "masks", "rest"))
        assert parts == stage["bytes"]


def test_lossless_sizes_and_entropies_of_a_small_model(monkeypatch):
    some = {"a": (0.03 * draw(64, 80)).bfloat16(), "b": (0.01 * draw(32, 64, seed=1)).bfloat16()}
    monkeypatch.setattr(lossless, "matrices", lambda model: some)
    for coder in (*lossless.CODERS, *lossless.GENERAL):
        record = lossless.sizes(model="minilm", coder=coder)
        assert 9 < record["bits_per_weight"] < 16
        assert record["weights"] == 64 * 80 + 32 * 64
    found = lossless.entropies(model="minilm")
    assert found["each"] <= found["whole"] <= found["exponent"] + 8
    high, low = lossless.planes(torch.tensor([1.0, -2.0]).bfloat16())
    assert (high.hex(), low.hex()) == ("3fc0", "8000")


def test_grids_with_a_step_for_each_column_decode_on_every_device(layer):
    code = water_filling_gptq(*layer, bits=3)
    plain = round_to_nearest(layer[0], spec=QuantSpec(3))
    assert code.decode().dtype == plain.decode().dtype
    assert torch.equal(code.to("cpu").decode(), code.decode())
