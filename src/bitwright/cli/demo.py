"""`bitwright demo`: quantize the built-in model, verify, evaluate and compare, with no network."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from bitwright.api import evaluate, quantize
from bitwright.evaluation.evaluate import Evaluation
from bitwright.system.progress import Progress

MODEL = Path(__file__).parents[1] / "builtin"
SCHEMES = ("int8-channel", "int4-g128", "int3-g128", "int2-g64")
METHODS = ("rtn", "gptq")
HEADER = (
    "scheme",
    "method",
    "bits",
    "MB",
    "perplexity",
    "KL",
    "top-1",
    "seconds",
)  # bits per weight; KL to the original
CALIBRATION, EVALUATION = "stdlib", "stdlib-heldout"  # what the built-in model was trained on, and what was held out
SEQLEN, TOKENS = 256, 12288


def demo(say: Callable[[str], None], progress: Progress) -> list[list[str]]:
    """Quantize the built-in model by each scheme and method; the rows of the table under `HEADER`."""
    original = evaluate(MODEL, text=EVALUATION, seqlen=SEQLEN, tokens=TOKENS)
    size = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    rows = [_row("bf16", "original", original, size, 0.0)]
    with tempfile.TemporaryDirectory(prefix="bitwright-demo-") as folder:
        for scheme in SCHEMES:
            for method in METHODS:
                say(f"{scheme} by {method}: quantize, read back, compare, evaluate")
                out = Path(folder) / f"{scheme}-{method}"
                done = quantize(
                    MODEL,
                    out,
                    scheme=scheme,
                    method=method,
                    calib=CALIBRATION,
                    samples=64,
                    seqlen=SEQLEN,
                    progress=progress,
                )
                cost = evaluate(out, reference=MODEL, text=EVALUATION, seqlen=SEQLEN, tokens=TOKENS)
                rows.append(_row(scheme, method, cost, done.bytes, done.seconds))
    return rows


def _row(scheme: str, method: str, e: Evaluation, size: int, seconds: float) -> list[str]:
    kl = "–" if e.kl_mean is None else f"{e.kl_mean:.5f}"
    top1 = "–" if e.top1 is None else f"{100 * e.top1:.1f} %"
    perplexity = f"{e.perplexity:.2f} ± {e.perplexity_stderr:.2f}"
    return [scheme, method, f"{e.bits_per_weight:.2f}", f"{size / 1e6:.2f}", perplexity, kl, top1, f"{seconds:.1f}"]
