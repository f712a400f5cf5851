"""Quantize a GGUF file without its model, rows at a time: read, round, write in place, read back, compare.

The output file has its full size from the beginning. After a crash, the ledgers tell which blocks are complete.
"""

import time
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.errors import CheckpointError, SchemeError
from bitwright.formats import gguf_writer
from bitwright.gguf import imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.numerics.loss import ratio
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.quantize_matrix import SAMPLED_ROWS, SLAB, quantize_matrix, rtn_lost
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import WorkInProgress
from bitwright.plan.gguf_tensors import GGUF, GgufPlan
from bitwright.plan.planned_tensor import KEPT, QUANTIZED, PlannedTensor
from bitwright.system.memory import keep_memory, peak_rss_bytes
from bitwright.system.progress import Progress
from bitwright.system.threads import ahead, single_threads
from bitwright.version import __version__


def quantize_gguf(
    plan: GgufPlan, out: Path, *, calib: str, resume: bool = True, progress: Progress = lambda *_: None
) -> Result:
    """Carry out a plan: see `pipeline.run.run`. calib: an importance matrix's file; anything else is not used."""
    begun = time.monotonic()
    keep_memory()
    importance = plan.importance(Path(calib)) if imatrix.is_imatrix(calib) else {}
    evenly = {t.source: why for t in plan.tensors if (why := _counts_evenly(t, importance.get(t.source)))}
    shards = plan.shards
    place = WorkInProgress(out, _manifest(plan, calib), needed=plan.bytes, resume=resume)
    first = place.noted(len(shards))
    ledger = [entry for i in range(first) for entry in place.ledger(i)]
    made = place.path / "model.gguf"
    try:
        with gguf_writer.GgufWriter(made, plan.keys, plan.described) as writer, single_threads(1) as writer_thread:

            def commit(index: int, parts: list[list[Part]]) -> list[Entry]:
                entries = [
                    _entry(t, its, evenly.get(t.source, t.reason)) for t, its in zip(shards[index], parts, strict=True)
                ]
                writer.flush()
                place.note(index, entries)
                return entries

            noted = []  # in order: one writer thread waits for the disk while the next block is rounded
            jobs = [Rows(t, *cut) for members in shards[first:] for t in members for cut in _cuts(t, importance)]
            with ahead(lambda job: _make_rows(plan.file, writer, job), jobs) as parts:
                for index in range(first, len(shards)):
                    progress("block", index, len(shards))
                    noted.append(
                        writer_thread.submit(
                            commit, index, [list(islice(parts, len(_cuts(t, importance)))) for t in shards[index]]
                        )
                    )
            for one in noted:
                ledger += one.result()
    except CheckpointError:
        place.abandon()  # the source must be replaced: nothing here can be resumed
        raise
    progress("block", len(shards), len(shards))
    written = made.stat().st_size
    place.finish_file(made, ledger)
    bits = 8 * sum(entry.bytes for entry in ledger) / plan.parameters
    seconds, notes = time.monotonic() - begun, (*plan.notes, *_notes(evenly))
    return Result(out, written, bits, seconds, peak_rss_bytes(), ledger, notes)


def _notes(evenly: dict[str, str]) -> list[str]:
    """What is said of matrices whose columns count evenly. evenly: why, by their name."""
    name, why = next(iter(evenly.items()), ("", ""))
    return [f"{len(evenly)} matrices, such as {name}: {why}"] if evenly else []


def _manifest(plan: GgufPlan, calib: str) -> dict[str, Any]:
    """What unfinished work belongs to: the same source, recipe, importance and code."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "recipe": [rule.describe() for rule in plan.recipe.rules],
        "source": [[str(f.name), f.stat().st_size, f.stat().st_mtime_ns] for f in plan.file.files],
        "calib": calib,
    }


class Part(NamedTuple):
    """What is recorded of n quantized rows.

    whole, lost      [n] float64 energy of each row, and of its error
    sample, sampled  every k-th row, and its energy: what RTN is compared on
    seconds          that quantizing took
    """

    whole: Tensor
    lost: Tensor
    sample: Tensor
    sampled: Tensor
    gram: Tensor | None
    seconds: float


class Rows(NamedTuple):
    """A job: rows [first, last) of a tensor, which are one expert's; the importance of their columns [K] where it is known."""

    tensor: PlannedTensor
    first: int
    last: int
    importance: Tensor | None


NOTHING = torch.empty(0)


def _height(t: PlannedTensor) -> int:
    return prod(t.shape[:-1])


def _cuts(t: PlannedTensor, importance: dict[str, Tensor]) -> list[tuple[int, int, Tensor | None]]:
    """The rows that are taken at a time, and the importance of their columns: none if that is of another shape."""
    step, height, known = max(1, SLAB // t.shape[-1]), _height(t), importance.get(t.source)
    each = None if known is None or t.layer is None else imatrix.experts_of(known, t.layer.K, height)
    if each is None:
        return [(row, min(row + step, height), None) for row in range(0, height, step)]
    own = height // len(each)
    return [
        (e * own + row, e * own + min(row + step, own), imatrix.evenly(values))
        for e, values in enumerate(each)
        for row in range(0, own, step)
    ]


def _make_rows(file: GgufFile, writer: gguf_writer.GgufWriter, job: Rows) -> Part:
    """Some rows: read, rounded, written, read back, compared. CheckpointError for a weight that is not finite."""
    begun = time.monotonic()
    t, first, last, importance = job
    w = file.read_rows(t.source, first, last)
    if t.layer is None or t.rule is None:
        writer.put_floats(t.source, w.to(t.dtype), first)
        return Part(NOTHING, NOTHING, NOTHING, NOTHING, None, 0)
    inputs = Inputs() if importance is None else Inputs((t.stem,), gram=importance)
    try:
        fit = quantize_matrix(torch.float32, t, w, inputs)
    except SchemeError as error:
        if all(bool(torch.isfinite(end)) for end in torch.aminmax(w)):
            raise
        message = "it has values that are NaN or Inf"
        raise CheckpointError(message, where=t.source, remedy="the file is damaged: get a good copy") from error
    q = fit.outcome.q
    writer.put_rounded(t.source, t.layer, q, first)
    some = slice(None, None, max(1, min(t.layer.N // SAMPLED_ROWS, last - first)))
    return Part(fit.whole, fit.lost, w[some].float(), fit.whole[some], importance, time.monotonic() - begun)


def _counts_evenly(t: PlannedTensor, importance: Tensor | None) -> str:
    """Why all columns of a matrix, or of some of its experts, count evenly: they saw no token; "" where importance is known."""
    each = None if importance is None or t.layer is None else imatrix.experts_of(importance, t.layer.K, _height(t))
    count = 0 if each is None else imatrix.unseen(each)
    if each is None or not count:
        return ""
    if len(each) == 1 or count == len(each):
        return imatrix.UNSEEN if len(each) == 1 else imatrix.LEFT_OUT
    return imatrix.UNSEEN.replace("it", f"{count} of {len(each)} experts", 1)


def _entry(t: PlannedTensor, parts: list[Part], reason: str) -> Entry:
    """The ledger entry of a tensor."""
    dtype = str(t.dtype).removeprefix("torch.")
    if t.layer is None or t.rule is None:
        size = t.dtype.itemsize * prod(t.shape)
        return Entry(t.source, t.shape, dtype, KEPT, reason, fallback=t.fallback, bytes=size, source=t.stored_as)
    loss = by_rtn = ratio(torch.cat([part.lost for part in parts]), torch.cat([part.whole for part in parts]))
    if t.rule.method != "rtn":
        rounded = torch.cat([rtn_lost(part.sample, t.layer.scheme, part.gram) for part in parts])
        by_rtn = ratio(rounded, torch.cat([part.sampled for part in parts]))
    nbytes = prod(GGUF.layout(t.layer, t.dtype)["weight"][1])
    return Entry(
        t.source,
        t.shape,
        dtype,
        QUANTIZED,
        reason,
        str(t.layer.scheme),
        t.rule.method,
        loss,
        by_rtn,
        seconds=round(sum(part.seconds for part in parts), 4),
        fallback=t.layer.fallback,
        bytes=nbytes,
        source=t.stored_as,
    )
