"""Peak resident memory of this process, and handing freed memory back to the operating system."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Reset the kernel's record of the largest resident set (Linux; elsewhere nothing happens)."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return


def peak_since() -> int:
    """The largest resident set in bytes since `forget_peak`; where that does nothing, since the process began."""
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def keep_memory() -> None:
    """Have glibc keep freed memory for later allocations, until `return_memory`.

    Otherwise every large tensor gets fresh pages, which the kernel clears one by one: a tenth of a run's time.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(TRIM_THRESHOLD, 1 << 28)
            mallopt(MMAP_THRESHOLD, 1 << 25)


def return_memory() -> None:
    """Collect reference cycles and have glibc return freed memory, of which it would keep blocks below 32 MB."""
    gc.collect(1)  # younger generations only: what was imported lives on anyway
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
