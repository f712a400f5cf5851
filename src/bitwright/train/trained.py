"""What a training run changes: an adapter (lora.py), or a quantized model's scales and norms (scales.py)."""

from pathlib import Path
from typing import Protocol

from torch import nn


class Trained(Protocol):
    """A model of which some parameters require gradients, and how these are stored."""

    @property
    def model(self) -> nn.Module:
        """The model that is run; all its parameters that require gradients are trained."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of what is trained, and what is not."""

    def save(self, folder: Path) -> None:
        """Write what is trained into a directory, for a run that goes on from there."""

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""

    def settle(self) -> None:
        """Round what was trained to what `finish` can store, so that the model computes what its result will."""

    def finish(self, folder: Path) -> None:
        """Write the result of the run as a new directory."""
