"""Merge a LoRA adapter into a quantized model: the adapted model, in float, is what is quantized, and what is judged by.

Rounding the sum of weights and adapter to nearest can erase what the adapter learned, since its changes are smaller than a
step. Here the sum goes through the whole pipeline, with error feedback on text of the adapter's domain; and the result's
KL from the adapted model is measured beside that of rounding to nearest, and of the quantized base with the adapter in 16
bits beside it, which is what engines with adapters run.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitwright.calibration.windows import load_tokenizer
from bitwright.evaluation.domain_text import check_has_parts, two_parts
from bitwright.evaluation.evaluate import Evaluation, evaluate
from bitwright.evaluation.judged_text import check_text
from bitwright.files.checkpoint import disk_errors
from bitwright.files.hub import local
from bitwright.pipeline.options import QuantizeOptions
from bitwright.pipeline.quantize import carried_out, planned
from bitwright.pipeline.result import Result
from bitwright.pipeline.work_in_progress import check_out
from bitwright.system.progress import Progress, named

MERGED, NEAREST, BESIDE = "merged", "rounded to nearest", "quantized base, 16-bit adapter"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to quantize and judge. The first eight as of `quantize`.

    calib         of the adapter's domain; None: general, beside a `text`
    text          a text to judge on; None: the last tenth of the file `calib`, which is then not calibrated on
    tokens        judge on so many tokens; eval_seqlen: in windows of so many
    compared      whether the other two ways are made and judged too
    """

    scheme: str | None = None
    method: str | None = None
    format: str | None = None
    recipe: Path | None = None
    calib: str | None = None
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    text: str | None = None
    tokens: int | None = 8192
    eval_seqlen: int = 256
    compared: bool = True


@dataclass(frozen=True)
class Way:
    """One way to have base and adapter in few bits.

    kl_mean, kl_stderr  KL(adapted model ‖ this) in nats a token
    gain_kept           share of what the adapter takes off the mean −log p of the text that this keeps
    """

    name: str
    perplexity: float
    kl_mean: float
    kl_stderr: float
    top1: float
    gain_kept: float


@dataclass(frozen=True)
class Merged:
    """What `merge` did: the quantized result, and how far each way is from the adapted model on the judged text."""

    result: Result
    text: str
    tokens: int
    base_perplexity: float
    adapted_perplexity: float
    ways: tuple[Way, ...]

    @property
    def worse(self) -> str:
        """Which plainer way came nearer to the adapted model than the merged one; "" if none did."""
        own = self.ways[0]
        nearest = next((way for way in self.ways if way.name == NEAREST), own)
        return NEAREST if nearest.kl_mean < own.kl_mean else ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **self.result.as_dict(),
            "text": self.text,
            "tokens": self.tokens,
            "base_perplexity": self.base_perplexity,
            "adapted_perplexity": self.adapted_perplexity,
            "ways": [asdict(way) for way in self.ways],
        }


def merge(model: Path, adapter: Path, out: Path, *, settings: Settings, resume: bool, progress: Progress) -> Merged:
    """Quantize `model` with `adapter` added to it into `out`, and judge that beside the plainer ways.

    model: a float checkpoint or GGUF file; adapter: in peft's form. Raises as `quantize` and `evaluate`, and CheckpointError
    for an adapter of another model (see models/adapter.py).
    """
    check_out(out)
    calib, text = settings.calib or "general", settings.text
    if text is None:
        check_has_parts(calib)
    model = local(model)
    with disk_errors(out):
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.resolve().parent) as folder:
        room = Path(folder)
        if text is None:
            seen, held = two_parts(calib, load_tokenizer(model), room)
            calib, text = str(seen), str(held)
        check_text(model, text, seqlen=settings.eval_seqlen, tokens=settings.tokens)
        run = partial(_quantize, model, settings=settings)
        done = run(out, adapter=adapter, calib=calib, method=settings.method, resume=resume, progress=progress)
        ways: dict[str, tuple[Path, Path | None]] = {MERGED: (out, None)}
        if settings.compared:
            nearest, beside = room / f"nearest{out.suffix}", room / f"base{out.suffix}"
            rounded, based = named(progress, f"{NEAREST}: "), named(progress, "the base: ")
            run(nearest, adapter=adapter, calib="none", method="rtn", resume=False, progress=rounded)
            run(beside, adapter=None, calib=calib, method=settings.method, resume=False, progress=based)
            ways |= {NEAREST: (nearest, None), BESIDE: (beside, adapter)}
        found = _judged(model, adapter, ways, settings, text, room, progress)
    return Merged(done, settings.text or f"the end of {settings.calib}", *found)


def _quantize(
    model: Path,
    out: Path,
    *,
    settings: Settings,
    progress: Progress,
    adapter: Path | None,
    calib: str,
    method: str | None,
    resume: bool,
) -> Result:
    options = QuantizeOptions(
        scheme=settings.scheme, method=method, format=settings.format, adapter=adapter, calib=calib,
        recipe=settings.recipe if method != "rtn" else None, samples=settings.samples, seqlen=settings.seqlen,
        seed=settings.seed, resume=resume, requantize=None,
    )  # fmt: skip
    return carried_out(planned(model, out, options), out, options, progress=progress)


def _judged(
    model: Path,
    adapter: Path,
    ways: Mapping[str, tuple[Path, Path | None]],
    settings: Settings,
    text: str,
    room: Path,
    progress: Progress,
) -> tuple[int, float, float, tuple[Way, ...]]:
    """Tokens judged on, the perplexity of the base and of the adapted model, and each way."""
    judge = partial(
        evaluate,
        texts=[text],
        reference=model,
        reference_adapter=adapter,
        seqlen=settings.eval_seqlen,
        tokens=settings.tokens,
        predictions=room / "predictions",
    )
    base = judge(model, progress=named(progress, "judging the base: "))[0]
    assert base.reference_perplexity is not None
    gain = math.log(base.perplexity) - math.log(base.reference_perplexity)
    found = []
    for name, (made, beside) in ways.items():
        one: Evaluation = judge(made, adapter=beside, progress=named(progress, f"judging {name}: "))[0]
        assert one.kl_mean is not None and one.kl_stderr is not None and one.top1 is not None
        kept = (math.log(base.perplexity) - math.log(one.perplexity)) / gain if gain else 0.0
        found.append(Way(name, one.perplexity, one.kl_mean, one.kl_stderr, one.top1, kept))
    return base.tokens, base.perplexity, base.reference_perplexity, tuple(found)
