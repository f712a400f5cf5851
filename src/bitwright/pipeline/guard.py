"""The guard: no method may do worse than a search of scales, or than round to nearest, without the ledger saying so.

Two plainer methods are tried beside the one that was asked for, twice. Every matrix: on the same statistics, by the loss
that the method itself minimises. Every block: by its output, beside the float model's, on calibration windows that no
method saw. Where a plainer one loses less it is taken, and the ledger says so, as of any fallback.
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

PLAINER: dict[str, tuple[str, ...]] = {"rtn": (), "search": ("rtn",)}  # what a method is held against
BOTH = ("rtn", "search")  # what every other one is
BETTER = 0.99  # of a method's loss is what a plainer one's must be below: a sample of the rows tells it
BETTER_BLOCK = 0.95  # of a block's error: a few windows tell it, and at 8 bits most of it came in with the inputs
NEGLIGIBLE = 1e-5  # a block's error that no one need be told of: outputs are right to three digits


@dataclass(frozen=True)
class Judgement:
    """What the methods tried lose of a matrix, relative, by name; the name of the one to take."""

    losses: dict[str, float]
    best: str


def judge(dtype: torch.dtype, t: PlannedTensor, w: Tensor, q: QTensor, inputs: Inputs) -> Judgement:
    """Hold q, by the rule's method, for the matrix w [N, K] against the plainer methods, on a sample of the rows.

    dtype: what products may be computed in. Where nothing is known of the inputs, nothing is replaced.
    """
    assert t.rule is not None
    method = t.rule.method
    step = max(1, len(w) // SAMPLED_ROWS)
    some, metric = w[::step].float(), metric_of(dtype, inputs)
    tried = {method: rows(q, 0, len(w), step)}
    tried |= {name: quantize_matrix_by(name, dtype, t, some, inputs).outcome.q for name in PLAINER.get(method, BOTH)}
    errors = {name: decode(one) - some for name, one in tried.items()}
    whole = _energy(some, metric)
    losses = {name: ratio(_energy(error, metric), whole) for name, error in errors.items()}
    aimed = losses
    if method in ASYMMETRIC and inputs.drift is not None:  # its aim: ‖R + X ŵᵀ − R₀ − X₀ wᵀ‖²
        pull = some @ inputs.drift
        pull = pull if inputs.residual is None else pull + inputs.residual[::step]
        aimed = {name: losses[name] - ratio(2 * (e * pull).sum(1).double(), whole) for name, e in errors.items()}
    best = min(aimed, key=lambda name: aimed[name])
    enough = losses[method] * (1 - BETTER)
    return Judgement(losses, best if inputs.gram is not None and aimed[best] < aimed[method] - enough else method)


def _energy(w: Tensor, metric: Tensor | None) -> Tensor:
    return energy(w if metric is None else w.to(metric.dtype), metric)


def block_error(run: Callable[[Tensor], Tensor], given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """‖y − y₀‖² / ‖y₀‖² of a token's output, mean over all: a token with a massive activation counts as any other.

    run: the block, its hidden state alone. given: what it is given, in batches [B, T, H]; wanted: what the float model's block
    makes of its own.
    """
    shares = []
    for batch, meant in zip(given, wanted, strict=True):
        meant = meant.float()
        missed = (run(batch).float() - meant).square().sum(-1, dtype=torch.float64)
        shares.append((missed / meant.square().sum(-1, dtype=torch.float64).clamp(min=1e-30)).flatten())
    return float(torch.cat(shares).mean())
