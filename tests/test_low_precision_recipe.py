"""The experiments of chapters 10 and 11: that they are the ones described, on small cases."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from compresskit import theory
from compresskit.affine import QuantSpec
from compresskit.formats import gguf
from compresskit.methods import round_to_nearest, ternary
from compresskit.model import compress
from compresskit.recipes import block_formats, low_precision

STORED = Path(__file__).parents[1] / "book" / "results"


def records(name):
    return json.loads((STORED / f"{name}.json").read_text())["records"]


def test_trits_are_counted_as_stored_at_their_entropy_and_coded():
    weight = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(500, 600))
    model[0].weight.data = weight
    found = low_precision.trits(compress(model, {"0": ternary}, {}))
    levels = ternary(weight).levels.tensor
    share = levels.flatten().bincount() / levels.numel()
    assert found["stored"] == 1.6
    assert found["entropy"] == pytest.approx(float(theory.entropy(share)), rel=1e-6)
    assert found["zeros"] == pytest.approx(share[1].item(), rel=1e-6)
    # a prefix code of whole bytes is between the entropy and the bytes as they are
    assert found["entropy"] <= found["huffman"] <= 1.62
    few = compress(model, {"0": lambda w, s: ternary(w * (w.abs() > 2))}, {})
    assert low_precision.trits(few)["huffman"] < 0.6


def test_codes_without_trits_have_none_to_count():
    model = compress(
        nn.Sequential(nn.Linear(8, 4)),
        {"0": lambda w, s: round_to_nearest(w, spec=QuantSpec(4))},
        {},
    )
    assert low_precision.trits(model) == {}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: low_precision.from_scratch(weights="int4", seed=0, rate=1e-3), "'float32', 'ter"),
        (
            lambda: low_precision.fine_tuned(way="lsq", bits=4, seed=0, rate=1e-3),
            "'straight-through', 'learned steps', 'float32'",
        ),
        (lambda: low_precision.fine_tuned(way="float32", bits=4, seed=0, rate=1e-3), "bits=32"),
    ],
)
def test_other_settings_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("name", "keys", "chosen"),
    [
        ("10_from_scratch", ("weights",), low_precision.SCRATCH_RATES),
        ("10_qat", ("way", "bits"), low_precision.TUNED_RATES),
    ],
)
def test_the_rates_of_more_seeds_are_the_best_of_the_first(name, keys, chosen):
    first = [record for record in records(name) if record.get("seed") == 0]
    for arm, rate in chosen.items():
        arm = arm if isinstance(arm, tuple) else (arm,)
        tried = [record for record in first if tuple(record[key] for key in keys) == arm]
        assert min(tried, key=lambda record: record["calibration"])["rate"] == rate
        assert len(tried) > 1


def test_mixes_name_types_for_every_tensor_of_the_shipped_file():
    shapes = {name: blocks.shape for name, blocks in block_formats.shipped().tensors.items()}
    for name, mix in block_formats.MIXES.items():
        types = mix(shapes)
        assert list(types) == list(shapes)
        assert all(types[n] == "F32" for n, shape in shapes.items() if len(shape) == 1)
        divided = (shapes[n][-1] % gguf.TYPES[type].size == 0 for n, type in types.items())
        assert all(divided), name


def test_a_plan_names_the_layers_of_the_model_and_leaves_the_embedding():
    plan = block_formats.plan("Q4_K_M", weighted=True)
    assert len(plan) == 210
    assert plan["blocks.0.mlp.down"].keywords == {"type": "Q6_K", "weighted": True}
    assert plan["blocks.29.attn.v"].keywords["type"] == "Q8_0"  # 256 does not divide 576
    assert "embed" not in plan
