"""How long a whole conversion without a text takes, beside llama-quantize on the same two threads; whole processes.

    python -m bench.gguf_speed [--mixes Q4_K_M,Q2_K,Q4_0,Q8_0] [--method search] [--times 3] [--weighted]

1.1 B parameters in Llama's shape with random weights. llama-quantize reads them from a .gguf file; so does bitwright, and from
the checkpoint's directory as well. Medians, the three taking turns. --weighted: with an importance matrix, of random numbers.
Needs `bench/peers/install.sh llamacpp` and 8 GB of disk.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.gguf_vs_llamacpp import tool
from bench.measure import BITWRIGHT, OUT, run, table
from bitwright.gguf import imatrix
from bitwright.gguf.reader import GgufFile


def random_importance(source: Path, file: Path) -> None:
    """An importance matrix of the blocks' matrices."""
    generator = torch.Generator().manual_seed(0)
    matrices = {
        n: t.shape[-1] for n, t in GgufFile(source).tensors.items() if n.startswith("blk") and len(t.shape) == 2
    }
    values = {name: torch.rand(K, generator=generator) + 0.1 for name, K in matrices.items()}
    imatrix.write(file, values, tokens=512, seqlen=512, text="random")


def seconds_of(mix: str, model: Path, method: str, calib: str) -> tuple[float, float]:
    """Of bitwright; and its peak memory in MB."""
    out = model.parent / f"mine-{mix}.gguf"
    os.sync()  # what ran before may have left its file to be written yet
    how = ["--scheme", mix, "--method", method, "--calib", calib, "--json"]
    done = run([*BITWRIGHT, "quantize", str(model), str(out), *how])
    out.unlink()
    return done.seconds, done.megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default="Q4_K_M,Q2_K,Q4_0,Q8_0")
    parser.add_argument("--method", default="search", help="rtn: without a search of scales")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--weighted", action="store_true")
    args = parser.parse_args()
    work = OUT / "gguf-speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model, source, weights = work / "llama-1b", work / "float.gguf", work / "importance.gguf"
    run([sys.executable, "-m", "bench.make_llama", str(model), "--size", "1b"])
    run([*BITWRIGHT, "convert", str(model), str(source), "--json"])
    random_importance(source, weights)
    calib, peers = (str(weights), ["--imatrix", str(weights)]) if args.weighted else ("none", [])
    rows, threads = [], str(torch.get_num_threads())
    for mix in args.mixes.split(","):
        found: list[tuple[float, ...]] = []
        for _ in range(args.times):
            file, megabytes = seconds_of(mix, source, args.method, calib)
            folder, _ = seconds_of(mix, model, args.method, calib)
            os.sync()
            begun = time.monotonic()
            tool("llama-quantize", *peers, str(source), str(work / "theirs.gguf"), mix, threads)
            found.append((file, folder, time.monotonic() - begun, megabytes))
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        rows.append([mix, *(f"{value:.1f}" for value in medians[:3]), f"{medians[3]:.0f}"])
        print(rows[-1], file=sys.stderr, flush=True)
    header = ["mix", "from a file, seconds", "from a directory", "llama-quantize", "from a file, peak MB"]
    print(table(header, rows))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
