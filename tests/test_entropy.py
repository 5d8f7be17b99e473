"""Entropy coders: exact for every input, near the entropy, and never hung by a damaged stream."""

import copy
import heapq
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions
from torch import nn

from compresskit import container, theory
from compresskit.affine import QuantSpec
from compresskit.code import Bits
from compresskit.codebook import Codebook
from compresskit.entropy import (
    Adaptive,
    Huffman,
    Rans,
    Scales,
    adaptive,
    ans,
    canonical,
    coded,
    huffman,
    lengths,
    rans,
    tables,
)
from compresskit.methods import kmeans, magnitude, round_to_nearest
from compresskit.model import compress
from compresskit.sparse import Pattern, Sparse

DATA = Path(__file__).parent / "data"
REFERENCE = np.load(DATA / "entropy.npz")
STREAMS = ("q4_perchannel", "geometric", "single", "two", "uniform256")
CODERS = {
    "huffman": huffman,
    "rans": rans,
    "adaptive": adaptive,
    "scales": partial(rans, model=Scales()),
    "scales by row": partial(rans, model=Scales("row")),
    "scales by column": partial(rans, model=Scales("column")),
    "scales by both": partial(rans, model=Scales("both")),
}
every = pytest.mark.parametrize("name", CODERS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, scale=3.0, seed=0):
    return (scale * torch.randn(*shape, generator=generator(seed))).round().int()


def report(name):
    return json.loads(str(REFERENCE[f"report/{name}"]))


INPUTS = {
    "empty": torch.zeros(0, dtype=torch.int32),
    "an empty matrix": torch.zeros(3, 0, dtype=torch.uint8),
    "one symbol": torch.tensor([5]),
    "a scalar": torch.tensor(-3),
    "one value": torch.full((1000,), -7),
    "zeros": torch.zeros(20, 30, dtype=torch.uint8),
    "two values": torch.rand(5000, generator=generator()) < 0.01,
    "a matrix": draw(40, 50),
    "three axes": draw(5, 6, 7),
    "columns": draw(50, 40).T,
    "int16": draw(300).to(torch.int16),
    "int64": draw(300, scale=1e6).long(),
    "2^16 values": torch.randperm(1 << 16, generator=generator()) - 30_000,
    "32 bits": torch.randint(-(2**31), 2**31, (500,), generator=generator()),
    "extremes": torch.tensor([-(2**31), 2**31 - 1] * 9),
    "heavy tails": torch.empty(4000).cauchy_(generator=generator()).clamp(-1e9, 1e9).long(),
    "a silent column": draw(30, 20) * (torch.arange(20) % 3 > 0),
    "scales": draw(30, 20) * torch.arange(1, 31)[:, None] ** 2,
}


@every
@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_decoded_is_what_was_coded(name, kind):
    levels = INPUTS[kind]
    leaf = CODERS[name](levels)
    decoded = leaf.decode()
    assert decoded.dtype == torch.int32
    assert decoded.shape == levels.shape == torch.Size(leaf.shape)
    assert torch.equal(decoded.long(), levels.long())


@every
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_short_list_of_numbers_comes_back(name, data):
    size = data.draw(st.sampled_from([3, 300, 1 << 31]))
    numbers = data.draw(st.lists(st.integers(-size, size - 1), max_size=40))
    levels = torch.tensor(numbers, dtype=torch.int64)
    assert torch.equal(CODERS[name](levels).decode().long(), levels)
    if len(numbers) % 4 == 0:
        matrix = levels.reshape(4, -1)
        assert torch.equal(CODERS[name](matrix).decode().long(), matrix)


@every
def test_leaves_keep_their_contract(name):
    leaf = CODERS[name](draw(40, 50))
    header = json.loads(json.dumps(leaf.header()))
    again = type(leaf).from_bytes(leaf.to_bytes(), header)
    assert leaf.nbytes == len(leaf.to_bytes())
    assert again.to_bytes() == leaf.to_bytes()
    assert again.header() == leaf.header()
    assert torch.equal(again.decode(), leaf.decode())
    ghost = leaf.to("meta").decode()
    assert ghost.is_meta
    assert ghost.shape == leaf.shape


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stream_on_a_gpu_decodes_there(name):
    leaf = CODERS[name](draw(40, 50).cuda())
    assert leaf.tensor.is_cuda
    assert torch.equal(leaf.decode().cpu(), draw(40, 50))
    assert torch.equal(CODERS[name](draw(40, 50)).to("cuda").decode().cpu(), draw(40, 50))


@every
def test_coding_is_deterministic_and_changes_nothing(name):
    levels = draw(64, 64)
    before = levels.clone()
    assert CODERS[name](levels).to_bytes() == CODERS[name](levels).to_bytes()
    assert torch.equal(levels, before)


@every
@pytest.mark.parametrize("count", [200_000, 700_000])
def test_long_streams_come_back_in_parts_on_any_number_of_threads(name, count):
    levels = draw(count // 1000, 1000, scale=2.0)
    threads = torch.get_num_threads()
    try:
        streams = []
        for n in (1, 2):
            torch.set_num_threads(n)
            streams.append(CODERS[name](levels))
            assert torch.equal(streams[-1].decode(), levels)
    finally:
        torch.set_num_threads(threads)
    assert streams[0].to_bytes() == streams[1].to_bytes()


@pytest.mark.slow
def test_a_hundred_million_symbols():
    levels = torch.arange(100_000_003, dtype=torch.int32).mul_(40503).bitwise_and_(0xFFFF)
    levels = (levels < 6000).to(torch.uint8)
    for coder in (rans, huffman):
        leaf = coder(levels)
        assert torch.equal(leaf.decode().to(torch.uint8), levels)
    assert 8 * rans(levels).nbytes < 1.001 * len(levels) * theory.binary_entropy(
        levels.float().mean().item()
    )


# --- rates ----------------------------------------------------------------------------------------


def entropy_bits(levels):
    counts = np.unique(levels, return_counts=True)[1]
    return len(levels) * theory.entropy(counts / len(levels))


@pytest.mark.parametrize("stream", STREAMS)
def test_streams_are_as_short_as_those_of_the_references(stream):
    symbols, known = REFERENCE[f"stream/{stream}"], report(stream)
    levels = torch.from_numpy(symbols)
    assert entropy_bits(symbols) == pytest.approx(known["entropy_bits"], abs=0.1)
    table = 16 * 8 + 12 * len(np.unique(symbols))  # about what constriction does not count
    for coder in (rans, adaptive):
        assert 8 * coder(levels).nbytes <= 1.001 * known["entropy_bits"] + 64 * 8 + table
    if "huffman_bits" in known:
        counts = np.bincount(symbols)
        assert lengths(counts) @ counts == known["huffman_bits"]
        assert 8 * huffman(levels).nbytes <= known["huffman_bits"] + 64 * 8 + table
        assert rans(levels).nbytes <= known["constriction_ans_bits"] / 8 * 1.001 + 64 + table / 8


@pytest.mark.parametrize("precision", tables.PRECISIONS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 30.0])
def test_words_and_states_are_within_a_thousandth_of_the_models_cross_entropy(precision, scale):
    levels = draw(300_000, scale=scale).numpy()
    low = int(levels.min())
    counts = np.bincount(levels - low)
    frequency = tables.quantized(counts, precision)
    ideal = float(counts[counts > 0] @ (precision - np.log2(frequency[counts > 0]))) / 8
    same = np.arange(len(counts), dtype=np.int32)
    stream = ans.encode(levels, same, low, frequency[None], precision, ideal)
    assert ideal - 1 <= len(stream) <= 1.001 * ideal + 64


def test_the_frequencies_of_a_table_cost_little_and_sum_up():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        counts = rng.integers(0, 1000, 50) ** 2
        for precision in tables.PRECISIONS:
            f = tables.quantized(counts, precision)
            assert f.sum() == 1 << precision
            assert ((f > 0) == (counts > 0)).all()
            p = counts / counts.sum()
            assert theory.kl_divergence(p, f / f.sum()) < 60 / (1 << precision)
    with pytest.raises(ValueError, match="symbols for 4096 parts"):
        tables.quantized(np.ones(5000), 12)


def test_scales_of_rows_and_columns_save_what_a_table_cannot():
    shape = torch.logspace(-1, 1, 200)[:, None] * torch.logspace(-0.5, 0.5, 300)
    levels = (2 * shape * torch.randn(200, 300, generator=generator())).round().int()
    sizes = {name: CODERS[name](levels).nbytes for name in CODERS}
    ideal = 0.0  # of the true law, known for free
    x, s = levels.double(), 2 * shape.double()
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf((x + 0.5) / s) - normal.cdf((x - 0.5) / s)
    ideal = -p.log2().sum().item() / 8
    assert sizes["scales by both"] < 0.9 * sizes["rans"]
    assert sizes["scales by both"] < min(sizes["scales by row"], sizes["scales by column"])
    assert sizes["scales by both"] < 1.01 * ideal + 500  # 500 scales of at most a byte


@pytest.mark.parametrize("spread", [0.1, 1, 8, 64])
@pytest.mark.parametrize("by", ["row", "column", "both"])
def test_scales_are_found_however_far_apart_they_are(spread, by):
    s = torch.arange(1, 65, dtype=torch.float64)[:, None].expand(64, 256) / spread
    levels = (s * torch.randn(64, 256, generator=generator())).round().int()
    normal = torch.distributions.Normal(0.0, 1.0)
    p = normal.cdf((levels + 0.5) / s) - normal.cdf((levels - 0.5) / s)
    ideal = -p.log2().sum().item() / 8
    turned = levels.T if by == "column" else levels
    assert rans(turned, Scales(by)).nbytes < 1.03 * ideal + 64 * 2 + (256 if by == "both" else 0)


@pytest.mark.parametrize("blend", [0, 4, 8])
@pytest.mark.parametrize("index", [1, 20, 33, 41, 60, 90])
def test_laws_are_those_of_scipy(index, blend):
    for precision in (14, 16):
        f = tables.law(index, blend, precision)
        assert f.sum() == 1 << precision
        assert (f > 0).all()
        inside = f[:-1]
        assert (inside == inside[::-1]).all()
        scale = 2 ** ((index - 33) / 8)
        reach = len(inside) // 2
        edges = np.arange(-reach, reach + 2) - 0.5
        cdf = (1 - blend / 8) * distributions.norm(scale=scale).cdf(edges)
        cdf += blend / 8 * distributions.laplace(scale=scale / 2**0.5).cdf(edges)
        apart = np.abs(inside / f.sum() - np.diff(cdf))
        assert np.delete(apart, reach).max(initial=0) < 1 / f.sum()
        assert apart[reach] < 3e-3  # the middle has what rounding leaves
    assert tables.law(0, blend, 14).tolist() == [1 << 14, 0]


def test_the_tail_is_right_to_seven_digits():
    x = np.linspace(0, 12, 2001)
    assert np.abs(tables.tail(x, 0.0) - distributions.norm.sf(x)).max() < 2e-7
    laplace = distributions.laplace(scale=0.5**0.5).sf(x)
    np.testing.assert_allclose(tables.tail(x, 1.0), laplace, rtol=1e-12)


# --- Huffman --------------------------------------------------------------------------------------


def joined(counts):
    heap, total = sorted(c for c in counts if c), 0
    while len(heap) > 1:
        least = heapq.heappop(heap) + heapq.heappop(heap)
        total += least
        heapq.heappush(heap, least)
    return total


def test_lengths_are_as_short_as_joining_makes_them():
    for seed in range(100):
        counts = np.random.default_rng(seed).integers(0, 1 << 10, 3 + seed)
        found = lengths(counts)
        assert found @ counts == joined(counts)
        assert (2.0 ** -found[found > 0]).sum() == 1


@pytest.mark.parametrize("longest", [3, 4, 5])
def test_lengths_are_the_best_of_all_that_kraft_allows(longest):
    for seed in range(12):
        counts = np.random.default_rng(seed).integers(1, 100, 5)
        feasible = (
            np.array(ls)
            for ls in itertools.product(range(1, longest + 1), repeat=5)
            if sum(2.0**-n for n in ls) <= 1
        )
        found = lengths(counts, longest=longest)
        assert found.max() <= longest
        assert found @ counts == min(ls @ counts for ls in feasible)


def test_canonical_words_are_no_beginnings_of_each_other():
    bits = lengths(np.random.default_rng(0).integers(1, 1000, 40))
    words = [f"{w:0{n}b}" for w, n in zip(canonical(bits), bits, strict=True)]
    assert all(len(w) == n for w, n in zip(words, bits, strict=True))
    for a, b in itertools.permutations(words, 2):
        assert not b.startswith(a)
    with pytest.raises(ValueError, match="Kraft sum above 1"):
        canonical([1, 1, 2])
    with pytest.raises(ValueError, match="in words of at most 2 bits"):
        lengths([1] * 5, longest=2)


def test_uniform_symbols_take_their_width():
    for width in (1, 4, 8):
        levels = torch.arange(1 << width).repeat(2000)
        assert 8 * huffman(levels).nbytes <= width * len(levels) + 8 * (64 + (2 << width))


# --- the loops of the book ------------------------------------------------------------------------


def pushed(places, frequency, precision):
    before, x, words = np.cumsum(frequency) - frequency, 1 << 31, []
    for s in reversed(places):
        f, c = int(frequency[s]), int(before[s])
        if x >= f << (63 - precision):
            words.append(x & 0xFFFFFFFF)
            x >>= 32
        x = (x // f << precision) + c + x % f
    return np.array([x & 0xFFFFFFFF, x >> 32, *words[::-1]], "<u4").tobytes()


@pytest.mark.parametrize("precision", [12, 14, 16])
def test_one_lane_writes_what_the_loop_writes(precision):
    places = np.random.default_rng(0).integers(0, 6, 3000).astype(np.int32) // 2
    frequency = tables.quantized(np.array([900, 90, 9]), precision)
    same = np.arange(3, dtype=np.int32)
    stream = ans.encode(places, same, 0, frequency[None], precision, 0.0)
    assert stream.endswith(pushed(places.tolist(), frequency, precision))


# --- codes ----------------------------------------------------------------------------------------


def test_codes_with_coded_leaves_decode_as_before_and_survive_a_file(tmp_path):
    layer = nn.Linear(120, 64)
    codes = {
        "grid": round_to_nearest(layer.weight, spec=QuantSpec(3, group_size=40)),
        "table": kmeans(layer.weight, bits=5),
        "sparse": magnitude(layer.weight, pattern=Pattern(0.9, among="layer")),
    }
    table = codes["table"]
    mask = torch.rand(64, 120, generator=generator()) > 0.9
    kept = Bits.of(table.index.tensor[mask], 5)
    codes["sparse table"] = Codebook(Sparse(kept, Bits.of(mask, 1)), table.values)
    for name, code in codes.items():
        for coder in (rans, huffman, adaptive):
            small = coded(code, coder)
            assert torch.equal(small.decode(), code.decode())
            assert small.nbytes <= code.nbytes
            model = compress(layer, {"": lambda w, s, small=small: small})
            container.save(model, tmp_path / "layer")
            again = container.load(tmp_path / "layer", copy.deepcopy(layer))
            assert torch.equal(again.code.decode(), code.decode()), name
            assert again.code.size_table() == small.size_table()
    assert coded(codes["sparse table"]).nbytes < 0.8 * codes["sparse table"].nbytes


def test_a_coded_mask_of_too_many_entries_is_refused_before_it_is_decoded():
    mask = rans(torch.ones(8, dtype=torch.uint8))
    large = Rans(mask.tensor, (1 << 15, 1 << 14), "static")
    with pytest.raises(ValueError, match="is stored as Bits"):
        Sparse(Bits.of(torch.ones(8), 1), large)


def test_leaves_that_would_grow_stay_as_they_are():
    noise = Bits.of(torch.randint(16, (1000,), generator=generator()), 4)
    assert coded(noise) is noise
    small = rans(draw(2000))
    assert coded(small) is small


# --- damage ---------------------------------------------------------------------------------------


def damaged_is_refused_or_other(leaf, data, header):
    try:
        out = type(leaf).from_bytes(data, header).decode()
    except ValueError:
        return True
    return out.shape == leaf.shape


def streams(name):
    levels = draw(12, 25, scale=2.0) if "scales" in name else draw(300, scale=2.0)
    yield CODERS[name](levels)
    yield CODERS[name](INPUTS["heavy tails"][:60])
    yield CODERS[name](INPUTS["extremes"])


@every
def test_no_truncation_is_believed(name):
    for leaf in streams(name):
        data = leaf.to_bytes()
        for length in range(len(data)):
            with pytest.raises(ValueError, match=r"."):
                type(leaf).from_bytes(data[:length], leaf.header()).decode()
        with pytest.raises(ValueError, match=r"."):
            type(leaf).from_bytes(data + b"\0", leaf.header()).decode()


@every
def test_a_flip_in_any_byte_gives_an_error_or_other_symbols(name):
    for leaf in streams(name):
        data = leaf.to_bytes()
        for at in range(len(data)):
            for bit in (0, 3, 7):
                changed = bytearray(data)
                changed[at] ^= 1 << bit
                assert damaged_is_refused_or_other(leaf, bytes(changed), leaf.header())


@every
def test_random_bytes_give_an_error_or_symbols(name):
    leaf = CODERS[name](draw(12, 25))
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = rng.bytes(int(rng.integers(0, 60)))
        assert damaged_is_refused_or_other(leaf, data, leaf.header())


@every
def test_headers_that_say_something_else_are_refused(name):
    leaf = CODERS[name](draw(12, 25))
    for size in ([-1], [1 << 40], "many", None, [1] * 9, [1.5]):
        with pytest.raises(ValueError, match=r"shape|stream holds"):
            type(leaf).from_bytes(leaf.to_bytes(), leaf.header() | {"size": size})
    for size in ([0], [12, 24], [300, 2]):
        wrong = type(leaf).from_bytes(leaf.to_bytes(), leaf.header() | {"size": size})
        try:
            assert wrong.decode().shape == tuple(size)
        except ValueError:
            continue
    if isinstance(leaf, Rans):
        with pytest.raises(ValueError, match="there are static, scales"):
            Rans.from_bytes(leaf.to_bytes(), leaf.header() | {"model": "other"})


def test_what_is_no_stream_is_refused():
    for cls, rest in ((Adaptive, ()), (Huffman, ()), (Rans, ("static",))):
        with pytest.raises(ValueError, match="a vector of uint8"):
            cls(torch.zeros(3), (3,), *rest)
        with pytest.raises(ValueError, match="a vector of uint8"):
            cls(torch.zeros(3, 1, dtype=torch.uint8), (3,), *rest)


@every
def test_what_is_no_whole_number_is_refused(name):
    with pytest.raises(ValueError, match="round them first"):
        CODERS[name](torch.ones(3))
    with pytest.raises(ValueError, match="32 signed bits"):
        CODERS[name](torch.tensor([1 << 40]))


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="None or a Scales"):
        rans(draw(3), "static")
    with pytest.raises(ValueError, match='"matrix", "row", "column" or "both"'):
        Scales("diagonal")


# --- bytes that must not change -------------------------------------------------------------------

GOLDEN = DATA / "entropy_golden.json"


def golden_levels():
    i = torch.arange(96)
    return {
        "small": (i * i % 23 % 7 - 3).reshape(8, 12),
        "rare": torch.where(i == 50, 1_000_000, i % 3),
        "mask": i % 11 == 0,
    }


def golden_streams():
    return {
        f"{name}/{kind}": coder(levels).to_bytes().hex()
        for name, coder in CODERS.items()
        for kind, levels in golden_levels().items()
    }


def test_the_byte_layout_is_that_of_the_golden_file():
    stored = json.loads(GOLDEN.read_text())
    assert golden_streams() == stored
    for name, coder in CODERS.items():
        for kind, levels in golden_levels().items():
            leaf = coder(levels)
            again = type(leaf).from_bytes(bytes.fromhex(stored[f"{name}/{kind}"]), leaf.header())
            assert torch.equal(again.decode().long(), levels.long())
