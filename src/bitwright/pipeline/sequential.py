"""Quantize a block in the order of its forward: observe an input, quantize the matrices that read it, go on behind them.

Every matrix thus gets statistics of the inputs that it will really have in the quantized model, within the block too ("true
sequential" in GPTQ's code). One pass over the calibration tokens for each input, up to it, less what known_outputs.py spares;
memory is one input's statistics, and what is kept for that.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.calibration.block_run import BlockRun
from bitwright.calibration.input_groups import Group, groups_of
from bitwright.calibration.observe import KEPT_BYTES, FloatStream
from bitwright.calibration.observe_experts import statistics_in_order
from bitwright.models.kv_cache import KvCache, KvRounding
from bitwright.models.skeleton import Skeleton, as_source
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import HiddenStates, rotations
from bitwright.pipeline.guard import BETTER_BLOCK, NEGLIGIBLE, PLAINER, block_error
from bitwright.pipeline.quantize_together import Origin, Rounded, quantize_together
from bitwright.pipeline.tune_block import tune_block
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.run_plan import Plan
from bitwright.system import distributed


def quantize_in_order(
    plan: Plan,
    index: int,
    layers: Mapping[str, PlannedTensor],
    weights: dict[str, Tensor],
    states: HiddenStates,
    kv: KvRounding | None,
    origin: Origin,
) -> list[Rounded]:
    """Quantize the matrices `layers` of block `index`, whose float weights must be loaded; move the hidden states on.

    The float model's hidden states, if there are any, go through the float block, the others through the quantized one.
    """
    skeleton, turned = plan.skeleton, rotations(layers)
    cache = KvCache(rounding=kv) if kv else None
    floats = BlockRun(skeleton, index, input_quantizations=turned)
    run, plain = (BlockRun(skeleton, index, input_quantizations=dict(turned), cache=cache) for _ in range(2))
    run.known.limit = 0 if cache or skeleton.hands_on else KEPT_BYTES  # a module that gives others more must run
    groups = distributed.from_first(lambda: groups_of(floats, states.given[0][:1], layers))
    original = None if states.original is None else FloatStream(floats, states.original, groups)
    done, searched = list[Rounded](), list[Rounded]()
    held = int(distributed.total(torch.tensor(len(states.held))))
    guarded = held > 0 and any(by_search(t) is not t for t in layers.values())
    for group in groups:
        detailed = plan.recipe.needs_details
        for inputs in statistics_in_order(run, states.given, group, original, by_residual=True, detailed=detailed):
            members = [layers[name] for name in inputs.names]
            new = quantize_together(plan, members, weights, inputs, origin)
            take(run, skeleton, new)
            done += new
            if guarded:
                searched += quantize_together(plan, [by_search(t) for t in members], weights, inputs, origin)
        if isinstance(group, Group) and group.within is not None:
            run.settle(group.within)
            floats.settle(group.within)
    if original is not None and states.original is not None:
        original.move_on()
        tuned = tune_block(plan, index, done, weights, states.given, states.original)
        if tuned is not done:  # tuning has used the block's own weights
            done = tuned
            run.known.clear()
            skeleton.load(weights)
            take(run, skeleton, done)
    wanted = [floats(batch) for batch in (states.held if states.held_original is None else states.held_original)]
    if guarded:
        take(plain, skeleton, searched)
        done, run = better((done, run), (searched, plain), states.held, wanted)
    if index + 1 < len(skeleton) + plan.calibrates_embeddings:
        states.given[:] = [run(batch) for batch in states.given]
        states.held[:] = [run(batch) for batch in states.held]
        states.held_original = wanted if states.held_original is not None else None
    return done


def by_search(t: PlannedTensor) -> PlannedTensor:
    """The same plan with a search of scales as its method; unchanged if its method is RTN or search."""
    assert t.rule is not None
    return t if t.rule.method in PLAINER else replace(t, rule=replace(t.rule, method="search", options={}))


def take(run: BlockRun, skeleton: Skeleton, new: list[Rounded]) -> None:
    """Have a block run on these matrices, decoded, with their inputs quantized as the engine will do it."""
    for r in new:
        assert r.planned.layer is not None
        matrix = decode(r.q).to(r.planned.dtype)
        run.weights[r.planned.parameter] = as_source(skeleton, r.planned.layer.name, matrix)
        run.input_quantizations = {**run.input_quantizations, r.planned.layer.name: r.input_quantization}


def better(
    asked: tuple[list[Rounded], BlockRun],
    plainer: tuple[list[Rounded], BlockRun],
    held: list[Tensor],
    wanted: list[Tensor],
) -> tuple[list[Rounded], BlockRun]:
    """The block by the methods asked for, or by a search of scales if that has a lower output error on held-out windows.

    held: the block's inputs for those windows; wanted: the float block's outputs on them or, for methods that compare with
    the float model, on the float model's activations.
    """
    (done, run), (searched, plain) = asked, plainer
    stream = run.skeleton.stream
    meant = [stream(batch) for batch in wanted]
    error = block_error(lambda batch: stream(run(batch)), held, meant)
    error_search = block_error(lambda batch: stream(plain(batch)), held, meant)
    if distributed.from_first(lambda: error > NEGLIGIBLE and error_search < BETTER_BLOCK * error):
        why = f"on windows that it did not see the block's output is {error:.3g} off, by search {error_search:.3g}"
        done = [_instead(old, new, why) for old, new in zip(done, searched, strict=True)]
        run, error = plain, error_search
    marked = [replace(r, entry=replace(r.entry, block_error=error, block_error_search=error_search)) for r in done]
    return marked, run


def _instead(old: Rounded, new: Rounded, why: str) -> Rounded:
    """The entry of a matrix by search instead of the method asked for, with the reason as its fallback."""
    if old.entry.method == new.entry.method:
        return old
    why = f"{old.entry.method} -> {new.entry.method}: {why}"
    return replace(new, entry=replace(new.entry, fallback="; ".join(filter(None, (new.entry.fallback, why)))))
