"""One block: watch its inputs, round its matrices, record what it cost."""

import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.codec import decode
from bitwright.errors import BitwrightError
from bitwright.ledger import KEPT, Entry
from bitwright.loss import energy, ratio
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED, METHODS, Outcome, rtn
from bitwright.models import Skeleton, matrix_of
from bitwright.preflight import Plan, Planned
from bitwright.qtensor import QTensor, rows
from bitwright.scheme import Scheme
from bitwright.statistics import Cross, Gram

SAMPLED_ROWS = 1024  # at least so many tell what round to nearest would lose


@dataclass(frozen=True)
class Rounded:
    """A matrix after rounding: where it came from, what became of it, its ledger entry; and its Gram if it is needed yet."""

    planned: Planned
    q: QTensor
    entry: Entry
    gram: Tensor | None = None


class _Enough(Exception):  # noqa: N818
    """Raised by the last module's hook: what the block would do with its output is of no interest."""


@dataclass
class Seen:
    """What was seen of an input that some modules share: its Gram, and its product with the float model's."""

    names: list[str]
    gram: Gram
    cross: Cross | None


class _Watch:
    """Sees what each module of a block is handed, in the float model's run of a batch and then in the quantized one's."""

    def __init__(self, modules: int) -> None:
        self.modules = modules
        self.sharing: dict[str, list[str]] = defaultdict(list)  # leader -> all that are handed the same tensor
        self.grams: dict[str, Gram] = {}
        self.crosses: dict[str, Cross] = {}
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
            self.sharing[leader].append(name)
        if name in self.sharing:
            self.grams.setdefault(name, Gram(x.shape[-1], x.device)).update(x)
            if name in self.floats:
                self.crosses.setdefault(name, Cross(x.shape[-1], x.device)).update(self.floats.pop(name), x)
        if len(self.seen) == self.modules and name == next(reversed(self.seen)):
            raise _Enough

    def forget(self) -> None:
        """Let a batch's activations go."""
        self.seen = dict.fromkeys(self.seen, torch.empty(0))
        self.floats.clear()


def observe(
    skeleton: Skeleton, index: int, hidden: list[Tensor], wanted: list[str], original: list[Tensor] | None = None
) -> list[Seen]:
    """Run block `index` on all batches; modules that were handed the very same tensor share one Gram.

    original: the float model's activations for the same tokens, if they are to be compared; moved on through the block.
    """
    modules = {name: module for name, module in skeleton.linears(index).items() if name in wanted}
    watch = _Watch(len(modules))
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: watch(n, args[0])) for n, m in modules.items()]
    try:
        for b, batch in enumerate(hidden):
            if original is not None:
                watch.comparing = True
                original[b] = skeleton.run(index, original[b])
                watch.comparing = False
            with suppress(_Enough):
                skeleton.run(index, batch)
            _all_seen(modules.keys() - watch.seen.keys())
            watch.forget()
    finally:
        for hook in hooks:
            hook.remove()
    return [Seen(names, watch.grams[leader], watch.crosses.get(leader)) for leader, names in watch.sharing.items()]


def _all_seen(unseen: set[str]) -> None:
    if unseen:
        remedy = 'a recipe rule that keeps it, or gives it method = "rtn" in a run without calibration'
        raise BitwrightError("calibration never reached this module", where=min(unseen), remedy=remedy)


@dataclass(frozen=True)
class Inputs:
    """What a method is told of a matrix's inputs; nothing without calibration."""

    gram: Tensor | None = None
    cross: Tensor | None = None
    tokens: int = 0


def quantize_together(plan: Plan, members: list[Planned], weights: dict[str, Tensor], inputs: Inputs) -> list[Rounded]:
    """Round matrices that share an input; those of one rule are stacked and rounded as one where the scheme allows."""
    piles: dict[tuple[object, ...], list[Planned]] = defaultdict(list)
    for t in members:
        assert t.layer is not None and t.rule is not None
        apart = () if t.layer.scheme.rowwise else (t.source,)
        piles[(t.layer.scheme, t.rule.method, str(t.rule.options), *apart)].append(t)
    return [rounded for pile in piles.values() for rounded in _quantize_pile(plan, pile, weights, inputs)]


def _quantize_pile(plan: Plan, pile: list[Planned], weights: dict[str, Tensor], inputs: Inputs) -> list[Rounded]:
    """One call of the method on the stacked matrices, then the rows apart again, with RTN's loss beside each loss."""
    begun = time.monotonic()
    rule, layer, gram = pile[0].rule, pile[0].layer, inputs.gram
    assert rule is not None and layer is not None
    matrices = [float_matrix(plan, t, weights[t.parameter]) for t in pile]
    w = torch.cat(matrices) if len(matrices) > 1 else matrices[0]
    try:
        options: dict[str, Any] = {"fast": plan.skeleton.dtype == torch.bfloat16} if rule.method in CALIBRATED else {}
        options |= {"cross": inputs.cross} if rule.method in ASYMMETRIC else {}
        outcome = METHODS[rule.method](w, gram, layer.scheme, **(options | rule.options))
    except BitwrightError as error:
        error.where = error.where or pile[0].parameter
        raise
    fast = w.dtype if gram is None else plan.skeleton.dtype  # three digits of a loss are enough
    metric = None if gram is None else gram.to(fast)
    whole = energy(w.to(fast), metric)
    lost = energy((w - decode(outcome.q)).to(fast), metric)
    seconds = (time.monotonic() - begun) / w.numel()
    done, at = [], 0
    for t, matrix in zip(pile, matrices, strict=True):
        here = slice(at, at + len(matrix))
        at += len(matrix)
        q = outcome.q if len(pile) == 1 else rows(outcome.q, here.start, here.stop)
        mine = ratio(lost[here], whole[here])
        losses = (mine, mine if rule.method == "rtn" else _rtn_loss(matrix, layer.scheme, whole[here], metric))
        spent = round(seconds * matrix.numel(), 4)
        entry = _entry(plan, t, replace(outcome, q=q), losses, inputs.tokens, spent)
        done.append(Rounded(t, q, entry, gram if rule.method in BLOCKWISE else None))
    return done


def relative_loss(plan: Plan, w: Tensor, q: QTensor, gram: Tensor | None) -> float:
    """The loss of one matrix as the ledger records it."""
    fast = w.dtype if gram is None else plan.skeleton.dtype
    metric = None if gram is None else gram.to(fast)
    return ratio(energy((w - decode(q)).to(fast), metric), energy(w.to(fast), metric))


def _rtn_loss(w: Tensor, scheme: Scheme, whole: Tensor, metric: Tensor | None) -> float:
    """What round to nearest would lose, by a sample of the rows: it is there for comparison."""
    some = slice(None, None, max(1, len(w) // SAMPLED_ROWS))
    missing = w[some] - decode(rtn(w[some], None, scheme).q)
    return ratio(energy(missing if metric is None else missing.to(metric.dtype), metric), whole[some])


def float_matrix(plan: Plan, t: Planned, weight: Tensor) -> Tensor:
    """The weight as [N, K] float32."""
    assert t.layer is not None
    return matrix_of(plan.skeleton.model.get_submodule(t.layer.name), weight).float()


def _entry(plan: Plan, t: Planned, outcome: Outcome, losses: tuple[float, float], tokens: int, seconds: float) -> Entry:
    """The ledger entry of a quantized matrix."""
    assert t.layer is not None and t.rule is not None
    dtype = str(t.dtype).removeprefix("torch.")
    return Entry(
        t.source, t.shape, dtype, t.action, t.reason, str(t.layer.scheme), t.rule.method, *losses, outcome.damping,
        tokens, seconds, outcome.fallback, stored_bytes(plan, t), str(t.layer.activations or ""),
    )  # fmt: skip


def kept_entry(plan: Plan, t: Planned) -> Entry:
    """The ledger entry of a tensor that stays as it is, or is left out."""
    dtype = str(t.dtype).removeprefix("torch.")
    return Entry(t.source, t.shape, dtype, t.action, t.reason, bytes=stored_bytes(plan, t) if t.action == KEPT else 0)


def stored_bytes(plan: Plan, t: Planned) -> int:
    """Bytes that the files hold of one source tensor."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.specs([t]).values())
