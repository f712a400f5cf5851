"""What happened to every tensor of the source: the record that makes silence impossible."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from bitwright.errors import BitwrightError


@dataclass(frozen=True)
class Entry:
    """One tensor.

    loss, loss_rtn, loss_search      relative output energies: of what was taken, and, by a sample of the rows, of round to
                                     nearest and of a search of scales
    block_error, block_error_search  relative error of its block's output on held-out windows: by the methods asked for, and
                                     by a search of scales
    statistics    whether its inputs were those of the float model ("one-shot") or came from the quantized blocks before
                  ("sequential"); arithmetic: the type that they were computed in, on which the last digits depend
    bytes         what the file holds of it
    activations   the scheme that the engine rounds its inputs to; transforms: what was done to it before rounding
    outliers      how many of its input channels stay in float
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


def losses(entries: Iterable[Entry]) -> str:
    """The mean loss of quantized tensors beside round to nearest's, as a step's progress tells it; "" if none was measured."""
    known = [(e.loss, e.loss_rtn) for e in entries if e.loss is not None and e.loss_rtn is not None]
    if not known:
        return ""
    mean, rtn = (sum(column) / len(known) for column in zip(*known, strict=True))
    return f", loss {mean:.5f} (RTN {rtn:.5f})"


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
