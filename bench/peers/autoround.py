"""Quantize a model with the auto-round package, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh llmcompressor          # brings auto-round along
    bench/peers/envs/llmcompressor/bin/python bench/peers/autoround.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128] [--asym | --sym] [--iterations 200]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers but
lm_head are quantized, and the checkpoint is saved in float, as its codes decode ("fake"): GPTQ files, which it also writes,
cannot hold the zero point 0. Whatever is not named here is auto-round's default.
It runs on the CPU and without a network. Standard output is one line of JSON, {"seconds": ..., "peak_rss_bytes": ...},
for the whole process from its start; everything else goes to standard error.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path


def quantize(model: Path, out: Path, tokens: Path, bits: int, group: int, symmetric: bool, iterations: int) -> None:
    """Run auto-round on `model` with the windows of `tokens` and save to `out`."""
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(tokens)["input_ids"]
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        scheme=f"W{bits}A16",
        bits=bits,
        group_size=group,
        sym=symmetric,
        iters=iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[{"input_ids": window[None]} for window in ids],
        device_map="cpu",
    )
    rounder.quantize_and_save(str(out), format="fake")
    for folder in [path for path in out.iterdir() if path.is_dir()]:  # it saves to a folder of its own inside
        for file in folder.iterdir():
            file.rename(out / file.name)
        folder.rmdir()


def seconds_since_start() -> float:
    """Wall-clock age of this process, interpreter start included."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to save to")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration windows (safetensors)")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=128, help="weights per scale")
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--asym", dest="symmetric", action="store_false", help="with zero points (default)")
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", help="without zero points")
    parser.set_defaults(symmetric=False)
    parser.add_argument("--iterations", type=int, default=200)
    args = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with contextlib.redirect_stdout(sys.stderr):
        quantize(args.model, args.out, args.tokens, args.bits, args.group, args.symmetric, args.iterations)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds_since_start(), 2), "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
