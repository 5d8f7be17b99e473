"""Bases: what they do to inputs and weights is one and the same linear map."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from compresskit import container, linalg
from compresskit.affine import QuantSpec
from compresskit.basis import InBasis, Permutation, Rotation, Scales
from compresskit.code import Array, Bits, Sum
from compresskit.methods import round_to_nearest
from compresskit.model import compress
from compresskit.stats import InputStats


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def order(n, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


BASES = {
    "permutation": lambda n: Permutation.of(order(n)),
    "scales": lambda n: Scales(Array(normal(n, dtype=torch.float32).exp())),
    "rotation": lambda n: Rotation.random(n),  # 37 inputs are padded to 40
}
every = pytest.mark.parametrize("name", BASES)
width = pytest.mark.parametrize("n", [1, 2, 20, 37])


@every
@width
def test_its_products_are_those_of_the_matrix_that_it_decodes_to(name, n):
    basis = BASES[name](n)
    v = basis.decode().double()
    inverse = torch.linalg.pinv(v)
    x, weight = normal(3, 5, n, seed=1), normal(4, n, seed=2)
    assert tuple(v.shape) == basis.shape
    torch.testing.assert_close(inverse @ v, torch.eye(n, dtype=torch.float64))
    # 1e-6: the decoded matrix is float32
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(basis.apply(x), x @ v.T)
    close(basis.into(weight), weight @ inverse)
    close(basis.undo(basis.into(weight)), weight)


@every
def test_a_layer_in_a_basis_computes_the_same(name):
    basis, weight, x = BASES[name](37), normal(4, 37), normal(9, 37, seed=1)
    moved = basis.into(weight) @ basis.apply(x).T
    torch.testing.assert_close(moved, weight @ x.T, rtol=1e-9, atol=1e-9)


@every
def test_product_and_decoded_weight_agree(name):
    weight, x = normal(4, 37).float(), normal(2, 3, 37, seed=1).float()
    bias = normal(4, seed=2).float()
    basis = BASES[name](37)
    code = InBasis(round_to_nearest(basis.into(weight), spec=QuantSpec(4)), basis)
    expected = torch.nn.functional.linear(x, code.decode(), bias)
    torch.testing.assert_close(code.product(x, bias), expected)
    assert code.product(x.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
    assert code.shape == (4, 37)
    assert code.nbytes == code.code.nbytes + basis.nbytes


@every
def test_second_moments_in_a_basis_are_those_of_the_moved_inputs(name):
    x, basis = normal(200, 37).float(), BASES[name](37)
    stats = InputStats.of(x).in_basis(basis)
    moved = InputStats.of(basis.apply(x))
    torch.testing.assert_close(stats.second, moved.second, rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.second, stats.second.T)
    assert stats.count == 200
    if name == "rotation":
        assert stats.mean_abs.isnan().all()
        assert stats.max_abs.isnan().all()
    else:
        torch.testing.assert_close(stats.mean_abs, moved.mean_abs)
        torch.testing.assert_close(stats.max_abs, moved.max_abs)


@every
def test_the_output_error_is_the_same_in_every_basis(name):
    x, delta, basis = normal(200, 37).float(), normal(4, 37, seed=1).float(), BASES[name](37)
    stats = InputStats.of(x)
    moved = stats.in_basis(basis).distortion(basis.into(delta))
    torch.testing.assert_close(moved, stats.distortion(delta), rtol=1e-5, atol=0)


def test_moments_of_other_inputs_are_refused():
    with pytest.raises(ValueError, match="a basis of 37 inputs and moments of 36"):
        InputStats.isotropic(36).in_basis(Rotation.random(37))


def test_a_permutation_is_exact_and_pays_for_its_order():
    basis, x = Permutation.of(order(37)), normal(3, 37)
    assert torch.equal(basis.apply(x), x[:, order(37)])
    assert torch.equal(basis.undo(basis.apply(x)), x)
    assert basis.nbytes == -(-37 * 6 // 8)
    assert Permutation.of(order(256)).nbytes == 256
    assert Permutation.of(order(1)).nbytes == 1


def test_a_rotation_keeps_lengths_and_spreads_a_single_entry_evenly():
    basis = Rotation.random(37, seed=3)
    x = normal(5, 37)
    torch.testing.assert_close(basis.apply(x).norm(dim=1), x.norm(dim=1))
    spike = torch.zeros(37)
    spike[11] = 7
    torch.testing.assert_close(basis.apply(spike).abs(), torch.full((40,), 7 / 40**0.5))
    assert basis.nbytes == 5


def test_signs_depend_on_the_seed_alone():
    first, again, other = (Rotation.random(64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.decode(), again.decode())
    assert not torch.equal(first.decode(), other.decode())


@every
def test_it_survives_a_file_and_bases_nest(name, tmp_path):
    layer = torch.nn.Linear(37, 6)
    basis = BASES[name](37)

    def method(weight, stats):
        outer = Permutation.of(order(basis.shape[0], seed=1))
        inner = round_to_nearest(outer.into(basis.into(weight)), spec=QuantSpec(4))
        return InBasis(InBasis(inner, outer), basis)

    small = compress(layer, {"": method})
    container.save(small, tmp_path / "file")
    again, x = container.load(tmp_path / "file", layer), normal(5, 37).float()
    assert torch.equal(again(x), small(x))
    assert torch.equal(again.weight, small.weight)


HALVES = Array(torch.ones(3, dtype=torch.float16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Permutation.of(torch.tensor([0, 0, 2])), "must hold each of 0 to 2 once"),
        (lambda: Permutation(Bits.of(torch.tensor([1, 2, 3]), 2)), "must hold each of 0 to 2 once"),
        (lambda: Permutation(Bits.of(torch.zeros(1, 1), 1)), r"shape \(1, 1\); a stored array"),
        (lambda: Permutation(HALVES), "whole numbers in Bits"),
        (lambda: Scales(Array(torch.tensor([1.0, 0.0]))), "scales from 0 to 1; they must be"),
        (lambda: Scales(Array(torch.tensor([1.0, -2.0]))), "above 0 in the dtype"),
        (lambda: Scales(Array(torch.tensor([torch.nan]))), "must be finite"),
        (lambda: Scales(Array(torch.tensor([1e5]).half())), "scales from inf to inf"),
        (lambda: Scales(Array(torch.ones(2, 2))), r"\(n,\) with n >= 1"),
        (lambda: Scales(Array(torch.ones(0))), r"\(n,\) with n >= 1"),
        (lambda: Rotation(Bits.of(torch.ones(6), 1), 6), "order 6 .* there is one is 8"),
        (lambda: Rotation(Bits.of(torch.ones(8), 1), 9), "for 9 inputs"),
        (lambda: Rotation(Bits.of(torch.ones(8), 1), 0), "for 0 inputs"),
        (lambda: Rotation(Bits.of(torch.ones(8), 1), "7"), "for '7' inputs"),
        (lambda: InBasis(Array(torch.ones(2, 4)), Scales(HALVES)), "as many columns"),
        (lambda: InBasis(Array(torch.ones(3)), Scales(HALVES)), "as many columns"),
        (lambda: InBasis(Array(torch.ones(2, 3)), HALVES), "an? Array for a basis"),
    ],
)
def test_what_is_no_basis_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_basis_without_bytes_needs_no_values():
    """Layers keep their formula on the meta device, where there is nothing to check."""
    for make in BASES.values():
        code = InBasis(Array(torch.ones(2, make(8).shape[0])), make(8))
        assert code.to("meta").shape == (2, 8)


def test_a_code_in_a_basis_quantizes_inputs_if_the_inner_one_does():
    class Quantizing(Array):
        quantizes_inputs = True

    inner, basis = Array(torch.ones(2, 3)), Scales(Array(torch.ones(3)))
    assert not InBasis(inner, basis).quantizes_inputs
    assert replace(InBasis(inner, basis), code=Quantizing(torch.ones(2, 3))).quantizes_inputs


@pytest.mark.parametrize("n", [n for n in range(1, 130) if linalg.hadamard_order(n) == n])
def test_hadamard_matrices_have_orthogonal_rows_of_signs(n):
    matrix = linalg.hadamard(n)
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [1, 2, 12, 32, 64, 144, 240, 576])
def test_the_fast_transform_is_the_product_with_the_matrix(n):
    x, matrix = normal(2, 3, n), linalg.hadamard(n).double()
    torch.testing.assert_close(linalg.hadamard_transform(x), x @ matrix.T / n**0.5)
    transposed = linalg.hadamard_transform(x, transposed=True)
    torch.testing.assert_close(transposed, x @ matrix / n**0.5)
    there = linalg.hadamard_transform(x.float())
    assert there.dtype == torch.float32
    back = linalg.hadamard_transform(there, transposed=True)
    torch.testing.assert_close(back, x.float(), rtol=1e-5, atol=1e-5)


def test_orders_beside_powers_of_two_need_the_transpose():
    """Paley's matrix of order 12 is not symmetric: without `transposed` it undoes nothing."""
    x = normal(12)
    twice = linalg.hadamard_transform(linalg.hadamard_transform(x))
    assert not torch.allclose(twice, x, atol=0.1)


def test_the_next_order_is_the_smallest_that_can_be_built():
    """Products of the orders 2 and q + 1, by trial over all products up to 200."""
    primes = [q for q in range(3, 200) if q % 4 == 3 and all(q % d for d in range(2, q))]
    built = {1}
    for _ in range(8):
        built |= {a * b for a in built for b in [2, *(q + 1 for q in primes)] if a * b <= 256}
    for n in range(1, 200):
        assert linalg.hadamard_order(n) == min(order for order in built if order >= n)


@pytest.mark.parametrize(("n", "following"), [(3, 4), (28, 32), (0, 1), (92, 96)])
def test_an_order_that_cannot_be_built_is_refused_with_the_next(n, following):
    with pytest.raises(ValueError, match=f"order {n} can .* one is {following}$"):
        linalg.hadamard(n)
    if n:
        with pytest.raises(ValueError, match=f"one is {following}$"):
            linalg.hadamard_transform(torch.ones(2, n))


def test_gradients_pass_a_rotation_that_was_first_used_without_them():
    with torch.inference_mode():
        Rotation.random(24).apply(torch.ones(24))
    x = torch.ones(24, requires_grad=True)
    Rotation.random(24).apply(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize(("n", "following"), [(10**8 + 1, 100026368), (2**24, 2**24)])
def test_orders_of_any_size_are_found_at_once(n, following):
    """A file may name any: divisors up to the root are tried, not all numbers below."""
    assert linalg.hadamard_order(n) == following


@pytest.mark.parametrize("node", [Permutation, Scales, lambda code: Rotation(code, 4)])
def test_a_basis_is_made_of_stored_vectors_and_decodes_no_formula_to_be_checked(node):
    deep = Rotation(Bits.of(torch.zeros(4), 1), 4)
    for code in (deep, Sum(deep, deep), Array(torch.ones(4, 4)), Array(torch.ones(0))):
        with pytest.raises(ValueError, match="a stored array"):
            node(code)


def test_signs_are_bits_and_orders_whole_numbers():
    for signs in (Bits.of(torch.tensor([0, 7, 1, 0]), 3), Array(torch.tensor([1, torch.nan]))):
        with pytest.raises(ValueError, match="not 0 or 1"):
            Rotation(signs, 2)
    with pytest.raises(ValueError, match="whole numbers"):
        Permutation(Array(torch.tensor([1.0, 0.0])))


def test_no_factor_of_a_transform_is_as_large_as_the_transform():
    for n in [*range(1, 300), 11008, 18944, 60083]:
        order = linalg.hadamard_order(n)
        assert max(linalg._hadamard_factors(order), default=1) <= 256
        assert n <= order <= 1.3 * n + 3
    with pytest.raises(ValueError, match="no Hadamard matrix of order 5504"):
        linalg.hadamard_transform(torch.ones(5504))


def test_autocast_does_not_coarsen_a_rotation():
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    basis = Rotation.random(48)
    with torch.autocast("cpu", torch.bfloat16):
        inside = basis.apply(x)
    assert torch.equal(inside, basis.apply(x))


@pytest.mark.parametrize(
    "basis", [Permutation.of(torch.arange(8)), Scales(Array(torch.ones(8))), Rotation.random(8)]
)
@pytest.mark.parametrize("width", [1, 7, 12])
def test_a_product_with_another_number_of_inputs_is_refused(basis, width):
    code = InBasis(Array(torch.ones(3, 8)), basis)
    with pytest.raises(ValueError, match="for 8 columns"):
        code.product(torch.ones(2, width))


def test_half_precision_is_rotated_without_overflow():
    turned = linalg.hadamard_transform(torch.full((2048,), 40.0, dtype=torch.float16))
    assert turned.dtype == torch.float16
    assert turned[0].item() == pytest.approx(40 * 2048**0.5, rel=1e-3)
