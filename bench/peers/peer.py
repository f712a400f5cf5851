"""What the peers' scripts share: their arguments, and the line of JSON that they end with.

Standard output is that one line, {"seconds": ..., "peak_rss_bytes": ...}, for the whole process from its start, behind what a
script adds; everything else goes to standard error. Linux carries the parent's peak memory over into a child, so start a
script from a process smaller than itself. On a busy machine OpenMP's spinning threads make peers many times slower;
OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1 avoids that. Where the processor has no instructions for bfloat16, torch
multiplies bfloat16 matrices several times more slowly than float32 ones; --dtype float32 avoids that.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any


def _group(text: str) -> int:
    """As all the peers write it: -1 for a whole row."""
    if text == "channel":
        return -1
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'channel'")
    return int(text)


def arguments(description: str | None, bits: Collection[int]) -> argparse.ArgumentParser:
    """MODEL OUT --tokens --bits --group --dtype --asym | --sym."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to save to")
    parser.add_argument("--tokens", type=Path, help="calibration windows (safetensors)")
    parser.add_argument("--bits", type=int, default=4, choices=bits)
    parser.add_argument("--group", type=_group, default=128, help="weights per scale, or 'channel' for whole rows")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32"), help="what the peer computes in")
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--asym", dest="symmetric", action="store_false", help="with zero points (default)")
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", help="without zero points")
    parser.set_defaults(symmetric=False)
    return parser


@contextlib.contextmanager
def reporting() -> Iterator[dict[str, Any]]:
    """Offline and on the CPU; whatever is printed inside goes to standard error, and the JSON comes last, with what is put
    into the dict."""
    # Read by the libraries when they are imported.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        yield found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found | {"seconds": round(_seconds_since_start(), 2), "peak_rss_bytes": peak}))


def _seconds_since_start() -> float:
    """Wall-clock age of this process, interpreter start included."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
