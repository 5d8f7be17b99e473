"""Whole models: collected once, compressed into a copy, every byte itemized."""

from functools import partial

import pytest
import torch
from torch import nn

from compresskit import model as cm
from compresskit.affine import Quantized, QuantSpec
from compresskit.code import Array
from compresskit.layers import Compressed, tokens
from compresskit.methods import round_to_nearest
from compresskit.stats import InputStats


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10), nn.Tanh(),
        nn.Linear(10, 3),
    )  # fmt: skip


@pytest.fixture
def x():
    return torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def int8(names):
    return dict.fromkeys(names, partial(round_to_nearest, spec=QuantSpec(8)))


def test_collect_sees_what_each_layer_multiplies(net, x):
    stats = cm.collect(net, [x])
    assert list(stats) == ["0", "4", "6"]
    assert stats["0"].count == 7 * 36
    seen = InputStats.of(tokens(net[0], x))
    torch.testing.assert_close(stats["0"].second, seen.second)


def test_collect_does_not_depend_on_the_batches_and_leaves_no_trace(net, x):
    net.train()
    whole, parts = cm.collect(net, [x]), cm.collect(net, x.split(3))
    for name in whole:
        torch.testing.assert_close(whole[name].second, parts[name].second, rtol=1e-4, atol=1e-6)
    assert net.training
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_many_small_batches_and_layers_that_work_in_place_are_seen_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5))

    class Overwrites(nn.Module):
        def forward(self, x):
            y = model(x)
            x.zero_()  # after the first layer has seen it
            return y

    x = torch.randn(2500, 5)
    expected = InputStats.of(x)
    wrapper = Overwrites()
    wrapper.model = model
    stats = cm.collect(wrapper, list(x.clone().split(7)))
    assert stats["model.0"].count == 2500
    torch.testing.assert_close(stats["model.0"].second, expected.second, rtol=1e-4, atol=1e-5)


def test_each_module_returns_to_its_own_mode(net, x):
    net.train()
    net[2].eval()
    cm.collect(net, [x])
    assert [module.training for module in net] == [i != 2 for i in range(7)]


def test_an_expert_that_gets_no_token_in_a_batch_is_no_error(net, x):
    stats = cm.collect(net[6:], [torch.zeros(0, 10), torch.randn(5, 10)])
    assert stats["6"].count == 5


def test_hooks_are_removed_when_the_model_fails(net):
    with pytest.raises(RuntimeError):
        cm.collect(net, [torch.zeros(1, 2, 3)])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_collect_can_be_limited_and_called_with_keywords(net, x):
    stats = cm.collect(net, [{"input": x}], run=lambda m, batch: m(**batch), names=["6"])
    assert list(stats) == ["6"]


def test_compress_changes_a_copy_of_the_named_layers_only(net, x):
    before = {name: p.clone() for name, p in net.named_parameters()}
    small = cm.compress(net, int8(["4"]))
    assert isinstance(small[4], Compressed)
    assert isinstance(small[6], nn.Linear)
    assert isinstance(net[4], nn.Linear)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())
    net.eval(), small.eval()
    assert not torch.equal(small(x), net(x))
    torch.testing.assert_close(small(x), net(x), rtol=0, atol=0.02)  # 8 bits


def test_decoded_computes_the_same_and_holds_dense_layers(net, x):
    small = cm.compress(net, int8(cm.layers(net))).eval()
    dense = cm.decoded(small)
    assert torch.equal(dense(x), small(x))
    assert not any(isinstance(module, Compressed) for module in dense.modules())


def test_methods_get_the_layers_own_matrix_and_statistics(net, x):
    seen = {}

    def spy(name, weight, stats):
        seen[name] = (weight.shape, None if stats is None else stats.count)
        return round_to_nearest(weight, stats, spec=QuantSpec(8))

    plan = {name: partial(spy, name) for name in cm.layers(net)}
    cm.compress(net, plan, cm.collect(net, [x], names=["0", "4"]))
    assert seen == {"0": ((4, 9), 252), "4": ((10, 144), 7), "6": ((3, 10), None)}


def test_the_size_table_itemizes_every_byte(net):
    table = cm.size_table(cm.compress(net, int8(["4"])))
    by_name = {(row.name, row.stored): row.nbytes for row in table.rows}
    assert by_name == {
        ("4", "Quantized.levels"): 1440,
        ("4", "Quantized.scale"): 20,
        ("4", "Quantized.zero"): 10,
        ("0.weight", "float32"): 144,
        ("0.bias", "float32"): 16,
        ("4.bias", "float32"): 40,
        ("6.weight", "float32"): 120,
        ("6.bias", "float32"): 12,
    }
    assert table.nbytes == sum(by_name.values())
    assert table.compressed_nbytes == 1470
    assert table.bits_per_weight == 8 * 1470 / 1440
    assert f"{table.nbytes:,}" in str(table).splitlines()[-1]


def test_an_uncompressed_model_is_counted_at_its_own_dtype(net):
    table = cm.size_table(net.half())
    assert table.nbytes == 2 * sum(p.numel() for p in net.parameters())
    assert table.bits_per_weight != table.bits_per_weight  # nothing is compressed: not a number


def test_a_model_that_is_one_layer_can_be_compressed():
    layer = nn.Linear(4, 3)
    small = cm.compress(layer, int8([""]))
    assert isinstance(small, Compressed)
    assert cm.size_table(small).nbytes == small.code.nbytes + 12
    assert isinstance(cm.decoded(small), nn.Linear)


def test_an_unknown_layer_is_refused_and_the_known_ones_listed(net, x):
    with pytest.raises(ValueError, match=r"\['5'\]; the model has \['0', '4', '6'\]"):
        cm.compress(net, int8(["5"]))
    with pytest.raises(ValueError, match="no layer is named"):
        cm.collect(net, [x], names=["nope"])


def test_a_layer_that_no_batch_reached_is_named(net):
    with pytest.raises(ValueError, match="no batch reached"):
        cm.collect(net, [])


def test_tables_are_compressed_without_statistics_and_refused_by_collect():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 2))
    index = torch.arange(20)
    assert list(cm.tables(model)) == ["0"]
    assert list(cm.collect(model, [index])) == ["1"]
    small = cm.compress(model, int8(["0"]), cm.collect(model, [index]))
    torch.testing.assert_close(small(index), model(index), rtol=0, atol=0.02)  # 8 bits
    with pytest.raises(ValueError, match="no layer is named"):
        cm.collect(model, [index], names=["0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_precision_stays_one(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 2), nn.Unflatten(1, (1, 1, 2)))
    model = model.append(nn.Conv2d(1, 2, (1, 2))).to(dtype)
    index = torch.arange(20)
    small = cm.compress(model, int8(cm.tables(model) | cm.layers(model)))
    assert small(index).dtype == dtype
    assert torch.equal(cm.decoded(small)(index), small(index))
    stored = small[1].code.decode()
    moved = small.to(torch.float32)
    assert moved(index).dtype == torch.float32
    assert torch.equal(moved[1].code.decode(), stored)
    assert moved[1].code.scale.tensor.dtype == torch.float16


def test_a_code_is_not_changed_through_the_model_that_holds_it():
    code = round_to_nearest(torch.randn(3, 4), spec=QuantSpec(4))
    before = code.decode()
    small = cm.compress(nn.Linear(4, 3), {"": lambda w, s: code})
    small.load_state_dict({k: torch.zeros_like(v) for k, v in small.state_dict().items()})
    assert torch.equal(code.decode(), before)
    assert small.code.decode().abs().max() == 0


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_weight_that_is_computed_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="computed from other parameters"):
        cm.compress(model, int8(["0"]))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_with_a_forward_of_its_own_is_no_layer():
    assert cm.layers(nn.Sequential(Doubled(4, 3), nn.Linear(3, 2))).keys() == {"1"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_weight_is_counted_once_and_not_compressed_behind_its_twin():
    tied = Tied()
    assert cm.size_table(tied).nbytes == 80
    with pytest.raises(ValueError, match="tied"):
        cm.compress(tied, int8(["head"]))


class Whole(Quantized):
    """Inputs rounded to whole numbers first."""

    quantizes_inputs = True

    def product(self, x, bias=None):
        return super().product(x.round(), bias)


def whole(weight, stats):
    code = round_to_nearest(weight, spec=QuantSpec(8))
    return Whole(code.levels, code.scale, code.zero, code.group_size)


class Chain(nn.Module):
    """Blocks in a stack, after a layer that is not in it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.stack = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5)) for _ in range(3)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.stack:
            x = block(x)
        return x


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def rows():
    return list(torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(1)))


def test_in_order_each_block_is_calibrated_on_the_compressed_ones_before_it(chain, rows):
    seen = {}

    def keep(name, weight, stats):
        seen[name] = stats
        return round_to_nearest(weight, stats, spec=QuantSpec(2))

    names = [f"stack.{i}.0" for i in range(3)]
    small = cm.compress_in_order(chain, {n: partial(keep, n) for n in names}, rows, stack="stack")
    assert chain.training
    assert small.stack[1][2].training
    assert isinstance(small.first, nn.Linear)
    with cm.evaluating(small):
        x = small.first(torch.cat(rows))
        for name, block in zip(names, small.stack, strict=True):
            torch.testing.assert_close(seen[name].second, InputStats.of(x).second)
            x = block(x)
            assert isinstance(block[0], Compressed)
    original = cm.collect(chain, rows)["stack.2.0"].second
    assert not torch.allclose(seen["stack.2.0"].second, original, rtol=1e-2)


def test_a_layer_that_is_no_linear_map_takes_no_code_that_quantizes_inputs(net):
    with pytest.raises(ValueError, match=r"only nn\.Linear layers"):
        cm.compress(net, {"0": whole})


def test_in_order_without_calibration_need_is_compress(chain, rows):
    plan = int8([f"stack.{i}.0" for i in range(2)])
    small = cm.compress_in_order(chain, plan, rows, stack="stack").eval()
    assert torch.equal(small(rows[0]), cm.compress(chain, plan).eval()(rows[0]))


def test_in_order_refuses_what_has_no_order(chain, rows):
    plan = int8(["stack.1.0"])
    with pytest.raises(ValueError, match="no stack 'blocks'; this model has stack"):
        cm.compress_in_order(chain, plan, rows, stack="blocks")
    with pytest.raises(ValueError, match=r"\['first'\] are not in the stack"):
        cm.compress_in_order(chain, int8(["first"]), rows, stack="stack")
    with pytest.raises(ValueError, match="no layer is named"):
        cm.compress_in_order(chain, int8(["stack.7.0"]), rows, stack="stack")
    with pytest.raises(ValueError, match="no batch"):
        cm.compress_in_order(chain, plan, [], stack="stack")
    with pytest.raises(ValueError, match="did not reach"):
        cm.compress_in_order(chain, plan, rows, stack="stack", run=lambda model, x: model.first(x))


def test_a_code_that_quantizes_inputs_stays_when_the_others_are_decoded(net, x):
    small = cm.compress(net, int8(["6"]) | {"4": whole})
    inputs = 3 * torch.randn(5, 144, generator=torch.Generator().manual_seed(2))
    assert torch.equal(small[4](inputs), small[4](inputs.round()))
    dense = cm.decoded(small)
    assert isinstance(dense[4], Compressed)
    assert isinstance(dense[6], nn.Linear)


class Gained(nn.Module):
    """x -> W x, times what the stack is told."""

    def __init__(self, pair=False):
        super().__init__()
        self.linear, self.pair = nn.Linear(8, 8), pair

    def forward(self, x, shift, *, gain=1.0):
        x = gain * self.linear(x) + shift
        return (x, None) if self.pair else x


class Told(nn.Module):
    def __init__(self, pair=False):
        super().__init__()
        self.stack = nn.ModuleList(Gained(pair) for _ in range(2))

    def forward(self, x):
        for block in self.stack:
            x = block(x, 0.5, gain=3.0)
            x = x[0] if isinstance(x, tuple) else x
        return x


def test_in_order_the_blocks_get_all_that_they_are_called_with():
    torch.manual_seed(0)
    model, x = Told(), torch.randn(40, 8)
    seen = {}

    def exact(name, weight, stats):
        seen[name] = stats
        return Array(weight)

    names = [f"stack.{i}.linear" for i in range(2)]
    cm.compress_in_order(model, {n: partial(exact, n) for n in names}, [x], stack="stack")
    for name, stats in cm.collect(model, [x]).items():
        torch.testing.assert_close(seen[name].second, stats.second)


def test_in_order_a_block_that_returns_more_than_a_tensor_is_refused():
    plan = {"stack.1.linear": lambda weight, stats: Array(weight)}
    with pytest.raises(ValueError, match="a block returned a tuple"):
        cm.compress_in_order(Told(pair=True), plan, [torch.randn(4, 8)], stack="stack")
