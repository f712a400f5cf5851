"""Reader of FP8 checkpoints: scales per block (DeepSeek-V3), per tensor or per row (AutoFP8), for `quant_method: fp8`; per row
for `quant_method: fbgemm_fp8` (Llama 3.1 405B).

weight             float8_e4m3fn [N, K]; float8_e5m2 is read too, and computed in float
weight_scale_inv   [⌈N/n⌉, ⌈K/k⌉] for blocks of n × k weights (`weight_block_size`, 128 × 128 if nothing is said); without
                   blocks one scale, or one for each row. Floats, float8_e8m0fnu, or its exponents plus 127 in uint8.
                   w = code · scale, in spite of the name
weight_scale       the same under AutoFP8's and FBGEMM's name; scale: under DeepSeek's own; qscale_weight: under Mistral's
activation_scale,  one scale, for `activation_scheme: static`. Otherwise activations are quantized dynamically: in groups of k
input_scale        inputs, whose scales are powers of two for `scale_fmt: ue8m0`, or per token where the weights have no blocks.
                   FBGEMM's ranges end at `activation_scale_ub`
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

SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
INPUTS = ("activation_scale", "input_scale", "qscale_act")
WEIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = [128, 128]  # of transformers, for a config without `weight_block_size`
SCALE_FORMATS = (None, "float", "ue8m0")  # scale_fmt
FBGEMM = "fbgemm_fp8"
COPY = "get a good copy of the checkpoint"
UPPER = 1200.0  # of FBGEMM, for a config without `activation_scale_ub`


class Fp8:
    """Reader of FP8 weights with scales per block, row or tensor."""

    parts = frozenset(("weight", *SCALES, *INPUTS))

    def __init__(self, method: str = "fp8") -> None:
        self.name = self.method = method

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return dtypes.get("weight") in WEIGHTS and any(suffix in dtypes for suffix in SCALES)

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        block = config.get("weight_block_size")
        known = block is None or (
            isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        )
        inputs, powers = config.get("activation_scheme", "dynamic"), config.get("scale_fmt")
        if not known or inputs not in ("dynamic", "static") or powers not in SCALE_FORMATS:
            found = f"weight_block_size {block!r}, activation_scheme {inputs!r}, scale_fmt {powers!r}"
            remedy = "[rows, columns]; dynamic or static; float or ue8m0"
            raise FormatError(f"FP8 with {found} is not read here", where=name, remedy=remedy)
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        config = self.module_config(config, name)
        if config.get("activation_scheme", "dynamic") == "static":
            scale = next((found for found in map(read, INPUTS) if found is not None), None)
            if scale is None or scale.numel() != 1:
                raise FormatError("its inputs are rounded to a range that the file lacks", where=name, remedy=COPY)
            return InputQuantization(Scheme("fp8", TENSOR, "sym", "f32"), Scales(scale.float().view(1, 1)))
        block = _block(config, read)
        if block is None:
            upper = _upper(config, name) if self.method == FBGEMM else None
            return InputQuantization(Scheme("fp8", TOKEN, "sym", "f32"), upper=upper)
        if block[1] not in GROUPS:
            remedy = f"groups of {', '.join(map(str, GROUPS))}"
            raise FormatError(f"inputs in groups of {block[1]} are not computed here", where=name, remedy=remedy)
        encoding = "e8m0" if config.get("scale_fmt") == "ue8m0" else "f32"
        return InputQuantization(Scheme("fp8", block[1], "sym", encoding))

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        w = tensors["weight"].float()
        scale, (rows, columns) = _scale(self.module_config(config, name), name, tensors)
        each = scale.repeat_interleave(rows, 0)[: len(w)].repeat_interleave(columns, 1)[:, : w.shape[1]]
        return w * each

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """See `Reader.quantized`; None for e5m2, and for blocks whose width is none of the group sizes in `GROUPS`."""
        N, K = tensors["weight"].shape
        scale, (rows, columns) = _scale(self.module_config(config, name), name, tensors)
        if (columns < K and columns not in GROUPS) or tensors["weight"].dtype != WEIGHTS[0]:
            return None
        group = TENSOR if scale.numel() == 1 else CHANNEL if columns >= K else columns
        scale = scale if group == TENSOR else scale.repeat_interleave(rows, 0)[:N].contiguous()
        return recovered(self.decode(config, name, tensors), Scheme("fp8", group, "sym", "f32"), Scales(scale), name)


def _upper(config: dict[str, Any], name: str) -> float:
    """The end of FBGEMM's ranges. FormatError for one that is no number above 0."""
    upper = config.get("activation_scale_ub", UPPER)
    if not (isinstance(upper, int | float) and upper > 0):
        raise FormatError(f"activation_scale_ub is {upper!r}, not a number above 0", where=name, remedy=COPY)
    return float(upper)


def _block(config: dict[str, Any], read: Read) -> list[int] | None:
    """The rows and columns that share a scale; None: all, or those of one row. Scales [R, C] that no key explains are
    transformers' default."""
    if "weight_block_size" in config:
        said: list[int] | None = config["weight_block_size"]
        return said
    scale, w = next((found for found in map(read, SCALES) if found is not None), None), None
    if scale is not None and scale.ndim == 2 and scale.numel() > 1:
        w = read("weight")
    return BLOCK if scale is not None and w is not None and scale.shape != (len(w), 1) else None


def _scale(config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """The scales [R, C] float32, and the block (rows, columns) of weights that share one.

    FormatError for scales whose shape does not fit the weight.
    """
    (N, K), block = tensors["weight"].shape, _block(config, tensors.get)
    suffix = next(suffix for suffix in SCALES if suffix in tensors)
    scale = tensors[suffix].float()
    if tensors[suffix].dtype == torch.uint8:  # an exponent, as in float8_e8m0fnu
        scale = torch.exp2(scale - 127)
    scale = scale.view(1, 1) if block is not None and scale.ndim == 0 else scale
    if block is not None and scale.shape == (-(-N // block[0]), -(-K // block[1])):
        return scale, (block[0], block[1])
    if block is None and scale.numel() == 1:
        return scale.view(1, 1), (N, K)
    if block is None and scale.shape in ((N,), (N, 1)):
        return scale.view(N, 1), (1, K)
    meant = "one number, or one a row" if block is None else f"one number for {block[0]} × {block[1]} weights"
    message = f"{suffix} {tuple(scale.shape)} is not {meant} of {N} × {K}"
    raise FormatError(message, where=name, remedy=f"{COPY}, with its weight_block_size")
