"""One linear layer, 2048 -> 8192, for 1, 16 and 512 inputs: bitwright's kernels beside torch's own on the same threads.

    python -m bench.linear [--schemes int4-g128,nf4-g64,int8-channel,q4_k]

Milliseconds, medians of many calls; each call takes another copy of the weights, so that caches do not hold them.
torch: float32, bfloat16, `_weight_int4pack_mm_for_cpu` (bfloat16 inputs, groups of 128), `_int_mm`. bitsandbytes' and
GPTQModel's layers, with bfloat16 inputs, where `bench/peers/install.sh bitsandbytes` and `gptqmodel` were run.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor

from bench.measure import table
from bitwright.kernels import native
from bitwright.kernels.matmul import Packed, matrix_of, pack
from bitwright.methods.rtn import rtn
from bitwright.numerics.scheme import Scheme

N, K, COPIES, SECONDS = 8192, 2048, 12, 0.5
COUNTS = (1, 16, 512)
PEERS = Path(__file__).parent / "peers"


def timed(calls: list[Callable[[], object]]) -> str:
    """Each in turn for a while: the median, in milliseconds."""
    seconds, end, i = [], time.perf_counter() + SECONDS, 0
    for call in calls:
        call()
    while time.perf_counter() < end or len(seconds) < 5:
        begun = time.perf_counter()
        calls[i % len(calls)]()
        seconds.append(time.perf_counter() - begun)
        i += 1
    return f"{statistics.median(seconds) * 1e3:.2f}"


def ours(p: Packed, x: Tensor, count: int) -> str:
    """The native product, inputs rounded to `count` bytes."""
    if native is None:
        return "-"
    extension, y = native, torch.empty(len(x), N)
    copies = [Packed(p.panels.clone(), p.scale, p.point, p.minimum, p.unit, p.scheme, N, K) for _ in range(COPIES)]
    matrices = [matrix_of(copy) for copy in copies]
    return timed([lambda m=m: extension.product(m, x, y, count, False, torch.get_num_threads()) for m in matrices])


def torch_itself(w: Tensor, x: Tensor) -> dict[str, str]:
    """torch's own products."""
    half, xh = [w.bfloat16() for _ in range(COPIES)], x.bfloat16()
    found = {"torch float32": timed([lambda: x @ w.T]), "torch bfloat16": timed([lambda h=h: xh @ h.T for h in half])}
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(COPIES)]
    scales = torch.ones(K // 128, N, 2, dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    found["torch _weight_int4pack_mm_for_cpu"] = timed([lambda p=p: multiply(xh, p, 128, scales) for p in packed])
    x8 = torch.randint(-127, 127, (max(len(x), 17), K), dtype=torch.int8)  # it takes no fewer
    w8 = [torch.randint(-127, 127, (K, N), dtype=torch.int8) for _ in range(COPIES)]
    found["torch _int_mm"] = timed([lambda m=m: torch._int_mm(x8, m) for m in w8])
    return found


def packages() -> dict[str, list[str]]:
    """Layers of other packages, each in its own environment."""
    found = {}
    for name in ("bitsandbytes", "gptqmodel"):
        python = PEERS / "envs" / name / "bin" / "python"
        if python.exists():
            counts = ",".join(map(str, COUNTS))
            said = subprocess.check_output([python, PEERS / "linear.py", name, str(N), str(K), counts], text=True)
            result = json.loads(said.splitlines()[-1])
            found[f"{name} ({result['kernel']})"] = [f"{ms:.2f}" for ms in result["milliseconds"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="int4-g128,nf4-g64,int8-channel,q4_k")
    args = parser.parse_args()
    w = torch.randn(N, K) * 0.02
    inputs = [torch.randn(M, K) for M in COUNTS]
    lines = []
    for scheme in args.schemes.split(","):
        p = pack(rtn(w, None, Scheme.parse(scheme)).q)
        for count, name in ((2, "16"), (1, "8")):
            lines.append([f"{scheme}, inputs of {name} bits", *(ours(p, x, count) for x in inputs)])
    columns = [torch_itself(w, x) for x in inputs]
    lines += [[name, *(column[name] for column in columns)] for name in columns[0]]
    lines += [[name, *times] for name, times in packages().items()]
    print(table([f"ms, {torch.get_num_threads()} threads", "1 input", "16", "512"], lines))


if __name__ == "__main__":
    main()
