"""Chapter 8: every statement against a computation that does not use it, and false variants of it.

A check is a function of the formula under test. The true formula must pass it and a false one
must be rejected by the same check.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from compresskit import linalg, surgery
from compresskit.integer import MOST_TERMS
from compresskit.models import Decoder, DecoderConfig

# --- sums of int8 products ----------------------------------------------------------------------


def extremes(n):
    """The largest and smallest sums of n products of int8 levels, in Python's integers."""
    products = [p * q for p in (-128, 127) for q in (-128, 127)]
    return n * max(products), n * min(products)


def check_terms_of_int32(most):
    def fits(n):
        return all(-(2**31) <= total <= 2**31 - 1 for total in extremes(n))

    assert fits(most)
    assert not fits(most + 1)


@pytest.mark.theorem("prop-int8-sums")
def test_131071_products_of_int8_levels_fit_into_32_bits_and_one_more_does_not():
    check_terms_of_int32(131_071)
    assert MOST_TERMS == 131_071


@pytest.mark.false_variant("prop-int8-sums")
@pytest.mark.parametrize("most", [2**17, 133_144, 33_025])  # off by one; +-127; unsigned levels
def test_other_numbers_of_terms_are_not_the_largest_that_fits(most):
    with pytest.raises(AssertionError):
        check_terms_of_int32(most)


def check_terms_of_float32(most):
    """`most` terms are exact in any order tried; one more is wrong for a choice of levels."""
    rng = np.random.default_rng(0)
    choices = [np.full((2, most), -128), rng.integers(-128, 128, (2, most)), odd(most)]
    for p, q in choices:
        terms = (p * q).astype(np.float32)
        for order in (slice(None), slice(None, None, -1), rng.permutation(most)):
            total = np.add.accumulate(terms[order], dtype=np.float32)[-1]
            assert int(total) == int(p @ q)
    p, q = odd(most + 1)
    assert int(np.add.accumulate((p * q).astype(np.float32))[-1]) != p @ q


def odd(n):
    """Levels whose products are as large as possible, but for a first that is odd."""
    levels = np.full((2, n), -128)
    levels[:, 0] = 127
    return levels


@pytest.mark.theorem("prop-int8-sums")
def test_float32_sums_of_1024_products_are_exact_and_of_1025_are_not():
    check_terms_of_float32(1024)


@pytest.mark.false_variant("prop-int8-sums")
@pytest.mark.parametrize("most", [512, 1025, 2048])
def test_no_other_number_of_terms_is_where_float32_stops_being_exact(most):
    with pytest.raises(AssertionError):
        check_terms_of_float32(most)


@pytest.mark.theorem("prop-int8-sums")
def test_a_pair_of_products_fits_into_16_bits_only_within_127_and_with_both_factors_signed():
    def largest(low, high, shift=0):
        levels = itertools.product((low, 0, high), repeat=4)
        return max(abs((p + shift) * q + (r + shift) * t) for p, q, r, t in levels)

    assert largest(-128, 127) == 32_768 > 2**15 - 1
    assert largest(-127, 127) == 32_258 <= 2**15 - 1
    assert largest(-127, 127, shift=128) == 64_770 > 2**15 - 1


# --- migration of scales ------------------------------------------------------------------------


def check_homogeneous(function):
    """phi(S^-1 (A u + c)) = S^-1 phi(A u + c) for random layers and scales."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, c, u = rng.normal(size=(7, 5)), rng.normal(size=7), rng.normal(size=5)
        s = rng.lognormal(size=7)
        inside = function((a / s[:, None]) @ u + c / s)
        np.testing.assert_allclose(inside, function(a @ u + c) / s, rtol=1e-12, atol=1e-12)


def gelu(t):
    return 0.5 * t * (1 + np.vectorize(math.erf)(t / math.sqrt(2)))


@pytest.mark.theorem("thm-migration")
@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 0), (1, 0.1), (1, -1), (-2, 3)])
def test_scales_pass_through_functions_that_are_linear_on_both_sides_of_zero(a, b):
    check_homogeneous(lambda t: a * np.maximum(t, 0) - b * np.maximum(-t, 0))


@pytest.mark.false_variant("thm-migration")
@pytest.mark.parametrize(
    "function",
    [
        gelu,
        np.tanh,
        np.square,
        lambda t: np.maximum(t, 0) + 0.1,
        lambda t: np.maximum(t - 0.01, 0),
    ],
    ids=["GELU", "tanh", "square", "an offset", "a kink beside zero"],
)
def test_scales_pass_through_no_other_nonlinearity(function):
    with pytest.raises(AssertionError):
        check_homogeneous(function)


def check_migration(scaled):
    """W x, computed from the norm's outputs, is that of `scaled(W, gain, bias, s)`."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        w, u = rng.normal(size=(4, 9)), rng.normal(size=9)
        gain, bias, s = rng.normal(size=9), rng.normal(size=9), rng.lognormal(size=9)
        w2, gain2, bias2 = scaled(w, gain, bias, s)
        np.testing.assert_allclose(w2 @ (gain2 * u + bias2), w @ (gain * u + bias), rtol=1e-9)


@pytest.mark.theorem("thm-migration")
def test_scales_move_from_the_gain_and_the_bias_of_a_norm_into_the_weight():
    check_migration(lambda w, gain, bias, s: (w * s, gain / s, bias / s))


@pytest.mark.false_variant("thm-migration")
def test_scales_may_not_forget_the_bias_nor_multiply_the_rows():
    with pytest.raises(AssertionError):
        check_migration(lambda w, gain, bias, s: (w * s, gain / s, bias))
    with pytest.raises(AssertionError):
        check_migration(lambda w, gain, bias, s: (w * s[:4, None], gain / s, bias / s))


# --- the error of W8A8 products -----------------------------------------------------------------


def check_error(formula):
    """Against 200,000 dithered roundings of inputs and weights: 3 standard errors are 1 %."""
    rng = np.random.default_rng(0)
    for dx, dw in [(1.5, 0.9), (0.3, 0.1), (0.02, 1.2)]:
        x, w, s = rng.normal(size=6), rng.normal(size=6), rng.lognormal(size=6)
        draws = []
        for value, step in ((x / s, dx), (w * s, dw)):
            u = rng.uniform(-step / 2, step / 2, (200_000, 6))
            draws.append(step * np.round((value + u) / step) - u)
        error = (draws[0] * draws[1]).sum(1) - x @ w
        assert abs(error.mean()) < 5 * error.std() / math.sqrt(len(error))
        assert np.mean(error**2) == pytest.approx(formula(x, w, s, dx, dw), rel=0.015)


def exact_error(x, w, s, dx, dw):
    return (
        dx**2 / 12 * np.sum(s**2 * w**2)
        + dw**2 / 12 * np.sum(x**2 / s**2)
        + len(x) * dx**2 * dw**2 / 144
    )


@pytest.mark.theorem("thm-w8a8")
def test_the_error_is_that_of_the_inputs_times_the_weights_and_of_the_weights_times_the_inputs():
    check_error(exact_error)


@pytest.mark.false_variant("thm-w8a8")
@pytest.mark.parametrize(
    "variant",
    [
        lambda x, w, s, dx, dw: exact_error(x, w, s, dx, dw) - len(x) * dx**2 * dw**2 / 144,
        lambda x, w, s, dx, dw: exact_error(x, w, 1 / s, dx, dw),
        lambda x, w, s, dx, dw: exact_error(x, w, np.ones(6), dx, dw),
        lambda x, w, s, dx, dw: exact_error(x, w, s, dw, dx),
    ],
    ids=["no second order", "s inverted", "no s", "steps exchanged"],
)
def test_the_error_has_its_second_order_and_its_scales_on_the_right_side(variant):
    with pytest.raises(AssertionError):
        check_error(variant)


def check_ranges(scales):
    """`scales(a, b)` reaches the least product of the two ranges, which no other scales beat."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = rng.lognormal(sigma=2, size=12), rng.lognormal(sigma=2, size=12)
        least = np.max(a * b)
        for _ in range(30):
            s = rng.lognormal(sigma=3, size=12)
            assert (a / s).max() * (b * s).max() >= least * (1 - 1e-12)
        s = scales(a, b)
        assert (a / s).max() * (b * s).max() == pytest.approx(least, rel=1e-9)


@pytest.mark.theorem("prop-ranges")
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_every_alpha_reaches_the_least_product_of_the_ranges(alpha):
    check_ranges(lambda a, b: a**alpha / b ** (1 - alpha))


@pytest.mark.theorem("prop-ranges")
def test_only_one_half_equalizes_the_two_ranges_of_every_channel():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=12), rng.lognormal(size=12)
    for alpha in (0, 0.25, 0.5, 0.75, 1):
        s = a**alpha / b ** (1 - alpha)
        np.testing.assert_allclose(a / s, (a * b) ** (1 - alpha))
        np.testing.assert_allclose(b * s, (a * b) ** alpha)
        assert np.allclose(a / s, b * s) == (alpha == 0.5)


@pytest.mark.theorem("prop-ranges")
def test_a_common_factor_of_the_scales_changes_no_term_of_the_error():
    rng = np.random.default_rng(0)
    x, w, s = rng.normal(size=6), rng.normal(size=6), rng.lognormal(size=6)
    for c in (1e-3, 7.0):
        assert exact_error(x, w, c * s, 0.1 / c, 0.2 * c) == pytest.approx(
            exact_error(x, w, s, 0.1, 0.2)
        )


@pytest.mark.false_variant("prop-ranges")
def test_without_scales_or_with_either_side_alone_to_a_wrong_power_the_product_is_larger():
    with pytest.raises(AssertionError):
        check_ranges(lambda a, b: np.ones_like(a))
    with pytest.raises(AssertionError):
        check_ranges(lambda a, b: a**0.5)
    with pytest.raises(AssertionError):
        check_ranges(lambda a, b: (a * b) ** 0.5)


# --- rotations ----------------------------------------------------------------------------------


def rotation(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (n,), generator=gen).double() - 1
    return linalg.hadamard(n).double() / n**0.5 * signs


def rms_norm(u, gain):
    return gain * u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def layer_norm(u, gain):
    return rms_norm(u - u.mean(-1, keepdim=True), gain)


def network(parts, norm):
    """The residual network of the theorem, with functions that mix positions."""
    h, blocks, (head, last) = parts
    for read, gain, write in blocks:
        inner = norm(h, gain) @ read.T
        h = h + torch.softmax(inner @ inner.T, -1) @ inner.tanh() @ write.T
    return norm(h, last) @ head.T


def random_parts():
    gen = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    blocks = [(draw(9, 12), draw(12).exp(), draw(12, 9)) for _ in range(3)]
    return draw(5, 12), blocks, (draw(7, 12), draw(12).exp())


def fold(parts, v):
    one = torch.ones(12, dtype=torch.float64)
    h, blocks, (head, last) = parts
    blocks = [(read * gain @ v.T, one, v @ write) for read, gain, write in blocks]
    return h @ v.T, blocks, (head * last @ v.T, one)


def check_rotated(parts, norm=rms_norm):
    torch.testing.assert_close(
        network(parts, norm), network(random_parts(), norm), rtol=1e-9, atol=1e-9
    )


@pytest.mark.theorem("thm-rotation")
def test_a_rotated_residual_network_computes_the_same():
    check_rotated(fold(random_parts(), rotation(12)))


@pytest.mark.theorem("thm-rotation")
def test_a_tall_matrix_with_orthonormal_columns_changes_neither_products_nor_lengths():
    gen = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(s, generator=gen, dtype=torch.float64) for s in ((3, 5), (5, 2)))
    v = rotation(8)[:, :5]
    torch.testing.assert_close(weight @ v.T @ (v @ x), weight @ x)
    torch.testing.assert_close((v @ x).norm(dim=0), x.norm(dim=0))


@pytest.mark.theorem("thm-rotation")
def test_a_rotated_decoder_computes_the_same_logits():
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocab=17, width=24, layers=2, heads=2, kv_heads=1, hidden=20))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.2, 3)
    ids = torch.randint(17, (2, 9))
    torch.testing.assert_close(
        surgery.rotate(model.double())(ids), model(ids), rtol=1e-9, atol=1e-9
    )


@pytest.mark.false_variant("thm-rotation")
def test_gains_left_in_the_norms_a_subtracted_mean_or_a_shear_change_the_output():
    v, (h, blocks, _) = rotation(12), random_parts()
    kept = [(read @ v.T, gain, v @ write) for read, gain, write in blocks]
    last = fold(random_parts(), v)[2]
    with pytest.raises(AssertionError):
        check_rotated((h @ v.T, kept, last))
    with pytest.raises(AssertionError):
        check_rotated(fold(random_parts(), v), norm=layer_norm)
    shear = torch.eye(12, dtype=torch.float64)
    shear[0, 1] = 0.5
    with pytest.raises(AssertionError):
        check_rotated(fold(random_parts(), shear))
    folded = fold(random_parts(), v)[1]
    unwritten = [(read, gain, blocks[i][2]) for i, (read, gain, _) in enumerate(folded)]
    with pytest.raises(AssertionError):  # the results not turned
        check_rotated((h @ v.T, unwritten, last))


# --- incoherence --------------------------------------------------------------------------------

PATTERNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=16)), dtype=torch.float64)
FLAT = torch.ones(16, dtype=torch.float64)
VECTORS = {"spike": torch.eye(16, dtype=torch.float64)[2], "flat": FLAT, "row": None}


def check_vector_bound(bound, *, patterns=PATTERNS):
    """The share of all 65,536 sign patterns beyond `bound(n, delta)` |x| is at most delta."""
    h = linalg.hadamard(16).double() / 4
    for name, x in VECTORS.items():
        x = h[5] if name == "row" else x
        largest = (patterns * x @ h.T).abs().amax(1)
        for delta in (0.9, 0.5, 0.1, 0.02):
            share = (largest > bound(16, delta) * x.norm() * (1 + 1e-12)).double().mean()
            assert share <= delta


@pytest.mark.theorem("lem-incoherence")
def test_no_more_than_delta_of_all_sign_patterns_exceed_the_bound_for_a_vector():
    check_vector_bound(lambda n, delta: math.sqrt(2 / n * math.log(2 * n / delta)))


@pytest.mark.false_variant("lem-incoherence")
@pytest.mark.parametrize(
    "bound",
    [
        lambda n, delta: math.sqrt(1 / n * math.log(2 * n / delta)),
        lambda n, delta: math.sqrt(1 / n * math.log(n / delta)),
        lambda n, delta: math.sqrt(2 / n * math.log(2 / delta)),
    ],
    ids=["1/n for 2/n", "for one sign", "no union over the entries"],
)
def test_the_bound_needs_its_constant_and_its_union_over_entries(bound):
    with pytest.raises(AssertionError):
        check_vector_bound(bound)


@pytest.mark.false_variant("lem-incoherence")
def test_the_bound_needs_the_signs():
    with pytest.raises(AssertionError):
        check_vector_bound(
            lambda n, delta: math.sqrt(2 / n * math.log(2 * n / delta)), patterns=PATTERNS[-1:]
        )


def crests_of_rank_one():
    """All crest factors of U (1 1^T) V^T at 16 x 16 over all pairs of patterns, and their shares.

    U W V^T is the outer product of U 1 and V 1, so its largest entry is the product of theirs.
    """
    h = linalg.hadamard(16).double() / 4
    peaks = (PATTERNS @ h.T).abs().amax(1) / FLAT.norm()
    values, counts = peaks.round(decimals=6).unique(return_counts=True)
    shares = counts.double() / counts.sum()
    return 16 * values[:, None] * values, shares[:, None] * shares


def check_matrix_bound(bound):
    crests, shares = crests_of_rank_one()
    for delta in (0.9, 0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-6):
        assert shares[crests > bound(16, 16, delta) * (1 + 1e-9)].sum() <= delta


@pytest.mark.theorem("prop-incoherence")
def test_no_more_than_delta_of_all_pairs_of_sign_patterns_exceed_the_bound_for_a_matrix():
    check_matrix_bound(lambda m, n, delta: 2 * math.log(4 * m * n / delta))


@pytest.mark.theorem("prop-incoherence")
def test_the_crests_counted_by_rank_one_are_those_of_rotated_matrices():
    crests, shares = crests_of_rank_one()
    assert shares.sum().item() == pytest.approx(1)
    drawn = [rotation(16, s) @ torch.ones(16, 16).double() @ rotation(16, s + 99).T for s in (1, 2)]
    for turned in drawn:
        crest = turned.abs().max() / turned.square().mean().sqrt()
        assert (crests - crest).abs().min() < 1e-5


@pytest.mark.theorem("prop-incoherence")
@pytest.mark.parametrize("kind", ["gauss", "outliers", "spike"])
def test_the_crest_of_a_rotated_matrix_stays_below_the_bound_and_near_that_of_a_gaussian(kind):
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=gen)
    if kind == "outliers":
        weight.view(-1)[torch.randperm(64 * 128, generator=gen)[:8]] = 100.0
    if kind == "spike":
        weight = torch.zeros(64, 128)
        weight[3, 7] = 2.0
    bound = 2 * math.log(4 * 64 * 128 / 0.01)
    for seed in range(20):
        turned = rotation(64, seed).float() @ weight @ rotation(128, seed + 100).float().T
        crest = (turned.abs().max() / turned.square().mean().sqrt()).item()
        assert crest <= bound
        assert crest < 2 * math.sqrt(2 * math.log(64 * 128))


@pytest.mark.false_variant("prop-incoherence")
@pytest.mark.parametrize(
    "bound",
    [
        lambda m, n, delta: 0.75 * math.log(4 * m * n / delta),
        lambda m, n, delta: math.sqrt(2 * math.log(2 * m * n / delta)),
        lambda m, n, delta: 2 * math.log(4 / delta),
    ],
    ids=["0.75 for 2", "that of a vector of m n entries", "no union over the entries"],
)
def test_the_matrix_bound_needs_its_constant_its_power_and_its_union(bound):
    with pytest.raises(AssertionError):
        check_matrix_bound(bound)


@pytest.mark.theorem("prop-incoherence")
def test_rotated_on_one_side_only_a_spike_keeps_a_crest_of_the_root_of_its_rows():
    spike = torch.zeros(64, 128)
    spike[3, 7] = 1.0
    one_side = spike @ rotation(128).float().T
    assert (one_side.abs().max() / one_side.square().mean().sqrt()).item() == pytest.approx(8)
    assert rotation(64).float().matmul(one_side).abs().std() < 1e-6  # on both sides: flat
