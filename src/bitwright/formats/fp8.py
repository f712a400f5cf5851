"""Reader of FP8 checkpoints (`quant_method: fp8`): scales per block (DeepSeek-V3), per tensor or per row (AutoFP8).

weight             float8_e4m3fn [N, K]
weight_scale_inv   [⌈N/n⌉, ⌈K/k⌉] for blocks of n × k weights (`weight_block_size`); without blocks one scale, or one for each
                   row. float32, bfloat16 or float8_e8m0fnu. w = code · scale, in spite of the name
weight_scale       the same under AutoFP8's name
activation_scale,  one scale, for `activation_scheme: static`. Otherwise activations are quantized dynamically: in groups of k
input_scale        inputs, or per token where the weights have no blocks
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.format import Read, recovered
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import CHANNEL, GROUPS, TENSOR, TOKEN, Scheme

SCALES = ("weight_scale_inv", "weight_scale")
INPUTS = ("activation_scale", "input_scale")


class Fp8:
    """Reader of FP8 (e4m3) weights with scales per block, row or tensor."""

    name = "fp8"
    method = "fp8"
    parts = frozenset(("weight", *SCALES, *INPUTS))

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return dtypes.get("weight") == torch.float8_e4m3fn and any(suffix in dtypes for suffix in SCALES)

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        block = config.get("weight_block_size")
        known = block is None or (
            isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        )
        if not known or config.get("activation_scheme", "dynamic") not in ("dynamic", "static"):
            found = f"weight_block_size {block!r}, activation_scheme {config.get('activation_scheme')!r}"
            raise FormatError(
                f"FP8 with {found} is not read here", where=name, remedy="[rows, columns]; dynamic or static"
            )
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        block = self.module_config(config, name).get("weight_block_size")
        if config.get("activation_scheme", "dynamic") == "dynamic":
            if block is not None and block[1] not in GROUPS:
                raise FormatError(f"inputs in groups of {block[1]} are not computed here", where=name)
            return InputQuantization(Scheme("fp8", TOKEN if block is None else block[1], "sym", "f32"))
        scale = next((found for found in map(read, INPUTS) if found is not None), None)
        if scale is None or scale.numel() != 1:
            raise FormatError("its inputs are rounded to a range that the file lacks", where=name)
        return InputQuantization(Scheme("fp8", TENSOR, "sym", "f32"), Scales(scale.float().view(1, 1)))

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        w = tensors["weight"].float()
        scale, (rows, columns) = _scale(self.module_config(config, name), name, tensors)
        each = scale.repeat_interleave(rows, 0)[: len(w)].repeat_interleave(columns, 1)[:, : w.shape[1]]
        return w * each

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """See `Reader.quantized`; None for blocks whose width is none of the group sizes in `GROUPS`."""
        N, K = tensors["weight"].shape
        scale, (rows, columns) = _scale(self.module_config(config, name), name, tensors)
        if columns < K and columns not in GROUPS:
            return None
        group = TENSOR if scale.numel() == 1 else CHANNEL if columns >= K else columns
        scale = scale if group == TENSOR else scale.repeat_interleave(rows, 0)[:N].contiguous()
        return recovered(self.decode(config, name, tensors), Scheme("fp8", group, "sym", "f32"), Scales(scale), name)


def _scale(config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """The scales [R, C] float32, and the block (rows, columns) of weights that share one.

    FormatError for scales whose shape does not fit the weight.
    """
    (N, K), block = tensors["weight"].shape, config.get("weight_block_size")
    suffix = next(suffix for suffix in SCALES if suffix in tensors)
    scale = tensors[suffix].float()
    scale = scale.view(1, 1) if block is not None and scale.ndim == 0 else scale
    if block is not None and scale.shape == (-(-N // block[0]), -(-K // block[1])):
        return scale, (block[0], block[1])
    if block is None and scale.numel() == 1:
        return scale.view(1, 1), (N, K)
    if block is None and scale.shape in ((N,), (N, 1)):
        return scale.view(N, 1), (1, K)
    meant = "one number, or one a row" if block is None else f"one number for {block[0]} × {block[1]} weights"
    message = f"{suffix} {tuple(scale.shape)} is not {meant} of {N} × {K}"
    raise FormatError(message, where=name, remedy="get a good copy of the checkpoint, with its weight_block_size")
