"""A store of the float model's statistics on disk: taken once, used by every method that needs no others ("one-shot").

store.json                  the key: hashes of model, tokens, tokenizer and code
block-00003.safetensors     the statistics of each input in block 3
block-00003.json            the modules that read those inputs, and the block's folds; its existence commits both
hidden-00004.safetensors    inputs of block 4, while statistics are being taken
reference-…                 the float model's predictions on a text (see evaluation/reference.py)

Statistics of another model, text, tokenizer or code are never used: they are taken again, and `notes` says so.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.ranges import Histogram
from bitwright.errors import CheckpointError, OutputError
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file, write_shard
from bitwright.transforms.folds import Fold

DAMAGED = "remove this directory, or name another, and the statistics are taken anew"
KV = ("keys", "values")
OTHERS = ("reference-", "rotated-")  # beginnings of other names that may be in a store's directory
COUNTS = ("names", "tokens", "borrowed")  # the fields of Inputs that are no tensors
TENSORS = ("gram", "mean", "low", "high", "sample")


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics of one block: its inputs, in the order of the forward, its folds, and histograms of its keys and values."""

    inputs: list[Inputs]
    folds: list[Fold]
    kv: tuple[Histogram, Histogram] | None = None


def code_version() -> str:
    """A hash of the package's source code: statistics from other code are taken again."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()


class Store:
    """A directory of statistics that belong to one key."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        """Open or make the store. Statistics with another key are discarded, and `notes` says so.

        OutputError for a directory with other files in it; CheckpointError for a damaged store.
        """
        self.folder, self.notes = folder, tuple[str, ...]()
        note = folder / "store.json"
        if folder.exists() and not folder.is_dir():
            raise OutputError("not a directory", where=str(folder), remedy="give --store another directory")
        if (
            folder.is_dir()
            and not note.is_file()
            and any(not file.name.startswith(OTHERS) for file in folder.iterdir())
        ):
            raise OutputError(
                "a directory with other files in it", where=str(folder), remedy="give --store an empty or new one"
            )
        differing = differing_keys(note, key) if note.is_file() else ""
        if note.is_file() and not differing:
            return
        if differing:
            self.notes = (f"the statistics in {folder} were of another {differing}: taken again",)
            self._clear()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(note, json.dumps(key, indent=1).encode())

    def _clear(self) -> None:
        """Remove the files that this class and the evaluation have written, and no others."""
        for pattern in ("block-*.json", "block-*.safetensors", "hidden-*.safetensors", "reference-*"):
            for file in self.folder.glob(pattern):
                file.unlink()

    def has(self, index: int) -> bool:
        """Whether the store has the statistics of a block."""
        return self._file(index, "json").is_file()

    def _file(self, index: int, kind: str) -> Path:
        return self.folder / f"block-{index:05d}.{kind}"

    def write(self, index: int, statistics: BlockStatistics) -> None:
        """Write the statistics of a block, and remove its saved inputs."""
        tensors = {f"{i}.{n}": t for i, inputs in enumerate(statistics.inputs) for n, t in _tensors(inputs)}
        for name, histogram in zip(KV, statistics.kv or (), strict=False):
            tensors |= {f"{name}.{n}": t for n, t in histogram.state().items()}
        write_shard(self._file(index, "safetensors"), tensors)
        content = {
            "inputs": [{name: getattr(one, name) for name in COUNTS} for one in statistics.inputs],
            "folds": [asdict(fold) for fold in statistics.folds],
        }
        write_file(self._file(index, "json"), json.dumps(content, indent=1).encode())
        self._hidden(index).unlink(missing_ok=True)

    def _open(self, index: int) -> tuple[dict[str, Any], Checkpoint]:
        """Both files of a block, headers checked. CheckpointError names the one that is damaged or cut short."""
        file = self._file(index, "json")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not {"inputs", "folds"} <= content.keys():
                raise ValueError("it does not say what the statistics are of")
            return content, Checkpoint(self.folder, only=self._file(index, "safetensors"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"damaged statistics: {error}", where=str(file), remedy=DAMAGED) from error
        except CheckpointError as error:
            error.remedy = DAMAGED
            raise

    def read(self, index: int) -> BlockStatistics:
        """The statistics of a block. CheckpointError names a file that is damaged or cut short."""
        content, tensors = self._open(index)
        try:
            inputs = [_inputs(tensors, i, entry) for i, entry in enumerate(content["inputs"])]
            kv = [_histogram(tensors, name) for name in KV]
            folds = [Fold(**{**entry, "readers": tuple(entry["readers"])}) for entry in content["folds"]]
        except (ValueError, KeyError, TypeError) as error:
            where = str(self._file(index, "safetensors"))
            raise CheckpointError(f"damaged statistics: {error}", where=where, remedy=DAMAGED) from error
        return BlockStatistics(inputs, folds, (kv[0], kv[1]) if kv[0] is not None and kv[1] is not None else None)

    def check(self, depth: int) -> None:
        """CheckpointError if the statistics of any of the first `depth` blocks are damaged, before any work is done."""
        for index in range(depth):
            if self.has(index):
                self._open(index)

    def hidden(self, index: int) -> Tensor:
        """The saved inputs of block `index`, [S, T, H]."""
        return Checkpoint(self.folder, only=self._hidden(index)).read("hidden")

    def keep_hidden(self, index: int, hidden: Tensor) -> None:
        """Save the inputs of block `index`, until its statistics are written."""
        write_shard(self._hidden(index), {"hidden": hidden.cpu()})

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.safetensors"


def differing_keys(note: Path, key: dict[str, Any]) -> str:
    """Which parts of the key differ from the store's; "" if none."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"damaged statistics: {error}", where=str(note), remedy=DAMAGED) from error
    return ", ".join(name for name in key if found.get(name) != json.loads(json.dumps(key[name])))


def _tensors(inputs: Inputs) -> Iterator[tuple[str, Tensor]]:
    """The tensors of input i, by name."""
    for name in TENSORS:
        tensor = getattr(inputs, name)
        if tensor is not None:
            yield name, tensor.cpu()
    if inputs.histogram is not None:
        yield from ((f"histogram.{name}", tensor) for name, tensor in inputs.histogram.state().items())


def _inputs(tensors: Checkpoint, i: int, entry: dict[str, Any]) -> Inputs:
    """Input i of a file."""
    own = {name.removeprefix(f"{i}."): name for name in tensors.tensors if name.startswith(f"{i}.")}
    known = {f.name for f in fields(Inputs)} - {*COUNTS}
    plain: dict[str, Any] = {short: tensors.read(name) for short, name in own.items() if short in known}
    for name, tensor in plain.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} of {entry['names']} is not finite")
    found = Inputs(tuple(entry["names"]), entry["tokens"], borrowed=entry["borrowed"])
    return replace(found, histogram=_histogram(tensors, f"{i}.histogram"), **plain)


def _histogram(tensors: Checkpoint, name: str) -> Histogram | None:
    """The histogram whose tensors' names begin with `name`, if there is one."""
    start = f"{name}."
    state = {n.removeprefix(start): tensors.read(n) for n in tensors.tensors if n.startswith(start)}
    return Histogram.from_state(state) if state else None
