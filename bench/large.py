"""A Llama of 1B shape on a laptop's memory: time and peak memory, and that memory does not grow with depth.

python -m bench.large
"""

import shutil
import sys

from bench.measure import BITWRIGHT, OUT, run, table


def main() -> None:
    work = OUT / "large"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows = []
    for blocks in (8, 16):
        model = work / f"llama-1b-{blocks}"
        run([sys.executable, "-m", "bench.make_llama", str(model), "--size", "1b", "--blocks", str(blocks)])
        for method in ("rtn", "gptq"):
            options = ["--method", method, "--scheme", "int4-g128", "--samples", "32", "--seqlen", "512", "--json"]
            done = run([*BITWRIGHT, "quantize", str(model), str(work / f"{method}-{blocks}"), *options])
            rows.append([str(blocks), method, f"{done.seconds:.0f}", f"{done.megabytes:.0f}"])
            print(rows[-1], file=sys.stderr, flush=True)
            shutil.rmtree(work / f"{method}-{blocks}")
        shutil.rmtree(model)
    print(table(["blocks (1B shape, int4-g128, 32 × 512 tokens)", "method", "seconds", "peak MB"], rows))


if __name__ == "__main__":
    main()
