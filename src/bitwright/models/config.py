"""Read a checkpoint's configuration: the model's, and its quantization_config."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError
from bitwright.files.model_path import check_model_path, is_gguf
from bitwright.models.gguf_source import read_config as read_gguf_config
from bitwright.models.own_head import has_own_head

# Last parts of tensor names that occur only in quantized checkpoints.
QUANTIZED = (
    "qweight", "weight_packed", "weight_codes", "weight_scale", "weight_scale_inv", "weight_scales", "absmax", "SCB", "W_q",
    "_data", "_weight_qdata", "codebooks",
)  # fmt: skip
# Files of AutoGPTQ, AutoAWQ, ModelOpt beside config.json -> quant_method.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
SAID_TWICE = ("bits", "group_size", "checkpoint_format")  # what decides how numbers are read, and stands in both files
OTHER_NAMES = {"modelopt_fp4": "modelopt", "modelopt_fp8": "modelopt"}  # of a quant_method
# Keys that tell the quant_method of a config that does not say it, as files of 2023 do not.
TELLING = {
    "load_in_8bit": "bitsandbytes", "load_in_4bit": "bitsandbytes", "config_groups": "compressed-tensors",
    "desc_act": "gptq", "zero_point": "awq",
}  # fmt: skip


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config, of a checkpoint directory or GGUF file, without a quantization_config.

    tie_word_embeddings is corrected to False where the files hold an output head that differs from the embedding.

    CheckpointError if the config is missing, damaged, or of an unknown architecture.
    """
    check_model_path(folder)
    if is_gguf(folder):
        return read_gguf_config(folder)
    file = folder / "config.json"
    if is_adapter(folder):
        raise CheckpointError("an adapter, not a whole model", where=str(folder), remedy=_merging(folder))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("not a JSON object")
        _ = raw["model_type"]
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except KeyError as error:
        raise CheckpointError(f"config.json lacks {error}", where=str(file)) from error
    except (ValueError, TypeError, AttributeError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"unusable config.json: {error}", where=str(file)) from error
    config.name_or_path = str(raw.get("_name_or_path", ""))  # transformers sets the local path
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if not hasattr(config, "tie_word_embeddings"):  # some multimodal models have it in the text model's part alone
        config.tie_word_embeddings = getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False)
    if config.tie_word_embeddings and has_own_head(folder):
        config.tie_word_embeddings = False
    return config


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds a LoRA adapter (peft) alone, without the model, though perhaps with its config."""
    whole = [folder / "config.json", *folder.glob("model*.safetensors*")]
    return (folder / "adapter_config.json").is_file() and len([file for file in whole if file.is_file()]) < 2


def _merging(folder: Path) -> str:
    """The remedy for a LoRA adapter (peft): how to merge it into its base model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "BASE"
    return (
        f'merge it into its model first: peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload()'
        f'.save_pretrained("MERGED"), copy the tokenizer files of {base} there, and quantize MERGED'
    )


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint: in config.json or its tool's own file (`BESIDE`); None: float.

    CheckpointError where config.json and such a file contradict each other.
    """
    raw = _json(folder / "config.json")
    for key in ("quantization_config", "compression_config"):  # the latter as compressed-tensors once had it
        for place in (raw, raw.get("text_config")):
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                return _completed(_named(place[key]), folder)
    for file, method in BESIDE.items():
        found = _json(folder / file)
        if found:
            return {"quant_method": method, **found}
    return None


def _named(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the quant_method that readers know: also where it has another name, or other keys tell it."""
    method = config.get("quant_method") or next((m for key, m in TELLING.items() if key in config), None)
    return {**config, "quant_method": OTHER_NAMES.get(str(method), method)}


def _completed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with what only the tool's own file beside config.json says of the layout. CheckpointError if they differ."""
    file = next((file for file, method in BESIDE.items() if method == config["quant_method"]), None)
    beside = {} if file is None else _json(folder / file)
    said = {key: beside[key] for key in SAID_TWICE if beside.get(key) is not None}
    for key, value in said.items():
        if config.get(key, value) != value:
            message = f"config.json says {key} {config[key]!r}, {file} {value!r}"
            raise CheckpointError(message, where=str(folder), remedy="get both files from where the weights are from")
    return {**config, **said}


def described_in(folder: Path) -> str:
    """The file in which a quantized checkpoint says how it was quantized."""
    beside = (name for name in BESIDE if (folder / name).is_file())
    return next(beside, "config.json") if "quantization_config" not in _json(folder / "config.json") else "config.json"


def check_described(tensors: Iterable[str], folder: Path) -> None:
    """CheckpointError if there are quantized tensors, and no file says how they were quantized."""
    found = next((name for name in tensors if name.rpartition(".")[2] in QUANTIZED), None)
    if found is not None and quantization_of(folder) is None:
        message = f"holds quantized weights ({found}), and neither config.json nor quantize_config.json says how"
        remedy = (
            f"get config.json with its quantization_config, or {' or '.join(BESIDE)}, from where the weights are from"
        )
        raise CheckpointError(message, where=str(folder), remedy=remedy)


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. CheckpointError for invalid JSON."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "get a good copy of it from where the weights are from"
        raise CheckpointError(f"unusable {file.name}: {error}", where=str(file), remedy=remedy) from error
    return raw if isinstance(raw, dict) else {}
