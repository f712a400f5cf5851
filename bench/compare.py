"""What `compare` costs beside single runs: 3 schemes × 4 methods in one go, and the slowest of the twelve alone.

    python -m bench.compare [--tokens 16384]

On wiki-llama-7m with 128 × 256 tokens. Whole processes; evaluations, which both need, are taken out of compare's time.
Needs ../shared.
"""

import argparse
import shutil
import sys

from bench.measure import BITWRIGHT, OUT, SHARED, run, table

MODEL, CALIB, TEXT = SHARED / "models/wiki-llama-7m", SHARED / "text/wiki.txt", SHARED / "text/wikitext2_raw_test.txt"
SCHEMES, METHODS = ("int4-g128", "int3-g128", "q4_k"), ("rtn", "awq", "gptq", "awq+gptq")
CALIBRATION = ["--calib", str(CALIB), "--samples", "128", "--seqlen", "256", "--json"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16384")
    args = parser.parse_args()
    work = OUT / "compare"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lists = ["--schemes", ",".join(SCHEMES), "--methods", ",".join(METHODS)]
    judged = ["--text", str(TEXT), "--tokens", args.tokens]
    whole = run([*BITWRIGHT, "compare", str(MODEL), str(work / "all"), *lists, *CALIBRATION, *judged])
    rounding = sum(c["seconds"] for c in whole.result["candidates"])
    evaluations = whole.result["seconds"] - rounding - whole.result["shared_seconds"]
    single = {}
    for scheme in SCHEMES:
        for method in METHODS:
            more = ["--scheme", scheme, "--method", method, *(["--format", "bitwright"] if scheme == "q4_k" else [])]
            out = work / f"{scheme}-{method}"
            single[f"{scheme} {method}"] = run(
                [*BITWRIGHT, "quantize", str(MODEL), str(out), *more, *CALIBRATION]
            ).seconds
            print(scheme, method, f"{single[f'{scheme} {method}']:.1f} s", file=sys.stderr, flush=True)
    slowest = max(single, key=lambda name: single[name])
    own = whole.seconds - evaluations
    rows = [
        ["compare, 12 candidates", f"{whole.seconds:.1f}"],
        ["of which evaluations", f"{evaluations:.1f}"],
        [f"slowest single run: {slowest}", f"{single[slowest]:.1f}"],
        ["all 12 single runs", f"{sum(single.values()):.1f}"],
        ["compare without evaluations / slowest single run", f"{own / single[slowest]:.2f}"],
    ]
    print(table(["whole process", "seconds"], rows))


if __name__ == "__main__":
    main()
