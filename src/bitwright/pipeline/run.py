"""Quantize a checkpoint: one for-loop over its blocks.

Load a block, observe its inputs, quantize its matrices, run the quantized block, write it, record it. Memory is one block, its
statistics and the calibration activations, however deep the model is. Sequential: block n + 1 gets the outputs of the
*quantized* blocks before it, so later blocks correct the errors of earlier ones. One-shot: a store has the statistics of
the float model's blocks, and nothing is run. A crash costs one block (see work_in_progress.py).
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.windows import Drawn
from bitwright.errors import CalibrationError, CheckpointError, RecipeError
from bitwright.files.checkpoint import count
from bitwright.files.hub import name_of
from bitwright.files.model_path import is_gguf
from bitwright.gguf.imatrix import is_imatrix
from bitwright.methods import ASYMMETRIC
from bitwright.models.families import auto_class
from bitwright.pipeline.calibration_pass import (
    HiddenStates,
    calibration_tokens,
    check_rotation,
    digest,
    first_hidden_states,
    one_shot,
    own_share,
    read_block,
)
from bitwright.pipeline.familiarity import unfamiliar
from bitwright.pipeline.from_gguf import config_of_file, write_companions
from bitwright.pipeline.gguf_file import GgufModelWriter
from bitwright.pipeline.importance import Importance
from bitwright.pipeline.joining import join
from bitwright.pipeline.ledger import Entry, check_complete, outcome
from bitwright.pipeline.model_card import Card, calibration
from bitwright.pipeline.quantize_block import quantize_block
from bitwright.pipeline.quantize_embeddings import begin_with_quantized_embedding, quantize_embedding_and_head
from bitwright.pipeline.quantize_together import Rounded, added_entry, kept_entry
from bitwright.pipeline.result import Result
from bitwright.pipeline.statistics_store import Store
from bitwright.pipeline.work_in_progress import CARD, Verification, WorkInProgress, check_out
from bitwright.plan.planned_tensor import LEFT_OUT, said_as_taken
from bitwright.plan.run_plan import Plan
from bitwright.system import distributed
from bitwright.system.device import CPU
from bitwright.system.memory import peak_rss_bytes, return_memory
from bitwright.system.progress import Progress
from bitwright.system.threads import single_threads
from bitwright.version import __version__


def run(
    plan: Plan,
    out: Path,
    *,
    calib: str,
    seed: int = 0,
    resume: bool = True,
    store: Path | None = None,
    progress: Progress = lambda *_: None,
) -> Result:
    """Carry out a plan. OUT appears complete and verified, or an error says why not.

    calib, seed  the calibration text (see calibration/text_mix.py), and the seed of its windows
    resume       go on with unfinished work of the same kind; else begin anew
    store        directory of one-shot statistics, made if missing; None: sequential statistics
    progress     told of every step: see system/progress.py
    Raises OutputError if OUT exists, the disk cannot hold it, or other unfinished work lies beside it; CheckpointError for a
    weight that is not finite or cut short; RecipeError for a method that needs more than the store's statistics;
    VerificationError if what was written does not read back as meant.
    """
    begun = time.monotonic()
    distributed.from_first(lambda: check_out(out))
    known: Store | Importance | None = Importance.of(plan, Path(calib)) if is_imatrix(calib) else None
    taken = plan.calibrated and known is None
    tokens = distributed.from_first(lambda: calibration_tokens(plan, calib, seed)) if taken else None
    if tokens is not None and len(tokens.seen) < distributed.count():
        remedy = f"--samples {distributed.count()} at least, or fewer processes"
        raise CalibrationError(f"{distributed.count()} processes, and {len(tokens.seen)} windows", remedy=remedy)
    notes = plan.notes if tokens is None else tokens.notes
    notes += known.notes if isinstance(known, Importance) else ()
    if tokens is not None and calib != "general":  # which the others are compared with
        drawn = tokens
        notes += distributed.from_first(lambda: unfamiliar(plan, drawn))
    distributed.from_first(lambda: check_rotation(plan))
    if store is not None and tokens is not None:
        check_one_shot(plan)
        known = one_shot(plan, store, tokens.seen, progress)
        notes += known.notes
    manifest = _manifest(plan, tokens, known)
    place = distributed.on_first(lambda: WorkInProgress(out, manifest, needed=plan.disk_bytes, resume=resume))
    try:
        with _file_of(plan, place) as file:
            ledger = _quantize_blocks(plan, place, file, tokens, known, progress)
    except CheckpointError:
        if place is not None:
            place.abandon()  # the source must be replaced: nothing here can be resumed
        raise
    ledger += [kept_entry(plan, t) for t in plan.tensors if t.action == LEFT_OUT]
    check_complete(ledger, plan.checkpoint.tensors)
    bits = 8 * sum(entry.bytes for entry in ledger) / plan.parameters
    written = distributed.from_first(lambda: _finish(plan, place, ledger, bits, calibration(calib, tokens)))
    return Result(
        out, written, bits, time.monotonic() - begun, peak_rss_bytes(), ledger, notes + _unfolded(plan, ledger)
    )


def check_one_shot(plan: Plan) -> None:
    """RecipeError for a method that compares the quantized model's activations with the float model's."""
    if plan.recipe.needs_original:
        methods = {rule.method for rule in plan.recipe.active if rule.method in ASYMMETRIC}
        message = (
            f"{', '.join(sorted(methods))} compares with what the quantized blocks before give, which no store knows"
        )
        raise RecipeError(message, remedy="leave out --store, or use --method gptq")


def _unfolded(plan: Plan, ledger: list[Entry]) -> tuple[str, ...]:
    """A note on matrices whose rule scales channels, but whose scales nothing can take in (no fold)."""
    asking = {t.source for t in plan.tensors if t.rule is not None and t.layer is not None and t.rule.scales_channels}
    without = [entry.name for entry in ledger if entry.name in asking and not entry.transforms]
    if not without:
        return ()
    return (
        f"{len(without)} of {len(asking)} matrices have no place to fold channel scales into, such as {without[0]}",
    )


def _manifest(plan: Plan, tokens: Drawn | None, known: Store | Importance | None) -> dict[str, Any]:
    """The manifest of unfinished work: only a run of the same source, recipe, calibration and code may resume it."""
    return {
        "statistics": "one-shot" if isinstance(known, Store) else "sequential",
        "importance": known.digest if isinstance(known, Importance) else None,
        "version": __version__,
        "torch": torch.__version__,
        "source": plan.checkpoint.fingerprint(),
        "adapter": None if plan.adapter is None else plan.adapter.digest,
        "config": digest(plan.skeleton.config.to_json_string().encode()),
        "recipe": [rule.describe() for rule in plan.recipe.rules],
        "kv_cache": None if plan.recipe.kv_cache is None else str(plan.recipe.kv_cache),
        "temper": plan.recipe.temper,
        "format": plan.format.name,
        "dtype": str(plan.skeleton.dtype),
        "device": plan.skeleton.device.type,
        "calibration": None
        if tokens is None
        else [digest(t.numpy().tobytes()) for t in (tokens.seen, tokens.held_out)],
        "samples": None if tokens is None else list(tokens.seen.shape),
    }


def _made(place: WorkInProgress) -> Path:
    """The file that becomes OUT, for formats of one file."""
    return place.path / "model.gguf"


def _file_of(plan: Plan, place: WorkInProgress | None) -> AbstractContextManager[GgufModelWriter | None]:
    """The writer of that file, begun or continued; None for other formats, and in processes that do not write."""
    if place is None or not plan.format.one_file:
        return nullcontext()
    return GgufModelWriter(_made(place), plan.file_keys, plan.skeleton.config, plan.members)


def _quantize_blocks(
    plan: Plan,
    place: WorkInProgress | None,
    file: GgufModelWriter | None,
    tokens: Drawn | None,
    known: Store | Importance | None,
    progress: Progress,
) -> list[Entry]:
    """Quantize all shards in order, from the first that is not committed; the last holds the tensors outside the blocks.

    place: None in processes that work together with the one that writes; known: what the statistics come from, if it is not
    hidden states that pass through the model.
    """
    depth, config = len(plan.skeleton), plan.quantization_config
    first, ledger = distributed.from_first(lambda: _done_before(place, depth + 1))
    states = None
    if tokens is not None and known is None and first < depth + plan.calibrates_embeddings:
        saved = distributed.from_first(lambda: place.hidden(first) if place and first else None)
        if saved is not None:
            saved = {name: distributed.share(whole).clone() for name, whole in saved.items()}
        states = first_hidden_states(plan, own_share(tokens), saved, first)
        del saved
        if first == 0:
            begin_with_quantized_embedding(plan, states, tokens)
    progress("block", first, depth + 1)
    with single_threads(1) as writer_thread:  # encodes, writes and verifies a shard while the next is rounded
        written: Future[None] | None = None
        for index in range(first, depth + 1):
            entries, commit = _quantize_shard(plan, place, file, index, states or known, config, tokens)
            ledger += entries
            if written is not None:
                written.result()
            written = writer_thread.submit(commit)
            del commit  # which holds the shard and the hidden states: they are to go once they are written
            progress(f"block{outcome(entries)}", index + 1, depth + 1)
            return_memory()
        if written is not None:
            written.result()
    return ledger


def _done_before(place: WorkInProgress | None, shards: int) -> tuple[int, list[Entry]]:
    """How many shards an earlier run has committed, and their ledger."""
    assert place is not None  # asked of the process that writes
    first = place.noted(shards)
    return first, [entry for i in range(first) for entry in place.ledger(i)]


def _quantize_shard(
    plan: Plan,
    place: WorkInProgress | None,
    file: GgufModelWriter | None,
    index: int,
    source: HiddenStates | Store | Importance | None,
    config: dict[str, Any],
    tokens: Drawn | None,
) -> tuple[list[Entry], Callable[[], None]]:
    """Read and quantize one shard, moving hidden states on to the next block. Also a function that writes, verifies and
    commits it, or does nothing in a process that does not write."""
    depth, members = len(plan.skeleton), plan.shard(index)
    weights = read_block(plan, index)
    before = {} if plan.rotation is not None else dict(weights)
    states, kv = source if isinstance(source, HiddenStates) else None, None
    if index < depth:
        done, kv = quantize_block(plan, index, weights, source)
    else:
        done = quantize_embedding_and_head(plan, weights, states, tokens)
    kept = [t for t in members if t.layer is None]
    entries = [r.entry for r in done]
    entries += [kept_entry(plan, t, changed=weights[t.parameter] is not before.get(t.parameter)) for t in kept]
    tensors = {t.source: weights[t.parameter].to(CPU, t.dtype) for t in kept}
    done = [replace(r, q=r.q.to(CPU)) for r in done]
    for (name, (dtype, shape)), input_quantization in zip(plan.kv_specs(index).items(), kv or (), strict=True):
        assert input_quantization.scales is not None
        tensors[name] = input_quantization.scales.scale.reshape(shape).to(dtype)
        entries.append(
            added_entry(name, tensors[name], f"what keys and values are kept in: {input_quantization.scheme}")
        )
    weights.clear()
    saved = states.whole() if states is not None and index + 1 < depth + plan.calibrates_embeddings else None
    if place is None:
        return entries, lambda: None

    def put() -> None:
        if file is None:
            stored = tensors | {name: t for r in done for name, t in _encoded(plan, r).items()}
            called = {r.planned.stem: r.planned.layer.name for r in done if r.planned.layer is not None}
            verify = Verification(plan.format, config, {r.planned.stem: r.q for r in done}, tensors, called)
            place.put_shard(index, stored, verify)
        else:
            _put_in_file(file, {t.parameter: tensors[t.source] for t in kept}, done)

    return entries, partial(place.commit, index, put, entries, saved)


def _put_in_file(file: GgufModelWriter, kept: dict[str, Tensor], done: list[Rounded]) -> None:
    """Write a shard's tensors to the one file, kept ones by parameter name, and flush them to the disk."""
    for parameter, tensor in kept.items():
        file.put_floats(parameter, tensor)
    for r in done:
        assert r.planned.layer is not None
        file.put_rounded(r.planned.parameter, r.planned.layer, r.q)
    file.flush()


def _encoded(plan: Plan, r: Rounded) -> dict[str, Tensor]:
    """A matrix's tensors as the files hold them, by name."""
    assert r.planned.layer is not None
    scales = None if r.input_quantization is None else r.input_quantization.scales
    parts = plan.format.encode(r.q, r.planned.layer, r.planned.dtype, scales)
    return {f"{r.planned.stem}.{suffix}": t for suffix, t in parts.items()}


def _finish(plan: Plan, place: WorkInProgress | None, ledger: list[Entry], bits: float, calibrated: str) -> int:
    """Make OUT appear; the bytes of its weight files."""
    assert place is not None  # asked of the process that writes
    if plan.format.one_file:
        written = _made(place).stat().st_size
        place.finish_file(_made(place), ledger)
        return written
    written = join(place, len(plan.skeleton) + 1)
    _describe(plan, place, ledger, bits, calibrated)
    place.finish(plan.source, ledger)
    return written


def _describe(plan: Plan, place: WorkInProgress, ledger: list[Entry], bits: float, calibrated: str) -> None:
    """Write the configs and the model card."""
    if is_gguf(plan.source):
        largest = max((t for t in plan.tensors if t.layer is None), key=lambda t: count(t.shape))
        config = config_of_file(plan.skeleton) | {"dtype": str(largest.dtype).removeprefix("torch.")}
        write_companions(plan.source, plan.skeleton, place)
    else:
        config = said_as_taken(json.loads((plan.source / "config.json").read_text(encoding="utf-8")))
    if not getattr(plan.skeleton.config, "tie_word_embeddings", True) and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False  # two matrices, which not every engine compares
    place.write_json("config.json", {**config, "quantization_config": plan.quantization_config})
    if plan.format.name == "gptq":
        place.write_json("quantize_config.json", plan.quantization_config)
    method = ", ".join(sorted({rule.name for rule in plan.recipe.active}))
    loader = auto_class(plan.skeleton.config)
    known = name_of(plan.source)
    described = config if known is None else {**config, "_name_or_path": known}
    card = Card(described, plan.format.name, bits, ledger, plan.skeleton.predicts, method, calibrated, loader)
    place.write_text(CARD, str(card))
