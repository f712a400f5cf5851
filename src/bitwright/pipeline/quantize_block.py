"""Quantize one block by what is known of its inputs: hidden states, a store's statistics, an importance matrix, or nothing."""

from torch import Tensor

from bitwright.calibration.ranges import static_scales
from bitwright.formats.format import FLOAT_NAMES
from bitwright.models.kv_cache import KvRounding, rounding
from bitwright.pipeline.calibration_pass import HiddenStates, observe_block, read_lent
from bitwright.pipeline.importance import Importance
from bitwright.pipeline.quantize_together import Origin, Rounded, quantize_together
from bitwright.pipeline.sequential import quantize_in_order
from bitwright.pipeline.statistics_store import BlockStatistics, Store
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.run_plan import Plan
from bitwright.transforms.channel_scaling import Target, Transformed, fold_scales
from bitwright.transforms.folds import readers_of


def quantize_block(
    plan: Plan, index: int, weights: dict[str, Tensor], source: HiddenStates | Store | Importance | None
) -> tuple[list[Rounded], KvRounding | None]:
    """Quantize the matrices of block `index`; also how its KV cache is quantized, if it is.

    weights  all parameters of the block by name; those that transforms change are replaced
    source   hidden states, which then go on through the quantized block and the float one; a store of the float model's
             statistics; an importance matrix; None: nothing is known of the inputs
    """
    layers = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
    if isinstance(source, HiddenStates):
        return _by_hidden_states(plan, index, layers, weights, source)
    device = plan.skeleton.device
    if isinstance(source, Store):
        known = source.read(index)
        known.inputs[:] = [one.to(device) for one in known.inputs]
        transformed = _transformed(plan, index, layers, weights, known)
        rounded = _quantize_known(plan, layers, weights, known, Origin("one-shot", transformed.done))
        return rounded, _kv_rounding(plan, known)
    importance, done = source or Importance(), list[Rounded]()
    for t in map(importance.noted, layers.values()):
        done += quantize_together(plan, [t], weights, importance.inputs(t).to(device), Origin())
    return done, None


def _by_hidden_states(
    plan: Plan, index: int, layers: dict[str, PlannedTensor], weights: dict[str, Tensor], states: HiddenStates
) -> tuple[list[Rounded], KvRounding | None]:
    """Quantize a block in the order of its forward, behind its transforms."""
    skeleton, kv, done = plan.skeleton, None, dict[str, str]()
    skeleton.load(weights | read_lent(plan, index))
    if plan.recipe.needs_folds or plan.recipe.kv_cache is not None:
        known = observe_block(plan, index, layers, states.given, everything=False)
        transformed = _transformed(plan, index, layers, weights, known)
        skeleton.load(transformed.weights)
        kv, done = _kv_rounding(plan, known), transformed.done
    rounded = quantize_in_order(plan, index, layers, weights, states, kv, Origin("sequential", done))
    skeleton.unload(index)
    return rounded, kv


def _transformed(
    plan: Plan, index: int, layers: dict[str, PlannedTensor], weights: dict[str, Tensor], known: BlockStatistics
) -> Transformed:
    """Fold channel scales as the rules say: changed parameters are replaced in `weights`, statistics in `known`."""
    made = fold_scales(_targets(layers), weights, known.inputs, known.folds, readers_of(plan.skeleton, index))
    weights |= made.weights
    return made


def _targets(layers: dict[str, PlannedTensor]) -> dict[str, Target]:
    """What channel scaling needs to know of each matrix, by module name."""
    return {
        name: Target(t.layer.scheme, t.layer.activations, t.rule.method != "rtn", t.rule.transforms)
        for name, t in layers.items()
        if t.layer is not None and t.rule is not None
    }


def _quantize_known(
    plan: Plan, layers: dict[str, PlannedTensor], weights: dict[str, Tensor], known: BlockStatistics, origin: Origin
) -> list[Rounded]:
    """Quantize matrices with one-shot statistics, freeing the statistics of each input after use."""
    done: list[Rounded] = []
    while known.inputs:
        one = known.inputs.pop(0)
        done += quantize_together(plan, [layers[name] for name in one.names if name in layers], weights, one, origin)
    return done


def _kv_rounding(plan: Plan, known: BlockStatistics) -> KvRounding | None:
    """How the block's KV cache is quantized; None: it stays in float."""
    scheme = plan.recipe.kv_cache
    if scheme is None or known.kv is None:
        return None
    dtype = next(t.dtype for t in plan.tensors if t.layer is not None)
    stored = scheme.with_scale(FLOAT_NAMES[dtype])
    keys, values = (static_scales(seen, stored, observer=plan.recipe.kv_observer) for seen in known.kv)
    return rounding(stored, (keys, values))
