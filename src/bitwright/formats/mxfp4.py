"""Reader of MXFP4 checkpoints (`quant_method: mxfp4`, gpt-oss): the experts have 4-bit weights, all else is in float.

The files stack all experts of a layer in one tensor; models/experts.py takes them apart. The tensors of one expert:

weight_blocks  uint8 [N, K/32, 16]: e2m1 codes, two in a byte, the first in the low 4 bits
weight_scales  uint8 [N, K/32]: e8m0 scales of 32 weights, exponents plus 127; 255 is NaN (OCP Microscaling 1.0)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.format import Read
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme

BLOCKS, SCALES = "weight_blocks", "weight_scales"
MXFP4 = Scheme.parse("mxfp4")


class Mxfp4:
    """Reader of gpt-oss's MXFP4 experts."""

    name = "mxfp4"
    method = "mxfp4"
    parts = frozenset((BLOCKS, SCALES))

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return BLOCKS in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        return decode(self.quantized(config, name, tensors))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Reader.quantized`. FormatError for blocks and scales of shapes that do not match, or NaN scales."""
        blocks, exponents = tensors[BLOCKS], tensors[SCALES]
        if blocks.shape != (*exponents.shape, 16) or bool((exponents == 255).any()):
            found = f"blocks {tuple(blocks.shape)} and scales {tuple(exponents.shape)}"
            raise FormatError(f"{found} are not MXFP4", where=name, remedy="get a good copy of the checkpoint")
        codes, scales = e2m1_codes(blocks), Scales(torch.exp2(exponents.float() - 127))
        return QTensor(codes, scales, MXFP4, tuple(codes.shape))


def e2m1_codes(packed: Tensor) -> Tensor:
    """The codes [N, K] of uint8 [N, ...], two in a byte, the first in the low 4 bits."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
