"""Tune a block as a whole, for methods that minimise the error of the block's output rather than of each matrix (AutoRound)."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.methods.autoround import Options, tune
from bitwright.models.skeleton import as_source
from bitwright.numerics.codec import decode
from bitwright.numerics.qtensor import permuted, unpermuted
from bitwright.pipeline.quantize_together import Rounded, float_matrix, relative_loss
from bitwright.plan.run_plan import Plan


def tune_block(
    plan: Plan, index: int, done: list[Rounded], weights: dict[str, Tensor], inputs: list[Tensor], targets: list[Tensor]
) -> list[Rounded]:
    """Tune the matrices of block `index` whose method is autoround; the others stay as they are.

    done             all matrices of the block, quantized; weights: the float ones by parameter name
    inputs, targets  in batches [B, T, H]: outputs of the quantized blocks before; outputs of the float block on the float
                     model's activations
    """
    chosen = {
        r.planned.parameter: r for r in done if r.planned.rule is not None and r.planned.rule.method == "autoround"
    }
    if not chosen:
        return done
    begun = time.monotonic()
    skeleton = plan.skeleton
    skeleton.load({r.planned.parameter: as_source(skeleton, _name(r), decode(r.q)) for r in done})
    first = next(iter(chosen.values()))
    assert first.planned.rule is not None
    how = Options.of(first.planned.rule.options)

    orders = {name: r.q.order for name, r in chosen.items()}

    def forward(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        whole = {name: unpermuted(matrix, orders[name]) for name, matrix in matrices.items()}
        sources = {name: as_source(skeleton, _name(chosen[name]), matrix) for name, matrix in whole.items()}
        return skeleton.run_with(index, x, sources)

    floats = {name: float_matrix(plan, r.planned, weights[name]) for name, r in chosen.items()}
    gone = {name: permuted(r.gone, orders[name]) for name, r in chosen.items() if r.gone is not None}
    left = {name: permuted(w, orders[name]) for name, w in floats.items()}
    left |= {name: left[name].masked_fill(mask, 0.0) for name, mask in gone.items()}
    start = {name: replace(r.q, order=None) for name, r in chosen.items()}
    found = tune(forward, torch.cat(inputs), torch.cat(targets), left, start, how, gone)
    seconds = (time.monotonic() - begun) / sum(w.numel() for w in floats.values())
    tuned = []
    for r in done:
        name = r.planned.parameter
        if name in chosen:
            q = replace(found[name], order=orders[name])
            loss = relative_loss(plan, floats[name], q, r.gram)
            spent = round(r.entry.seconds + seconds * floats[name].numel(), 4)
            r = replace(r, q=q, entry=replace(r.entry, loss=loss, seconds=spent), gram=None)
        tuned.append(r)
    return tuned


def _name(r: Rounded) -> str:
    """The module's name."""
    assert r.planned.layer is not None
    return r.planned.layer.name
