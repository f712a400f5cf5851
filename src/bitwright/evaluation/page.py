"""The HTML page of `compare`: many methods and schemes on one model, in one file without external parts.

`pareto` and `winner` are the rules by which candidates are ranked, here and in the terminal's table. Python computes every
coordinate; the template `page.html` has the layout and looks.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from bitwright.errors import InputError
from bitwright.evaluation.candidate import MIX, RECIPE, UNIFORM, Candidate, Original
from bitwright.evaluation.heat import given, heat

RTN = "rtn"  # the baseline method
# A plot's edges in pixels; ZERO is where 0 is drawn, below a logarithmic axis that ends at BOTTOM.
LEFT, RIGHT, TOP, BOTTOM, ZERO = 44.0, 468.0, 20.0, 282.0, 304.0
BITS = (16, 4, 2, 8, 32, 3, 1, 6, 5, 12, 24, 1.5)  # ticks of bits per weight, in this order while they fit
WIDEST = 68.0  # of a tick's text, in the larger letters of a narrow window
KINDS = {UNIFORM: "one scheme for all", MIX: "llama.cpp’s mixes", RECIPE: "recipes, such as plans"}
COLOURS, SHAPES = 8, 7  # defined in page.html; the first of each is RTN's


@dataclass(frozen=True)
class Verdict:
    """The winner at a scheme: indices of candidates, and by how much it won.

    sigmas  standard errors from the winner's KL to the runner-up's, NaN if unknown: distinguishable if > 2
    """

    scheme: str
    best: int
    runner_up: int | None
    rtn: int | None
    sigmas: float


def pareto(candidates: Sequence[Candidate]) -> set[int]:
    """The Pareto front: candidates that no other beats in bytes or KL while being no worse in both. KL must be finite."""
    return front([(c.bytes, c.kl_mean) for c in candidates])


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """The Pareto front of points (size, cost): sorted by both, those that cost less than all before, and their equals."""
    finite = [i for i, (_, cost) in enumerate(points) if math.isfinite(cost)]
    kept: list[int] = []
    for i in sorted(finite, key=lambda i: points[i]):
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return set(kept)


def schemes(candidates: Sequence[Candidate]) -> list[str]:
    """The candidates' schemes, each once, from the fewest bits to the most."""
    names = dict.fromkeys(c.scheme for c in candidates)
    return sorted(names, key=lambda name: min(c.bits_per_weight for c in candidates if c.scheme == name))


def winner(candidates: Sequence[Candidate], scheme: str) -> Verdict:
    """The winner at one scheme, where all spend about the same bits: the lowest mean KL to the original.

    Ties go to fewer bytes, then to the first listed; a KL that is NaN comes last. `sigmas` is the difference to the
    runner-up in standard errors √(a² + b²), as if the two were independent. Both are measured on the same text, so the true
    error of the difference is smaller. Raises InputError if no candidate has that scheme.
    """
    here = [i for i, c in enumerate(candidates) if c.scheme == scheme]
    if not here:
        raise InputError(
            "no candidate has this scheme", where=scheme, remedy=f"one of {', '.join(schemes(candidates))}"
        )
    here.sort(key=lambda i: (_cost(candidates[i]), candidates[i].bytes))
    best, runner_up = here[0], here[1] if len(here) > 1 else None
    sigmas = math.nan if runner_up is None else _sigmas(candidates[best], candidates[runner_up])
    return Verdict(scheme, best, runner_up, next((i for i in here if candidates[i].method == RTN), None), sigmas)


def _cost(c: Candidate) -> float:
    """The KL by which candidates are ordered; infinite where it is NaN."""
    return math.inf if math.isnan(c.kl_mean) else c.kl_mean


def _sigmas(a: Candidate, b: Candidate) -> float:
    """How many standard errors b's KL is above a's; infinite if b's KL is not finite."""
    if math.isfinite(a.kl_mean) and not math.isfinite(b.kl_mean):
        return math.inf
    difference, error = b.kl_mean - a.kl_mean, math.hypot(a.kl_stderr, b.kl_stderr)
    if error == 0 and not math.isnan(difference):
        return math.inf if difference > 0 else 0.0
    return difference / error


def number(value: float) -> str:
    """A non-negative number to three significant digits; a dash if it is unknown."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    value = float(f"{value:.3g}")
    if value == 0 or value >= 1000:
        return f"{value:.0f}"
    if value < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:#.3g}".removesuffix(".")


def _bytes(value: float) -> str:
    return f"{number(value / 1e9)} GB" if value >= 1e9 else f"{number(value / 1e6)} MB"


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: `low` is drawn at pixel `start`, `high` at `end`, non-finite values at `end`, 0 at `zero`."""

    low: float
    high: float
    start: float
    end: float
    zero: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        if not math.isfinite(value):
            return self.end
        if value <= 0:
            return self.zero
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.start + min(max(share, 0), 1) * (self.end - self.start), 1)


def axis(values: Sequence[float], pads: tuple[float, float], start: float, end: float, zero: float) -> Axis:
    """An axis over all values above 0, padded by shares of its length; a single value gets a factor of 2 either way."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1e-3, 1]
    low, high = min(known), max(known)
    low, high = (low / 2, high * 2) if high < 1.001 * low else (low, high)
    return Axis(low * (high / low) ** -pads[0], high * (high / low) ** pads[1], start, end, zero)


def ticks(low: float, high: float) -> list[float]:
    """Ticks for a logarithmic axis: decades if there are at least three, else finer steps."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [float(f"{mark}e{e}") for e in decades for mark in marks if low <= float(f"{mark}e{e}") <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    power = 10.0 ** math.floor(math.log10(high - low))
    step = next(step for step in (power, power / 2, power / 5) if (high - low) / step >= 4 or step == power / 5)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


@dataclass(frozen=True)
class Mark:
    """A point of a plot, with the ends of its error bar if the error is known; or a tick with its text."""

    x: float
    y: float
    bar: tuple[float, float] | None = None
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """Candidates of one method and kind, in order of size: what more bytes buy when they are spent in one way."""

    kind: str
    method: str
    of: list[int]


def curves(candidates: Sequence[Candidate], cost: str) -> list[Curve]:
    """A curve for each method and kind that has at least two candidates of a finite cost."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, c in sorted(enumerate(candidates), key=lambda pair: pair[1].bytes):
        if math.isfinite(getattr(c, cost)):
            found[c.kind, c.method].append(i)
    return [Curve(*key, of) for key, of in found.items() if len(of) > 1]


@dataclass(frozen=True)
class Plot:
    """A plot of size against a cost, in pixels: `points` in the candidates' order, `front` in order of size."""

    points: list[Mark]
    original: Mark
    front: list[int]
    curves: list["Curve"]
    x_ticks: list[Mark]
    y_ticks: list[Mark]


def plot(candidates: Sequence[Candidate], original: Original, cost: str, stderr: str, base: float) -> Plot:
    """Plot size against the fields `cost` ± 2 `stderr`. `base`: the original's cost; if it is 0, the axis has a place for 0.

    Otherwise the axis ends at three times the original's cost: larger and non-finite values are drawn at its edge.
    """
    pairs = [(getattr(c, cost), 2 * getattr(c, stderr)) for c in candidates]
    bottom, pads = (ZERO, (0.1, 0.05)) if base else (BOTTOM, (0.05, 0.05))
    most = 3 * base if base > 0 else math.inf
    shown = [base, *(end for value, error in pairs for end in (value, value + error) if end <= most)]
    y = axis(shown, pads, bottom, TOP, ZERO)
    x = axis([original.bits_per_weight, *(c.bits_per_weight for c in candidates)], (0.26, 0.07), LEFT, RIGHT, LEFT)
    points = []
    for c, (value, error) in zip(candidates, pairs, strict=True):
        known = value > 0 and math.isfinite(value + error)
        bar = (y.at(max(value - error, y.low)), y.at(value + error)) if known else None
        points.append(Mark(x.at(c.bits_per_weight), y.at(value), bar, () if value <= y.high else ("↑",)))
    on = front([(c.bytes, value) for c, (value, _) in zip(candidates, pairs, strict=True)])
    star = Mark(x.at(original.bits_per_weight), y.at(base))
    y_ticks = [Mark(LEFT, y.at(t), text=(f"{t:g}".replace("e-0", "e-"),)) for t in ticks(y.low, y.high)]
    front_by_size = sorted(on, key=lambda i: candidates[i].bytes)
    return Plot(points, star, front_by_size, curves(candidates, cost), _sizes(x, original), y_ticks)


def _sizes(x: Axis, original: Original) -> list[Mark]:
    """Ticks of bits per weight, with their bytes, far enough apart to be read."""
    bits = [float(tick) for tick in BITS if x.low <= tick <= x.high]
    marks: list[Mark] = []
    for tick in bits if len(bits) > 2 else ticks(x.low, x.high):
        text = f"{tick:g}", _bytes(tick * original.bytes / original.bits_per_weight)
        if all(abs(x.at(tick) - mark.x) >= WIDEST for mark in marks):
            marks.append(Mark(x.at(tick), ZERO, text=text))
    return marks


def best(candidates: Sequence[Candidate]) -> set[tuple[int, str]]:
    """(index, field) of the best values at each scheme: lowest KL, KL tail and perplexity, highest top 1."""
    found = set()
    for scheme in schemes(candidates):
        here = [(i, c) for i, c in enumerate(candidates) if c.scheme == scheme]
        for field, choose in (("kl_mean", min), ("kl_p999", min), ("perplexity", min), ("top1", max)):
            known = [value for _, c in here if not math.isnan(value := getattr(c, field))]
            found |= {(i, field) for i, c in here if known and getattr(c, field) == choose(known)}
    return found


def _names(candidates: Sequence[Candidate]) -> list[str]:
    """Names of the candidates' methods, with the kind of statistics where a method occurs with both."""
    kinds = defaultdict(set)
    for c in candidates:
        kinds[c.method].add(c.statistics)
    return [c.method if len(kinds[c.method]) == 1 else f"{c.method} ({c.statistics})" for c in candidates]


def _markers(candidates: Sequence[Candidate]) -> dict[str, tuple[int, int]]:
    """Each method's colour and shape, in order of appearance; pairs do not repeat for 42 methods."""
    others = [method for method in dict.fromkeys(c.method for c in candidates) if method != RTN]
    return {RTN: (0, 0)} | {m: (1 + i % (COLOURS - 1), 1 + i % (SHAPES - 1)) for i, m in enumerate(others)}


def headline(
    verdicts: list[Verdict], candidates: list[Candidate], names: list[str]
) -> dict[tuple[Any, ...], list[str]]:
    """The page's first sentence: (a candidate of the winning method, verb, reservation) -> schemes where that holds."""
    found: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for v in verdicts:
        does, but = "wins", ""
        if not math.isfinite(candidates[v.best].kl_mean):
            does, but = "comes first", ", but no KL is finite"
        elif v.runner_up is None:
            does = "is alone"
        elif not v.sigmas > 2:
            does, but = "leads", f", not distinguishable from {names[v.runner_up]}"
        found[names.index(names[v.best]), does, but].append(v.scheme)
    return found


def page(
    *,
    model: str,
    reference: Original,
    candidates: list[Candidate],
    shared_seconds: float,
    notes: list[str],
    command: str,
) -> str:
    """The whole HTML document. InputError if there is no candidate."""
    if not candidates:
        raise InputError(
            "nothing to compare", where=model, remedy="name at least one of each: --schemes int4-g128 --methods gptq"
        )
    verdicts = [winner(candidates, scheme) for scheme in schemes(candidates)]
    order = {verdict.scheme: place for place, verdict in enumerate(verdicts)}
    names = _names(candidates)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        model=model,
        original=reference,
        candidates=candidates,
        shared_seconds=shared_seconds,
        notes=notes,
        command=command,
        verdicts=verdicts,
        names=names,
        markers=_markers(candidates),
        number=number,
        size=_bytes,
        ranked=sorted(range(len(candidates)), key=lambda i: (order[candidates[i].scheme], _cost(candidates[i]))),
        kl=plot(candidates, reference, "kl_mean", "kl_stderr", 0.0),
        perplexity=plot(candidates, reference, "perplexity", "perplexity_stderr", reference.perplexity),
        best=best(candidates),
        headline=headline(verdicts, candidates, names),
        heat=heat(candidates),
        given=given(candidates),
        kinds={kind: what for kind, what in KINDS.items() if any(c.kind == kind for c in candidates)},
        edges=(LEFT, RIGHT, TOP, BOTTOM, ZERO),
        chosen=verdicts[0].best,
    )
