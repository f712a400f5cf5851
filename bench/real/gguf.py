"""GGUF: ours as it is by default beside llama-quantize with an importance matrix of the same windows, mix by mix."""

from argparse import Namespace
from typing import Any

from bench.measure import table
from bench.real.material import REAL
from bench.real.results import Bench, described
from bench.real.tools import DEFAULT, OURS, Job

MIXES = ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K")
PEER = "llama-quantize"


def rows(bench: Bench, model: str, mix: str, methods: tuple[str, ...], **calib: Any) -> list[list[str]]:
    """The peer first; `less`: KL than the peer's."""
    jobs = [Job(model, PEER, mix, "", **calib), *(Job(model, OURS, mix, method, **calib) for method in methods)]
    found = [(job, row) for job in jobs for row in bench.measured(job).values()]
    peer = next((row["kl_mean"] for job, row in found if job.tool == PEER), None)
    return [
        [model, mix, job.label, f"{row['bytes']:,}", *described(row), _less(row["kl_mean"], peer, job.tool)]
        for job, row in found
    ]


def _less(kl: float, peer: float | None, tool: str) -> str:
    return "" if tool == PEER or peer is None else f"{100 * (1 - kl / peer):.0f} %"


def main(bench: Bench, args: Namespace) -> None:
    """Print the table."""
    calib = {"calib": (args.calib or ("wiki",))[0], "samples": args.samples or 64, "seqlen": args.seqlen}
    methods = args.methods or (DEFAULT,)
    found = [
        row
        for model in args.names or REAL
        for mix in args.mixes or MIXES
        for row in rows(bench, model, mix, methods, **calib)
    ]
    print(table(["model", "mix", "by", "bytes", "KL", "perplexity", "top-1", "less KL"], found))
