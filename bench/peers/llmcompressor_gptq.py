"""Quantize a model with llm-compressor, for comparison with bitwright on the same calibration windows.

    bench/peers/install.sh llmcompressor
    bench/peers/envs/llmcompressor/bin/python bench/peers/llmcompressor_gptq.py MODEL OUT --tokens TOKENS.safetensors
        [--bits 4] [--group 128] [--asym | --sym] [--method gptq | rtn]

TOKENS.safetensors holds one int64 tensor "input_ids" [samples, seqlen]; every window is used whole. All Linear layers
but lm_head are quantized to integers with one scale (and zero point) per group, and the checkpoint is saved
pack-quantized to OUT with the tokenizer. Whatever is not named here is llm-compressor's default (GPTQ: blocks of 128,
dampening 0.01, static activation order, one window per batch). `rtn` rounds to nearest without calibration.

It runs on the CPU and without a network. Standard output is one line of JSON, {"seconds": ..., "peak_rss_bytes": ...},
for the whole process from its start; everything else goes to standard error. Linux carries the parent's peak memory
over into a child, so start this from a process smaller than itself. On a busy machine OpenMP's spinning threads make
it many times slower; OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1 avoids that.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def calibration_set(path: Path) -> "Dataset":
    """The windows as llm-compressor takes them; nothing is masked."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file

    ids = load_file(path)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        raise ValueError(f"{path}: input_ids must be int64 [samples, seqlen], not {ids.dtype} {list(ids.shape)}")
    return Dataset.from_dict({"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})


def quantize(model: Path, out: Path, tokens: Path | None, bits: int, group: int, symmetric: bool) -> None:
    """Run llm-compressor on `model` and save to `out`: GPTQ on `tokens`, or round-to-nearest if there are none."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
        QuantizationType,
    )
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=bits,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP,
        group_size=group,
        symmetric=symmetric,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if tokens is None:
        modifier = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        oneshot(model=str(model), tokenizer=str(model), recipe=modifier, output_dir=str(out))
        return
    windows = calibration_set(tokens)
    oneshot(
        model=str(model),
        tokenizer=str(model),
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        dataset=windows,
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def seconds_since_start() -> float:
    """Wall-clock age of this process, interpreter start included."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to save to")
    parser.add_argument("--tokens", type=Path, help="calibration windows (safetensors); needed by gptq")
    parser.add_argument("--bits", type=int, default=4, choices=range(1, 9))
    parser.add_argument("--group", type=int, default=128, help="weights per scale")
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--asym", dest="symmetric", action="store_false", help="with zero points (default)")
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", help="without zero points")
    parser.set_defaults(symmetric=False)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    args = parser.parse_args()
    if args.method == "gptq" and args.tokens is None:
        parser.error("gptq needs --tokens")

    # Read by the libraries when they are imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    tokens = args.tokens if args.method == "gptq" else None
    # llm-compressor logs to standard output, which is for the result alone.
    with contextlib.redirect_stdout(sys.stderr):
        quantize(args.model, args.out, tokens, args.bits, args.group, args.symmetric)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds_since_start(), 2), "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
