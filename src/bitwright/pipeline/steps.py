"""What single steps of a plan cost, measured: predictions take the errors of different matrices for independent of one another.

The planned model is carried block by block through windows that were held out, and beside it copies that each have one unit in
its next smaller choice. What a copy's KL is above the planned model's, over what was predicted, is the unit's ratio: all of its
losses are multiplied by it, and the plan is made anew. A ratio is as uncertain as its step is small, so each is drawn towards
that of all units together, as if an average step with that ratio had been measured as well (empirical Bayes).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import Drawn
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import Skeleton, as_source
from bitwright.models.streamed import pieces
from bitwright.numerics.codec import decode
from bitwright.pipeline.calibration_pass import first_hidden_states, inputs_in_order, read_block, read_lent
from bitwright.pipeline.curvature import windows_measured
from bitwright.pipeline.quantize_matrix import quantize_matrix
from bitwright.pipeline.scores import INPUTS, Layers, Scores, layers_of
from bitwright.plan.allocation import Option
from bitwright.plan.peak_memory import hidden_bytes, hidden_states
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.run_plan import Plan
from bitwright.plan.units import Unit
from bitwright.system.memory import return_memory
from bitwright.system.progress import Progress

COPIES = 1 << 32  # bytes that the hidden states of all copies take at most
ROOM = 1 << 29  # bytes that they may take in any case; more if those of the run that is planned take as many
TOKENS = 256  # that a copy is carried through at least
LEAST = 0.25  # of the ratio of all units: where noise says that a step costs nothing, or less


@dataclass(frozen=True)
class Step:
    """A unit's next choice: which unit, its scheme, and how much KL it is predicted to add to the plan; below 0: to save."""

    unit: int
    scheme: str
    predicted: float


def steps(options: Sequence[Sequence[Option]], given: Sequence[str], within: Sequence[int]) -> list[Step]:
    """A step to the next smaller choice for each unit `within`; to the next larger one where there is none smaller."""
    found = []
    for unit in within:
        own = next(option for option in options[unit] if option.scheme == given[unit])
        smaller = [option for option in options[unit] if option.bytes < own.bytes]
        larger = [option for option in options[unit] if option.bytes > own.bytes]
        if smaller or larger:
            to = max(smaller, key=_bytes) if smaller else min(larger, key=_bytes)
            found.append(Step(unit, to.scheme, to.loss - own.loss))
    return found


def _bytes(option: Option) -> int:
    return option.bytes


@torch.no_grad()
def measured(
    plan: Plan, units: Sequence[Unit], given: Sequence[str], wanted: Sequence[Step], tokens: Drawn, progress: Progress
) -> tuple[float, list[float]]:
    """KL of the planned model on the windows held out, and of each copy that takes one step; embedding and head in float.

    One pass over the calibration windows, on whose Grams matrices are rounded as scores are, but whole.
    """
    skeleton, depth = plan.skeleton, len(plan.skeleton)
    ids = _measured_on(plan, tokens.held_out, len(wanted))
    states = first_hidden_states(plan, Drawn(tokens.seen, ids), None)
    (exact,) = states.held
    own, copies, choices = exact, dict[Step, Tensor](), _Choices(units, given, wanted, layers_of(units))
    for index in range(depth):
        progress("steps", index, depth)
        weights = read_block(plan, index)
        skeleton.load(weights | read_lent(plan, index))
        planned, stepped = _rounded(plan, index, weights, states.given, choices)
        states.given = [skeleton.run(index, batch) for batch in states.given]
        new = {step: skeleton.run_with(index, own, planned | instead) for step, instead in stepped.items()}
        for step in list(copies):  # one by one: each frees what it came from
            copies[step] = skeleton.run_with(index, copies[step], planned)
        copies |= new
        exact, own = skeleton.run(index, exact), skeleton.run_with(index, own, planned)
        skeleton.unload(index)
        return_memory()
    skeleton.load(read_block(plan, depth))
    kl, *each = _kls(skeleton, ids, exact, [own, *(copies[step] for step in wanted)])
    skeleton.unload_outside()
    progress("steps", depth, depth)
    return kl, each


def _measured_on(plan: Plan, windows: Tensor, copies: int) -> Tensor:
    """The windows [W, T] that so many copies are carried through: some of those given, or the beginning of one.

    As many that what they take beside the calibration windows is no more than what the run that is planned takes, which
    keeps three or six hidden states of each token of them.
    """
    each = _tokens_of_a_copy(plan, copies)
    count = min(windows_measured(windows.shape[1]), each // windows.shape[1])
    return windows[:count] if count else windows[:1, :each]


def _tokens_of_a_copy(plan: Plan, copies: int) -> int:
    width = hidden_bytes(plan)
    beside = hidden_states(plan) - 2 * width * plan.samples * plan.seqlen
    return max(TOKENS, min(COPIES, max(ROOM, beside)) // (width * max(1, copies)))


def room_for_copies(plan: Plan, copies: int) -> int:
    """Bytes of the hidden states of so many copies at most, of the exact model's and of the planned one's."""
    tokens = min(_tokens_of_a_copy(plan, copies), windows_measured(plan.seqlen) * plan.seqlen)
    return (copies + 3) * tokens * hidden_bytes(plan)


@dataclass(frozen=True)
class _Choices:
    """What a module is given, and the steps that are measured; layers: as stored in each scheme, by module."""

    units: Sequence[Unit]
    given: Sequence[str]
    wanted: Sequence[Step]
    layers: Layers

    def of(self, name: str) -> tuple[str, list[Step]]:
        """A module's scheme, and its steps."""
        unit = next(i for i, unit in enumerate(self.units) if name in modules(unit))
        return self.given[unit], [step for step in self.wanted if step.unit == unit]


def modules(unit: Unit) -> list[str]:
    """The names of a unit's modules."""
    return [t.layer.name for t in unit.members if t.layer is not None]


def _rounded(
    plan: Plan, index: int, weights: Mapping[str, Tensor], given: list[Tensor], choices: _Choices
) -> tuple[dict[str, Tensor], dict[Step, dict[str, Tensor]]]:
    """The parameters of block `index` as planned, and those that each of its steps puts in their place."""
    members = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
    planned, stepped = dict[str, Tensor](), dict[Step, dict[str, Tensor]]()
    for inputs in inputs_in_order(plan, index, members, given):
        for name in (name for name in inputs.names if name in members):
            t, (scheme, wanted), layers = members[name], choices.of(name), choices.layers.get(name, {})
            weight = weights[t.parameter]
            planned[t.parameter] = _decoded(plan, layers.get(scheme), weight, inputs)
            for step in wanted:
                stepped.setdefault(step, {})[t.parameter] = _decoded(plan, layers.get(step.scheme), weight, inputs)
    return planned, stepped


def _decoded(plan: Plan, t: PlannedTensor | None, weight: Tensor, inputs: Inputs) -> Tensor:
    """A weight after rounding; None: it stays in float."""
    if t is None or t.layer is None:
        return weight.to(plan.skeleton.dtype)
    matrix = matrix_of(plan.skeleton.model.get_submodule(t.layer.name), weight)
    q = quantize_matrix(plan.skeleton.dtype, t, matrix, inputs).outcome.q
    return as_source(plan.skeleton, t.layer.name, decode(q))


def _kls(skeleton: Skeleton, ids: Tensor, exact: Tensor, copies: Sequence[Tensor]) -> list[float]:
    """KL of each copy's predictions from the exact ones, nats a token. exact, copies: the last block's outputs [W, T, H]."""
    totals, count = torch.zeros(len(copies), dtype=torch.float64), 0
    for piece in pieces([ids], int(skeleton.config.get_text_config().vocab_size)):
        log_p = skeleton.head(exact[piece.rows, piece.at]).flatten(0, 1).log_softmax(-1)
        count += len(log_p)
        for i, copy in enumerate(copies):
            log_q = skeleton.head(copy[piece.rows, piece.at]).flatten(0, 1).log_softmax(-1)
            kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            totals[i] += float(kl.double().sum())
    return (totals / count).tolist()


def ratios(wanted: Sequence[Step], kl: float, each: Sequence[float]) -> dict[int, float]:
    """By unit: what its step cost over what was predicted, drawn towards the ratio of all."""
    predicted = [abs(step.predicted) for step in wanted]
    costs = [one - kl if step.predicted > 0 else kl - one for step, one in zip(wanted, each, strict=True)]
    if min(sum(predicted), sum(costs)) <= 0:
        return {}
    overall, average = sum(costs) / sum(predicted), sum(predicted) / len(predicted)
    found = zip(wanted, costs, predicted, strict=True)
    drawn = {step.unit: (cost + average * overall) / (expected + average) for step, cost, expected in found}
    return {unit: max(ratio, LEAST * overall) for unit, ratio in drawn.items()}


def corrected(scores: Scores, units: Sequence[Unit], ratio: Mapping[int, float]) -> Scores:
    """The scores of weights times the ratios of their units (by index; 1 where there is none)."""
    by_module = {name: ratio.get(i, 1.0) for i, unit in enumerate(units) for name in modules(unit)}
    return {
        name: {s: kl if s == INPUTS else kl * by_module[name] for s, kl in found.items()}
        for name, found in scores.items()
    }
