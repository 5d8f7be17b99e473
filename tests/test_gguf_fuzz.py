"""Twenty thousand damaged GGUF files: each is read or refused, and nothing else happens."""

import struct
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.formats import gguf
from compresskit.formats.gguf import TYPES, Blocks, GGUFError, reader

SPECIAL = [0, 1, 7, 8, 9, 31, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A file with values and tensors of every type; its bytes, and where its data begins."""
    numbers = {f"a.{dtype.name}": np.arange(3).astype(dtype) for dtype in reader.NUMBERS.values()}
    metadata = numbers | {f"n.{name[2:]}": array[1] for name, array in numbers.items()}
    metadata["n.bool"] = True
    metadata |= {"text": "π", "a.text": ["a", "Ġb"] * 3, "a.array": [["x"], np.arange(2), [[1]]]}
    metadata["general.alignment"] = np.uint32(32)
    generator = np.random.default_rng(0)
    tensors = {}
    for name, kind in TYPES.items():
        data = generator.integers(0, 256, (2, kind.nbytes), np.uint8)
        tensors[name] = Blocks(torch.from_numpy(data), name, (2, kind.size))
    path = tmp_path_factory.mktemp("fuzz") / "original.gguf"
    gguf.write(path, metadata, tensors)
    data = path.read_bytes()
    start = data.index(tensors["F32"].to_bytes())
    reader.parse(np.frombuffer(bytearray(data), np.uint8))
    return data, start


def flip(data, start, generator):
    for at in generator.integers(0, start, generator.integers(1, 4)):
        data[at] ^= 1 << generator.integers(8)


def scramble(data, start, generator):
    at = generator.integers(0, start)
    data[at : at + 8] = generator.bytes(len(data[at : at + 8]))


def special(data, start, generator):
    at = generator.integers(0, start - 8)
    value = SPECIAL[generator.integers(len(SPECIAL))]
    layout = "<Q" if value >= 2**32 or generator.integers(2) else "<I"
    struct.pack_into(layout, data, at, value)


def nudge(data, start, generator):
    """A number that is off by little: a neighbor, or a file size away."""
    at = generator.integers(0, start - 8)
    change = [-32, -8, -1, 1, 8, 32, len(data), -len(data)][generator.integers(8)]
    (value,) = struct.unpack_from("<Q", data, at)
    struct.pack_into("<Q", data, at, (value + change) % 2**64)


def truncate(data, start, generator):
    del data[generator.integers(0, len(data)) :]


def cut(data, start, generator):
    at = generator.integers(0, start)
    del data[at : at + generator.integers(1, 40)]


def insert(data, start, generator):
    at = generator.integers(0, start)
    data[at:at] = generator.bytes(generator.integers(1, 40))


def repeat(data, start, generator):
    """A part of the file over another one: entries twice, tensors in the same place."""
    source, target = generator.integers(0, start, 2)
    size = generator.integers(1, 200)
    data[target : target + size] = data[source : source + size]


def swap(data, start, generator):
    source, target = sorted(generator.integers(0, start, 2))
    size = min(generator.integers(1, 100), target - source)
    part = data[source : source + size]
    data[source : source + size] = data[target : target + size]
    data[target : target + size] = part


def weights(data, start, generator):
    """Anything at all as the bytes of the tensors."""
    data[start:] = generator.bytes(len(data) - start)


MUTATIONS = [
    flip, scramble, special, nudge, truncate, cut, insert, repeat, swap, weights,
]  # fmt: skip


def mutants(original, count, seed):
    """(how, damaged bytes), one way of damage after the other."""
    data, start = original
    generator = np.random.default_rng(seed)
    for i in range(count):
        mutant = bytearray(data)
        how = MUTATIONS[i % len(MUTATIONS)]
        how(mutant, start, generator)
        yield how, mutant


def outcome(read):
    """Whether a file is read, and then all of its tensors decoded, or refused."""
    try:
        file = read()
    except GGUFError:
        return "refused"
    for blocks in file.tensors.values():
        assert blocks.decode().shape == blocks.shape
    return "read"


def parse(data):
    return reader.parse(np.frombuffer(data, np.uint8))


@pytest.mark.slow
def test_twenty_thousand_damaged_files_are_read_or_refused(original):
    counts = Counter()
    longest = 0
    for i, (how, mutant) in enumerate(mutants(original, 20_000, seed=0)):
        start = time.process_time()
        try:
            counts[how.__name__, outcome(lambda data=mutant: parse(data))] += 1
        except Exception as error:
            error.add_note(f"damaged file {i} of seed 0, by {how.__name__}")
            raise
        longest = max(longest, time.process_time() - start)
    total = Counter({o: sum(n for (_, p), n in counts.items() if p == o) for _, o in counts})
    assert total["read"] + total["refused"] == 20_000
    assert min(total.values()) > 2_000, counts
    assert counts["weights", "refused"] == 0  # any bytes are weights
    for how in (flip, scramble, special, nudge, truncate, cut, insert, repeat, swap):
        assert counts[how.__name__, "refused"] > 200, counts
    assert longest < 10  # seconds of processor time: a hang, not slowness; measured 0.007


def test_a_thousand_damaged_files_are_read_or_refused_from_disk(original, tmp_path):
    path = tmp_path / "damaged.gguf"
    counts = Counter()
    for _, mutant in mutants(original, 1_000, seed=1):
        path.unlink(missing_ok=True)  # not over a file that is mapped
        path.write_bytes(mutant)
        counts[outcome(lambda: gguf.read(path))] += 1
    assert min(counts["read"], counts["refused"]) > 100


def test_damaged_files_take_memory_in_proportion_to_their_size(original):
    tracemalloc.start()
    for how, mutant in mutants(original, 1_000, seed=2):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        array = np.frombuffer(mutant, np.uint8)
        try:
            reader.parse(array)
        except GGUFError:
            pass
        peak = tracemalloc.get_traced_memory()[1] - before
        assert peak < 20_000 + 8 * len(mutant), how
    tracemalloc.stop()


def test_a_damaged_file_that_is_read_can_be_written_again(original, tmp_path):
    written = 0
    for _, mutant in mutants(original, 500, seed=3):
        try:
            file = parse(mutant)
        except GGUFError:
            continue
        if any(len(name.encode()) > 63 for name in file.tensors):  # which ggml refuses, and write
            continue
        gguf.write(tmp_path / "again", file.metadata, file.tensors)
        again = gguf.read(tmp_path / "again")
        assert list(again.metadata) == list(file.metadata)
        for name, blocks in file.tensors.items():
            assert torch.equal(again.tensors[name].tensor, blocks.tensor)
            assert again.tensors[name].shape == blocks.shape
        written += 1
    assert written > 50


@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_are_read_or_refused(data):
    outcome(lambda: parse(bytearray(struct.pack("<4sI", b"GGUF", 3) + data)))


@given(
    st.integers(0, 3),
    st.integers(0, 3),
    st.lists(
        st.one_of(
            st.binary(max_size=6).map(lambda text: struct.pack("<Q", len(text)) + text),
            st.integers(0, 40).map(lambda n: struct.pack("<I", n)),
            st.sampled_from(SPECIAL).map(lambda n: struct.pack("<Q", n)),
        ),
        max_size=30,
    ),
)
def test_anything_that_is_made_of_the_parts_of_a_file_is_read_or_refused(tensors, entries, parts):
    header = struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries)
    outcome(lambda: parse(bytearray(header + b"".join(parts))))
