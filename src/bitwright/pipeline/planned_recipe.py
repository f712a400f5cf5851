"""Plan a recipe: score every matrix in every scheme, then spend the target's bytes where they save most KL."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from bitwright.calibration.text_mix import check_texts
from bitwright.calibration.windows import Drawn
from bitwright.errors import CalibrationError, RecipeError
from bitwright.files.hub import local
from bitwright.formats import SCHEME, SCHEMES
from bitwright.gguf.imatrix import is_imatrix
from bitwright.methods import ASYMMETRIC
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import calibration_tokens
from bitwright.pipeline.curvature import windows_measured
from bitwright.pipeline.planned_sizes import Estimate, Sizes, data_bytes
from bitwright.pipeline.planning_memory import planning_memory
from bitwright.pipeline.scores import INPUTS, STAND_IN, Scores, check_scores, scored
from bitwright.pipeline.steps import corrected, measured, ratios, steps
from bitwright.plan.allocation import Allocation, Option
from bitwright.plan.input_rounding import check_inputs, input_scheme, rounded_inputs, weights_kl
from bitwright.plan.preflight import preflight, shapes_digest
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import KEEP
from bitwright.plan.run_plan import Plan
from bitwright.plan.target import Target
from bitwright.plan.units import Unit, base_plan, units_of
from bitwright.system.progress import Progress
from bitwright.transforms import split_method


@dataclass(frozen=True)
class Settings:
    """What a plan depends on, beside model and target; as for `quantize`.

    schemes         candidates; None: those of plan/units.py
    keep            patterns of matrices that stay in float
    activations     what inputs are rounded to where that costs least, such as int8-token; None: they stay in float
    activations_kl  the KL, in nats a token, that rounding inputs may be predicted to add
    measure         how often at most single steps are measured, and the plan is made anew: see steps.py
    requantize      whether a model that is quantized already is taken, decoded; None: as of `QuantizeOptions`
    """

    format: str = "compressed-tensors"
    schemes: tuple[str, ...] | None = None
    method: str = "gptaq"
    keep: tuple[str, ...] = ()
    calib: str = "general"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    activations: str | None = None
    activations_kl: float | None = None
    measure: int = 0
    requantize: bool | None = False

    @property
    def inputs(self) -> Scheme | None:
        """What inputs are rounded to. RecipeError for a scheme that a plan cannot have, or one without a KL."""
        return input_scheme(self.activations, self.activations_kl)


@dataclass(frozen=True)
class Given:
    """What a plan gives one unit, and the KL that it is predicted to add; activations: how its inputs are rounded, or ""."""

    patterns: tuple[str, ...]
    scheme: str
    bytes: int
    kl: float
    activations: str = ""

    @property
    def whole(self) -> str:
        """Scheme of weights and of inputs: int8-channel+int8-token."""
        return "+".join(filter(None, (self.scheme, self.activations)))


@dataclass(frozen=True)
class PlannedRecipe:
    """A recipe with what it is predicted to cost.

    text      the recipe as TOML
    plan      the run that it leads to, with its exact sizes
    kl        predicted: nats a token
    bounds    (bytes, predicted KL) of the smallest and of the largest allocation
    memory    that it was expected to take, in bytes
    """

    text: str
    plan: Plan
    given: tuple[Given, ...]
    target: Target
    kl: float
    bounds: tuple[tuple[int, float], tuple[int, float]]
    notes: tuple[str, ...]
    seconds: float
    memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `bitwright plan`."""
        (least, worst), (most, best) = self.bounds
        return {
            "model": str(self.plan.source),
            "format": self.plan.format.name,
            "target": str(self.target),
            "bytes": self.plan.bytes,
            "bits_per_weight": round(self.plan.bits_per_weight, 4),
            "predicted_kl": self.kl,
            "smallest": {"bytes": least, "predicted_kl": worst},
            "largest": {"bytes": most, "predicted_kl": best},
            "schemes": dict(Counter(one.whole for one in self.given).most_common()),
            "units": [{"match": list(one.patterns), **_plain(one)} for one in self.given],
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
            "peak_memory_bytes": self.memory,
        }


def _plain(one: Given) -> dict[str, Any]:
    inputs = {"activations": one.activations} if one.activations else {}
    return {"scheme": one.scheme, **inputs, "bytes": one.bytes, "predicted_kl": one.kl}


def plan_recipe(
    model: Path,
    target: Target,
    settings: Settings = Settings(),
    *,
    scores: Path | None = None,
    progress: Progress = lambda *_: None,
    announce: Callable[[str], None] = lambda _: None,
) -> PlannedRecipe:
    """The recipe of least predicted KL whose result takes at most the target; or, for a KL, of the fewest bytes.

    scores    a directory that keeps the scores, so that another target takes seconds; None: they are thrown away
    announce  is told in a line what is chosen from, and what memory that takes, before any weight is read
    Raises RecipeError for a target that no allocation meets, or a KL where steps are to be measured, FormatError for schemes
    that do not fit, CalibrationError without a text; and as `preflight`.
    """
    begun, model = time.monotonic(), local(model)
    base, units, tokens, known = _begun(model, target, settings)
    announce(known.sizes.headline(known.memory))
    with TemporaryDirectory(prefix="bitwright-scores-") as thrown_away:
        found = scored(base, units, tokens, scores or Path(thrown_away), progress, settings.inputs)
    spending = _Spending(model, settings, base, units, found.scores)
    spending, met, of_steps = _measured(spending, target, tokens, progress)
    notes = (*met.plan.notes, *known.notes, *found.notes, *_notes(settings), *of_steps)
    kl = sum(one.kl for one in met.given)
    return PlannedRecipe(*met, target, kl, spending.bounds, notes, time.monotonic() - begun, known.memory)


def estimated(model: Path, target: Target, settings: Settings = Settings(), *, scores: Path | None = None) -> Estimate:
    """What `plan_recipe` would choose from, before any weight is read; raises what that would refuse until then."""
    if scores is not None:
        check_scores(scores)
    return _begun(local(model), target, settings).estimate


class _Begun(NamedTuple):
    """What is known before any weight is read."""

    base: Plan
    units: list[Unit]
    tokens: Drawn
    estimate: Estimate


def _begun(model: Path, target: Target, settings: Settings) -> _Begun:
    """Raises all that can be refused before any weight is read."""
    base, units = prepared(model, settings)
    _check_settings(settings, target)
    sizes, memory = Sizes.of(base, units), planning_memory(base, units, settings.measure)
    sizes.check(target)
    tokens = _tokens(base, settings)
    said = tokens.notes[len(base.notes) :]  # those of the base plan are of a recipe that nobody carries out
    return _Begun(base, units, tokens, Estimate(sizes, base.format.name, target, memory, said))


def _tokens(base: Plan, settings: Settings) -> Drawn:
    """The calibration windows, and as held out those that losses are taken on: where text is short, some are both."""
    count = windows_measured(base.seqlen)
    drawn = calibration_tokens(base, settings.calib, settings.seed, spare=count)
    return replace(drawn, held_out=torch.cat([drawn.held_out, drawn.seen])[:count])


def _check_settings(settings: Settings, target: Target) -> None:
    """RecipeError for rounds of measuring, or a KL of rounded inputs, that this target cannot have."""
    rounds = settings.measure
    if target.kl is not None:
        weights_kl(target.kl, settings.activations_kl)
    if rounds < 0:
        raise RecipeError(f"{rounds} rounds of measuring", where="--measure", remedy="0, or how many at most")
    if rounds and target.kl is not None:
        message = "plans of different sizes are not compared by what they measure"
        raise RecipeError(message, where="--measure", remedy="give --size or --bits, or leave out --measure")


def prepared(model: Path, settings: Settings) -> tuple[Plan, list[Unit]]:
    """The base plan and its units; raises all that can be refused before any weight is read."""
    check_texts(settings.calib)
    if settings.calib == "none" or is_imatrix(settings.calib):
        raise CalibrationError("a plan scores errors on a text", where="--calib", remedy="give --calib general")
    transforms, _ = split_method(settings.method)
    if transforms:
        message = f"a plan scores a method by itself, not behind {', '.join(transforms)}"
        raise RecipeError(message, where=settings.method, remedy=f"--method {settings.method.rpartition('+')[2]}")
    base = base_plan(
        model, settings.format, method=settings.method, keep=settings.keep,
        samples=settings.samples, seqlen=settings.seqlen, requantize=settings.requantize,
    )  # fmt: skip
    _ = base.skeleton.head_name  # CheckpointError for an encoder: it predicts nothing that could differ
    units, inputs = units_of(base, settings.schemes), settings.inputs
    if inputs is not None:
        check_inputs(base, units, inputs)
    return base, units


def _notes(settings: Settings) -> list[str]:
    """What is to be known of how matrices were scored."""
    if settings.method not in ASYMMETRIC:
        return []
    return [f"matrices were scored by {STAND_IN}: {settings.method} needs what quantized blocks give"]


class Met(NamedTuple):
    """A target met: the recipe's text, the plan of the run that it leads to, and what units are given."""

    text: str
    plan: Plan
    given: tuple[Given, ...]


class _Spending:
    """The allocations of one model."""

    def __init__(self, model: Path, settings: Settings, base: Plan, units: list[Unit], scores: Scores) -> None:
        self.model, self.settings, self.base, self.units, self.scores = model, settings, base, units, scores
        self.sizes = Sizes.of(base, units)
        self.options = [[_option(unit, scores, at) for at in range(len(unit.choices))] for unit in units]
        self.allocation = Allocation(self.options)

    def corrected(self, ratio: Mapping[int, float]) -> "_Spending":
        """The same with all losses of weights times the ratios, measured to predicted, of their units (by index)."""
        scores = corrected(self.scores, self.units, ratio)
        return _Spending(self.model, self.settings, self.base, self.units, scores)

    @property
    def bounds(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """(bytes, predicted KL) of the smallest and of the largest allocation, with inputs in float."""
        kls = [sum(pick(unit, key=lambda o: o.bytes).loss for unit in self.options) for pick in (min, max)]
        return (self.sizes.other + self.sizes.least, kls[0]), (self.sizes.other + self.sizes.most, kls[1])

    def met(self, target: Target) -> Met:
        """Recipe, plan and what units are given, to meet the target. RecipeError, with both bounds, if that cannot be."""
        (_, worst), (_, best) = self.bounds
        out_of_reach = self.sizes.out_of_reach(target, (worst, best))
        if target.kl is not None:
            limit = weights_kl(target.kl, self.settings.activations_kl)
            cheapest = self.allocation.below(limit)
            if cheapest is None or limit > worst:
                raise out_of_reach
            return self._carried(cheapest, target)
        most, other = self.sizes.limit(target)

        def carry_out(options: list[Option]) -> tuple[Met, int]:
            made = self._carried(options, target)
            return made, made.plan.bytes if target.size is not None else data_bytes(made.plan)

        found = self.allocation.carried_out(most, other, carry_out)
        if found is None:
            raise out_of_reach
        return found[0]

    def _carried(self, options: list[Option], target: Target) -> Met:
        """The recipe that gives each unit its option, and the plan of the run that it leads to."""
        if all(option.scheme == KEEP for option in options):
            larger = ", or a larger --kl" if target.by_plan else ""
            remedy = f"a smaller --size or --bits{larger}; or take the model as it is"
            raise RecipeError("so much keeps every matrix in float: nothing to quantize", remedy=remedy)
        settings, given = self.settings, self._given(options)
        text = _text(given, settings, self.base)
        recipe = Recipe.of_text(text, scheme=SCHEMES.get(settings.format, SCHEME), method=settings.method)
        plan = preflight(
            self.model, recipe, settings.format, samples=settings.samples, seqlen=settings.seqlen,
            requantize=settings.requantize,
        )  # fmt: skip
        return Met(text, plan, given)

    def _given(self, options: list[Option]) -> tuple[Given, ...]:
        """What each unit is given: its option, and where inputs are rounded."""
        plainly = tuple(Given(u.patterns, o.scheme, o.bytes, o.loss) for u, o in zip(self.units, options, strict=True))
        inputs, limit = self.settings.inputs, self.settings.activations_kl
        if inputs is None or limit is None:
            return plainly
        costs = [_inputs_cost(unit, self.scores) for unit in self.units]
        where = rounded_inputs(self.base, self.units, [one.scheme for one in plainly], costs, inputs, limit)
        return tuple(
            replace(one, activations=str(inputs), kl=one.kl + (cost or 0.0)) if yes else one
            for one, cost, yes in zip(plainly, costs, where, strict=True)
        )


def _measured(
    first: _Spending, target: Target, tokens: Drawn, progress: Progress
) -> tuple[_Spending, Met, tuple[str, ...]]:
    """Measure what single steps cost and plan again, round by round, for as long as the plan's KL falls: that measured with the
    embedding and the head in float, and what these are predicted to add."""
    base, units, rounds = first.base, first.units, first.settings.measure
    spending, met = first, first.met(target)
    if not rounds:
        return spending, met, ()
    inside = [all(t.block is not None for t in unit.members) for unit in units]

    def measure(given: Sequence[Given], stepping: bool) -> tuple[float, dict[int, float]]:
        schemes = [one.scheme for one in given]
        wanted = steps(first.options, schemes, [i for i, yes in enumerate(inside) if yes and stepping])
        kl, each = measured(base, units, schemes, wanted, tokens, progress)
        ends = sum(one.kl for one, within in zip(given, inside, strict=True) if not within)
        return kl + ends, ratios(wanted, kl, each)

    kl, ratio = measure(met.given, True)
    kls = [kl]
    for left in reversed(range(rounds)):
        by = first.corrected(ratio)
        tried = by.met(target)
        if tried.text == met.text:
            break
        kl, ratio = measure(tried.given, left > 0)
        kls.append(kl)
        if kls[-1] >= kls[-2]:
            break
        spending, met = by, tried
    return spending, met, (f"KL measured on held-out windows: {', then '.join(f'{kl:.4g}' for kl in kls)}",)


def _option(unit: Unit, scores: Scores, at: int) -> Option:
    choice = unit.choices[at]
    kls = [0.0 if layer is None else scores[layer.name][choice.scheme] for layer in choice.layers]
    return Option(choice.scheme, choice.bytes, sum(kls))


def _inputs_cost(unit: Unit, scores: Scores) -> float | None:
    """The KL that rounding a unit's inputs adds; None for the embedding and the head, whose inputs stay in float."""
    of = [scores[t.layer.name].get(INPUTS) for t in unit.members if t.layer is not None]
    known = [kl for kl in of if kl is not None]
    return sum(known) if len(known) == len(unit.members) else None


def _text(given: Sequence[Given], settings: Settings, base: Plan) -> str:
    """The recipe: one rule for what most units get, and one for each unit that gets something else."""
    usual = Counter((one.scheme, one.activations) for one in given).most_common(1)[0][0]
    rules = [("*", *usual)]
    for one in given:
        if (one.scheme, one.activations) != usual:
            rules += [(pattern, one.scheme, one.activations) for pattern in one.patterns]
    rules += [(pattern, "keep", "") for pattern in settings.keep]
    head = [f'made_for = "{shapes_digest(base.skeleton)}"', *(["pure = true"] if base.format.one_file else [])]
    parts = ["\n".join(head)]
    for match, scheme, activations in rules:
        more = [] if scheme == "keep" else [f'method = "{settings.method}"']
        more += [f'activations = "{activations}"'] if activations else []
        parts.append("\n".join(["[[rule]]", f'match = "{match}"', f'scheme = "{scheme}"', *more]))
    return "\n\n".join(parts) + "\n"
