"""Planned recipes beside llama.cpp's mixes of exactly as many bytes, and predicted KL beside measured.

    python -m bench.plan MODEL OUT [--mixes q2_k,q3_k_m,q4_k_m] [--schemes A,B,C] [--random 30] [--method gptaq]

For each mix: MODEL is quantized by it, and by a plan of at most its bytes, with the same method and calibration text; both are
judged on a text that neither saw. Then random allocations of all sizes are quantized by round to nearest and judged: the rank
correlation of what was predicted with what was measured. Everything is kept in OUT: an interrupted run goes on.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.measure import once, table
from bitwright.api import evaluate, quantize
from bitwright.pipeline.planned_recipe import PlannedRecipe, Settings, plan_recipe
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from bitwright.plan.target import Target

Found = dict[str, Any]


class Bench:
    """One model, its calibration, and a directory of results."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.a, self.out = arguments, arguments.out
        self.out.mkdir(parents=True, exist_ok=True)

    def settings(self, method: str) -> Settings:
        schemes = tuple(self.a.schemes.split(",")) if self.a.schemes else None
        return Settings(
            "gguf", schemes=schemes, method=method, calib=self.a.calib, samples=self.a.samples, seqlen=self.a.seqlen
        )

    def once(self, name: str, work: Callable[[], Found]) -> Found:
        """The result of some work, done now or found from an earlier run."""
        found = once(self.out / f"{name}.json", work)
        print(f"{name}: {found}", flush=True)
        return found

    def judged(self, name: str, **how: Any) -> Found:
        """Quantize and evaluate: bytes and KL; the quantized file is removed."""
        made = self.out / f"{name}.gguf"
        for leftover in (made, made.with_name(f"{name}.ledger.jsonl")):
            leftover.unlink(missing_ok=True)
        done = quantize(self.a.model, made, calib=self.a.calib, samples=self.a.samples, seqlen=self.a.seqlen, **how)
        found = evaluate(
            made, reference=self.a.model, text=self.a.text, seqlen=self.a.eval_seqlen, tokens=self.a.tokens,
            predictions=self.out / "predictions",
        )  # fmt: skip
        for leftover in (made, made.with_name(f"{name}.ledger.jsonl")):
            leftover.unlink(missing_ok=True)
        return {"bytes": done.bytes, "kl": found.kl_mean, "stderr": found.kl_stderr, "seconds": done.seconds}

    def planned(self, name: str, target: Target, method: str) -> PlannedRecipe:
        """A plan, from scores that are kept; its recipe is in NAME.toml."""
        plan = plan_recipe(self.a.model, target, self.settings(method), scores=self.out / f"scores-{method}")
        (self.out / f"{name}.toml").write_text(plan.text)
        return plan

    def mix(self, mix: str) -> list[str]:
        """One row: a mix, and a plan of as many bytes."""
        method = self.a.method
        recipe = Recipe.of(None, scheme=mix, method=method)
        size = preflight(self.a.model, recipe, "gguf", samples=self.a.samples, seqlen=self.a.seqlen).bytes
        theirs = self.once(f"{mix}-mix", lambda: self.judged(f"{mix}-mix", scheme=mix, method=method))

        def ours() -> Found:
            plan = self.planned(f"{mix}-plan", Target(size=size), method)
            recipe = self.out / f"{mix}-plan.toml"
            return {"predicted": plan.kl, "planning": plan.seconds, **self.judged(f"{mix}-plan", recipe=recipe)}

        plan = self.once(f"{mix}-plan", ours)
        change = 100 * (plan["kl"] / theirs["kl"] - 1)
        return [
            mix, f"{theirs['bytes']:,}", f"{theirs['kl']:.5f}", f"{plan['bytes']:,}", f"{plan['kl']:.5f}",
            f"± {plan['stderr']:.5f}", f"{plan['predicted']:.5f}", f"{change:+.1f} %", f"{plan['planning']:.0f} s",
        ]  # fmt: skip

    def correlation(self, count: int) -> None:
        """Predicted and measured KL of random allocations, rounded to nearest; their rank correlation, and a plot."""
        pairs = [self.once(f"random-{i}", lambda i=i: self.random(i)) for i in range(count)]
        predicted, measured = (torch.tensor([pair[name] for pair in pairs]) for name in ("predicted", "kl"))
        ranks = torch.stack([one.argsort().argsort().double() for one in (predicted, measured)])
        print(
            f"\nrank correlation of predicted and measured KL over {count} allocations: {torch.corrcoef(ranks)[0, 1]:.4f}\n"
        )
        print(plot(predicted.log10().tolist(), measured.log10().tolist()))

    def random(self, seed: int) -> Found:
        """One random allocation: a scheme for each matrix, around a level that differs from plan to plan."""
        plan = self.planned(f"random-{seed}", Target(kl=RANDOM_KL), "rtn")
        generator = torch.Generator().manual_seed(seed)
        level = float(torch.rand(1, generator=generator))
        scores = json_scores(self.out / "scores-rtn")
        rules, predicted = [plan.text.split("[[rule]]")[0]], 0.0
        for one in plan.given:
            (name,) = one.patterns
            known = list(scores[name])
            place = (level + 0.5 * float(torch.randn(1, generator=generator))) * len(known)
            scheme = known[min(len(known) - 1, max(0, int(place)))]
            predicted += scores[name][scheme]
            rules.append(f'[[rule]]\nmatch = "{name}"\nscheme = "{scheme}"\nmethod = "rtn"\n')
        recipe = self.out / f"random-{seed}.toml"
        recipe.write_text("\n".join(rules))
        return {"predicted": predicted, **self.judged(f"random-{seed}", recipe=recipe)}


RANDOM_KL = 0.05  # of the plan whose matrices the random allocations are of


def json_scores(folder: Path) -> dict[str, dict[str, float]]:
    """The scores in a directory, all blocks together."""
    return {
        name: of for file in sorted(folder.glob("block-*.json")) for name, of in json.loads(file.read_text()).items()
    }


def plot(x: list[float], y: list[float], width: int = 60, height: int = 20) -> str:
    """A scatter plot in characters, both axes from the least value to the largest."""
    grid = [[" "] * width for _ in range(height)]
    low, high = min(*x, *y), max(*x, *y)
    for a, b in zip(x, y, strict=True):
        across, up = ((value - low) / (high - low) for value in (a, b))
        grid[height - 1 - round(up * (height - 1))][round(across * (width - 1))] = "o"
    lines = ["|" + "".join(row) for row in grid]
    return "\n".join(["measured KL", *lines, "+" + "-" * width, f" predicted KL, {10**low:.3g} to {10**high:.3g}"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mixes", default="q2_k,q3_k_s,q3_k_m,q4_k_s,q4_k_m,iq4_xs")
    parser.add_argument("--schemes", help="candidates of the plans, by name; those of `bitwright plan` if not given")
    parser.add_argument("--random", type=int, default=30)
    parser.add_argument("--method", default="gptaq")
    parser.add_argument("--calib", default="general")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--text", default="stdlib-heldout")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--eval-seqlen", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    a = arguments()
    bench = Bench(a)
    header = [
        "mix",
        "its bytes",
        "its KL",
        "plan's bytes",
        "plan's KL",
        "standard error",
        "predicted",
        "change",
        "planning",
    ]
    rows = [bench.mix(mix) for mix in a.mixes.split(",") if mix]
    if rows:
        print(table(header, rows))
    if a.random:
        bench.correlation(a.random)


if __name__ == "__main__":
    main()
