"""The methods side by side, and llm-compressor, GPTQModel and auto-round, on the same tokens and groups.

    python -m bench.methods [--tokens 49152] [--schemes int3-g128-asym,int2-channel-asym] [--ours gptq,autoround]

Calibrated on 128 × 256 tokens of wiki.txt, judged on WikiText-2's test text by `bitwright eval`. Rows appear as they are
measured; what is in bench/out/methods/results.jsonl already is not measured again unless --restart. Needs ../shared, and
for the peers' rows `bench/peers/install.sh llmcompressor` and `bench/peers/install.sh gptqmodel`.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from bench.measure import BITWRIGHT, OUT, PEERS_COMPUTE_IN, ROOT, SHARED, Run, run, table

MODEL, CALIB, TEXT = SHARED / "models/wiki-llama-7m", SHARED / "text/wiki.txt", SHARED / "text/wikitext2_raw_test.txt"
WIDTHS = ("int4", "int3", "int2")
SCHEMES = ",".join(f"{width}-{group}-asym" for width in WIDTHS for group in ("g128", "channel"))
OURS = ("rtn", "awq", "gptq", "awq+gptq", "gptaq", "autoround")
# Name -> environment, script, its own options.
PEERS = {
    "llm-compressor gptq": ("llmcompressor", "llmcompressor_gptq.py", ["--method", "gptq"]),
    "llm-compressor awq": ("llmcompressor", "llmcompressor_gptq.py", ["--method", "awq"]),
    "GPTQModel gptq": ("gptqmodel", "gptqmodel_gptq.py", []),
    "auto-round, 200 steps": ("llmcompressor", "autoround.py", []),
}


def ours(name: str, scheme: str, out: Path) -> Run:
    """Quantize by one of our methods."""
    arguments = ["--scheme", scheme, "--method", name, "--calib", str(CALIB), "--seqlen", "256", "--json"]
    return run([*BITWRIGHT, "quantize", str(MODEL), str(out), *arguments])


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT / "bench/peers/envs" / PEERS[peer][0] / "bin/python"


def theirs(name: str, scheme: str, out: Path, tokens: Path) -> Run:
    """Quantize by a peer; scheme as intB-gG or intB-channel, with -asym or without."""
    grid, group, *zero = scheme.split("-")
    options = ["--bits", grid[3:], "--group", group.removeprefix("g"), "--asym" if zero else "--sym"]
    script, own = PEERS[name][1:]
    command = [str(python_of(name)), str(ROOT / "bench/peers" / script), str(MODEL), str(out), "--tokens", str(tokens)]
    command += ["--dtype", PEERS_COMPUTE_IN]
    return run([*command, *options, *own])


def row(scheme: str, name: str, work: Path, tokens: Path, judged_on: str) -> dict[str, object]:
    """Quantize and judge."""
    out = work / f"{scheme}-{name.replace(' ', '-').replace(',', '')}"
    shutil.rmtree(out, ignore_errors=True)
    done = theirs(name, scheme, out, tokens) if name in PEERS else ours(name, scheme, out)
    judged = ["--reference", str(MODEL), "--text", str(TEXT), "--tokens", judged_on, "--json"]
    e = run([*BITWRIGHT, "eval", str(out), *judged]).result
    shutil.rmtree(out)
    return {**e, "scheme": scheme, "name": name, "seconds": done.seconds, "megabytes": done.megabytes}


def shown(r: dict[str, float | str]) -> list[str]:
    """A row of the table."""
    bits = "–" if r["name"] in PEERS else f"{r['bits_per_weight']:.2f}"
    return [
        str(r["scheme"]),
        str(r["name"]),
        bits,
        f"{r['perplexity']:.2f} ± {r['perplexity_stderr']:.2f}",
        f"{r['kl_mean']:.5f} ± {r['kl_stderr']:.5f}",
        f"{100 * float(r['top1']):.2f} %",
        f"{r['seconds']:.1f}",
        f"{r['megabytes']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="49152")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--ours", default=",".join(OURS))
    parser.add_argument(
        "--peers", default="llm-compressor,GPTQModel,auto-round", help="by the beginnings of their names"
    )
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    work = OUT / "methods"
    if args.restart:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    tokens, results = work / "tokens.safetensors", work / "results.jsonl"
    run([sys.executable, "-m", "bench.make_tokens", str(MODEL), str(CALIB), str(tokens)])
    known = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    peers = [
        peer
        for peer in PEERS
        if any(p and peer.startswith(p) for p in args.peers.split(",")) and python_of(peer).exists()
    ]
    wanted = [(scheme, name) for scheme in args.schemes.split(",") for name in [*args.ours.split(","), *peers] if name]
    for scheme, name in wanted:
        if not any((r["scheme"], r["name"]) == (scheme, name) for r in known):
            known.append(row(scheme, name, work, tokens, args.tokens))
            with results.open("a") as stream:
                stream.write(json.dumps(known[-1]) + "\n")
            print(shown(known[-1]), file=sys.stderr, flush=True)
    header = ["scheme", "method", "bits/weight", "perplexity", "KL", "top-1", "seconds", "peak MB"]
    order = {pair: i for i, pair in enumerate(wanted)}
    rows = sorted(
        (r for r in known if (r["scheme"], r["name"]) in order), key=lambda r: order[(r["scheme"], r["name"])]
    )
    print(table(header, [shown(r) for r in rows]))


if __name__ == "__main__":
    main()
