"""Safetensors checkpoints: an index of a directory's tensors, lazy reads, atomic writes.

Tensors are read with plain file reads, not memory maps: mapped pages count as this process's memory, and a checkpoint
larger than memory must stay on the disk. Headers are checked against the file's size before they are used.
"""

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, OutputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NOT_READ = (
    "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "C64", "C128", "U16", "U32", "U64",
)  # fmt: skip  # types of the format, or of newer versions of it, that are not read here
Spec = tuple[torch.dtype, tuple[int, ...]]  # of a tensor yet to be written: type and shape
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # the format's own limit
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored: file, offset of its first byte, type and shape.

    stored, take: of a part of a larger tensor, the shape of what is read, and the function that takes this one from it.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: tuple[int, ...] | None = None
    take: Callable[[Tensor], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.dtype.itemsize * count(self.shape)


def count(shape: tuple[int, ...]) -> int:
    """How many values a tensor of this shape holds."""
    total = 1
    for extent in shape:
        total *= extent
    return total


class Checkpoint:
    """The tensors of a directory of safetensors files, by name."""

    def __init__(self, folder: Path, *, only: Path | None = None) -> None:
        """Read the headers, of all files that belong together or of `only` one.

        Raises CheckpointError for a missing directory, a damaged index or file, and a tensor missing or stored twice.
        """
        self.folder = folder
        if not folder.is_dir():
            remedy = "give a directory with config.json and model.safetensors"
            raise CheckpointError("no such directory", where=str(folder), remedy=remedy)
        self.tensors: dict[str, TensorInfo] = {}
        for file, wanted in sorted(({only: []} if only else weight_files(folder)).items()):
            found = read_header(file)
            for name in wanted or found:
                if name not in found:
                    message = f"the index promises tensor {name!r}, the file lacks it"
                    raise CheckpointError(message, where=str(file), remedy="download the file and its index again")
                if name in self.tensors:
                    message = f"tensor {name!r} is also in {self.tensors[name].file.name}"
                    raise CheckpointError(message, where=str(file), remedy="download the index again")
                self.tensors[name] = found[name]
        if not self.tensors:
            raise CheckpointError("the checkpoint holds no tensors", where=str(folder), remedy="download it again")

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own. CheckpointError if the file is shorter than its header says."""
        info = self.tensors[name]
        stored = info.shape if info.stored is None else info.stored
        data = bytearray(info.dtype.itemsize * count(stored))
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            view, got = memoryview(data), 0
            while got < len(data) and (more := stream.readinto(view[got:])):
                got += more
        if got < len(data):
            raise CheckpointError(
                f"tensor {name!r} is cut short: {got} of {len(data)} bytes",
                where=str(info.file),
                remedy="download the file again",
            )
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        whole = torch.frombuffer(data, dtype=info.dtype).reshape(stored)
        return whole if info.take is None else info.take(whole)

    def fingerprint(self) -> list[list[str | int]]:
        """Each file's name, size and time of change: different as soon as the weights are."""
        files = sorted({info.file for info in self.tensors.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """Each weight file of a directory and the tensors that the index lists for it; an empty list: all that the file holds.

    CheckpointError if there is none, or a shard or the index is missing or damaged.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files: dict[Path, list[str]] = {}
            for name, file in promised.items():
                if Path(file).name != file:
                    message = f"the index points outside its directory: {file!r}"
                    raise CheckpointError(
                        message, where=str(index), remedy="download the index from a source you trust"
                    )
                files.setdefault(folder / file, []).append(name)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = "download the index again"
            raise CheckpointError(f"not a weight index: {error}", where=str(index), remedy=remedy) from error
        for file in files:
            if not file.is_file():
                raise CheckpointError("a shard is missing", where=str(file), remedy="download it, or repair the index")
        return files
    if single.is_file():
        return {single: []}
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: []}
    if others:
        remedy = f"download {INDEX} too"
        raise CheckpointError(f"{len(others)} safetensors files but no {INDEX}", where=str(folder), remedy=remedy)
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(
            "only pickled weights here; unpickling can run code, so they are never opened",
            where=str(folder),
            remedy="convert them to safetensors with the tool that made them",
        )
    raise CheckpointError(
        "no safetensors file here", where=str(folder), remedy="give a directory with model.safetensors"
    )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by its header, checked against the file's size and for overlaps."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(
                "not a safetensors file, or cut short in its header", where=str(file), remedy="download it again"
            )
        text = stream.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _entry(file, 8 + length, name, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"damaged safetensors header: {error}", where=str(file), remedy="download it again"
        ) from error
    end = 8 + length
    for name, info in sorted(found.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise CheckpointError(f"tensor {name!r} overlaps another", where=str(file), remedy="download it again")
        end = info.offset + info.nbytes
    if end > size:
        raise CheckpointError(
            f"the file has {size} bytes, its header needs {end}", where=str(file), remedy="download it again"
        )
    return found


def _entry(file: Path, base: int, name: str, entry: dict[str, object]) -> TensorInfo:
    """One header entry; ValueError or KeyError where it contradicts itself."""
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    if code in NOT_READ:
        remedy = "save the weights as bfloat16, float16 or float32"
        raise CheckpointError(
            f"tensor {name!r} is of type {code}, which is not read here", where=str(file), remedy=remedy
        )
    if code not in DTYPES:
        raise ValueError(f"tensor {name!r} has unknown type {code!r}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no shape or offsets")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)):
        raise ValueError(f"tensor {name!r} has a shape or offset that is not a count")
    info = TensorInfo(file, base + offsets[0], DTYPES[str(code)], tuple(shape))
    if info.nbytes != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name!r} of shape {shape} does not fill bytes {offsets[0]} to {offsets[1]}")
    return info


def _by_width(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Tensors in the order of their data: widest type first, for alignment; otherwise in the given order."""
    return dict(sorted(specs.items(), key=lambda item: -item[1][0].itemsize))


def _header(specs: Mapping[str, Spec]) -> bytes:
    """Length and header of a safetensors file whose tensors follow one another in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in specs.items():
        end = at + dtype.itemsize * count(shape)
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def spec_bytes(specs: Mapping[str, Spec]) -> int:
    """Bytes of data of tensors of these types and shapes."""
    return sum(dtype.itemsize * count(shape) for dtype, shape in specs.values())


def file_bytes(specs: Mapping[str, Spec]) -> int:
    """The exact size of the file that `begin_file` makes for these tensors, and `write_shard` if they are sorted by name."""
    return len(_header(_by_width(specs))) + spec_bytes(specs)


def begin_file(file: Path, specs: Mapping[str, Spec]) -> None:
    """Make a sparse safetensors file: header and full size, no data yet, so that it takes no room on the disk."""
    header = _header(_by_width(specs))
    with _replacing(file) as stream:
        stream.write(header)
        stream.truncate(len(header) + spec_bytes(specs))


def write_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically, one tensor after the other: no copy of all of them in memory."""
    specs = _by_width({name: (t.dtype, tuple(t.shape)) for name, t in sorted(tensors.items())})
    with _replacing(file) as stream:
        stream.write(_header(specs))
        for name in specs:
            stream.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes: also where they are NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


def write_file(file: Path, data: bytes) -> None:
    """Write a file atomically: it exists complete or not at all."""
    with _replacing(file) as stream:
        stream.write(data)


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Write another file beside, flush it to the disk, rename it: a crash leaves the old file or the new one."""
    beside = file.with_name(file.name + ".tmp")
    with disk_errors(file):
        try:
            with beside.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a directory's names to the disk (fsync), where the file system can do that."""
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that cannot
                raise
        finally:
            os.close(descriptor)


def check_folder_of(file: Path, what: str) -> None:
    """OutputError if the directory that a file or folder is to be put in does not exist. what: it is called so."""
    parent = file.absolute().parent
    if not parent.is_dir():
        message = f"the directory to put {what} in does not exist"
        raise OutputError(message, where=str(parent), remedy=f"mkdir -p {parent}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn OSError (a full disk, no permission) into OutputError with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space and run the same command again: it goes on where it stopped"
            raise OutputError("the disk is full", where=str(path), remedy=remedy) from error
        remedy = "name a place that you may write to"
        raise OutputError(f"cannot write: {error.strerror or error}", where=str(path), remedy=remedy) from error
