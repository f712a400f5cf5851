"""Quantize one matrix by its rule's method and measure its loss; slab by slab of rows where rows are independent."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.kernels.rounding import error_energy
from bitwright.methods import ASYMMETRIC, CALIBRATED, METHODS, Outcome, rtn
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import energy
from bitwright.numerics.qtensor import Outliers, QTensor, rows, stacked
from bitwright.numerics.scheme import Scheme
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.sparsity import Pruned
from bitwright.system import distributed
from bitwright.system.device import CPU
from bitwright.system.threads import each
from bitwright.transforms import Outlier

AT_ONCE = 1 << 24  # weights whose errors are computed at a time
SLAB = 1 << 21  # weights quantized at a time: enough for the call's cost, in little memory
SAMPLED_ROWS = 64  # least rows on which methods are compared


@dataclass(frozen=True)
class RoundedMatrix:
    """A method's outcome for a matrix; the energy of its rows and of their errors, [N] float64."""

    outcome: Outcome
    whole: Tensor
    lost: Tensor

    def to(self, device: torch.device) -> "RoundedMatrix":
        """The same on another device."""
        outcome = replace(self.outcome, q=self.outcome.q.to(device), energies=None)
        return RoundedMatrix(outcome, self.whole.to(device), self.lost.to(device))


def quantize_matrix(
    dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None = None
) -> RoundedMatrix:
    """Quantize w [N, K] of any float type by the rule's method; dtype: the type of large products.

    pruned: w with zeros, which stay: methods with error feedback (`CALIBRATED`) have the other weights make up for them, all
    others round the pruned matrix. Losses are relative to w itself.
    Where rows are independent, slabs of rows are quantized side by side, so that an embedding is never copied to float32
    as a whole.
    """
    assert t.layer is not None and t.rule is not None
    if t.layer.order is not None:
        return _in_order(t.layer.order, dtype, t, w, inputs, pruned)
    if inputs.correlated or not t.layer.scheme.rowwise or t.rule.transform(Outlier) is not None:
        return _fit_at_once(dtype, t, w.float(), inputs, pruned)
    step = max(1, SLAB // w.shape[1])
    any_float = t.rule.method == "search"

    def fit(at: int) -> RoundedMatrix:
        slab, zeros = w[at : at + step], None if pruned is None else pruned.rows(at, at + step)
        return _fit_at_once(dtype, t, slab if any_float else slab.float(), inputs, zeros)

    return _joined(each(fit, range(0, len(w), step)))


def quantize_by_shares(
    dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None = None
) -> RoundedMatrix:
    """`quantize_matrix` by all processes that work together: where rows are independent, each has its share of them."""
    assert t.layer is not None and t.rule is not None
    shared = t.layer.scheme.rowwise and t.rule.transform(Outlier) is None and len(w) >= distributed.count() > 1
    if not shared:
        return quantize_matrix(dtype, t, w, inputs, pruned)
    share = distributed.share
    zeros = None if pruned is None else Pruned(share(pruned.weight), share(pruned.mask))
    ahead = None if inputs.residual is None else share(inputs.residual)
    own = quantize_matrix(dtype, t, share(w), replace(inputs, residual=ahead), zeros)
    return _joined(distributed.everyone(own.to(CPU))).to(w.device)


def _joined(parts: list[RoundedMatrix]) -> RoundedMatrix:
    """Matrices below each other as one, of one scheme, K and order."""
    if len(parts) == 1:
        return parts[0]
    q = replace(stacked([part.outcome.q for part in parts]), order=parts[0].outcome.q.order)
    return RoundedMatrix(
        replace(parts[0].outcome, q=q, energies=None),
        torch.cat([p.whole for p in parts]),
        torch.cat([p.lost for p in parts]),
    )


def _in_order(
    order: Tensor, dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None
) -> RoundedMatrix:
    """`quantize_matrix` with the columns as they are stored, by which scales go."""
    assert t.layer is not None
    straight = replace(t, layer=replace(t.layer, heads=(1, 1)))
    zeros = None if pruned is None else Pruned(pruned.weight[:, order], pruned.mask[:, order])
    done = quantize_matrix(dtype, straight, w[:, order], inputs.reordered(order), zeros)
    return replace(done, outcome=replace(done.outcome, q=replace(done.outcome.q, order=order)))


def quantize_matrix_by(
    method: str, dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None = None
) -> RoundedMatrix:
    """`quantize_matrix` by another method than the rule's, without options."""
    assert t.rule is not None
    return quantize_matrix(dtype, replace(t, rule=replace(t.rule, method=method, options={})), w, inputs, pruned)


def _fit_at_once(
    dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None
) -> RoundedMatrix:
    outcome, metric = _outcome(dtype, t, w, inputs, pruned), metric_of(dtype, inputs)
    if metric is None or not inputs.correlated:
        known = outcome.energies if pruned is None else None  # a method's own are those of what it was given
        lost, whole = known or error_energy(w.float(), outcome.q, metric)
        return RoundedMatrix(outcome, whole, lost)
    fast = metric.dtype  # bfloat16 gives three digits of the loss: enough
    return RoundedMatrix(outcome, energy(w.to(fast), metric), _lost(w, outcome.q, metric, fast))


def _lost(w: Tensor, q: QTensor, metric: Tensor | None, fast: torch.dtype) -> Tensor:
    """The energy of each row's error, some rows at a time to save memory."""
    if not q.scheme.rowwise or q.outliers is not None:
        return energy((w - decode(q)).to(fast), metric)
    step = max(1, AT_ONCE // w.shape[1])
    parts = ((w[at : at + step], rows(q, at, min(at + step, len(w)))) for at in range(0, len(w), step))
    return torch.cat([energy((part - decode(own)).to(fast), metric) for part, own in parts])


def metric_of(dtype: torch.dtype, inputs: Inputs) -> Tensor | None:
    """The Gram (or its diagonal) for losses; a full one in `dtype`."""
    return inputs.gram.to(dtype) if inputs.gram is not None and inputs.correlated else inputs.gram


def _outcome(dtype: torch.dtype, t: PlannedTensor, w: Tensor, inputs: Inputs, pruned: Pruned | None = None) -> Outcome:
    """The rule's method on (stacked) matrices; outlier channels are taken out first, and stay in float."""
    rule, layer = t.rule, t.layer
    assert rule is not None and layer is not None
    options: dict[str, Any] = {"fast": dtype == torch.bfloat16} if rule.method in CALIBRATED else {}
    if pruned is not None and rule.method in CALIBRATED:
        options["pruned"] = pruned.mask
    elif pruned is not None:
        w = pruned.weight
    separate = rule.transform(Outlier)
    if not isinstance(separate, Outlier):
        options |= _compared(inputs) if rule.method in ASYMMETRIC else {}
        return METHODS[rule.method](w, inputs.gram, layer.scheme, **(options | rule.options))
    assert inputs.mean is not None  # details are gathered for rules with outlier channels
    columns = separate.columns(w, inputs.peak, inputs.mean)
    rest = inputs.without(columns)
    options |= _compared(rest) if rule.method in ASYMMETRIC else {}
    outcome = METHODS[rule.method](w.index_fill(1, columns, 0), rest.gram, layer.scheme, **(options | rule.options))
    kept = w[:, columns].to(t.dtype).float()
    return replace(outcome, q=replace(outcome.q, outliers=Outliers(columns, kept)))


def _compared(inputs: Inputs) -> dict[str, Any]:
    """The options `drift` and `residual` of the methods in `ASYMMETRIC`."""
    return {"drift": inputs.drift, "residual": inputs.residual}


def rtn_lost(w: Tensor, scheme: Scheme, metric: Tensor | None) -> Tensor:
    """The energy of each row's error by RTN, [N] float64."""
    w = w.float()
    q = rtn(w, None, scheme).q
    if metric is None or metric.ndim == 1:
        return error_energy(w, q, metric)[0]
    return energy((w - decode(q)).to(metric.dtype), metric)
