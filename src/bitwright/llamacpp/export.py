"""A finished run's shards put together as one GGUF file: keys, tensors in llama.cpp's names and order of rows, verified.

Blocks are moved, never changed: what the pipeline has verified, number by number, is copied row by row, and the bytes
are compared once more when the file is there. The file is written by the gguf package.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.checkpoint import Checkpoint, disk_errors
from bitwright.errors import FormatError, VerificationError
from bitwright.llamacpp.architecture import architecture_of, keys_of
from bitwright.llamacpp.container import FLOATS, SCALARS, GgufFile, Typed, Types
from bitwright.llamacpp.vocabulary import keys_of as vocabulary_keys
from bitwright.threads import each

NUMPY: dict[Types, str] = {Types.F32: "<f4", Types.F16: "<f2", Types.F64: "<f8"}  # all others are bytes
POOLINGS = {"mean_tokens": 1, "cls_token": 2, "lasttoken": 3}  # llama.cpp's numbers of them
FLOAT_TYPES = {dtype: kind for kind, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor of the file. parameter: transformers' name; source: its tensor in the shards; kind: llama.cpp's type, None
    for float; experts: how many matrices lie in it, one above the other; 0: it is one."""

    parameter: str
    source: str
    kind: Types | None
    experts: int = 0


def metadata(source: Path, config: PretrainedConfig, tokenizer: Any, file_type: int | None) -> dict[str, Any]:
    """All keys of the file. FormatError for an architecture or tokenizer that cannot be written."""
    keys = keys_of(config) | {"general.name": source.resolve().name, "general.quantization_version": 2}
    keys |= {} if file_type is None else {"general.file_type": file_type}
    keys |= {} if architecture_of(config).causal else _pooling(source, str(keys["general.architecture"]))
    return keys | vocabulary_keys(source, tokenizer, config.get_text_config().vocab_size)


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


class Naming(Protocol):
    """How parameters are called in a file of llama.cpp's, and what their tensors become there: `Names`, or nothing new."""

    def of(self, parameter: str) -> str:
        """Its name there."""

    def rows(self, parameter: str, N: int) -> Tensor | None:
        """Where each of N rows is taken from; None: they stay."""

    def written(self, parameter: str, tensor: Tensor) -> Tensor:
        """A float tensor as it is there."""


def write(
    file: Path, keys: Mapping[str, Any], pieces: list[Piece], shards: list[Path], names: Naming,
    computed: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Write the file and compare what lies in it. VerificationError names the first tensor that differs.

    computed: tensors in float32 that are no parameters, by their names in the file.
    """
    order = sorted(pieces, key=lambda piece: _place(names.of(piece.parameter)))
    opened = [Checkpoint(shard.parent, only=shard) for shard in shards]
    stored = {name: checkpoint for checkpoint in opened for name in checkpoint.tensors}

    def made(piece: Piece, read: Callable[[Checkpoint, str], Tensor] = Checkpoint.read) -> tuple[str, Types, Tensor]:
        return names.of(piece.parameter), *_written(names, piece, read(stored[piece.source], piece.source))

    more = [(name, Types.F32, tensor) for name, tensor in computed.items()]
    with disk_errors(file):
        _write(file, keys, [*(made(piece, _described) for piece in order), *more], chain(map(made, order), more))
    written = GgufFile(file)
    for wrong in each(lambda piece: _wrong(written, *made(piece)), order) + [_wrong(written, *one) for one in more]:
        if wrong:
            raise VerificationError("the tensor on disk is not the one that was meant", where=f"{file.name}: {wrong}")


def _wrong(written: GgufFile, name: str, kind: Types, tensor: Tensor) -> str:
    """The tensor's name if the file does not have it just so, else nothing."""
    found = written.tensors.get(name)
    same = found is not None and found.type == kind and np.array_equal(written.raw(name), _bytes(tensor))
    return "" if same else name


def _described(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor's type and shape, without its numbers."""
    info = checkpoint.tensors[name]
    return torch.empty(info.shape, dtype=info.dtype, device="meta")


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _place(name: str) -> tuple[int, str]:
    """What is outside the blocks comes first, then block by block."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _written(names: Naming, piece: Piece, tensor: Tensor) -> tuple[Types, Tensor]:
    """A tensor's type and values as the file has them: blocks with their rows turned, or floats as llama.cpp has them."""
    if piece.kind is not None:
        rows = names.rows(piece.parameter, len(tensor))
        tensor = tensor if rows is None else tensor[rows]
        return piece.kind, tensor.unflatten(0, (piece.experts, -1)) if piece.experts else tensor
    tensor = names.written(piece.parameter, tensor).contiguous()
    return FLOAT_TYPES[tensor.dtype], tensor


def _write(
    file: Path, keys: Mapping[str, Any], described: Iterable[tuple[str, Types, Tensor]],
    tensors: Iterable[tuple[str, Types, Tensor]],
) -> None:  # fmt: skip
    """Keys, the table of tensors, their bytes. described: the same tensors without numbers."""
    writer = gguf.GGUFWriter(file, str(keys["general.architecture"]))
    for name, value in keys.items():
        _add_key(writer, name, value)
    for name, kind, tensor in described:
        shape = tensor.view(torch.uint8).shape if tensor.dtype == torch.bfloat16 else tensor.shape
        dtype: np.dtype[Any] = np.dtype(NUMPY.get(kind, np.uint8))
        writer.add_tensor_info(name, shape, dtype, tensor.nbytes, None if kind in NUMPY else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, tensor in tensors:
        writer.write_tensor_data(_bytes(tensor))
    writer.flush()
    writer.close()


def file_bytes(keys: Mapping[str, Any], tensors: Iterable[tuple[str, int, int]]) -> int:
    """The exact size of the file that `write` makes of tensors of so many axes and bytes, by name."""
    known = list(tensors)
    head = 24 + sum(_key_bytes(name, value) for name, value in keys.items() if not _is_empty(value))
    head += sum(24 + len(name.encode()) + 8 * axes for name, axes, _ in known)
    return _aligned(head) + sum(_aligned(nbytes) for _, _, nbytes in known)


def _aligned(n: int) -> int:
    return n + -n % gguf.GGUF_DEFAULT_ALIGNMENT


def _key_bytes(name: str, value: Any) -> int:
    """One key and its value, with their lengths and types."""
    plain, kind = (value.value, value.kind) if isinstance(value, Typed) else (value, None)
    head = 8 + len(name.encode()) + 4
    if isinstance(plain, list | np.ndarray):
        inner = value.inner if isinstance(value, Typed) else None
        return head + 12 + sum(_value_bytes(item, inner) for item in plain)
    return head + _value_bytes(plain, kind)


def _value_bytes(value: Any, kind: int | None) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode("utf-8", errors="surrogateescape"))
    if kind is not None:
        return struct.calcsize(SCALARS[kind])
    return 1 if isinstance(value, bool) else 4


def _is_empty(value: Any) -> bool:
    """The package's writer leaves out arrays of nothing."""
    plain = value.value if isinstance(value, Typed) else value
    return isinstance(plain, list | np.ndarray) and len(plain) == 0


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
