"""One block: watch its inputs, round its matrices, record what it cost."""

import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.codec import QTensor, decode, loss, rows
from bitwright.errors import BitwrightError
from bitwright.ledger import KEPT, Entry
from bitwright.methods import METHODS, Outcome, rtn
from bitwright.models import Skeleton, matrix_of
from bitwright.preflight import Plan, Planned
from bitwright.statistics import Gram


@dataclass(frozen=True)
class Rounded:
    """A matrix after rounding: where it came from, what became of it, and its ledger entry."""

    planned: Planned
    q: QTensor
    entry: Entry


def observe(skeleton: Skeleton, index: int, hidden: list[Tensor], wanted: list[str]) -> list[tuple[list[str], Gram]]:
    """Run block `index` on all batches; modules that were handed the very same tensor share one Gram."""
    modules = {name: module for name, module in skeleton.linears(index).items() if name in wanted}
    seen: dict[str, Tensor] = {}
    grams: dict[str, Gram] = {}

    def watch(name: str, x: Tensor) -> None:
        if len(seen) < len(modules):  # the first batch tells who shares
            leader = next((other for other, tensor in seen.items() if tensor is x), name)
            seen[name] = x
            sharing[leader].append(name)
        if name in sharing:
            grams.setdefault(name, Gram(x.shape[-1], x.device)).update(x)

    sharing: dict[str, list[str]] = defaultdict(list)
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: watch(n, args[0])) for n, m in modules.items()]
    try:
        for i, batch in enumerate(hidden):
            skeleton.run(index, batch)
            if i == 0:
                _all_seen(modules.keys() - seen.keys())
                seen = dict.fromkeys(seen, torch.empty(0))
    finally:
        for hook in hooks:
            hook.remove()
    return [(names, grams[leader]) for leader, names in sharing.items()]


def _all_seen(unseen: set[str]) -> None:
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)


def quantize_together(
    plan: Plan, members: list[Planned], weights: dict[str, Tensor], gram: Tensor | None, tokens: int
) -> list[Rounded]:
    """Round matrices that share an input; those of one rule are stacked and rounded as one where the scheme allows."""
    piles: dict[tuple[object, ...], list[Planned]] = defaultdict(list)
    for t in members:
        assert t.layer is not None and t.rule is not None
        apart = () if t.layer.scheme.rowwise else (t.source,)
        piles[(t.layer.scheme, t.rule.method, str(t.rule.options), *apart)].append(t)
    return [rounded for pile in piles.values() for rounded in _quantize_pile(plan, pile, weights, gram, tokens)]


def _quantize_pile(
    plan: Plan, pile: list[Planned], weights: dict[str, Tensor], gram: Tensor | None, tokens: int
) -> list[Rounded]:
    """One call of the method on the stacked matrices, then the rows apart again."""
    begun = time.monotonic()
    rule, layer = pile[0].rule, pile[0].layer
    assert rule is not None and layer is not None
    matrices = [
        matrix_of(plan.skeleton.model.get_submodule(t.layer.name), weights[t.parameter]).float()
        for t in pile
        if t.layer
    ]
    stacked = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    try:
        outcome = METHODS[rule.method](stacked, gram, layer.scheme, **rule.options)
    except BitwrightError as error:
        error.where = error.where or pile[0].parameter
        raise
    seconds = (time.monotonic() - begun) / stacked.numel()
    done, at = [], 0
    for t, w in zip(pile, matrices, strict=True):
        q = outcome.q if len(pile) == 1 else rows(outcome.q, at, at + len(w))
        at += len(w)
        done.append(_record(plan, t, replace(outcome, q=q), w, gram, tokens, seconds * w.numel()))
    return done


def _record(
    plan: Plan, t: Planned, outcome: Outcome, w: Tensor, gram: Tensor | None, tokens: int, seconds: float
) -> Rounded:
    """The ledger entry of one matrix, with RTN's loss beside its own."""
    assert t.layer is not None and t.rule is not None
    decoded = decode(outcome.q)
    own = loss(w, decoded, gram)
    baseline = own if t.rule.method == "rtn" else loss(w, decode(rtn(w, None, t.layer.scheme).q), gram)
    entry = Entry(
        t.source, t.shape, str(t.dtype).removeprefix("torch."), t.action, t.reason, str(t.layer.scheme), t.rule.method,
        own, baseline, outcome.damping, tokens, round(seconds, 4), outcome.fallback, stored_bytes(plan, t),
    )  # fmt: skip
    return Rounded(t, outcome.q, entry)


def kept_entry(plan: Plan, t: Planned) -> Entry:
    """The ledger entry of a tensor that stays as it is, or is left out."""
    dtype = str(t.dtype).removeprefix("torch.")
    return Entry(t.source, t.shape, dtype, t.action, t.reason, bytes=stored_bytes(plan, t) if t.action == KEPT else 0)


def stored_bytes(plan: Plan, t: Planned) -> int:
    """Bytes that the files hold of one source tensor."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.specs([t]).values())
