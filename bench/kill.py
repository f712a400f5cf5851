"""Kill -9 at random moments, resume, and compare every byte with an uninterrupted run's.

    python -m bench.kill [--times 10] [--seed 0]

The ledger is compared without its clock readings.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench.measure import BITWRIGHT, ENVIRONMENT, OUT

MODEL = Path(__file__).parents[1] / "src/bitwright/builtin"


def files(folder: Path) -> dict[str, object]:
    """Every file's bytes; the ledger's lines without seconds."""
    found: dict[str, object] = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    found["ledger.jsonl"] = [{**json.loads(line), "seconds": 0} for line in lines]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    work = OUT / "kill"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [*BITWRIGHT, "quantize", str(MODEL), "", "--samples", "32", "--seqlen", "256", "--json"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        filled = [str(out) if part == "" else part for part in command]
        return subprocess.Popen(filled, env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    begun = time.monotonic()
    assert start(work / "whole").wait() == 0
    whole = time.monotonic() - begun
    expected = files(work / "whole")
    print(f"an uninterrupted run took {whole:.1f} s")
    for i in range(args.times):
        out = work / f"killed-{i}"
        moment = rng.uniform(0.2, 1.0) * whole
        process = start(out)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        partial = out.with_name(out.name + ".partial")
        done = len(list(partial.glob("ledger-*")))
        if not out.exists():
            assert start(out).wait() == 0
        same = files(out) == expected
        print(
            f"killed after {moment:4.1f} s with {done} blocks committed: {'same bytes' if same else 'DIFFERENT'}",
            flush=True,
        )
        assert same
        assert not partial.exists()


if __name__ == "__main__":
    main()
