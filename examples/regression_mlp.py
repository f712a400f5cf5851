"""A 3-3-2 regression network, quantized three ways. Run: python examples/regression_mlp.py

Prints test losses, the int8 codes of the first layer, bytes on disk and the time of one pass.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bitwright

TRUTH = torch.tensor([[1.12, 1.6], [2.24, 2.5], [3.6, 3.9]])


def data(rows: int) -> tuple[Tensor, Tensor]:
    """x [rows, 3] and y = x · TRUTH."""
    x = torch.randn(rows, 3)
    return x, x @ TRUTH


def network() -> nn.Sequential:
    """Linear, ReLU, Linear."""
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int = 100) -> None:
    """Adam at 0.1 on the whole set."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def report(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One line: the loss, what the file weighs, and how long all rows take."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
        model(x)  # the first call is slower than those that follow
        start = time.perf_counter()
        loss = float(nn.functional.mse_loss(model(x), y))
        seconds = time.perf_counter() - start
        print(f"{name:14} loss {loss:8.5f}   {file.stat().st_size:5} bytes   {seconds * 1e3:6.2f} ms")


def main() -> None:
    torch.manual_seed(42)
    (x, y), (x_test, y_test) = data(10_000), data(1_000)
    start = network()
    model = copy.deepcopy(start)
    train(model, x, y)
    report("float", model.eval(), x_test, y_test)

    dynamic = bitwright.quantize_dynamic(model, "int8-channel", activations="int8-token")
    report("dynamic int8", dynamic, x_test, y_test)

    prepared = bitwright.prepare(model, x[:100], weights="int8-channel", activations="int8-tensor-asym")
    bitwright.calibrate(prepared, x.split(1000))
    static = bitwright.convert(prepared)
    report("static int8", static, x_test, y_test)

    formats = {"weights": "int8-channel", "activations": "int8-tensor-asym"}
    trained = bitwright.prepare_qat(start.train(), x, learned=True, **formats)
    train(trained, x, y)
    aware = bitwright.convert(trained.eval())
    report("QAT int8", aware, x_test, y_test)

    print(bitwright.layers(static))
    print("codes of layer 0:", *static.state_dict()["0.codes"].tolist(), sep="\n  ")


if __name__ == "__main__":
    main()
