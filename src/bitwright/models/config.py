"""What a checkpoint's config.json says: of the model, and of how its weights are quantized."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError
from bitwright.gguf.reader import is_gguf
from bitwright.models.gguf_source import read_config as read_gguf_config
from bitwright.models.own_head import has_own_head

BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # what older tools wrote, and which


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config, which says that the output head is the embedding only where it is. CheckpointError if it is missing,
    damaged, or of no known architecture."""
    if is_gguf(folder):
        return read_gguf_config(folder)
    file = folder / "config.json"
    if folder.is_file():
        message = "a file that is no GGUF file: its first four bytes are not 'GGUF'"
        raise CheckpointError(message, where=str(folder), remedy="give a .gguf file, or a checkpoint's directory")
    if not folder.is_dir():
        remedy = "give a local directory; a hub name needs its files downloaded first (no network is used)"
        raise CheckpointError("no such directory", where=str(folder), remedy=remedy)
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError("an adapter, not a whole model", where=str(folder), remedy=_merging(folder))
        raise CheckpointError(
            "no config.json", where=str(folder), remedy="give the directory of a Hugging Face checkpoint"
        )
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
    config.name_or_path = str(raw.get("_name_or_path", ""))  # not where it lies here
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if getattr(config, "tie_word_embeddings", False) and has_own_head(folder):
        config.tie_word_embeddings = False
    return config


def _merging(folder: Path) -> str:
    """How to make a checkpoint of an adapter (peft) and its model."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = "BASE"
    return (
        f'merge it into its model first: peft.AutoPeftModelForCausalLM.from_pretrained("{folder}").merge_and_unload()'
        f'.save_pretrained("MERGED"), copy the tokenizer files of {base} there, and quantize MERGED'
    )


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The quantization_config of a checkpoint's config.json, or what AutoGPTQ and AutoAWQ wrote beside it; None: neither."""
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
    """The object in a file; {} where there is no file. CheckpointError for one that is damaged."""
    if not file.is_file():
        return {}
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"unusable {file.name}: {error}", where=str(file)) from error
    return raw if isinstance(raw, dict) else {}
