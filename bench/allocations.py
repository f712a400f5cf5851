"""A plan beside random allocations of the same bytes, and beside an evolutionary search given ten times the plan's time.

    python -m bench.allocations MODEL OUT [--sizes q2_k,q3_k_m,4500000] [--schemes A,B,C] [--method rtn] [--random 500]

All matrices of MODEL are rounded once in every scheme (bench/decoded.py). Allocations are chosen by their KL on windows of the
calibration text that no matrix is rounded for, and judged on another text. The search is EvoPress's
(arXiv:2410.14649): some units go up a level and others down, and of many such children the best survive on ever more tokens;
it begins once with the best random allocation, once with the plan. A plan whose steps were measured once has a row as well.
Time is that of the processor. Everything is kept in OUT: an interrupted run goes on.
"""

import argparse
import time
from dataclasses import dataclass, replace
from functools import partial
from math import inf, sqrt
from pathlib import Path
from random import Random
from statistics import mean, stdev
from typing import Any

from bench.decoded import Rounded, Text, decoded
from bench.measure import once, table
from bitwright.calibration.windows import draw, load_tokenizer, windows
from bitwright.pipeline.planned_recipe import PlannedRecipe, Settings, plan_recipe, prepared
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.run_plan import Plan
from bitwright.plan.target import Target
from bitwright.plan.units import Choice, Unit

Found = dict[str, Any]
Levels = list[int]  # of each unit, among its choices by rising bytes
FILLED = 0.995  # share of the budget that an allocation takes at least
STAGES = ((16, 2), (4, 8))  # how many children are judged on how many windows, before the best is judged on all
FIRST, HOPELESS = 2, 1.5  # windows that random allocations are first judged on, and how far above the best there
PLACES = 32  # between the least level and the most, where scattered levels may have their centre
HEADER = ["allocation", "bytes of matrices", "KL it was chosen by", "KL on unseen text", "beside the plan's"]


@dataclass(frozen=True)
class Space:
    """All allocations of some units that take a budget of bytes. modules: of each unit."""

    modules: list[list[str]]
    choices: list[list[Choice]]
    budget: int

    @classmethod
    def of(cls, units: list[Unit], budget: int) -> "Space":
        modules = [[t.layer.name for t in unit.members if t.layer is not None] for unit in units]
        return cls(modules, [sorted(unit.choices, key=lambda choice: choice.bytes) for unit in units], budget)

    def bytes(self, levels: Levels) -> int:
        return sum(of[level].bytes for of, level in zip(self.choices, levels, strict=True))

    def schemes(self, levels: Levels) -> dict[str, str]:
        """What each module is given."""
        given = zip(self.modules, self.choices, levels, strict=True)
        return {module: of[level].scheme for modules, of, level in given for module in modules}

    def levels(self, schemes: dict[str, str]) -> Levels | None:
        """The levels of an allocation; None if one of its schemes is no choice."""
        pairs = zip(self.modules, self.choices, strict=True)
        found = [[at for at, one in enumerate(of) if one.scheme == schemes[modules[0]]] for modules, of in pairs]
        return [at for (at,) in found] if all(found) else None

    def random(self, random: Random) -> Levels:
        """Levels scattered around those of equal place that take about the budget; how far they scatter is random too."""
        spread = random.random()
        scatter = [spread * random.gauss(0, 1) for _ in self.choices]
        sizes = [self.bytes(self._placed([at / PLACES] * len(scatter))) for at in range(PLACES + 1)]
        centre = min(range(PLACES + 1), key=lambda at: abs(sizes[at] - self.budget)) / PLACES
        return self.fitted(self._placed([centre + off for off in scatter]), random)

    def _placed(self, places: list[float]) -> Levels:
        """Levels by place: 0 is a unit's least and 1 its most."""
        pairs = zip(self.choices, places, strict=True)
        return [min(len(of) - 1, max(0, round(place * (len(of) - 1)))) for of, place in pairs]

    def mutated(self, levels: Levels, random: Random) -> Levels:
        """One to three units go up a level, and others pay for it."""
        child = list(levels)
        for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
            self._step(child, 1, random, fitting=False)
        return self.fitted(child, random)

    def fitted(self, levels: Levels, random: Random) -> Levels:
        """Random units go down a level, or up, until the budget is kept and filled."""
        levels = list(levels)
        while not FILLED * self.budget <= self.bytes(levels) <= self.budget:
            below = self.bytes(levels) < self.budget
            if not (below and self._step(levels, 1, random, fitting=True)):
                self._step(levels, -1, random, fitting=False)
        return levels

    def _step(self, levels: Levels, by: int, random: Random, *, fitting: bool) -> bool:
        """Move one random unit a level, if there is one that can be; fitting: with which the budget is kept."""
        left = self.budget - self.bytes(levels)
        able = [i for i, of in enumerate(self.choices) if 0 <= levels[i] + by < len(of)]
        if fitting:
            able = [i for i in able if self.choices[i][levels[i] + by].bytes - self.choices[i][levels[i]].bytes <= left]
        if able:
            levels[random.choice(able)] += by
        return bool(able)


def evolved(space: Space, text: Text, parent: Levels, seconds: float, random: Random) -> tuple[Levels, int]:
    """What an evolutionary search finds in so many seconds of the processor, and in how many generations."""
    until, generations = time.process_time() + seconds, 0
    best = mean(text.kl(space.schemes(parent)))
    while time.process_time() < until:
        children = [space.mutated(parent, random) for _ in range(STAGES[0][0])]
        for count, some in STAGES:
            on = random.sample(range(len(text.ids)), min(some, len(text.ids)))
            children = sorted(children[:count], key=lambda child: mean(text.kl(space.schemes(child), on)))
        kl, generations = mean(text.kl(space.schemes(children[0]))), generations + 1
        if kl < best:
            best, parent = kl, children[0]
    return parent, generations


class Bench:
    """One model, its plans' settings, its texts, and a directory of results."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.out = a, a.out / a.method
        schemes = tuple(a.schemes.split(",")) if a.schemes else None
        self.settings = Settings("gguf", schemes, a.method, calib=a.calib, samples=a.samples, seqlen=a.seqlen)
        base, self.units = prepared(a.model, self.settings)
        tokenizer, vocabulary = load_tokenizer(a.model), base.skeleton.config.get_text_config().vocab_size
        cut = {"seqlen": a.seqlen, "vocabulary": vocabulary}
        tokens = draw(tokenizer, a.calib, samples=a.samples, seed=self.settings.seed, spare=a.chosen, **cut)
        model = Rounded(a.model, decoded(base, self.units, tokens.seen, self.out / "decoded"))
        self.chosen_on = Text(model, tokens.held_out)
        self.judged_on = Text(model, windows(tokenizer, a.text, most=a.judged, **cut))

    def compare(self, name: str) -> None:
        """The table of one size: a number of bytes, or those of a mix."""
        mix, folder = None if name.isdigit() else self.mix(name), self.out / name
        size = int(name) if mix is None else mix.bytes
        seconds = once(self.out / "planning.json", lambda: self.timed(size))["seconds"]
        plan = self.plan(size)
        space = Space.of(self.units, size - plan.plan.bytes + sum(one.bytes for one in plan.given))
        found = {"plan": space.levels(_given(plan.plan)), "best random": self.random(space, folder / "random")}
        if mix is not None and (levels := space.levels(_given(mix))):
            found[name] = levels
        more = {"steps measured": partial(self.measured, space, size)}
        for start in ("best random", "plan"):
            more[f"evolution from {start}"] = partial(self.search, space, found[start], self.a.times * seconds)
        for label, work in more.items():
            found[label] = once(folder / f"{label}.json", work)["levels"]
        rows = {
            label: once(folder / f"{label} judged.json", partial(self.judge, space, of)) for label, of in found.items()
        }
        print(f"\n{name}, {size:,} bytes, {self.a.method}; a plan takes {seconds:.0f} s of the processor\n")
        print(table(HEADER, [_row(label, row, rows["plan"]) for label, row in rows.items()]), flush=True)

    def mix(self, name: str) -> Plan:
        recipe = Recipe.of(None, scheme=name, method=self.a.method)
        return preflight(self.a.model, recipe, "gguf", samples=self.a.samples, seqlen=self.a.seqlen)

    def plan(self, size: int, measure: int = 0) -> PlannedRecipe:
        settings = replace(self.settings, measure=measure)
        return plan_recipe(self.a.model, Target(size=size), settings, scores=self.out / "scores")

    def timed(self, size: int) -> Found:
        """What the first plan takes, scores included."""
        begun = time.process_time()
        self.plan(size)
        return {"seconds": time.process_time() - begun}

    def measured(self, space: Space, size: int) -> Found:
        """The plan that measures its steps, and what that takes beside the scores."""
        begun = time.process_time()
        levels = space.levels(_given(self.plan(size, measure=1).plan))
        print(f"steps measured in {time.process_time() - begun:.0f} s of the processor", flush=True)
        return {"levels": levels}

    def random(self, space: Space, folder: Path) -> Levels:
        """The best of many random allocations. One that is far above the best on the first windows is not judged on all."""
        best: Found = {"kl": inf, "begun": inf}
        for seed in range(self.a.random):
            found = once(folder / f"{seed}.json", partial(self.drawn, space, seed, HOPELESS * best["begun"]))
            best = min(best, found, key=lambda one: one["kl"])
        return best["levels"]

    def drawn(self, space: Space, seed: int, most: float) -> Found:
        """One random allocation, with its KL if that on the first windows is at most so much."""
        levels = space.random(Random(seed))
        begun = mean(self.chosen_on.kl(space.schemes(levels), range(FIRST)))
        kl = mean(self.chosen_on.kl(space.schemes(levels))) if begun <= most else inf
        return {"levels": levels, "begun": begun, "kl": kl}

    def search(self, space: Space, parent: Levels, seconds: float) -> Found:
        levels, generations = evolved(space, self.chosen_on, parent, seconds, Random(0))
        print(f"{generations} generations", flush=True)
        return {"levels": levels, "generations": generations}

    def judge(self, space: Space, levels: Levels) -> Found:
        schemes = space.schemes(levels)
        kls = {"chosen on": self.chosen_on.kl(schemes), "judged on": self.judged_on.kl(schemes)}
        return {"bytes": space.bytes(levels), **kls}


def _given(plan: Plan) -> dict[str, str]:
    """The block type of each module of a plan."""
    return {t.layer.name: t.layer.container.lower() for t in plan.tensors if t.layer is not None}


def _row(label: str, row: Found, plan: Found) -> list[str]:
    """KL with its standard error, and how far it is from the plan's, window by window."""
    kl, ours = row["judged on"], plan["judged on"]
    apart = [100 * (theirs - own) / mean(ours) for theirs, own in zip(kl, ours, strict=True)]
    near, far = (f"{mean(row[on]):.5f} ± {_stderr(row[on]):.5f}" for on in ("chosen on", "judged on"))
    return [label, f"{row['bytes']:,}", near, far, f"{mean(apart):+.1f} ± {_stderr(apart):.1f} %"]


def _stderr(values: list[float]) -> float:
    return stdev(values) / sqrt(len(values))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sizes", default="q2_k,q3_k_m,q4_k_m", help="bytes of a file, or mixes of that many")
    parser.add_argument("--schemes", help="candidates, by name; those of `bitwright plan` if not given")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--random", type=int, default=500)
    parser.add_argument("--times", type=float, default=10, help="of a plan's time that the search is given")
    parser.add_argument("--calib", default="general")
    parser.add_argument("--samples", type=int, default=128, help="windows that matrices are scored on")
    parser.add_argument("--chosen", type=int, default=16, help="further windows, that allocations are chosen by")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--text", default="stdlib-heldout")
    parser.add_argument("--judged", type=int, default=64, help="windows of the unseen text")
    return parser.parse_args()


def main() -> None:
    a = arguments()
    bench = Bench(a)
    for name in a.sizes.split(","):
        bench.compare(name)


if __name__ == "__main__":
    main()
