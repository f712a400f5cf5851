"""A quantized checkpoint in the place of a float one: each matrix is decoded when it is read, and only then.

FP8 and MXFP4 releases have no float original: what they decode to is the model. Others are rounded a second time, on demand.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.files.checkpoint import Checkpoint, TensorInfo
from bitwright.models.gguf_source import FloatGgufCheckpoint
from bitwright.models.skeleton import Skeleton, matrix_of
from bitwright.models.source import WeightSource
from bitwright.models.unread import why_left

FLOAT_METHODS = ("fp8", "mxfp4")  # quant_method
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def has_no_original(config: dict[str, Any]) -> bool:
    """Whether a quantization_config is that of a release in small floats, rather than of a model rounded to integers."""
    groups = config.get("config_groups")
    if isinstance(groups, dict) and groups:
        return all((group.get("weights") or {}).get("type") == "float" for group in groups.values())
    return config.get("quant_method") in FLOAT_METHODS


class DecodedCheckpoint:
    """See `Checkpoint`: tensors by the names of the float model, in the float type that the rest of it has."""

    def __init__(self, folder: Path, skeleton: Skeleton) -> None:
        """Reads headers. CheckpointError for what is not read here, or not of this model."""
        self.weight_source, self.folder, self.skeleton = WeightSource.for_model(folder, skeleton), folder, skeleton
        self.names = {source: name for name, source in self.weight_source.meet(skeleton).items()}
        stored, parameters = self.weight_source.checkpoint.tensors, skeleton.model.state_dict(keep_vars=True)
        types = Counter(stored[name].dtype for name in self.weight_source.plain if stored[name].dtype in FLOATS)
        dtype = types.most_common(1)[0][0] if types else torch.bfloat16
        self.tensors = dict[str, TensorInfo]()
        for name, shape in self.weight_source.shapes.items():
            if shape is not None:  # a bias of zeros beside a layer that has none has no reader, and needs none
                if name in self.names or why_left(name, shape, skeleton) is not None:
                    self.tensors[name] = stored[name]
            else:
                part = stored[next(iter(self.weight_source.modules[name.removesuffix(".weight")].values()))]
                meant = tuple(parameters[self.names[name]].shape)
                self.tensors[name] = TensorInfo(part.file, part.offset, dtype, meant)

    def read(self, name: str) -> Tensor:
        """One tensor, the way round that the model has it; float32 where it is decoded, so that nothing is lost."""
        tensor = self.weight_source.read(name)
        if not self.weight_source.is_packed(name):
            return tensor
        module = self.skeleton.model.get_submodule(self.names[name].removesuffix(".weight"))
        return matrix_of(module, tensor.float()).contiguous()

    def stored_as(self, name: str) -> str:
        """How a tensor is quantized in the files; "": it is not."""
        return self.weight_source.describe(name)[0] if self.weight_source.is_packed(name) else ""

    def fingerprint(self) -> list[list[str | int]]:
        """What changes when the weights do."""
        return self.weight_source.fingerprint()


FloatCheckpoint = Checkpoint | FloatGgufCheckpoint | DecodedCheckpoint  # what a run reads its float weights from
