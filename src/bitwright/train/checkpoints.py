"""Checkpoints of a training run: what is trained, optimizer and step, in a directory beside the one that is to be made.

OUT.partial holds a manifest, and step-000050 and the like: adapters in peft's form, say, with the optimizer's state. Each is
written under another name first. A run that resumes does the same steps on the same data as one that was never interrupted,
so its result has the same bytes.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from bitwright.errors import CheckpointError, OutputError
from bitwright.files.checkpoint import Checkpoint, disk_errors, sync_folder, write_file, write_shard
from bitwright.files.lock import Lock
from bitwright.train.trained import Trained

MANIFEST, STATE, OPTIMIZER = "manifest.json", "state.json", "optimizer.safetensors"
KEPT = 2  # checkpoints that stay


class Checkpoints:
    """The checkpoints of the run that makes `out`."""

    def __init__(self, out: Path, manifest: dict[str, Any], *, resume: bool) -> None:
        """Begin, or go on with unfinished work of the same manifest. OutputError if `out` exists, other work lies there, or
        another process works there."""
        self.out, self.path = out, out.with_name(out.name + ".partial")
        if out.exists():
            raise OutputError("it exists already", where=str(out), remedy="name a new directory, or delete this one")
        self.manifest = json.dumps(manifest, indent=1, sort_keys=True)
        file = self.path / MANIFEST
        self._lock = Lock(self.path)
        if self.path.exists():
            self._lock.take()
            if not resume:
                self._remove()
        if file.is_file() and file.read_text(encoding="utf-8") != self.manifest:
            message = "unfinished training of another kind lies there: other data, base, settings or versions"
            raise OutputError(message, where=str(self.path), remedy="add --restart to discard it, or name another OUT")

    def _begin(self) -> None:
        """Make the directory, if it is not there yet: a run that fails before its first checkpoint leaves nothing behind."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            write_file(self.path / MANIFEST, self.manifest.encode())

    @property
    def last(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(self.path.glob("step-??????"))
        return found[-1] if found else None

    def save(self, step: int, trained: Trained, optimizer: Optimizer, more: dict[str, Any]) -> Path:
        """Write the state after `step` steps. more: plain data to be given back by `restore`."""
        self._begin()
        whole = self.path / f"step-{step:06d}"
        beside = whole.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(whole, ignore_errors=True)
        with disk_errors(beside):
            trained.save(beside)
            tensors, plain = _flat(optimizer)
            write_shard(beside / OPTIMIZER, tensors)
            write_file(beside / STATE, json.dumps({"step": step, "optimizer": plain, **more}).encode())
            sync_folder(beside)
            beside.rename(whole)
            sync_folder(self.path)
            for old in sorted(self.path.glob("step-??????"))[:-KEPT]:
                shutil.rmtree(old)
        return whole

    def restore(self, trained: Trained, optimizer: Optimizer) -> dict[str, Any]:
        """Load the newest checkpoint into both; its plain data, with the key "step". {"step": 0} if there is none."""
        folder = self.last
        if folder is None:
            return {"step": 0}
        try:
            state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
            trained.restore(folder)
            stored = Checkpoint(folder, only=folder / OPTIMIZER)
            _fill(optimizer, {name: stored.read(name) for name in stored.tensors}, state["optimizer"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"damaged: {error}", where=str(folder), remedy="delete this checkpoint") from error
        return state

    def finish(self, trained: Trained, report: dict[str, Any]) -> None:
        """Make `out` appear: the result of the run, and a report."""
        self._begin()
        beside = self.path / "whole"
        shutil.rmtree(beside, ignore_errors=True)
        with disk_errors(beside):
            trained.finish(beside)
            write_file(beside / "training.json", json.dumps(report, indent=1).encode())
            sync_folder(beside)
            beside.rename(self.out)
            self._remove()

    def _remove(self) -> None:
        self._lock.release()
        shutil.rmtree(self.path)


def _flat(optimizer: Optimizer) -> tuple[dict[str, Tensor], list[tuple[str, Any]]]:
    """An optimizer's state as tensors, and as plain data, by path: "parameter/key", or deeper (bitsandbytes)."""
    leaves = list(_leaves(optimizer.state_dict()["state"], ()))
    tensors = {"/".join(path): value.contiguous() for path, value in leaves if isinstance(value, Tensor)}
    return tensors, [("/".join(path), value) for path, value in leaves if not isinstance(value, Tensor)]


def _leaves(node: dict[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in node.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            yield from _leaves(value, here)
        else:
            yield here, value


def _fill(optimizer: Optimizer, tensors: dict[str, Tensor], plain: list[tuple[str, Any]]) -> None:
    """Undoes `_flat`."""
    state: dict[Any, Any] = {}
    for path, value in [*tensors.items(), *plain]:
        first, *between, last = path.split("/")
        node = state.setdefault(int(first), {})
        for key in between:
            node = node.setdefault(key, {})
        node[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
