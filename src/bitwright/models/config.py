"""Read a checkpoint's configuration: the model's, and its quantization_config."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError
from bitwright.files.model_path import check_model_path, is_gguf
from bitwright.models.gguf_source import read_config as read_gguf_config
from bitwright.models.own_head import has_own_head

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # files of AutoGPTQ, AutoAWQ -> quant_method


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config, of a checkpoint directory or GGUF file, without a quantization_config.

    tie_word_embeddings is corrected to False where the files hold an output head that differs from the embedding.

    CheckpointError if the config is missing, damaged, or of an unknown architecture.
    """
    check_model_path(folder)
    if is_gguf(folder):
        return read_gguf_config(folder)
    file = folder / "config.json"
    if not file.is_file():
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
    if getattr(config, "tie_word_embeddings", False) and has_own_head(folder):
        config.tie_word_embeddings = False
    return config


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
    """The quantization_config of a checkpoint: in config.json, or in AutoGPTQ's or AutoAWQ's own file; None: float."""
    raw = _json(folder / "config.json")
    for key in ("quantization_config", "compression_config"):  # the latter as compressed-tensors once had it
        for place in (raw, raw.get("text_config")):
            if isinstance(place, dict) and isinstance(place.get(key), dict):
                return dict(place[key])
    for file, method in BESIDE.items():
        found = _json(folder / file)
        if found:
            return {"quant_method": method, **found}
    return None


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file. CheckpointError for invalid JSON."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"unusable {file.name}: {error}", where=str(file)) from error
    return raw if isinstance(raw, dict) else {}
