"""Which method should be the default: KL by model and scheme, models with outlier channels among them."""

from argparse import Namespace

from bench.measure import table
from bench.real.material import OUTLIERS, REAL
from bench.real.results import Bench, kl
from bench.real.tools import OURS, Job

LLAMAS = ("smollm2-135m", "wiki-llama-7m")
MODELS = (*REAL, "wiki-llama-7m", *(f"{name}{OUTLIERS}" for name in LLAMAS))
SCHEMES = ("int4-g64", "int3-g64-asym", "Q4_K_M", "Q3_K_M")
METHODS = (
    "rtn", "search", "gptq", "gptq:damping=0.001", "gptq:damping=0.05", "gptq:damping=0.2", "gptaq",
    "gptaq:correction_damping=0.3", "gptaq:correction_damping=4.0", "awq+search", "awq+gptq", "autoround",
)  # fmt: skip


def main(bench: Bench, args: Namespace) -> None:
    """Print a table for each scheme: a row for each method, a column for each model."""
    calib = {"calib": (args.calib or ("wiki",))[0], "samples": args.samples or 64, "seqlen": args.seqlen}
    names = args.names or MODELS
    for scheme in args.schemes or SCHEMES:
        weights, _, inputs = scheme.partition("+")
        rows = []
        for method in args.methods or METHODS:
            jobs = [Job(name, OURS, weights, method, inputs, **calib) for name in names]
            rows.append([method, *(kl(bench.measured(job).get("wikitext2")) for job in jobs)])
        print(f"\n{scheme}, KL:\n\n{table(['method', *names], rows)}", flush=True)
