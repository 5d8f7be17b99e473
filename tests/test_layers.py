"""Layers as matrices: the matrix times the tokens is what the layer computes."""

import pytest
import torch
from torch import nn

from compresskit.code import Array
from compresskit.layers import as_matrix, compressed, is_layer, is_table, tokens

CONVOLUTIONS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": (2, 0), "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "dilation": 2},
    {"padding": "same", "padding_mode": "replicate"},
    {"padding": "valid", "dilation": (1, 2)},
    {"bias": False},
]


def layer_and_input(options):
    torch.manual_seed(0)
    if options is None:
        return nn.Linear(6, 4), torch.randn(2, 5, 6)
    return nn.Conv2d(3, 4, (3, 2), **options), torch.randn(2, 3, 8, 7)


@pytest.mark.parametrize("options", [None, *CONVOLUTIONS], ids=str)
@torch.no_grad()
def test_the_matrix_times_the_tokens_is_the_output(options):
    layer, x = layer_and_input(options)
    expected = layer(x)
    if isinstance(layer, nn.Conv2d):
        expected = expected.permute(0, 2, 3, 1)
    bias = 0 if layer.bias is None else layer.bias
    output = tokens(layer, x) @ as_matrix(layer).T + bias
    torch.testing.assert_close(output, expected.reshape(-1, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [None, *CONVOLUTIONS], ids=str)
@torch.no_grad()
def test_a_layer_with_its_own_weight_for_a_code_is_unchanged(options):
    layer, x = layer_and_input(options)
    module = compressed(layer, Array(as_matrix(layer)))
    assert torch.equal(module(x), layer(x))
    assert torch.equal(module.restored()(x), layer(x))
    assert torch.equal(compressed(layer, module.code)(x), layer(x))


def test_the_arrays_of_the_code_follow_the_module_to_another_device():
    layer, _ = layer_and_input(None)
    module = compressed(layer, Array(as_matrix(layer))).to("meta")
    assert module.code.tensor.device.type == "meta"


def test_the_decoded_weight_has_the_layers_shape():
    layer, _ = layer_and_input({})
    assert torch.equal(compressed(layer, Array(as_matrix(layer))).weight, layer.weight)


def test_a_table_of_its_own_rows_looks_up_the_same():
    table, index = nn.Embedding(5, 3, padding_idx=0), torch.tensor([[0, 4], [4, 2]])
    module = compressed(table, Array(as_matrix(table)))
    assert torch.equal(module(index), table(index))
    assert torch.equal(module.restored()(index), table(index))


def test_what_is_a_layer_a_table_or_neither():
    assert not is_layer(nn.Conv2d(4, 4, 3, groups=2))  # no single matrix
    assert not is_layer(nn.Embedding(3, 4))
    assert is_table(nn.Embedding(3, 4))
    assert not is_table(nn.Embedding(3, 4, max_norm=1.0))  # rescales rows in place
    assert not is_table(nn.Linear(3, 4))


def test_a_code_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 5\) for a layer whose matrix is \(4, 6\)"):
        compressed(nn.Linear(6, 4), Array(torch.zeros(4, 5)))
