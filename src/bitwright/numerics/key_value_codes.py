"""Keys and values of attention in 8 or 4 bits: each head's vector of a token as one row of bytes, codes and scales together.

`q8`: integers −127 … 127 under one float16 scale for 32 channels, 8.5 bits a number. `q4`: integers 0 … 15 under a float16
scale and a float16 minimum for 64 channels, two in a byte, 4.5 bits a number; keys are rotated by a Hadamard matrix first: a
few of their channels are far larger than the rest (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4). A head whose
width such blocks do not divide is one block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import InputError, one_of
from bitwright.numerics.hadamard import block_of, hadamard

BLOCKS = {8: 32, 4: 64}  # bits -> channels that share a scale
HALF_MAX = 65504.0


@dataclass(frozen=True)
class KeyValueCodes:
    """A format of keys and values. bits: 8 or 4."""

    bits: int

    @property
    def rotates_keys(self) -> bool:
        """Whether keys are stored rotated; then queries must be rotated as well, or keys back."""
        return self.bits == 4

    def block(self, D: int) -> int:
        """Channels of a head of D that share a scale."""
        return BLOCKS[self.bits] if D % BLOCKS[self.bits] == 0 else D

    def width(self, D: int) -> int:
        """Bytes of a vector of D numbers. InputError for an odd D in 4 bits."""
        if self.bits == 4 and D % 2:
            raise InputError(f"heads of {D} channels do not fill bytes at 4 bits", remedy="--kv q8")
        return D * self.bits // 8 + D // self.block(D) * (2 if self.bits == 8 else 4)

    def encode(self, x: Tensor) -> Tensor:
        """Numbers [..., D] -> rows of bytes, uint8 [..., width(D)], rounded to nearest."""
        blocks = x.float().unflatten(-1, (-1, self.block(x.shape[-1])))
        return _encode8(blocks) if self.bits == 8 else _encode4(blocks)

    def decode(self, rows: Tensor, D: int) -> Tensor:
        """Rows of bytes -> float32 [..., D]."""
        count = D // self.block(D)
        codes, scales = rows[..., : D * self.bits // 8], rows[..., D * self.bits // 8 :]
        numbers = (
            scales.clone(memory_format=torch.contiguous_format).view(torch.float16).float().unflatten(-1, (-1, count))
        )
        if self.bits == 8:
            return (codes.view(torch.int8).float().unflatten(-1, (count, -1)) * numbers[..., 0, :, None]).flatten(-2)
        both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float().unflatten(-1, (count, -1))
        return (both * numbers[..., 0, :, None] + numbers[..., 1, :, None]).flatten(-2)

    def rounded(self, x: Tensor) -> Tensor:
        """Values [..., D] as they are read back, in x's type."""
        return self.decode(self.encode(x), x.shape[-1]).to(x.dtype)

    def rounded_keys(self, x: Tensor) -> Tensor:
        """Keys [..., D] as they are read back: rotated, rounded, rotated back."""
        return rotated(self.rounded(rotated(x))) if self.rotates_keys else self.rounded(x)


KEY_VALUE_CODES = {"q8": KeyValueCodes(8), "q4": KeyValueCodes(4)}


def key_value_codes(name: str | None) -> KeyValueCodes | None:
    """A format by its name on the command line; None: float. InputError for an unknown one."""
    if name is None:
        return None
    if name not in KEY_VALUE_CODES:
        raise InputError(f"unknown format of keys and values {name!r}", remedy=one_of(name, KEY_VALUE_CODES))
    return KEY_VALUE_CODES[name]


def rotated(x: Tensor) -> Tensor:
    """Queries or keys [..., D] times an orthonormal, symmetric Hadamard matrix: its own inverse."""
    return hadamard(x, block_of(x.shape[-1]))


def _encode8(blocks: Tensor) -> Tensor:
    """Blocks [..., n, block] -> [..., bytes]: codes, then scales."""
    scale = _half(blocks.abs().amax(-1) / 127)
    codes = (blocks / _divisor(scale)[..., None]).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([codes.flatten(-2).view(torch.uint8), scale.view(torch.uint8)], -1)


def _encode4(blocks: Tensor) -> Tensor:
    """Blocks [..., n, block] -> [..., bytes]: codes two in a byte, then scales, then minima."""
    low = _half(blocks.amin(-1))
    scale = _half((blocks.amax(-1) - low.float()) / 15)
    codes = ((blocks - low.float()[..., None]) / _divisor(scale)[..., None]).round().clamp(0, 15).to(torch.uint8)
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2))
    return torch.cat([pairs[..., 0] | pairs[..., 1] << 4, scale.view(torch.uint8), low.view(torch.uint8)], -1)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).half().contiguous()


def _divisor(scale: Tensor) -> Tensor:
    """A scale to divide by: where it is 0 all codes are 0 anyway."""
    return scale.float().masked_fill(scale == 0, 1)
