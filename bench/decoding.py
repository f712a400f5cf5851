"""How fast models run, beside llama.cpp on the same threads in one run.

    python -m bench.decoding [--size 1b] [--prompt 512] [--decode 64] [--rounds 3] [--mixes Q4_0,Q4_K_M [--files-only]]
    python -m bench.decoding --files sm-q4_0.gguf,sm-q4_k_m.gguf

A Llama shape with random weights: bitwright at int4-g128 and int8 with inputs of 8 and of 16 bits, and llama.cpp's Q4_0
and Q4_K_M; the same files also in bitwright. With --files those alone, both ways. All are measured in turns, so many rounds,
for others use the memory too: speeds are medians, and so are ratios, each of one round, with the best of llama.cpp's
quantized prompts and with its decoding of the same file, or of the first. Needs `bench/peers/install.sh llamacpp`.
"""

import argparse
import itertools
import json
import shutil
import sys
from pathlib import Path
from statistics import median

from bench.gguf_vs_llamacpp import THREADS, TOOLS, tool
from bench.measure import BITWRIGHT, OUT, run, table

OURS = (("int4-g128", 8), ("int4-g128", 16), ("int8-channel", 8), ("int8-channel", 16))


def llamacpp(file: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of llama-bench for a prompt and after it."""
    said = tool(
        "llama-bench",
        "-m",
        str(file),
        *THREADS,
        "-p",
        str(args.prompt),
        "-n",
        str(args.decode),
        "-r",
        "3",
        "-o",
        "json",
    )
    tests = json.loads(said[said.index("[") : said.rindex("]") + 1])
    return {"prefill" if test["n_prompt"] else "decode": test["avg_ts"] for test in tests}


def bitwright(model: Path, args: argparse.Namespace, *options: str) -> dict[str, float]:
    """`bitwright bench` of a checkpoint."""
    shape = ["--prompt", str(args.prompt), "--decode", str(args.decode), "--json"]
    found = run([*BITWRIGHT, "bench", str(model), *shape, *options]).result
    return {
        "prefill": found["prefill_tokens_per_second"],
        "decode": found["decode_tokens_per_second"],
        "bandwidth": found["bandwidth_fraction"],
        "peak": found["peak_rss_bytes"] / 1e6,
    }


def files_of(args: argparse.Namespace, work: Path, model: Path) -> dict[str, Path]:
    """The files that llama.cpp runs, by what they are called; made of the model where they are not given."""
    if args.files:
        return {Path(file).stem: Path(file) for file in args.files.split(",")}
    whole = work / f"{args.size}.gguf"
    if not model.exists():
        run([sys.executable, "-m", "bench.make_llama", str(model), "--size", args.size])
    files = {mix: work / f"{args.size}-{mix}.gguf" for mix in args.mixes.split(",")}
    if not all(file.exists() for file in files.values()):
        run([*BITWRIGHT, "convert", str(model), str(whole), "--json"])
        for mix, file in files.items():  # without a matrix of importance, which random weights have none of
            tool("llama-quantize", str(whole), str(file), mix)
        whole.unlink()
    return files


def measured(model: Path, files: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """One round: the figures of each row, and as × of llama.cpp's in the same round."""
    rows = {f"llama.cpp {name}": llamacpp(file, args) for name, file in files.items()}
    best = max(found["prefill"] for found in rows.values())
    first = next(iter(rows.values()))
    for scheme, bits in () if args.files or args.files_only else OURS:
        found = bitwright(model, args, "--scheme", scheme, "--activations", str(bits))
        rows[f"{scheme}, inputs of {bits} bits"] = found | {"peer": first["decode"]}
    for (name, file), bits in itertools.product(files.items(), (8, 16)):
        found = bitwright(file, args, "--activations", str(bits))
        rows[f"that {name} file, inputs of {bits} bits"] = found | {"peer": rows[f"llama.cpp {name}"]["decode"]}
    for found in rows.values():
        found["× prefill"] = found["prefill"] / best
        found["× decode"] = found["decode"] / found.get("peer", found["decode"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixes", default="Q4_0,Q4_K_M")
    parser.add_argument("--files", help="GGUF files in place of made ones")
    parser.add_argument("--files-only", action="store_true", help="leave out what bitwright rounds itself")
    parser.add_argument("--keep", action="store_true", help="keep the model and its files")
    args = parser.parse_args()
    if not TOOLS.exists():
        sys.exit("bench/peers/install.sh llamacpp comes first")
    work = OUT / "decoding"
    work.mkdir(parents=True, exist_ok=True)
    model = work / args.size
    files = files_of(args, work, model)
    rounds = [measured(model, files, args) for _ in range(args.rounds)]
    lines = []
    for name in rounds[0]:
        found = {key: median(each[name][key] for each in rounds) for key in rounds[0][name]}
        limit = f"{found['bandwidth']:.2f}" if "bandwidth" in found else ""
        peak = f"{found['peak']:.0f}" if "peak" in found else ""
        ratios = [f"{found['× prefill']:.2f}", f"{found['× decode']:.2f}"]
        lines.append([name, f"{found['prefill']:.0f}", f"{found['decode']:.1f}", *ratios, limit, peak])
    what = "files" if args.files else args.size
    head = [f"{what}, 2 threads", f"prompt of {args.prompt}, tok/s", "after it, tok/s"]
    print(table([*head, "× llama.cpp", "× llama.cpp", "of the bandwidth", "peak MB"], lines))
    if not args.keep and not args.files:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
