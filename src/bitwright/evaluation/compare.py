"""Compare many methods and number formats on one model: one calibration pass, one table, one HTML page.

Statistics are taken once, on the float model ("one-shot"), for every method that needs no others; the float model's predictions
on the text are computed once, too. Methods that compare with the float model behind quantized blocks (gptaq, autoround) have
to run block by block ("sequential"), and are labelled so. All work is in OUT.partial until OUT appears: a finished candidate
is not done again, an unfinished one is resumed.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from bitwright.calibration.text_mix import check_texts
from bitwright.errors import CheckpointError, OutputError
from bitwright.evaluation.candidate import Candidate, Original
from bitwright.evaluation.contests import Asked, Contest, Settings, contests_of
from bitwright.evaluation.evaluate import evaluate
from bitwright.evaluation.judged_text import check_text
from bitwright.evaluation.page import page
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file
from bitwright.files.hub import local, name_of
from bitwright.pipeline.calibration_pass import calibration_tokens, one_shot
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.run import run
from bitwright.pipeline.work_in_progress import check_out, ledger_beside
from bitwright.system.device import device_of
from bitwright.system.memory import forget_peak, peak_since, return_memory
from bitwright.system.progress import Progress
from bitwright.version import __version__


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


def compare(
    model: Path,
    out: Path,
    *,
    schemes: Sequence[str],
    methods: Sequence[str],
    mixes: Sequence[str] = (),
    recipes: Sequence[Path] = (),
    settings: Settings | None = None,
    store: Path | None = None,
    resume: bool = True,
    command: str = "",
    progress: Progress = lambda *_: None,
) -> Comparison:
    """Quantize `model` by every method to every scheme, evaluate each result, and write table and page to OUT.

    mixes    of llama.cpp's block types, such as "q4_k_m", by every method too; made as GGUF files
    recipes  files, such as `bitwright plan` writes; each is a candidate
    store    a directory that keeps statistics for other runs; None: they are removed in the end
    command  the command line, which the page shows
    Impossible combinations are listed, not run. Raises an InputError before anything is written if all are impossible.
    """
    begun, settings = time.monotonic(), settings or Settings()
    check_out(out)
    check_texts(settings.calib)
    model = local(model)
    asked = Asked(tuple(schemes), tuple(methods), tuple(mixes), tuple(recipes))
    contests, refused = contests_of(model, asked, settings)
    check_text(model, settings.text, seqlen=settings.eval_seqlen, tokens=settings.tokens)
    work = _workplace(out, contests, settings, resume=resume)
    shared = store or work / "statistics"
    meter = _Meter(progress, contests)
    notes = _take_statistics(contests, shared, settings, meter)
    shared_seconds = time.monotonic() - begun
    original = _original(model, settings, meter)
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
    _finish(done, [contest.name for contest in contests], model, work, command)
    return done


def _workplace(out: Path, contests: list[Contest], settings: Settings, *, resume: bool) -> Path:
    """Make OUT.partial, or open it to resume the same comparison. OutputError for other work, or too full a disk."""
    work = out.with_name(out.name + ".partial")
    if work.exists() and not resume:
        shutil.rmtree(work)
    note = work / "comparison.json"
    plan = contests[0].plan
    manifest = {
        "version": __version__,
        "model": [str(plan.source), plan.checkpoint.fingerprint()],
        "candidates": [[c.name, [rule.describe() for rule in c.plan.recipe.rules]] for c in contests],
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

    def __init__(self, progress: Progress, contests: list[Contest]) -> None:
        self.progress, self.before = progress, 0
        self.depth = len(contests[0].plan.skeleton)  # blocks: steps of the statistics, and of each evaluation
        self.shards = self.depth + 1  # steps of quantizing a candidate
        self.total = 2 * self.depth + (self.shards + self.depth) * len(contests)

    def part(self, what: str, done: int) -> None:
        """Report that `done` steps of the current part are done."""
        self.progress(what, self.before + done, self.total)

    def judging(self, whose: str) -> Progress:
        """Progress of an evaluation."""
        return lambda _, done, __: self.part(f"{whose}: evaluation", done)

    def waiting(self, whose: str) -> Progress:
        """Progress of the reference's predictions, where an evaluation needs them first: no steps of their own."""
        return lambda *_: self.part(f"{whose}: the reference", self.depth)

    def next(self, size: int) -> None:
        """Begin the next part; the one that is over had `size` steps."""
        self.before += size


def _take_statistics(contests: list[Contest], shared: Path, settings: Settings, meter: _Meter) -> list[str]:
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
    meter.next(meter.depth)
    return notes


def _original(model: Path, settings: Settings, meter: _Meter) -> Original:
    """The float model's size, and its perplexity on the text."""
    judged = _judged(model, None, None, settings, meter, "the original")
    meter.next(meter.depth)
    source = Checkpoint(model)
    size = sum(file.stat().st_size for file in {info.file for info in source.tensors.values()})
    dtypes = {str(info.dtype).removeprefix("torch.") for info in source.tensors.values() if len(info.shape) > 1}
    return Original(
        ", ".join(sorted(dtypes)), judged["bits_per_weight"], size, judged["perplexity"], judged["perplexity_stderr"]
    )


def _judged(
    folder: Path, reference: Path | None, predictions: Path | None, settings: Settings, meter: _Meter, whose: str
) -> dict[str, Any]:
    """An evaluation as plain data. whose: its name in the meter."""
    (found,) = evaluate(
        folder,
        reference=reference,
        texts=[settings.text],
        seqlen=settings.eval_seqlen,
        tokens=settings.tokens,
        predictions=predictions,
        device=device_of(settings.device),
        progress=meter.judging(whose),
        reference_progress=meter.waiting(whose),
    )
    return found.as_dict()


def _candidate(contest: Contest, model: Path, work: Path, shared: Path, settings: Settings, meter: _Meter) -> Candidate:
    """Quantize and evaluate one candidate, or read the result of an earlier run."""
    found, folder = work / f"{contest.name}.json", work / contest.name
    if found.is_file():
        meter.next(meter.shards + meter.depth)
        return _read(contest, found)
    forget_peak()
    took = work / f"{contest.name}.took.json"
    if not took.is_file():
        if folder.exists():  # complete, but the run was killed before it noted the seconds
            _remove(folder)
        _quantize(contest, folder, took, contest.statistics(shared, settings), settings, meter)
    meter.next(meter.shards)
    judged = _judged(folder, model, shared, settings, meter, contest.name)
    meter.next(meter.depth)
    write_file(found, json.dumps(json.loads(took.read_text(encoding="utf-8")) | {"judged": judged}).encode())
    if not settings.keep:
        _remove(folder)
    return_memory()
    return _read(contest, found)


def _quantize(
    contest: Contest, folder: Path, note: Path, store: Path | None, settings: Settings, meter: _Meter
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
        "given": {e.name.removesuffix(".weight"): (e.scheme, _bits(e)) for e in done.ledger if e.scheme},
    }
    write_file(note, json.dumps(took).encode())


def _remove(made: Path) -> None:
    """Remove a quantized checkpoint: a directory, or a GGUF file with its ledger."""
    if made.is_dir():
        shutil.rmtree(made)
    else:
        for file in (made, ledger_beside(made)):
            file.unlink(missing_ok=True)


def _losses(ledger: list[Entry]) -> Iterator[tuple[str, float]]:
    for entry in ledger:
        if entry.loss is not None:
            yield entry.name.removesuffix(".weight"), entry.loss


def _bits(entry: Entry) -> float:
    return 8 * entry.bytes / max(1, prod(entry.shape))


def _read(contest: Contest, found: Path) -> Candidate:
    """The result of a finished candidate. CheckpointError for a damaged file."""
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        e = content.pop("judged")
        numbers = {name: e[name] for name in ("bits_per_weight", "perplexity", "perplexity_stderr", "top1")}
        divergence = {name: e[name] for name in ("kl_mean", "kl_stderr", "kl_p999")}
        given = {name: (scheme, bits) for name, (scheme, bits) in content.pop("given").items()}
        return Candidate(
            contest.scheme, contest.method, **numbers, **divergence, **content, kind=contest.kind, given=given
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "remove the file, and this candidate is judged again"
        raise CheckpointError(f"not a result: {error}", where=str(found), remedy=remedy) from error


def _finish(done: Comparison, names: list[str], model: Path, work: Path, command: str) -> None:
    """Write table and page, remove what only a resumed run needs, and make OUT appear."""
    for leftover in [*work.glob("*.took.json"), *(work / f"{name}.json" for name in names)]:
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
