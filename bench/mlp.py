"""The 3-3-2 regression network: dynamic, static and trained quantization beside float.

    python -m bench.mlp [--seed 42]

10,000 training rows, 100 Adam steps at 0.1, test loss on 1,000 rows; QAT takes as many steps, from the float network's own
start or from the trained network. Weights of 8, 4 and 2 bits, values between layers in 8; and 4 bits of both.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from examples.regression_mlp import data, network, train
from torch import nn

import bitwright
from bench.measure import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    torch.manual_seed(parser.parse_args().seed)
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

    def aware(weights: str, values: str, learned: bool, origin: nn.Module) -> nn.Module:
        formats = {"weights": f"{weights}-channel", "activations": f"{values}-tensor-asym"}
        prepared = bitwright.prepare_qat(copy.deepcopy(origin).train(), x, learned=learned, **formats)
        train(prepared, x, y)
        return bitwright.convert(prepared.eval())

    makers: dict[str, Callable[[str, str], nn.Module]] = {
        "dynamic": dynamic,
        "static": static,
        "QAT": partial(aware, learned=False, origin=start),
        "QAT, scales learned": partial(aware, learned=True, origin=start),
        "QAT from float": partial(aware, learned=False, origin=model),
        "QAT from float, scales learned": partial(aware, learned=True, origin=model),
    }
    formats = [("int8", "int8"), ("int4", "int8"), ("int2", "int8"), ("int4", "int4")]
    rows = [["float", f"{loss(model):.5f}"] + ["–"] * len(formats)]
    for name, make in makers.items():
        modules = {pair: make(*pair) for pair in formats}
        codes = modules[formats[0]].state_dict()["0.codes"]
        assert codes.dtype == torch.int8
        rows.append([name, "–", *(f"{loss(module):.5f}" for module in modules.values())])
        print(f"{name}, 8 bits, codes of layer 0: {codes.tolist()}")
    print(table(["test loss", "float", *(f"{w} weights, {v} values" for w, v in formats)], rows))


if __name__ == "__main__":
    main()
