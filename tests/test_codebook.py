from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compresskit import bits, codebook, container
from compresskit.affine import QuantSpec
from compresskit.code import Array, Bits, Sum
from compresskit.codebook import TABLES, Codebook, lloyd, nearest, optimal_values
from compresskit.methods import fp4, kmeans, lloyd_max, nf4, round_to_nearest
from compresskit.model import compress
from compresskit.stats import InputStats

REFERENCE = np.load(Path(__file__).parent / "data" / "bitsandbytes.npz")


def reference(name):
    """What bitsandbytes 0.50.2 gave (tests/data/make_bitsandbytes_references.py)."""
    return torch.from_numpy(REFERENCE[name])


@pytest.fixture
def weight():
    return reference("weight").float()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def squared_error(values, levels, weights=None):
    distance = (values.double().reshape(-1, 1) - levels.double()).abs().amin(1)
    weights = torch.ones_like(distance) if weights is None else weights.double().reshape(-1)
    return (weights * distance.square()).sum().item()


# The node


def test_it_decodes_to_scale_times_entry_plus_offset():
    code = Codebook(
        Bits.of(torch.tensor([[0, 1, 2], [2, 1, 0]]), 2),
        Array(torch.tensor([-1.0, 0.5, 3.0, 9.0])),
        Array(torch.tensor([2.0, 10.0])),
        Array(torch.tensor(0.25)),
        block=4,
    )
    assert code.decode().tolist() == [[-1.75, 1.25, 6.25], [6.25, 5.25, -9.75]]
    assert code.size_table() == {"index": 2, "values": 16, "scale": 8, "offset": 4}


def test_a_table_for_each_row_serves_that_row():
    values = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    code = Codebook(Bits.of(torch.tensor([[0, 1, 1], [1, 0, 1]]), 1), Array(values))
    assert code.decode().tolist() == [[1, 2, 2], [40, 30, 40]]


def test_a_named_table_takes_no_bytes_and_a_learned_one_does():
    index = Bits.of(torch.arange(16).reshape(4, 4), 4)
    assert Codebook(index, "nf4").nbytes == 8
    assert Codebook(index, Array(TABLES["nf4"])).nbytes == 8 + 64


@settings(max_examples=50)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 40),
    block=st.integers(1, 50),
    wide=st.booleans(),
)
def test_the_compiled_and_the_plain_decoder_agree_bit_for_bit(rows, columns, block, wide):
    table = torch.randn(512 if wide else 16, generator=generator())
    index = torch.randint(0, len(table), (rows, columns), generator=generator(1))
    scale = torch.rand(-(-rows * columns // block), generator=generator(2))
    code = Codebook(Bits.of(index, 9 if wide else 4), Array(table), Array(scale), block=block)
    spread = scale.repeat_interleave(block)[: rows * columns].reshape(rows, columns)
    assert torch.equal(code.decode(), table[index] * spread)


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_tables_by_rows_and_scales_by_blocks_go_together(block):
    index = torch.randint(0, 8, (6, 41), generator=generator())
    table = torch.randn(6, 8, generator=generator(1))
    scale = torch.rand(-(-index.numel() // block), generator=generator(2))
    code = Codebook(Bits.of(index, 3), Array(table), Array(scale), block=block)
    spread = scale.repeat_interleave(block)[: index.numel()].reshape(6, 41)
    assert torch.equal(code.decode(), table.gather(1, index) * spread)


def test_it_survives_a_file_and_a_move(weight, tmp_path):
    layer = torch.nn.Linear(512, 64)
    layer.weight.data = weight
    small = compress(layer, {"": nf4})
    container.save(small, tmp_path / "layer")
    again = container.load(tmp_path / "layer", layer)
    assert torch.equal(again.code.decode(), nf4(weight).decode())
    assert torch.equal(again.code.to("cpu").decode(), nf4(weight).decode())


INDEX = Bits.of(torch.zeros(4, 4), 4)
REFUSED = {
    "no table 'nf5'": lambda: Codebook(INDEX, "nf5"),
    "values of shape": lambda: Codebook(INDEX, Array(torch.ones(3, 16))),
    "values of shape \\(\\)": lambda: Codebook(INDEX, Array(torch.tensor(1.0))),
    "a block goes with scales": lambda: Codebook(INDEX, "nf4", block=4),
    "scales with one": lambda: Codebook(INDEX, "nf4", Array(torch.ones(4))),
    "it must be 1 or more": lambda: Codebook(INDEX, "nf4", Array(torch.ones(4)), block=0),
    "need scales of shape \\(4,\\)": lambda: Codebook(INDEX, "nf4", Array(torch.ones(5)), block=4),
    "an offset of shape": lambda: Codebook(INDEX, "nf4", offset=Array(torch.ones(2))),
    "from 0 to 15": lambda: Codebook(Bits.of(torch.tensor([16]), 5), "nf4"),
    "from 0 to 2": lambda: Codebook(Bits.of(torch.tensor([3]), 2), Array(torch.ones(3))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_fields_that_do_not_belong_together_are_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_an_index_beyond_its_table_in_memory_is_refused_and_not_read(weight):
    """Bits holds whatever tensor it is given; a width that fits the table is no proof."""
    index = Bits(torch.full((4,), 200, dtype=torch.uint8), 4)
    for code in (Codebook(index, "nf4"), Codebook(index, "nf4", Array(torch.ones(1)), block=4)):
        with pytest.raises(ValueError, match="from 0 to 15"):
            code.decode()


HOSTILE = {
    "no table": {"values": "nf5"},
    "block=-1": {"block": -1},
    "block=64.0": {"block": 64.0},
    "scales with one": {"block": None},
    "need scales": {"block": 63},
    "the fields": {"extra": 1},
    "an offset of shape": {"offset": {"leaf": "Array", "dtype": "float32", "shape": [1]}},
    "from 0 to 7": {"values": {"leaf": "Array", "dtype": "float16", "shape": [8]}},
    "values of shape": {"values": {"leaf": "Array", "dtype": "float16", "shape": [0, 8]}},
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_tree_in_a_file_is_refused(message, weight):
    code = nf4(weight)
    stored = {f":{path}": {"data": leaf.to_bytes()} for path, leaf in code.leaves().items()}
    stored[":offset"] = {"data": bytes(4)}
    stored[":values"] = {"data": bytes(0 if "values of" in message else 16)}
    assert torch.equal(container._code(container._tree(code), stored, ":").decode(), code.decode())
    with pytest.raises(ValueError, match=message):
        container._code(container._tree(code) | HOSTILE[message], stored, ":")


# The standard tables and bitsandbytes


@pytest.mark.parametrize("name", [name for name in TABLES if name != "eighths"])
def test_the_tables_are_those_of_bitsandbytes_to_the_last_bit(name):
    assert torch.equal(TABLES[name].view(torch.int32), reference(name).view(torch.int32))


def test_eighths_of_octaves_are_powers_of_two():
    expected = torch.exp2((torch.arange(256, dtype=torch.float64) - 128) / 8)
    torch.testing.assert_close(TABLES["eighths"].double(), expected, rtol=1e-7, atol=0)
    assert TABLES["eighths"][128::8].log2().frac().eq(0).all()


def test_the_published_recipe_gives_the_nf4_table():
    """Quantiles between 0.9677083 and 1/2, eight cells on one side and seven on the other."""
    from scipy.stats import norm

    end = 0.9677083
    up, down = (norm.ppf(np.linspace(end, 0.5, n + 1)[:-1]) for n in (8, 7))
    table = np.sort(np.concatenate([up, [0.0], -down])) / norm.ppf(end)
    np.testing.assert_allclose(TABLES["nf4"], table, atol=2e-7)  # float32 quantiles in the table


def test_the_recipe_with_equal_cells_on_both_sides_is_rejected():
    from scipy.stats import norm

    end = 0.9677083
    up = norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    table = np.sort(np.concatenate([up, [0.0], -up[:-1]])) / norm.ppf(end)
    assert np.abs(TABLES["nf4"].numpy() - table).max() > 1e-3


METHODS = {"nf4": nf4, "fp4": fp4}
every_table = pytest.mark.parametrize("table", METHODS)


def inputs(name, weight):
    return {
        "float32": weight,
        "bfloat16": weight.bfloat16(),
        "ragged": weight.flatten()[None, :1000],
        "zeros": reference("zeros"),
    }[name]


def packed(code):
    return torch.from_numpy(np.frombuffer(code.index.to_bytes(), np.uint8).copy())


@every_table
@pytest.mark.parametrize("name", ["float32", "bfloat16", "ragged", "zeros"])
def test_bytes_scales_and_values_are_those_of_bitsandbytes(table, name, weight):
    code = METHODS[table](inputs(name, weight), double_quant=False)
    scale = reference(f"{table}_{name}_scale")
    assert torch.equal(packed(code), reference(f"{table}_{name}_packed"))
    assert torch.equal(code.scale.tensor, scale)
    decoded = reference(f"{table}_{name}_decoded")
    if name == "bfloat16":
        assert torch.equal(code.decode()[:8].bfloat16(), decoded.view(torch.bfloat16))
    else:
        assert torch.equal(code.decode()[:8], decoded)


@every_table
def test_the_bytes_agree_in_blocks_of_128(table, weight):
    assert torch.equal(packed(METHODS[table](weight, block=128)), reference(f"{table}_128_packed"))


@every_table
def test_double_quantization_agrees_but_where_the_reference_misses_the_nearest(table, weight):
    """The reference finds 8-bit indices through a table of its own that is off by one at times."""
    code = METHODS[table](weight).scale
    theirs = reference(f"{table}_double_index")
    torch.testing.assert_close(code.offset.tensor, reference(f"{table}_double_offset"))
    torch.testing.assert_close(code.scale.tensor, reference(f"{table}_double_scale"))
    ours = code.index.tensor
    rest = codebook.normalized(
        METHODS[table](weight, double_quant=False).scale.tensor - code.offset.tensor,
        code.scale.tensor,
        256,
    )
    other = ours != theirs
    assert other.float().mean() < 0.02
    distance = [(TABLES["dynamic8"][index.long()] - rest)[other].abs() for index in (ours, theirs)]
    assert (distance[0] < distance[1]).all()


@every_table
def test_doubly_quantized_bytes_of_the_reference_decode_to_its_values(table, weight):
    code = METHODS[table](weight)
    scale = Codebook(
        Bits(reference(f"{table}_double_index"), 8),
        "dynamic8",
        Array(reference(f"{table}_double_scale")),
        Array(reference(f"{table}_double_offset")),
        256,
    )
    theirs = Codebook(code.index, table, scale, block=64)
    torch.testing.assert_close(
        theirs.decode()[:8], reference(f"{table}_double_decoded"), rtol=3e-7, atol=0
    )  # a product and a sum in float32, rounded once or twice


@every_table
def test_the_sizes_are_those_of_the_paper(table, weight):
    entries, blocks = weight.numel(), weight.numel() // 64
    assert METHODS[table](weight, double_quant=False).nbytes == entries // 2 + 4 * blocks
    assert METHODS[table](weight).nbytes == entries // 2 + blocks + 4 * (blocks // 256) + 4


def test_the_two_zeros_of_fp4_decode_to_one():
    assert TABLES["fp4"][0] == TABLES["fp4"][8] == 0
    assert len(TABLES["fp4"].unique()) == 15


# Nearest entries


@settings(max_examples=60)
@given(st.integers(1, 60), st.sampled_from([torch.float32, torch.float64]))
def test_nearest_is_nearest(k, dtype):
    values = torch.randn(k, generator=generator(k), dtype=dtype)
    x = 2 * torch.randn(3000, generator=generator(k + 1), dtype=dtype)
    index = nearest(x, values)
    distance = (x[:, None] - values).abs()
    least = distance.amin(1)
    chosen = distance.gather(1, index.long()[:, None])[:, 0]
    slack = 4 * torch.finfo(dtype).eps  # thresholds are rounded
    assert (chosen <= least + slack * (x.abs() + values.abs().max())).all()


def test_ties_go_to_the_smaller_entry():
    assert nearest(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.0, -1.0])).tolist() == [1, 2]


def test_many_entries_are_indexed_in_int32():
    x = torch.arange(300.0)
    assert torch.equal(nearest(x, x), torch.arange(300, dtype=torch.int32))


# The optimal table


def brute_force(values, weights, k):
    """The least error over all ways to cut the sorted values into at most k intervals."""
    order = values.argsort()
    x, w = values[order].double(), weights[order].double()
    best = float("inf")
    for cuts in combinations(range(1, len(x)), min(k, len(x)) - 1):
        ends = [0, *cuts, len(x)]
        error = 0.0
        for a, b in pairwise(ends):
            mean = (w[a:b] @ x[a:b]) / w[a:b].sum()
            error += (w[a:b] @ (x[a:b] - mean).square()).item()
        best = min(best, error)
    return best


KINDS = {
    "random": lambda n, g: torch.randn(n, generator=g),
    "many ties": lambda n, g: torch.randint(0, 5, (n,), generator=g).float(),
    "evenly spaced": lambda n, g: torch.arange(n).float(),
    "far from 0": lambda n, g: 1e4 + torch.randn(n, generator=g),
    "outlier": lambda n, g: torch.cat([torch.randn(n - 1, generator=g), torch.tensor([1e6])]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_partition_has_a_smaller_error(kind, weighted):
    for seed in range(12):
        g = generator(seed)
        n = int(torch.randint(2, 10, (1,), generator=g))
        values = KINDS[kind](n, g)
        weights = torch.rand(n, generator=g) + 0.01 if weighted else torch.ones(n)
        for k in range(1, n + 1):
            levels = optimal_values(values, k, weights=weights)
            least = brute_force(values, weights, k)
            assert squared_error(values, levels, weights) == pytest.approx(least, 1e-6, 1e-7)


def test_a_partition_by_equal_counts_is_rejected_by_the_same_check():
    values = torch.randn(8, generator=generator())
    quantiles = torch.stack([part.mean() for part in values.sort().values.chunk(4)])
    assert squared_error(values, quantiles) > 1.01 * brute_force(values, torch.ones(8), 4)


@pytest.mark.parametrize("k", [2, 16, 256])
def test_the_optimum_is_a_fixed_point_of_lloyds_iteration(k):
    values = torch.randn(20_000, generator=generator())
    levels = optimal_values(values, k)
    torch.testing.assert_close(lloyd(values, levels), levels, rtol=0, atol=1e-12)
    assert (levels.diff() > 0).all()


@pytest.mark.parametrize("k", [3, 7, 8, 100])
def test_evenly_spaced_values_are_cut_evenly(k):
    """No price gives exactly k where several numbers of levels tie: the splice is at work."""
    n = 840
    levels = optimal_values(torch.arange(n), k)
    sizes = torch.tensor([n // k + (i < n % k) for i in range(k)]).double()
    within = ((sizes**3 - sizes) / 12).sum().item()
    assert squared_error(torch.arange(n), levels) == pytest.approx(within, 1e-12)


def test_more_levels_than_distinct_values_reproduce_them():
    levels = optimal_values(torch.tensor([3.0, 1.0, 3.0]), 5)
    assert levels.tolist() == [1, 3, 3, 3, 3]


def test_values_of_weight_zero_do_not_count():
    values, weights = torch.tensor([0.0, 1.0, 50.0]), torch.tensor([1.0, 1.0, 0.0])
    assert optimal_values(values, 2, weights=weights).tolist() == [0, 1]
    assert lloyd(values, torch.tensor([0.0, 1.5]), weights=weights).tolist() == [0, 1]


def test_an_integer_weight_is_a_repetition():
    values = torch.randn(30, generator=generator())
    times = torch.randint(1, 5, (30,), generator=generator())
    repeated = optimal_values(values.repeat_interleave(times), 6)
    torch.testing.assert_close(optimal_values(values, 6, weights=times.float()), repeated)


def test_lloyds_iteration_never_increases_the_error_and_is_never_below_the_optimum():
    values = torch.randn(3000, generator=generator())
    best = squared_error(values, optimal_values(values, 8))
    start = torch.linspace(-4, 4, 8)
    errors = [squared_error(values, lloyd(values, start, steps=n)) for n in range(60)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(errors))
    assert errors[-1] >= best * (1 - 1e-12)


def test_lloyds_iteration_can_stop_above_the_optimum():
    values = torch.tensor([0.0, 0.1, 5.0, 5.1, 10.0, 10.1])
    stuck = lloyd(values, torch.tensor([0.0, 0.1, 7.0]))
    assert squared_error(values, stuck) > 100 * squared_error(values, optimal_values(values, 3))


def test_scipy_agrees_with_lloyds_iteration():
    from scipy.cluster.vq import kmeans2

    values = torch.randn(2000, generator=generator()).double()
    start = torch.linspace(-2, 2, 6).double()
    theirs, _ = kmeans2(values[:, None].numpy(), start[:, None].numpy(), iter=500, minit="matrix")
    torch.testing.assert_close(lloyd(values, start), torch.from_numpy(theirs[:, 0]))


BAD_FITS = {
    "k=0": lambda: optimal_values(torch.ones(3), 0),
    "0 values": lambda: optimal_values(torch.ones(0), 2),
    "all of them finite": lambda: optimal_values(torch.tensor([1.0, torch.nan]), 2),
    "weights of shape": lambda: optimal_values(torch.ones(3), 2, weights=torch.ones(2)),
    "not negative": lambda: optimal_values(torch.ones(2), 2, weights=torch.tensor([1.0, -1.0])),
    "not all 0": lambda: lloyd(torch.ones(2), torch.ones(1), weights=torch.zeros(2)),
    "start has shape": lambda: lloyd(torch.ones(2), torch.ones(0)),
    "finite levels": lambda: lloyd(torch.ones(2), torch.tensor([torch.inf])),
}


@pytest.mark.parametrize("message", BAD_FITS)
def test_a_fit_of_nothing_sensible_is_refused(message):
    with pytest.raises(ValueError, match=message):
        BAD_FITS[message]()


# The methods


def stats_of(n, seed=0):
    scale = torch.rand(n, generator=generator(seed)) * 5
    return InputStats.of(torch.randn(400, n, generator=generator(seed + 1)) * scale)


@pytest.mark.parametrize("bits_", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("share", ["matrix", "row"])
def test_lloyd_max_is_never_worse_than_any_other_table_of_its_size(weight, bits_, share):
    stats = stats_of(512)
    power = stats.second.diagonal().double()
    exact = {"bits": bits_, "share": share, "value_dtype": torch.float32}

    def error(code):
        return ((weight - code.decode()).double().square() * power).sum().item()

    best = error(lloyd_max(weight, stats, **exact))
    for start in ("linear", "density"):
        assert best <= error(kmeans(weight, stats, start=start, **exact)) * (1 + 1e-6)
    spec = QuantSpec(bits_, group_size=None if share == "row" else "tensor")
    assert best <= error(round_to_nearest(weight, spec=spec)) * (1 + 1e-6)
    assert best <= error(lloyd_max(weight, **exact)) * (1 + 1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_in_equal_blocks_no_table_beats_the_fitted_one(weight, double_quant):
    options = {"block": 64, "double_quant": double_quant}
    fitted = lloyd_max(weight, **options)
    errors = [
        (weight - code.decode()).square().sum().item()
        for code in (fitted, nf4(weight, **options), fp4(weight, **options))
    ]
    assert errors[0] < errors[1] < errors[2]
    assert fitted.nbytes == nf4(weight, **options).nbytes + 32  # its table, 16 values of 2 bytes


def test_a_uniform_weighting_of_the_errors_changes_nothing(weight):
    stats = InputStats(10, 3.0 * torch.eye(512), torch.ones(512), torch.ones(512))
    assert torch.equal(lloyd_max(weight, stats).decode(), lloyd_max(weight).decode())


def test_dead_inputs_do_not_move_the_table(weight):
    second = torch.ones(512)
    second[100:] = 0
    stats = InputStats(10, second.diag(), second, second)
    table = lloyd_max(weight, stats).values.tensor
    assert torch.equal(table, lloyd_max(weight[:, :100].contiguous()).values.tensor)
    zero = InputStats(10, torch.zeros(512, 512), torch.zeros(512), torch.zeros(512))
    assert torch.equal(lloyd_max(weight, zero).decode(), lloyd_max(weight).decode())


def test_fewer_tokens_than_inputs_are_enough(weight):
    stats = InputStats.of(torch.randn(3, 512, generator=generator()))
    assert lloyd_max(weight, stats).decode().isfinite().all()


ALL = {"lloyd_max": lloyd_max, "kmeans": kmeans, "nf4": nf4, "fp4": fp4}
every_method = pytest.mark.parametrize("name", ALL)


@every_method
def test_a_zero_weight_comes_back_as_zero(name):
    code = ALL[name](torch.zeros(3, 5))
    assert torch.equal(code.decode(), torch.zeros(3, 5))


@every_method
def test_zero_rows_and_a_constant_matrix_come_back(name):
    weight = torch.full((4, 64), 0.5)
    weight[1] = 0
    torch.testing.assert_close(ALL[name](weight).decode(), weight, rtol=2e-2, atol=1e-7)


@every_method
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        ALL[name](weight)


@every_method
@pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(name, shape):
    with pytest.raises(ValueError, match="a non-empty matrix is needed"):
        ALL[name](torch.ones(shape))


BAD_OPTIONS = {
    "bits=9": lambda w: lloyd_max(w, bits=9),
    "bits=0": lambda w: kmeans(w, bits=0),
    'must be "matrix" or "row"': lambda w: lloyd_max(w, share="column"),
    "block=0": lambda w: nf4(w, block=0),
    "block=2.5": lambda w: lloyd_max(w, block=2.5),
    'must be "linear" or "density"': lambda w: kmeans(w, start="random"),
    "steps=-1": lambda w: kmeans(w, steps=-1),
    "value_dtype=torch.int8": lambda w: lloyd_max(w, value_dtype=torch.int8),
    "out of the range of torch.float16": lambda w: lloyd_max(w * 1e7),
    "use value_dtype=torch.float32": lambda w: lloyd_max(w * 1e-8),
    "moments of 7 inputs": lambda w: lloyd_max(w, InputStats.isotropic(7)),
    "second moments hold NaN": lambda w: kmeans(
        w, InputStats(1, torch.full((512, 512), torch.nan), torch.ones(512), torch.ones(512))
    ),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_an_option_out_of_its_range_is_refused(message, weight):
    with pytest.raises(ValueError, match=message):
        BAD_OPTIONS[message](weight)


def test_tiny_and_huge_weights_keep_their_relative_error_in_blocks(weight):
    for factor in (2.0**-100, 2.0**100):
        for method in (nf4, fp4):
            decoded = method(weight * factor, double_quant=False).decode()
            torch.testing.assert_close(
                decoded / factor, method(weight, double_quant=False).decode()
            )


def test_eight_bits_of_table_are_indexed_by_whole_bytes(weight):
    code = lloyd_max(weight, bits=8)
    assert code.index.to_bytes() == bits.pack(code.index.tensor, 8)
    assert code.size_table() == {"index": weight.numel(), "values": 512}


@pytest.mark.parametrize("block", [10**12, 2**63, 10**30])
def test_a_block_longer_than_the_matrix_takes_no_memory_for_what_is_not_there(block, weight):
    whole = nf4(weight, block=weight.numel(), double_quant=False)
    assert torch.equal(nf4(weight, block=block, double_quant=False).decode(), whole.decode())


def test_a_table_shorter_than_its_index_could_name_lives_in_a_layer(tmp_path):
    layer = nn.Linear(8, 4)
    index = torch.arange(32).reshape(4, 8) % 3
    code = Codebook(Bits.of(index, 2), Array(torch.tensor([-1.0, 0.0, 1.0])))
    small = compress(layer, {"": lambda weight, stats: code})
    assert torch.equal(small.weight, index - 1.0)
    container.save(small, tmp_path / "ternary")
    assert torch.equal(container.load(tmp_path / "ternary", layer).weight, index - 1.0)


def test_half_precision_weights_meet_the_table_in_single():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(nearest(x, TABLES["nf4"]), nearest(x.float(), TABLES["nf4"]))


def test_tables_and_scales_can_be_trained():
    values = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    scale = torch.ones(4, requires_grad=True)
    code = Codebook(Bits.of(torch.tensor([0, 2, 2, 1]), 2), Array(values), Array(scale), block=1)
    (2 * code.decode()).sum().backward()
    assert values.grad.tolist() == [2, 2, 4]
    assert scale.grad.tolist() == [-2, 2, 2, 0]
    with torch.no_grad():
        assert code.decode().tolist() == [-1, 1, 1, 0]


def test_an_index_without_rows_has_no_table_per_row():
    with pytest.raises(ValueError, match="values of shape"):
        Codebook(Bits.of(torch.tensor(1), 2), Array(torch.ones(1, 4)))


def test_an_index_is_stored_whole_numbers_and_the_rest_stored_arrays():
    table = Array(torch.ones(2))
    index = Bits.of(torch.tensor([0, 1]), 1)
    for wrong in (table, Sum(table, table)):
        with pytest.raises(ValueError, match="whole numbers are needed"):
            Codebook(wrong, table)
    with pytest.raises(ValueError, match=r"\['Array', 'Sum'\]; they must"):
        Codebook(index, table, Sum(table, table), block=1)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_table_in_blocks_is_the_weighted_optimum_for_the_scales_that_are_stored(double_quant):
    weight = torch.randn(8, 64, generator=generator()) * torch.logspace(-2, 1, 8)[:, None]
    code = lloyd_max(weight, bits=2, block=16, double_quant=double_quant, value_dtype=torch.float32)
    scale = code.scale.decode().repeat_interleave(16).reshape(8, 64)
    optimum = optimal_values(weight / scale, 4, weights=scale.double().square())
    torch.testing.assert_close(code.values.tensor, optimum.float())
    power = torch.rand(64, generator=generator(1)) + 0.1
    stats = InputStats(9, power.diag(), power.sqrt(), power)
    weighted = lloyd_max(
        weight, stats, bits=2, block=16, double_quant=double_quant, value_dtype=torch.float32
    )
    importance = scale.double().square() * power.double()
    optimum = optimal_values(weight / scale, 4, weights=importance)
    torch.testing.assert_close(weighted.values.tensor, optimum.float())


def test_the_starts_of_weight_sharing_are_even_levels_and_quantiles():
    weight = torch.randn(10, 16, generator=generator()).exp()
    options = {"bits": 2, "steps": 0, "value_dtype": torch.float32}
    even = kmeans(weight, start="linear", **options).values.tensor
    torch.testing.assert_close(even, torch.linspace(weight.min(), weight.max(), 4))
    quantiles = kmeans(weight, start="density", **options).values.tensor
    assert torch.equal(quantiles, weight.flatten().sort().values[[20, 60, 100, 140]])
