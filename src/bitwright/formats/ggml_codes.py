"""Read the codes from the bytes of ggml blocks: verifies written files faster than dequantizing with the gguf package.

The layouts are those of the `dequantize_row` functions in ggml-quants.c. No packing code is shared with the writer, ggml.py;
tests compare both with the gguf package.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.formats import ggml_lattice_codes
from bitwright.formats.ggml import TYPES
from bitwright.kernels import native
from bitwright.numerics.codec import code_dtype

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def codes_of(kind: str, rows: Tensor) -> Tensor:
    """Rows of blocks uint8 [N, bytes] of the ggml type `kind` -> codes [N, K], as a QTensor has them."""
    blocks = rows.numpy().reshape(-1, TYPES[kind].bytes)
    if kind in ggml_lattice_codes.READERS:
        return torch.from_numpy(ggml_lattice_codes.codes(kind, blocks).reshape(len(rows), -1))
    read, zero = READERS[kind]
    codes = read(blocks).reshape(len(rows), -1)
    if zero:
        codes -= np.uint8(zero)  # modulo 256: signed, seen as int8
    return torch.from_numpy(codes).view(code_dtype(TYPES[kind].scheme))


def _apart(packed: Bytes, bits: int, run: int, less: int = 0) -> Bytes:
    """Unpack bytes [B, n] -> [B, 8 n / bits] numbers, and subtract `less`, modulo 256.

    Of each `run` bytes, first the numbers in the lowest bits of all, then those in the next bits, and so on.
    """
    if native is not None and run % 8 == 0:
        found = np.empty((len(packed), packed.shape[1] * 8 // bits), np.uint8)
        native.take_side_by_side(torch.from_numpy(packed), torch.from_numpy(found), run, bits, less)
        return found
    stretches = packed.reshape(len(packed), -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((stretches >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(packed), -1) - np.uint8(less)


def _nibbles(start: int, run: int = 16, *, less: int = 0) -> Callable[[Bytes], Bytes]:
    return lambda b: _apart(b[:, start:], 4, run, less)


def _pairs(start: int) -> Callable[[Bytes], Bytes]:
    return lambda b: _apart(b[:, start : start + 64], 2, 32)


def _fifth(at: int) -> Callable[[Bytes], Bytes]:
    """Reader of Q5_0 and Q5_1: 32 fifth bits at byte `at`, then the low four bits of 32 codes."""

    def read(b: Bytes) -> Bytes:
        high = np.unpackbits(b[:, at : at + 4], axis=1, bitorder="little")
        return _above(_nibbles(at + 4)(b).reshape(len(b), 32), high, 4)

    return read


def _above(low: Bytes, high: Bytes, bits: int) -> Bytes:
    """Join the low bits of codes and the high bits, which begin at bit `bits`."""
    return low | np.left_shift(high, np.uint8(bits), dtype=np.uint8)


def _q3_k(b: Bytes) -> Bytes:
    return _above(_pairs(32)(b), _apart(b[:, :32], 1, 32), 2)


def _q5_k(b: Bytes) -> Bytes:
    return _above(_nibbles(48, 32)(b), _apart(b[:, 16:48], 1, 32), 4)


def _q6_k(b: Bytes) -> Bytes:
    return _above(_apart(b[:, :128], 4, 64), _apart(b[:, 128:192], 2, 32), 4)


def _tq1_0(b: Bytes) -> Bytes:
    """TQ1_0: five base-3 digits in a byte, stored as a fraction of 256. Times 3, the overflow is the next digit."""
    parts = []
    for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        rest = b[:, start:stop].astype(np.uint16)
        for _ in range(digits):
            rest = np.multiply(rest & 255, 3, dtype=np.uint16)
            parts.append((rest >> 8).astype(np.uint8))
    return np.concatenate(parts, 1)


# Block type -> its reader, and the number to subtract from the codes that it gives, so that they are signed.
READERS: dict[str, tuple[Callable[[Bytes], Bytes], int]] = {
    "Q8_0": (lambda b: b[:, 2:].copy(), 0), "Q4_0": (_nibbles(2, less=8), 0), "Q4_1": (_nibbles(4), 0), "Q5_0": (_fifth(2), 16),
    "Q5_1": (_fifth(4), 0), "Q2_K": (_pairs(16), 0), "Q3_K": (_q3_k, 4), "Q4_K": (_nibbles(16, 32), 0), "Q5_K": (_q5_k, 0),
    "Q6_K": (_q6_k, 32), "IQ4_NL": (_nibbles(2), 0), "IQ4_XS": (_nibbles(8), 0), "TQ1_0": (_tq1_0, 1),
    "TQ2_0": (_pairs(0), 1), "MXFP4": (_nibbles(1), 0), "Q1_0": (lambda b: _apart(b[:, 2:], 1, 1), 0),
    "Q2_0": (lambda b: np.uint8(1) - _apart(b[:, 2:], 2, 1), 0),
}  # fmt: skip
