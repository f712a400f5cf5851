"""compressed-tensors: our methods beside llm-compressor, auto-round and GPTQModel on the same windows and groups."""

from argparse import Namespace
from typing import Any

from bench.measure import table
from bench.real.results import Bench, described
from bench.real.tools import DEFAULT, OURS, TOOLS, Job

SCHEMES = ("int4-g64", "int3-g64-asym", "int3-g64", "int2-g32-asym", "int8-channel+int8-token")
METHODS = ("rtn", "search", "gptq", "awq+gptq", "autoround", DEFAULT)
PEERS = tuple(name for name in TOOLS if name not in (OURS, "llama-quantize"))


def jobs(model: str, scheme: str, methods: tuple[str, ...], **calib: Any) -> list[Job]:
    """Ours, then the peers that can round inputs where the scheme says so: int8-channel+int8-token."""
    weights, _, inputs = scheme.partition("+")
    mine = [Job(model, OURS, weights, method, inputs, **calib) for method in methods]
    able = [name for name in PEERS if TOOLS[name].activations or not inputs]
    return mine + [Job(model, name, weights, "", inputs, **calib) for name in able]


def shown(job: Job, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    scheme = "+".join(part for part in (job.scheme, job.activations) if part)
    stored = f"{row['bits_per_weight']:.3f}" if TOOLS[job.tool].stores else "–"
    return [job.model, scheme, job.label, stored, *described(row)]


def main(bench: Bench, args: Namespace) -> None:
    """Print the table."""
    calib = {"calib": (args.calib or ("wiki",))[0], "samples": args.samples or 32, "seqlen": args.seqlen}
    found = [
        shown(job, row)
        for model in args.names or ("smollm2-135m",)
        for scheme in args.schemes or SCHEMES
        for job in jobs(model, scheme, args.methods or METHODS, **calib)
        for row in bench.measured(job).values()
    ]
    print(table(["model", "scheme", "by", "bits/weight", "KL", "perplexity", "top-1"], found))
