"""The calibration tokens on their way through the blocks, and the statistics that are taken of them."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.block import observe
from bitwright.calibration import batches, draw, load_tokenizer
from bitwright.checkpoint import Checkpoint
from bitwright.errors import CalibrationError, CheckpointError, RecipeError
from bitwright.folds import find_folds
from bitwright.intake import Intake
from bitwright.kv import KvCache
from bitwright.ledger import LEFT_OUT
from bitwright.llamacpp.artefact import GgufSource
from bitwright.models import TOKENS_PER_BATCH
from bitwright.planned import Planned
from bitwright.preflight import Plan
from bitwright.ranges import Histogram
from bitwright.result import Progress
from bitwright.store import BlockStatistics, Store, code_version
from bitwright.threads import each


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


def first_streams(plan: Plan, tokens: Tensor, saved: Mapping[str, Callable[[], Tensor]] | None) -> Streams:
    """What the first block to be done is given: from the embeddings, or as saved by the run that is resumed.

    The outer parameters are loaded for a while, so that the skeleton knows how its blocks are called.
    """
    skeleton = plan.skeleton
    sources = {t.parameter: t.made_of or t.source for t in plan.tensors if t.block is None and t.action != LEFT_OUT}
    base = [name for name in skeleton.outer_names(base_only=True) if name in sources]
    weights = {name: read_finite(plan.checkpoint, sources[name]) for name in base}
    skeleton.load(weights if plan.rotation is None else plan.rotation.outside(weights))
    parts, tuned = batches(tokens, TOKENS_PER_BATCH), plan.recipe.windows_at_once
    steps = list(tokens.split(tuned)) if tuned else []
    for ids in {len(ids): ids for ids in [tokens[:1], *steps]}.values():
        skeleton.embed(ids)
    if saved is None:
        given = [skeleton.embed(ids) for ids in parts]
        streams = Streams(given, list(given) if plan.recipe.needs_original else None)
    else:
        for ids in {len(ids): ids for ids in parts}.values():
            skeleton.embed(ids)
        streams = Streams(**{name: list(read().split(len(parts[0]))) for name, read in saved.items()})
    skeleton.unload_outside()
    return streams


def calibration_tokens(plan: Plan, calib: str, seed: int) -> tuple[Tensor, tuple[str, ...]]:
    """[S, T] token ids of a text or several (see `mix`), and a note if there are fewer than asked for."""
    if calib == "none":
        needing = sorted({rule.name for rule in plan.recipe.active if rule.needs_calibration})
        remedy = "give --calib a text, or use search, rtn or hqq with activations by token"
        raise CalibrationError(f"no calibration, and {', '.join(needing)} cannot do without", remedy=remedy)
    vocabulary = plan.skeleton.config.get_text_config().vocab_size
    tokenizer = load_tokenizer(plan.source)
    drawn = draw(tokenizer, calib, samples=plan.samples, seqlen=plan.seqlen, vocabulary=vocabulary, seed=seed)
    return drawn.tokens, plan.notes + drawn.notes


def check_rotation(plan: Plan) -> None:
    """RecipeError if the model's first block does not commute with the plan's rotation."""
    if plan.rotation is None:
        return
    skeleton = plan.skeleton
    ids = torch.arange(min(64, plan.seqlen))[None] % skeleton.config.get_text_config().vocab_size
    plain = replace(plan, rotation=None)
    streams = first_streams(plain, ids, None)
    plan.rotation.check(skeleton, read_block(plain, 0), streams.given[0])


def look(
    plan: Plan, index: int, layers: Mapping[str, Planned], streams: Streams, *, everything: bool
) -> BlockStatistics:
    """The statistics of block `index`, whose float weights are loaded; the original stream moves on.

    everything: what any method may ask for, rather than what this plan's methods do.
    """
    recipe, skeleton = plan.recipe, plan.skeleton
    cache = KvCache((Histogram(), Histogram())) if everything or recipe.kv_cache else None
    with skeleton.taking_in(rotations(layers)):
        folds = find_folds(skeleton, index, streams.given[0][:1]) if everything or recipe.needs_folds else []
        detailed = everything or recipe.needs_details
        inputs = observe(skeleton, index, streams.given, layers, streams.original, detailed=detailed, cache=cache)
    heard = cache.listening if cache is not None and cache.used else None
    if heard is None and recipe.kv_cache is not None:
        message = f"models of type {skeleton.config.model_type!r} do not hand their keys and values to a cache"
        raise RecipeError(message, where="kv_cache", remedy="leave out --kv-cache")
    return BlockStatistics(inputs, folds, heard)


def rotations(layers: Mapping[str, Planned]) -> dict[str, Intake]:
    """Those modules whose weights expect rotated inputs."""
    return {name: Intake(rotate=t.layer.rotate) for name, t in layers.items() if t.layer is not None and t.layer.rotate}


def one_shot(plan: Plan, folder: Path, tokens: Tensor, progress: Progress) -> Store:
    """The statistics of the float model in `folder`: those that are there, and what is missing, taken now.

    Errors as of `Store`; CheckpointError for a weight that is not finite.
    """
    store = Store(folder, _key(plan, tokens))
    depth = len(plan.skeleton)
    store.check(depth)
    first = next((i for i in range(depth) if not store.has(i)), depth)
    if first == depth:
        return store
    streams = first_streams(plan, tokens, {"given": lambda: store.hidden(first)} if first else None)
    for index in range(first, depth):
        progress("statistics", index, depth)
        layers = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
        plan.skeleton.load(read_block(plan, index))
        statistics = look(plan, index, layers, streams, everything=True)
        if index + 1 < depth:
            with plan.skeleton.taking_in(rotations(layers)):
                streams.given = [plan.skeleton.run(index, batch) for batch in streams.given]
            store.keep_hidden(index + 1, torch.cat(streams.given))
        store.write(index, statistics)  # commits the block: what the next is given must be there by then
        plan.skeleton.unload(index)
    progress("statistics", depth, depth)
    return store


def _key(plan: Plan, tokens: Tensor) -> dict[str, Any]:
    """What statistics belong to."""
    tokenizer = [p.read_bytes() for p in sorted(plan.source.glob("tokenizer*")) if p.is_file()]
    return {
        "model": [plan.checkpoint.fingerprint(), digest(plan.skeleton.config.to_json_string().encode())],
        "text": [list(tokens.shape), digest(tokens.numpy().tobytes())],
        "tokenizer": digest(b"".join(tokenizer)),
        "code version": [code_version(), torch.__version__, str(plan.skeleton.dtype)],
        "rotation": None if plan.rotation is None else asdict(plan.rotation),
        "choice of matrices": digest(repr(sorted(t.layer.name for t in plan.tensors if t.layer)).encode()),
    }


def digest(content: bytes) -> str:
    """Its SHA-256."""
    return hashlib.sha256(content).hexdigest()


def read_block(plan: Plan, index: int) -> dict[str, Tensor]:
    """The parameters of shard `index` by name, rotated if the plan says so."""
    members = plan.shard(index)
    found = each(lambda t: read_finite(plan.checkpoint, t.made_of or t.source), members)
    weights = {t.parameter: tensor for t, tensor in zip(members, found, strict=True)}
    if plan.rotation is None:
        return weights
    if index == len(plan.skeleton):
        return plan.rotation.outside(weights)
    return plan.rotation.block(weights, f"{plan.skeleton.block_prefix}.{index}.")


def read_finite(checkpoint: Checkpoint | GgufSource, name: str) -> Tensor:
    """A tensor of the source; CheckpointError if it holds NaN or Inf."""
    tensor = checkpoint.read(name)
    if tensor.is_floating_point() and not _finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        message = f"tensor {name!r} has {bad} values that are NaN or Inf"
        raise CheckpointError(
            message, where=str(checkpoint.folder), remedy="the checkpoint is damaged: get a good copy"
        )
    return tensor


def _finite(tensor: Tensor) -> bool:
    """Whether all values are, by the extremes: NaN is both."""
    if not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
