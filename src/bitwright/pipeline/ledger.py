"""The ledger: one entry for every tensor of the source, what was done with it and what that cost."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean

from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class Entry:
    """The record of one tensor.

    loss, loss_rtn, loss_search      relative output energy of the error (see numerics/loss.py): of what was taken; on a sample
                                     of the rows, of RTN and of a search of scales. A method whose target is the float
                                     model's output also corrects the blocks before: judge it by block_error
    block_error, block_error_search  relative error of its block's output on held-out windows: of what was taken, and by a
                                     search of scales; equal where that replaced the methods asked for, which fallback says
    statistics    inputs of the float model ("one-shot") or from the quantized blocks before ("sequential"); arithmetic: the
                  type of activations, on which the last digits depend
    bytes         its size in the file
    activations   the scheme that the engine rounds its inputs to; transforms: what was done to it before rounding
    tokens        that its inputs were observed of; borrowed: beside its own, of an expert that the router sends few, those that
                  stand for all tokens of its layer
    outliers      how many of its input channels stay in float
    source        how the source has it quantized, which is decoded first; "": it is float there
    sparsity      share of its weights that were pruned, and are zero; pruning: by what, such as "wanda:0.5". Losses are
                  relative to the weights before, also those of RTN and of a search, which keep the same zeros
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
    borrowed: int = 0
    source: str = ""
    sparsity: float = 0.0
    pruning: str = ""


@dataclass(frozen=True)
class Lost:
    """The error of a block or matrix, and that of a plainer method."""

    name: str
    error: float
    plainer: float


def block_errors(entries: Iterable[Entry]) -> list[Lost]:
    """Each block's output error on held-out windows beside that of a search of scales, where both were measured.

    This judges all methods: those whose target is the float model's output may change a single matrix more than RTN does, to
    correct the blocks before.
    """
    found = {
        _block_of(e.name): (e.block_error, e.block_error_search)
        for e in entries
        if e.block_error is not None and e.block_error_search is not None
    }
    return [Lost(name, error, plainer) for name, (error, plainer) in found.items()]


def matrix_losses(entries: Iterable[Entry]) -> list[Lost]:
    """The loss of each matrix beside RTN's, where both are known."""
    return [Lost(e.name, e.loss, e.loss_rtn) for e in entries if e.loss is not None and e.loss_rtn is not None]


def judged(entries: Sequence[Entry]) -> tuple[list[Lost], bool]:
    """What a run is judged by: the errors of blocks, and True, if they were measured; else the losses of matrices."""
    blocks = block_errors(entries)
    return (blocks, True) if blocks else (matrix_losses(entries), False)


def largest(lost: Iterable[Lost], most: int) -> list[Lost]:
    """The `most` largest errors; equal ones by name."""
    return sorted(lost, key=lambda one: (-one.error, one.name))[:most]


def _block_of(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> model.layers.3"""
    parts = name.split(".")
    numbered = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else name


def outcome(entries: Sequence[Entry]) -> str:
    """A block's result for a line of progress: its output's error, or else its matrices' mean loss; "" if neither is known."""
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
    """BitwrightError unless every tensor of the source has exactly one entry."""
    names = [entry.name for entry in entries]
    seen = set(names)
    for name in source:
        if name not in seen:
            remedy = "this is a defect of bitwright: please report it with the model's name"
            raise BitwrightError("neither quantized nor kept on purpose", where=name, remedy=remedy)
    if len(names) != len(seen):
        twice = next(name for name in names if names.count(name) > 1)
        remedy = "this is a defect of bitwright: please report it with the model's name"
        raise BitwrightError("recorded twice", where=twice, remedy=remedy)
