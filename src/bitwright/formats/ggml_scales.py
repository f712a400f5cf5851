"""Read the scales and minima from the bytes of ggml blocks, written by `ggml.encode` or by llama.cpp.

NVFP4 is only read, never written. The IQ1, IQ2 and IQ3 types index a codebook (lattice) of several magnitudes at
once; after decoding, each weight is a 3- or 4-bit code with a scale as in any other type. Codes are not read here:
`format.recovered` derives them from the decoded weights and these scales. Source: ggml-common.h, ggml-quants.c.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.formats.ggml import TYPES
from bitwright.gguf.block_types import SIZES, type_named
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme

# Of B blocks: scales and minima [B, groups in a block], and the f16 scales of each [B, 1]; None where the type has none.
Table = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def scales_of(kind: str, rows: Tensor, where: str) -> tuple[Scheme, Scales]:
    """Rows of blocks uint8 [N, bytes] of the ggml type `kind` -> its scheme, and scales (and minima) [N, G].

    FormatError for a type that is not read here.
    """
    if kind not in READERS:
        raise FormatError(f"blocks of type {kind} are not read", where=where, remedy=f"one of {', '.join(READERS)}")
    size = SIZES[type_named(kind)][1]
    scale, *others = (None if t is None else t.reshape(len(rows), -1) for t in READERS[kind](rows.reshape(-1, size)))
    assert scale is not None
    scheme = Scheme.parse(READ_ONLY[kind]) if kind in READ_ONLY else TYPES[kind].scheme
    return scheme, Scales(scale, outer=torch.ones(1, 1)) if scheme.scale == "e4m3" else Scales(scale, *others)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The f16 at a byte of each block: [B, 1] float32."""
    return blocks.view(torch.float16)[:, at // 2, None].float()


def _one(at: int) -> Callable[[Tensor], Table]:
    return lambda blocks: (_half(blocks, at), None, None, None)


def _two(blocks: Tensor) -> Table:
    return _half(blocks, 0), _half(blocks, 2), None, None


def _q2_k(blocks: Tensor) -> Table:
    both = blocks[:, :16]
    return _under(both & 15, _half(blocks, 80), both >> 4, _half(blocks, 82))


def _under(scales: Tensor, outer: Tensor, minima: Tensor, outer_minimum: Tensor) -> Table:
    """Two-level scales and minima: integers times one f16 each; minima are subtracted, hence negative here."""
    return scales * outer, -(minima * outer_minimum), outer, outer_minimum


def _q3_k(blocks: Tensor) -> Table:
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = torch.cat([low & 15, low >> 4], 1)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    return _signed((low | high << 4).float() - 32, _half(blocks, 108))


def _signed(scales: Tensor, outer: Tensor) -> Table:
    """Two-level scales without minima: signed integers times one f16."""
    return scales * outer, None, outer, None


def _six_bits(blocks: Tensor) -> Table:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes; undoes `ggml.six_bits`."""
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


def _q2_0(blocks: Tensor) -> Table:
    """Q2_0 stores the codes -1..2, read as 1..-2."""
    return -_half(blocks, 0), None, None, None


def _nvfp4(blocks: Tensor) -> Table:
    """NVFP4: four unsigned e4m3 scales; the bit pattern of NaN counts as zero, as in llama.cpp."""
    local = blocks[:, :4] & 127
    return torch.where(local == 127, 0, local).view(torch.float8_e4m3fn).float(), None, None, None


def _odd(integers: Tensor, outer: Tensor) -> Table:
    """The IQ types' scales: odd integers 2i + 1 times one f16."""
    return _signed(2 * integers.float() + 1, outer)


def _top_bits(at: int, stop: int, each: int, mask: int = 15) -> Callable[[Tensor], Table]:
    """Reader of scales that lie in the top four bits (masked) of the last of every `each` bytes in [at, stop)."""
    return lambda blocks: _odd(blocks[:, at:stop].unflatten(1, (-1, each))[..., -1] >> 4 & mask, _half(blocks, 0))


def _both_halves(at: int, stop: int) -> Callable[[Tensor], Table]:
    """Reader of 4-bit scales in the bytes [at, stop), two in a byte, the low half first."""
    return lambda blocks: _odd(
        torch.stack([blocks[:, at:stop] & 15, blocks[:, at:stop] >> 4], 2).flatten(1), _half(blocks, 0)
    )


def _iq1_m(blocks: Tensor) -> Table:
    """IQ1_M: four 16-bit words, each with four 3-bit scales and, in its top bits, four bits of the superblock's f16."""
    words = blocks[:, 48:56].contiguous().view(torch.int16).int()
    scales = torch.stack([words >> shift & 7 for shift in (0, 3, 6, 9)], 2).flatten(1)
    outer = ((words >> 12 & 15) << torch.arange(0, 16, 4)).sum(1, keepdim=True)
    return _odd(scales, outer.short().view(torch.float16).float())


READERS: dict[str, Callable[[Tensor], Table]] = {
    "Q8_0": _one(0), "Q4_0": _one(0), "Q4_1": _two, "Q5_0": _one(0), "Q5_1": _two, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _six_bits, "Q5_K": _six_bits, "Q6_K": _q6_k, "IQ4_NL": _one(0), "IQ4_XS": _iq4_xs, "TQ1_0": _one(52),
    "TQ2_0": _one(64), "MXFP4": _mxfp4, "NVFP4": _nvfp4, "Q1_0": _one(0), "Q2_0": _q2_0,
    "IQ1_S": _top_bits(34, 50, 2, 7), "IQ1_M": _iq1_m,
    "IQ2_XXS": _top_bits(2, 66, 8), "IQ2_XS": _both_halves(66, 74), "IQ2_S": _both_halves(74, 82),
    "IQ3_XXS": _top_bits(66, 98, 4), "IQ3_S": _both_halves(106, 110),
}  # fmt: skip

# The schemes of the types that are only read.
READ_ONLY = {
    "NVFP4": "nvfp4",
}
