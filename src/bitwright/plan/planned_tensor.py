"""One tensor of a plan: where it comes from, and what becomes of it."""

from dataclasses import dataclass

import torch

from bitwright.formats import Layer
from bitwright.plan.recipe import Rule

QUANTIZED, KEPT, LEFT_OUT, ADDED = "quantized", "kept", "left out", "added"  # actions


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and its action.

    source     its name in the source's files; parameter: its name in the model
    block      index of its block; None outside the blocks
    dtype      the type that it is kept in
    reason     why it is kept or left out
    layer      how the format will store it, if it is quantized
    rule       the recipe's rule for it
    """

    source: str
    parameter: str
    block: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: str
    reason: str = ""
    layer: Layer | None = None
    rule: Rule | None = None
    made_of: str = ""  # another tensor of the source that it is copied from: an untied head from the embedding

    @property
    def stem(self) -> str:
        """The tensor's name in the files, less ".weight"."""
        return self.source.removesuffix(".weight")
