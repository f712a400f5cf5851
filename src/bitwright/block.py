"""One block: watch its inputs, round its matrices, record what it cost."""

import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitwright.codec import decode
from bitwright.errors import BitwrightError, CalibrationError
from bitwright.fitting import fitted, metric_of, rtn_loss
from bitwright.inputs import Gathering, Inputs
from bitwright.intake import Intake
from bitwright.kv import KvCache
from bitwright.ledger import ADDED, KEPT, Entry
from bitwright.loss import energy, ratio
from bitwright.methods import BLOCKWISE, Outcome
from bitwright.models import Skeleton, matrix_of
from bitwright.planned import Planned
from bitwright.preflight import Plan
from bitwright.qtensor import QTensor, rows
from bitwright.ranges import static_scales


@dataclass(frozen=True)
class Rounded:
    """A matrix after rounding: where it came from, what became of it, its ledger entry; its Gram if it is needed yet, and
    what the engine does to its inputs.
    """

    planned: Planned
    q: QTensor
    entry: Entry
    gram: Tensor | None = None
    intake: Intake | None = None


@dataclass(frozen=True)
class Origin:
    """What the ledger says of a block's statistics and transforms.

    statistics: "sequential" (inputs come from the quantized blocks before) or "one-shot" (from the float model);
    transforms: what was done to each matrix before rounding, by module name.
    """

    statistics: str = "sequential"
    transforms: Mapping[str, str] = field(default_factory=dict)


class Enough(Exception):  # noqa: N818
    """Raised by a hook that has seen what it wanted: what the model would do with it is of no interest."""


class _Watch:
    """Sees what each module of a block is handed, in the float model's run of a batch and then in the quantized one's."""

    def __init__(self, modules: int, *, detailed: bool, expected: int) -> None:
        self.modules, self.detailed, self.expected = modules, detailed, expected
        self.gatherings: dict[str, Gathering] = {}  # by the first of those that are handed the same tensor
        self.seen: dict[str, Tensor] = {}  # in the order of the forward
        self.floats: dict[str, Tensor] = {}
        self.comparing = False

    def __call__(self, name: str, x: Tensor) -> None:
        """Module `name` is handed x."""
        if self.comparing:
            self.floats[name] = x
            return
        if name not in self.seen:  # the first batch tells who shares
            leader = next((other for other, tensor in self.seen.items() if tensor is x), name)
            self.seen[name] = x
            if leader == name:
                self.gatherings[name] = Gathering.of(x, detailed=self.detailed, expected=self.expected)
            self.gatherings[leader].names.append(name)
        if name in self.gatherings:
            self.gatherings[name].update(x, self.floats.pop(name, None))
        if len(self.seen) == self.modules and name == next(reversed(self.seen)):
            raise Enough

    def forget(self) -> None:
        """Let a batch's activations go."""
        self.seen = dict.fromkeys(self.seen, torch.empty(0))
        self.floats.clear()


def observe(
    skeleton: Skeleton,
    index: int,
    hidden: list[Tensor],
    wanted: Collection[str],
    original: list[Tensor] | None = None,
    *,
    detailed: bool = False,
    cache: KvCache | None = None,
) -> list[Inputs]:
    """Run block `index` on all batches; modules that are handed the very same tensor share their statistics.

    original: the float model's activations for the same tokens, if they are to be compared; moved on through the block.
    detailed: ranges, a sample and a histogram beside the Gram. cache: is handed the block's keys and values.
    """
    modules = {name: module for name, module in skeleton.linears(index).items() if name in wanted}
    expected = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
    watch = _Watch(len(modules), detailed=detailed, expected=expected)
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: watch(n, args[0])) for n, m in modules.items()]
    try:
        for b, batch in enumerate(hidden):
            if original is not None:
                watch.comparing = True
                original[b] = skeleton.run(index, original[b])
                watch.comparing = False
            with suppress(Enough), skeleton.caching(cache):
                skeleton.run(index, batch)
            _all_seen(modules.keys() - watch.seen.keys())
            watch.forget()
    finally:
        for hook in hooks:
            hook.remove()
    return [gathering.value() for gathering in watch.gatherings.values()]


def _all_seen(unseen: set[str]) -> None:
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)


def quantize_together(
    plan: Plan, members: list[Planned], weights: dict[str, Tensor], inputs: Inputs, origin: Origin
) -> list[Rounded]:
    """Round matrices that share an input; those of one rule are stacked and rounded as one where the scheme allows."""
    piles: dict[tuple[object, ...], list[Planned]] = defaultdict(list)
    for t in members:
        assert t.layer is not None and t.rule is not None
        apart = () if t.layer.scheme.rowwise else (t.source,)
        piles[(t.layer.scheme, t.layer.activations, t.rule.name, str(t.rule.describe()["options"]), *apart)].append(t)
    return [rounded for pile in piles.values() for rounded in _quantize_pile(plan, pile, weights, inputs, origin)]


def _quantize_pile(
    plan: Plan, pile: list[Planned], weights: dict[str, Tensor], inputs: Inputs, origin: Origin
) -> list[Rounded]:
    """One call of the method on the stacked matrices, then the rows apart again, with RTN's loss beside each loss."""
    begun = time.monotonic()
    matrices = [_matrix(plan, t, weights[t.parameter]) for t in pile]
    w = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    try:
        fit = fitted(plan.skeleton.dtype, pile[0], w, inputs)
        intake = _intake(pile[0], inputs, fit.outcome.q)
    except BitwrightError as error:
        error.where = error.where or pile[0].parameter
        raise
    seconds = (time.monotonic() - begun) / w.numel()
    metric = metric_of(plan.skeleton.dtype, inputs)
    done, at = [], 0
    for t, matrix in zip(pile, matrices, strict=True):
        here = slice(at, at + len(matrix))
        at += len(matrix)
        q = fit.outcome.q if len(pile) == 1 else rows(fit.outcome.q, here.start, here.stop)
        t = _with_outliers(t, q)
        assert t.layer is not None and t.rule is not None
        mine, whole = ratio(fit.lost[here], fit.whole[here]), fit.whole[here]
        losses = (
            mine,
            mine if t.rule.name == "rtn" else rtn_loss(matrix, t.layer.scheme, whole, metric),
        )
        spent = round(seconds * matrix.numel(), 4)
        entry = _entry(plan, t, replace(fit.outcome, q=q), losses, inputs.tokens, spent, origin)
        done.append(Rounded(t, q, entry, inputs.gram if t.rule.method in BLOCKWISE else None, intake))
    return done


def _intake(t: Planned, inputs: Inputs, q: QTensor) -> Intake | None:
    """What the engine will do to the inputs of these matrices."""
    layer, rule = t.layer, t.rule
    assert layer is not None and rule is not None
    columns = None if q.outliers is None else q.outliers.columns
    scales = None
    if rule.static and layer.activations is not None:
        known = inputs if columns is None else inputs.without(columns)
        if known.histogram is None:
            raise CalibrationError("a fixed range of the inputs needs calibration", remedy="give calibration text")
        scales = static_scales(known.histogram, layer.activations, observer=rule.observer)
    if layer.activations is None and not layer.rotate:
        return None
    return Intake(layer.activations, scales, columns, layer.rotate)


def _with_outliers(t: Planned, q: QTensor) -> Planned:
    """What was planned, with as many channels in float as there turned out to be."""
    assert t.layer is not None
    count = 0 if q.outliers is None else len(q.outliers.columns)
    return t if count == t.layer.outliers else replace(t, layer=replace(t.layer, outliers=count))


def relative_loss(plan: Plan, w: Tensor, q: QTensor, gram: Tensor | None) -> float:
    """The loss of one matrix as the ledger records it."""
    fast = w.dtype if gram is None else plan.skeleton.dtype
    metric = None if gram is None else gram.to(fast)
    return ratio(energy((w - decode(q)).to(fast), metric), energy(w.to(fast), metric))


def float_matrix(plan: Plan, t: Planned, weight: Tensor) -> Tensor:
    """The weight as [N, K] float32."""
    return _matrix(plan, t, weight).float()


def _matrix(plan: Plan, t: Planned, weight: Tensor) -> Tensor:
    """The weight as [N, K]."""
    assert t.layer is not None
    return matrix_of(plan.skeleton.model.get_submodule(t.layer.name), weight)


def _entry(
    plan: Plan, t: Planned, outcome: Outcome, losses: tuple[float, float], tokens: int, seconds: float, origin: Origin
) -> Entry:
    """The ledger entry of a quantized matrix."""
    assert t.layer is not None and t.rule is not None
    dtype, fallback = str(t.dtype).removeprefix("torch."), "; ".join(filter(None, (t.layer.fallback, outcome.fallback)))
    return Entry(
        t.source, t.shape, dtype, t.action, t.reason, str(t.layer.scheme), t.rule.method, *losses, outcome.damping,
        tokens, seconds, fallback, stored_bytes(plan, t), str(t.layer.activations or ""),
        origin.transforms.get(t.layer.name, ""), origin.statistics if tokens else "", t.layer.outliers,
    )  # fmt: skip


def kept_entry(plan: Plan, t: Planned, *, changed: bool = False) -> Entry:
    """The ledger entry of a tensor that stays in float, or is left out. changed: a transform has been folded into it."""
    dtype, reason = str(t.dtype).removeprefix("torch."), f"{t.reason}, transformed" if changed else t.reason
    return Entry(t.source, t.shape, dtype, t.action, reason, bytes=stored_bytes(plan, t) if t.action == KEPT else 0)


def added_entry(name: str, tensor: Tensor, reason: str) -> Entry:
    """The ledger entry of a tensor that the source did not have."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Entry(name, tuple(tensor.shape), dtype, ADDED, reason, bytes=tensor.nbytes)


def stored_bytes(plan: Plan, t: Planned) -> int:
    """Bytes that the files hold of one source tensor."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.specs([t]).values())
