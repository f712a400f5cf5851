"""Writer of ggml's IQ1, IQ2 and IQ3 blocks: 256 weights as indices into a codebook, signs, and odd scales under an f16.

Each function makes the fields of a block in their order, as in ggml.py. Source: ggml-common.h, `dequantize_row_iq*` in
ggml-quants.c. Written blocks are read back by the gguf package's `dequantize`.
"""

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.numerics.lattice import lattice


def _entries(stored: Tensor, grid: str) -> tuple[Tensor, Tensor]:
    """Variant and number of the codebook's entry for each d codes of uint8 [B, 256]: int32 [B, 256 / d].

    FormatError for a combination that the codebook does not have.
    """
    variant, entry = lattice(grid).index(stored)
    if bool((entry < 0).any()):
        message = f"{int((entry < 0).sum())} runs of codes are no entries of the codebook of {grid}"
        raise FormatError(message, remedy="--method gptq, search or rtn: they choose among its entries")
    return variant.int(), entry.int()


def _negative(stored: Tensor, grid: str) -> Tensor:
    """A bit for each weight's sign, eight in a byte: uint8 [B, 32]; the first in the lowest bit."""
    negative = (stored <= lattice(grid).top // 2).unflatten(1, (-1, 8))
    return (negative << torch.arange(8)).sum(-1).to(torch.uint8)


def _steps(scales: Tensor) -> Tensor:
    """Stored scales i of odd integers 2i + 1: int32 [B, G]."""
    return (scales.int() - 1).div(2, rounding_mode="floor").clamp(min=0)


def _nibbles(steps: Tensor) -> Tensor:
    """Numbers of 4 bits, two in a byte, the first in its low half: uint8 [B, G / 2]."""
    pairs = steps.unflatten(1, (-1, 2))
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def _bytes(numbers: Tensor, count: int) -> Tensor:
    """The low `count` bytes of integers [B, n], little-endian: uint8 [B, n · count]."""
    return torch.stack([numbers >> 8 * i & 255 for i in range(count)], 2).flatten(1).to(torch.uint8)


def _low(entry: Tensor) -> Tensor:
    return (entry & 255).to(torch.uint8)


def _high(entry: Tensor, each: int) -> Tensor:
    """The bits of indices above the eighth, those of 8 / each neighbours in a byte, `each` bits apart."""
    parts = (entry >> 8).unflatten(1, (-1, 8 // each))
    return (parts << torch.arange(0, 8, each)).sum(-1).to(torch.uint8)


def _signs_and_scales(stored: Tensor, grid: str, scales: Tensor) -> Tensor:
    """Of each 32 weights a uint32: four times seven signs, above them the scale: int64 [B, 8]."""
    signs = (_negative(stored, grid).long() & 127).unflatten(1, (-1, 4))
    return (signs << torch.arange(0, 28, 7)).sum(-1) | _steps(scales).long() << 28


def iq2_xxs(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Eight times four indices of 8 bits, then signs and scale in 32."""
    indices = _low(_entries(stored, "iq2_xxs")[1]).unflatten(1, (8, 4))
    words = _bytes(_signs_and_scales(stored, "iq2_xxs", scales), 4).unflatten(1, (8, 4))
    return (torch.cat([indices, words], 2).flatten(1),)


def iq2_xs(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """32 times an index of 9 bits with seven signs above it, then scales."""
    signs = _negative(stored, "iq2_xs").int() & 127
    return _bytes(_entries(stored, "iq2_xs")[1] | signs << 9, 2), _nibbles(_steps(scales))


def iq2_s(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """32 low bytes of indices, 32 bytes of signs, the indices' high bits, scales."""
    entry = _entries(stored, "iq2_s")[1]
    return _low(entry), _negative(stored, "iq2_s"), _high(entry, 2), _nibbles(_steps(scales))


def iq3_xxs(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """64 indices of 8 bits, then eight times signs and scale in 32."""
    return _low(_entries(stored, "iq3_xxs")[1]), _bytes(_signs_and_scales(stored, "iq3_xxs", scales), 4)


def iq3_s(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """64 low bytes of indices, their high bits, 32 bytes of signs, scales."""
    entry = _entries(stored, "iq3_s")[1]
    return _low(entry), _high(entry, 1), _negative(stored, "iq3_s"), _nibbles(_steps(scales))


def iq1_s(stored: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """32 low bytes of indices; of each 32 weights 16 bits: four times three high bits, the scale, the digits' direction."""
    variant, entry = _entries(stored, "iq1_s")
    high = ((entry >> 8).unflatten(1, (-1, 4)) << torch.arange(0, 12, 3)).sum(-1)
    return _low(entry), _bytes(high | _steps(scales) << 12 | variant[:, ::4] << 15, 2)


def iq1_m(stored: Tensor, scales: Tensor, outer: Tensor) -> tuple[Tensor, ...]:
    """32 low bytes of indices; four bits for each, three high ones and the digits' direction; four 16-bit words of four scales
    and, in their top bits, four bits of the f16 `outer`."""
    variant, entry = _entries(stored, "iq1_m")
    steps = (_steps(scales).unflatten(1, (4, 4)) << torch.arange(0, 12, 3)).sum(-1)
    top = outer.half().view(torch.int16).int()[:, None] >> torch.arange(0, 16, 4) & 15
    return _low(entry), _nibbles(entry >> 8 | variant << 3), _bytes(steps | top << 12, 2)
