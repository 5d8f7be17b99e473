"""Training through a code: what is computed, where gradients go, and what is left at the end."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compresskit import affine, container, layers, losses
from compresskit.affine import Quantized, QuantSpec
from compresskit.methods import gptq, int8, llm_int8, nf4, round_to_nearest, sign, smooth, ternary
from compresskit.model import compress, decoded
from compresskit.train import Shuffled, converted, fit, learned_steps, quantization_aware

FOUR = QuantSpec(4, group_size=5)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(),
            nn.Linear(12, 3, bias=False),
        )  # fmt: skip


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.arange(8) % 3


def trained(model, steps=4):
    x, y = batch()
    fit(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), Shuffled(x, y, size=8, steps=steps))
    return model.eval()


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.ReLU(), layer)


PLANS = {
    "4 bits in groups": partial(round_to_nearest, spec=FOUR),
    "3 bits, least squares": partial(round_to_nearest, spec=QuantSpec(3), fit=affine.mse),
    "gptq without statistics": partial(gptq, spec=FOUR),
    "nf4": nf4,
    "ternary": ternary,
    "signs": sign,
    "ternary, 8-bit inputs": partial(ternary, inputs="token"),
    "signs, 8-bit inputs": partial(sign, inputs="token"),
    "int8 inputs": int8,
    "int8 inputs per tensor": partial(int8, inputs="tensor"),
}
every = pytest.mark.parametrize("name", PLANS)


def names_for(name):
    """Convolutions take codes of weights alone."""
    return ["3", "5"] if "inputs" in name else ["0", "3", "5"]


# --- what is computed ---------------------------------------------------------------------------


@every
def test_before_training_it_computes_what_compress_gives(name):
    model, (x, _), plan = net().eval(), batch(), dict.fromkeys(names_for(name), PLANS[name])
    small = compress(model, plan, {})
    assert torch.equal(quantization_aware(model, plan)(x), small(x))


@every
def test_the_converted_model_computes_the_same_bit_for_bit(name, tmp_path):
    plan = dict.fromkeys(names_for(name), PLANS[name])
    model, (x, _) = trained(quantization_aware(net(), plan)), batch(2)
    small = converted(model)
    assert torch.equal(small(x), model(x))
    container.save(small, tmp_path / "model")
    assert torch.equal(container.load(tmp_path / "model", net().eval())(x), model(x))
    # the same nodes as after the training, for the latent weights
    latent = model[3].parametrizations.weight.original
    assert [leaf.to_bytes() for leaf in small[3].code.leaves().values()] == [
        leaf.to_bytes() for leaf in PLANS[name](latent, None).leaves().values()
    ]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [None, 5, "tensor"])
def test_learned_steps_convert_bit_for_bit(bits, symmetric, group):
    spec = QuantSpec(bits, symmetric=symmetric, group_size=group)
    model = trained(learned_steps(net(), dict.fromkeys(["0", "3", "5"], spec)))
    x, _ = batch(2)
    small = converted(model)
    assert torch.equal(small(x), model(x))
    assert torch.equal(decoded(small)(x), model(x))
    assert isinstance(small[3].code, Quantized)
    assert small[3].code.scale.tensor.dtype == torch.float16


def test_learned_steps_start_at_the_fitted_grid():
    model, spec = net(), QuantSpec(4)
    start = learned_steps(model, {"3": spec})[3].parametrizations.weight[0]
    fitted = round_to_nearest(model[3].weight, spec=spec, fit=affine.mse)
    code = start.code(model[3].weight)
    assert torch.equal(code.decode(), fitted.decode())  # exp(log s) is s, once both are halves


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_below_the_smallest_normal_half_are_kept(symmetric):
    model, spec = net(), QuantSpec(4, symmetric=symmetric, group_size=16)
    model[3].weight.data *= 2.0**-12  # steps of about 5e-6
    found = converted(learned_steps(model, {"3": spec}))[3].code
    fitted = round_to_nearest(model[3].weight, spec=spec, fit=affine.mse)
    assert torch.equal(found.decode(), fitted.decode())


def test_a_model_that_is_one_layer_is_converted_too():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    aware = quantization_aware(nn.Linear(8, 4), {"": ternary})
    assert torch.equal(converted(aware)(x), aware(x))


def test_inputs_by_keyword_are_rounded_too():
    aware = quantization_aware(nn.Linear(8, 4), {"": int8})
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aware(input=x), aware(x))


def test_half_precision_training_sees_the_same_code():
    aware, (x, _) = quantization_aware(net(), {"3": ternary}), batch()
    usual = aware[3].weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(aware[3].weight, usual)
        assert aware(x).isfinite().all()


def test_learned_steps_are_learned_and_stay_positive():
    model = learned_steps(net(), {"3": QuantSpec(2)})
    steps = model[3].parametrizations.weight[0]
    before = steps.log_step.detach().clone()
    trained(model, steps=10)
    assert not torch.equal(steps.log_step, before)
    assert (converted(model)[3].code.scale.decode() > 0).all()


@pytest.mark.parametrize("log", [-18.0, 12.0, -200.0, 200.0])
def test_steps_that_leave_the_range_of_their_type_stop_at_its_end(log):
    aware, (x, _) = learned_steps(net(), {"3": QuantSpec(3)}), batch()
    aware[3].parametrizations.weight[0].log_step.data.fill_(log)
    assert aware(x).isfinite().all()
    assert torch.equal(converted(aware)(x), aware(x))


@pytest.mark.parametrize("bits", [1, 4, 12])
def test_half_precision_models_keep_their_zero_points(bits):
    spec = QuantSpec(bits, symmetric=bits == 1)
    aware = learned_steps(net(), {"3": spec})
    zero = converted(aware)[3].code.zero.decode()
    assert torch.equal(converted(aware.bfloat16())[3].code.zero.decode(), zero)


def test_a_row_of_zeros_keeps_a_step_and_its_zeros():
    model = net()
    model[3].weight.data[2] = 0
    aware = learned_steps(model, {"3": QuantSpec(4, symmetric=True)})
    assert not aware[3].weight[2].any()
    assert torch.isfinite(trained(aware)[3].weight).all()


# --- where gradients go -------------------------------------------------------------------------


def test_the_gradient_of_the_decoded_weight_reaches_the_latent_one_unchanged():
    model, (x, y) = net(), batch()
    aware = quantization_aware(model, {"3": partial(round_to_nearest, spec=FOUR)})
    F.cross_entropy(aware(x), y).backward()
    plain = copy.deepcopy(model)
    plain[3].weight.data = aware[3].weight.detach()
    F.cross_entropy(plain(x), y).backward()
    assert torch.equal(aware[3].parametrizations.weight.original.grad, plain[3].weight.grad)
    assert torch.equal(aware[0].weight.grad, plain[0].weight.grad)


def test_gradients_through_rounded_inputs_are_those_of_the_rounded_product():
    layer = nn.Linear(6, 4)
    aware = quantization_aware(nn.Sequential(layer), {"0": partial(ternary, inputs="token")})
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    aware(x).backward(out)
    code = ternary(layer.weight, inputs="token")
    latent = aware[0].parametrizations.weight.original
    torch.testing.assert_close(x.grad, out @ code.decode())
    torch.testing.assert_close(latent.grad, out.T @ code.rounded(x))
    torch.testing.assert_close(aware[0].bias.grad, out.sum(0))
    # the unrounded inputs would be another gradient
    assert not torch.allclose(latent.grad, out.T @ x, rtol=1e-4)


def test_without_the_surrogate_nothing_would_be_learned():
    x = torch.tensor([0.2, 0.7], requires_grad=True)
    assert not torch.autograd.grad(x.round().sum(), x)[0].any()
    assert torch.autograd.grad(losses.straight_through(x.round(), x).sum(), x)[0].tolist() == [1, 1]


def test_straight_through_is_the_value_exactly_where_the_usual_sum_is_not():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    value = 0.8 * x.sign()
    assert torch.equal(losses.straight_through(value, x), value)
    assert not torch.equal(x + (value - x), value)


def test_values_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="must be equal"):
        losses.straight_through(torch.ones(2), torch.ones(3))


def test_fake_quantization_has_the_published_gradients():
    weight = torch.tensor([-3.0, -0.6, 0.0, 0.3, 5.0], requires_grad=True)
    scale, zero = torch.tensor([0.5], requires_grad=True), torch.tensor([4.0])
    value = losses.fake_quantize(weight, scale, zero, levels=8)
    assert value.tolist() == [-2.0, -0.5, 0.0, 0.5, 1.5]
    by_weight, by_scale = [], []
    for i in range(5):
        of_weight, of_scale = torch.autograd.grad(value[i], (weight, scale), retain_graph=True)
        by_weight.append(of_weight[i].item())
        by_scale.append(of_scale.item())
    assert by_weight == [0, 1, 1, 1, 0]  # clipped weights no longer matter
    # q - w/s inside the range, the outermost level outside
    assert by_scale == pytest.approx([-4, -1 + 1.2, 0, 1 - 0.6, 3], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"levels": 1}, "2 or more"),
        ({"levels": 2.5}, "2 or more"),
        ({"scale": torch.tensor([0.0])}, "above 0"),
        ({"scale": torch.tensor([torch.nan])}, "above 0"),
        ({"scale": torch.tensor([torch.inf])}, "and finite"),
    ],
)
def test_grids_that_are_none_are_refused(change, match):
    fields = {"scale": torch.ones(1), "zero": torch.zeros(1), "levels": 4} | change
    with pytest.raises(ValueError, match=match):
        losses.fake_quantize(torch.ones(3), **fields)


# --- the model ----------------------------------------------------------------------------------


def test_training_through_a_code_learns():
    """Two bits, on labels that a rounded random start gets wrong."""
    model = quantization_aware(net(), {"3": partial(round_to_nearest, spec=QuantSpec(2))})
    x, y = batch()
    before = F.cross_entropy(model(x), y).item()
    trained(model, steps=200)
    assert F.cross_entropy(model(x), y).item() < 0.5 * before


def test_the_original_is_left_alone():
    model = net()
    before = copy.deepcopy(model.state_dict())
    trained(quantization_aware(model, {"3": ternary}))
    trained(learned_steps(model, {"3": QuantSpec(3)}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert layers.is_layer(model[3])


def test_copies_do_not_share_their_hooks():
    aware = quantization_aware(net(), {"3": int8})
    x, _ = batch()
    twin = copy.deepcopy(aware)
    twin[3].parametrizations.weight.original.data.zero_()
    assert not torch.equal(twin(x), aware(x))
    assert torch.equal(converted(aware)(x), aware(x))


def test_an_embedding_can_be_trained_through_a_code():
    table = nn.Sequential(nn.Embedding(7, 10), nn.Linear(10, 2))
    aware = quantization_aware(table, {"0": partial(round_to_nearest, spec=FOUR)})
    ids = torch.arange(7)
    aware(ids).sum().backward()
    assert torch.equal(converted(aware)(ids), aware(ids))


def test_mode_is_kept():
    assert not converted(quantization_aware(net().eval(), {"3": ternary}))[3].training
    assert converted(quantization_aware(net(), {"3": ternary}))[3].training


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: quantization_aware(net(), {"7": ternary}), "the model has"),
        (lambda: learned_steps(net(), {"1": FOUR}), "the model has"),
        (
            lambda: learned_steps(quantization_aware(net(), {"3": ternary}), {"3": FOUR}),
            "computed from other parameters",
        ),
        (lambda: quantization_aware(net(), {"0": int8}), "only nn.Linear"),
        (lambda: quantization_aware(net(), {"3": llm_int8}), "threshold=None"),
        (lambda: quantization_aware(net(), {"3": partial(smooth, method=int8)}), "another basis"),
        (lambda: converted(net()), "no layer of this model"),
        (lambda: quantization_aware(tied(), {"0": ternary}), "is tied"),
        (lambda: learned_steps(tied(), {"0": FOUR}), "is tied"),
        (
            lambda: quantization_aware(
                nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
                {"0": ternary},
            ),
            "computed from other parameters",
        ),
        (lambda: learned_steps(net(), {"3": FOUR}, scale_dtype=torch.int8), "scale_dtype"),
    ],
)
def test_what_cannot_be_trained_through_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_on_a_gpu():
    model = quantization_aware(net().cuda(), {"3": partial(ternary, inputs="token")})
    x, y = (t.cuda() for t in batch())
    F.cross_entropy(model(x), y).backward()
    assert torch.equal(converted(model)(x), model(x))
