"""What is timed against each other computes the same, and the ratios are those of the rounds."""

from functools import partial

import pytest
import torch

from compresskit.recipes import latency


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_all_forms_of_a_masked_layer_compute_the_same(batch):
    outputs = {n: f() for n, f in latency.layer_functions(16, 24, 0.5, batch).items()}
    for name in ("CSR", "CSR, F.linear"):
        torch.testing.assert_close(outputs[name], outputs["zeros"], rtol=1e-5, atol=1e-5)
    assert outputs["zeros"].ne(outputs["dense"]).any()
    assert torch.equal(outputs["smaller"], outputs["dense"][:, :12])
    assert latency.layer_functions(16, 24, 0.9, batch)["smaller"]().shape == (batch, 2)


def test_a_sparse_layer_adds_its_bias_at_every_position():
    weight = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    layer = latency.SparseLinear(weight, torch.tensor([1.0, 5.0, 0.0]))
    x = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(layer(x), x @ weight.T + layer.bias)
    assert layer.matrix.col_indices().dtype == torch.int32
    assert layer.matrix.values().numel() == 2


@torch.no_grad()
def test_forms_of_a_model_have_the_zeros_and_the_sizes_that_are_said():
    model = latency.original("pydoc_lm")
    found = latency.forms("pydoc_lm", 0.5)
    assert list(found)[:4] == ["dense", "dense again", "zeros", "CSR"]
    assert list(found)[4:] == ["smaller", "neurons", "heads", "fewer blocks"]
    ids = torch.arange(32)[None]
    torch.testing.assert_close(found["CSR"](ids), found["zeros"](ids), rtol=1e-3, atol=1e-3)
    rows = found["zeros"].blocks[3].mlp.up.weight.eq(0).sum(1)
    assert set(rows.tolist()) == {model.config.width // 2}
    assert len(found["fewer blocks"].blocks) == 3
    half = len(model.blocks[0].mlp.up.weight) // 2
    assert len(found["neurons"].blocks[0].mlp.up.weight) == half
    assert len(found["heads"].blocks[0].attn.v.weight) == len(model.blocks[0].attn.v.weight) // 2
    assert torch.equal(model(ids), found["dense"](ids))


def test_ratios_are_of_medians_of_the_same_round():
    # each is called twice to warm up, then once in each of two rounds
    spent = {"dense": [9.0, 9.0, 2.0, 2.0], "other": [9.0, 9.0, 1.0, 3.0]}
    now = [0.0]

    def call(name):
        now[0] += spent[name].pop(0)

    functions = {name: partial(call, name) for name in spent}
    times = latency.against_first(functions, rounds=2, repeats=1, clock=lambda: now[0])
    assert times["dense"] == {"ms": 2000.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    assert times["other"] == {"ms": 2000.0, "ratio": 1.0, "low": 0.5, "high": 1.5}


def test_every_setting_is_run_once():
    settings = [tuple(sorted(s.items())) for s, _ in latency.tasks()]
    assert len(settings) == len(set(settings)) == (3 + 3) * 6 * 2
