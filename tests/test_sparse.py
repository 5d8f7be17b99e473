"""Patterns remove exact counts, and every way to write a mask gives the same mask back."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compresskit.affine import Quantized
from compresskit.code import Array, Bits
from compresskit.codebook import Codebook
from compresskit.methods import magnitude, masked
from compresskit.sparse import (
    MASK_CODES,
    Golomb,
    GroupRanks,
    Pattern,
    RunLengths,
    Sparse,
    lowest,
    mask_code,
    pooled_masks,
)

MASKS = (Golomb, GroupRanks, RunLengths)


def scores(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).abs()


def a_mask(shape, share, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99, 1])
@pytest.mark.parametrize("among", ["row", "layer", 4, 8, 5, 1])
def test_counts_are_exact_whatever_the_scores(sparsity, among):
    pattern = Pattern(sparsity, among=among)
    for values in (scores(7, 37), torch.zeros(7, 37), scores(7, 37).round(), scores(1, 1)):
        mask = pattern.mask(values)
        assert mask.dtype == torch.bool
        assert mask.shape == values.shape
        assert int((~mask).sum()) == pattern.removed(*values.shape)
        if among == "row":
            assert len(set(mask.sum(1).tolist())) == 1
        if isinstance(among, int):
            most = among - round(sparsity * among)
            for group in mask.split(among, 1):
                assert group.sum(1).tolist() == [min(most, group.shape[1])] * len(values)


def test_what_goes_is_lowest_by_comparison_with_a_full_sort():
    values = scores(6, 40).round(decimals=1)  # many ties
    for pattern in (Pattern(0.3), Pattern(0.6, among="layer"), Pattern(0.5, among=8)):
        size = {"row": 40, "layer": 240}.get(pattern.among, pattern.among)
        blocks = values.reshape(-1, size)
        kept = torch.ones_like(blocks, dtype=torch.bool)
        order = blocks.argsort(dim=1, stable=True)[:, : round(pattern.sparsity * size)]
        assert torch.equal(pattern.mask(values), kept.scatter(1, order, False).view(6, 40))


def test_of_equal_scores_the_first_goes_first():
    assert Pattern(0.5).mask(torch.ones(2, 4)).tolist() == [[False, False, True, True]] * 2
    assert lowest(torch.tensor([[1.0, 0.0, 0.0, 2.0]]), 1).tolist() == [[False, True, False, False]]


def test_the_mask_has_the_largest_sum_of_scores_of_all_masks_with_the_pattern():
    values = scores(2, 4)
    for pattern in (Pattern(0.5), Pattern(0.5, among="layer"), Pattern(0.5, among=2)):
        best = 0.0
        for bits in itertools.product([False, True], repeat=8):
            mask = torch.tensor(bits).view(2, 4)
            groups = {"row": mask, "layer": mask.view(1, 8), 2: mask.view(4, 2)}[pattern.among]
            if (groups.sum(1) == groups.shape[1] / 2).all():
                best = max(best, values[mask].sum().item())
        assert values[pattern.mask(values)].sum().item() == pytest.approx(best)


def test_a_threshold_at_the_quantile_does_not_remove_the_count_that_was_asked_for():
    """The rule of many snippets, rejected by the check that patterns pass."""

    def by_quantile(values, sparsity):
        return values > torch.quantile(values, sparsity)

    tied = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0]])
    assert int((~by_quantile(tied, 0.25)).sum()) == 5  # not 2
    assert int((~by_quantile(scores(1, 100), 0.25)).sum()) == 25
    assert int((~by_quantile(scores(1, 101), 0.0)).sum()) == 1  # not 0
    assert int((~Pattern(0.25).mask(tied)).sum()) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_type_are_compared_by_value(dtype):
    values = scores(5, 33).to(dtype)
    assert torch.equal(Pattern(0.4).mask(values), Pattern(0.4).mask(values.double()))


@pytest.mark.slow
def test_more_than_two_to_the_24_scores_are_counted_exactly():
    """torch.quantile stops there, and float32 counts no further by ones."""
    values = torch.rand(5, 2**22 + 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert values.numel() > 2**24
    mask = Pattern(0.5, among="layer").mask(values)
    assert int((~mask).sum()) == round(0.5 * values.numel())
    assert values[~mask].max() <= values[mask].min()  # thousands share the limit


@pytest.mark.parametrize("unit", ["row", "column"])
@pytest.mark.parametrize("size", [1, 3])
def test_whole_rows_and_columns_go_by_their_energy(unit, size):
    values = scores(6, 9)
    pattern = Pattern(1 / 3, among="layer", unit=unit, size=size)
    mask = pattern.mask(values)
    mask, energy = (mask, values.square()) if unit == "row" else (mask.T, values.T.square())
    whole = mask.all(1)
    assert torch.equal(whole, mask.any(1))
    units = energy.sum(1).view(-1, size).sum(1)
    kept = whole.view(-1, size)
    assert torch.equal(kept.all(1), kept.any(1))
    assert units[~kept[:, 0]].max() < units[kept[:, 0]].min()
    assert int((~mask).sum()) == pattern.removed(6, 9)


def test_global_pruning_takes_the_lowest_of_all_layers_together():
    layers = {"a": scores(4, 6), "b": 10 * scores(3, 5, 1)}
    masks = pooled_masks(layers, 0.5)
    both = torch.cat([m.flatten() for m in masks.values()])
    values = torch.cat([s.flatten() for s in layers.values()])
    assert int((~both).sum()) == round(0.5 * 39)
    assert values[~both].max() < values[both].min()
    assert masks["a"].float().mean() < masks["b"].float().mean()
    assert torch.equal(
        pooled_masks({"a": layers["a"]}, 0.5)["a"], Pattern(0.5, among="layer").mask(layers["a"])
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sparsity": 1.5}, "from 0 to 1"),
        ({"sparsity": math.nan}, "from 0 to 1"),
        ({"sparsity": "half"}, "from 0 to 1"),
        ({"sparsity": 0.5, "among": "column"}, "among='column'"),
        ({"sparsity": 0.5, "among": 0}, "among=0"),
        ({"sparsity": 0.5, "unit": "head"}, "unit='head'"),
        ({"sparsity": 0.5, "size": 2}, "weights go singly"),
        ({"sparsity": 0.5, "among": "layer", "unit": "row", "size": 0}, "size=0"),
        ({"sparsity": 0.5, "unit": "row"}, 'among="layer"'),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        Pattern(**arguments)


@pytest.mark.parametrize(("n", "m"), [(3, 2), (-1, 4), (2, 0), (1.0, 2)])
def test_groups_that_do_not_exist_are_refused(n, m):
    with pytest.raises(ValueError, match="two whole numbers"):
        Pattern.n_of_m(n, m)


@pytest.mark.parametrize(
    ("values", "reason"),
    [(torch.ones(3), "a matrix"), (torch.tensor([[1.0, torch.nan]]), "NaN")],
)
def test_scores_that_cannot_be_compared_are_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        Pattern(0.5).mask(values)


def test_units_that_do_not_fill_the_matrix_are_refused():
    with pytest.raises(ValueError, match="7 rows in units of 2"):
        Pattern(0.5, among="layer", unit="row", size=2).mask(scores(7, 4))


def test_no_layer_at_all_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        pooled_masks({}, 0.5)


@pytest.mark.parametrize("unit", [1e-25, 1.0, 1e30])
def test_whole_rows_are_compared_by_their_squares_at_any_scale(unit):
    rows = unit * torch.tensor([[3.0, 0, 0], [2, 2, 0], [1, 1, 1], [2.5, 0, 0]])
    kept = Pattern(0.5, among="layer", unit="row").mask(rows)
    assert kept[:, 0].tolist() == [True, True, False, False]


# --- masks ---------------------------------------------------------------------------------------


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=12)))
def test_any_mask_comes_back_from_the_bytes_of_every_code(mask):
    mask = torch.from_numpy(mask)
    for write in MASK_CODES.values():
        try:
            leaf = write(mask)
        except ValueError:
            assert write is MASK_CODES["group ranks"]
            continue
        data = leaf.to_bytes()
        again = type(leaf).from_bytes(data, leaf.header())
        assert len(data) == leaf.nbytes
        assert torch.equal(again.tensor, mask.to(torch.uint8))
        assert again.header() == leaf.header()


@given(st.integers(1, 16), st.data())
def test_runs_of_any_length_are_written_at_any_width(width, data):
    gaps = data.draw(st.lists(st.integers(0, 40), max_size=8))
    mask = torch.zeros(sum(gaps) + len(gaps) + 3, dtype=torch.uint8)
    mask[(np.cumsum(np.array(gaps, int) + 1) - 1).tolist()] = 1
    leaf = RunLengths(mask, width)
    assert torch.equal(RunLengths.from_bytes(leaf.to_bytes(), leaf.header()).tensor, mask)


@given(st.integers(1, 40), st.integers(0, 1), hnp.arrays(bool, st.integers(0, 80)))
def test_any_parameter_and_either_symbol_give_the_mask_back(parameter, symbol, mask):
    leaf = Golomb(torch.from_numpy(mask).to(torch.uint8), parameter, symbol)
    assert torch.equal(Golomb.from_bytes(leaf.to_bytes(), leaf.header()).tensor, leaf.tensor)


def test_golomb_by_hand():
    """M = 3: remainders 0, 10, 11 behind a quotient in unary, here in three pieces."""
    mask = torch.zeros(12, dtype=torch.uint8)
    mask[[0, 4, 11]] = 1  # distances less one: 0, 3, 6
    leaf = Golomb(mask, 3, 1)
    # unary 0, 10, 110; first bits of the remainders 0, 0, 0; no longer ones
    assert leaf.to_bytes() == bytes([0b01011000, 0b00000000])
    mask[:] = 0
    mask[[1, 4]] = 1  # distances less one: 1, 2: unary 0, 0; first bits 1, 1; last bits 0, 1
    assert Golomb(mask, 3, 1).to_bytes() == bytes([0b00000000, 0b11000000, 0b01000000])


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.05, 0.01])
def test_golomb_comes_within_three_percent_of_the_entropy(share):
    mask = a_mask((1000, 1000), share)
    p = mask.float().mean().item()
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    bits = 8 * Golomb.of(mask).nbytes / mask.numel()
    assert entropy < bits < 1.03 * entropy + 1e-4


def test_no_other_parameter_is_better_than_the_chosen_one():
    mask = a_mask((400, 500), 0.1)
    best = Golomb.of(mask)
    for parameter in range(1, 30):
        # three pieces, each padded to a byte; and the mask's own share differs from its mean
        assert best.nbytes <= Golomb(best.tensor, parameter, best.symbol).nbytes + 12


def test_a_mask_that_keeps_nearly_all_costs_what_its_opposite_costs():
    mask = a_mask((300, 300), 0.05)
    assert Golomb.of(mask).nbytes == Golomb.of(~mask).nbytes


def test_two_of_four_takes_two_thirds_of_a_bit():
    mask = Pattern.n_of_m(2, 4).mask(scores(96, 960))
    leaf = mask_code(mask)
    assert (type(leaf), leaf.n, leaf.m) == (GroupRanks, 2, 4)
    assert 8 * leaf.nbytes / mask.numel() == pytest.approx(2 / 3)
    assert 8 * leaf.nbytes / mask.numel() > math.log2(6) / 4
    all_patterns = torch.tensor(list(itertools.combinations(range(4), 2)))
    mask = torch.zeros(6, 4, dtype=torch.uint8).scatter(1, all_patterns, 1)
    leaf = GroupRanks(mask, 2, 4)
    assert torch.equal(GroupRanks.from_bytes(leaf.to_bytes(), leaf.header()).tensor, mask)


@pytest.mark.parametrize(
    ("share", "name"), [(0.5, "bitmap"), (0.1, "Golomb"), (0.01, "Golomb"), (0.9, "Golomb")]
)
def test_the_chooser_takes_the_smallest(share, name):
    mask = a_mask((64, 80), share)
    sizes = {}
    for key, write in MASK_CODES.items():
        try:
            sizes[key] = write(mask).nbytes
        except ValueError:
            continue
    assert min(sizes, key=sizes.get) == name
    assert mask_code(mask).nbytes == sizes[name]


def test_clustered_ones_are_cheaper_as_runs_than_golomb_code_believes():
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[:500] = True
    assert type(mask_code(mask)).__name__ == "RunLengths"


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, torch.nan])
def test_what_is_no_mask_is_refused(value):
    with pytest.raises(ValueError, match="zeros and ones"):
        mask_code(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Golomb(t, 3, 1),
        lambda t: RunLengths(t, 3),
        lambda t: GroupRanks(t, 1, 2),
    ],
)
def test_masks_of_another_type_are_refused(make):
    with pytest.raises(ValueError, match=r"use \w+\.of\(mask\)"):
        make(torch.zeros(4))


HEADERS = {
    Golomb: {"parameter": 3, "symbol": 1, "shape": [12], "places": 3, "unary": 6, "long": 0},
    RunLengths: {"width": 3, "shape": [12], "numbers": 3},
    GroupRanks: {"n": 2, "m": 4, "shape": [12]},
}


@pytest.mark.parametrize("kind", MASKS)
@given(st.data())
def test_damaged_bytes_and_headers_are_read_or_refused(kind, data):
    header = dict(HEADERS[kind])
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=2)):
        header[key] = data.draw(
            st.one_of(st.integers(-2, 20), st.none(), st.just("x"), st.just([3, 4]), st.just(2**40))
        )
    content = data.draw(st.binary(max_size=12))
    try:
        leaf = kind.from_bytes(content, header)
    except ValueError:
        return
    assert list(leaf.tensor.shape) == header["shape"]
    assert leaf.tensor.max() <= 1


@pytest.mark.parametrize("kind", MASKS)
def test_bytes_too_many_or_too_few_are_refused(kind):
    mask = torch.tensor([1, 0, 1, 0] * 3, dtype=torch.uint8)
    leaf = kind.of(mask)
    for data in (leaf.to_bytes()[:-1], leaf.to_bytes() + b"\0"):
        with pytest.raises(ValueError, match="bytes"):
            kind.from_bytes(data, leaf.header())


@pytest.mark.parametrize("share", [1e-4, 0.01, 0.3, 0.5, 0.97])
def test_bytes_are_counted_without_being_written(share):
    mask = a_mask((300, 700), share)
    for kind in (RunLengths, Golomb):
        leaf = kind.of(mask)
        assert leaf.nbytes == len(leaf.to_bytes())
    groups = GroupRanks.of(Pattern.n_of_m(2, 4).mask(scores(30, 700)))
    assert groups.nbytes == len(groups.to_bytes())


@pytest.mark.parametrize("kind", [RunLengths, Golomb])
def test_a_few_bytes_cannot_ask_for_a_terabyte(kind):
    header = kind.of(torch.zeros(3, dtype=torch.uint8)).header() | {"shape": [10**6, 10**6]}
    with pytest.raises(ValueError, match="a mask of 1000000000000 entries"):
        kind.from_bytes(b"", header)


def test_codes_that_no_mask_has_are_refused():
    golomb = Golomb(torch.tensor([0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.uint8), 3, 1)
    header = golomb.header()
    assert header["long"] == 2
    with pytest.raises(ValueError, match="no Golomb code"):
        Golomb.from_bytes(golomb.to_bytes(), header | {"long": 1})
    runs = RunLengths.of(torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="a place at 3 in a mask of 3"):
        RunLengths.from_bytes(runs.to_bytes(), runs.header() | {"shape": [3]})
    ranks = {"shape": [1, 4], "n": 2, "m": 4}
    assert GroupRanks.from_bytes((5).to_bytes(8, "little"), ranks).tensor.tolist() == [[1, 1, 0, 0]]
    for word in (6, (1 << 64) - 1):  # the rank of a second group; more than 24 ranks
        with pytest.raises(ValueError, match="more than the ranks"):
            GroupRanks.from_bytes(word.to_bytes(8, "little"), ranks)
    with pytest.raises(ValueError, match="fill groups of 2"):
        GroupRanks.from_bytes(bytes(8), {"shape": [3], "n": 1, "m": 2})


def test_sixty_four_ranks_of_two_fill_a_word():
    assert GroupRanks.of(torch.tensor([[1, 0] * 64])).nbytes == 8


def test_a_mask_of_one_entry_and_no_axis_is_written():
    assert mask_code(torch.tensor(True)).decode().tolist() == 1


# --- sparse codes --------------------------------------------------------------------------------


def test_values_stand_where_the_mask_is_one():
    weight, mask = scores(5, 7), a_mask((5, 7), 0.4)
    code = Sparse.of(weight, mask)
    assert torch.equal(code.decode(), weight * mask)
    assert code.shape == (5, 7)
    assert torch.equal(code.csr().to_dense(), code.decode())
    assert code.csr().col_indices().dtype == torch.int32
    assert code.nbytes == 4 * int(mask.sum()) + mask_code(mask).nbytes


def test_only_a_matrix_has_compressed_rows():
    with pytest.raises(ValueError, match="only a matrix"):
        Sparse.of(torch.ones(3), torch.ones(3, dtype=torch.bool)).csr()


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.ones(3, 4)])
def test_nothing_and_everything_can_be_kept(mask):
    code = Sparse.of(scores(3, 4), mask.bool())
    assert torch.equal(code.decode(), scores(3, 4) * mask)
    for path, leaf in code.leaves().items():
        again = type(leaf).from_bytes(leaf.to_bytes(), leaf.header())
        assert torch.equal(again.tensor, leaf.tensor), path


def test_a_formula_over_sparse_levels_is_zero_where_nothing_is_stored():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    levels = Sparse(Bits.of(torch.tensor([3, 0, 1]), 2), mask_code(mask))
    one, two = Array(torch.ones(2, 1)), Bits.of(torch.full((2, 1), 2), 2)
    quantized = Quantized(levels, one, two, 3)
    assert quantized.decode().tolist() == [[1.0, 0.0, -2.0], [0.0, -1.0, 0.0]]
    book = Codebook(levels, Array(torch.tensor([5.0, 6.0, 7.0, 8.0])))
    assert book.decode().tolist() == [[8.0, 0.0, 5.0], [0.0, 6.0, 0.0]]
    assert book.nbytes == 1 + 16 + levels.mask.nbytes


@pytest.mark.parametrize(
    ("weight", "mask", "dtype", "reason"),
    [
        (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool), torch.float32, "same shape"),
        (torch.ones(2, 2), torch.ones(2, 2), torch.float32, "bool mask"),
        (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), torch.float64, "dtype=torch.float6"),
        (torch.full((2, 2), 1e6), torch.ones(2, 2, dtype=torch.bool), torch.float16, "out of the"),
    ],
)
def test_parts_that_do_not_fit_are_refused(weight, mask, dtype, reason):
    with pytest.raises(ValueError, match=reason):
        Sparse.of(weight, mask, dtype=dtype)


def test_another_number_of_values_is_refused():
    with pytest.raises(ValueError, match="one value for each"):
        Sparse(Array(torch.ones(3)), mask_code(torch.tensor([[1, 0], [1, 0]])))


def test_a_mask_found_elsewhere_is_a_method():
    weight = scores(4, 6)
    mask = Pattern(0.5).mask(weight)
    assert torch.equal(
        masked(weight, mask=mask).decode(), magnitude(weight, pattern=Pattern(0.5)).decode()
    )
    assert masked(weight, mask=mask, dtype=torch.float16).values.tensor.dtype == torch.float16
    with pytest.raises(ValueError, match="same shape"):
        masked(weight, mask=mask[:2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        masked(weight * torch.nan, mask=mask)
