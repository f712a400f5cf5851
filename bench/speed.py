"""How long quantizing takes and how much memory, whole processes, side by side in one run.

    python -m bench.speed [--repeat 3]

The 29 M-parameter Llama shape with random weights, 32 × 256 tokens, GPTQ int4-g128: bitwright and, where installed,
llm-compressor, alternating; medians.
"""

import argparse
import shutil
import statistics
import sys

from bench.measure import BITWRIGHT, OUT, PEER, PEERS_COMPUTE_IN, ROOT, run, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    work = OUT / "speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    model, tokens = work / "llama-29m", work / "tokens.safetensors"
    run([sys.executable, "-m", "bench.make_llama", str(model), "--size", "29m"])
    run([sys.executable, "-m", "bench.make_tokens", str(model), "stdlib", str(tokens), "--samples", "32"])
    ours = ["--scheme", "int4-g128", "--samples", "32", "--seqlen", "256", "--calib", "stdlib", "--json"]
    theirs = ["--tokens", str(tokens), "--bits", "4", "--group", "128", "--sym", "--dtype", PEERS_COMPUTE_IN]
    times: dict[str, list[float]] = {"bitwright": [], "llm-compressor": []}
    peaks: dict[str, list[float]] = {"bitwright": [], "llm-compressor": []}
    for i in range(args.repeat):
        commands = {"bitwright": [*BITWRIGHT, "quantize", str(model), str(work / f"ours-{i}"), *ours]}
        if PEER.exists():
            script = str(ROOT / "bench/peers/llmcompressor_gptq.py")
            commands["llm-compressor"] = [str(PEER), script, str(model), str(work / f"theirs-{i}"), *theirs]
        for name, command in commands.items():
            done = run(command)
            times[name].append(done.seconds)
            peaks[name].append(done.megabytes)
    rows = [
        [
            name,
            f"{statistics.median(times[name]):.1f}",
            f"{min(times[name]):.1f}",
            f"{statistics.median(peaks[name]):.0f}",
        ]
        for name in times
        if times[name]
    ]
    print(table(["29 M parameters, GPTQ int4-g128, 32 × 256 tokens", "seconds (median)", "fastest", "peak MB"], rows))
    if times["llm-compressor"]:
        print(
            f"\n{statistics.median(times['llm-compressor']) / statistics.median(times['bitwright']):.1f} times as fast"
        )


if __name__ == "__main__":
    main()
