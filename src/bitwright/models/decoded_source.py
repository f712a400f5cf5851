"""A quantized checkpoint as the input of quantization: each matrix is dequantized when it is read.

FP8 and MXFP4 releases have no float original, so their dequantized weights are the model. Other quantized checkpoints are
quantized a second time only if the user asks for it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.files.checkpoint import Checkpoint, TensorInfo
from bitwright.models.gguf_source import FloatGgufCheckpoint
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource
from bitwright.models.unread import why_left

FLOAT_METHODS = ("fp8", "fbgemm_fp8", "mxfp4")  # quant_method
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def has_no_original(config: dict[str, Any]) -> bool:
    """Whether a quantization_config is of a model released in FP8 or FP4, rather than of one quantized to integers."""
    groups = config.get("config_groups")
    if isinstance(groups, dict) and groups:
        return all((group.get("weights") or {}).get("type") == "float" for group in groups.values())
    return config.get("quant_method") in FLOAT_METHODS


class DecodedCheckpoint:
    """As `Checkpoint`, with the tensors of the float model; quantized weights have the dtype that most float tensors have."""

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        """Reads headers only. CheckpointError for an unknown quantization, or tensors that do not fit the model."""
        self.weight_source, self.folder, self.skeleton = WeightSource.for_model(folder, skeleton), folder, skeleton
        self.names = {source: name for name, source in self.weight_source.meet(skeleton).items()}
        stored, parameters = self.weight_source.checkpoint.tensors, skeleton.model.state_dict(keep_vars=True)
        types = Counter(stored[name].dtype for name in self.weight_source.plain if stored[name].dtype in FLOATS)
        dtype = types.most_common(1)[0][0] if types else torch.bfloat16
        self.tensors = dict[str, TensorInfo]()
        for name, shape in self.weight_source.shapes.items():
            if shape is not None:  # tensors that nothing reads (AutoGPTQ's biases of zeros) are left out
                if name in self.names or why_left(name, shape, skeleton) is not None:
                    self.tensors[name] = stored[name]
            else:
                part = stored[next(iter(self.weight_source.modules[name.removesuffix(".weight")].values()))]
                meant = tuple(parameters[self.names[name]].shape)
                self.tensors[name] = TensorInfo(part.file, part.offset, dtype, meant)

    def read(self, name: str) -> Tensor:
        """One tensor in the model's orientation; float32 if it is dequantized, so that no precision is lost."""
        tensor = self.weight_source.read(name)
        if not self.weight_source.is_packed(name):
            return tensor
        module = self.skeleton.model.get_submodule(self.names[name].removesuffix(".weight"))
        return matrix_of(module, tensor.float()).contiguous()

    def stored_as(self, name: str) -> str:
        """The quantization of a tensor in the files, such as "fp8"; "" if it is float."""
        return self.weight_source.describe(name)[0] if self.weight_source.is_packed(name) else ""

    def fingerprint(self) -> list[list[str | int]]:
        """Identifies the weight files, to detect that they have changed."""
        return self.weight_source.fingerprint()


FloatCheckpoint = Checkpoint | FloatGgufCheckpoint | DecodedCheckpoint  # sources of float weights for quantization
