"""LSTM and GRU, rounded as they run, beside float and torch.ao's dynamic quantization: milliseconds a pass, medians.

python -m bench.recurrent [--repeat 7] [--threads N]
"""

import argparse
import copy
import warnings
from collections.abc import Callable

import torch
from torch import nn

import bitwright
from bench.digits import milliseconds
from bench.measure import table

SHAPES = [(256, 64, 1), (256, 64, 200), (650, 35, 20)]  # hidden size, steps, batch


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    rows = []
    for kind in (nn.LSTM, nn.GRU):
        for hidden, steps, batch in SHAPES:
            layer, x = kind(hidden, hidden).eval(), torch.randn(steps, batch, hidden)
            peer = torch.ao.quantization.quantize_dynamic(
                nn.Sequential(copy.deepcopy(layer)), {kind}, dtype=torch.qint8
            )
            modules = {"float": layer, "dynamic": bitwright.quantize_dynamic(layer), "torch.ao": peer[0]}
            runs: dict[str, Callable[[], object]] = {name: lambda m=m, x=x: m(x) for name, m in modules.items()}  # type: ignore[misc]
            times = milliseconds(runs, args.repeat, 3)
            name = f"{kind.__name__}, {hidden} wide, {steps} steps, batch {batch}"
            rows.append([name, *(f"{t:.2f} ({times['float'] / t:.2f} ×)" for t in times.values())])
    print(table(["layer", *modules], rows))


if __name__ == "__main__":
    main()
