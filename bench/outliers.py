"""What outlier channels cost, and what AWQ, SmoothQuant, outlier separation and rotations make of them.

    python -m bench.outliers [--tokens 49152] [--factor 64] [--parts experiment,weights,inputs] [--methods rtn,awq]

Three tables on wiki-llama-7m with three outlier channels in every input of attention and MLP (bench/make_outliers.py; the
float model is unchanged): AWQ's experiment (arXiv:2306.00978, table 1), weights alone, and weights with inputs in 8 bits.
Calibrated on 128 × 256 tokens of wiki.txt (one-shot: one pass a model serves all but the rotations), judged on WikiText-2.
Needs ../shared.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.measure import BITWRIGHT, OUT, SHARED, run, table

MODEL, CALIB, TEXT = SHARED / "models/wiki-llama-7m", SHARED / "text/wiki.txt", SHARED / "text/wikitext2_raw_test.txt"
WORK = OUT / "outliers"


def quantized(
    name: str, model: Path, scheme: str, method: str, *, options: str = "", more: tuple[str, ...] = ()
) -> Path:
    """Quantize; `options`: a recipe's line for a transform."""
    out = WORK / name.replace(" ", "-")
    recipe = out.with_suffix(".toml")
    lines = ["[[rule]]", 'match = "*"', f'scheme = "{scheme}"', f'method = "{method}"', options]
    recipe.write_text("\n".join(lines) + "\n")
    arguments = [
        "--recipe",
        str(recipe),
        "--calib",
        str(CALIB),
        "--seqlen",
        "256",
        "--format",
        "bitwright",
        *more,
        "--json",
    ]
    if "rotate" not in method:  # a rotated model has statistics of its own
        arguments += ["--store", str(WORK / f"statistics-{model.name}")]
    run([*BITWRIGHT, "quantize", str(model), str(out), *arguments], fine=(0, 1))
    return out


def judged(model: Path, tokens: str, reference: Path | None = MODEL) -> dict[str, Any]:
    """Perplexity and KL to the float model."""
    against = ["--reference", str(reference)] if reference else []
    return run([*BITWRIGHT, "eval", str(model), *against, "--text", str(TEXT), "--tokens", tokens, "--json"]).result


def cell(e: dict[str, Any]) -> str:
    """Perplexity and KL."""
    return f"{e['perplexity']:.2f} ({e['kl_mean']:.4f})"


def experiment(model: Path, tokens: str) -> None:
    """AWQ's table 1: which channels to keep in 16 bits."""
    rows = []
    plain = judged(quantized("rtn-int3", model, "int3-g128", "rtn"), tokens)
    shares = (("0.1 %", 0.001), ("1 %", 0.01), ("3 %", 0.03))
    for by in ("activation", "weight", "random"):
        row = [by]
        for label, share in shares:
            options = f'transforms = [{{ name = "outlier", fraction = {share}, by = "{by}" }}]'
            row.append(
                cell(judged(quantized(f"keep-{by}-{label[:-2]}", model, "int3-g128", "rtn", options=options), tokens))
            )
            print(row, file=sys.stderr, flush=True)
        rows.append(row)
    print(
        f"\nint3-g128, rounded to nearest, no channel kept: {cell(plain)}. Perplexity (KL) with some kept in 16 bits:\n"
    )
    print(table(["chosen by", *(label for label, _ in shares)], rows))


def weights_alone(model: Path, tokens: str, methods: list[str]) -> None:
    """Each method on the model as it is, and with outliers."""
    rows = []
    for method in methods or ("rtn", "search", "awq", "gptq", "awq+gptq", "rotate+gptq"):
        row = [method]
        for name, source in (("plain", MODEL), ("outliers", model)):
            for scheme in ("int4-g128", "int3-g128"):
                row.append(cell(judged(quantized(f"{method}-{name}-{scheme}", source, scheme, method), tokens)))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print("\nWeights alone, perplexity (KL):\n")
    print(table(["method", "int4-g128", "int3-g128", "int4-g128, outliers", "int3-g128, outliers"], rows))


def with_inputs(model: Path, tokens: str, original: float, methods: list[str]) -> None:
    """8-bit weights by channel and 8-bit inputs."""
    rows = []
    for method in methods or ("rtn", "gptq", "smooth", "smooth+gptq", "outlier", "rotate"):
        row = [method]
        for activations in ("int8-token", "int8-tensor"):
            more = ("--activations", activations, "--observer", "minmax")
            out = quantized(f"{method}-{activations}", model, "int8-channel", method, more=more)
            e = judged(out, tokens)
            row += [cell(e), f"{100 * (e['perplexity'] / original - 1):+.2f} %"]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print("\nint8-channel weights and int8 inputs, perplexity (KL) and the change of perplexity:\n")
    print(table(["method", "by token", "change", "static by tensor", "change"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="49152")
    parser.add_argument("--factor", default="64", help="how much larger the outlier channels are")
    parser.add_argument("--methods", default="", help="of the last two parts; all otherwise")
    parser.add_argument("--parts", default="experiment,weights,inputs")
    args = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    model = WORK / "model"
    run([sys.executable, "-m", "bench.make_outliers", str(MODEL), str(model), "--factor", args.factor])
    original = judged(MODEL, args.tokens, None)["perplexity"]
    same = judged(model, args.tokens)
    print(f"float model {original:.3f}; with outliers {same['perplexity']:.3f}, KL {same['kl_mean']:.1e}")
    parts, methods = args.parts.split(","), [method for method in args.methods.split(",") if method]
    if "experiment" in parts:
        experiment(model, args.tokens)
    if "weights" in parts:
        weights_alone(model, args.tokens, methods)
    if "inputs" in parts:
        with_inputs(model, args.tokens, original, methods)


if __name__ == "__main__":
    main()
