"""Quantize a GGUF file without its model, rows at a time: read, round, write in place, read back, compare.

The output file has its full size from the beginning. After a crash, the ledgers tell which blocks are complete.
"""

import time
from collections.abc import Iterator
from itertools import islice
from math import prod
from pathlib import Path
from typing import NamedTuple

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
    shards = plan.shards
    manifest = {
        "version": __version__, "torch": torch.__version__, "recipe": [rule.describe() for rule in plan.recipe.rules],
        "source": [[str(f.name), f.stat().st_size, f.stat().st_mtime_ns] for f in plan.file.files], "calib": calib,
    }  # fmt: skip
    place = WorkInProgress(out, manifest, needed=plan.bytes, resume=resume)
    first = place.noted(len(shards))
    ledger = [entry for i in range(first) for entry in place.ledger(i)]
    made = place.path / "model.gguf"
    try:
        with gguf_writer.GgufWriter(made, plan.keys, plan.described) as writer, single_threads(1) as writer_thread:

            def commit(index: int, parts: list[list[Part]]) -> list[Entry]:
                entries = [
                    _entry(t, its, importance.get(t.source)) for t, its in zip(shards[index], parts, strict=True)
                ]
                writer.flush()
                place.note(index, entries)
                return entries

            noted = []  # in order; one writer thread waits for the disk while the next block is rounded
            jobs = [(t, row) for members in shards[first:] for t in members for row in range(0, _height(t), _step(t))]
            with ahead(lambda job: _make_rows(plan.file, writer, *job, importance.get(job[0].source)), jobs) as parts:
                for index in range(first, len(shards)):
                    progress("block", index, len(shards))
                    noted.append(writer_thread.submit(commit, index, [_parts_of(t, parts) for t in shards[index]]))
            for one in noted:
                ledger += one.result()
    except CheckpointError:
        place.abandon()  # the source must be replaced: nothing here can be resumed
        raise
    progress("block", len(shards), len(shards))
    written = made.stat().st_size
    place.finish_file(made, ledger)
    bits = 8 * sum(entry.bytes for entry in ledger) / plan.parameters
    return Result(out, written, bits, time.monotonic() - begun, peak_rss_bytes(), ledger, plan.notes)


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
    seconds: float


NOTHING = torch.empty(0)


def _height(t: PlannedTensor) -> int:
    return prod(t.shape[:-1])


def _step(t: PlannedTensor) -> int:
    """Rows quantized at a time."""
    return max(1, SLAB // t.shape[-1])


def _parts_of(t: PlannedTensor, parts: Iterator[Part]) -> list[Part]:
    """All parts of tensor t, which come next in `parts`."""
    return list(islice(parts, -(-_height(t) // _step(t))))


def _inputs(t: PlannedTensor, importance: Tensor | None) -> Inputs:
    """The importance of a matrix's columns as statistics; none if it has another shape, as for experts, which have one each."""
    known = importance is not None and t.layer is not None and len(importance) == t.layer.K
    return Inputs((t.stem,), gram=importance) if known else Inputs()


def _make_rows(
    file: GgufFile, writer: gguf_writer.GgufWriter, t: PlannedTensor, first: int, importance: Tensor | None
) -> Part:
    """Quantize the rows from `first` on: read, round, write, read back, compare. CheckpointError for NaN or Inf."""
    begun = time.monotonic()
    last = min(first + _step(t), _height(t))
    w = file.floats(t.source, first, last)
    if t.layer is None or t.rule is None:
        writer.put_floats(t.source, w, first)
        return Part(NOTHING, NOTHING, NOTHING, NOTHING, 0)
    try:
        fit = quantize_matrix(torch.float32, t, w, _inputs(t, importance))
    except SchemeError as error:
        if all(bool(torch.isfinite(end)) for end in torch.aminmax(w)):
            raise
        message = "it has values that are NaN or Inf"
        raise CheckpointError(message, where=t.source, remedy="the file is damaged: get a good copy") from error
    q = fit.outcome.q
    writer.put_rounded(t.source, t.layer, q, first)
    some = slice(None, None, max(1, min(t.layer.N // SAMPLED_ROWS, last - first)))
    return Part(fit.whole, fit.lost, w[some].float(), fit.whole[some], time.monotonic() - begun)


def _entry(t: PlannedTensor, parts: list[Part], importance: Tensor | None) -> Entry:
    """The ledger entry of a tensor."""
    dtype = str(t.dtype).removeprefix("torch.")
    if t.layer is None or t.rule is None:
        return Entry(t.source, t.shape, dtype, KEPT, t.reason, bytes=t.dtype.itemsize * prod(t.shape))
    loss = by_rtn = ratio(torch.cat([part.lost for part in parts]), torch.cat([part.whole for part in parts]))
    if t.rule.method != "rtn":
        rounded = rtn_lost(torch.cat([part.sample for part in parts]), t.layer.scheme, _inputs(t, importance).gram)
        by_rtn = ratio(rounded, torch.cat([part.sampled for part in parts]))
    nbytes = prod(GGUF.layout(t.layer, t.dtype)["weight"][1])
    return Entry(
        t.source,
        t.shape,
        dtype,
        QUANTIZED,
        t.reason,
        str(t.layer.scheme),
        t.rule.method,
        loss,
        by_rtn,
        seconds=round(sum(part.seconds for part in parts), 4),
        fallback=t.layer.fallback,
        bytes=nbytes,
    )
