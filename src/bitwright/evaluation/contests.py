"""What `compare` lets compete: every method at every scheme and mix, and recipes, each planned before a weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from bitwright.errors import FormatError, RecipeError, SchemeError, one_of
from bitwright.evaluation.candidate import MIX, RECIPE, UNIFORM
from bitwright.formats import SCHEME
from bitwright.gguf.file_types import MIXES
from bitwright.numerics.scheme import Scheme
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.run_plan import Plan
from bitwright.system.device import device_of
from bitwright.transforms import split_method

FORMATS_IN_TURN = ("compressed-tensors", "bitwright")  # the first that can hold a candidate is taken


@dataclass(frozen=True)
class Settings:
    """Settings of all candidates, as for `quantize` and `evaluate`.

    calib, samples, seqlen, seed  calibration
    text, tokens, eval_seqlen     evaluation
    activations, observer         quantization of inputs
    format                        file format; None: the first that can hold a candidate
    sequential                    take statistics for each candidate, block by block, as `quantize` does
    keep                          keep the quantized checkpoints; else each is removed once it is evaluated
    device                        of statistics, rounding and evaluation: cpu, cuda or cuda:N
    """

    calib: str = "general"
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    text: str = "stdlib-heldout"
    tokens: int | None = None
    eval_seqlen: int = 256
    activations: str | None = None
    observer: str = "mse"
    format: str | None = None
    sequential: bool = False
    keep: bool = True
    device: str = "cpu"


@dataclass(frozen=True)
class Asked:
    """What shall compete: schemes for all matrices and mixes of llama.cpp's types by every method, and recipes as they are."""

    schemes: tuple[str, ...]
    methods: tuple[str, ...]
    mixes: tuple[str, ...] = ()
    recipes: tuple[Path, ...] = ()

    def check(self) -> None:
        """RecipeError or SchemeError for names that do not exist, or are given twice."""
        stems = tuple(file.stem for file in self.recipes)
        lists = (("scheme", self.schemes + self.mixes + stems), ("method", self.methods))
        for kind, names in lists:
            if not names or len(set(names)) < len(names):
                message, remedy = f"a {kind} is named twice, or none is", f"name each {kind} once"
                raise RecipeError(message, where=",".join(names), remedy=remedy)
        for scheme in self.schemes:
            Scheme.parse(scheme)
        for mix in self.mixes:
            if mix.upper() not in MIXES:
                remedy = one_of(mix, [name.lower() for name in MIXES])
                raise RecipeError(f"{mix} is none of llama.cpp's mixes", where="--mixes", remedy=remedy)
        for method in self.methods:
            split_method(method)


@dataclass(frozen=True)
class Contest:
    """A candidate, planned but not yet run. kind: a scheme for all matrices, a mix, or a recipe."""

    kind: str
    scheme: str
    method: str
    plan: Plan

    @property
    def name(self) -> str:
        """The name of its directory or file in OUT."""
        return f"{self.scheme}-{self.method}{'.gguf' if self.plan.format.one_file else ''}"

    def statistics(self, shared: Path, settings: Settings) -> Path | None:
        """The store of statistics that it can use; None: it takes sequential statistics.

        A rotated model has its own, and so have GGUF files, which quantize the embedding too.
        """
        if settings.sequential or not self.plan.calibrated or self.plan.recipe.needs_original:
            return None
        place, turn = shared / "gguf" if self.plan.format.one_file else shared, self.plan.rotation
        if turn is None:
            return place
        return place / f"rotated-{turn.rotate.seed}{'-online' if turn.rotate.online else ''}"


def contests_of(model: Path, asked: Asked, settings: Settings) -> tuple[list[Contest], list[str]]:
    """Plans of all possible combinations, and why the others are not. InputError if none is, or for names as of `Asked`."""
    asked.check()
    contests, refused = [], []
    for scheme, method in product((*asked.schemes, *asked.mixes), asked.methods):
        kind = UNIFORM if scheme in asked.schemes else MIX
        try:
            contests.append(Contest(kind, scheme, method, _plan(model, scheme, method, settings, kind)))
        except (RecipeError, FormatError) as error:
            refused.append(f"{scheme} by {method} was not run: {error.message}")
    contests += [_of_recipe(model, file, settings) for file in asked.recipes]
    if not contests:
        raise RecipeError(
            "none of these combinations is possible",
            where="; ".join(refused),
            remedy="give other methods or schemes, such as --methods search,gptq --schemes int4-g128",
        )
    return contests, refused


def _plan(model: Path, scheme: str, method: str, settings: Settings, kind: str) -> Plan:
    recipe = Recipe.uniform(scheme, method, settings.activations, settings.observer)
    return _in_turn(model, recipe, settings, ("gguf",) if kind == MIX else FORMATS_IN_TURN)


def _of_recipe(model: Path, file: Path, settings: Settings) -> Contest:
    """A recipe as a candidate of its own; its method is that of its rules, or "several"."""
    defaults = {"scheme": SCHEME, "method": "gptaq", "activations": settings.activations, "observer": settings.observer}
    recipe = Recipe.of(file, smooth=True, **defaults)  # type: ignore[arg-type]
    methods = dict.fromkeys(rule.method for rule in recipe.active[1:] or recipe.active)  # the first is the default
    method = next(iter(methods)) if len(methods) == 1 else "several"
    plan = _in_turn(model, recipe, settings, ("gguf",) if recipe.pure else FORMATS_IN_TURN)
    return Contest(RECIPE, file.stem, method, plan)


def _in_turn(model: Path, recipe: Recipe, settings: Settings, formats: Sequence[str]) -> Plan:
    """The plan in the first file format that can hold it; `settings.format`, if given, is the only one that is tried."""
    names = [settings.format] if settings.format else list(formats)
    plan = partial(
        preflight, model, recipe, samples=settings.samples, seqlen=settings.seqlen, device=device_of(settings.device)
    )
    for name in names[:-1]:
        try:
            return plan(name)
        except (FormatError, SchemeError):
            continue
    return plan(names[-1])
