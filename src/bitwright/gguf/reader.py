"""Reader of GGUF files (versions 2 and 3, little-endian): metadata keys and tensors, with every count and offset checked.

The gguf package's own reader trusts the counts and offsets in a file, and absurd ones keep it busy for ever. Here each is
compared with the bytes that are left in the file before anything is allocated. Type sizes and `dequantize` are the package's.
Source: docs/gguf.md of ggml.
"""

import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.files.model_path import MAGIC
from bitwright.gguf.key_kinds import of_wrong_kind

Types = gguf.GGMLQuantizationType
VERSIONS = 2, 3
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY, FLOAT32 = 8, 9, 6
ENTRIES = tuple(f"xielu.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps"))  # parameters of Apertus' activation
DEEPEST, MOST_AXES = 4, 4  # nesting of arrays; dimensions of a tensor
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
WEIGHTS_AT_ONCE = 1 << 22  # weights decoded in one step; bounds the memory


class Newer(IntEnum):
    """Types that the gguf package of today does not know yet."""

    Q2_0 = 42


Kind = Types | Newer
# Weights and bytes of a block.
SIZES: dict[Kind, tuple[int, int]] = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGML_QUANT_SIZES} | {
    Newer.Q2_0: (64, 18)
}
FLOATS: dict[Kind, torch.dtype] = {
    Types.F32: torch.float32,
    Types.F16: torch.float16,
    Types.BF16: torch.bfloat16,
    Types.F64: torch.float64,
}


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


class GgufFile:
    """A GGUF file, or all parts of a split one.

    keys     name -> value
    kinds    name -> (GGUF type, type of an array's entries or None)
    tensors  name -> where it is stored
    entries  the same of parameters that are entries of a key's array, one of each block: blk.N.KEY
    """

    def __init__(self, path: Path) -> None:
        """Reads the headers only. CheckpointError for a file that is damaged, incomplete or no GGUF file."""
        self.path = path
        self.kinds: dict[str, tuple[int, int | None]] = {}
        arrays: dict[str, Stored] = {}
        self.keys, self.tensors = _read(path, self.kinds, arrays)
        self.entries = _entries(arrays)
        wrong = of_wrong_kind(self.keys)
        if wrong is not None:
            name, kind = wrong
            raise _wrong(path, f"key {name!r} is {str(self.keys[name])[:40]!r}, not {kind}")
        parts = self.keys.get("split.count", 1)
        if isinstance(parts, int) and parts > 1:
            for part in _other_parts(path, parts):
                _, tensors = _read(part, {}, {})
                twice = next((name for name in tensors if name in self.tensors), None)
                if twice is not None:
                    raise _wrong(part, f"tensor {twice!r} is in two parts")
                self.tensors |= tensors
            promised = self.keys.get("split.tensors.count", len(self.tensors))
            if promised != len(self.tensors):
                raise _wrong(path, f"{promised} tensors are promised, the parts hold {len(self.tensors)}")

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors: this one, or all parts."""
        return sorted({t.file for t in self.tensors.values()})

    def check_vocabulary(self) -> None:
        """CheckpointError if the tokenizer's number of tokens is not the embedding's number of rows."""
        tokens, table = self.keys.get("tokenizer.ggml.tokens"), self.tensors.get("token_embd.weight")
        if isinstance(tokens, list) and table is not None and len(tokens) != table.shape[0]:
            message = f"its vocabulary has {len(tokens)} tokens, its embedding {table.shape[0]} rows"
            raise CheckpointError(message, where=str(self.path), remedy="tokenizer and weights must belong together")

    def key(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a required key. CheckpointError if it is missing or of another Python type."""
        if name not in self.keys:
            raise _wrong(self.path, f"key {name!r} is missing")
        found = self.keys[name]
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise _wrong(self.path, f"key {name!r} is {str(found)[:40]!r}, which is of the wrong kind")
        return found

    def rows(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, or of its rows [first, last): uint8 [N, bytes]. All dimensions but the last count as rows."""
        t = self.tensors[name]
        size = t.row_bytes
        found = np.empty(((t.nbytes // size if last is None else last) - first, size), np.uint8)
        with t.file.open("rb", buffering=0) as stream:
            stream.seek(t.offset + first * size)
            left = found.data.cast("B")
            while len(left) and (count := stream.readinto(left)):
                left = left[count:]
        if len(left):
            raise _wrong(t.file, f"tensor {name!r} is cut short")
        return found

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The bytes of a tensor, uint8 [bytes]."""
        return self.rows(name).reshape(-1)

    def read(self, name: str) -> Tensor:
        """A tensor's values, in its own float type, or dequantized to float32."""
        return self.read_rows(name).view(self.tensors[name].shape)

    def read_rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a tensor, [N, K], in its own float type, or dequantized to float32."""
        if self.tensors[name].type in FLOATS:
            return self.floats(name, first, last)
        return self.decode(name, self.rows(name, first, last))

    def floats(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a float tensor, [N, K], in its own type."""
        return torch.from_numpy(self.rows(name, first, last)).view(FLOATS[self.tensors[name].type])

    def decode(self, name: str, rows: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Dequantize rows of a tensor, as `rows` gives them, to float32 [N, K]."""
        t = self.tensors[name]
        out = np.empty((len(rows), t.shape[-1]), np.float32)
        step = max(1, WEIGHTS_AT_ONCE // t.shape[-1])
        for at in range(0, len(rows), step):
            out[at : at + step] = decoded(rows[at : at + step], t.type, name)
        return torch.from_numpy(out)


def type_named(name: str) -> Kind:
    """The ggml type of this name, such as "Q4_K"; KeyError if there is none."""
    return Types.__members__.get(name) or Newer[name]


def _type_numbered(number: int) -> Kind:
    """The ggml type of this number; ValueError if there is none."""
    return Newer(number) if number in Newer.__members__.values() else Types(number)


def decoded(rows: np.ndarray[Any, Any], kind: Kind, name: str) -> np.ndarray[Any, Any]:
    """Dequantize rows of blocks [N, bytes] to [N, K] float32. CheckpointError for a type unknown to the gguf package."""
    if kind in OWN:  # the gguf package has no dequantizer of it
        return OWN[kind](rows)
    try:
        return dequantize(rows, Types(kind))
    except NotImplementedError as error:
        raise CheckpointError(f"blocks of type {kind.name} cannot be decoded", where=name) from error


def _signs(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Dequantize Q1_0: an f16 scale d for 128 weights, then one bit for each: 1 is d, 0 is −d (dequantize_row_q1_0)."""
    blocks = rows.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits, d, -d).reshape(len(rows), -1)


def _two_bits(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Dequantize Q2_0: an f16 scale d for 64 weights, then two bits for each: -d, 0, d or 2 d (dequantize_row_q2_0)."""
    blocks = rows.reshape(-1, 18)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(len(blocks), -1)
    return ((codes.astype(np.float32) - 1) * d).reshape(len(rows), -1)


OWN: dict[Kind, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {Types.Q1_0: _signs, Newer.Q2_0: _two_bits}


def carried_keys(file: GgufFile, file_type: int | None) -> dict[str, Any]:
    """The keys of a requantized file: those of the original, with the new file_type, without those of splitting."""
    kept = {n: Typed(v, *file.kinds[n]) for n, v in file.keys.items() if not n.startswith("split.")}
    kept.pop("general.file_type", None)
    changed = {"general.architecture": file.keys["general.architecture"], "general.quantization_version": 2}
    return {**kept, **changed, **({} if file_type is None else {"general.file_type": file_type})}


def _wrong(path: Path, message: str) -> CheckpointError:
    return CheckpointError(message, where=str(path), remedy="the file is damaged or not a GGUF file: get a good copy")


def _other_parts(path: Path, parts: int) -> Iterator[Path]:
    """The second and further parts of a split model. CheckpointError if `path` is not the first, or a part is missing."""
    found = PART.search(path.name)
    if found is None or int(found[2]) != parts or int(found[1]) != 1:
        remedy = "give the first part, NAME-00001-of-0000N.gguf, beside the others"
        raise CheckpointError(f"one of {parts} parts of a split model", where=str(path), remedy=remedy)
    for number in range(2, parts + 1):
        part = path.with_name(f"{path.name[: found.start()]}-{number:05d}-of-{parts:05d}.gguf")
        if not part.is_file():
            remedy = "put all parts in one directory"
            raise CheckpointError("this part of a split model is missing", where=str(part), remedy=remedy)
        yield part


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
            raise _wrong(self.path, f"{n:,} bytes are announced at byte {self.at:,}, the file ends after {self.left:,}")
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
        return _wrong(self.path, f"{n:,} entries are announced at byte {self.at:,}, the file has no room for them")

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
            raise _wrong(self.path, f"a value of type {kind} at byte {self.at:,}, in arrays {depth} deep")
        inner = self.inner = int(self.number("<I"))
        if inner in SCALARS:
            each = np.dtype(SCALARS[inner])
            return np.frombuffer(self.take(self.count(each.itemsize) * each.itemsize), each)
        if inner == STRING:
            return self.texts(self.count(8))
        return [self.value(inner, depth + 1) for _ in range(self.count(12))]


def _entries(arrays: Mapping[str, Stored]) -> dict[str, Stored]:
    """The parameters that are entries of arrays, where the arrays have such keys."""
    return {
        f"blk.{i}.{name}": replace(array, offset=array.offset + 4 * i, nbytes=4, shape=(1,))
        for name, array in arrays.items()
        if name in ENTRIES
        for i in range(array.shape[0])
    }


def _read(
    path: Path, kinds: dict[str, tuple[int, int | None]], arrays: dict[str, Stored]
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Keys and tensors of one file; `kinds` is filled with the keys' types, `arrays` with where arrays of float32 lie."""
    try:
        with path.open("rb") as stream:
            return _read_header(_Cursor(stream, path), kinds, arrays)
    except OSError as error:
        raise CheckpointError(f"cannot read it: {error.strerror}", where=str(path)) from error


def _read_header(
    cursor: _Cursor, kinds: dict[str, tuple[int, int | None]], arrays: dict[str, Stored]
) -> tuple[dict[str, Any], dict[str, Stored]]:
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise _wrong(path, "no GGUF file: its first four bytes are not 'GGUF'")
    version = cursor.number("<I")
    if int.from_bytes(int(version).to_bytes(4, "little"), "big") in VERSIONS:
        remedy = "convert it: gguf_convert_endian.py of the gguf package makes a little-endian one"
        raise CheckpointError("a big-endian file, and only little-endian ones are read", where=str(path), remedy=remedy)
    if version not in VERSIONS:
        raise _wrong(path, f"version {version} of GGUF, and only {VERSIONS} (little-endian) are read here")
    tensors, pairs = cursor.count(24), cursor.count(13)
    keys: dict[str, Any] = {}
    for _ in range(pairs):
        name = cursor.text()
        if name in keys:
            raise _wrong(path, f"key {name!r} twice")
        kind = int(cursor.number("<I"))
        keys[name], kinds[name] = cursor.value(kind), (kind, cursor.inner if kind == ARRAY else None)
        if kinds[name] == (ARRAY, FLOAT32):
            size = keys[name].nbytes
            arrays[name] = Stored(path, cursor.at - size, size, Types.F32, keys[name].shape)
    found = [_tensor(cursor) for _ in range(tensors)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise _wrong(path, f"an alignment of {alignment}")
    return keys, _placed(found, cursor.at + -cursor.at % alignment, alignment, cursor)


def _tensor(cursor: _Cursor) -> tuple[str, Stored]:
    """Read one entry of the table of tensors; its offset is still relative to the data section."""
    name, axes = cursor.text(), int(cursor.number("<I"))
    if not 0 < axes <= MOST_AXES:
        raise _wrong(cursor.path, f"tensor {name!r} has {axes} axes")
    shape = tuple(reversed(struct.unpack(f"<{axes}Q", cursor.take(8 * axes))))
    kind, offset = int(cursor.number("<I")), int(cursor.number("<Q"))
    try:
        type_ = _type_numbered(kind)
        block, size = SIZES[type_]
    except (ValueError, KeyError) as error:
        raise _wrong(cursor.path, f"tensor {name!r} is of an unknown type, {kind}") from error
    if prod(shape) == 0 or shape[-1] % block:
        raise _wrong(cursor.path, f"tensor {name!r} of shape {shape} does not fill whole blocks of {block}")
    return name, Stored(cursor.path, offset, prod(shape) // block * size, type_, shape)


def _placed(found: list[tuple[str, Stored]], start: int, alignment: int, cursor: _Cursor) -> dict[str, Stored]:
    """Tensors with absolute offsets. CheckpointError if any overlap, are not aligned, or end outside the file."""
    placed: dict[str, Stored] = {}
    end, before = start, ""
    for name, t in sorted(found, key=lambda item: item[1].offset):
        at = start + t.offset
        if name in placed:
            raise _wrong(cursor.path, f"tensor {name!r} twice")
        if t.offset % alignment or at < end:
            raise _wrong(
                cursor.path, f"tensor {name!r} at byte {at:,} is misplaced" + (f" or in {before!r}" if before else "")
            )
        if at + t.nbytes > cursor.size:
            raise _wrong(cursor.path, f"tensor {name!r} ends at byte {at + t.nbytes:,}, the file at {cursor.size:,}")
        placed[name] = Stored(t.file, at, t.nbytes, t.type, t.shape)
        end, before = at + t.nbytes, name
    return placed
