"""All keys of a GGUF file that is made of a checkpoint's directory."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf.config_keys import architecture_of, keys_of
from bitwright.gguf.tokenizer_keys import keys_of as vocabulary_keys

POOLINGS = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}  # llama.cpp's numbers of them


class Metadata(NamedTuple):
    """All keys of a file, and what there is to say of them."""

    keys: dict[str, Any]
    notes: tuple[str, ...]


def metadata(source: Path, config: PretrainedConfig, tokenizer: Any, file_type: int | None) -> Metadata:
    """What a file of this checkpoint says. FormatError for an architecture or tokenizer that cannot be written."""
    keys = keys_of(config) | {"general.quantization_version": 2}
    keys |= {} if file_type is None else {"general.file_type": file_type}
    keys |= {} if architecture_of(config).causal else _pooling(source, str(keys["general.architecture"]))
    vocabulary = vocabulary_keys(source, tokenizer, config.get_text_config().vocab_size, source.resolve().name)
    return Metadata(keys | vocabulary.keys, vocabulary.notes)


def _pooling(source: Path, name: str) -> dict[str, Any]:
    """How a sentence encoder makes one vector of many, where its directory says so (sentence-transformers' modules.json).

    FormatError for a way that llama.cpp does not have.
    """
    file = source / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    where = next((source / m["path"] / "config.json" for m in modules if m["type"].endswith("Pooling")), None)
    if where is None or not where.is_file():
        return {}
    said = json.loads(where.read_text(encoding="utf-8"))
    chosen = [number for key, number in POOLINGS.items() if said.get(f"pooling_mode_{key}")]
    if len(chosen) != 1:
        raise FormatError(
            "pooling that llama.cpp does not have", where=str(where), remedy=f"one of {', '.join(POOLINGS)}"
        )
    return {f"{name}.pooling_type": chosen[0]}
