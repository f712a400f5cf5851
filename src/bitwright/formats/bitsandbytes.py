"""Reader of bitsandbytes' checkpoints: NF4 and FP4 (QLoRA, arXiv:2305.14314, with double quantization), and LLM.int8()
(arXiv:2208.07339).

NF4, FP4:
weight              ⌈N·K/2⌉ bytes in any dtype (bnb_4bit_quant_storage): the codes of all weights row by row, two in a byte,
                    the first in the high 4 bits
weight.absmax       [blocks] float32, a scale for each block of `blocksize` weights. Double quantization: uint8 indices into
                    weight.nested_quant_map [256], times weight.nested_absmax (one for 256 scales), plus nested_offset
weight.quant_map    [16] float32, the level of each code; w = level · absmax
weight.quant_state.bitsandbytes__nf4 (or __fp4)  a JSON object as bytes: shape, blocksize, nested_blocksize, nested_offset, …

LLM.int8() (load_in_8bit):
weight              int8 [N, K]
SCB                 [N], the largest magnitude of each row: w = code · SCB / 127
weight_format       uint8, the memory layout: 0 is row by row, the only one that is read
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

STATE, FP4_STATE = "weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"
FOUR_BITS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", STATE, FP4_STATE)
SCB, ORDER = "SCB", "weight_format"
THRESHOLD = 6.0  # llm_int8_threshold by default: input channels that reach it are multiplied in float
INPUTS = Scheme("int8", "token", "sym", "f32")


class BitsAndBytes:
    """Reader of NF4 and FP4, in blocks of consecutive weights, and of 8-bit integers per row."""

    name = "bitsandbytes"
    method = "bitsandbytes"
    parts = frozenset(("weight", *FOUR_BITS, SCB, ORDER))

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "weight.absmax" in dtypes or (SCB in dtypes and dtypes.get("weight") == torch.int8)

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`: LLM.int8() quantizes inputs per token, except channels with outliers."""
        if read(SCB) is None:
            return None
        threshold = config.get("llm_int8_threshold", THRESHOLD)
        return InputQuantization(INPUTS, threshold=float(threshold))

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        if SCB in tensors:
            return tensors["weight"].float() * _row_scales(tensors, name)
        state = _state(tensors, name)
        N, K = state["shape"]
        octets = tensors["weight"].reshape(-1).view(torch.uint8).numpy()
        codes = np.stack([octets >> 4, octets & 15], 1).reshape(-1)
        scale = np.repeat(_absmax(tensors, state), state["blocksize"])[: N * K]
        w = tensors["weight.quant_map"].float().numpy()[codes[: N * K]] * scale
        return torch.from_numpy(w.reshape(N, K))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """See `Reader.quantized`. None for FP4, as bitsandbytes' smallest level is in none of the grids here, and for blocks
        that cross from one row into the next."""
        if SCB in tensors:
            scales = Scales(_row_scales(tensors, name))
            return recovered(self.decode(config, name, tensors), Scheme("int8", "channel", "sym", "f32"), scales, name)
        state = _state(tensors, name)
        (N, K), length = state["shape"], state["blocksize"]
        group = length if length in GROUPS else max(GROUPS)
        if FP4_STATE in tensors or K % length or length % group:
            return None
        levels = torch.tensor(GRIDS["nf4"].levels)
        if not torch.allclose(tensors["weight.quant_map"].float(), levels, rtol=0, atol=1e-6):
            raise FormatError("its 16 levels are not NF4's", where=name, remedy="bnb_4bit_quant_type nf4")
        exact = {**tensors, "weight.quant_map": levels}
        scale = torch.from_numpy(_absmax(tensors, state)).view(N, K // length).repeat_interleave(length // group, 1)
        scheme = Scheme("nf4", group, "sym", "f32")
        return recovered(self.decode(config, name, exact), scheme, Scales(scale.contiguous()), name)


def _row_scales(tensors: dict[str, Tensor], name: str) -> Tensor:
    """The scale of each row [N, 1] of an LLM.int8() matrix: SCB / 127.

    FormatError for a GPU-specific memory layout, or a number of scales that is not N.
    """
    weight, scale = tensors["weight"], tensors[SCB].float().reshape(-1, 1)
    if ORDER in tensors and tensors[ORDER].any():
        message = f"its weights lie in an order for one kind of GPU ({ORDER} {tensors[ORDER].flatten().tolist()})"
        raise FormatError(message, where=name, remedy="save it anew with bitsandbytes 0.45 or later")
    if weight.ndim != 2 or len(scale) != len(weight) or weight.dtype != torch.int8 or (FOUR_BITS[0] in tensors):
        message = f"{len(scale)} scales (SCB) are not those of weights {tuple(weight.shape)} in {weight.dtype}"
        raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
    return scale / 127


def _state(tensors: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The quant_state of a 4-bit matrix. FormatError if it is missing or unreadable, or does not fit the tensors' sizes."""
    found = [suffix for suffix in (STATE, FP4_STATE) if suffix in tensors]
    if len(found) != 1:
        message = "lacks its quant_state of NF4 or FP4" if not found else "has a quant_state of NF4 and one of FP4"
        raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
    try:
        state = json.loads(tensors[found[0]].numpy().tobytes())
        (N, K), length = state["shape"], state["blocksize"]
        fits = N > 0 and K > 0 and length > 0 and tensors["weight"].nbytes == -(-N * K // 2)
        fits = fits and tensors["weight.absmax"].numel() == -(-N * K // length)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"its quant_state cannot be read: {error}", where=name, remedy="get a good copy") from error
    if not fits:
        raise FormatError(
            f"its tensors do not hold {N} × {K} weights in blocks of {length}", where=name, remedy="get a good copy"
        )
    return dict(state)


def _absmax(tensors: dict[str, Tensor], state: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scale of each block [blocks] float32, double quantization undone."""
    absmax = tensors["weight.absmax"]
    if absmax.dtype != torch.uint8:
        return absmax.float().numpy()
    each = tensors["weight.nested_absmax"].float().numpy().repeat(state["nested_blocksize"])[: len(absmax)]
    found = tensors["weight.nested_quant_map"].float().numpy()[absmax.numpy()] * each
    return (found + np.float32(state["nested_offset"])).astype(np.float32)
