"""The header of a GGUF file (versions 2 and 3, little-endian): keys, and where tensors are stored.

The gguf package's own reader trusts the counts and offsets in a file, and absurd ones keep it busy for ever. Here each is
compared with the bytes that are left in the file before anything is allocated.
Source: docs/gguf.md of ggml.
"""

import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bitwright.errors import CheckpointError
from bitwright.files.model_path import MAGIC
from bitwright.gguf.block_types import SIZES, Kind, Types, type_numbered

VERSIONS = 2, 3
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY, FLOAT32 = 8, 9, 6
DEEPEST, MOST_AXES = 4, 4  # nesting of arrays; dimensions of a tensor


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: offset and size in bytes, ggml type, and shape in torch's order (the last dimension contiguous)."""

    file: Path
    offset: int
    nbytes: int
    type: Kind
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, size = SIZES[self.type]
        return self.shape[-1] // block * size


class Typed(NamedTuple):
    """A key's value with its GGUF type; `inner`: the type of an array's entries."""

    value: Any
    kind: int
    inner: int | None


@dataclass(frozen=True)
class Header:
    """The header of one file.

    keys     name -> value
    kinds    name -> (GGUF type, type of an array's entries or None)
    tensors  name -> where it is stored
    arrays   keys that are arrays of float32: name -> where it is stored
    """

    keys: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    arrays: dict[str, Stored] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Read a file's header. CheckpointError for a file that is damaged, incomplete or no GGUF file."""
    try:
        with path.open("rb") as stream:
            return _parsed(_Cursor(stream, path))
    except OSError as error:
        raise CheckpointError(f"cannot read it: {error.strerror}", where=str(path)) from error


def damaged(path: Path, message: str) -> CheckpointError:
    """The error for a file that does not hold together."""
    return CheckpointError(message, where=str(path), remedy="the file is damaged or not a GGUF file: get a good copy")


class _Cursor:
    """Sequential reader of a header. CheckpointError instead of reading beyond the end of the file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path, self.at = stream, path, 0
        self.inner: int | None = None  # of the array read last
        self.size = path.stat().st_size

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise damaged(
                self.path, f"{n:,} bytes are announced at byte {self.at:,}, the file ends after {self.left:,}"
            )
        self.at += n
        return self.stream.read(n)

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, least: int) -> int:
        """Read a uint64 count of entries. least: bytes of the smallest entry, by which the count is checked."""
        n = int(self.number("<Q"))
        if n * least > self.left:
            raise self._no_room(n)
        return n

    def _no_room(self, n: int) -> CheckpointError:
        return damaged(self.path, f"{n:,} entries are announced at byte {self.at:,}, the file has no room for them")

    def text(self) -> str:
        return self.take(self.count(1)).decode("utf-8", errors="surrogateescape")

    def texts(self, n: int) -> list[str]:
        """Read n strings; a faster `text` for vocabularies."""
        found, read, at = [], self.stream.read, self.at
        for _ in range(n):
            length = int.from_bytes(read(8), "little")
            at += 8 + length
            if at > self.size:
                self.at = at - length
                raise self._no_room(length)
            found.append(read(length).decode("utf-8", "surrogateescape"))
        self.at = at
        return found

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value of a GGUF type. Arrays of numbers become numpy arrays, other arrays lists."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > DEEPEST:
            raise damaged(self.path, f"a value of type {kind} at byte {self.at:,}, in arrays {depth} deep")
        inner = self.inner = int(self.number("<I"))
        if inner in SCALARS:
            each = np.dtype(SCALARS[inner])
            return np.frombuffer(self.take(self.count(each.itemsize) * each.itemsize), each)
        if inner == STRING:
            return self.texts(self.count(8))
        return [self.value(inner, depth + 1) for _ in range(self.count(12))]


def _parsed(cursor: _Cursor) -> Header:
    path, header = cursor.path, Header()
    if cursor.take(4) != MAGIC:
        raise damaged(path, "no GGUF file: its first four bytes are not 'GGUF'")
    version = cursor.number("<I")
    if int.from_bytes(int(version).to_bytes(4, "little"), "big") in VERSIONS:
        remedy = "convert it: gguf_convert_endian.py of the gguf package makes a little-endian one"
        raise CheckpointError("a big-endian file, and only little-endian ones are read", where=str(path), remedy=remedy)
    if version not in VERSIONS:
        raise damaged(path, f"version {version} of GGUF, and only {VERSIONS} (little-endian) are read here")
    tensors, pairs = cursor.count(24), cursor.count(13)
    keys, kinds = header.keys, header.kinds
    for _ in range(pairs):
        name = cursor.text()
        if name in keys:
            raise damaged(path, f"key {name!r} twice")
        kind = int(cursor.number("<I"))
        keys[name], kinds[name] = cursor.value(kind), (kind, cursor.inner if kind == ARRAY else None)
        if kinds[name] == (ARRAY, FLOAT32):
            size = keys[name].nbytes
            header.arrays[name] = Stored(path, cursor.at - size, size, Types.F32, keys[name].shape)
    found = [_tensor(cursor) for _ in range(tensors)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise damaged(path, f"an alignment of {alignment}")
    header.tensors.update(_placed(found, cursor.at + -cursor.at % alignment, alignment, cursor))
    return header


def _tensor(cursor: _Cursor) -> tuple[str, Stored]:
    """Read one entry of the table of tensors; its offset is still relative to the data section."""
    name, axes = cursor.text(), int(cursor.number("<I"))
    if not 0 < axes <= MOST_AXES:
        raise damaged(cursor.path, f"tensor {name!r} has {axes} axes")
    shape = tuple(reversed(struct.unpack(f"<{axes}Q", cursor.take(8 * axes))))
    kind, offset = int(cursor.number("<I")), int(cursor.number("<Q"))
    try:
        type_ = type_numbered(kind)
        block, size = SIZES[type_]
    except (ValueError, KeyError) as error:
        raise damaged(cursor.path, f"tensor {name!r} is of an unknown type, {kind}") from error
    if prod(shape) == 0 or shape[-1] % block:
        raise damaged(cursor.path, f"tensor {name!r} of shape {shape} does not fill whole blocks of {block}")
    return name, Stored(cursor.path, offset, prod(shape) // block * size, type_, shape)


def _placed(found: list[tuple[str, Stored]], start: int, alignment: int, cursor: _Cursor) -> dict[str, Stored]:
    """Tensors with absolute offsets. CheckpointError if any overlap, are not aligned, or end outside the file."""
    placed: dict[str, Stored] = {}
    end, before = start, ""
    for name, t in sorted(found, key=lambda item: item[1].offset):
        at = start + t.offset
        if name in placed:
            raise damaged(cursor.path, f"tensor {name!r} twice")
        if t.offset % alignment or at < end:
            raise damaged(
                cursor.path, f"tensor {name!r} at byte {at:,} is misplaced" + (f" or in {before!r}" if before else "")
            )
        if at + t.nbytes > cursor.size:
            raise damaged(cursor.path, f"tensor {name!r} ends at byte {at + t.nbytes:,}, the file at {cursor.size:,}")
        placed[name] = Stored(t.file, at, t.nbytes, t.type, t.shape)
        end, before = at + t.nbytes, name
    return placed
