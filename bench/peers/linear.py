"""One linear layer, 2048 -> 8192, of bitsandbytes (NF4) or GPTQModel (int4, groups of 128) for some numbers of inputs.

    bench/peers/envs/NAME/bin/python bench/peers/linear.py NAME N K M,M,...

Standard output ends with a line of JSON: the kernel that the package takes on this CPU, and milliseconds for each M,
medians over copies of the weights that no cache holds. Both packages have AVX-512 kernels for CPUs with bfloat16
instructions; elsewhere they decode the weights first, or call torch's own product. Inputs are bfloat16.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

COPIES, SECONDS = 12, 0.5


def bitsandbytes(N: int, K: int) -> Callable[[], nn.Module]:
    """NF4 in groups of 64, as its Linear4bit."""
    import bitsandbytes as bnb

    return lambda: bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()


def gptqmodel(N: int, K: int) -> Callable[[], nn.Module]:
    """int4 in groups of 128, by the first of its kernels for CPUs that this one can run."""
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear

    kernel = next(k for k in (TorchCpuAvx512Linear, TorchAtenLinear) if k.validate_once()[0])

    def make() -> nn.Module:
        layer = kernel(bits=4, group_size=128, sym=True, desc_act=False, in_features=K, out_features=N)
        layer.qweight.random_(-(2**31), 2**31 - 1)
        layer.qzeros.fill_(-0x77777778)  # 8 in each of eight places
        layer.scales.fill_(0.01)
        layer.post_init()
        return layer.eval()

    return make


def timed(layers: list[nn.Module], x: torch.Tensor) -> float:
    """Each in turn for a while: the median, in milliseconds."""
    for layer in layers:
        layer(x)
    seconds, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(seconds) < 5:
        begun = time.perf_counter()
        layers[len(seconds) % len(layers)](x)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1e3


@torch.inference_mode()
def main() -> None:
    name, N, K, counts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(m) for m in sys.argv[4].split(",")]
    make = {"bitsandbytes": bitsandbytes, "gptqmodel": gptqmodel}[name](N, K)
    layers = [make() for _ in range(COPIES)]
    found = [timed(layers, torch.randn(M, K, dtype=torch.bfloat16)) for M in counts]
    print(json.dumps({"kernel": type(layers[0]).__name__, "milliseconds": found}))


if __name__ == "__main__":
    main()
