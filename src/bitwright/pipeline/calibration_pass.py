"""The calibration pass: hidden states carried from block to block, and statistics taken of them."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.block_run import BlockRun
from bitwright.calibration.input_groups import Group, Mixture, groups_of
from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.observe import observe
from bitwright.calibration.observe_experts import statistics_in_order
from bitwright.calibration.ranges import Histogram, together
from bitwright.calibration.windows import Drawn, draw, load_tokenizer
from bitwright.errors import CalibrationError, CheckpointError, RecipeError
from bitwright.models.decoded_source import FloatCheckpoint
from bitwright.models.kv_cache import KvCache
from bitwright.models.skeleton import TOKENS_PER_BATCH, Skeleton, batches
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.pipeline.statistics_store import BlockStatistics, Store, code_version
from bitwright.plan.planned_tensor import LEFT_OUT, TAKEN_AS, PlannedTensor
from bitwright.plan.recipe import Recipe
from bitwright.plan.run_plan import Plan
from bitwright.system import distributed
from bitwright.system.progress import Progress
from bitwright.system.threads import each
from bitwright.transforms.folds import Fold, find_folds


@dataclass
class HiddenStates:
    """Inputs of the next block, in batches [B, T, H].

    given                from the quantized blocks before it
    original             from the float blocks; None where no method needs them
    held, held_original  the same for the held-out windows
    """

    given: list[Tensor]
    original: list[Tensor] | None
    held: list[Tensor]
    held_original: list[Tensor] | None

    def whole(self) -> dict[str, Tensor]:
        """The same as one tensor each [S, T, H], by name; empty ones are left out. Of several processes the first has all of
        their windows, in order, the others nothing."""
        found = {}
        for field in fields(self):
            batches = getattr(self, field.name)
            if batches is not None:
                own = torch.cat(batches).cpu() if batches else torch.zeros(0)
                if (all_of_it := distributed.to_first(own)) is not None and len(all_of_it):
                    found[field.name] = all_of_it
        return found


def own_share(tokens: Drawn) -> Drawn:
    """The windows that this process passes through the model, of several that work together."""
    return replace(tokens, seen=distributed.share(tokens.seen), held_out=distributed.share(tokens.held_out))


def first_hidden_states(plan: Plan, tokens: Drawn, saved: Mapping[str, Tensor] | None, first: int = 0) -> HiddenStates:
    """Inputs of the first block to do: from the embedding, or as saved for block `first` by the run that is resumed.

    The outer parameters are loaded meanwhile, since a run through them records how the blocks are called.
    """
    skeleton = plan.skeleton
    outside = {t.parameter: t for t in plan.tensors if t.block is None and t.action != LEFT_OUT}
    base = [name for name in skeleton.outer_names(base_only=True) if name in outside]
    weights = {name: _read(plan, outside[name]) for name in base}
    skeleton.load(weights if plan.rotation is None else plan.rotation.outer(weights))
    tuned = plan.recipe.windows_at_once
    steps = list(tokens.seen.split(tuned)) if tuned else []
    for ids in {len(ids): ids for ids in [tokens.seen[:1], *steps]}.values():
        skeleton.embed(ids)
    seen, held_out = (batches(ids, TOKENS_PER_BATCH) for ids in (tokens.seen, tokens.held_out))
    given, held = ([skeleton.embed(ids) for ids in parts if len(ids)] for parts in (seen, held_out))
    if saved is None:
        states = HiddenStates(given, None, held, None)
        if plan.recipe.needs_original:
            states = HiddenStates(given, list(given), held, list(held))
    else:
        if skeleton.hands_on:
            _run_through(plan, first, given[0][:1])
        moved = {name: whole.to(skeleton.device) for name, whole in saved.items()}
        parts = {name: list(whole.split(len(seen[0]))) if len(whole) else [] for name, whole in moved.items()}
        states = HiddenStates(parts["given"], parts.get("original"), parts.get("held", []), parts.get("held_original"))
    skeleton.unload_outside()
    return states


def _run_through(plan: Plan, first: int, hidden: Tensor) -> None:
    """Run the blocks before `first`, so that the skeleton knows what they hand on; hidden: what the first of all is given."""
    for index in range(first):
        plan.skeleton.load(read_block(plan, index) | read_lent(plan, index))
        hidden = plan.skeleton.run(index, hidden)
        plan.skeleton.unload(index)


def calibration_tokens(plan: Plan, calib: str, seed: int, *, spare: int | None = None) -> Drawn:
    """The calibration windows of one or several texts (see text_mix.py), with the plan's notes and those on texts too short.

    spare: how many more windows are held out; None: as many as judge methods
    """
    if calib == "none":
        remedy = "give --calib a text; or use search, rtn or hqq, with activations by token, keys and values in float"
        message = f"no calibration, and {', '.join(_needing(plan.recipe))} cannot do without"
        raise CalibrationError(message, remedy=remedy)
    vocabulary = plan.skeleton.config.get_text_config().vocab_size
    tokenizer, spare = load_tokenizer(plan.source), held_out_windows(plan.samples) if spare is None else spare
    drawn = draw(
        tokenizer, calib, samples=plan.samples, seqlen=plan.seqlen, vocabulary=vocabulary, seed=seed, spare=spare
    )
    return replace(drawn, notes=plan.notes + drawn.notes)


def _needing(recipe: Recipe) -> list[str]:
    """What of a recipe needs a text: methods, fixed ranges of inputs, keys and values."""
    rules = [rule for rule in recipe.active if rule.needs_calibration]
    named = {f"inputs in {rule.activations}" if rule.static else rule.name for rule in rules}
    kept = [] if recipe.kv_cache is None else [f"keys and values in {recipe.kv_cache}"]
    return [*sorted(named), *kept]


def held_out_windows(samples: int) -> int:
    """How many windows are held out beside `samples` calibration windows."""
    return min(8, max(2, samples // 16))


def check_rotation(plan: Plan) -> None:
    """RecipeError if the model's first block does not commute with the plan's rotation; computed in float32.

    (In bfloat16 a rotated block differs from the plain one by some percent, by rounding alone.)
    """
    if plan.rotation is None:
        return
    skeleton = Skeleton(plan.skeleton.config, torch.float32)
    ids = torch.arange(min(64, plan.seqlen))[None] % skeleton.config.get_text_config().vocab_size
    plain = replace(plan, rotation=None, skeleton=skeleton)
    states = first_hidden_states(plain, Drawn(ids, ids[:0]), None)
    plan.rotation.check(skeleton, read_block(plain, 0), states.given[0])


def observe_block(
    plan: Plan, index: int, layers: Mapping[str, PlannedTensor], given: list[Tensor], *, everything: bool
) -> BlockStatistics:
    """Statistics of all inputs of block `index`, whose float weights must be loaded, its folds, and its KV cache's ranges.

    everything: all statistics that any method may need, rather than those that this plan's methods need.
    """
    recipe, skeleton = plan.recipe, plan.skeleton
    seen = (Histogram(), Histogram())
    cache = KvCache(seen) if everything or recipe.kv_cache else None
    turned = rotations(layers)
    run = BlockRun(skeleton, index, input_quantizations=turned, cache=cache)
    folds = list[Fold]()
    if everything or recipe.needs_folds:
        with skeleton.quantizing_inputs(turned):
            folds = distributed.from_first(lambda: find_folds(skeleton, index, given[0][:1]))
    inputs = list(_inputs(run, layers, given, detailed=everything or recipe.needs_details))
    heard = (together(seen[0]), together(seen[1])) if cache is not None and cache.used else None
    if heard is None and recipe.kv_cache is not None:
        message = f"models of type {skeleton.config.model_type!r} do not hand their keys and values to a cache"
        raise RecipeError(message, where="kv_cache", remedy="leave out --kv-cache")
    return BlockStatistics(inputs, folds, heard)


def inputs_in_order(
    plan: Plan, index: int, layers: Mapping[str, PlannedTensor], given: list[Tensor]
) -> Iterator[Inputs]:
    """Statistics of all inputs of block `index`, whose float weights must be loaded, that this plan's methods need: those of
    an expert when they are asked for, since those of all would fill the memory."""
    run = BlockRun(plan.skeleton, index, input_quantizations=rotations(layers))
    return _inputs(run, layers, given, detailed=plan.recipe.needs_details)


def _inputs(
    run: BlockRun, layers: Mapping[str, PlannedTensor], given: list[Tensor], *, detailed: bool
) -> Iterator[Inputs]:
    """Statistics of all inputs of a block, those of experts one after the other."""
    alone = BlockRun(run.skeleton, run.index, input_quantizations=run.input_quantizations)
    groups = distributed.from_first(lambda: groups_of(alone, given[0][:1], layers))
    yield from observe(run, given, [g for g in groups if isinstance(g, Group)], detailed=detailed)
    for mixture in (g for g in groups if isinstance(g, Mixture)):
        yield from statistics_in_order(run, given, mixture, detailed=detailed)


def rotations(layers: Mapping[str, PlannedTensor]) -> dict[str, InputQuantization]:
    """Online rotations by module name, for modules whose weights expect rotated inputs."""
    return {
        name: InputQuantization(rotate=t.layer.rotate)
        for name, t in layers.items()
        if t.layer is not None and t.layer.rotate
    }


def one_shot(plan: Plan, folder: Path, tokens: Tensor, progress: Progress) -> Store:
    """The float model's statistics in `folder`; those that are missing are taken now.

    Errors as of `Store`; CheckpointError for a weight that is not finite.
    """
    store = Store(folder, key_of(plan, tokens))
    depth = len(plan.skeleton)
    store.check(depth)
    first = next((i for i in range(depth) if not store.has(i)), depth)
    if first == depth:
        return store
    only = Drawn(tokens, tokens[:0])
    states = first_hidden_states(plan, only, {"given": store.hidden(first)} if first else None, first)
    for index in range(first, depth):
        progress("statistics", index, depth)
        layers = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
        plan.skeleton.load(read_block(plan, index) | read_lent(plan, index))
        statistics = observe_block(plan, index, layers, states.given, everything=True)
        if index + 1 < depth:
            with plan.skeleton.quantizing_inputs(rotations(layers)):
                states.given = [plan.skeleton.run(index, batch) for batch in states.given]
            store.keep_hidden(index + 1, torch.cat(states.given))
        store.write(index, statistics)  # commits the block, so the next one's inputs must be saved before
        plan.skeleton.unload(index)
    progress("statistics", depth, depth)
    return store


def key_of(plan: Plan, tokens: Tensor) -> dict[str, Any]:
    """The key of a store: what statistics of the float model depend on."""
    tokenizer = [p.read_bytes() for p in sorted(plan.source.glob("tokenizer*")) if p.is_file()]
    return {
        "model": [plan.checkpoint.fingerprint(), digest(repr(_described(plan.skeleton.config.to_dict())).encode())]
        + ([] if plan.adapter is None else [plan.adapter.digest]),
        "text": [list(tokens.shape), digest(tokens.numpy().tobytes())],
        "tokenizer": digest(b"".join(tokenizer)),
        "code or precision": [code_version(), torch.__version__, str(plan.skeleton.dtype), plan.skeleton.device.type],
        "rotation": None if plan.rotation is None else asdict(plan.rotation),
        "choice of matrices": digest(repr(sorted(t.layer.name for t in plan.tensors if t.layer)).encode()),
    }


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the type that a skeleton computes in, which the method decides."""
    kept = {key: value for key, value in sorted(config.items(), key=str) if key not in ("dtype", "torch_dtype")}
    return {key: _described(value) if isinstance(value, dict) else value for key, value in kept.items()}


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def read_block(plan: Plan, index: int) -> dict[str, Tensor]:
    """The parameters of shard `index` by name, on the plan's device, rotated if the plan says so."""
    members, device = plan.shard(index), plan.skeleton.device
    found = each(lambda t: _read(plan, t), members)
    weights = {t.parameter: tensor.to(device) for t, tensor in zip(members, found, strict=True)}
    if plan.rotation is None:
        return weights
    if index == len(plan.skeleton):
        return plan.rotation.outer(weights)
    return plan.rotation.block(weights, f"{plan.skeleton.block_prefix}.{index}.")


def read_lent(plan: Plan, index: int) -> dict[str, Tensor]:
    """The parameters that block `index` shares with others, which stay in float, by name."""
    tensors = {t.parameter: t for t in plan.tensors}
    return {name: _read(plan, tensors[name]) for name in plan.skeleton.lent_names(index)}


def _read(plan: Plan, t: PlannedTensor) -> Tensor:
    """A parameter of the source, with what the plan's adapter adds to it."""
    weight = read_finite(plan.checkpoint, t.made_of or t.source)
    return weight if plan.adapter is None else plan.adapter.applied(plan.skeleton, t.parameter, weight)


def read_finite(checkpoint: FloatCheckpoint, name: str) -> Tensor:
    """A tensor of the source, as it is taken (`TAKEN_AS`); CheckpointError if it holds NaN or Inf."""
    tensor = checkpoint.read(name)
    tensor = tensor.to(TAKEN_AS.get(tensor.dtype, tensor.dtype))
    if tensor.is_floating_point() and not _finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        message = f"tensor {name!r} has {bad} values that are NaN or Inf"
        raise CheckpointError(
            message, where=str(checkpoint.folder), remedy="the checkpoint is damaged: get a good copy"
        )
    return tensor


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, by the extremes alone: a NaN is both of them."""
    if not tensor.numel():
        return True
    low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
