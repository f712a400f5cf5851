"""The block types of ggml: how many weights a block has in how many bytes, and its dequantization to float32.

Sizes and dequantizers are the gguf package's, but for types that it does not know, or only by name.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from bitwright.errors import CheckpointError

Types = gguf.GGMLQuantizationType


class Newer(IntEnum):
    """Types that the gguf package of today does not know yet."""

    Q2_0 = 42


Kind = Types | Newer
# Weights and bytes of a block.
SIZES: dict[Kind, tuple[int, int]] = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGML_QUANT_SIZES} | {
    Newer.Q2_0: (64, 18)
}
FLOATS: dict[Kind, torch.dtype] = {
    Types.F32: torch.float32,
    Types.F16: torch.float16,
    Types.BF16: torch.bfloat16,
    Types.F64: torch.float64,
}


def type_named(name: str) -> Kind:
    """The ggml type of this name, such as "Q4_K"; KeyError if there is none."""
    return Types.__members__.get(name) or Newer[name]


def type_numbered(number: int) -> Kind:
    """The ggml type of this number; ValueError if there is none."""
    return Newer(number) if number in Newer.__members__.values() else Types(number)


def decoded(rows: np.ndarray[Any, Any], kind: Kind, name: str) -> np.ndarray[Any, Any]:
    """Dequantize rows of blocks [N, bytes] to [N, K] float32. CheckpointError for a type unknown to the gguf package."""
    if kind in OWN:  # the gguf package has no dequantizer of it
        return OWN[kind](rows)
    try:
        return dequantize(rows, Types(kind))
    except NotImplementedError as error:
        raise CheckpointError(f"blocks of type {kind.name} cannot be decoded", where=name) from error


def _signs(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Dequantize Q1_0: an f16 scale d for 128 weights, then one bit for each: 1 is d, 0 is −d (dequantize_row_q1_0)."""
    blocks = rows.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits, d, -d).reshape(len(rows), -1)


def _two_bits(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Dequantize Q2_0: an f16 scale d for 64 weights, then two bits for each: -d, 0, d or 2 d (dequantize_row_q2_0)."""
    blocks = rows.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(len(blocks), -1)
    return ((codes.astype(np.float32) - 1) * d).reshape(len(rows), -1)


OWN: dict[Kind, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {Types.Q1_0: _signs, Newer.Q2_0: _two_bits}
