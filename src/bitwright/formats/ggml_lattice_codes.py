"""Read the codes from the bytes of ggml's IQ1, IQ2 and IQ3 blocks, to verify what ggml_lattices.py writes by other code.

Each reader gives the numbers of the codebook's entries and, as IQ2 and IQ3 store them, the signs, or IQ1's direction of digits.
Source: the `dequantize_row` functions in ggml-quants.c.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from bitwright.numerics.lattice import lattice

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
PARITY = np.array([bits | (bits.bit_count() & 1) << 7 for bits in range(128)], np.uint8)  # seven signs -> eight


def codes(kind: str, blocks: Bytes) -> Bytes:
    """Blocks [B, bytes] -> codes uint8 [B, 256]."""
    entry, other = READERS[kind](blocks)
    one = lattice(kind.lower())
    if not one.signs:
        return np.asarray(one.codes.numpy()[other, entry]).reshape(len(blocks), -1)
    found = one.codes.numpy()[0][entry].reshape(len(blocks), -1)
    negative = np.unpackbits(other.astype(np.uint8).reshape(len(blocks), -1), axis=1, bitorder="little")
    return np.where(negative, np.uint8(one.top) - found, found)


def _words(part: Bytes, kind: str) -> Numbers:
    """Little-endian integers in consecutive bytes."""
    return np.ascontiguousarray(part).view(kind).astype(np.int64)


def _bits(numbers: Numbers, width: int, each: int) -> Numbers:
    """The lowest `each` fields of `width` bits of integers [B, n]: [B, n · each]."""
    fields = numbers[..., None] >> np.arange(0, width * each, width) & (1 << width) - 1
    return np.asarray(fields.reshape(len(numbers), -1))


def _iq2_xxs(b: Bytes) -> tuple[Numbers, Numbers]:
    words = _words(b[:, 2:], "<u4")
    return _bits(words[:, ::2], 8, 4), PARITY[_bits(words[:, 1::2], 7, 4)].astype(np.int64)


def _iq2_xs(b: Bytes) -> tuple[Numbers, Numbers]:
    words = _words(b[:, 2:66], "<u2")
    return words & 511, PARITY[words >> 9].astype(np.int64)


def _iq2_s(b: Bytes) -> tuple[Numbers, Numbers]:
    high = _bits(b[:, 66:74].astype(np.int64), 2, 4)
    return b[:, 2:34] | high << 8, b[:, 34:66].astype(np.int64)


def _iq3_xxs(b: Bytes) -> tuple[Numbers, Numbers]:
    return b[:, 2:66].astype(np.int64), PARITY[_bits(_words(b[:, 66:], "<u4"), 7, 4)].astype(np.int64)


def _iq3_s(b: Bytes) -> tuple[Numbers, Numbers]:
    high = _bits(b[:, 66:74].astype(np.int64), 1, 8)
    return b[:, 2:66] | high << 8, b[:, 74:106].astype(np.int64)


def _iq1_s(b: Bytes) -> tuple[Numbers, Numbers]:
    words = _words(b[:, 34:], "<u2")
    return b[:, 2:34] | _bits(words, 3, 4) << 8, (words >> 15).repeat(4, 1)


def _iq1_m(b: Bytes) -> tuple[Numbers, Numbers]:
    fields = _bits(b[:, 32:48].astype(np.int64), 4, 2)
    return b[:, :32] | (fields & 7) << 8, fields >> 3


READERS: dict[str, Callable[[Bytes], tuple[Numbers, Numbers]]] = {
    "IQ1_S": _iq1_s, "IQ1_M": _iq1_m, "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}  # fmt: skip
