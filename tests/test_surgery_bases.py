"""Rotations and scales folded into a model: the same function of other weights."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from compresskit import container, data, models
from compresskit.affine import QuantSpec
from compresskit.methods import round_to_nearest
from compresskit.methods.smooth import smoothing_scale
from compresskit.model import collect, compress, decoded, layers
from compresskit.models.decoder import Decoder, DecoderConfig, sample
from compresskit.stats import InputStats
from compresskit.surgery import rotate, smooth, sources_of

SHAPE = DecoderConfig(vocab=16, width=24, layers=3, heads=4, kv_heads=2, hidden=40, context=12)
IDS = torch.arange(12)[None].repeat(2, 1)


def decoder(shape=SHAPE):
    """With norms' weights far from one, which have to be folded, and inputs with outliers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoder(shape).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand_like(parameter) + 0.5)
            model.embed.weight[:, 3] *= 30
    return model


@pytest.fixture
def model():
    return decoder()


def logits(model):
    with torch.no_grad():
        return model(IDS)


def same_function(a, b):
    # 1e-4: float32 sums over 24 to 40 terms in three blocks, in another order
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-4, atol=1e-4 * logits(b).abs().max())


def test_a_rotated_decoder_computes_the_same(model):
    rotated = rotate(model)
    same_function(rotated, model)
    for old, new in zip(layers(model).values(), layers(rotated).values(), strict=True):
        assert (old.weight - new.weight).norm() > 0.5 * old.weight.norm()
    assert torch.equal(rotated.embed.weight, model.embed.weight)
    assert torch.equal(rotated.norm.weight, model.norm.weight)
    assert (rotated.blocks[0].mlp_norm.weight == 1).all()


@pytest.mark.parametrize("left_out", ["attn_norm", "mlp_norm"])
def test_norms_that_are_not_folded_are_noticed(model, left_out):
    """Weights of norms do not commute with a rotation: one left in place changes the function."""
    rotated = rotate(model)
    with torch.no_grad():
        for old, new in zip(model.blocks, rotated.blocks, strict=True):
            getattr(new, left_out).weight.copy_(getattr(old, left_out).weight)
    assert not torch.allclose(logits(rotated), logits(model), rtol=0.01)


def test_a_model_in_float64_is_rotated_to_its_own_precision(model):
    model = model.double()
    torch.testing.assert_close(logits(rotate(model)), logits(model), rtol=1e-11, atol=1e-11)


def test_rotating_changes_neither_the_model_nor_its_state_dictionary(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotated = rotate(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rotated.state_dict().keys() - before.keys() == {"rotation.signs"}
    assert Decoder(SHAPE).load_state_dict(before).missing_keys == []


def test_seeds_give_other_rotations(model):
    first, again, other = (rotate(model, seed=seed).blocks[0].attn.q.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=0.1)


def test_rotation_spreads_outliers_of_the_stream(model):
    def peak(model):
        stats = collect(model, [IDS])["blocks.0.attn.q"]
        return (stats.max_abs.max() / stats.rms.square().mean().sqrt()).item()

    assert peak(rotate(model)) < 0.7 * peak(model)


def test_a_rotated_decoder_is_compressed_saved_and_sampled_like_any_other(model, tmp_path):
    rotated = rotate(model)
    method = partial(round_to_nearest, spec=QuantSpec(6))
    small = compress(rotated, dict.fromkeys(layers(rotated), method))
    container.save(small, tmp_path / "file")
    again = container.load(tmp_path / "file", rotate(decoder(), seed=5))
    assert torch.equal(logits(again), logits(small))
    assert torch.equal(logits(decoded(small)), logits(small))
    text = sample(rotated, IDS[:, :3], 5, temperature=0)
    assert torch.equal(text, sample(model, IDS[:, :3], 5, temperature=0))


def test_models_whose_stream_cannot_be_rotated_are_refused(model):
    tied = decoder()
    tied.blocks[1].attn.q.weight = tied.blocks[0].attn.q.weight
    wide = Decoder(replace(SHAPE, width=56))
    small = compress(model, {"blocks.0.attn.q": partial(round_to_nearest, spec=QuantSpec(4))})
    for given, message in (
        (nn.Linear(2, 2), "a Linear; only the residual stream of a Decoder"),
        (rotate(model), "rotated already"),
        (small, "compressed; rotate it first"),
        (tied, "shares weights"),
        (wide, "width 56, .* there is one is 60"),
    ):
        with pytest.raises(ValueError, match=message):
            rotate(given)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_smoothed_decoder_computes_the_same(alpha, kv_heads):
    model = decoder(replace(SHAPE, kv_heads=kv_heads))
    smoothed = smooth(model, collect(model, [IDS]), alpha=alpha)
    same_function(smoothed, model)
    assert not torch.allclose(smoothed.blocks[0].mlp.gate.weight, model.blocks[0].mlp.gate.weight)


def test_channels_of_v_pass_to_o_only_if_no_heads_share_them():
    shared, own = (sources_of(decoder(replace(SHAPE, kv_heads=n))) for n in (2, 4))
    assert "blocks.0.attn.v" not in shared
    assert own["blocks.0.attn.v"] == ["blocks.0.attn.o"]
    assert own.keys() - shared.keys() == {f"blocks.{i}.attn.v" for i in range(3)}


def test_smoothing_levels_the_inputs_and_their_columns(model):
    stats = collect(model, [IDS])
    smoothed = smooth(model, stats)
    old, new = (collect(m, [IDS])["blocks.0.mlp.gate"].max_abs for m in (model, smoothed))
    gate, up = (smoothed.blocks[0].mlp.get_parameter(f"{n}.weight") for n in ("gate", "up"))
    readers = [model.blocks[0].mlp.gate.weight, model.blocks[0].mlp.up.weight]
    scale = smoothing_scale(stats["blocks.0.mlp.gate"].max_abs, readers)
    torch.testing.assert_close(new, old / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate, readers[0] * scale)
    # up gave channels to down afterwards: its rows are scaled, all columns by the same
    ratio = up / (readers[1] * scale)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert (old.max() / old.median()) > 2 * (new.max() / new.median())


def normed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = {"norm": nn.LayerNorm(6), "a": nn.Linear(6, 4), "b": nn.Linear(6, 3)}
        model = nn.ModuleDict(modules | {"other": nn.Linear(5, 2)})
    nn.init.normal_(model["norm"].bias)
    return model


def test_layers_behind_a_layer_norm_share_one_scale_and_its_bias_takes_part():
    model, x = normed(), torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    x[:, 2] *= 20
    stats = InputStats.of(model["norm"](x))
    smoothed = smooth(model, {"a": stats, "b": stats}, sources={"norm": ["a", "b"]})
    for name in ("a", "b"):
        expected = model[name](model["norm"](x))
        torch.testing.assert_close(smoothed[name](smoothed["norm"](x)), expected)
    assert not torch.allclose(smoothed["norm"].bias, model["norm"].bias)


def test_a_reader_left_out_is_noticed():
    """All layers that read a source have to be named: what one left out computes is another."""
    model, x = normed(), torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    smoothed = smooth(model, {"a": InputStats.of(x)}, sources={"norm": ["a"]})
    assert not torch.allclose(smoothed["b"](smoothed["norm"](x)), model["b"](model["norm"](x)))


KNOWN = {"a": InputStats.isotropic(6), "b": InputStats.isotropic(6)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": None}, "a ModuleDict; name the sources, for instance"),
        ({"sources": {"norm": ["c"]}}, r"no layer is named \['c'\]; the model has \['a', 'b'"),
        ({"sources": {"first": ["a"]}}, r"named \['first'\]; the model has \['norm', 'a'"),
        ({"sources": {"norm": ["other"]}}, r"no moments of \['other'\]"),
        ({"sources": {"a": ["b"]}}, "'a' has 4 outputs and its readers weights of shape"),
        ({"sources": {"norm": []}}, "there must be one or more"),
        ({"alpha": 2}, "alpha=2; it must be from 0 to 1"),
        (
            {"stats": {"a": InputStats.isotropic(5)}, "sources": {"norm": ["a"]}},
            r"moments of \[5\]",
        ),
    ],
)
def test_scales_that_cannot_be_folded_are_refused(arguments, message):
    options = {"stats": KNOWN, "sources": {"norm": ["a", "b"]}} | arguments
    with pytest.raises(ValueError, match=message):
        smooth(normed(), **options)


def test_compressed_sources_are_refused():
    method = partial(round_to_nearest, spec=QuantSpec(4))
    model = compress(normed(), {"other": method})
    with pytest.raises(ValueError, match="no norm or dense layer is named"):
        smooth(model, KNOWN, sources={"other": ["a"]})


@pytest.mark.slow
def test_smollm2_computes_the_same_after_a_rotation_that_takes_its_weights_off_their_grid():
    model, tokenizer = models.smollm2()
    rotated = rotate(model)
    tokens = torch.tensor(tokenizer.encode(data.pydoc_text()[:8000]).ids[:1025])
    with torch.no_grad():
        plain, turned = (m(tokens[None, :-1])[0] for m in (model, rotated))
    nats = [nn.functional.cross_entropy(x, tokens[1:]).item() for x in (plain, turned)]
    assert nats[1] == pytest.approx(nats[0], abs=1e-5)
    # float32 through 30 layers; logits reach about 40
    torch.testing.assert_close(turned, plain, rtol=0, atol=2e-3)

    def distinct(model):
        ordered = model.blocks[3].mlp.down.weight.detach().reshape(-1, 32).sort(dim=1).values
        return 1 + (ordered.diff(dim=1) != 0).sum(dim=1)

    assert distinct(model).max() <= 16
    assert (distinct(rotated) == 32).float().mean() > 0.999
