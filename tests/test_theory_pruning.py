import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from compresskit.theory import (
    binary_entropy,
    bitmap_bits,
    bitmap_break_even,
    csr_bits,
    csr_break_even,
    entropy,
    entropy_break_even,
    golomb_bits,
    golomb_parameter,
    mask_bits,
    mask_bits_bounds,
    n_of_m_bits,
    n_of_m_removed_energy,
    pruned_entropy,
    removed_energy,
)

LAWS = {
    "normal": stats.norm(scale=0.02),
    "shifted": stats.norm(1, 1),
    "laplace": stats.laplace(scale=3),
    "student 5": stats.t(5),
    "student 3": stats.t(3, scale=0.1),
    "uniform": stats.uniform(-1, 2),
    "one-sided": stats.expon(),
}
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


# --- energy -------------------------------------------------------------------------------------


@every_law
def test_the_energy_is_that_of_the_smallest_of_many_quantiles(law):
    """A midpoint sum over |X| at 2,000,000 quantiles; tails of t(3) beyond them hold 0.3 %."""
    count = 2_000_000
    squares = np.sort(law.ppf((np.arange(count) + 0.5) / count) ** 2)
    total = law.var() + law.mean() ** 2
    for sparsity in (0.1, 0.5, 0.9, 0.99):
        expected = squares[: round(sparsity * count)].sum() / count / total
        assert removed_energy(sparsity, law) == pytest.approx(expected, rel=1e-4)


def test_none_and_all_of_the_energy_and_a_law_s_scale_does_not_matter():
    assert removed_energy([0.0, 1.0], stats.norm()).tolist() == [0.0, 1.0]
    wide = removed_energy([0.3, 0.8], stats.norm(scale=1e4))
    np.testing.assert_allclose(wide, removed_energy([0.3, 0.8], stats.norm(scale=1e-4)), rtol=1e-9)


def test_uniform_weights_lose_the_cube_of_the_sparsity():
    grid = np.linspace(0, 1, 11)
    np.testing.assert_allclose(removed_energy(grid, LAWS["uniform"]), grid**3, atol=1e-12)


def test_shares_keep_their_shape_and_may_be_a_tensor():
    assert removed_energy(torch.tensor([[0.5], [0.9]]), stats.norm()).shape == (2, 1)
    assert isinstance(removed_energy(0.5, stats.norm()), float)


@every_law
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4), (1, 2), (5, 8)])
def test_n_of_m_removes_the_mean_of_the_smallest_of_m(kept, group, law):
    """Against the order statistics' quantile integral, on 200,000 points; 0.2 % for heavy tails."""
    points = 200_000
    u = (np.arange(points) + 0.5) / points
    magnitude = np.sort(np.abs(law.ppf(u)))
    lost = sum(
        (magnitude**2 * stats.beta(i, group + 1 - i).pdf(u)).mean()
        for i in range(1, group - kept + 1)
    )
    expected = lost / group / (law.var() + law.mean() ** 2)
    assert n_of_m_removed_energy(kept, group, law) == pytest.approx(expected, rel=2e-3)


def test_n_of_m_removes_more_than_free_choice_and_tends_to_it():
    law = stats.norm()
    free = removed_energy(0.5, law)
    losses = [n_of_m_removed_energy(m // 2, m, law) for m in (2, 4, 8, 16, 512)]
    assert all(a > b for a, b in itertools.pairwise([*losses, free]))
    assert losses[-1] == pytest.approx(free, rel=0.01)
    assert n_of_m_removed_energy(4, 4, law) == 0
    assert n_of_m_removed_energy(0, 4, law) == 1


# --- masks --------------------------------------------------------------------------------------


def test_mask_bits_are_the_log_of_the_exact_binomial_coefficient():
    for count in (1, 2, 10, 200, 5000):
        for kept in {0, 1, count // 10, count // 2, count}:
            assert mask_bits(count, kept) == pytest.approx(
                math.log2(math.comb(count, kept)), rel=1e-12, abs=1e-12
            )
    few = mask_bits(10**12, 2)  # differences of log-gammas would keep four digits of it
    assert few == pytest.approx(math.log2(10**12 * (10**12 - 1) // 2), rel=1e-15)


def test_mask_bits_lie_within_the_bounds_for_every_count_up_to_60():
    for count in range(2, 61):
        for kept in range(1, count):
            lower, upper = mask_bits_bounds(count, kept)
            assert lower - 1e-12 <= mask_bits(count, kept) <= upper
            assert upper - lower == pytest.approx(math.log2(4 / math.pi) / 2)
    assert mask_bits_bounds(2, 1).lower == mask_bits(2, 1)  # the lower one is attained


def test_a_mask_at_90_percent_is_0_469_bits_per_weight():
    bits = mask_bits(10**6, 10**5)
    assert round(bits / 1e6, 3) == 0.469
    assert 10**6 * binary_entropy(0.9) - bits == pytest.approx(9.55, abs=0.01)


def test_the_entropy_of_a_pruned_weight_is_that_of_its_distribution():
    kept = np.array([0.4, 0.3, 0.2, 0.1])
    for sparsity in (0.0, 0.25, 0.9, 1.0):
        whole = [sparsity, *((1 - sparsity) * kept)]
        assert pruned_entropy(sparsity, entropy(kept)) == pytest.approx(entropy(whole))


# --- formats ------------------------------------------------------------------------------------


def test_formats_cost_what_their_parts_add_up_to():
    rows, columns, kept = 100, 400, 4000
    size = rows * columns
    csr = (kept * (16 + 32) + rows * 64) / size
    assert csr_bits(0.9, 16, 32, columns=columns, pointer_bits=64) == pytest.approx(csr)
    assert csr_bits(0.9, 16, 32) == pytest.approx(kept * 48 / size)
    assert bitmap_bits(0.9, 16) == pytest.approx((size + kept * 16) / size)
    assert n_of_m_bits(2, 4, 16) == 9
    information = mask_bits(4, 2) / 2
    assert n_of_m_bits(2, 4, 0, index_bits=information) == pytest.approx(math.log2(6) / 4)


@pytest.mark.parametrize("value_bits", [1, 2, 4, 16, 32, 200])
def test_at_the_break_even_sparsity_both_cost_the_same(value_bits):
    for index_bits in (4, 16, 32):
        s = csr_break_even(value_bits, index_bits)
        assert csr_bits(s, value_bits, index_bits) == pytest.approx(value_bits)
    assert bitmap_bits(bitmap_break_even(value_bits), value_bits) == pytest.approx(value_bits)
    s = entropy_break_even(value_bits)
    # With v bits in each, what the mask costs is what the zeros would have.
    assert binary_entropy(s) == pytest.approx(s * value_bits, rel=1e-9)
    assert s <= bitmap_break_even(value_bits) + 1e-12


def test_break_even_of_the_usual_formats():
    assert csr_break_even(16, 32) == pytest.approx(2 / 3)
    assert csr_break_even(4, 16) == 0.8
    assert bitmap_break_even([0.5, 4, 16]).tolist() == [1.0, 0.25, 0.0625]
    assert entropy_break_even(2) == pytest.approx(0.5)


# --- Golomb's code ------------------------------------------------------------------------------


def word_length(run, parameter):
    """Of Golomb's code, spelled out: unary quotient, then a truncated binary remainder."""
    quotient, rest = divmod(run, parameter)
    width = math.ceil(math.log2(parameter))
    return quotient + 1 + (width - 1 if rest < 2**width - parameter else width)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.7, 0.9, 0.97])
def test_the_mean_word_length_is_the_sum_over_all_runs(share):
    runs = range(2000)  # beyond: below 1e-26 of the probability
    for parameter in (1, 2, 3, 5, 7, 8, 23, 64):
        mean = sum((1 - share) * share**r * word_length(r, parameter) for r in runs)
        assert golomb_bits(share, parameter) == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.618, 0.619, 0.75, 0.9, 0.96, 0.99])
def test_no_other_parameter_is_better(share):
    best = golomb_bits(share)
    assert all(best <= golomb_bits(share, m) * (1 + 1e-12) for m in range(1, 200))
    m = golomb_parameter(share)
    assert share**m + share ** (m + 1) <= 1
    assert m == 1 or share ** (m - 1) + share**m > 1


@pytest.mark.parametrize("share", [0.8, 0.9, 0.95])
def test_golomb_s_code_is_as_short_as_huffman_s_of_the_same_source(share):
    """Huffman's code of the first 400 runs, the rest of which have a probability below 1e-9."""
    heap = sorted((1 - share) * share**r for r in range(400))
    total = 0.0
    while len(heap) > 1:
        merged = heap.pop(0) + heap.pop(0)
        total += merged
        heap.insert(np.searchsorted(heap, merged), merged)
    if share**400 < 1e-9:
        assert golomb_bits(share) == pytest.approx(total, rel=1e-6)


def test_golomb_s_code_is_within_5_percent_of_the_entropy_of_a_pruned_mask():
    for share in np.linspace(0.6, 0.999, 200):
        spent = (1 - share) * golomb_bits(share)
        assert binary_entropy(share) <= spent <= 1.05 * binary_entropy(share)


def test_golomb_lengths_satisfy_kraft_exactly():
    for parameter in (1, 3, 5, 8):
        # A period of M words, one bit longer each time: a geometric series.
        first = sum(Fraction(1, 2 ** word_length(r, parameter)) for r in range(parameter))
        assert first * 2 == 1


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: removed_energy(1.5, stats.norm()), "sparsity holds 1.5"),
        (lambda: removed_energy(float("nan"), stats.norm()), "NaN"),
        (lambda: removed_energy(0.5, stats.t(2)), "second moment inf"),
        (lambda: removed_energy(0.5, stats.cauchy()), "second moment nan"),
        (lambda: n_of_m_removed_energy(5, 4, stats.norm()), "5 of 4"),
        (lambda: n_of_m_removed_energy(2.0, 4, stats.norm()), "2.0 of 4"),
        (lambda: mask_bits(4, 5), "kept=5 of 4"),
        (lambda: mask_bits(4.0, 2), "kept=2 of 4.0"),
        (lambda: mask_bits_bounds(4, 0), "one mask"),
        (lambda: mask_bits_bounds(4, 4), "one mask"),
        (lambda: pruned_entropy(0.5, -1), "at least 0"),
        (lambda: bitmap_bits(-0.1, 4), "at least 0"),
        (lambda: csr_bits(0.5, 16, 16, columns=0), "columns=0"),
        (lambda: n_of_m_bits(2, 0, 16), "2 of 0"),
        (lambda: csr_break_even(0, 16), "value_bits holds 0"),
        (lambda: bitmap_break_even(0), "value_bits holds 0"),
        (lambda: entropy_break_even(0), "value_bits=0"),
        (lambda: entropy_break_even(1000), "value_bits=1000"),
        (lambda: golomb_parameter(1.0), "share=1.0"),
        (lambda: golomb_bits(-0.1), "share=-0.1"),
        (lambda: golomb_bits(0.5, 0), "parameter=0"),
        (lambda: golomb_bits(0.5, 1.5), "parameter=1.5"),
    ],
)
def test_wrong_numbers_are_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
