"""Writer of GGUF files whose tensors arrive in any order; each is read back from the file and compared as it is written.

The gguf package writes the header: keys and the table of tensors. The file then gets its full size, and tensors are written
at their offsets, whole or some rows at a time, so that no temporary copy of them is needed. Parameters that are entries of
a key's array are written into the header.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bitwright.errors import FormatError, VerificationError
from bitwright.files.checkpoint import disk_errors
from bitwright.formats.format import Layer, differing
from bitwright.formats.ggml import encode
from bitwright.formats.gguf import kind_of, reads_back
from bitwright.gguf.block_types import FLOATS, SIZES, Kind, decoded, type_named
from bitwright.gguf.header import SCALARS, Typed
from bitwright.gguf.reader import GgufFile
from bitwright.numerics.qtensor import QTensor, rows

FLOAT_TYPES = {dtype: kind for kind, dtype in FLOATS.items()}


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def place(name: str) -> tuple[int, str]:
    """Sort key for the order of tensors in the file: those outside the blocks first, then block by block, by name."""
    parts = name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, name)


class GgufWriter:
    """An open GGUF file with a complete header, whose tensors are written in any order. `file` reads it back."""

    def __init__(self, path: Path, keys: Mapping[str, Any], described: Iterable[tuple[str, Kind, Tensor]]) -> None:
        """Create the file, or resume writing one that exists. described: name, type and a meta tensor for each tensor."""
        with disk_errors(path):
            if not path.is_file():
                begun = path.with_suffix(".begun")
                _begin(begun, keys, list(described))
                begun.replace(path)
            self.file = GgufFile(path)
            self.file.tensors |= self.file.entries
            self._stream = path.open("r+b", buffering=0)

    def put(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a tensor's bytes, or those of its rows from `first` on, without verification."""
        t, left = self.file.tensors[name], _bytes(tensor).data
        at = t.offset + first * t.row_bytes
        with disk_errors(t.file):
            while len(left):
                count = os.pwrite(self._stream.fileno(), left, at)
                left, at = left[count:], at + count

    def put_floats(self, name: str, tensor: Tensor, first: int = 0) -> None:
        """Write a float tensor, or its rows from `first` on, and verify it.

        VerificationError if the bytes read back differ; FormatError for infinities in float16.
        """
        if tensor.dtype == torch.float16 and bool(torch.isinf(tensor).any()):
            remedy = "keep this tensor by a recipe, in bf16 or as it is"
            raise FormatError("it has numbers that float16 cannot hold", where=name, remedy=remedy)
        self.put(name, tensor, first)
        meant = _bytes(tensor)
        count = len(meant) // self.file.tensors[name].row_bytes
        _check(np.array_equal(self.file.rows(name, first, first + count).reshape(-1), meant), name)

    def put_rounded(self, name: str, layer: Layer, q: QTensor, first: int = 0) -> None:
        """Write a quantized matrix, or its rows from `first` on, in the layer's block type, and verify it.

        The readers in ggml_codes.py and ggml_scales.py check all rows, the gguf package checks the first row. Where the former
        find a difference, the gguf package decides on all rows. VerificationError if the weights differ from q.
        """
        kind = kind_of(layer)
        self.put(name, encode(q, kind), first)
        found = torch.from_numpy(self.file.rows(name, first, first + len(q.codes)))
        alike = reads_back(kind.name, found, q)
        if first == 0 or not alike:
            some = found[:1] if alike else found
            read = torch.from_numpy(decoded(some.numpy(), type_named(kind.name), name))
            _check(differing(read, rows(q, 0, len(some))) == 0, name)

    def flush(self) -> None:
        """Wait until all that was written is on the disk (fsync)."""
        with disk_errors(self.file.path):
            os.fsync(self._stream.fileno())

    def __enter__(self) -> "GgufWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _check(alike: bool, name: str) -> None:
    """VerificationError if a tensor was not read back as it was written."""
    if not alike:
        raise VerificationError("what lies on the disk is not what was meant", where=name)


def _begin(file: Path, keys: Mapping[str, Any], described: list[tuple[str, Kind, Tensor]]) -> None:
    """Write the header (keys, table of tensors), and extend the file to its full size."""
    writer = gguf.GGUFWriter(file, str(keys["general.architecture"]))
    for name, value in keys.items():
        _add_key(writer, name, value)
    for name, kind, tensor in described:
        block, size = SIZES[kind]
        shape = tensor.shape if kind in FLOATS else (*tensor.shape[:-1], tensor.shape[-1] // size * block)
        weights: np.dtype[Any] = np.dtype(np.int8)  # anything but bytes, which the package would count blocks by
        writer.add_tensor_info(name, shape, weights, tensor.nbytes, kind)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.flush()
    writer.close()
    os.truncate(file, _aligned(file.stat().st_size) + sum(_aligned(tensor.nbytes) for _, _, tensor in described))


def file_bytes(keys: Mapping[str, Any], tensors: Iterable[tuple[str, int, int]]) -> int:
    """The exact size of a GGUF file in bytes. tensors: (name, number of axes, bytes) of each."""
    known = list(tensors)
    head = 24 + sum(_key_bytes(name, value) for name, value in keys.items() if not _is_empty(value))
    head += sum(24 + len(name.encode()) + 8 * axes for name, axes, _ in known)
    return _aligned(head) + sum(_aligned(nbytes) for _, _, nbytes in known)


def _aligned(n: int) -> int:
    return n + -n % gguf.GGUF_DEFAULT_ALIGNMENT


def _key_bytes(name: str, value: Any) -> int:
    """Bytes of one key and its value in the file, with their lengths and types."""
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
    """Whether a value is an empty array, which the gguf package's writer leaves out."""
    plain = value.value if isinstance(value, Typed) else value
    return isinstance(plain, list | np.ndarray) and len(plain) == 0


def _add_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Add one key, in its own type (`Typed`) or the one that llama.cpp expects: integers as uint32, floats as float32."""
    if name == "general.architecture":
        return  # GGUFWriter's constructor has added it
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
