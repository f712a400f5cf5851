"""Reader of NVIDIA ModelOpt's checkpoints (`quant_method: modelopt`, or hf_quant_config.json): FP8 and NVFP4.

quant_algo "FP8"      weight float8_e4m3fn [N, K], weight_scale and input_scale, one number each, as fp8.py reads them
"FP8_PER_CHANNEL_PER_TOKEN"  weight_scale [N]; inputs by token
quant_algo "NVFP4"    weight uint8 [N, K/2]: two e2m1 codes in a byte, the first in the low 4 bits; weight_scale e4m3 [N, K/16];
                      weight_scale_2, one number: w = level · weight_scale · weight_scale_2. Inputs likewise, in groups of 16,
                      with input_scale for weight_scale_2
"W4A16_NVFP4"         the same, inputs in float
"MIXED_PRECISION"     `quantized_layers` says one of these for each module
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.format import Read
from bitwright.formats.fp8 import Fp8
from bitwright.formats.mxfp4 import e2m1_codes
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme

FP8 = Fp8()
ACTIVATIONS = {"FP8": "static", "FP8_PER_CHANNEL_PER_TOKEN": "dynamic"}  # quant_algo -> fp8.py's activation_scheme
NVFP4, SCHEME = ("NVFP4", "W4A16_NVFP4"), Scheme("fp4", 16, "sym", "e4m3")
MIXED = "MIXED_PRECISION"
OUTER, SMOOTHED = "weight_scale_2", "pre_quant_scale"


class Modelopt:
    """Reader of ModelOpt's FP8 by tensor or by row, and of its NVFP4."""

    name = "modelopt"
    method = "modelopt"
    parts = frozenset(("weight", "weight_scale", OUTER, "input_scale", SMOOTHED))

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return FP8.holds(dtypes) or (OUTER in dtypes and dtypes.get("weight") == torch.uint8)

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`. FormatError for another algorithm than FP8 and NVFP4."""
        said = config.get("quantization") or config
        algorithm = said.get("quant_algo")
        if algorithm == MIXED:
            layers = said.get("quantized_layers")
            layers = layers if isinstance(layers, dict) else {}
            own = layers.get(name) or next((layers[other] for other in layers if other.endswith(f".{name}")), None)
            algorithm = own.get("quant_algo") if isinstance(own, dict) else None
        if algorithm not in (*NVFP4, *ACTIVATIONS):
            remedy = f"known: {', '.join((*ACTIVATIONS, *NVFP4))}; or quantize the float original"
            raise FormatError(f"ModelOpt's {algorithm!r} is not read here", where=name, remedy=remedy)
        return {"quant_algo": algorithm}

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        algorithm = self.module_config(config, name)["quant_algo"]
        if algorithm not in NVFP4:
            return FP8.input_quantization({"activation_scheme": ACTIVATIONS[algorithm]}, name, read)
        if algorithm != NVFP4[0]:
            return None
        scale = read("input_scale")
        if scale is None or scale.numel() != 1:
            remedy = 'get a good copy of the checkpoint; "quant_algo": "W4A16_NVFP4" keeps inputs in float'
            raise FormatError("its inputs are rounded to a range that the file lacks", where=name, remedy=remedy)
        return InputQuantization(SCHEME, outer=1 / scale.float().view(1, 1))

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        if self._algorithm(config, name, tensors) not in NVFP4:
            return FP8.decode({}, name, tensors)
        return decode(_nvfp4(tensors, name))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """See `Reader.quantized`."""
        if self._algorithm(config, name, tensors) not in NVFP4:
            return FP8.quantized({}, name, tensors)
        return _nvfp4(tensors, name)

    def _algorithm(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> str:
        """How a module is stored. FormatError for one whose inputs are multiplied first."""
        if SMOOTHED in tensors:
            message = f"its inputs are multiplied by a {SMOOTHED} (AWQ, SmoothQuant), which is not computed here"
            raise FormatError(message, where=name, remedy="quantize the float original")
        return str(self.module_config(config, name)["quant_algo"])


def _nvfp4(tensors: dict[str, Tensor], name: str) -> QTensor:
    """The matrix [N, K]. FormatError for tensors that do not fit each other."""
    N, half = tensors["weight"].shape
    local, outer = tensors.get("weight_scale"), tensors.get(OUTER)
    if local is None or outer is None or outer.numel() != 1 or local.shape != (N, half // 8) or half % 8:
        message = f"its scales are not one for 16 of {N} × {2 * half} weights, and one for all"
        raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
    outer = outer.float().view(1, 1)
    codes = e2m1_codes(tensors["weight"])
    return QTensor(codes, Scales(local.float() * outer, outer=1 / outer), SCHEME, tuple(codes.shape))
