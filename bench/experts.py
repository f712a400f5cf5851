"""Quantized mixtures of experts: how much an expert that few tokens reach should borrow from all tokens of its layer.

    python -m bench.experts [--schemes int4-g64,int3-g64] [--windows 8,64] [--calib stdlib] [--seeds 1] [--peer]

Calibrated on windows of 256 tokens of Python's standard library, judged on its held-out modules. For each scheme and number
of windows: RTN; GPTQ on each expert's own Gram alone (prior 0), with RTN for experts that saw fewer tokens than their inputs
have channels, and with priors of so many tokens (the package's own marked *); with --peer llm-compressor's GPTQ on the same
tokens (needs `bench/peers/install.sh llmcompressor`). With several seeds windows are drawn anew for each: KL is the mean over
seeds, with the standard error of that mean; with one seed, that of the mean over judged tokens.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

import bitwright
from bench.measure import OUT, ROOT, run, table
from bitwright.calibration import observe_experts
from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import draw, load_tokenizer

MODEL, TEXT, SEQLEN, TOKENS = ROOT / "bench/mixture", "stdlib-heldout", 256, 16384
PRIORS = (0.0, 8.0, 32.0, 128.0, 512.0)
PEER = ROOT / "bench/peers/envs/llmcompressor/bin/python", ROOT / "bench/peers/llmcompressor_gptq.py"


@contextmanager
def borrowing(prior: float) -> Iterator[None]:
    """Let all tokens of a layer count for so many tokens."""
    with patch.object(observe_experts, "PRIOR", prior):
        yield


@contextmanager
def rounding_rare_experts() -> Iterator[None]:
    """Let the Gram of an expert that saw fewer tokens than it has channels say nothing: GPTQ under it is RTN."""
    taken = observe_experts._Layer._inputs

    def inputs(layer: observe_experts._Layer, *rest: object) -> Inputs:
        found = taken(layer, *rest)  # type: ignore[arg-type]
        assert found.gram is not None
        rare = found.tokens < len(found.gram)
        return replace(found, gram=torch.eye(len(found.gram)), drift=None) if rare else found

    with borrowing(0.0), patch.object(observe_experts._Layer, "_inputs", inputs):
        yield


def judged(model: Path, out: Path) -> tuple[float, float]:
    """KL and its standard error."""
    e = bitwright.evaluate(out, text=TEXT, reference=model, seqlen=SEQLEN, tokens=TOKENS)
    shutil.rmtree(out)
    return e.kl_mean, e.kl_stderr


def cell(found: list[tuple[float, float]]) -> str:
    """The mean over seeds, and its standard error."""
    kls = [kl for kl, _ in found]
    error = stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else found[0][1]
    return f"{mean(kls):.5f} ± {error:.5f}"


def ours(model: Path, out: Path, scheme: str, windows: int, method: str, how: argparse.Namespace) -> str:
    found = []
    for seed in range(how.seeds):
        options: dict[str, Any] = {"scheme": scheme, "method": method, "calib": how.calib, "seed": seed}
        bitwright.quantize(model, out, samples=windows, seqlen=SEQLEN, **options)
        found.append(judged(model, out))
    return cell(found)


def theirs(model: Path, out: Path, scheme: str, windows: int, how: argparse.Namespace) -> str:
    found, tokenizer = [], load_tokenizer(model)
    bits, group = scheme.removeprefix("int").split("-g")
    for seed in range(how.seeds):
        drawn = draw(tokenizer, how.calib, samples=windows, seqlen=SEQLEN, vocabulary=1 << 30, seed=seed)
        save_file({"input_ids": drawn.seen}, tokens := out.with_suffix(".safetensors"))
        run([*map(str, PEER), str(model), str(out), "--tokens", str(tokens), "--bits", bits, "--group", group, "--sym"])
        found.append(judged(model, out))
    return cell(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--schemes", default="int4-g64,int3-g64")
    parser.add_argument("--windows", default="8,64")
    parser.add_argument("--methods", default="gptq")
    parser.add_argument("--priors", default=",".join(f"{prior:g}" for prior in PRIORS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--calib", default="stdlib", help="another text, such as general, leaves more experts without tokens"
    )
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    out, own = OUT / "experts/out", observe_experts.PRIOR
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    rows: list[list[str]] = []

    def add(scheme: str, windows: int, what: str, kl: str) -> None:
        rows.append([scheme, str(windows), what, kl])
        print("  ".join(rows[-1]), flush=True)

    for scheme in args.schemes.split(","):
        for windows in map(int, args.windows.split(",")):
            add(scheme, windows, "rtn", ours(args.model, out, scheme, windows, "rtn", args))
            for method in args.methods.split(","):
                with rounding_rare_experts():
                    kl = ours(args.model, out, scheme, windows, method, args)
                add(scheme, windows, f"{method}, RTN for rare experts", kl)
                for prior in map(float, args.priors.split(",")):
                    with borrowing(prior):
                        kl = ours(args.model, out, scheme, windows, method, args)
                    add(scheme, windows, f"{method}, prior {prior:g}{'*' if prior == own else ''}", kl)
            if args.peer:
                add(scheme, windows, "llm-compressor gptq", theirs(args.model, out, scheme, windows, args))
    print(table(["scheme", "windows", "method", "KL"], rows))


if __name__ == "__main__":
    main()
