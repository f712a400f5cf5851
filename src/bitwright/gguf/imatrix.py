"""llama.cpp's importance matrices (imatrix): for each matrix the mean squared input of each column, the diagonal of XᵀX / T.

llama-imatrix leaves out a tensor of experts if one of them saw no token: then the columns of all of them count evenly.
Read as GGUF (NAME.in_sum2 [E, K], sums of squares, and NAME.counts [E, 1], tokens, of E experts, or one) and in the older
binary form (.dat). Written as GGUF. An expert that saw no token has only zeros; `evenly` then weights its columns equally.
Source: tools/imatrix/imatrix.cpp.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from bitwright.errors import CalibrationError, CheckpointError
from bitwright.files.checkpoint import disk_errors
from bitwright.files.model_path import MAGIC, is_gguf
from bitwright.gguf.reader import GgufFile

SUFFIXES = (".gguf", ".dat", ".imatrix")
SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST_NAME = 1 << 10
UNSEEN = "it saw no token: all columns count evenly"  # of one expert
LEFT_OUT = "the importance matrix has nothing for it: all columns count evenly"  # of all experts of a layer


class Seen(NamedTuple):
    """Mean squared inputs [K] of a matrix, or of one expert, and how many tokens it saw."""

    mean: Tensor
    tokens: int


def is_imatrix(calib: str) -> bool:
    """Whether a calibration file is an importance matrix, not a text: by its suffix, or GGUF's first bytes."""
    path = Path(calib)
    return path.suffix.lower() in SUFFIXES or (path.is_file() and is_gguf(path))


def read(path: Path) -> dict[str, Tensor]:
    """Read an importance matrix: llama.cpp's tensor name -> [K], or [E, K] of experts (older files: [E · K]), float32.

    CalibrationError for a file that cannot be read or parsed, or has values that are negative or not finite.
    """
    try:
        with path.open("rb") as stream:
            new = stream.read(4) == MAGIC
        found = _read_gguf(path) if new else _read_old(path.read_bytes(), path)
    except OSError as error:
        raise CalibrationError(f"cannot read it: {error.strerror}", where=str(path)) from error
    except CheckpointError as error:
        raise CalibrationError(error.message, where=str(path), remedy=error.remedy) from error
    for name, values in found.items():
        if not bool(torch.isfinite(values).all()) or float(values.min()) < 0:
            raise _wrong(path, f"the importance of {name!r} is not finite, or below 0")
    if not found:
        raise _wrong(path, "no importance of any tensor")
    return found


def _wrong(path: Path, message: str) -> CalibrationError:
    return CalibrationError(message, where=str(path), remedy="make it anew with llama-imatrix, or give a text")


def _read_gguf(path: Path) -> dict[str, Tensor]:
    file, found = GgufFile(path), {}
    for name in file.tensors:
        if not name.endswith(SUMS):
            continue
        owner = name.removesuffix(SUMS)
        if owner + COUNTS not in file.tensors:
            raise _wrong(path, f"sums of {owner!r} without counts")
        sums, counts = file.read(name).float(), file.read(owner + COUNTS).float().reshape(-1, 1)
        experts = sums.shape[:-1].numel()
        if len(counts) not in (1, experts):
            raise _wrong(path, f"{owner!r} has sums of {experts} experts and counts of {len(counts)}")
        means = sums.reshape(experts, -1) / counts.clamp(min=1)
        found[owner] = means if experts > 1 else means[0]
    return found


def _read_old(content: bytes, path: Path) -> dict[str, Tensor]:
    """The older form: the number of entries, then of each its name, the number of calls, and mean squares times calls."""
    at, found = 0, {}

    def number() -> int:
        nonlocal at
        if at + 4 > len(content):
            raise _wrong(path, "cut short, or not an importance matrix")
        at += 4
        return int(struct.unpack_from("<i", content, at - 4)[0])

    for _ in range(number()):
        length = number()
        if not 0 < length <= LONGEST_NAME:
            raise _wrong(path, f"a name of {length} bytes: not an importance matrix")
        name, at = content[at : at + length].decode("utf-8", errors="replace"), at + length
        calls, count = number(), number()
        if count <= 0 or 4 * count > len(content) - at:
            raise _wrong(path, f"{count} numbers announced for {name!r}, which the file does not hold")
        values = np.frombuffer(content, "<f4", count, at).copy()
        at += 4 * count
        found[name] = torch.from_numpy(values) / max(calls, 1)
    return found


def experts_of(values: Tensor, K: int, rows: int) -> Tensor | None:
    """The importance [E, K] of the columns of each expert, for a matrix [rows, K] of all experts stacked; None if the number
    of values does not fit."""
    fits = values.numel() % K == 0 and rows % max(1, values.numel() // K) == 0
    return values.reshape(-1, K) if fits and values.numel() else None


def unseen(values: Tensor) -> int:
    """The number of experts, of importance [E, K], that saw no token."""
    return int((values == 0).all(-1).sum())


def evenly(values: Tensor) -> Tensor:
    """An expert's importance [K], or ones if it saw no token."""
    return values if bool(values.any()) else torch.ones_like(values)


def write(path: Path, importance: Mapping[str, list[Seen]], *, chunks: int, seqlen: int, text: str) -> None:
    """Write an importance matrix as GGUF.

    importance: llama.cpp's tensor name -> one `Seen`, or those of all experts. An expert's mean is written as of one token at
    least: without tokens of its own it is that of the layer (calibration/observe_experts.py). chunks, seqlen: windows of the
    calibration, and tokens in one; text: its name.
    """
    with disk_errors(path):
        writer = gguf.GGUFWriter(path, "")
        writer.kv_data[0].pop("general.architecture", None)  # the gguf package adds it; an imatrix has none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [text])
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", seqlen)
        for name, values in sorted(importance.items()):
            counts = torch.tensor([[max(1, one.tokens)] for one in values], dtype=torch.float32)
            means = torch.stack([one.mean.float() for one in values])
            writer.add_tensor(name + SUMS, (means * counts).numpy())
            writer.add_tensor(name + COUNTS, counts.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def of_another_model(file: Path, name: str, found: Tensor | None, K: int) -> CalibrationError:
    """The error for an importance matrix that has another number of columns for a matrix [N, K], or none at all. K: those of
    all experts together."""
    size = "nothing" if found is None else f"{found.numel()} columns"
    remedy = "give an importance matrix of this very model"
    return CalibrationError(f"it has {size} for {name}, not {K} columns", where=str(file), remedy=remedy)
