"""Adapters: agreement with PEFT, what is trained, switched, merged, and refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from compresskit import container, methods
from compresskit.affine import QuantSpec, fit_grid
from compresskit.code import packed
from compresskit.lowrank import Adapter
from compresskit.model import compress, layers
from compresskit.train import Shuffled, fit, lora

PEFT = Path(__file__).parent / "data" / "peft"
KINDS = ("lora", "rslora", "dora")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.block = nn.ModuleDict({"q": nn.Linear(20, 20), "v": nn.Linear(20, 8, bias=False)})

    def forward(self, x):
        return self.block["v"](self.block["q"](self.first(x).tanh()).tanh())


TARGETS = ["block.q", "block.v"]
everywhere = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(7, 12, generator=torch.Generator().manual_seed(1))


def random_adapters(model, names=TARGETS, seed=0, **options):
    """Adapters that do change something."""
    found = lora.start(model, names, **{"rank": 3, "alpha": 6, "seed": seed, **options})
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Adapter(
            a.a, 0.3 * torch.randn(a.b.shape, generator=generator), a.alpha, a.rank_stabilized,
            None if a.magnitude is None else 1.3 * a.magnitude,
        )
        for name, a in found.items()
    }  # fmt: skip


def reference(kind):
    tensors = load_file(PEFT / kind / "reference.safetensors")
    parts = {part: {} for part in ("base", "grad", "merged")}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if rest:
            parts[part][rest] = tensor
    model = Net()
    model.load_state_dict(parts["base"])
    return model, container.load_adapters(PEFT / kind), parts, tensors["x"], tensors["y"]


# --- agreement with PEFT ------------------------------------------------------------------------


@everywhere
def test_outputs_and_merged_weights_are_those_of_peft(kind):
    base, adapters, parts, x, y = reference(kind)
    model = lora.attach(base, adapters)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-6)
    merged = lora.merged(model)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, parts["merged"][name], rtol=0, atol=1e-6)
    torch.testing.assert_close(merged(x), y, rtol=0, atol=1e-6)


@everywhere
def test_gradients_are_those_of_peft(kind):
    base, adapters, parts, x, _ = reference(kind)
    model = lora.attach(base, adapters)
    model(x).square().mean().backward()
    theirs = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    theirs["magnitude"] = "lora_magnitude_vector.default.weight"
    compared = 0
    for layer in TARGETS:
        for name, parameter in model.get_submodule(layer).adapters["default"].named_parameters():
            expected = parts["grad"][f"base_model.model.{layer}.{theirs[name]}"]
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-6)
            compared += 1
    assert compared == len(parts["grad"])


def test_a_scale_of_alpha_instead_of_alpha_over_r_is_noticed():
    base, adapters, _, x, y = reference("lora")
    wrong = {n: Adapter(a.a, a.b, a.alpha * a.rank) for n, a in adapters.items()}
    assert (lora.attach(base, wrong)(x) - y).abs().max() > 0.1


@everywhere
def test_what_we_write_is_what_peft_wrote(kind, tmp_path):
    _, adapters, _, _, _ = reference(kind)
    assert adapters["block.q"].rank == 3
    assert adapters["block.v"].rank == 2
    assert adapters["block.v"].alpha == 7
    size = container.save_adapters(adapters, tmp_path)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, PEFT / kind)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, known = (
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (tmp_path, PEFT / kind)
    )
    assert config.keys() <= known.keys()
    for name in ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "bias"):
        assert config[name] == known[name]
    again = container.load_adapters(tmp_path)
    for name, adapter in adapters.items():
        assert torch.equal(again[name].delta(), adapter.delta())


# --- attaching and training ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rank_stabilized": True}, {"decompose": True}])
def test_fresh_adapters_change_nothing_and_only_they_are_trained(net, x, options):
    model = lora.attach(net, lora.start(net, TARGETS, rank=3, **options))
    torch.testing.assert_close(model(x), net(x))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == (6 if options.get("decompose") else 4)
    assert all(".adapters.default." in name for name in trained)
    assert all(p.requires_grad for p in net.parameters())  # the model given is left alone


def test_training_moves_the_adapters_and_not_the_base(net, x):
    model = lora.attach(net, lora.start(net, TARGETS, rank=4, alpha=8), dropout=0.1)
    goal = torch.randn(7, 8, generator=torch.Generator().manual_seed(2))
    batches = Shuffled(x, goal, size=7, steps=60)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = fit(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), batches, rate=1e-2)
    assert run.losses[-1] < 0.7 * run.losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".adapters." not in name)


def test_the_first_interval_is_that_of_the_reference(net):
    a = lora.start(net, ["block.q"], rank=20)["block.q"].a
    assert a.abs().max() <= 20**-0.5
    assert a.abs().max() > 0.9 * 20**-0.5
    assert abs(a.mean()) < 0.05
    assert not torch.equal(a, lora.start(net, ["block.q"], rank=20, seed=1)["block.q"].a)


def test_dropout_acts_in_training_alone(net, x):
    model = lora.attach(net, random_adapters(net), dropout=0.5)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_several_sets_share_one_base_and_are_switched(net, x):
    one, two = random_adapters(net, seed=1), random_adapters(net, ["first"], seed=2)
    model = lora.attach(lora.attach(net, one, name="one"), two, name="two")
    assert set(lora.names(model)) == {"one", "two"}
    alone = {n: lora.attach(net, a)(x) for n, a in (("one", one), ("two", two))}
    for name in ("one", "two", "one"):
        assert torch.equal(lora.use(model, name)(x), alone[name])
        assert lora.adapters(model).keys() == (one if name == "one" else two).keys()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all(f".adapters.{name}." in n for n in trained)
    assert torch.equal(lora.use(model, None)(x), net(x))
    with pytest.raises(ValueError, match="'three'"):
        lora.use(model, "three")


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"rank_stabilized": True}, {"decompose": True}, {"rank": 1}]
)
def test_a_merged_model_is_dense_and_computes_the_same(net, x, options):
    model = lora.attach(net, random_adapters(net, **options))
    merged = lora.merged(model)
    assert [type(m) for m in merged.modules()] == [type(m) for m in net.modules()]
    torch.testing.assert_close(merged(x), model(x))
    assert not torch.allclose(merged(x), net(x))


def test_what_was_merged_is_subtracted_again_up_to_rounding(net, x):
    adapters = random_adapters(net)
    model = lora.attach(net, adapters)
    back = lora.unmerged(lora.merged(model), adapters)
    assert (back.block["q"].weight - net.block["q"].weight).abs().max() < 1e-6
    half = copy.deepcopy(net).bfloat16()
    small = {n: Adapter(a.a, a.b * 1e-4, a.alpha) for n, a in adapters.items()}
    kept = lora.merged(lora.attach(half, small))
    delta = small["block.q"].delta()
    moved = kept.block["q"].weight.float() - half.block["q"].weight.float()
    assert (moved - delta).norm() > 0.5 * delta.norm()  # bfloat16 rounds most of it away


def test_a_small_update_vanishes_on_the_grid_of_its_base(net):
    spec = QuantSpec(4)
    grid = fit_grid(net.block["q"].weight, spec)
    base = compress(net, {"block.q": lambda w, s: grid.code(grid.nearest(w))})
    levels = base.block["q"].code.levels.tensor
    a = random_adapters(net, ["block.q"])["block.q"]
    for share, vanishes in ((0.49, True), (2.0, False)):
        factor = share * grid.scale.min() / a.delta().abs().max()
        model = lora.attach(base, {"block.q": Adapter(a.a, a.b * factor, a.alpha)})
        again = lora.merged(model, method=lambda w, s: grid.code(grid.nearest(w)))
        assert torch.equal(again.block["q"].code.levels.tensor, levels) == vanishes


# --- on a base of few bits ----------------------------------------------------------------------


def four_bits(model):
    return compress(
        model, dict.fromkeys(layers(model), lambda w, s: packed(methods.nf4(w, s, block=20)))
    )


@pytest.mark.parametrize("options", [{}, {"decompose": True}])
def test_gradients_pass_through_the_decoded_base(net, x, options):
    base = four_bits(net)
    adapters = random_adapters(net, **options)
    model = lora.attach(base, adapters)
    dense = copy.deepcopy(net)
    for name, layer in layers(dense).items():
        layer.weight.data = base.get_submodule(name).weight
    plain = lora.attach(dense, adapters)
    for m in (model, plain):
        m(x).square().mean().backward()
    torch.testing.assert_close(model(x), plain(x))
    for (name, ours), (_, usual) in zip(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        [(n, p) for n, p in plain.named_parameters() if p.requires_grad],
        strict=True,
    ):
        torch.testing.assert_close(ours.grad, usual.grad, msg=name)


def test_the_decoded_base_is_not_kept_for_the_gradient(net, x):
    model = lora.attach(four_bits(net), random_adapters(net))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x.requires_grad_())
    assert all(tuple(t.shape) not in {(20, 20), (8, 20), (20, 8), (20, 12)} for t in kept)


def test_a_merged_base_of_few_bits_is_dense_or_coded_again(net, x):
    model = lora.attach(four_bits(net), random_adapters(net))
    dense = lora.merged(model)
    torch.testing.assert_close(dense(x), model(x))
    assert type(dense.block["q"]) is nn.Linear
    coded = lora.merged(model, method=methods.nf4)
    assert coded.block["q"].code.nbytes < 4 * dense.block["q"].weight.numel()
    assert not torch.allclose(coded(x), model(x))


def test_merging_leaves_other_layers_as_they_are(net):
    base = four_bits(net)
    model = lora.attach(base, random_adapters(net, ["block.q"]), name="one")
    model = lora.attach(model, random_adapters(net, ["block.v"]), name="two")
    merged = lora.merged(model, "one")
    assert type(merged.block["q"]) is nn.Linear
    assert torch.equal(merged.block["v"].weight, base.block["v"].weight)
    assert merged.block["v"].code.nbytes == base.block["v"].code.nbytes
    assert all(p.requires_grad for p in merged.parameters())


# --- files and refusals -------------------------------------------------------------------------


def test_adapters_survive_a_file_and_fit_another_base(net, x, tmp_path):
    adapters = random_adapters(net)
    container.save_adapters(adapters, tmp_path / "new" / "folder")
    again = container.load_adapters(tmp_path / "new" / "folder")
    assert torch.equal(lora.attach(net, again)(x), lora.attach(net, adapters)(x))
    with pytest.raises(FileNotFoundError):
        container.load_adapters(tmp_path)


def changed(folder, **fields):
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: changed(f, peft_type="IA3"), "only LORA"),
        (lambda f: changed(f, bias="all"), "bias"),
        (lambda f: changed(f, fan_in_fan_out=True), "fan_in_fan_out"),
        (lambda f: changed(f, modules_to_save=["head"]), "modules_to_save"),
        (lambda f: changed(f, r=5), "rank 3"),
        (lambda f: changed(f, use_dora=True), "use_dora"),
        (lambda f: changed(f, rank_pattern={"(a+)+$": 3}), "only names"),
        (lambda f: changed(f, lora_alpha="much"), "holds no sound"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "holds no sound"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "holds no sound"),
        (lambda f: cut(f, 40), "holds no sound"),
        (lambda f: cut(f, -1), "holds no sound"),
        (lambda f: save_file({}, f / "adapter_model.safetensors"), "no adapter"),
        (lambda f: extra(f, "base_model.model.e.lora_embedding_A", torch.ones(2)), "belongs to no"),
        (lambda f: extra(f, f"{Q}.lora_A.weight", torch.ones(3, 20).int()), "floating-point"),
        (lambda f: extra(f, f"{Q}.lora_A.weight", torch.full((3, 20), torch.nan)), "NaN"),
        (lambda f: extra(f, f"{Q}.lora_A.weight", torch.ones(4, 20)), "must be"),
    ],
)
def test_damaged_or_foreign_files_are_refused(net, tmp_path, damage, reason):
    container.save_adapters(random_adapters(net), tmp_path)
    damage(tmp_path)
    with pytest.raises(container.ContainerError, match=reason):
        container.load_adapters(tmp_path)


Q = "base_model.model.block.q"


def cut(folder, end):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:end])


def extra(folder, name, tensor):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {name: tensor}, path)


def test_a_mixture_that_the_layout_cannot_say_is_refused(net, tmp_path):
    mixed = random_adapters(net, ["block.q"]) | random_adapters(net, ["block.v"], decompose=True)
    with pytest.raises(ValueError, match="folder of its own"):
        container.save_adapters(mixed, tmp_path)
    with pytest.raises(ValueError, match="no adapter"):
        container.save_adapters({}, tmp_path)


def test_bad_input_is_refused(net):
    good = random_adapters(net)
    for names in ([], ["block"], ["block.q", "nothing"]):
        with pytest.raises(ValueError, match="no linear layer"):
            lora.start(net, names, rank=2)
    for rank in (0, 9, 2.0):
        with pytest.raises(ValueError, match="use 1 to 8"):
            lora.start(net, ["block.v"], rank=rank)
    with pytest.raises(ValueError, match=r"whose matrix is \(20, 12\)"):
        lora.attach(net, {"first": good["block.q"]})
    with pytest.raises(ValueError, match="dropout=1"):
        lora.attach(net, good, dropout=1)
    for name in ("default", "no name", ""):
        with pytest.raises(ValueError, match="identifier"):
            lora.attach(lora.attach(net, good), good, name=name)
    with pytest.raises(ValueError, match="no adapters"):
        lora.adapters(net)
    with pytest.raises(ValueError, match="no adapters"):
        lora.merged(lora.use(lora.attach(net, good), None))


def test_tied_weights_and_rounded_inputs_are_refused(net):
    net.block["o"] = nn.Linear(20, 20)
    net.block["o"].weight = net.block["q"].weight
    with pytest.raises(ValueError, match="tied"):
        lora.attach(net, random_adapters(net, ["block.q"]))
    base = compress(Net(), {"block.q": methods.int8})
    with pytest.raises(ValueError, match="rounds its inputs"):
        lora.attach(base, random_adapters(base, ["block.q"]))


def test_what_an_adapter_cannot_be():
    with pytest.raises(ValueError, match="must be"):
        Adapter(torch.ones(2, 3), torch.ones(4, 3), 1.0)
    with pytest.raises(ValueError, match="NaN"):
        Adapter(torch.full((1, 2), torch.inf), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match="alpha"):
        Adapter(torch.ones(1, 2), torch.ones(2, 1), float("nan"))
    with pytest.raises(ValueError, match="magnitude"):
        Adapter(torch.ones(1, 2), torch.ones(2, 1), 1.0, False, torch.ones(3))
