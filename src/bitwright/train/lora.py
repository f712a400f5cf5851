"""A LoRA adapter of peft's as what a run trains, beside a model's frozen weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from bitwright.errors import CheckpointError, RecipeError
from bitwright.files.checkpoint import Checkpoint, write_file
from bitwright.files.hub import local
from bitwright.inference.dense import Dense
from bitwright.inference.loading import load
from bitwright.inference.qlinear import QLinear
from bitwright.models.adapter import BASE, WEIGHTS
from bitwright.models.config import read_config
from bitwright.models.layers import is_linear, matrix_of
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import names_in, open_weights
from bitwright.train.adapters import prepare_for_training, renamed
from bitwright.train.settings import RESIDUAL, Training

if TYPE_CHECKING:
    from peft import PeftModel

READ_BY_KERNELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # peft refuses these models' out_proj
SPARE = 8  # more directions than the rank, for svd_lowrank's accuracy


class Factor(nn.Linear):
    """A or B of an adapter [N, K] in float32, multiplied in another type."""

    def __init__(self, weight: nn.Parameter, multiplies_in: torch.dtype) -> None:
        nn.Module.__init__(self)  # Linear would make a weight
        self.register_parameter("weight", weight)
        self.register_parameter("bias", None)
        self.multiplies_in = multiplies_in
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in that type."""
        return functional.linear(x.to(self.multiplies_in), self.weight.to(self.multiplies_in))


class Lora:
    """A model with a new adapter. See `Trained` in trained.py."""

    def __init__(self, path: Path, how: Training, scheme: str | None, dtype: torch.dtype, base: bytes) -> None:
        """scheme: what a float model is rounded to; base: what `BASE` will hold. RecipeError for modules that it has not."""
        self.shared, tied = shared_modules(path)
        self.adapted, self.base = _adapted(path, how, scheme, dtype, tied), base
        if how.init == RESIDUAL and how.teacher is not None:
            _begin_at_residual(self.adapted, local(how.teacher), how.seed)

    @property
    def model(self) -> nn.Module:
        """The model with the adapter."""
        return self.adapted

    @property
    def notes(self) -> tuple[str, ...]:
        """Which modules no adapter is beside."""
        if not self.shared:
            return ()
        some = f"{len(self.shared)} modules have no adapter, such as {self.shared[0]}"
        return (f"{some}: they share their weights with others, which a merged model could not hold apart",)

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


def _adapted(path: Path, how: Training, scheme: str | None, dtype: torch.dtype, tied: Sequence[str]) -> "PeftModel":
    """The model with a new adapter. RecipeError for module names that it has not, or modules that are shared."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    base = prepare_for_training(load(path, scheme=scheme, dtype=dtype))
    _check_rank(base, how.rank)
    alpha = 2 * how.rank if how.alpha is None else how.alpha
    config = LoraConfig(
        r=how.rank, lora_alpha=alpha, use_rslora=how.rslora, use_dora=how.dora, task_type="CAUSAL_LM",  # type: ignore[arg-type]
        target_modules="all-linear" if how.targets is None else list(how.targets),
        exclude_modules=[*unlike_linear(base), *tied] or None if how.targets is None else None,
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
    layers = {name: m for name, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    wrong = next((name for name in tied if name in layers), None)
    if wrong is not None:
        message = (
            "it shares its weight with another module: no merged model could hold what an adapter adds to one of them"
        )
        raise RecipeError(message, where=wrong, remedy="leave it out of --targets")
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors.update(
                {k: Factor(f.get_parameter("weight"), dtype) for k, f in factors.items() if isinstance(f, nn.Linear)}
            )
    adapted.peft_config["default"].base_model_name_or_path = _name(path, base.config.name_or_path)
    adapted.train()
    return adapted


def _check_rank(base: PreTrainedModel, rank: int) -> None:
    """RecipeError for a rank that no matrix of the model has."""
    sides = [min(m.in_features, m.out_features) for m in base.modules() if isinstance(m, nn.Linear)]
    if rank > max(sides, default=rank):
        message = f"rank {rank} is more than the smaller side of any matrix, {max(sides)} at most"
        raise RecipeError(message, where="--rank", remedy=f"--rank {min(16, max(sides))}")


def _begin_at_residual(adapted: "PeftModel", original: Path, seed: int) -> None:
    """Let the adapter begin as what of its rank makes up best for the rounding of each matrix.

    The largest singular values of W − Q (LoftQ, Li et al. 2023, arXiv:2310.08659, with one step and Q as it is). RecipeError
    for an original that is quantized too; CheckpointError for one with other matrices.
    """
    from peft.tuners.lora import LoraLayer

    skeleton = Skeleton(read_config(original), torch.float32)
    source = open_weights(original, skeleton)
    names = names_in(source, skeleton)
    if not source.is_float:
        raise RecipeError(
            "the teacher is quantized too", where=str(original), remedy="give the float original, or --init zero"
        )
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, QLinear):
            w = matrix_of(skeleton.model.get_submodule(name), source.read(names[f"{name}.weight"])).float()
            rounded = layer.base_layer.weight.as_subclass(Tensor)
            if w.shape != rounded.shape:
                message = f"the teacher's matrix is {list(w.shape)}, the model's {list(rounded.shape)}"
                raise CheckpointError(message, where=name, remedy="give the original that was rounded, or --init zero")
            _begin_at(layer, w - rounded, seed)


def shared_modules(path: Path) -> tuple[list[str], list[str]]:
    """Modules whose weights are those of others too: in the blocks (Zamba 2), and in the whole model."""
    skeleton = Skeleton(read_config(path), torch.float32)
    inside = f"{skeleton.block_prefix}."
    names = {name for pair in skeleton.ties().items() for name in pair if name.endswith(".weight")}
    everywhere = sorted(name.removesuffix(".weight") for name in names)
    return [name for name in everywhere if name.startswith(inside)], everywhere


def unlike_linear(base: PreTrainedModel) -> list[str]:
    """Layers of nn.Linear's kind beside which no adapter can be."""
    fused = ["out_proj"] if base.config.model_type in READ_BY_KERNELS else []
    layers = [
        (n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QLinear | Dense)
    ]
    return fused + [name for name, layer in layers if not is_linear(layer)]


@torch.no_grad()
def _begin_at(layer: Any, lost: Tensor, seed: int) -> None:
    """Set B A of one of peft's layers to the nearest of its rank to a matrix [N, K]."""
    A, B, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(lost, q=min(len(A) + SPARE, *lost.shape), niter=4)
    root = s[: len(A)].sqrt()
    A.copy_((v[:, : len(A)] * root).T)
    B.copy_(u[:, : len(A)] * root / scaling)


def _name(model: Path, known: str) -> str:
    """The base's name in the adapter's config: that on the hub if config.json has it, else where it lies."""
    return known if "/" in known and not Path(known).exists() else str(model.resolve())
