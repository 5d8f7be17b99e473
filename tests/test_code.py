"""Codes: sizes are lengths of bytes, leaves survive their bytes, formulas nest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.affine import Quantized, QuantSpec
from compresskit.code import Array, Bits, Sum, Trits, check_shape
from compresskit.methods import round_to_nearest


@pytest.fixture
def nested():
    """A quantized matrix plus a quantized residual."""
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    first = round_to_nearest(weight, spec=QuantSpec(2, group_size=4))
    return Sum(first, round_to_nearest(weight - first.decode(), spec=QuantSpec(3, symmetric=True)))


LEAVES = [
    Array(torch.tensor([[1.5, -2.0], [torch.inf, torch.nan]])),
    Array(torch.tensor(3.0, dtype=torch.bfloat16)),
    Array(torch.zeros(0, 5, dtype=torch.float16)),
    Bits.of(torch.arange(7), 3),
    Bits.of(torch.tensor([[40000, 1]]), 16),
    Bits.of(torch.zeros(2, 0), 1),
    Trits(torch.tensor([[2, 0, 1], [1, 2, 2]], dtype=torch.uint8)),
    Trits(torch.zeros(0, 3, dtype=torch.uint8)),
]


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_a_leaf_is_its_bytes_and_its_header(leaf):
    data = leaf.to_bytes()
    again = type(leaf).from_bytes(data, leaf.header())
    assert leaf.nbytes == len(data)
    assert again.to_bytes() == data
    assert again.shape == leaf.shape
    torch.testing.assert_close(again.decode(), leaf.decode(), rtol=0, atol=0, equal_nan=True)


def test_nbytes_is_the_length_of_all_leaves_bytes_at_any_depth(nested):
    stored = b"".join(leaf.to_bytes() for leaf in nested.leaves().values())
    assert nested.nbytes == len(stored) == sum(nested.size_table().values())
    assert list(nested.leaves()) == [
        f"{term}.{part}" for term in ("first", "second") for part in ("levels", "scale", "zero")
    ]


def test_map_rewrites_leaves_and_leaves_the_original_alone(nested):
    before = nested.decode()
    zeroed = nested.map(
        lambda path, leaf: Array(leaf.tensor * 0) if path.endswith("scale") else leaf
    )
    assert isinstance(zeroed.first, Quantized)
    assert zeroed.decode().abs().max() == 0
    assert torch.equal(nested.decode(), before)
    assert torch.equal(nested.map(lambda path, leaf: leaf).decode(), before)


def test_a_residual_code_is_closer_than_its_first_term(nested):
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    first = (weight - nested.first.decode()).square().sum()
    assert (weight - nested.decode()).square().sum() < 0.2 * first  # 3 bits more: about 1/50


def test_to_moves_every_leaf(nested):
    moved = nested.to("meta")
    assert {leaf.tensor.device.type for leaf in moved.leaves().values()} == {"meta"}


@given(st.lists(st.integers(0, 5), max_size=4))
def test_check_shape_counts_elements(shape):
    assert check_shape(shape) == (shape, torch.Size(shape).numel())


@pytest.mark.parametrize("shape", [None, "3", [1.0], [-1], [True], [1] * 9, {"a": 1}])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="list of at most 8 sizes"):
        check_shape(shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool])
def test_an_array_of_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        Array(torch.zeros(2, dtype=dtype))


def test_bits_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="3 bits hold 0 to 7"):
        Bits.of(torch.tensor([8]), 3)
    with pytest.raises(ValueError, match="3 bits hold 0 to 7"):
        Bits.of(torch.tensor([torch.nan]), 3)
    with pytest.raises(ValueError, match="whole numbers"):
        Bits.of(torch.tensor([0.5]), 3)
    with pytest.raises(ValueError, match="uint8 or int32"):
        Bits(torch.zeros(3), 3)


@pytest.mark.parametrize(
    ("leaf", "data", "header", "message"),
    [
        (Array, b"123", {"dtype": "float16", "shape": [1]}, "takes 2"),
        (Array, b"", {"dtype": "float8", "shape": [0]}, "float8"),
        (Array, b"", {"dtype": "float32", "shape": [2**40]}, "takes"),
        (Bits, b"1", {"width": 99, "shape": [1]}, "from 1 to 16"),
        (Bits, b"1", {"width": 4, "shape": [2**60]}, "take"),
        (Bits, b"1", {"shape": [1]}, "from 1 to 16"),
        (Trits, b"1", {"shape": [6]}, "1 bytes given for 6 trits"),
        (Trits, b"1", {"shape": [2**60]}, "1 bytes given"),
        (Trits, bytes([243]), {"shape": [5]}, "at most 242"),
        (Trits, bytes([1]), {"shape": [4]}, "padding"),
        (Trits, b"", {}, "shape None"),
    ],
)
def test_bytes_and_header_that_do_not_fit_are_refused(leaf, data, header, message):
    with pytest.raises(ValueError, match=message):
        leaf.from_bytes(data, header)


def test_a_sum_of_unequal_shapes_is_refused():
    with pytest.raises(ValueError, match="must be equal"):
        Sum(Array(torch.zeros(2, 3)), Array(torch.zeros(3)))


def test_the_shape_is_that_of_the_decoded_tensor(nested):
    for code in (nested, nested.first, nested.first.levels, nested.first.scale):
        assert code.shape == tuple(code.decode().shape)
