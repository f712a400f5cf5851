"""A LoRA adapter of peft's as what a run trains, beside a model's frozen weights."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from bitwright.errors import RecipeError
from bitwright.files.checkpoint import Checkpoint, write_file
from bitwright.inference.loading import load
from bitwright.models.adapter import BASE, WEIGHTS
from bitwright.train.adapters import prepare_for_training, renamed
from bitwright.train.settings import Training

if TYPE_CHECKING:
    from peft import PeftModel


class Lora:
    """A model with a new adapter. See `Trained` in trained.py."""

    def __init__(self, path: Path, how: Training, scheme: str | None, dtype: torch.dtype, base: bytes) -> None:
        """scheme: what a float model is rounded to; base: what `BASE` will hold. RecipeError for modules that it has not."""
        self.adapted, self.base = _adapted(path, how, scheme, dtype), base

    @property
    def model(self) -> nn.Module:
        """The model with the adapter."""
        return self.adapted

    def save(self, folder: Path) -> None:
        """Write the adapter in peft's form."""
        self.adapted.save_pretrained(str(folder), save_embedding_layers=False)

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote."""
        from peft import set_peft_model_state_dict

        weights = Checkpoint(folder, only=folder / WEIGHTS)
        set_peft_model_state_dict(self.adapted, {name: weights.read(name) for name in weights.tensors})

    def settle(self) -> None:
        """Nothing: an adapter is stored as it was trained."""

    def finish(self, folder: Path) -> None:
        """Write the adapter, and which weights it was trained beside."""
        self.save(folder)
        write_file(folder / BASE, self.base)


def _adapted(path: Path, how: Training, scheme: str | None, dtype: torch.dtype) -> "PeftModel":
    """The model with a new adapter. RecipeError for module names that it has not."""
    from peft import LoraConfig, get_peft_model

    base = prepare_for_training(load(path, scheme=scheme, dtype=dtype))
    alpha = 2 * how.rank if how.alpha is None else how.alpha
    config = LoraConfig(
        r=how.rank, lora_alpha=alpha, use_rslora=how.rslora, use_dora=how.dora, task_type="CAUSAL_LM",  # type: ignore[arg-type]
        target_modules="all-linear" if how.targets is None else list(how.targets),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        try:
            with renamed():
                adapted = get_peft_model(base, config)
        except ValueError as error:
            message = str(error).split(". ")[0].splitlines()[0]
            raise RecipeError(
                message, where=str(path), remedy="--targets q_proj,v_proj, as the model names them"
            ) from error
    adapted.peft_config["default"].base_model_name_or_path = _name(path, base.config.name_or_path)
    adapted.train()
    return adapted


def _name(model: Path, known: str) -> str:
    """The base's name in the adapter's config: that on the hub if config.json has it, else where it lies."""
    return known if "/" in known and not Path(known).exists() else str(model.resolve())
