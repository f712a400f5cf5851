"""A finished run's shards put together as one GGUF file: keys, tensors in llama.cpp's names and order of rows, verified.

The file is begun with its keys, its table and room for all bytes, by the gguf package; each tensor is put in its place
when it is there. Blocks of a finished run are moved, never changed: what the pipeline has verified, number by number, is
copied row by row, and the bytes are compared once more.
"""

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bitwright.checkpoint import Checkpoint, disk_errors
from bitwright.errors import VerificationError
from bitwright.llamacpp.container import FLOATS, SCALARS, GgufFile, Typed, Types
from bitwright.threads import each

if TYPE_CHECKING:
    from bitwright.llamacpp.names import Names  # knows transformers, which files made by name do without

NUMPY: dict[Types, str] = {Types.F32: "<f4", Types.F16: "<f2", Types.F64: "<f8"}  # all others are bytes
FLOAT_TYPES = {dtype: kind for kind, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor of the file. parameter: transformers' name; source: its tensor in the shards; kind: llama.cpp's type, None
    for float."""

    parameter: str
    source: str
    kind: Types | None


def write(
    file: Path, keys: Mapping[str, Any], pieces: list[Piece], shards: list[Path], names: "Names",
    computed: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Write the file and compare what lies in it. VerificationError names the first tensor that differs.

    computed: tensors in float32 that are no parameters, by their names in the file.
    """
    order = sorted(pieces, key=lambda piece: place(names.of(piece.parameter)))
    opened = [Checkpoint(shard.parent, only=shard) for shard in shards]
    stored = {name: checkpoint for checkpoint in opened for name in checkpoint.tensors}

    def made(piece: Piece, read: Callable[[Checkpoint, str], Tensor] = Checkpoint.read) -> tuple[str, Types, Tensor]:
        return names.of(piece.parameter), *_written(names, piece, read(stored[piece.source], piece.source))

    more = [(name, Types.F32, tensor) for name, tensor in computed.items()]
    file.unlink(missing_ok=True)
    with Making(file, keys, [*(made(piece, _described) for piece in order), *more]) as making:
        for name, _, tensor in chain(map(made, order), more):
            making.put(name, tensor)
    for wrong in each(lambda piece: _wrong(making.file, *made(piece)), order) + [
        _wrong(making.file, *one) for one in more
    ]:
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


def place(name: str) -> tuple[int, str]:
    """What is outside the blocks comes first, then block by block."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


def _written(names: "Names", piece: Piece, tensor: Tensor) -> tuple[Types, Tensor]:
    """A tensor's type and values as the file has them: blocks with their rows turned, or floats as llama.cpp has them."""
    if piece.kind is not None:
        rows = names.rows(piece.parameter, len(tensor))
        return piece.kind, tensor if rows is None else tensor[rows]
    tensor = names.written(piece.parameter, tensor).contiguous()
    return FLOAT_TYPES[tensor.dtype], tensor


class Making:
    """A GGUF file in the making: all but the tensors' bytes is there, and those are put in their places in any order.

    `file` reads what has been put.
    """

    def __init__(self, path: Path, keys: Mapping[str, Any], described: Iterable[tuple[str, Types, Tensor]]) -> None:
        """Begin the file, or go on with one that was begun before. described: its tensors, without their numbers."""
        with disk_errors(path):
            if not path.is_file():
                begun = path.with_suffix(".begun")
                _begin(begun, keys, list(described))
                begun.replace(path)
            self.file = GgufFile(path)
            self._stream = path.open("r+b", buffering=0)

    def put(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a tensor, or its rows from `first` on."""
        t, left = self.file.tensors[name], _bytes(tensor).data
        at = t.offset + first * t.row_bytes
        with disk_errors(t.file):
            while len(left):
                count = os.pwrite(self._stream.fileno(), left, at)
                left, at = left[count:], at + count

    def flush(self) -> None:
        """Come back when all that was put is on the disk."""
        with disk_errors(self.file.path):
            os.fsync(self._stream.fileno())

    def __enter__(self) -> "Making":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _begin(file: Path, keys: Mapping[str, Any], described: list[tuple[str, Types, Tensor]]) -> None:
    """Keys, the table of tensors, and room for their bytes."""
    writer = gguf.GGUFWriter(file, str(keys["general.architecture"]))
    for name, value in keys.items():
        _add_key(writer, name, value)
    for name, kind, tensor in described:
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.dtype == torch.bfloat16 else tensor.shape
        dtype: np.dtype[Any] = np.dtype(NUMPY.get(kind, np.uint8))
        writer.add_tensor_info(name, shape, dtype, tensor.nbytes, None if kind in NUMPY else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    writer.close()
    os.truncate(file, _aligned(file.stat().st_size) + sum(_aligned(tensor.nbytes) for _, _, tensor in described))


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
        if inner in SCALARS:
            return head + 12 + len(plain) * struct.calcsize(SCALARS[inner])
        if isinstance(plain, list) and all(isinstance(item, str) for item in plain):
            return head + 12 + 8 * len(plain) + len("".join(plain).encode("utf-8", errors="surrogateescape"))
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
