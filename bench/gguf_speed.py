"""How long a whole conversion without data takes, beside llama-quantize on the same two threads; whole processes.

    python -m bench.gguf_speed [--mixes Q4_K_M,Q2_K,Q4_0] [--method search]

1.1 B parameters in Llama's shape with random weights; llama-quantize reads them from a .gguf file, bitwright from the
checkpoint's directory. Needs `bench/peers/install.sh llamacpp` and 5 GB of disk.
"""

import argparse
import shutil
import sys
import time

import torch

from bench.gguf_vs_llamacpp import tool
from bench.measure import BITWRIGHT, OUT, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default="Q4_K_M,Q2_K,Q4_0")
    parser.add_argument("--method", default="search", help="rtn: without a search of scales, as llama-quantize at Q8_0")
    args = parser.parse_args()
    work = OUT / "gguf-speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model, source = work / "llama-1b", work / "float.gguf"
    run([sys.executable, "-m", "bench.make_llama", str(model), "--size", "1b"])
    run([*BITWRIGHT, "convert", str(model), str(source), "--json"])
    rows, threads = [], str(torch.get_num_threads())
    for mix in args.mixes.split(","):
        mine, theirs = work / f"mine-{mix}.gguf", work / "theirs.gguf"
        how = ["--scheme", mix, "--method", args.method, "--calib", "none", "--json"]
        done = run([*BITWRIGHT, "quantize", str(model), str(mine), *how])
        begun = time.monotonic()
        tool("llama-quantize", str(source), str(theirs), mix, threads)
        rows.append([mix, f"{done.seconds:.1f}", f"{time.monotonic() - begun:.1f}", f"{done.megabytes:.0f}"])
        mine.unlink()
    print(table(["mix", "bitwright, seconds", "llama-quantize, seconds", "bitwright's peak MB"], rows))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
