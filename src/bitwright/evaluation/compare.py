"""Many methods and number formats on one model, for about the price of one: one calibration pass, one table, one page.

Statistics are taken once, on the float model, and serve every method that asks for no more; what the float model
predicts of the text is computed once, too. Methods that compare with what the quantized blocks before give (gptaq,
autoround) have to run block by block, and are labelled as such. All work lies in OUT.partial until OUT appears: a
candidate that is finished is never done again, one that is not goes on where it stopped.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import CheckpointError, FormatError, OutputError, RecipeError, SchemeError
from bitwright.evaluation.evaluate import evaluate
from bitwright.evaluation.page import Candidate, Original, page
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import calibration_tokens, one_shot
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.run import run
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.preflight import Plan, preflight
from bitwright.plan.recipe import Recipe
from bitwright.system.memory import forget_peak, peak_since, return_memory
from bitwright.system.progress import Progress
from bitwright.transforms import split_method
from bitwright.version import __version__

FORMATS_IN_TURN = ("compressed-tensors", "bitwright")  # the first that can hold a candidate


@dataclass(frozen=True)
class Settings:
    """What all candidates have in common; as for `quantize` and `evaluate`.

    calib, samples, seqlen, seed  calibration;  text, tokens, eval_seqlen  evaluation
    activations, observer         rounding of inputs;  format: None: the first that can hold a candidate
    sequential                    take statistics anew for each candidate, block by block, as `quantize` does
    keep                          keep what was written; else each candidate is removed once it is judged
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


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    refused: combinations that cannot be, with the reason. shared_seconds: plans and the calibration pass;
    original_seconds: the float model's own evaluation; seconds: all together.
    """

    out: Path
    original: Original
    candidates: list[Candidate]
    refused: list[str]
    notes: list[str]
    shared_seconds: float
    original_seconds: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """{out, page, original, candidates, refused, notes, shared_seconds, original_seconds, seconds}."""
        return {
            "out": str(self.out), "page": str(self.out / PAGE), "original": asdict(self.original),
            "candidates": [asdict(one) for one in self.candidates], "refused": self.refused, "notes": self.notes,
            "shared_seconds": round(self.shared_seconds, 2), "original_seconds": round(self.original_seconds, 2),
            "seconds": round(self.seconds, 2),
        }  # fmt: skip


PAGE, JSON = "compare.html", "compare.json"


@dataclass(frozen=True)
class _Contest:
    """A candidate before it is run."""

    scheme: str
    method: str
    plan: Plan

    @property
    def name(self) -> str:
        """Its directory in OUT."""
        return f"{self.scheme}-{self.method}"

    def statistics(self, shared: Path, settings: Settings) -> Path | None:
        """Where the statistics that it can use lie: those of a rotated model apart. None: it takes its own."""
        if settings.sequential or not self.plan.calibrated or self.plan.recipe.needs_original:
            return None
        turn = self.plan.rotation.rotate if self.plan.rotation else None
        return shared if turn is None else shared / f"rotated-{turn.seed}{'-online' if turn.online else ''}"


def compare(
    model: Path,
    out: Path,
    *,
    schemes: list[str],
    methods: list[str],
    settings: Settings = Settings(),
    store: Path | None = None,
    resume: bool = True,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Quantize `model` by every method to every scheme, judge each result, and write table and page to OUT.

    store: a directory to keep statistics in, for other runs; None: they go when the work is done. Combinations that
    mean nothing are listed, not run. Raises the InputError of whatever stops all of them before anything is written.
    """
    begun = time.monotonic()
    check_out(out)
    texts_of(settings.calib)
    contests, refused = _contests(model, schemes, methods, settings)
    work = _workplace(out, contests, settings, resume=resume)
    shared = store or work / "statistics"
    meter = _Meter(progress, contests)
    notes = _take_statistics(contests, shared, settings, meter)
    shared_seconds = time.monotonic() - begun
    original = _original(model, settings)
    original_seconds = time.monotonic() - begun - shared_seconds
    candidates = [_candidate(contest, model, work, shared, settings, meter) for contest in contests]
    done = Comparison(
        out,
        original,
        candidates,
        refused,
        [*refused, *notes],
        shared_seconds,
        original_seconds,
        time.monotonic() - begun,
    )
    _finish(done, model, work, command)
    return done


def _contests(
    model: Path, schemes: list[str], methods: list[str], settings: Settings
) -> tuple[list[_Contest], list[str]]:
    """Plans of all combinations that can be, and why the others cannot. InputError if none can, or one is named twice."""
    for kind, names in (("scheme", schemes), ("method", methods)):
        if not names or len(set(names)) < len(names):
            raise RecipeError(
                f"a {kind} is named twice, or none is", where=",".join(names), remedy=f"name each {kind} once"
            )
    for scheme in schemes:
        Scheme.parse(scheme)
    for method in methods:
        split_method(method)
    contests, refused = [], []
    for scheme, method in product(schemes, methods):
        try:
            contests.append(_Contest(scheme, method, _plan(model, scheme, method, settings)))
        except (RecipeError, FormatError) as error:
            refused.append(f"{scheme} by {method} was not run: {error.message}")
    if not contests:
        raise RecipeError(
            "none of these combinations can be", where="; ".join(refused), remedy="other methods or schemes"
        )
    return contests, refused


def _plan(model: Path, scheme: str, method: str, settings: Settings) -> Plan:
    """The plan in the first file format that can hold it."""
    recipe = Recipe.uniform(scheme, method, settings.activations, settings.observer)
    formats = [settings.format] if settings.format else list(FORMATS_IN_TURN)
    for name in formats[:-1]:
        try:
            return preflight(model, recipe, name, samples=settings.samples, seqlen=settings.seqlen)
        except (FormatError, SchemeError):
            continue
    return preflight(model, recipe, formats[-1], samples=settings.samples, seqlen=settings.seqlen)


def _workplace(out: Path, contests: list[_Contest], settings: Settings, *, resume: bool) -> Path:
    """OUT.partial, new or with the very same comparison in it. OutputError for other work, or too full a disk."""
    work = out.with_name(out.name + ".partial")
    if work.exists() and not resume:
        shutil.rmtree(work)
    note = work / "comparison.json"
    plan = contests[0].plan
    manifest = {
        "version": __version__, "model": [str(plan.source), plan.checkpoint.fingerprint()],
        "candidates": [c.name for c in contests], "settings": asdict(settings),
    }  # fmt: skip
    text = json.dumps(manifest, indent=1)
    if work.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != text):
        remedy = "finish it with the same arguments, or start afresh with --restart"
        raise OutputError("unfinished work of another kind lies here", where=str(work), remedy=remedy)
    sizes = [c.plan.bytes for c in contests]
    needed = (sum(sizes) if settings.keep else max(sizes)) + plan.statistics_bytes
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free and not work.exists():
        remedy = "free some space, or --no-keep what was judged"
        raise OutputError(
            f"about {needed:,} bytes are needed, the disk has {free:,} free", where=str(out), remedy=remedy
        )
    with disk_errors(work):
        work.mkdir(exist_ok=True)
    write_file(note, text.encode())
    return work


class _Meter:
    """One progress display for all: statistics, every candidate's shards, every judgement."""

    def __init__(self, progress: Progress, contests: list[_Contest]) -> None:
        self.progress, self.before = progress, 0
        depth = len(contests[0].plan.skeleton)
        self.each = depth + 2  # shards, and the judgement
        self.total = depth + self.each * len(contests)

    def part(self, what: str, done: int) -> None:
        """So much of the present part is done."""
        self.progress(what, self.before + done, self.total)

    def next(self, size: int) -> None:
        """A part of that size is over."""
        self.before += size


def _take_statistics(contests: list[_Contest], shared: Path, settings: Settings, meter: _Meter) -> list[str]:
    """The shared pass, if any candidate can use it; what it has to say."""
    notes: list[str] = []
    with disk_errors(shared):
        shared.mkdir(parents=True, exist_ok=True)
    served = [c for c in contests if c.statistics(shared, settings) == shared]
    if served:
        plan = served[0].plan
        drawn = calibration_tokens(plan, settings.calib, settings.seed)
        taken = one_shot(
            plan, shared, drawn.seen, lambda _, done, __: meter.part("statistics of the float model", done)
        )
        notes += [*drawn.notes[len(plan.notes) :], *taken.notes]
        return_memory()
    meter.next(len(contests[0].plan.skeleton))
    return notes


def _original(model: Path, settings: Settings) -> Original:
    """The float model's size, and its perplexity on the text."""
    judged = _judged(model, None, None, settings)
    source = Checkpoint(model)
    size = sum(file.stat().st_size for file in {info.file for info in source.tensors.values()})
    dtypes = {str(info.dtype).removeprefix("torch.") for info in source.tensors.values() if len(info.shape) > 1}
    return Original(
        ", ".join(sorted(dtypes)), judged["bits_per_weight"], size, judged["perplexity"], judged["perplexity_stderr"]
    )


def _judged(folder: Path, reference: Path | None, predictions: Path | None, settings: Settings) -> dict[str, Any]:
    """An evaluation as plain data."""
    (found,) = evaluate(
        folder,
        reference=reference,
        texts=[settings.text],
        seqlen=settings.eval_seqlen,
        tokens=settings.tokens,
        predictions=predictions,
    )
    return found.as_dict()


def _candidate(
    contest: _Contest, model: Path, work: Path, shared: Path, settings: Settings, meter: _Meter
) -> Candidate:
    """Quantize and judge one, or read what an earlier run had found."""
    found, folder = work / f"{contest.name}.json", work / contest.name
    if not found.is_file():
        forget_peak()
        took = work / f"{contest.name}.took.json"
        if not took.is_file():
            if folder.exists():  # written, but killed before it was noted what that took
                shutil.rmtree(folder)
            _quantize(contest, folder, took, contest.statistics(shared, settings), settings, meter)
        meter.part(f"{contest.name}: evaluation", meter.each - 1)
        result = json.loads(took.read_text(encoding="utf-8")) | {"judged": _judged(folder, model, shared, settings)}
        write_file(found, json.dumps(result).encode())
        if not settings.keep:
            shutil.rmtree(folder)
        return_memory()
    meter.next(meter.each)
    return _read(contest, found)


def _quantize(
    contest: _Contest, folder: Path, note: Path, store: Path | None, settings: Settings, meter: _Meter
) -> None:
    """Quantize one candidate, and note what it took."""
    done = run(
        contest.plan,
        folder,
        calib=settings.calib,
        seed=settings.seed,
        store=store,
        progress=lambda _, block, __: meter.part(contest.name, block),
    )
    took = {
        "seconds": done.seconds, "peak_rss_bytes": peak_since(), "bytes": done.bytes, "fallbacks": len(done.fallbacks),
        "statistics": next((e.statistics for e in done.ledger if e.statistics), "none"),
        "losses": dict(_losses(done.ledger)),
    }  # fmt: skip
    write_file(note, json.dumps(took).encode())


def _losses(ledger: list[Entry]) -> Iterator[tuple[str, float]]:
    for entry in ledger:
        if entry.loss is not None:
            yield entry.name.removesuffix(".weight"), entry.loss


def _read(contest: _Contest, found: Path) -> Candidate:
    """A finished candidate. CheckpointError for a note that is damaged."""
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        e = content.pop("judged")
        numbers = {name: e[name] for name in ("bits_per_weight", "perplexity", "perplexity_stderr", "top1")}
        divergence = {name: e[name] for name in ("kl_mean", "kl_stderr", "kl_p999")}
        return Candidate(contest.scheme, contest.method, **numbers, **divergence, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "remove the file, and this candidate is judged again"
        raise CheckpointError(f"not a result: {error}", where=str(found), remedy=remedy) from error


def _finish(done: Comparison, model: Path, work: Path, command: str) -> None:
    """Write table and page, drop what only a resumption needs, and let OUT appear."""
    for leftover in [*work.glob("*.took.json"), *(work / f"{c.scheme}-{c.method}.json" for c in done.candidates)]:
        leftover.unlink(missing_ok=True)
    shutil.rmtree(work / "statistics", ignore_errors=True)
    write_file(work / JSON, (json.dumps(done.as_dict(), indent=1) + "\n").encode())
    text = page(
        model=model.name,
        reference=done.original,
        candidates=done.candidates,
        shared_seconds=done.shared_seconds,
        notes=done.notes,
        command=command,
    )
    write_file(work / PAGE, text.encode())
    (work / "comparison.json").unlink()
    with disk_errors(done.out):
        work.rename(done.out)
