"""How much memory this process has had, and giving back what it no longer needs."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Have the system count the largest resident set from here on, where it can (Linux)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def peak_since() -> int:
    """The largest resident set since `forget_peak`, or, where that did nothing, of the process so far."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def keep_memory() -> None:
    """Have glibc keep what is freed for the next that ask, until `return_memory`: else each large tensor is memory that the
    system hands out anew, page by page, and a tenth of a run goes into that."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(TRIM_THRESHOLD, 1 << 28)
            mallopt(MMAP_THRESHOLD, 1 << 25)


def return_memory() -> None:
    """Collect cycles, and have glibc give freed memory back to the system: it hoards blocks below 32 MB."""
    gc.collect(1)  # the young ones: what was imported stays anyway
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
