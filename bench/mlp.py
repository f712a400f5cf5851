"""The 3-3-2 regression network: dynamic, static and trained quantization beside float.

    python -m bench.mlp [--seed 42] [--seeds 10]

10,000 training rows, 100 Adam steps at 0.1, test loss on 1,000 rows; QAT takes as many steps, from the float network's own
start or from the trained network. Weights of 8, 4 and 2 bits, values between layers in 8; and 4 bits of both. One seed's
figures move by tens of percent with the smallest change, so `--seeds` looks at many: medians, and in how many of them training
beat static quantization of the same float network.
"""

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch
from examples.regression_mlp import data, network, train
from torch import nn

import bitwright
from bench.measure import table

FORMATS = [("int8", "int8"), ("int4", "int8"), ("int2", "int8"), ("int4", "int4")]
FOLLOWING, STATIC = "QAT, scales following", "static"


def losses(seed: int, *, show: bool = False) -> tuple[float, dict[str, list[float]]]:
    """Float's test loss, and for each way of quantizing that of each format."""
    torch.manual_seed(seed)
    (x, y), (x_test, y_test) = data(10_000), data(1_000)
    start = network()
    model = copy.deepcopy(start)
    train(model, x, y)
    model.eval()

    def loss(module: nn.Module) -> float:
        with torch.no_grad():
            return float(nn.functional.mse_loss(module(x_test), y_test))

    def dynamic(weights: str, values: str) -> nn.Module:
        return bitwright.quantize_dynamic(model, f"{weights}-channel", activations=f"{values}-token-asym")

    def static(weights: str, values: str) -> nn.Module:
        formats = {"weights": f"{weights}-channel", "activations": f"{values}-tensor-asym"}
        prepared = bitwright.prepare(model, x[:100], **formats)
        return bitwright.convert(bitwright.calibrate(prepared, x.split(1000)))

    def aware(
        weights: str, values: str, *, origin: nn.Module, group: str = "tensor", learned: bool = True
    ) -> nn.Module:
        formats = {"weights": f"{weights}-channel", "activations": f"{values}-{group}-asym"}
        prepared = bitwright.prepare_qat(copy.deepcopy(origin).train(), x, learned=learned, **formats)
        train(prepared, x, y)
        return bitwright.convert(prepared.eval())

    makers: dict[str, Callable[[str, str], nn.Module]] = {
        "dynamic": dynamic,
        STATIC: static,
        FOLLOWING: partial(aware, origin=start, learned=False),
        f"{FOLLOWING}, by token": partial(aware, origin=start, learned=False, group="token"),
        "QAT": partial(aware, origin=start),
        "QAT from float": partial(aware, origin=model),
    }
    found: dict[str, list[float]] = {}
    for name, make in makers.items():
        modules = [make(*pair) for pair in FORMATS]
        codes = modules[0].state_dict()["0.codes"]
        assert codes.dtype == torch.int8
        if show:
            print(f"{name}, 8 bits, codes of layer 0: {codes.tolist()}")
        found[name] = [loss(module) for module in modules]
    return loss(model), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seeds", type=int, default=0)
    args = parser.parse_args()
    names = [f"{w} weights, {v} values" for w, v in FORMATS]
    model, found = losses(args.seed, show=True)
    rows = [[name, *(f"{loss:.5f}" for loss in each)] for name, each in found.items()]
    print(table([f"test loss; float {model:.5f}", *names], rows))
    if args.seeds:
        many = [losses(seed) for seed in range(args.seeds)]
        rows = []
        for name in found:
            cells = []
            for i in range(len(FORMATS)):
                ratio = statistics.median(each[name][i] / whole for whole, each in many)
                below = sum(each[name][i] < each[STATIC][i] for _, each in many)
                cells.append(f"{ratio:.3f} × float, {below} of {len(many)}")
            rows.append([name, *cells])
        print(table(["median of the ratio; below static in", *names], rows))


if __name__ == "__main__":
    main()
