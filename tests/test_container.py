"""One file per model: exact round trips, and one clear error for every kind of damage."""

import hashlib
import json
import os
from functools import partial

import pytest
import safetensors
import torch
from torch import nn

from compresskit import container
from compresskit.affine import QuantSpec
from compresskit.code import Array, Sum
from compresskit.methods import round_to_nearest
from compresskit.model import compress, layers, size_table


def residual(weight, stats):
    first = round_to_nearest(weight, spec=QuantSpec(2, group_size=3))
    return Sum(first, round_to_nearest(weight - first.decode(), spec=QuantSpec(1, symmetric=True)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    model.append(nn.Linear(4, 2).to(torch.bfloat16))
    return model


@pytest.fixture
def small(net):
    plan = {"0": residual, "2": partial(round_to_nearest, spec=QuantSpec(5))}
    return compress(net, plan)


@pytest.fixture
def file(small, tmp_path):
    path = tmp_path / "model.safetensors"
    container.save(small, path, note={"by": "a test"})
    return path


@torch.no_grad()
def test_a_loaded_model_is_the_saved_one_whatever_was_there_before(file, small, net):
    for tensor in net.state_dict().values():
        tensor.fill_(7)
    again = container.load(file, net)
    for (name, a), (other, b) in zip(
        small.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(again[:3].eval()(x), small[:3].eval()(x))


def test_the_file_holds_the_counted_bytes_and_a_header(file, small):
    size = file.stat().st_size
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert size == 8 + header + size_table(small).nbytes
    assert container.save(small, file) == file.stat().st_size


def test_any_safetensors_reader_lists_it(file):
    with safetensors.safe_open(file, "pt") as opened:
        assert "0:first.levels" in opened.keys()
        assert opened.get_tensor("4.weight").dtype == torch.bfloat16


def test_saving_twice_gives_the_same_bytes(small, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    container.save(small, a)
    container.save(small, b)
    assert a.read_bytes() == b.read_bytes()


def test_what_was_read_is_what_was_written(file):
    contents = container.read(file)
    assert list(contents.codes) == ["0", "2"]
    assert contents.note == {"by": "a test"}
    assert isinstance(contents.codes["0"], Sum)
    assert "3.running_mean" in contents.parameters


def test_a_note_may_hold_anything_that_json_can(small, tmp_path):
    note = {"commit": "0" * 64, "file": ["0" * 64], "é": None}
    container.save(small, tmp_path / "a", note=note)
    assert container.read(tmp_path / "a").note == note


def test_a_parameter_that_no_file_holds_is_refused_before_anything_is_written(net, tmp_path):
    net.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"'phase' is torch\.complex64; a file holds float64"):
        container.save(net, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_buffers_that_share_memory_are_stored_apart(net, tmp_path):
    net.register_buffer("view", net[2].weight.data)
    container.save(net, tmp_path / "a")
    assert torch.equal(container.read(tmp_path / "a").parameters["view"], net[2].weight)


def test_an_uncompressed_model_can_be_stored(net, tmp_path):
    container.save(net, tmp_path / "dense")
    assert torch.equal(container.load(tmp_path / "dense", net)[2].weight, net[2].weight)


def test_loading_leaves_the_given_model_alone(file, net):
    before = net[2].weight.clone()
    container.load(file, net)
    assert torch.equal(net[2].weight, before)


# --- damage ------------------------------------------------------------------------------------


def test_a_flip_in_every_byte_is_noticed(tmp_path):
    path = tmp_path / "tiny"
    container.save(compress(nn.Linear(3, 2), {"": residual}), path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
            container.read(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "tiny"
    container.save(compress(nn.Linear(3, 2), {"": residual}), path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
            container.read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
        container.read(path)


def forged(path, change):
    """A file whose header was changed on purpose, with every checksum made right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["compresskit"])
    header["file"] = container._NO_SUM
    change(header, outer)
    text = header if isinstance(header, str) else json.dumps(header)
    outer["__metadata__"]["compresskit"] = text
    raw = json.dumps(outer).encode()
    forged = len(raw).to_bytes(8, "little") + raw + data[8 + length :]
    digest = hashlib.sha256(forged).hexdigest().encode()
    path.write_bytes(forged.replace(container._NO_SUM.encode(), digest, 1))
    return path


def test_a_forgery_that_changes_nothing_is_read(file):
    assert container.read(forged(file, lambda header, outer: None)).note == {"by": "a test"}


def deep(header, outer):
    tree = header["codes"]["2"]
    for _ in range(100):
        tree = {
            "node": "Sum",
            "first": tree,
            "second": tree["levels"] if "levels" in tree else tree["second"],
        }
    header["codes"]["2"] = tree


HOSTILE = {
    "another format": lambda h, o: h.update(format=2),
    "a format that is true": lambda h, o: h.update(format=True),
    "a note that is a list": lambda h, o: h.update(note=[]),
    "junk in a leaf": lambda h, o: h["codes"]["2"]["levels"].update(junk=1),
    "a leaf and a node in one": lambda h, o: h["codes"]["2"]["levels"].update(node="Sum"),
    "no codes": lambda h, o: h.pop("codes"),
    "codes of another type": lambda h, o: h.update(codes=[1]),
    "an unknown node": lambda h, o: h["codes"]["2"].update(node="Pickle"),
    "an unknown leaf": lambda h, o: h["codes"]["2"]["levels"].update(leaf="Code"),
    "an unknown field": lambda h, o: h["codes"]["2"].update(more=1),
    "a missing field": lambda h, o: h["codes"]["2"].pop("zero"),
    "a missing array": lambda h, o: h["codes"]["2"].update(extra={"leaf": "Bits"}),
    "an absurd width": lambda h, o: h["codes"]["2"]["levels"].update(width=10**9),
    "a width that is no number": lambda h, o: h["codes"]["2"]["levels"].update(width="5"),
    "a gigantic shape": lambda h, o: h["codes"]["2"]["levels"].update(shape=[2**40, 2**40]),
    "a negative shape": lambda h, o: h["codes"]["2"]["levels"].update(shape=[-4, -8]),
    "another shape of equal size": lambda h, o: h["codes"]["2"]["levels"].update(shape=[32]),
    "another dtype": lambda h, o: h["codes"]["2"]["scale"].update(dtype="float32"),
    "an object for a dtype": lambda h, o: h["codes"]["2"]["scale"].update(dtype={"a": 1}),
    "a group size of zero": lambda h, o: h["codes"]["2"].update(group_size=0),
    "a gigantic group size": lambda h, o: h["codes"]["0"]["first"].update(group_size=2**70),
    "a group size that is no number": lambda h, o: h["codes"]["2"].update(group_size="8"),
    "a number for a child": lambda h, o: h["codes"]["2"].update(levels=3),
    "nesting": deep,
    "no checksums": lambda h, o: h.update(checksums={}),
    "a checksum of another type": lambda h, o: h["checksums"].update({"4.weight": 7}),
    "a tensor beyond the end": lambda h, o: o["4.weight"].update(data_offsets=[0, 10**12]),
    "overlapping tensors": lambda h, o: o["4.bias"].update(
        data_offsets=o["4.weight"]["data_offsets"]),
    "an unknown tensor dtype": lambda h, o: o["4.weight"].update(dtype="F7"),
    "a tensor of another size": lambda h, o: o["4.weight"].update(shape=[2**31, 2**31]),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_with_right_checksums_is_refused(file, change):
    with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
        container.read(forged(file, change))


@pytest.mark.parametrize("depth", [50, 400, 100_000])
def test_formulas_nested_to_exhaustion_are_refused(file, depth):
    """Deep JSON by itself, deep formulas whose arrays do not exist: no crash, no hang."""
    tree = '{"node": "Sum", "first": ' * depth + "1" + ', "second": 1}' * depth
    header = {"file": "0" * 64, "format": 1, "codes": {"2": "?"}, "checksums": {}, "note": {}}
    text = json.dumps(header).replace('"?"', tree)
    raw = json.dumps({"__metadata__": {"compresskit": text}}).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
        container.read(file)


def test_a_pickle_and_a_plain_safetensors_file_are_refused(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "pickle")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "plain")
    for name in ("pickle", "plain"):
        with pytest.raises(container.ContainerError, match="is not a sound compresskit file"):
            container.read(tmp_path / name)


# --- the wrong model ---------------------------------------------------------------------------


def test_a_file_for_another_model_is_refused(file, net):
    with pytest.raises(container.ContainerError, match="the model has"):
        container.load(file, nn.Sequential(nn.Linear(3, 3)))
    net[2] = nn.Linear(9, 4)
    with pytest.raises(container.ContainerError, match="does not fit the model"):
        container.load(file, net)


def test_a_model_without_memory_is_refused(file, net):
    with pytest.raises(container.ContainerError, match="meta device"):
        container.load(file, net.to("meta"))


def test_parameters_of_another_shape_dtype_or_name_are_refused(file, net):
    net[4].float()
    with pytest.raises(container.ContainerError, match=r"bfloat16 in.*float32 in the model"):
        container.load(file, net)
    net[4] = nn.Identity()
    with pytest.raises(container.ContainerError, match="absent in the model"):
        container.load(file, net)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        container.read(tmp_path / "nowhere")


# --- interrupted writes ------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(file, small, step, monkeypatch):
    before = file.read_bytes()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        container.save(small, file, note={"a": "newer one"})
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_all_layers_of_a_model_can_be_codes(net, tmp_path):
    small = compress(net, {n: lambda w, s: Array(w.half()) for n in layers(net)})
    container.save(small, tmp_path / "all")
    again = container.load(tmp_path / "all", net)
    assert torch.equal(again[2].code.decode(), small[2].code.decode())
