"""Quantize a checkpoint: one for-loop over its blocks.

Load a block, watch its inputs, round its matrices, run it again as rounded, write it, record it. Memory is one block,
its statistics and the calibration activations, however deep the model is. Block n + 1 sees what the *quantized* blocks
before it give, so later blocks make up for the errors of earlier ones. A crash costs one block (see workplace.py).
"""

import ctypes
import gc
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.block import Inputs, Rounded, kept_entry, observe, quantize_together
from bitwright.calibration import batches, load_tokenizer, sample
from bitwright.checkpoint import INDEX, Checkpoint, shard_bytes
from bitwright.codec import decode
from bitwright.errors import CheckpointError
from bitwright.ledger import LEFT_OUT, Entry, check_complete
from bitwright.models import TOKENS_PER_BATCH
from bitwright.preflight import Plan
from bitwright.tuning import as_source, tune_block
from bitwright.version import __version__
from bitwright.workplace import Verification, Workplace

Progress = Callable[[str, int, int], None]


@dataclass
class Streams:
    """What the next block is given, in batches [B, T, H].

    given: by the quantized blocks before it. original: by the float ones; None where no method asks for it.
    """

    given: list[Tensor]
    original: list[Tensor] | None = None

    def whole(self) -> dict[str, Tensor]:
        """Each stream in one piece [S, T, H]."""
        parts = {"given": self.given, "original": self.original}
        return {name: torch.cat(batches) for name, batches in parts.items() if batches is not None}


@dataclass(frozen=True)
class Result:
    """What a run gives back; `as_dict` is the command line's JSON."""

    out: Path
    bytes: int
    bits_per_weight: float
    seconds: float
    peak_rss_bytes: int
    ledger: list[Entry] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def fallbacks(self) -> list[str]:
        """What was quantized worse than asked."""
        return [f"{entry.name}: {entry.fallback}" for entry in self.ledger if entry.fallback]

    def as_dict(self) -> dict[str, Any]:
        """{out, bytes, bits_per_weight, seconds, peak_rss_bytes, tensors, fallbacks}."""
        return {
            "out": str(self.out), "bytes": self.bytes, "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 2), "peak_rss_bytes": self.peak_rss_bytes, "tensors": len(self.ledger),
            "fallbacks": self.fallbacks,
        }  # fmt: skip


def run(
    plan: Plan, out: Path, *, calib: str, seed: int = 0, resume: bool = True, progress: Progress = lambda *_: None
) -> Result:
    """Carry out a plan. OUT appears complete and verified, or an error says why not.

    Raises OutputError if OUT exists, the disk cannot hold it, or other unfinished work lies beside it; CheckpointError
    for a weight that is not finite or cut short; VerificationError if what was written does not read back as meant.
    """
    begun = time.monotonic()
    tokens, notes = _calibration_tokens(plan, calib, seed) if plan.calibrated else (None, plan.notes)
    place = Workplace(out, _manifest(plan, tokens), needed=plan.bytes, resume=resume)
    try:
        ledger = _quantize_blocks(plan, place, tokens, progress)
    except CheckpointError:
        place.abandon()  # the source must be replaced: nothing here can be resumed
        raise
    ledger += [kept_entry(plan, t) for t in plan.tensors if t.action == LEFT_OUT]
    check_complete(ledger, plan.checkpoint.tensors)
    _describe(plan, place)
    place.finish(plan.source, ledger)
    seconds = time.monotonic() - begun
    return Result(out, plan.bytes, plan.bits_per_weight, seconds, peak_rss_bytes(), ledger, notes)


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _calibration_tokens(plan: Plan, calib: str, seed: int) -> tuple[Tensor, tuple[str, ...]]:
    """[S, T] token ids, and a note if there are fewer than asked for."""
    vocabulary = plan.skeleton.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(plan.source)
    tokens = sample(tokenizer, calib, samples=plan.samples, seqlen=plan.seqlen, vocabulary=vocabulary, seed=seed)
    notes = plan.notes
    if len(tokens) < plan.samples:
        notes += (f"the text gives {len(tokens)} calibration windows of {plan.seqlen} tokens, not {plan.samples}",)
    return tokens, notes


def _manifest(plan: Plan, tokens: Tensor | None) -> dict[str, Any]:
    """What unfinished work belongs to: the same source, recipe, calibration and code."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "source": plan.checkpoint.fingerprint(),
        "config": hashlib.sha256((plan.source / "config.json").read_bytes()).hexdigest(),
        "recipe": [rule.describe() for rule in plan.recipe.rules],
        "format": plan.format.name,
        "dtype": str(plan.skeleton.dtype),
        "calibration": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "samples": None if tokens is None else list(tokens.shape),
    }


def _quantize_blocks(plan: Plan, place: Workplace, tokens: Tensor | None, progress: Progress) -> list[Entry]:
    """All shards in order, from the first that is not committed; the last holds what is outside the blocks."""
    depth, config = len(plan.skeleton), plan.quantization_config
    first = place.committed([plan.shard_name(i) for i in range(depth + 1)])
    ledger = [entry for i in range(first) for entry in place.ledger(i)]
    hidden = _hidden_before(plan, place, tokens, first) if tokens is not None and first < depth else None
    for index in range(first, depth + 1):
        progress("block", index, depth + 1)
        ledger += _quantize_shard(plan, place, index, hidden, config)
        _return_memory()
    progress("block", depth + 1, depth + 1)
    return ledger


def _quantize_shard(
    plan: Plan, place: Workplace, index: int, hidden: Streams | None, config: dict[str, Any]
) -> list[Entry]:
    """Read, round, write, verify and commit one shard; `hidden` moves on to the next block."""
    depth, members = len(plan.skeleton), plan.shard(index)
    weights = {t.parameter: read_finite(plan.checkpoint, t.source) for t in members}
    done = _quantize_block(plan, index, weights, hidden) if index < depth else []
    kept = [t for t in members if t.layer is None]
    entries = [r.entry for r in done] + [kept_entry(plan, t) for t in kept]
    tensors = {t.source: weights[t.parameter] for t in kept}
    verify = Verification(plan.format, config, {r.planned.stem: r.q for r in done}, dict(tensors))
    for r in done:
        assert r.planned.layer is not None
        parts = plan.format.encode(r.q, r.planned.layer, r.planned.dtype)
        tensors |= {f"{r.planned.stem}.{suffix}": t for suffix, t in parts.items()}
    weights.clear()
    saved = hidden.whole() if hidden is not None and index + 1 < depth else None
    place.commit(index, plan.shard_name(index), tensors, entries, saved, verify)
    return entries


def _return_memory() -> None:
    """Collect cycles, and have glibc give freed memory back to the system: it hoards blocks below 32 MB."""
    gc.collect(1)  # the young ones: what was imported stays anyway
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _hidden_before(plan: Plan, place: Workplace, tokens: Tensor, first: int) -> Streams:
    """What block `first` is given: from the embeddings, or as the run that is resumed had saved it."""
    skeleton = plan.skeleton
    sources = {t.parameter: t.source for t in plan.tensors if t.block is None and t.action != LEFT_OUT}
    base = [name for name in skeleton.outer_names(base_only=True) if name in sources]
    skeleton.load({name: read_finite(plan.checkpoint, sources[name]) for name in base})
    parts, tuned = batches(tokens, TOKENS_PER_BATCH), plan.recipe.windows_at_once
    steps = tokens.split(tuned) if tuned else ()
    for ids in {len(ids): ids for ids in steps}.values():  # the masks and positions that blocks are called with
        skeleton.embed(ids)
    if first == 0:
        given = [skeleton.embed(ids) for ids in parts]
        streams = Streams(given, list(given) if plan.recipe.needs_original else None)
    else:
        for ids in {len(ids): ids for ids in parts}.values():
            skeleton.embed(ids)
        names = ("given", "original") if plan.recipe.needs_original else ("given",)
        streams = Streams(*(list(place.hidden(first, name).split(len(parts[0]))) for name in names))
    skeleton.unload_outside()
    return streams


def read_finite(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of the source; CheckpointError if it holds NaN or Inf."""
    tensor = checkpoint.read(name)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            message = f"tensor {name!r} has {bad} values that are NaN or Inf"
            raise CheckpointError(
                message, where=str(checkpoint.folder), remedy="the checkpoint is damaged: get a good copy"
            )
    return tensor


def _quantize_block(plan: Plan, index: int, weights: dict[str, Tensor], hidden: Streams | None) -> list[Rounded]:
    """Round one block's matrices and, with calibration, carry its streams through the block, as rounded and as it was."""
    layers = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
    if hidden is None:
        return [r for t in layers.values() for r in quantize_together(plan, [t], weights, Inputs())]
    skeleton = plan.skeleton
    skeleton.load(weights)
    done: list[Rounded] = []
    for seen in observe(skeleton, index, hidden.given, list(layers), hidden.original):
        tokens, cross = seen.gram.tokens, None if seen.cross is None else seen.cross.value()
        inputs = Inputs(seen.gram.value(), cross, tokens)
        done += quantize_together(plan, [layers[name] for name in seen.names], weights, inputs)
        seen.gram.free()
        seen.cross = None
    if hidden.original is not None:
        done = tune_block(plan, index, done, weights, torch.cat(hidden.given), torch.cat(hidden.original))
    if index + 1 < len(skeleton):
        skeleton.load({r.planned.parameter: as_source(plan, r, decode(r.q).to(r.planned.dtype)) for r in done})
        schemes = {name: t.layer.activations for name, t in layers.items() if t.layer is not None}
        with skeleton.rounding_inputs(schemes):
            for b, batch in enumerate(hidden.given):
                hidden.given[b] = skeleton.run(index, batch)
    skeleton.unload(index)
    return done


def _describe(plan: Plan, place: Workplace) -> None:
    """The index and the configs."""
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(len(plan.skeleton) + 1):
        specs = plan.specs(plan.shard(i))
        weight_map |= dict.fromkeys(specs, plan.shard_name(i))
        total += shard_bytes(specs)
    place.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    config = json.loads((plan.source / "config.json").read_text(encoding="utf-8"))
    place.write_json("config.json", {**config, "quantization_config": plan.quantization_config})
    if plan.format.name == "gptq":
        place.write_json("quantize_config.json", plan.quantization_config)
