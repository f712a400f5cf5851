"""This machine: instruction sets, cores, memory, GPUs; how fast it reads memory and multiplies, by measurement."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bitwright.inference.speed import read_bandwidth
from bitwright.kernels import current
from bitwright.kernels.matmul import Packed, pack, product
from bitwright.methods.rtn import rtn
from bitwright.numerics.scheme import Scheme

FLAGS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8", "amx_bf16": "AMX bf16", "asimd": "NEON", "asimddp": "NEON dot products", 
    "i8mm": "NEON int8 matrices",    "sve": "SVE",
}  # fmt: skip
SIDE = 2048  # of the matrices that are multiplied to measure
COPIES_BYTES = 48 << 20  # of one scheme's matrices together: more than caches hold, as a model's are
CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")  # memory.max and memory.current of a container's limit


@dataclass(frozen=True)
class Gpu:
    """A GPU. memory: bytes; capability: CUDA's compute capability; bandwidth: bytes a second, measured; None: not measured."""

    name: str
    memory: int
    capability: tuple[int, int]
    bandwidth: float | None = None


@dataclass(frozen=True)
class Machine:
    """What computes here.

    cpu, instructions, cores  threads: of which torch uses so many
    memory, available         bytes
    kernels                   the instruction set of bitwright's own kernels, or "torch"
    bandwidth                 bytes a second read from memory; 0: not measured
    products                  "float32", "bfloat16", "int8" -> operations a second of a large product
    weights                   scheme -> weights a second that one token's product works through
    load                      processes that ran or waited during the last minute, before anything was measured
    """

    cpu: str
    instructions: tuple[str, ...]
    cores: int
    threads: int
    memory: int
    available: int
    kernels: str = ""
    bandwidth: float = 0.0
    products: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    load: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other processes have the cores, so that what was measured is too low."""
        return self.load > self.cores


def this_machine(schemes: tuple[str, ...]) -> Machine:
    """Look at this machine, and measure it for some seconds. schemes: whose products are timed."""
    memory, available = _memory()
    load = os.getloadavg()[0]
    return Machine(
        _cpu_name(),
        _instructions(),
        os.cpu_count() or 1,
        torch.get_num_threads(),
        memory,
        available,
        current(),
        read_bandwidth(),
        {"float32": _rate(torch.float32), "bfloat16": _rate(torch.bfloat16), "int8": _int8_rate()},
        {scheme: weights_per_second(scheme) for scheme in schemes},
        _gpus(),
        load,
    )


def weights_per_second(scheme: str) -> float:
    """Weights a second of a product with one token, by the kernels that `load` uses, on matrices that no cache holds."""
    w = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    packed = pack(rtn(w, None, Scheme.parse(scheme)).q)
    copies = [_copy(packed) for _ in range(COPIES_BYTES // packed.nbytes)] or [packed]
    x = torch.randn(1, SIDE)

    def run() -> None:
        for one in copies:
            product(x, one)

    return len(copies) * w.numel() / _best(run)


def _copy(packed: Packed) -> Packed:
    """The same matrix, its codes and scales in memory of their own."""
    return replace(packed, panels=packed.panels.clone(), scale=packed.scale.clone())


def _best(run: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest of some runs, after one that sets things up."""
    run()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)


def _rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices, by torch."""
    side = SIDE // 2
    a, b = torch.ones(side, side, dtype=dtype), torch.ones(side, side, dtype=dtype)
    return 2 * side**3 / _best(lambda: a @ b, 2)


def _int8_rate() -> float:
    """Operations a second of a prompt's product with int8 weights and inputs, by bitwright's kernels."""
    w, side = torch.randn(SIDE, SIDE), SIDE
    packed, x = pack(rtn(w, None, Scheme.parse("int8-channel")).q), torch.randn(256, SIDE)
    return 2 * 256 * side * side / _best(lambda: product(x, packed, bits=8), 2)


def _cpu_name() -> str:
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instructions() -> tuple[str, ...]:
    """Instruction sets that matter for products, by the names that Linux gives them; elsewhere what torch found."""
    if CPU_INFO.is_file():
        words = set(CPU_INFO.read_text().split())
        return tuple(name for flag, name in FLAGS.items() if flag in words)
    return (torch.backends.cpu.get_cpu_capability(),)


def _memory() -> tuple[int, int]:
    """Bytes of memory, and those that are free or can be freed; of a container, what it may have."""
    if not MEMORY_INFO.is_file():
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return whole, whole
    lines = dict(line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines())
    whole, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_number(CONTAINER / name) for name in ("memory.max", "memory.current"))
    if limit is None:
        return whole, free
    taken = max(0, (used or 0) - _page_cache())
    return min(whole, limit), min(free, max(0, limit - taken))


def _page_cache() -> int:
    """Bytes of files that the container has read, which the kernel frees when memory is asked for."""
    file = CONTAINER / "memory.stat"
    lines = file.read_text().splitlines() if file.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def _number(file: Path) -> int | None:
    """The number in a file of the kernel's; None if it is not there, or says "max"."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(p.name, p.total_memory, (p.major, p.minor), _gpu_bandwidth(i)) for i, p in enumerate(found))


def _gpu_bandwidth(index: int) -> float:
    """Bytes a second that a sum reads from a GPU's memory."""
    x = torch.ones(1 << 28, device=f"cuda:{index}")

    def run() -> None:
        x.sum()
        torch.cuda.synchronize(index)

    return x.nbytes / _best(run)
