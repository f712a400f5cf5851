"""A finished run's shards put together as one GGUF file: keys, tensors in llama.cpp's names and order of rows, verified.

Blocks are moved, never changed: what the pipeline has verified, number by number, is copied row by row, and the bytes
are compared once more when the file is there. The file is written by the gguf package.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.checkpoint import Checkpoint, disk_errors
from bitwright.errors import VerificationError
from bitwright.llamacpp.architecture import FACTORS, Names, keys_of, rope_factors
from bitwright.llamacpp.container import FLOATS, GgufFile, Typed, Types
from bitwright.llamacpp.vocabulary import keys_of as vocabulary_keys

FLOAT_TYPES = {dtype: kind for kind, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor of the file. parameter: transformers' name; source: its tensor in the shards; kind: llama.cpp's type, None
    for float."""

    parameter: str
    source: str
    kind: Types | None


def metadata(source: Path, config: PretrainedConfig, tokenizer: Any, file_type: int | None) -> dict[str, Any]:
    """All keys of the file. FormatError for an architecture or tokenizer that cannot be written."""
    keys = keys_of(config) | {"general.name": source.resolve().name, "general.quantization_version": 2}
    keys |= {} if file_type is None else {"general.file_type": file_type}
    return keys | vocabulary_keys(source, tokenizer, config.get_text_config().vocab_size)


def write(
    file: Path, keys: Mapping[str, Any], pieces: list[Piece], shards: list[Path], config: PretrainedConfig
) -> None:
    """Write the file and compare what lies in it. VerificationError names the first tensor that differs."""
    names = Names(config)
    order = sorted(pieces, key=lambda piece: _place(names.of(piece.parameter)))
    opened = [Checkpoint(shard.parent, only=shard) for shard in shards]
    stored = {name: checkpoint for checkpoint in opened for name in checkpoint.tensors}

    def arrays() -> Iterator[tuple[str, Types, np.ndarray[Any, Any]]]:
        for piece in order:
            yield names.of(piece.parameter), *_written(names, piece, stored[piece.source].read(piece.source))
        factors = rope_factors(config)
        if factors is not None:
            yield FACTORS, Types.F32, factors.numpy()

    with disk_errors(file):
        _write(file, keys, arrays)
    written = GgufFile(file)
    for name, kind, array in arrays():
        found = written.tensors.get(name)
        if found is None or found.type != kind or written.raw(name).tobytes() != array.tobytes():
            raise VerificationError("the tensor on disk is not the one that was meant", where=f"{file.name}: {name}")


def _place(name: str) -> tuple[int, str]:
    """What is outside the blocks comes first, then block by block."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _written(names: Names, piece: Piece, tensor: Tensor) -> tuple[Types, np.ndarray[Any, Any]]:
    """A tensor's type and bytes: blocks with their rows turned, or floats as llama.cpp has them."""
    if piece.kind is not None:
        rows = names.rows(piece.parameter, len(tensor))
        return piece.kind, (tensor if rows is None else tensor[rows]).numpy()
    tensor = names.written(piece.parameter, tensor).contiguous()
    kind = FLOAT_TYPES[tensor.dtype]
    return kind, (tensor.view(torch.uint8) if kind is Types.BF16 else tensor).numpy()


def _write(file: Path, keys: Mapping[str, Any], arrays: Any) -> None:
    writer = gguf.GGUFWriter(file, str(keys["general.architecture"]))
    for name, value in keys.items():
        _add_key(writer, name, value)
    for name, kind, array in arrays():
        raw = kind if array.dtype == np.uint8 else None
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, array in arrays():
        writer.write_tensor_data(array)
    writer.flush()
    writer.close()


def _add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """One key, in the type that llama.cpp expects: whole numbers unsigned, all others as they are."""
    if name == "general.architecture":
        return  # the writer has it
    if isinstance(value, Typed):
        plain = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
        inner = None if value.inner is None else gguf.GGUFValueType(value.inner)
        writer.add_key_value(name, plain, gguf.GGUFValueType(value.kind), inner)
    elif isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
