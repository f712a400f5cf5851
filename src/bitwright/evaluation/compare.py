"""Compare many methods and number formats on one model: one calibration pass, one table, one HTML page.

Statistics are taken once, on the float model ("one-shot"), for every method that needs no others; the float model's predictions
on the text are computed once, too. Methods that compare with the float model behind quantized blocks (gptaq, autoround) have
to run block by block ("sequential"), and are labelled so. All work is in OUT.partial until OUT appears: a finished candidate
is not done again, an unfinished one is resumed.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bitwright.calibration.text_mix import texts_of
from bitwright.errors import CheckpointError, FormatError, OutputError, RecipeError, SchemeError
from bitwright.evaluation.evaluate import evaluate
from bitwright.evaluation.page import Candidate, Original, page
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file
from bitwright.files.hub import local, name_of
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import calibration_tokens, one_shot
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.run import run
from bitwright.pipeline.work_in_progress import check_out
from bitwright.plan.preflight import Plan, preflight
from bitwright.plan.recipe import Recipe
from bitwright.system.device import device_of
from bitwright.system.memory import forget_peak, peak_since, return_memory
from bitwright.system.progress import Progress
from bitwright.transforms import split_method
from bitwright.version import __version__

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
class Comparison:
    """The result of `compare`.

    refused           impossible combinations, with the reason
    shared_seconds    for planning and the calibration pass; original_seconds: for evaluating the float model
    seconds           all together
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
            "out": str(self.out),
            "page": str(self.out / PAGE),
            "original": asdict(self.original),
            "candidates": [asdict(one) for one in self.candidates],
            "refused": self.refused,
            "notes": self.notes,
            "shared_seconds": round(self.shared_seconds, 2),
            "original_seconds": round(self.original_seconds, 2),
            "seconds": round(self.seconds, 2),
        }


PAGE, JSON = "compare.html", "compare.json"


@dataclass(frozen=True)
class _Contest:
    """A combination of scheme and method, planned but not yet run."""

    scheme: str
    method: str
    plan: Plan

    @property
    def name(self) -> str:
        """The name of its directory in OUT."""
        return f"{self.scheme}-{self.method}"

    def statistics(self, shared: Path, settings: Settings) -> Path | None:
        """The store of statistics that it can use (a rotated model has its own); None: it takes sequential statistics."""
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
    """Quantize `model` by every method to every scheme, evaluate each result, and write table and page to OUT.

    store    a directory that keeps statistics for other runs; None: they are removed in the end
    command  the command line, which the page shows
    Impossible combinations are listed, not run. Raises an InputError before anything is written if all are impossible.
    """
    begun = time.monotonic()
    check_out(out)
    texts_of(settings.calib)
    model = local(model)
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
    """Plans of all possible combinations, and why the others are not. InputError if none is, or a name is given twice."""
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
            "none of these combinations is possible",
            where="; ".join(refused),
            remedy="give other methods or schemes, such as --methods search,gptq --schemes int4-g128",
        )
    return contests, refused


def _plan(model: Path, scheme: str, method: str, settings: Settings) -> Plan:
    """The plan in the first file format that can hold it."""
    recipe = Recipe.uniform(scheme, method, settings.activations, settings.observer)
    formats = [settings.format] if settings.format else list(FORMATS_IN_TURN)
    plan = partial(
        preflight, model, recipe, samples=settings.samples, seqlen=settings.seqlen, device=device_of(settings.device)
    )
    for name in formats[:-1]:
        try:
            return plan(name)
        except (FormatError, SchemeError):
            continue
    return plan(formats[-1])


def _workplace(out: Path, contests: list[_Contest], settings: Settings, *, resume: bool) -> Path:
    """Make OUT.partial, or open it to resume the same comparison. OutputError for other work, or too full a disk."""
    work = out.with_name(out.name + ".partial")
    if work.exists() and not resume:
        shutil.rmtree(work)
    note = work / "comparison.json"
    plan = contests[0].plan
    manifest = {
        "version": __version__,
        "model": [str(plan.source), plan.checkpoint.fingerprint()],
        "candidates": [c.name for c in contests],
        "settings": asdict(settings),
    }
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
    """One progress bar for all steps: statistics, every candidate's shards, every evaluation."""

    def __init__(self, progress: Progress, contests: list[_Contest]) -> None:
        self.progress, self.before = progress, 0
        depth = len(contests[0].plan.skeleton)
        self.each = depth + 2  # steps of a candidate: shards, and the evaluation
        self.total = depth + self.each * len(contests)

    def part(self, what: str, done: int) -> None:
        """Report that `done` steps of the current part are done."""
        self.progress(what, self.before + done, self.total)

    def next(self, size: int) -> None:
        """Begin the next part; the one that is over had `size` steps."""
        self.before += size


def _take_statistics(contests: list[_Contest], shared: Path, settings: Settings, meter: _Meter) -> list[str]:
    """Take the shared statistics, if any candidate can use them; their notes."""
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
        device=device_of(settings.device),
    )
    return found.as_dict()


def _candidate(
    contest: _Contest, model: Path, work: Path, shared: Path, settings: Settings, meter: _Meter
) -> Candidate:
    """Quantize and evaluate one candidate, or read the result of an earlier run."""
    found, folder = work / f"{contest.name}.json", work / contest.name
    if not found.is_file():
        forget_peak()
        took = work / f"{contest.name}.took.json"
        if not took.is_file():
            if folder.exists():  # complete, but the run was killed before it noted the seconds
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
    """Quantize one candidate, and note the seconds that it took."""
    done = run(
        contest.plan,
        folder,
        calib=settings.calib,
        seed=settings.seed,
        store=store,
        progress=lambda _, block, __: meter.part(contest.name, block),
    )
    took = {
        "seconds": done.seconds,
        "peak_rss_bytes": peak_since(),
        "bytes": done.bytes,
        "fallbacks": len(done.fallbacks),
        "statistics": next((e.statistics for e in done.ledger if e.statistics), "none"),
        "losses": dict(_losses(done.ledger)),
    }
    write_file(note, json.dumps(took).encode())


def _losses(ledger: list[Entry]) -> Iterator[tuple[str, float]]:
    for entry in ledger:
        if entry.loss is not None:
            yield entry.name.removesuffix(".weight"), entry.loss


def _read(contest: _Contest, found: Path) -> Candidate:
    """The result of a finished candidate. CheckpointError for a damaged file."""
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
    """Write table and page, remove what only a resumed run needs, and make OUT appear."""
    for leftover in [*work.glob("*.took.json"), *(work / f"{c.scheme}-{c.method}.json" for c in done.candidates)]:
        leftover.unlink(missing_ok=True)
    shutil.rmtree(work / "statistics", ignore_errors=True)
    write_file(work / JSON, (json.dumps(done.as_dict(), indent=1) + "\n").encode())
    text = page(
        model=name_of(model) or model.name,
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
