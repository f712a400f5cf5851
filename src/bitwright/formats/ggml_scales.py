"""The scales and minima of llama.cpp's blocks, out of their bytes: what `ggml.encode` put there.

Codes are not taken out here: they follow from the decoded weights and these scales. Source: ggml-common.h, ggml-quants.c.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.ggml import TYPES
from bitwright.qtensor import Scales
from bitwright.scheme import Scheme

# Scales [B, groups of a block], minima where a type has them; and the f16s [B, 1] that the two stand under, if they do.
Table = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def scales_of(kind: str, rows: Tensor, where: str) -> tuple[Scheme, Scales]:
    """Rows of blocks uint8 [N, bytes] of llama.cpp's type `kind` -> its scheme, and scales (and minima) [N, G].

    FormatError for a type whose blocks are more than codes under scales (the IQ types with lattices).
    """
    if kind not in TYPES:
        remedy = f"one of {', '.join(name.lower() for name in TYPES)}"
        raise FormatError(f"blocks of type {kind} are not codes under scales", where=where, remedy=remedy)
    tables = READERS[kind](rows.reshape(-1, TYPES[kind].bytes))
    scale, *others = (None if table is None else table.reshape(len(rows), -1) for table in tables)
    assert scale is not None
    return TYPES[kind].scheme, Scales(scale, *others)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The f16 at a byte of each block: [B, 1] float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _one(at: int) -> Callable[[Tensor], Table]:
    return lambda blocks: (_half(blocks, at), None, None, None)


def _two(blocks: Tensor) -> Table:
    return _half(blocks, 0), _half(blocks, 2), None, None


def _q2_k(blocks: Tensor) -> Table:
    both = blocks[:, :16]
    return _under(both & 15, _half(blocks, 80), both >> 4, _half(blocks, 82))


def _under(scales: Tensor, outer: Tensor, minima: Tensor, outer_minimum: Tensor) -> Table:
    """Integers of both under an f16 each."""
    return scales * outer, -(minima * outer_minimum), outer, outer_minimum


def _q3_k(blocks: Tensor) -> Table:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], 1)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    return _signed((low | high << 4).float() - 32, _half(blocks, 108))


def _signed(scales: Tensor, outer: Tensor) -> Table:
    """Integers of either sign under one f16."""
    return scales * outer, None, outer, None


def _six_bits(blocks: Tensor) -> Table:
    """Q4_K and Q5_K: undoes `ggml.six_bits`."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([first & 63, rest & 15 | first >> 6 << 4], 1)
    minimum = torch.cat([second & 63, rest >> 4 | second >> 6 << 4], 1)
    return _under(scale, _half(blocks, 0), minimum, _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Table:
    return _signed(blocks[:, 192:208].contiguous().view(torch.int8), _half(blocks, 208))


def _iq4_xs(blocks: Tensor) -> Table:
    high = torch.stack([blocks[:, 2 + i // 4] >> 2 * (i % 4) & 3 for i in range(8)], 1)
    low = torch.stack([blocks[:, 4 + i // 2] >> 4 * (i % 2) & 15 for i in range(8)], 1)
    return _signed((low | high << 4).float() - 32, _half(blocks, 0))


def _mxfp4(blocks: Tensor) -> Table:
    return torch.exp2(blocks[:, :1].float() - 127), None, None, None


READERS: dict[str, Callable[[Tensor], Table]] = {
    "Q8_0": _one(0), "Q4_0": _one(0), "Q4_1": _two, "Q5_0": _one(0), "Q5_1": _two, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _six_bits, "Q5_K": _six_bits, "Q6_K": _q6_k, "IQ4_NL": _one(0), "IQ4_XS": _iq4_xs, "TQ1_0": _one(52),
    "TQ2_0": _one(64), "MXFP4": _mxfp4,
}  # fmt: skip
