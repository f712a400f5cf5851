"""What rounding costs: RTN, scale search and GPTQ here, GPTQ of llm-compressor, on the same tokens and groups.

    python -m bench.quality [--tokens 65536] [--zero asym] [--zero sym]

Calibrated on 128 × 256 tokens of wiki.txt, judged on WikiText-2's test text by `bitwright eval`. Needs ../shared, and
for the peer's rows `bench/peers/install.sh llmcompressor`.
"""

import argparse
import shutil
import sys

from bench.measure import BITWRIGHT, OUT, PEER, ROOT, SHARED, run, table

MODEL, CALIB, TEXT = SHARED / "models/wiki-llama-7m", SHARED / "text/wiki.txt", SHARED / "text/wikitext2_raw_test.txt"
BITS = ((4, 128), (3, 128), (2, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="65536")
    parser.add_argument("--zero", action="append", choices=("asym", "sym"))
    args = parser.parse_args()
    work = OUT / "quality"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokens = work / "tokens.safetensors"
    run([sys.executable, "-m", "bench.make_tokens", str(MODEL), str(CALIB), str(tokens)])
    rows = []
    for zero in args.zero or ("asym",):
        for bits, group in BITS:
            scheme = f"int{bits}-g{group}" + ("-asym" if zero == "asym" else "")
            for method in ("rtn", "search", "gptq", "llm-compressor gptq"):
                out = work / f"{scheme}-{method.replace(' ', '-')}"
                if method.startswith("llm"):
                    if not PEER.exists():
                        continue
                    script = str(ROOT / "bench/peers/llmcompressor_gptq.py")
                    options = ["--tokens", str(tokens), "--bits", str(bits), "--group", str(group), f"--{zero}"]
                    done = run([str(PEER), script, str(MODEL), str(out), *options])
                else:
                    options = [
                        "--scheme",
                        scheme,
                        "--method",
                        method,
                        "--calib",
                        str(CALIB),
                        "--seqlen",
                        "256",
                        "--json",
                    ]
                    done = run([*BITWRIGHT, "quantize", str(MODEL), str(out), *options])
                judged = ["--reference", str(MODEL), "--text", str(TEXT), "--tokens", args.tokens, "--json"]
                e = run([*BITWRIGHT, "eval", str(out), *judged]).result
                rows.append([
                    scheme, method, f"{e['bits_per_weight']:.2f}", f"{e['perplexity']:.2f} ± {e['perplexity_stderr']:.2f}",
                    f"{e['kl_mean']:.5f} ± {e['kl_stderr']:.5f}", f"{e['kl_p999']:.3f}", f"{100 * e['top1']:.2f} %",
                    f"{done.seconds:.1f}",
                ])  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    header = ["scheme", "method", "bits/weight", "perplexity", "KL", "KL 99.9 %", "top-1", "seconds"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
