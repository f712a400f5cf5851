"""What llama.cpp's processor code rounds while it computes: inputs of quantized matrices to 8 bits, keys and values to f16.

Types in blocks of 256 meet inputs in blocks of 256 under a float32 (Q8_K), all others blocks of 32 under an f16 (Q8_0; Q8_1,
whose sums of inputs, which meet the minima of Q4_1 and Q5_1, are rounded to f16 as well: that is left out here). Source:
`vec_dot_type` in ggml-cpu.c, `quantize_row_q8_0` and `quantize_row_q8_K`.
"""

from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from bitwright.gguf.reader import FLOATS, Types
from bitwright.numerics.codec import safe
from bitwright.numerics.scheme import SUPERBLOCK

ENGINE = "llama.cpp"  # by this name it is asked for


@dataclass(frozen=True)
class EightBits:
    """Inputs as integers of 8 bits: `size` neighbours share a scale, which is stored as `dtype`.

    Unlike weights here, and as in the engine, codes are chosen before the scale is rounded.
    """

    size: int
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as it enters the product; K is a multiple of the size."""
        blocks = x.float().unflatten(-1, (-1, self.size))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(blocks / safe(scale))
        return (codes * scale.to(self.dtype).float()).flatten(-2).to(x.dtype)


def cached(x: Tensor) -> Tensor:
    """Keys or values as they come back from its cache, where nothing else is asked for."""
    return x.half().to(x.dtype)


def inputs_of(kind: Types) -> EightBits | None:
    """What is done to the inputs of a matrix of this type; None: they stay in float, or nearly (f16 under f16 weights)."""
    if kind in FLOATS:
        return None
    size, _ = gguf.GGML_QUANT_SIZES[kind]
    return EightBits(SUPERBLOCK, torch.float32) if size == SUPERBLOCK else EightBits(32, torch.float16)
