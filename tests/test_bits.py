"""Packing: an exact round trip for every width, and a format that does not change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit import bits


def by_hand(values: list[int], width: int) -> bytes:
    """The definition, as a string of binary digits."""
    digits = "".join(f"{value:0{width}b}" for value in values)
    digits += "0" * (-len(digits) % 8)
    return bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))


streams = st.integers(1, 16).flatmap(
    lambda width: st.tuples(
        st.just(width), st.lists(st.integers(0, 2**width - 1), min_size=0, max_size=70)
    )
)


@given(streams)
def test_packing_is_concatenation_of_binary_expansions_and_unpacking_its_inverse(stream):
    width, values = stream
    data = bits.pack(torch.tensor(values, dtype=torch.int32), width)
    assert data == by_hand(values, width)
    assert bits.unpack(data, width, len(values)).tolist() == values


@pytest.mark.parametrize("width", range(1, 17))
def test_long_streams_survive_the_seams_between_chunks(width):
    count = 3 * bits._CHUNK + 5
    generator = torch.Generator().manual_seed(width)
    values = torch.randint(0, 2**width, (count,), generator=generator, dtype=torch.int32)
    data = bits.pack(values, width)
    assert len(data) == bits.packed_size(count, width)
    assert torch.equal(bits.unpack(data, width, count).int(), values)


@pytest.mark.parametrize(
    ("width", "golden"),
    [
        (1, "b8"),
        (3, "29ce"),
        (4, "123470"),
        (8, "0102030407"),
        (11, "0020080180400e"),
        (16, "00010002000300040007"),
    ],
)
def test_the_format_is_pinned(width, golden):
    values = [1, 0, 1, 1, 1] if width == 1 else [1, 2, 3, 4, 7]
    assert bits.pack(torch.tensor(values), width).hex() == golden


def test_memory_order_and_dtype_of_the_input_do_not_matter():
    values = torch.arange(12).reshape(3, 4)
    assert bits.pack(values.T, 4) == bits.pack(values.T.contiguous().to(torch.uint8), 4)


@pytest.mark.parametrize("width", [0, 17, 4.0, True, None])
def test_a_width_outside_1_to_16_is_refused(width):
    with pytest.raises(ValueError, match="from 1 to 16"):
        bits.pack(torch.tensor([0]), width)


@pytest.mark.parametrize("value", [-1, 16])
def test_a_value_that_does_not_fit_is_refused(value):
    with pytest.raises(ValueError, match="4 bits hold 0 to 15"):
        bits.pack(torch.tensor([3, value]), 4)


def test_reals_are_refused():
    with pytest.raises(ValueError, match="must be integers"):
        bits.pack(torch.tensor([0.5]), 4)


@pytest.mark.parametrize(("data", "count"), [(b"", 1), (b"\x00\x00", 2), (b"\x00", 3)])
def test_a_length_that_does_not_fit_the_count_is_refused(data, count):
    with pytest.raises(ValueError, match="values of 4 bits take"):
        bits.unpack(data, 4, count)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="0 or more"):
        bits.unpack(b"", 4, -1)


def test_set_bits_in_the_padding_are_refused():
    assert bits.unpack(b"\x10", 4, 1).tolist() == [1]
    with pytest.raises(ValueError, match="padding"):
        bits.unpack(b"\x11", 4, 1)


# --- trits --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=40))
def test_trits_come_back_and_five_take_a_byte(trits):
    data = bits.pack_trits(torch.tensor(trits, dtype=torch.uint8))
    assert bits.unpack_trits(data, len(trits)).tolist() == trits
    assert len(data) == -(-len(trits) // 5)
    digits = [trits[i : i + 5] + [0] * (5 - len(trits[i : i + 5])) for i in range(0, len(trits), 5)]
    assert list(data) == [int("".join(map(str, five)), 3) for five in digits]


def test_every_byte_up_to_242_is_five_trits_and_no_other():
    data = bytes(range(243))
    assert bits.pack_trits(bits.unpack_trits(data, 5 * 243)) == data
    with pytest.raises(ValueError, match="at most 242"):
        bits.unpack_trits(bytes([243]), 5)


@pytest.mark.parametrize("value", [-1, 3])
def test_what_is_no_trit_is_refused(value):
    with pytest.raises(ValueError, match="a trit is 0, 1 or 2"):
        bits.pack_trits(torch.tensor([0, value]))


@pytest.mark.parametrize(("data", "count"), [(b"", 1), (b"\x00", 6), (b"\x00", 0), (b"", -1)])
def test_bytes_of_another_number_of_trits_are_refused(data, count):
    with pytest.raises(ValueError, match="take ceil"):
        bits.unpack_trits(data, count)


def test_trits_in_the_padding_are_refused():
    assert bits.unpack_trits(bytes([162]), 1).tolist() == [2]
    with pytest.raises(ValueError, match="padding"):
        bits.unpack_trits(bytes([163]), 1)
