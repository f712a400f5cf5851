"""The metadata keys of a GGUF file for a checkpoint directory: architecture, hyperparameters, tokenizer, pooling."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf.config_keys import architecture_of, keys_of
from bitwright.gguf.tokenizer_keys import keys_of as vocabulary_keys

POOLINGS = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}  # llama.cpp's numbers of them


class Metadata(NamedTuple):
    """The metadata keys of a file, and notes for the user about them."""

    keys: dict[str, Any]
    notes: tuple[str, ...]


def metadata(source: Path, config: PretrainedConfig, tokenizer: Any, file_type: int | None) -> Metadata:
    """The keys for a checkpoint. file_type: llama.cpp's number of the mix, if there is one.

    FormatError for an architecture or tokenizer that cannot be written.
    """
    keys = keys_of(config) | {"general.quantization_version": 2}
    keys |= {} if file_type is None else {"general.file_type": file_type}
    modules = [] if architecture_of(config).causal else _modules(source)
    keys |= _pooling(source, modules, str(keys["general.architecture"]))
    vocabulary = vocabulary_keys(source, tokenizer, config.get_text_config().vocab_size, source.resolve().name)
    return Metadata(keys | vocabulary.keys, (*vocabulary.notes, *_dense_notes(modules)))


def _modules(source: Path) -> list[dict[str, Any]]:
    """The parts of a sentence encoder, from sentence-transformers' modules.json; [] if there is none."""
    file = source / "modules.json"
    found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return found


def _dense_notes(modules: list[dict[str, Any]]) -> list[str]:
    """What is said of matrices behind the pooling (EmbeddingGemma's)."""
    dense = [module["path"] for module in modules if module["type"].endswith("Dense")]
    what = f"{', '.join(dense)}: matrices that sentence-transformers applies behind the pooling are left out"
    return [f"{what}: an engine gives the embeddings before them"] if dense else []


def _pooling(source: Path, modules: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The pooling of a sentence encoder; {} if there is none. FormatError for one that llama.cpp does not have."""
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
