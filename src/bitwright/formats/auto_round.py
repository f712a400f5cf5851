"""Reader of auto-round's own checkpoints (`quant_method: auto-round`): the tensors of GPTQ or AWQ, with another config.

`packing_format` gives the layout: "auto_round:auto_gptq" is GPTQ v1 (zero points stored − 1), "auto_round" and
"auto_round:gptqmodel" are GPTQ v2 (stored as they are), mostly without g_idx; "auto_round:auto_awq" is AWQ's GEMM layout.
`extra_config` overrides the settings of single modules, by name or by a regular expression that is searched in the name.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.formats.awq import Awq
from bitwright.formats.format import Read
from bitwright.formats.gptq import Gptq
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor

AWQ, GPTQ = Awq(), Gptq()
LAYOUTS = {
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_awq": {"quant_method": "awq", "version": "gemm"},
    "auto_round:awq": {"quant_method": "awq", "version": "gemm"},
}  # packing_format -> config of the layout's own reader
FLOAT = 16  # bits that mean: not quantized


class AutoRound:
    """Reader of auto-round: 2-, 3-, 4- or 8-bit integers, which may differ from layer to layer."""

    name = "auto-round"
    method = "auto-round"
    parts = GPTQ.parts | AWQ.parts

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "qweight" in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`: a config of GPTQ or AWQ.

        FormatError for weights that are not integers, quantized activations, rotations, and other packings.
        """
        if config.get("quant_method") in ("gptq", "awq"):
            return config
        config = config | _extra(config.get("extra_config") or {}, name)
        packing = str(config.get("packing_format") or config.get("backend") or "auto_round:auto_gptq")
        beyond = {
            "data_type": config.get("data_type") or "int", "act_bits": config.get("act_bits") or FLOAT,
            "rotation_config": config.get("rotation_config") or {},
        }  # fmt: skip
        if packing not in LAYOUTS or beyond != {"data_type": "int", "act_bits": FLOAT, "rotation_config": {}}:
            said = ", ".join(
                f"{key} {value!r}" for key, value in {"packing_format": packing, **beyond}.items() if value
            )
            remedy = (
                f"integers with inputs in float, packed as {', '.join(LAYOUTS)}; --format llm_compressor of auto-round"
            )
            raise FormatError(f"auto-round's files with {said} are not read here", where=name, remedy=remedy)
        if (config.get("bits") or 0) >= FLOAT:
            message = "it is quantized in the file, and extra_config says that it is not"
            raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
        said_here: dict[str, Any] = {key: config[key] for key in ("bits", "group_size", "sym") if key in config}
        return {**said_here, **LAYOUTS[packing]}

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Reader.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Reader.decode`."""
        config = self.module_config(config, name)
        return _reader(config).decode(config, name, tensors)

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor | None:
        """See `Reader.quantized`."""
        config = self.module_config(config, name)
        return _reader(config).quantized(config, name, tensors)


def _reader(config: dict[str, Any]) -> Awq | Gptq:
    return AWQ if config["quant_method"] == "awq" else GPTQ


def _extra(extra: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The extra_config of one module: the entry of its exact name, else of the first regular expression that is found in it."""
    if name in extra:
        return extra[name]
    for pattern, said in extra.items():
        try:
            if said and re.search(pattern, name):
                return said
        except re.error:  # a plain module name need not be a valid regular expression
            continue
    return {}
