"""How much a method hangs on its calibration: KL by the text it saw and the text judged on, and by the number of windows."""

from argparse import Namespace

from bench.measure import table
from bench.real.results import Bench, kl
from bench.real.tools import DEFAULT, OURS, Job

CALIB = ("wiki", "c4", "code", "tinystories", "general")
TEXTS = ("wikitext2", "c4", "code")
METHODS = ("search", "gptq", "gptaq", "awq+gptq", DEFAULT)
CURVE = ("8", "16", "32", "64", "128", "256", "512")


def by_text(bench: Bench, model: str, scheme: str, args: Namespace) -> str:
    """A row for each method and calibration text, a column for each judged text."""
    rows, texts = [], args.texts or TEXTS
    for method in args.methods or METHODS:
        for calib in args.calib or CALIB:
            job = Job(model, OURS, scheme, method, calib=calib, samples=args.samples or 64, seqlen=args.seqlen)
            found = bench.measured(job, texts)
            rows.append([method, calib, *(kl(found.get(text)) for text in texts)])
    return table(["method", "calibrated on", *texts], rows)


def by_windows(bench: Bench, model: str, scheme: str, args: Namespace) -> str:
    """A row for each method, a column for each number of windows; as many as the text has, if it has fewer."""
    counts, rows = args.curve or CURVE, []
    for method in args.methods or METHODS:
        jobs = [Job(model, OURS, scheme, method, samples=int(count), seqlen=args.seqlen) for count in counts]
        rows.append([method, *(kl(bench.measured(job).get("wikitext2")) for job in jobs)])
    return table(["method", *(f"{count} windows" for count in counts)], rows)


def main(bench: Bench, args: Namespace) -> None:
    """Print two tables for each model and scheme."""
    for model in args.names or ("smollm2-135m",):
        for scheme in args.schemes or ("int3-g64-asym",):
            print(f"\n{model}, {scheme}, KL by texts:\n\n{by_text(bench, model, scheme, args)}", flush=True)
            print(f"\nby windows of wiki, on wikitext2:\n\n{by_windows(bench, model, scheme, args)}", flush=True)
