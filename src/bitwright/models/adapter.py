"""LoRA adapters in peft's form: read, checked against a model, added to its weights as they are read.

A directory with adapter_config.json and adapter_model.safetensors. Kinds: LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA
(arXiv:2312.03732) and DoRA (Liu et al. 2024, arXiv:2402.09353), with ranks and alphas by module. What peft would merge into
a weight [N, K] is w + s B A with s = α / r (rsLoRA: α / √r), and for DoRA m (w + s B A) / ‖w + s B A‖, row by row. Beside an
embedding [V, K] it is w + s (B A)ᵀ. What was trained whole (modules_to_save, biases) stands in the place of the model's own.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint
from bitwright.files.model_path import is_gguf
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "bitwright.json"  # what `finetune` writes beside an adapter: the weights that it was trained beside
STEM = "base_model.model."
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
OF_EMBEDDINGS = ("lora_embedding_B", "lora_embedding_A")  # in the places of A and B, transposed
COPY = ".base_layer"  # in the name of a copy of the weight that LoRA was trained beside
# Keys of adapter_config.json that add something else than the kinds above; falsy values are fine.
OTHERS = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
# Values of init_lora_weights with which peft takes what an adapter begins as off the weights beside it. One that was saved to
# be added to the weights as they were has another value there.
TAKEN_OFF = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one matrix: A [r, K], B [N, r], scaling s; DoRA's magnitude [N], or None."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None

    def added_to(self, w: Tensor) -> Tensor:
        """The adapted matrix [N, K] in float32."""
        adapted = w.float() + self.scaling * (self.B.float() @ self.A.float())
        if self.magnitude is None:
            return adapted
        return self.magnitude.float()[:, None] * adapted / torch.linalg.norm(adapted, dim=1, keepdim=True)


class Adapter:
    """An adapter's deltas by module name; replaced: the parameters that it has whole, by name."""

    def __init__(self, folder: Path) -> None:
        """Reads the whole adapter, which is small. CheckpointError for one that is missing, damaged, or of another kind."""
        self.folder = folder
        self.config = _config(folder)
        checkpoint = Checkpoint(folder, only=folder / WEIGHTS)
        parts: dict[str, dict[str, Tensor]] = {}
        self.replaced: dict[str, Tensor] = {}
        for name in checkpoint.tensors:
            module, part = _parted(name, folder)
            tensor = checkpoint.read(name)
            if not bool(torch.isfinite(tensor).all()):
                remedy = "train it again from its last good checkpoint"
                raise CheckpointError(f"tensor {name!r} has NaN or Inf", where=str(folder), remedy=remedy)
            if part in PARTS:
                parts.setdefault(module, {})[part] = tensor
            elif part in OF_EMBEDDINGS:
                parts.setdefault(module, {})[PARTS[OF_EMBEDDINGS.index(part)]] = tensor.T.contiguous()
            else:
                self.replaced[f"{module.removesuffix(COPY)}.{part}"] = tensor
        self.deltas = {module: self._delta(module, own) for module, own in parts.items()}
        self.digest = hashlib.sha256((folder / CONFIG).read_bytes() + (folder / WEIGHTS).read_bytes()).hexdigest()

    def _delta(self, module: str, own: dict[str, Tensor]) -> Delta:
        """The delta of one module. CheckpointError for missing parts, or ranks that do not fit together."""
        lacking = [part for part in PARTS[:2] if part not in own]
        if lacking or (PARTS[2] in own) != bool(self.config.get("use_dora")):
            missing = lacking[0] if lacking else PARTS[2]
            raise CheckpointError(
                f"the adapter has no {missing} for it, or too many", where=module, remedy=_again(self)
            )
        A, B = own[PARTS[0]], own[PARTS[1]]
        rank, alpha = self._rank_and_alpha(module)
        if A.ndim != 2 or B.ndim != 2 or len(A) != rank or B.shape[1] != rank:
            found = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} are not of rank {rank}, as {CONFIG} says"
            raise CheckpointError(found, where=module, remedy=_again(self))
        scaling = alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank
        magnitude = own.get(PARTS[2])
        if magnitude is not None and magnitude.numel() != len(B):  # DoRA beside an embedding has them by column
            message = f"lora_magnitude_vector {tuple(magnitude.shape)} is not one for each of {len(B)} rows"
            raise CheckpointError(message, where=module, remedy=_merged(self.folder))
        return Delta(A, B, scaling, None if magnitude is None else magnitude.flatten())

    def _rank_and_alpha(self, module: str) -> tuple[int, float]:
        """What adapter_config.json says of a module. CheckpointError for a rank below 1, or an alpha that is no number."""
        try:
            rank = int(_of(self.config.get("rank_pattern"), module, self.config["r"]))
            alpha = float(_of(self.config.get("alpha_pattern"), module, self.config["lora_alpha"]))
        except (TypeError, ValueError, re.error) as error:
            raise CheckpointError(f"unusable {CONFIG}: {error}", where=module, remedy=_again(self)) from error
        if rank < 1 or not math.isfinite(alpha):
            message = f"{CONFIG} says rank {rank} and alpha {alpha}: nothing can be added by that"
            raise CheckpointError(message, where=module, remedy=_again(self))
        return rank, alpha

    def check(self, skeleton: Skeleton) -> None:
        """CheckpointError for an adapter of another model: modules that are missing on either side, or of another shape."""
        parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
        linear, tied = set(skeleton.linear_names()), {*skeleton.ties(), *skeleton.ties().values()}
        computed = {name for conversion in skeleton.conversions for name in conversion.makes}
        embeddings = {name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Embedding)}
        for module in self.deltas:
            if module not in linear | embeddings:
                raise CheckpointError(
                    f"the model has no linear module {module!r}", where=str(self.folder), remedy=_base(self)
                )
        for name, made in self._shapes(skeleton).items():
            if name not in parameters:
                raise CheckpointError(f"the model has no {name!r}", where=str(self.folder), remedy=_base(self))
            if name in tied | computed:
                how = (
                    "shares its weight with another module"
                    if name in tied
                    else "is made of several tensors of the files"
                )
                message = f"{name.removesuffix('.weight')!r} {how}, which the adapter does not mean"
                raise CheckpointError(message, where=str(self.folder), remedy="train without that module")
            meant = tuple(parameters[name].shape)
            if made != meant:
                message = f"the adapter is for a matrix {list(made)}, the model's is {list(meant)}"
                raise CheckpointError(message, where=name.removesuffix(".weight"), remedy=_base(self))
        fused = tuple(
            f"{experts}." for experts in skeleton.experts
        )  # parameters, not modules: target_modules misses them
        passed = () if any(module.startswith(fused) for module in self.deltas) else fused
        lacking = sorted(m for m in self._meant(linear) - self.deltas.keys() if not m.startswith(passed))
        if lacking:
            message = f"the adapter has nothing for {len(lacking)} modules that its target_modules names, such as {lacking[0]}"
            raise CheckpointError(message, where=str(self.folder), remedy=_base(self))

    def _shapes(self, skeleton: Skeleton) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters that it adds to or replaces, by name."""
        found = {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        for module, delta in self.deltas.items():
            shape = (len(delta.B), delta.A.shape[1])
            turned = isinstance(skeleton.model.get_submodule(module), Conv1D)
            found[f"{module}.weight"] = shape[::-1] if turned else shape
        return found

    def _meant(self, linear: Iterable[str]) -> set[str]:
        """The modules that the config's target_modules and exclude_modules mean; none where other keys choose among them."""
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if self.config.get("layers_to_transform") or targets is None:
            return set()
        return {name for name in linear if _names(targets, name) and not _names(excluded or [], name)}

    def applied(self, skeleton: Skeleton, parameter: str, weight: Tensor) -> Tensor:
        """The parameter, or what the adapter has in its place, with what it adds, in float32; itself where that is nothing."""
        module, weight = parameter.removesuffix(".weight"), self.replaced.get(parameter, weight)
        if module not in self.deltas or module == parameter:
            return weight
        owner = skeleton.model.get_submodule(module)
        return matrix_of(owner, self.deltas[module].added_to(matrix_of(owner, weight))).contiguous()

    def changes(self, parameter: str) -> bool:
        """Whether it adds to this parameter, or replaces it."""
        added = parameter.removesuffix(".weight") in self.deltas and parameter.endswith(".weight")
        return added or parameter in self.replaced


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. CheckpointError if it is missing, damaged, or of a kind that is not read here."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            remedy = "give the directory that peft's save_pretrained wrote, with safetensors"
            if is_gguf(folder):
                remedy = f"make it one in peft's form: bitwright convert {folder} ADAPTER --base MODEL"
            raise CheckpointError(f"no {name} here: not an adapter", where=str(folder), remedy=remedy)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = config["peft_type"]
        _ = int(config["r"]), float(config["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"unusable {CONFIG}: {type(error).__name__} {error}"
        raise CheckpointError(message, where=str(folder), remedy="save the adapter again with peft") from error
    odd = [key for key in OTHERS if config.get(key)]
    odd += ["init_lora_weights"] if str(config.get("init_lora_weights")).lower().startswith(TAKEN_OFF) else []
    if kind != "LORA" or odd:
        what = f"{odd[0]} = {config[odd[0]]!r}" if kind == "LORA" else f"peft's {kind}"
        raise CheckpointError(f"LoRA, rsLoRA and DoRA are read, not {what}", where=str(folder), remedy=_merged(folder))
    return dict(config)


def _parted(name: str, folder: Path) -> tuple[str, str]:
    """A tensor's module and part: base_model.model.MODULE.lora_A.weight. CheckpointError for any other name."""
    for part in PARTS:
        if name.startswith(STEM) and name.endswith(f".{part}"):
            return name.removeprefix(STEM).removesuffix(f".{part}"), part
    if name.startswith(STEM) and name.endswith(f".{PARTS[2]}.weight"):
        return name.removeprefix(STEM).removesuffix(f".{PARTS[2]}.weight"), PARTS[2]
    module, _, part = name.removeprefix(STEM).rpartition(".")
    if name.startswith(STEM) and (part in OF_EMBEDDINGS or "lora_" not in name):
        return module, part
    remedy = "train LoRA on linear layers alone, or merge this adapter with peft first"
    raise CheckpointError(f"tensor {name!r} is no part of LoRA on a linear layer", where=str(folder), remedy=remedy)


def _names(said: str | Sequence[str], name: str) -> bool:
    """Whether a config names a module, by peft's rule: a regular expression for whole names, or a list of their ends."""
    if isinstance(said, str):
        return re.fullmatch(said, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in said)


def _of(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """A module's own rank or alpha: that of the first pattern that matches the end of its name, as in peft."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _merged(folder: Path) -> str:
    return f'merge it with peft first: peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload()'


def _again(adapter: Adapter) -> str:
    return f"get a good copy of {adapter.folder}"


def _base(adapter: Adapter) -> str:
    return f"give the model that it was trained beside: {adapter.config.get('base_model_name_or_path') or 'unknown'}"
