"""Floating-point numbers without loss: every pattern of bits, streams, and damage."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compresskit import container
from compresskit.formats import bf16
from compresskit.formats.bf16 import Floats
from compresskit.model import compress

REFERENCE = np.load(Path(__file__).parent / "data" / "entropy.npz")
CODERS = ("huffman", "rans", "scales")
coders = pytest.mark.parametrize("coder", CODERS)
PATTERNS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
WHOLE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(rows=60, columns=80):
    return torch.randn(rows, columns, generator=generator()) * torch.logspace(-2, 0, rows)[:, None]


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(WHOLE[a.dtype]), b.view(WHOLE[b.dtype]))


@coders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1 << 16,), (256, 256), (4, 128, 128)])
def test_every_pattern_of_sixteen_bits_comes_back(coder, dtype, shape):
    order = torch.randperm(1 << 16, generator=generator())
    for patterns in (PATTERNS, PATTERNS[order]):
        given = patterns.view(dtype).reshape(shape)
        assert same(bf16.encode(given, coder=coder).exact(), given)


@coders
def test_random_patterns_of_32_bits_come_back(coder):
    raw = torch.randint(-(2**31), 2**31, (3000,), generator=generator()).to(torch.int32)
    raw[:4] = torch.tensor([0, -(2**31), 0x7F800001, 0x7F800000])
    assert same(bf16.encode(raw.view(torch.float32), coder=coder).exact(), raw.view(torch.float32))


@coders
@pytest.mark.parametrize("dtype", list(WHOLE))
def test_weights_and_odd_shapes_come_back_at_their_dtype(coder, dtype):
    for given in (
        weight(), weight().T, weight()[0], weight()[:, :1], weight()[0, 0], torch.zeros(0, 4),
        torch.zeros(7, 9), torch.full((3, 4), torch.inf), torch.full((5,), torch.nan),
        torch.zeros(3, 3).fill_(-0.0), 1e-41 * weight(), 1e30 * weight(),
        weight().reshape(4, 15, 80),
    ):  # fmt: skip
        leaf = bf16.encode(given.to(dtype), coder=coder)
        assert same(leaf.exact(), given.to(dtype).contiguous())
        assert leaf.decode().dtype == torch.float32
        assert leaf.decode().shape == given.shape == torch.Size(leaf.shape)


@coders
def test_leaves_keep_their_contract_and_survive_a_file(coder, tmp_path):
    leaf = bf16.encode(weight().bfloat16(), coder=coder)
    again = Floats.from_bytes(leaf.to_bytes(), json.loads(json.dumps(leaf.header())))
    assert leaf.nbytes == len(leaf.to_bytes())
    assert same(again.exact(), weight().bfloat16())
    layer = nn.Linear(80, 60)
    small = compress(layer, {"": lambda w, s: leaf})
    container.save(small, tmp_path / "layer")
    x = torch.randn(3, 80, generator=generator())
    assert torch.equal(container.load(tmp_path / "layer", layer)(x), small(x))


def test_sizes_are_near_what_the_fields_hold():
    given = weight(300, 400).bfloat16()
    sizes = {c: 8 * bf16.encode(given, coder=c).nbytes / given.numel() for c in CODERS}
    assert 10.45 < sizes["scales"] < 10.55  # a Gaussian of known scale: 10.46
    assert sizes["scales"] < sizes["rans"] < sizes["huffman"] < 12
    noise = PATTERNS[torch.randperm(1 << 16, generator=generator())].view(torch.bfloat16)
    assert bf16.encode(noise, coder="rans").nbytes < 1.001 * 2 * len(noise)


def test_the_exponents_take_no_more_than_the_reference_compressor_makes_of_them():
    given = torch.from_numpy(REFERENCE["dfloat11/weights"]).view(torch.bfloat16)
    known = json.loads(str(REFERENCE["dfloat11/report"]))
    ours = 8 * bf16.encode(given, coder="huffman").nbytes / given.numel()
    assert ours <= known["bits_per_weight"] + 8 * 64 / given.numel()
    assert ours < known["bits_incl_aux"]
    exponent = given.view(torch.int16).int() >> 7 & 255
    share = torch.bincount(exponent.reshape(-1)).double() / given.numel()
    entropy = -(share[share > 0] * share[share > 0].log2()).sum().item()
    assert entropy == pytest.approx(known["entropy_exp"], abs=1e-9)
    assert bf16.encode(given).nbytes < bf16.encode(given, coder="huffman").nbytes


@coders
def test_blocks_stream_through_a_file_one_at_a_time(coder):
    alive = []

    def blocks():
        for start in range(0, 60, 7):
            block = weight()[start : start + 7].half()
            alive.append(block)
            yield block

    file = io.BytesIO()
    written = bf16.write(blocks(), file, coder=coder)
    assert written == len(file.getvalue())
    file.seek(0)
    read = bf16.read(file)
    assert same(next(read), weight()[:7].half())
    assert same(torch.cat(list(read)), weight()[7:].half())


def test_a_file_of_no_block_is_empty():
    file = io.BytesIO()
    assert bf16.write([], file) == 0
    assert list(bf16.read(io.BytesIO())) == []


@coders
def test_a_file_that_was_cut_or_changed_is_an_error_or_other_numbers(coder):
    file = io.BytesIO()
    bf16.write(weight(8, 9).bfloat16().split(3), file, coder=coder)
    data = file.getvalue()
    for length in range(0, len(data)):
        try:
            found = list(bf16.read(io.BytesIO(data[:length])))
        except ValueError:
            continue
        assert len(found) < 3
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        try:
            list(bf16.read(io.BytesIO(bytes(changed))))
        except ValueError:
            continue


@coders
def test_damaged_streams_are_an_error_or_other_numbers(coder):
    leaf = bf16.encode(weight(10, 12).bfloat16(), coder=coder)
    data, rng = leaf.to_bytes(), np.random.default_rng(0)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            Floats.from_bytes(data[:length], leaf.header()).exact()
    for _ in range(300):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            found = Floats.from_bytes(bytes(changed), leaf.header()).exact()
        except ValueError:
            continue
        assert found.shape == (10, 12)


def test_what_is_not_coded_is_refused():
    with pytest.raises(ValueError, match="bfloat16, float16 and float32 are coded"):
        bf16.encode(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="'huffman', 'rans', 'scales'"):
        bf16.encode(torch.zeros(3), coder="zip")
    leaf = bf16.encode(torch.zeros(3))
    for change in ({"dtype": "int8"}, {"coder": "zip"}, {"dtype": None}):
        with pytest.raises(ValueError, match=r"coded|must be one of"):
            Floats.from_bytes(leaf.to_bytes(), leaf.header() | change)


GOLDEN = Path(__file__).parent / "data" / "bf16_golden.json"


def golden_streams():
    given = {"weight": weight(6, 8).bfloat16(), "specials": PATTERNS[::4097].view(torch.bfloat16)}
    return {
        f"{coder}/{kind}": bf16.encode(tensor, coder=coder).to_bytes().hex()
        for coder in CODERS
        for kind, tensor in given.items()
    }


def test_the_byte_layout_is_that_of_the_golden_file():
    assert golden_streams() == json.loads(GOLDEN.read_text())
