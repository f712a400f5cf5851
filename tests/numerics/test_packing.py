"""Packing: against a bit stream written with Python integers, and against compressed-tensors as an independent reader."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.numerics.packing import pack, unpack, words

BITS = range(1, 9)
COUNTS = (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 65, 101)


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed))


def slow_words(codes: list[int], bits: int) -> list[int]:
    """One long integer with code i at bit i·b, cut into 32-bit words read as two's complement."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    count = (len(codes) * bits + 31) // 32
    octets = stream.to_bytes(4 * count, "little")
    return [int.from_bytes(octets[4 * i : 4 * i + 4], "little", signed=True) for i in range(count)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_pack_is_a_little_endian_bit_stream(bits: int, count: int) -> None:
    codes = random_codes(3, count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.tolist() == [slow_words(row, bits) for row in codes.tolist()]
    assert packed.shape[1] == words(count, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", COUNTS)
def test_unpack_reads_a_bit_stream_made_by_hand(bits: int, count: int) -> None:
    codes = random_codes(2, count, bits, seed=1)
    stream = torch.tensor([slow_words(row, bits) for row in codes.tolist()], dtype=torch.int32)
    read = unpack(stream, bits, count)
    assert read.dtype == torch.uint8
    assert read.tolist() == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 33, 64, 101])
def test_compressed_tensors_reads_and_writes_the_same_words(bits: int, count: int) -> None:
    codes = random_codes(4, count, bits, seed=2)
    signed = (codes - (1 << (bits - 1))).to(torch.int8)  # they store code + 2^(b−1)
    packed = pack(codes, bits)
    theirs = pack_to_int32(signed, bits)
    assert unpack_from_int32(packed, bits, signed.shape).tolist() == signed.tolist()
    assert unpack(theirs, bits, count).tolist() == codes.tolist()
    used = count * bits % 32  # their padding codes may leave bits behind the last code of a row; ours are zero
    mask = (1 << used) - 1 if used else -1
    assert packed[:, :-1].tolist() == theirs[:, :-1].tolist()
    assert (packed[:, -1].long() & 0xFFFFFFFF).tolist() == (theirs[:, -1].long() & mask & 0xFFFFFFFF).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 90), st.integers(1, 4), st.integers(0, 10**6))
def test_round_trip(bits: int, count: int, rows: int, seed: int) -> None:
    codes = random_codes(rows, count, bits, seed)
    assert torch.equal(unpack(pack(codes, bits), bits, count).long(), codes)
    assert torch.equal(pack(codes.to(torch.uint8), bits), pack(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_all_ones_fill_the_words(bits: int) -> None:
    """The highest code everywhere sets every bit, the sign bit of each word included."""
    assert pack(torch.full((1, 32), (1 << bits) - 1), bits).tolist() == [[-1] * bits]


def test_padding_bits_are_zero_and_spare_words_are_ignored() -> None:
    assert pack(torch.tensor([[7]]), 3).tolist() == [[7]]
    spare = torch.tensor([[0x0321, -1, -1]], dtype=torch.int32)
    assert unpack(spare, 4, 3).tolist() == [[1, 2, 3]]


def test_a_transposed_view_packs_as_its_values() -> None:
    codes = random_codes(33, 3, 5).T
    assert torch.equal(pack(codes, 5), pack(codes.contiguous(), 5))
    packed = pack(codes, 5)
    wide = torch.stack([packed, packed], dim=2)[..., 0]  # not contiguous
    assert torch.equal(unpack(wide, 5, 33).long(), codes)


def test_arguments_are_unchanged() -> None:
    codes = random_codes(2, 33, 3)
    before = codes.clone()
    packed = pack(codes, 3)
    packed_before = packed.clone()
    unpack(packed, 3, 33).fill_(0)
    assert torch.equal(codes, before)
    assert torch.equal(packed, packed_before)


@pytest.mark.parametrize(
    ("count", "bits", "expected"), [(1, 1, 1), (32, 1, 1), (33, 1, 2), (32, 3, 3), (11, 3, 2), (8, 8, 2)]
)
def test_words(count: int, bits: int, expected: int) -> None:
    assert words(count, bits) == expected


@pytest.mark.parametrize("bits", [0, -1, 9, 32])
def test_other_widths_are_refused(bits: int) -> None:
    for call in (
        lambda: pack(torch.zeros(1, 8, dtype=torch.int64), bits),
        lambda: unpack(torch.zeros(1, 8, dtype=torch.int32), bits, 1),
    ):
        with pytest.raises(SchemeError, match=f"cannot pack codes of {bits} bits") as caught:
            call()
        assert caught.value.remedy == "1 to 8"


@pytest.mark.parametrize("code", [-1, 8])
def test_codes_that_do_not_fit_are_refused(code: int) -> None:
    with pytest.raises(SchemeError, match=r"codes from .* do not fit into 3 bits"):
        pack(torch.tensor([[0, code]]), 3)


def test_too_few_words_are_refused() -> None:
    with pytest.raises(SchemeError, match="1 words a row, where 11 codes of 3 bits take 2"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 3, 11)


def test_no_rows_pack_to_no_rows() -> None:
    assert pack(torch.zeros(0, 8, dtype=torch.int64), 4).shape == (0, 1)
