"""Writer of ggml's block types (Q4_0, Q4_K, …): pack codes and scales of 32 or 256 weights into a block's bytes.

Source: ggml-common.h, ggml-quants.c. `TYPES` has a row for each block type: its Scheme, the weights and bytes of a block, and
a function that makes the block's fields in their order. Codes of less than 8 bits are packed side by side in bytes (`Bits`).
Written tensors are read back by ggml_codes.py, ggml_scales.py and the gguf package's `dequantize`, none of which shares
packing code with this file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitwright.formats import ggml_lattices
from bitwright.kernels import native
from bitwright.numerics.codec import integers_of
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme

CACHED = 1 << 20  # weights packed in one step, so that they stay in the cache


@dataclass(frozen=True)
class Blocks:
    """The codes and scales of B blocks of n weights.

    stored    uint8 [B, n], codes as a QTensor has them (signed ones seen as uint8)
    lowest    the lowest code of the grid, 0 for codebooks
    scale     float32 [B], the block's scale, an f16 (MXFP4: a power of two); with two levels, the scale of `scales`
    minimum   float32 [B] ≥ 0, subtracted from all weights; with two levels, the scale of `minima`; zeros if the type has none
    scales, minima  int16 [B, 256 / g], the integer scales and minima of groups, for types with two levels; else empty
    """

    stored: Tensor
    lowest: int
    scale: Tensor
    minimum: Tensor
    scales: Tensor
    minima: Tensor

    @cached_property
    def codes(self) -> Tensor:
        """uint8 [B, n], unsigned codes: `stored` minus `lowest`."""
        return self.stored + -self.lowest  # modulo 256


@dataclass(frozen=True)
class Bits:
    """A field that packs the lowest `bits` bits of each of `numbers` uint8 [B, n].

    The first `run` numbers go to the lowest bits of `run` bytes, the next `run` to the bits above, until these bytes are full;
    then the next `run` bytes. turn: a mask of bits that are flipped first (XOR).
    """

    numbers: Tensor
    run: int
    bits: int
    turn: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the packed bytes."""
        return self.numbers.shape[0], self.numbers.shape[1] * self.bits // 8

    def put(self, place: Tensor) -> None:
        """Pack the numbers into `place`, uint8 [B, n · bits / 8]."""
        if native is not None and self.run % 8 == 0:
            native.put_side_by_side(self.numbers, place, self.run, self.bits, self.turn)
            return
        parts = ((self.numbers ^ self.turn) & ((1 << self.bits) - 1)).unflatten(-1, (-1, 8 // self.bits, self.run))
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8)[:, None]
        place.copy_((parts << shifts).sum(-2, dtype=torch.uint8).flatten(1))


Field = Tensor | Bits  # consecutive bytes of each of B blocks: uint8 [B, bytes of the field]


@dataclass(frozen=True)
class BlockType:
    """One ggml block type. size: weights in a block; bytes: of a block; fields: makes a block's fields, in their order."""

    name: str
    scheme: Scheme
    size: int
    bytes: int
    fields: Callable[[Blocks], tuple[Field, ...]]


def encode(q: QTensor, kind: BlockType) -> Tensor:
    """Pack a matrix into blocks: uint8 [N, K / size · bytes]. K must be a multiple of the block's size."""
    N, K = q.codes.shape
    found, step = torch.empty(N, K // kind.size, kind.bytes, dtype=torch.uint8), max(1, CACHED // K)
    for at in range(0, N, step):
        here = slice(at, at + step)
        beside(kind.fields(_blocks(q, kind, here)), found[here].flatten(0, 1))
    return found.flatten(1)


def _blocks(q: QTensor, kind: BlockType, here: slice) -> Blocks:
    """The blocks of some rows of q."""
    scheme = q.scheme
    lowest = scheme.levels.lo if scheme.levels.levels is None and scheme.zero != "min" else 0
    codes = q.codes[here].view(torch.uint8).reshape(-1, kind.size)
    scale = q.scales.scale[here]
    zero = torch.zeros_like(scale) if q.scales.zero is None else -q.scales.zero[here]
    none = torch.empty(len(codes), 0, dtype=torch.int16)
    if q.scales.outer is None:
        return Blocks(codes, lowest, scale.flatten(), zero.flatten(), none, none)
    outer = q.scales.outer[here]
    under = torch.zeros_like(outer) if q.scales.outer_zero is None else q.scales.outer_zero[here]
    scales, minima = (
        integers_of(table, f16, scheme).short().view(len(codes), -1) for table, f16 in ((scale, outer), (zero, under))
    )
    return Blocks(codes, lowest, outer.flatten(), under.flatten(), scales, minima)


# ------------------------------------------------------------------------------------------------------------- pieces


def half(x: Tensor) -> Tensor:
    """Numbers [B] as the bytes of f16: uint8 [B, 2]."""
    return x.half()[:, None].view(torch.uint8)


def beside(fields: tuple[Field, ...], out: Tensor) -> None:
    """Write the fields of B blocks one after the other into out, uint8 [B, bytes]."""
    at = 0
    for field in fields:
        place = out[:, at : (at := at + field.shape[1])]
        if isinstance(field, Bits):
            field.put(place)
        elif native is not None:
            native.put_rows(field, place)
        else:
            place.copy_(field)


def nibbles(codes: Tensor, run: int = 16, turn: int = 0) -> Bits:
    """The low 4 bits of codes uint8 [B, n], packed in n / 2 bytes."""
    return Bits(codes, run, 4, turn)


def pairs(codes: Tensor) -> Bits:
    """The low 2 bits of codes, 128 in 32 bytes."""
    return Bits(codes, 32, 2)


def singles(codes: Tensor) -> Bits:
    """The lowest bit of codes, 256 in 32 bytes."""
    return Bits(codes, 32, 1)


def six_bits(scales: Tensor, minima: Tensor) -> tuple[Field, ...]:
    """The eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K, in 12 bytes."""
    s, m = scales.to(torch.uint8), minima.to(torch.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return first, second, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4


def signed_six_bits(scales: Tensor) -> tuple[Field, ...]:
    """The 16 signed 6-bit scales of Q3_K, plus 32, in 12 bytes: first their low 4 bits, then their high 2 bits."""
    s = (scales + 32).to(torch.uint8)
    return Bits(s, 8, 4), Bits(s >> 4, 4, 2)


# -------------------------------------------------------------------------------------------------------------- types


def _q8_0(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), b.stored


def _q4_0(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), nibbles(b.stored, turn=8)  # flipping bit 3 of a signed 4-bit code adds 8


def _iq4_nl(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), nibbles(b.stored)


def _q4_1(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), half(-b.minimum), nibbles(b.codes)


def _fifth_bits(codes: Tensor) -> Tensor:
    """The fifth bits of 32 codes: [B, 32] -> uint8 [B, 4]."""
    bits = (codes >> 4).view(-1, 4, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def _q5_0(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), _fifth_bits(b.codes), nibbles(b.codes)


def _q5_1(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), half(-b.minimum), _fifth_bits(b.codes), nibbles(b.codes)


def _q2_k(b: Blocks) -> tuple[Field, ...]:
    scales = b.scales.to(torch.uint8) | b.minima.to(torch.uint8) << 4
    return scales, pairs(b.codes), half(b.scale), half(b.minimum)


def _q3_k(b: Blocks) -> tuple[Field, ...]:
    return singles(b.codes >> 2), pairs(b.codes), *signed_six_bits(b.scales), half(b.scale)


def _q4_k(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), half(b.minimum), *six_bits(b.scales, b.minima), nibbles(b.codes, 32)


def _q5_k(b: Blocks) -> tuple[Field, ...]:
    high = singles(b.codes >> 4)
    return half(b.scale), half(b.minimum), *six_bits(b.scales, b.minima), high, nibbles(b.codes, 32)


def _q6_k(b: Blocks) -> tuple[Field, ...]:
    scales = b.scales.to(torch.int8).view(torch.uint8)
    return nibbles(b.codes, 64), pairs(b.codes >> 4), scales, half(b.scale)


def _iq4_xs(b: Blocks) -> tuple[Field, ...]:
    s = (b.scales + 32).to(torch.uint8)
    low = (s & 15).view(-1, 4, 2)
    high = (s >> 4).view(-1, 2, 4)
    first = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
    return half(b.scale), first, low[..., 0] | low[..., 1] << 4, nibbles(b.codes)


def _tq2_0(b: Blocks) -> tuple[Field, ...]:
    return pairs(b.codes), half(b.scale)


def _tq1_0(b: Blocks) -> tuple[Field, ...]:
    """Five base-3 digits in a byte, the first the most significant, as a fraction of 256 rounded up."""
    return _digits(b.codes[:, :160], 5), _digits(b.codes[:, 160:240], 5), _digits(b.codes[:, 240:], 4), half(b.scale)


def _digits(codes: Tensor, runs: int) -> Tensor:
    number = torch.zeros(len(codes), codes.shape[1] // runs, dtype=torch.int32)
    for run in codes.view(len(codes), runs, -1).unbind(1):
        number = number * 3 + run
    number = number * 3 ** (5 - runs)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _mxfp4(b: Blocks) -> tuple[Field, ...]:
    exponent = torch.frexp(b.scale).exponent - 1 + 127
    return torch.where(b.scale == 0, 0, exponent).to(torch.uint8)[:, None], nibbles(b.codes)


def _q1_0(b: Blocks) -> tuple[Field, ...]:
    return half(b.scale), Bits(b.codes, 1, 1)


def _q2_0(b: Blocks) -> tuple[Field, ...]:
    """Q2_0 stores -1..2, where a code of int2 is -2..1: both signs are turned."""
    return half(-b.scale), Bits(1 - b.stored, 1, 2)


def _in_entries(fields: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Callable[[Blocks], tuple[Field, ...]]:
    """The fields of ggml_lattices.py behind the super-block's f16."""
    return lambda b: (half(b.scale), *fields(b.stored, b.scales))


def _iq1_m(b: Blocks) -> tuple[Field, ...]:
    return ggml_lattices.iq1_m(b.stored, b.scales, b.scale)


def _type(
    name: str, size: int, size_in_bytes: int, fields: Callable[[Blocks], tuple[Field, ...]], scheme: str = ""
) -> BlockType:
    return BlockType(name, Scheme.parse(scheme or name), size, size_in_bytes, fields)


TYPES = {
    kind.name: kind
    for kind in (
        _type("Q8_0", 32, 34, _q8_0),
        _type("Q4_0", 32, 18, _q4_0),
        _type("Q4_1", 32, 20, _q4_1),
        _type("Q5_0", 32, 22, _q5_0),
        _type("Q5_1", 32, 24, _q5_1),
        _type("Q2_K", 256, 84, _q2_k),
        _type("Q3_K", 256, 110, _q3_k),
        _type("Q4_K", 256, 144, _q4_k),
        _type("Q5_K", 256, 176, _q5_k),
        _type("Q6_K", 256, 210, _q6_k),
        _type("IQ4_NL", 32, 18, _iq4_nl),
        _type("IQ4_XS", 256, 136, _iq4_xs),
        _type("TQ1_0", 256, 54, _tq1_0, "ternary-g256"),
        _type("TQ2_0", 256, 66, _tq2_0, "ternary-g256"),
        _type("MXFP4", 32, 17, _mxfp4),
        _type("Q1_0", 128, 18, _q1_0, "binary-g128"),
        _type("Q2_0", 64, 18, _q2_0),
        _type("IQ1_S", 256, 50, _in_entries(ggml_lattices.iq1_s)),
        _type("IQ1_M", 256, 56, _iq1_m),
        _type("IQ2_XXS", 256, 66, _in_entries(ggml_lattices.iq2_xxs)),
        _type("IQ2_XS", 256, 74, _in_entries(ggml_lattices.iq2_xs)),
        _type("IQ2_S", 256, 82, _in_entries(ggml_lattices.iq2_s)),
        _type("IQ3_XXS", 256, 98, _in_entries(ggml_lattices.iq3_xxs)),
        _type("IQ3_S", 256, 110, _in_entries(ggml_lattices.iq3_s)),
    )
}
