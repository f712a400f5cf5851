"""One tensor of a plan: where it comes from, and what becomes of it."""

from dataclasses import dataclass

import torch

from bitwright.formats import Layer
from bitwright.plan.recipe import Rule

QUANTIZED, KEPT, LEFT_OUT, ADDED = "quantized", "kept", "left out", "added"  # actions


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what becomes of it. `block` is None outside the blocks."""

    source: str
    parameter: str
    block: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: str
    reason: str = ""
    layer: Layer | None = None
    rule: Rule | None = None
    stored_as: str = ""  # how the source has it quantized; "": it is float there
    made_of: str = ""  # the source's tensor, where that has another name: an untied head is made of the embedding

    @property
    def stem(self) -> str:
        """The tensor's name in the files, less ".weight"."""
        return self.source.removesuffix(".weight")
