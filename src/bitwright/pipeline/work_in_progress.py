"""Work in progress: the directory OUT.partial, resumable block by block, and the rename that makes OUT appear.

manifest.json              source, recipe, calibration and code of this work: only the same work is resumed
hidden-00003.safetensors   inputs of block 3 in the quantized model; and in the float model, if a method needs them
shard-00002.safetensors    shard 2, read back and compared before it got this name; GGUF: all shards are in model.gguf
ledger-00002.jsonl         the ledger of shard 2; its existence means that the shard is complete
joined-00002.json          checksums of shard 2's tensors; its existence means that they are in out/ (see joining.py)
lock                       locked by the process that works here (files/lock.py)
out/                       what becomes OUT; all other files serve only to resume
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from bitwright.errors import OutputError, VerificationError
from bitwright.files.checkpoint import (
    PICKLES,
    Checkpoint,
    check_folder_of,
    disk_errors,
    same_bytes,
    sync_folder,
    write_file,
    write_shard,
)
from bitwright.files.lock import Lock
from bitwright.formats import Format
from bitwright.numerics.qtensor import QTensor
from bitwright.pipeline.ledger import Entry, from_jsonl, to_jsonl

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", *PICKLES, "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tmp")

AGAIN = "check the disk, then run the same command again"
OF_WEIGHTS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # how the source's were quantized
CARD, ORIGINAL = "README.md", "README.original.md"  # the model card; the source's own card


def check_out(out: Path) -> None:
    """OutputError if OUT exists, or the directory that it would be in does not."""
    if out.exists() or out.is_symlink():
        raise OutputError("OUT exists", where=str(out), remedy="give another name, or remove it first")
    check_folder_of(out, "OUT")


def unfinished_file(out: Path) -> Path:
    """Where an OUT that is written at once is written: OUT.partial, and nothing is there. OutputError for unfinished work."""
    file = out.with_name(out.name + ".partial")
    if file.is_dir():
        remedy = "finish it, remove it, or give OUT another name"
        raise OutputError("unfinished work of another command lies here", where=str(file), remedy=remedy)
    file.unlink(missing_ok=True)
    return file


def ledger_beside(out: Path) -> Path:
    """The ledger's file name beside an OUT that is a single file."""
    return out.with_name(f"{out.stem}.ledger.jsonl")


class WorkInProgress:
    """The directory OUT.partial: see the module's docstring."""

    def __init__(self, out: Path, manifest: dict[str, Any], *, needed: int, resume: bool) -> None:
        """Make the directory, or open it to resume the same work.

        needed: bytes that the work will take on the disk; resume: False: remove what is there. OutputError if OUT exists,
        another process works here, the directory holds other work, or the disk is too full.
        """
        check_out(out)
        self.out, self.path = out, out.with_name(out.name + ".partial")
        self.result = self.path / "out"
        note, text = self.path / "manifest.json", json.dumps(manifest, indent=1)
        self._lock = Lock(self.path)
        if self.path.exists():
            self._lock.take()
            if self._handed_over or not resume:
                self._remove()
        if note.is_file() and note.read_text(encoding="utf-8") != text:
            raise OutputError(
                "unfinished work with another source, recipe or calibration lies here",
                where=str(self.path),
                remedy="finish it with the same arguments, or start afresh with --restart",
            )
        written = [file for pattern in ("model*", "shard-*", "out/model*") for file in self.path.glob(pattern)]
        missing = needed - sum(512 * file.stat().st_blocks for file in written)
        free = shutil.disk_usage(out.absolute().parent).free
        if missing > free:
            message = f"OUT needs {missing:,} bytes more, the disk has {free:,} free"
            raise OutputError(message, where=str(out), remedy="free some space, or quantize to fewer bits")
        with disk_errors(self.path):
            self.path.mkdir(exist_ok=True)
        self._lock.take()
        write_file(note, text.encode())

    @property
    def _handed_over(self) -> bool:
        """Whether OUT had already appeared before a crash: shards are noted here, but no weights are left."""
        weights = [self.result.is_dir(), (self.path / "model.gguf").exists(), *self.path.glob("shard-*")]
        return self._ledger(0).is_file() and not any(weights)

    def shard(self, index: int) -> Path:
        """The file of one shard: a block, or what is outside the blocks."""
        return self.path / f"shard-{index:05d}.safetensors"

    def joined(self, index: int) -> Path:
        """The record that a shard is joined into OUT's weight files."""
        return self.path / f"joined-{index:05d}.json"

    def _ledger(self, index: int) -> Path:
        return self.path / f"ledger-{index:05d}.jsonl"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:05d}.safetensors"

    def noted(self, count: int) -> int:
        """How many of `count` shards, in order, are complete."""
        there = [self._ledger(index).is_file() for index in range(count)]
        return there.index(False) if False in there else count

    def note(self, index: int, entries: list[Entry]) -> None:
        """Commit a shard that is on the disk and verified, by writing its ledger."""
        write_file(self._ledger(index), to_jsonl(entries).encode())

    def ledger(self, index: int) -> list[Entry]:
        """The ledger of a shard that is complete."""
        return from_jsonl(self._ledger(index))

    def hidden(self, index: int) -> dict[str, Tensor]:
        """The saved inputs of block `index` by name, [S, T, H] each."""
        saved = Checkpoint(self.path, only=self._hidden(index))
        return {name: saved.read(name) for name in saved.tensors}

    def commit(
        self, index: int, put: Callable[[], None], entries: list[Entry], hidden: dict[str, Tensor] | None
    ) -> None:
        """Write and verify a shard by calling `put`, and only then commit it. hidden: inputs of the next block, saved first."""
        if hidden is not None:
            write_shard(self._hidden(index + 1), hidden)
        put()
        self.note(index, entries)
        self._hidden(index).unlink(missing_ok=True)

    def put_shard(self, index: int, tensors: dict[str, Tensor], verify: "Verification") -> None:
        """Write a shard under another name, read it back, compare, and only then rename it."""
        unverified = self.path / "unverified.safetensors"
        write_shard(unverified, tensors)
        verify.check(Checkpoint(self.path, only=unverified))
        with disk_errors(unverified):
            unverified.replace(self.shard(index))

    def write_text(self, name: str, content: str) -> None:
        """Write one of OUT's files."""
        write_file(self.result / name, content.encode())

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one of OUT's JSON files."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def finish(self, source: Path, ledger: list[Entry]) -> None:
        """Add the ledger and the source directory's other files, make OUT appear, and remove the rest."""
        write_file(self.result / "ledger.jsonl", to_jsonl(ledger).encode())
        if source.is_dir():
            copy_companions(source, self.result)
        sync_folder(self.result)
        with disk_errors(self.out):
            self.result.rename(self.out)
            sync_folder(self.out.absolute().parent)
            self._remove()

    def finish_file(self, file: Path, ledger: list[Entry]) -> None:
        """Make OUT appear as one file, its ledger beside it, and remove the rest."""
        write_file(ledger_beside(self.out), to_jsonl(ledger).encode())
        with disk_errors(self.out):
            file.rename(self.out)
            self._remove()

    def abandon(self) -> None:
        """Remove work that cannot be resumed."""
        self._remove()

    def _remove(self) -> None:
        """Rename the directory, then remove it: if a crash leaves half of it, that is not taken for unfinished work."""
        leftover = self.path.with_name(self.path.name + ".removed")
        shutil.rmtree(leftover, ignore_errors=True)
        self.path.rename(leftover)
        self._lock.release()
        shutil.rmtree(leftover)


class Verification:
    """Compares a written shard, read by the format's independent reader, bit for bit with what was meant."""

    def __init__(
        self,
        format_: Format,
        config: dict[str, Any],
        meant: dict[str, QTensor],
        kept: dict[str, Tensor],
        called: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """meant: quantized weights by module name, as in the files; kept: float tensors by name; called: what the model calls
        a module, where that differs, as configs name it so."""
        self.format, self.config, self.meant, self.kept, self.called = format_, config, meant, kept, called

    def check(self, written: Checkpoint) -> None:
        """VerificationError names the first tensor that differs."""
        for name, value in self.kept.items():
            if not same_bytes(written.read(name), value):
                message = "the tensor on disk is not the one that was meant"
                raise VerificationError(message, where=name, remedy=AGAIN)
        for module, q in self.meant.items():
            found = {n.removeprefix(f"{module}."): n for n in written.tensors if n.startswith(f"{module}.")}
            parts = {suffix: written.read(n) for suffix, n in found.items() if suffix != "bias"}
            wrong = self.format.wrong(self.config, self.called.get(module, module), parts, q)
            if wrong:
                message = f"{wrong} weights on disk are not those that were meant"
                raise VerificationError(message, where=module, remedy=AGAIN)


def copy_companions(source: Path, to: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and all else that is not weights, unchanged.

    The source's README.md becomes README.original.md, since OUT has a model card of its own; unless the source has a
    README.original.md already, as results of bitwright do: then that is copied, and the README.md beside it is not.
    """
    for file in sorted(source.iterdir()):
        own = file.name.lower() == CARD.lower() and not (source / ORIGINAL).exists()
        name = ORIGINAL if own else file.name
        known = (to / name).exists() or name.startswith(".") or name in OF_WEIGHTS
        if file.is_file() and not known and not any(file.match(pattern) for pattern in WEIGHT_FILES):
            write_file(to / name, file.read_bytes())
