"""Run a command and say how long it took and how much memory it had. Imports nothing large, on purpose: a child's peak
memory starts from its parent's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench" / "out"
SHARED = ROOT.parent / "shared"
PEER = ROOT / "bench" / "peers" / "envs" / "llmcompressor" / "bin" / "python"
BITWRIGHT = [sys.executable, "-m", "bitwright"]
# What peers compute in: the checkpoint's type, unless that is bfloat16 on a processor that has to emulate it.
CPU = Path("/proc/cpuinfo")
PEERS_COMPUTE_IN = "auto" if CPU.is_file() and "bf16" in CPU.read_text() else "float32"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Run:
    """Whole-process wall time, peak resident set, and what the command printed as JSON on its last line."""

    seconds: float
    megabytes: float
    result: dict[str, Any]


def run(command: list[str], *, fine: tuple[int, ...] = (0,)) -> Run:
    """Run it to its end; an exit status that is not `fine` ends the bench with the command's own words."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    out, err = process.communicate()
    seconds = time.monotonic() - begun
    if process.returncode not in fine:
        sys.exit(f"{' '.join(command)}\nended with {process.returncode}\n{out}\n{err[-3000:]}")
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result = json.loads(lines[-1]) if lines else {}
    return Run(seconds, result.get("peak_rss_bytes", 0) / 1e6, result)


def once(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of some work, done now or found in a file of an earlier run."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(work()))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
