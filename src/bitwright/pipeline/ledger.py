"""What happened to every tensor of the source: the record that makes silence impossible."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean

from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class Entry:
    """One tensor.

    loss, loss_rtn, loss_search      relative output energies of the error: of what was taken, and, by a sample of the rows,
                                     of round to nearest and of a search of scales. A method that aims at the float model's
                                     outputs changes a matrix to make up for the blocks before: judge it by block_error
    block_error, block_error_search  relative error of its block's output on held-out windows: by the methods asked for, and
                                     by a search of scales
    statistics    whether its inputs were those of the float model ("one-shot") or came from the quantized blocks before
                  ("sequential"); arithmetic: the type that they were computed in, on which the last digits depend
    bytes         what the file holds of it
    activations   the scheme that the engine rounds its inputs to; transforms: what was done to it before rounding
    outliers      how many of its input channels stay in float
    source        how the source has it quantized, which is decoded first; "": it is float there
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    reason: str = ""
    scheme: str = ""
    method: str = ""
    loss: float | None = None
    loss_rtn: float | None = None
    damping: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    fallback: str = ""
    bytes: int = 0
    activations: str = ""
    transforms: str = ""
    statistics: str = ""
    outliers: int = 0
    loss_search: float | None = None
    block_error: float | None = None
    block_error_search: float | None = None
    arithmetic: str = ""
    source: str = ""


@dataclass(frozen=True)
class Lost:
    """What a part lost, and what a plainer method would have lost of it."""

    name: str
    error: float
    plainer: float


def block_errors(entries: Iterable[Entry]) -> list[Lost]:
    """The error of each block's output on held-out windows beside that of a search of scales, for blocks where it was taken.

    What a method is to be judged by: one that aims at the float model's outputs changes single matrices further than rounding
    to nearest does, to make up for the blocks before.
    """
    found = {
        _block_of(e.name): (e.block_error, e.block_error_search)
        for e in entries
        if e.block_error is not None and e.block_error_search is not None
    }
    return [Lost(name, error, plainer) for name, (error, plainer) in found.items()]


def matrix_losses(entries: Iterable[Entry]) -> list[Lost]:
    """The loss of each matrix beside round to nearest's, where both are known."""
    return [Lost(e.name, e.loss, e.loss_rtn) for e in entries if e.loss is not None and e.loss_rtn is not None]


def judged(entries: Sequence[Entry]) -> tuple[list[Lost], bool]:
    """What a run is judged by: blocks, and True, where their outputs were compared; else matrices."""
    blocks = block_errors(entries)
    return (blocks, True) if blocks else (matrix_losses(entries), False)


def largest(lost: Iterable[Lost], most: int) -> list[Lost]:
    """The parts that lost most, the first by name where they are alike."""
    return sorted(lost, key=lambda one: (-one.error, one.name))[:most]


def _block_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.3"""
    parts = name.split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else name


def outcome(entries: Sequence[Entry]) -> str:
    """What a block lost, as a step's progress tells it: its output's error, or its matrices' mean loss, if either is known."""
    lost, of_blocks = judged(entries)
    if not lost:
        return ""
    what, plainer = ("output error", "search") if of_blocks else ("loss", "RTN")
    return f", {what} {mean(one.error for one in lost):.5f} ({plainer} {mean(one.plainer for one in lost):.5f})"


def to_jsonl(entries: Iterable[Entry]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)


def from_jsonl(file: Path) -> list[Entry]:
    """Undoes `to_jsonl`."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Entry(**{**json.loads(line), "shape": tuple(json.loads(line)["shape"])}) for line in lines]


def check_complete(entries: list[Entry], source: Iterable[str]) -> None:
    """Every tensor of the source has exactly one entry, or BitwrightError names the first that has not."""
    names = [entry.name for entry in entries]
    seen = set(names)
    for name in source:
        if name not in seen:
            raise BitwrightError("neither quantized nor kept on purpose", where=name)
    if len(names) != len(seen):
        twice = next(name for name in names if names.count(name) > 1)
        raise BitwrightError("recorded twice", where=twice)
