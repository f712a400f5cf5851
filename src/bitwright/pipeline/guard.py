"""The guard: compare every method with a search of scales and with round to nearest (RTN), and replace it where it loses more.

Twice. Each matrix: on the same statistics, by the loss that the method itself minimises. Each block: by its output error
against the float model's, on held-out calibration windows. Where a plainer method loses less it is taken instead, and the
ledger records that as a fallback.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.methods import ASYMMETRIC
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import energy, ratio
from bitwright.numerics.qtensor import QTensor, rows
from bitwright.pipeline.quantize_matrix import SAMPLED_ROWS, metric_of, quantize_matrix_by
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.sparsity import Pruned
from bitwright.system import distributed

PLAINER: dict[str, tuple[str, ...]] = {
    "rtn": (),
    "search": ("rtn",),
}  # the plainer methods that a method is compared with
BOTH = ("rtn", "search")  # for every other method
BETTER = 0.99  # share of a method's loss below which a plainer one replaces it: losses are of a sample of the rows
BETTER_BLOCK = (
    0.95  # the same for a block's error: it is measured on few windows, and at 8 bits most of it is in the inputs
)
FLOOR = 2e-6  # difference of two matrices' losses that is not looked at: about what rounding weights to bfloat16 loses
NEGLIGIBLE = 1e-5  # a block's error below which nothing is replaced: outputs are right to three digits


@dataclass(frozen=True)
class Judgement:
    """Relative loss of a matrix by method, and the method to take."""

    losses: dict[str, float]
    best: str


def judge(
    dtype: torch.dtype, t: PlannedTensor, w: Tensor, q: QTensor, inputs: Inputs, pruned: Pruned | None = None
) -> Judgement:
    """Compare q, what the rule's method made of w [N, K], with plainer methods on a sample of the rows.

    dtype: the type of large products; pruned: the zeros that all of them keep. Without statistics of the inputs nothing is
    replaced.
    """
    assert t.rule is not None
    method = t.rule.method
    step = max(1, len(w) // SAMPLED_ROWS)
    some, metric = w[::step].float(), metric_of(dtype, inputs)
    tried = {method: rows(q, 0, len(w), step)}
    zeros = None if pruned is None else pruned.rows(0, len(w), step)
    for name in PLAINER.get(method, BOTH):
        tried[name] = quantize_matrix_by(name, dtype, t, some, inputs, zeros).outcome.q
    errors = {name: decode(one) - some for name, one in tried.items()}
    whole = _energy(some, metric)
    losses = {name: ratio(_energy(error, metric), whole) for name, error in errors.items()}
    aimed = losses
    if method in ASYMMETRIC and inputs.drift is not None:  # its loss: ‖R + X ŵᵀ − R₀ − X₀ wᵀ‖²
        pull = some @ inputs.drift
        pull = pull if inputs.residual is None else pull + inputs.residual[::step]
        aimed = {name: losses[name] - ratio(2 * (e * pull).sum(1).double(), whole) for name, e in errors.items()}
    best = min(aimed, key=lambda name: aimed[name])
    enough = max(losses[method] * (1 - BETTER), FLOOR)
    replaced = inputs.gram is not None and aimed[best] < aimed[method] - enough
    return distributed.from_first(lambda: Judgement(losses, best if replaced else method))


def _energy(w: Tensor, metric: Tensor | None) -> Tensor:
    return energy(w if metric is None else w.to(metric.dtype), metric)


def block_error(run: Callable[[Tensor], Tensor], given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Relative output error of a block: mean over tokens of ‖y − y₀‖² / ‖y₀‖², so that every token counts alike.

    run: the block, giving hidden states. given: its inputs, in batches [B, T, H]; wanted: the float block's outputs y₀ on the
    float model's activations.
    """
    shares = [torch.zeros(0, dtype=torch.float64)]
    for batch, meant in zip(given, wanted, strict=True):
        meant = meant.float()
        missed = (run(batch).float() - meant).square().sum(-1, dtype=torch.float64)
        shares.append((missed / meant.square().sum(-1, dtype=torch.float64).clamp(min=1e-30)).flatten().cpu())
    every = torch.cat(shares)
    missed, tokens = distributed.total(torch.stack([every.sum(), every.new_tensor(len(every))]))
    return float(missed / tokens)
