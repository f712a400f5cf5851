"""bitsandbytes' 4-bit checkpoints (NF4, QLoRA's double quantization included), read.

weight              uint8 [N·K/2, 1]: codes of all weights row by row, two in a byte, the first in the high half
weight.absmax       [blocks] float32; or uint8, with weight.nested_absmax, weight.nested_quant_map: one number for 256 of them
weight.quant_map    [16] float32
weight.quant_state.bitsandbytes__nf4  a JSON object as bytes: shape, blocksize, nested_offset, nested_blocksize, …
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.format import Read, recovered
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import GRIDS, GROUPS, Scheme

STATE = "weight.quant_state.bitsandbytes__nf4"
PARTS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE)


class BitsAndBytes:
    """NF4 in blocks of neighbours in memory."""

    name = "bitsandbytes"
    method = "bitsandbytes"
    parts = frozenset(PARTS)

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "weight.absmax" in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        state = _state(tensors, name)
        N, K = state["shape"]
        octets = tensors["weight"].numpy().reshape(-1)
        codes = np.stack([octets >> 4, octets & 15], 1).reshape(-1)
        scale = np.repeat(_absmax(tensors, state), state["blocksize"])[: N * K]
        w = tensors["weight.quant_map"].float().numpy()[codes[: N * K]] * scale
        return torch.from_numpy(w.reshape(N, K))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Reader.quantized`. FormatError also where a block runs on into the next row."""
        state = _state(tensors, name)
        (N, K), length = state["shape"], state["blocksize"]
        if K % length or length not in GROUPS:
            raise FormatError(f"blocks of {length} do not fill rows of {K}", where=name, remedy="load it in float")
        levels = torch.tensor(GRIDS["nf4"].levels)
        if not torch.allclose(tensors["weight.quant_map"].float(), levels, rtol=0, atol=1e-6):
            raise FormatError("its 16 levels are not NF4's", where=name, remedy="bnb_4bit_quant_type nf4")
        exact = {**tensors, "weight.quant_map": levels}
        scales = Scales(torch.from_numpy(_absmax(tensors, state)).view(N, K // length))
        return recovered(self.decode(config, name, exact), Scheme("nf4", length, "sym", "f32"), scales, name)


def _state(tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """What a matrix is. FormatError for other than NF4, or sizes that do not belong together."""
    if STATE not in tensors:
        raise FormatError(
            "lacks its quant_state of NF4", where=name, remedy="bnb_4bit_quant_type nf4; FP4 and int8 are not read"
        )
    try:
        state = json.loads(tensors[STATE].numpy().tobytes())
        (N, K), length = state["shape"], state["blocksize"]
        fits = N > 0 and K > 0 and length > 0 and tensors["weight"].numel() == -(-N * K // 2)
        fits = fits and tensors["weight.absmax"].numel() == -(-N * K // length)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"its quant_state cannot be read: {error}", where=name, remedy="get a good copy") from error
    if not fits:
        raise FormatError(
            f"its tensors do not hold {N} × {K} weights in blocks of {length}", where=name, remedy="get a good copy"
        )
    return dict(state)


def _absmax(tensors: dict[str, Tensor], state: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scale of each block, float32."""
    absmax = tensors["weight.absmax"]
    if absmax.dtype != torch.uint8:
        return absmax.float().numpy()
    each = tensors["weight.nested_absmax"].float().numpy().repeat(state["nested_blocksize"])[: len(absmax)]
    found = tensors["weight.nested_quant_map"].float().numpy()[absmax.numpy()] * each
    return (found + np.float32(state["nested_offset"])).astype(np.float32)
