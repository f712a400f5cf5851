"""Quantize the matrices of a block that share an input, and record what it cost."""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.ranges import static_scales
from bitwright.errors import BitwrightError, CalibrationError, VerificationError
from bitwright.methods import BLOCKWISE, Outcome
from bitwright.models.layers import matrix_of
from bitwright.numerics.codec import decode
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.loss import energy, ratio
from bitwright.numerics.qtensor import QTensor, rows
from bitwright.pipeline.guard import judge
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.quantize_matrix import RoundedMatrix, quantize_by_shares, quantize_matrix_by
from bitwright.plan.planned_tensor import ADDED, KEPT, PlannedTensor
from bitwright.plan.run_plan import Plan
from bitwright.sparsity import Pruned
from bitwright.system import distributed


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix with its plan and ledger entry; the Gram of its inputs, if the block will be tuned; how the engine
    quantizes its inputs; and the mask [N, K] of its pruned weights, if there are any.
    """

    planned: PlannedTensor
    q: QTensor
    entry: Entry
    gram: Tensor | None = None
    input_quantization: InputQuantization | None = None
    gone: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Relative losses of a matrix: of what was taken; on a sample of the rows, of RTN and of a search of scales."""

    own: float
    rtn: float
    search: float | None


@dataclass(frozen=True)
class Origin:
    """What the ledger records of a block's statistics and transforms.

    statistics: "sequential" (inputs from the quantized blocks before) or "one-shot" (from the float model);
    transforms: what was done to each matrix before rounding, by module name.
    """

    statistics: str = "sequential"
    transforms: Mapping[str, str] = field(default_factory=dict)


def quantize_together(
    plan: Plan, members: list[PlannedTensor], weights: dict[str, Tensor], inputs: Inputs, origin: Origin
) -> list[Rounded]:
    """Quantize matrices that share an input; those of one rule are stacked and rounded as one where the scheme allows."""
    piles: dict[tuple[object, ...], list[PlannedTensor]] = defaultdict(list)
    for t in members:
        assert t.layer is not None and t.rule is not None
        apart = () if t.layer.scheme.rowwise else (t.source,)
        piles[
            (
                t.layer.scheme,
                t.layer.activations,
                t.layer.heads,
                t.rule.name,
                str(t.rule.describe()["options"]),
                str(t.rule.prune),
                *apart,
            )
        ].append(t)
    return [rounded for pile in piles.values() for rounded in _quantize_pile(plan, pile, weights, inputs, origin)]


def _quantize_pile(
    plan: Plan, pile: list[PlannedTensor], weights: dict[str, Tensor], inputs: Inputs, origin: Origin
) -> list[Rounded]:
    """One call of the method on the stacked matrices, then the rows apart again, with RTN's loss beside each loss."""
    begun = time.monotonic()
    matrices = [_matrix(plan, t, weights[t.parameter]) for t in pile]
    w = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    try:
        zeros = [_pruned(t, matrix, inputs) for t, matrix in zip(pile, matrices, strict=True)]
        fit = quantize_by_shares(plan.skeleton.dtype, pile[0], w, inputs, _stacked(zeros))
        input_quantization = _input_quantization(pile[0], inputs, fit.outcome.q)
    except BitwrightError as error:
        error.where = error.where or pile[0].parameter
        raise
    seconds = (time.monotonic() - begun) / w.numel()
    done, at = [], 0
    for t, matrix, pruned in zip(pile, matrices, zeros, strict=True):
        here = slice(at, at + len(matrix))
        at += len(matrix)
        q = fit.outcome.q if len(pile) == 1 else rows(fit.outcome.q, here.start, here.stop)
        t = _with_outliers(t, q)
        own = RoundedMatrix(replace(fit.outcome, q=q), fit.whole[here], fit.lost[here])
        taken, method, losses = _better(plan, t, matrix, inputs, own, pruned)
        _check_zeros(t, taken.outcome.q, pruned)
        loss = Losses(ratio(taken.lost, taken.whole), losses["rtn"], losses.get("search"))
        spent = round(seconds * matrix.numel(), 4)
        entry = _entry(plan, t, taken.outcome, method, loss, inputs, spent, origin)
        assert t.rule is not None
        gram = inputs.gram if t.rule.method in BLOCKWISE else None
        gone = None if pruned is None else pruned.mask
        done.append(Rounded(t, taken.outcome.q, entry, gram, input_quantization, gone))
    return done


def _pruned(t: PlannedTensor, matrix: Tensor, inputs: Inputs) -> Pruned | None:
    """The matrix pruned as its rule says, by all processes that work together where rows are independent; None: it is not."""
    assert t.rule is not None
    prune = t.rule.prune
    if prune is None or not (prune.rowwise and len(matrix) >= distributed.count() > 1):
        return None if prune is None else prune(matrix, inputs.gram)
    own = prune(distributed.share(matrix), inputs.gram)
    weights, masks = zip(*distributed.everyone((own.weight.cpu(), own.mask.cpu())), strict=True)
    return Pruned(torch.cat(weights).to(matrix.device), torch.cat(masks).to(matrix.device), own.damping)


def _stacked(zeros: list[Pruned | None]) -> Pruned | None:
    """Pruned matrices of one pile as one, or None."""
    known = [pruned for pruned in zeros if pruned is not None]
    return Pruned(torch.cat([p.weight for p in known]), torch.cat([p.mask for p in known])) if known else None


def _check_zeros(t: PlannedTensor, q: QTensor, pruned: Pruned | None) -> None:
    """VerificationError if a pruned weight is not zero any more."""
    lost = 0 if pruned is None else int(decode(q)[pruned.mask].count_nonzero())
    if lost:
        remedy = "this is a defect of bitwright: please report it with the command"
        raise VerificationError(f"{lost} pruned weights are not zero after rounding", where=t.source, remedy=remedy)


def _better(
    plan: Plan, t: PlannedTensor, matrix: Tensor, inputs: Inputs, fit: RoundedMatrix, pruned: Pruned | None
) -> tuple[RoundedMatrix, str, dict[str, float]]:
    """The result of the rule's method, or of a plainer one that loses less (see guard.py); its name, and the losses of all."""
    assert t.rule is not None
    asked, dtype = t.rule.method, plan.skeleton.dtype
    judged = judge(dtype, t, matrix, fit.outcome.q, inputs, pruned)
    if judged.best == asked:
        return fit, asked, judged.losses
    better = quantize_matrix_by(judged.best, dtype, t, matrix, inputs, pruned)
    first, second = (f"{name} loses {judged.losses[name]:.3g}" for name in (asked, judged.best))
    why = f"{asked} -> {judged.best}: on the same statistics {first} of the output, {second}"
    return replace(better, outcome=replace(better.outcome, fallback=why)), judged.best, judged.losses


def _input_quantization(t: PlannedTensor, inputs: Inputs, q: QTensor) -> InputQuantization | None:
    """How the engine will quantize the inputs of these matrices; None: it will not."""
    layer, rule = t.layer, t.rule
    assert layer is not None and rule is not None
    columns = None if q.outliers is None else q.outliers.columns
    scales = None
    if rule.static and layer.activations is not None:
        known = inputs if columns is None else inputs.without(columns)
        if known.histogram is None:
            remedy = "give --calib general, or dynamic activations such as --activations int8-token"
            raise CalibrationError("a fixed range of the inputs needs calibration", remedy=remedy)
        scales = static_scales(known.histogram, layer.activations, observer=rule.observer)
    if layer.activations is None and not layer.rotate:
        return None
    return InputQuantization(layer.activations, scales, columns, layer.rotate)


def _with_outliers(t: PlannedTensor, q: QTensor) -> PlannedTensor:
    """The plan with the number of channels in float as it turned out."""
    assert t.layer is not None
    count = 0 if q.outliers is None else len(q.outliers.columns)
    return t if count == t.layer.outliers else replace(t, layer=replace(t.layer, outliers=count))


def relative_loss(plan: Plan, w: Tensor, q: QTensor, gram: Tensor | None) -> float:
    """The loss of one matrix as the ledger records it."""
    fast = w.dtype if gram is None else plan.skeleton.dtype
    metric = None if gram is None else gram.to(fast)
    return ratio(energy((w - decode(q)).to(fast), metric), energy(w.to(fast), metric))


def float_matrix(plan: Plan, t: PlannedTensor, weight: Tensor) -> Tensor:
    """The weight as [N, K] float32."""
    return _matrix(plan, t, weight).float()


def _matrix(plan: Plan, t: PlannedTensor, weight: Tensor) -> Tensor:
    """The weight as [N, K]."""
    assert t.layer is not None
    return matrix_of(plan.skeleton.model.get_submodule(t.layer.name), weight)


def _entry(
    plan: Plan,
    t: PlannedTensor,
    outcome: Outcome,
    method: str,
    loss: Losses,
    inputs: Inputs,
    seconds: float,
    origin: Origin,
) -> Entry:
    """The ledger entry of a matrix quantized by `method`."""
    assert t.layer is not None and t.rule is not None
    observed = inputs.tokens + inputs.borrowed
    dtype, fallback = str(t.dtype).removeprefix("torch."), "; ".join(filter(None, (t.layer.fallback, outcome.fallback)))
    return Entry(
        t.source,
        t.shape,
        dtype,
        t.action,
        t.reason,
        str(t.layer.scheme),
        method,
        loss.own,
        loss.rtn,
        outcome.damping,
        inputs.tokens,
        seconds,
        fallback,
        stored_bytes(plan, t),
        str(t.layer.activations or ""),
        origin.transforms.get(t.layer.name, ""),
        origin.statistics if observed else "",
        t.layer.outliers,
        loss.search,
        arithmetic=str(plan.skeleton.dtype).removeprefix("torch.") if observed else "",
        borrowed=inputs.borrowed,
        source=t.stored_as,
        sparsity=round(t.layer.pruned / (t.layer.N * t.layer.K), 4),
        pruning=str(t.rule.prune or ""),
    )


def kept_entry(plan: Plan, t: PlannedTensor, *, changed: bool = False) -> Entry:
    """The ledger entry of a tensor that stays in float or is left out. changed: whether a transform was folded into it."""
    dtype, reason = str(t.dtype).removeprefix("torch."), f"{t.reason}, transformed" if changed else t.reason
    return Entry(
        t.source,
        t.shape,
        dtype,
        t.action,
        reason,
        fallback=t.fallback,
        bytes=stored_bytes(plan, t) if t.action == KEPT else 0,
        source=t.stored_as,
    )


def added_entry(name: str, tensor: Tensor, reason: str) -> Entry:
    """The ledger entry of a tensor that the source did not have."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Entry(name, tuple(tensor.shape), dtype, ADDED, reason, bytes=tensor.nbytes)


def stored_bytes(plan: Plan, t: PlannedTensor) -> int:
    """Bytes of one source tensor in the files."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.specs([t]).values())
