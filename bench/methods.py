"""The methods side by side, and llm-compressor's GPTQ and auto-round, on the same tokens and groups.

    python -m bench.methods [--tokens 49152] [--schemes int3-g128-asym,int2-g64]

Calibrated on 128 × 256 tokens of wiki.txt, judged on WikiText-2's test text by `bitwright eval`. Needs ../shared, and
for the peers' rows `bench/peers/install.sh llmcompressor`.
"""

import argparse
import shutil
import sys
from pathlib import Path

from bench.measure import BITWRIGHT, OUT, PEER, ROOT, SHARED, Run, run, table

MODEL, CALIB, TEXT = SHARED / "models/wiki-llama-7m", SHARED / "text/wiki.txt", SHARED / "text/wikitext2_raw_test.txt"
OURS = {
    "rtn": ("rtn", ""),
    "search": ("search", ""),
    "gptq": ("gptq", ""),
    "gptaq": ("gptaq", ""),
    "autoround, 60 steps": ("autoround", "iterations = 60"),
    "autoround, 200 steps": ("autoround", "iterations = 200"),
}
PEERS = {"llm-compressor gptq": "llmcompressor_gptq.py", "auto-round, 200 steps": "autoround.py"}


def ours(name: str, scheme: str, out: Path) -> Run:
    """Quantize by one of our methods."""
    method, options = OURS[name]
    recipe = out.with_suffix(".toml")
    recipe.write_text(f'[[rule]]\nmatch = "*"\nscheme = "{scheme}"\nmethod = "{method}"\noptions = {{ {options} }}\n')
    arguments = ["--recipe", str(recipe), "--calib", str(CALIB), "--seqlen", "256", "--json"]
    return run([*BITWRIGHT, "quantize", str(MODEL), str(out), *arguments])


def theirs(name: str, scheme: str, out: Path, tokens: Path) -> Run:
    """Quantize by a peer; scheme as intB-gG or intB-gG-asym."""
    grid, group, *zero = scheme.split("-")
    options = ["--bits", grid[3:], "--group", group[1:], "--asym" if zero else "--sym", "--tokens", str(tokens)]
    return run([str(PEER), str(ROOT / "bench/peers" / PEERS[name]), str(MODEL), str(out), *options])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="49152")
    parser.add_argument("--schemes", default="int4-g128-asym,int3-g128-asym,int2-g64-asym")
    args = parser.parse_args()
    work = OUT / "methods"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokens = work / "tokens.safetensors"
    run([sys.executable, "-m", "bench.make_tokens", str(MODEL), str(CALIB), str(tokens)])
    rows = []
    for scheme in args.schemes.split(","):
        for name in [*OURS, *(PEERS if PEER.exists() else ())]:
            out = work / f"{scheme}-{name.replace(' ', '-').replace(',', '')}"
            done = ours(name, scheme, out) if name in OURS else theirs(name, scheme, out, tokens)
            judged = ["--reference", str(MODEL), "--text", str(TEXT), "--tokens", args.tokens, "--json"]
            e = run([*BITWRIGHT, "eval", str(out), *judged]).result
            bits = "–" if name.startswith("auto-round") else f"{e['bits_per_weight']:.2f}"  # saved in float
            rows.append([
                scheme, name, bits, f"{e['perplexity']:.2f} ± {e['perplexity_stderr']:.2f}",
                f"{e['kl_mean']:.5f} ± {e['kl_stderr']:.5f}", f"{e['kl_p999']:.3f}", f"{100 * e['top1']:.2f} %",
                f"{done.seconds:.1f}", f"{done.megabytes:.0f}",
            ])  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    header = ["scheme", "method", "bits/weight", "perplexity", "KL", "KL 99.9 %", "top-1", "seconds", "peak MB"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
