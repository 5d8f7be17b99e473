"""Layers taken out of a model."""

import pytest
import torch
from torch import nn

from compresskit import models
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.surgery import keep_layers

SHAPE = DecoderConfig(vocab=16, width=16, layers=6, heads=2, kv_heads=1, hidden=24, context=8)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(SHAPE).eval()


IDS = torch.arange(8)[None]


@pytest.mark.parametrize("places", [[0, 2, 4], [5], [3, 1], range(6)])
def test_the_result_is_the_model_that_skips_the_others(model, places):
    small = keep_layers(model, "blocks", places)
    x = model.embed(IDS)
    for place in places:
        x = model.blocks[place](x)
    expected = nn.functional.linear(model.norm(x), model.embed.weight)
    assert torch.equal(small(IDS), expected)
    assert small.config.layers == len(small.blocks) == len(places)
    assert (len(model.blocks), model.config.layers) == (6, 6)


def test_the_copy_shares_nothing_with_the_model(model):
    small = keep_layers(model, "blocks", [0, 1])
    before = model(IDS)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(model(IDS), before)


def test_weights_that_are_shared_within_the_model_stay_shared(model):
    model.blocks[2].attn.k.weight = model.blocks[0].attn.k.weight
    model.blocks[4].attn_norm = model.norm
    small = keep_layers(model, "blocks", [0, 2, 4])
    assert small.blocks[0].attn.k.weight is small.blocks[1].attn.k.weight
    assert small.blocks[2].attn_norm is small.norm


def test_it_makes_a_sentence_encoder_smaller():
    encoder = models.minilm()
    small = keep_layers(encoder, "encoder.layer", [1, 3, 5])
    kept, whole = (sum(p.numel() for p in m.parameters()) for m in (small, encoder))
    assert whole - kept == 3 * sum(p.numel() for p in encoder.encoder["layer"][0].parameters())
    assert small.encode(["a text"]).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("stack", "places", "message"),
    [
        ("layers", [0], "no stack 'layers'; this model has blocks"),
        ("blocks", [], r"places=\[\] of 6 layers; name one or more of 0 to 5"),
        ("blocks", [0, 6], r"such as \[0, 2, 4\]"),
        ("blocks", [-1], "each once"),
        ("blocks", [1, 1], "each once"),
    ],
)
def test_layers_that_are_not_there_are_refused(model, stack, places, message):
    with pytest.raises(ValueError, match=message):
        keep_layers(model, stack, places)


def test_a_model_without_stacks_is_refused():
    with pytest.raises(ValueError, match="this model has none"):
        keep_layers(nn.Linear(2, 2), "blocks", [0])
