"""Simulates what llama.cpp rounds on the CPU: inputs of quantized matrices to 8 bits, keys and values to f16.

Matrices in blocks of 256 multiply inputs in Q8_K (blocks of 256, float32 scale), all others inputs in Q8_0 (blocks of 32, f16
scale). Q4_1 and Q5_1 use Q8_1, which also rounds the sums of inputs (for the minima) to f16: that is not simulated. Source:
`vec_dot_type` in ggml-cpu.c, `quantize_row_q8_0` and `quantize_row_q8_K`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.gguf.block_types import FLOATS, SIZES, Kind
from bitwright.numerics.codec import safe
from bitwright.numerics.qtensor import head_by_head, permuted, unpermuted
from bitwright.numerics.scheme import SUPERBLOCK

ENGINE = "llama.cpp"  # the name by which users select this simulation


@dataclass(frozen=True)
class EightBits:
    """Symmetric 8-bit quantization of inputs in blocks of `size`, with a scale (absmax / 127) stored as `dtype`.

    heads: in whose order the inputs are cut into blocks (`head_by_head`).
    As in llama.cpp, and unlike weights in bitwright, codes are chosen under the scale before it is rounded.
    """

    size: int
    dtype: torch.dtype
    heads: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x [..., K]; K must be a multiple of the size."""
        order = head_by_head(self.heads, x.shape[-1])
        if order is not None:
            return unpermuted(replace(self, heads=(1, 1))(permuted(x, order)), order)
        blocks = x.float().unflatten(-1, (-1, self.size))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(blocks / safe(scale))
        return (codes * scale.to(self.dtype).float()).flatten(-2).to(x.dtype)


def cached(x: Tensor) -> Tensor:
    """Keys or values rounded to f16, llama.cpp's default type of the KV cache."""
    return x.half().to(x.dtype)


def inputs_of(kind: Kind, heads: tuple[int, int] = (1, 1)) -> EightBits | None:
    """How inputs of a matrix of this type are quantized; None for float types (f16 inputs of f16 matrices count as float).

    heads: in whose order it has them.
    """
    if kind in FLOATS:
        return None
    size, _ = SIZES[kind]
    return EightBits(SUPERBLOCK, torch.float32, heads) if size == SUPERBLOCK else EightBits(32, torch.float16, heads)
