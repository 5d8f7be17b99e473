"""Ternary and sign weights: the reference, the best scale by brute force, and exact products.

tests/data/bitnet.npz holds what BitNet's inference code (commit 16da220) makes of the 256 x 512
weight and the first 32 inputs of scales.npz: levels plus one, mean |W|, and the levels and
multipliers of the inputs.
"""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.affine import Quantized
from compresskit.code import Array, Bits, Sum, Trits
from compresskit.integer import (
    MOST_INPUTS,
    Integer,
    integer_matmul,
    quantize_tokens,
    ternary_product,
)
from compresskit.methods import sign, ternary

DATA = Path(__file__).parent / "data"
LAYER, BITNET = np.load(DATA / "scales.npz"), np.load(DATA / "bitnet.npz")


def reference(name):
    return torch.from_numpy(BITNET[name])


@pytest.fixture
def layer():
    return torch.from_numpy(LAYER["weight"]), torch.from_numpy(LAYER["x"][:32]).float()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight, scale, levels):
    return (weight - scale * levels).square().sum().item()


# --- agreement ----------------------------------------------------------------------------------


def test_levels_and_scale_are_the_references(layer):
    code = ternary(layer[0])
    assert torch.equal(code.levels.tensor, reference("trits"))
    # its mean is taken in float32, ours in float64
    assert code.scale.tensor.item() == pytest.approx(BITNET["scale"].item(), rel=3e-7)


def test_rounded_inputs_are_the_references(layer):
    weight, x = layer
    levels, scale = quantize_tokens(x, steps=127.0)
    assert torch.equal(levels, reference("input_levels"))
    # the reference keeps the multiplier, 1 / scale
    torch.testing.assert_close(1 / scale, reference("input_scale"), rtol=3e-7, atol=0)
    expected = reference("input_levels") / reference("input_scale")
    torch.testing.assert_close(ternary(weight, inputs="token").rounded(x), expected)


def test_the_product_is_the_references(layer):
    weight, x = layer
    values = (reference("trits").double() - 1) * float(BITNET["scale"])
    rounded = reference("input_levels").double() / reference("input_scale").double()
    found = ternary(weight, inputs="token").product(x)
    # float32 scales, each within 2**-24 of the reference's, and one rounding of each product
    torch.testing.assert_close(found.double(), rounded @ values.T, rtol=1e-6, atol=1e-6)


# --- the best scale -----------------------------------------------------------------------------


def best_by_brute_force(weight):
    """Least squared error over all 3^n ternary vectors, each with its own best scale."""
    flat = weight.flatten().double()
    best = flat.square().sum().item()
    for levels in itertools.product((-1.0, 0.0, 1.0), repeat=len(flat)):
        t = torch.tensor(levels, dtype=torch.float64)
        if t.any():
            scale = (flat @ t) / (t @ t)
            best = min(best, error(flat, scale, t))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_no_ternary_matrix_is_closer_than_the_least_squares_one(seed):
    weight = normal(2, 4, seed=seed)
    found = (weight - ternary(weight, scale="least squares").decode()).square().sum().item()
    assert found == pytest.approx(best_by_brute_force(weight), rel=1e-5)


def test_absmean_is_not_the_best_scale():
    weight = normal(64, 64)
    errors = {
        scale: (weight - ternary(weight, scale=scale).decode()).norm() / weight.norm()
        for scale in ("absmean", "least squares")
    }
    assert errors["least squares"] < 0.9 * errors["absmean"]


@pytest.mark.parametrize("factor", [0.9, 0.99, 1.01, 1.1])
def test_no_other_scale_of_the_signs_of_centered_weights_is_closer(factor):
    half = normal(8, 16)
    weight = torch.cat([half, -half])  # of mean 0
    code = sign(weight)
    other = replace(code, scale=Array(code.scale.tensor * factor))
    assert (weight - code.decode()).norm() < (weight - other.decode()).norm()


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [ternary, partial(ternary, scale="least squares"), sign],
    ids=["absmean", "least squares", "sign"],
)
@pytest.mark.parametrize("power", [-20, -3, 5, 30])
def test_powers_of_two_go_through(method, power):
    weight = normal(12, 20)
    assert torch.equal(method(weight * 2.0**power).decode(), method(weight).decode() * 2.0**power)


def test_ternary_is_odd_and_idempotent():
    weight = normal(12, 20)
    assert torch.equal(ternary(-weight).decode(), -ternary(weight).decode())
    best = ternary(weight, scale="least squares")
    again = ternary(best.decode(), scale="least squares").decode()
    assert torch.equal(best.decode(), again)
    # absmean is not: zeros pull the mean below the scale, so a second pass shrinks the weights
    once = ternary(weight).decode()
    assert ternary(once).decode().abs().max() < once.abs().max()


def test_signs_are_taken_of_weights_less_their_mean():
    weight = normal(16, 16) + 10
    share = (sign(weight).levels.tensor == 1).float().mean()
    assert 0.4 < share < 0.6
    assert (weight > 0).all()
    assert sign(torch.tensor([[2.0, 2.0]])).decode().tolist() == [
        [-2.0, -2.0]
    ]  # as the paper has it


@pytest.mark.parametrize(
    "method",
    [ternary, partial(ternary, scale="least squares"), sign],
    ids=["absmean", "least squares", "sign"],
)
def test_a_matrix_of_zeros_stays_one(method):
    assert not method(torch.zeros(3, 5)).decode().any()


def test_sizes_are_those_of_five_trits_and_eight_signs_in_a_byte():
    assert ternary(normal(10, 101)).size_table() == {"levels": 202, "scale": 4, "zero": 1}
    assert sign(normal(10, 101)).size_table() == {"levels": 127, "scale": 4, "zero": 2}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ternary(torch.ones(2, 2), scale="max"), "'absmean', 'least squares'"),
        (lambda: ternary(torch.ones(2, 2), inputs="row"), "it must be"),
        (lambda: sign(torch.ones(2, 2), inputs="static"), "it must be"),
        (lambda: ternary(torch.ones(4)), "non-empty matrix"),
        (lambda: sign(torch.full((2, 2), torch.nan)), "NaN"),
        (lambda: Trits.of(torch.tensor([3])), "levels are 0, 1 and 2"),
        (lambda: Trits.of(torch.tensor([0.5])), "levels are 0, 1 and 2"),
        (lambda: Trits.of(torch.tensor([torch.nan])), "levels are 0, 1 and 2"),
        (lambda: Trits(torch.tensor([1])), "holds uint8"),
    ],
)
def test_other_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# --- products -----------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 70), st.integers(1, 9))
def test_additions_alone_give_the_integer_product(seed, t, n, m):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-128, 128, (t, n), dtype=torch.int8, generator=generator)
    trits = torch.randint(0, 3, (m, n), dtype=torch.uint8, generator=generator)
    signed = trits.to(torch.int8) - 1
    assert torch.equal(ternary_product(levels, trits), integer_matmul(levels, signed.T))


def test_swapped_signs_are_not_the_product():
    levels = torch.tensor([[3, -5]], dtype=torch.int8)
    trits = torch.tensor([[2, 0]], dtype=torch.uint8)
    assert ternary_product(levels, trits).tolist() == [[8]]
    assert ternary_product(levels, 2 - trits).tolist() == [[-8]]


@pytest.mark.parametrize(
    ("levels", "trits", "match"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), "int8"),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 2), "are needed"),
        (torch.ones(2, 3, dtype=torch.int8), torch.full((4, 3), 3), "0, 1 or 2"),
        (torch.ones(2, 3, dtype=torch.int8), torch.full((4, 3), 0.5), "0, 1 or 2"),
    ],
)
def test_a_product_of_anything_else_is_refused(levels, trits, match):
    with pytest.raises(ValueError, match=match):
        ternary_product(levels, trits)


@pytest.mark.parametrize("n", [1, 7, 640, 4096])
def test_a_zero_point_of_one_half_is_exact(n):
    """Signs times rounded inputs: an integer, halved, and two scales."""
    code, x = sign(normal(5, n), inputs="token"), normal(3, n, seed=1)
    levels, scale = quantize_tokens(x, steps=127.0)
    signs = 2 * code.weight.levels.tensor.long() - 1
    whole = (levels.long() @ signs.T).double() / 2  # exact
    expected = (whole.float() * scale) * code.weight.scale.tensor.T
    assert torch.equal(code.product(x), expected)


@pytest.mark.parametrize("zero", [0.25, 1.0, 0.0])
def test_other_fractional_zero_points_are_refused(zero):
    code = sign(normal(3, 4), inputs="token")
    fraction = Array(torch.full((1, 1), zero, dtype=torch.float16))
    with pytest.raises(ValueError, match="or 1/2"):
        replace(code, weight=replace(code.weight, zero=fraction))


def test_zero_points_that_are_formulas_or_differ_by_row_are_refused():
    code = sign(normal(3, 4), inputs="token")
    half = Array(torch.full((1, 1), 0.25))
    for zero in (Sum(half, half), Array(torch.full((3, 1), 0.5))):
        scale = code.weight.scale if zero.shape == (1, 1) else Array(torch.ones(3, 1))
        weight = Quantized(code.weight.levels, scale, zero, 4)
        with pytest.raises(ValueError, match="or 1/2"):
            replace(code, weight=weight)


def test_half_a_zero_point_is_for_one_bit_only():
    levels = Bits.of(torch.full((1, 4), 255), 8)
    half = Array(torch.full((1, 1), 0.5))
    with pytest.raises(ValueError, match="of 1-bit levels"):
        Integer(Quantized(levels, Array(torch.ones(1, 1)), half, 4))


def test_as_many_inputs_as_fit_are_exact_with_half_a_zero_point():
    code = sign(torch.tensor([1.0, -1.0]).repeat(1, MOST_INPUTS // 2), inputs="token")
    x = torch.ones(1, MOST_INPUTS // 2 * 2)
    assert code.product(x).item() == 0
    x[0, 1::2] = -1
    assert code.product(x).item() == pytest.approx(x.numel(), rel=1e-6)


def test_rounded_inputs_are_those_that_the_product_multiplies():
    for inputs in ("token", "tensor"):
        code, x = ternary(normal(6, 33), inputs=inputs), normal(2, 5, 33, seed=1)
        # two roundings more, of x to levels * scale and of each product
        torch.testing.assert_close(code.product(x), code.rounded(x) @ code.decode().T)
    with pytest.raises(ValueError, match="for 33 columns"):
        code.rounded(torch.ones(4))
    hot = replace(code, inputs="token", threshold=6.0)
    with pytest.raises(ValueError, match="threshold=None"):
        hot.rounded(x)


def test_trits_are_levels_to_a_bits_reader_too():
    assert Trits(torch.tensor([0, 2], dtype=torch.uint8)).decode().tolist() == [0, 2]
    assert Bits.of(torch.tensor([0, 2]), Trits.width).decode().tolist() == [0, 2]
