"""A 784-256-10 classifier of drawn digits, quantized three ways. Run: python examples/digit_classifier.py

Prints test losses and accuracies, the int8 codes of the last layer, bytes on disk and the time of one pass.
"""

import copy
import tempfile
import time
from pathlib import Path

import torch
from drawn_digits import drawn_digits
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import bitwright


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, rate: float = 1e-3) -> None:
    """Adam on batches of 128."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()


def report(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One line: loss and accuracy, what the file weighs, and how long all images take."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, file)
        model(x)  # the first call is slower than those that follow
        start = time.perf_counter()
        logits = model(x)
        seconds = time.perf_counter() - start
        loss, right = functional.cross_entropy(logits, y), (logits.argmax(1) == y).float().mean()
        size = file.stat().st_size
        print(f"{name:14} loss {loss:.4f}   {right:7.2%} right   {size:9,} bytes   {seconds * 1e3:6.2f} ms")


def main() -> None:
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = drawn_digits(10_000, seed=1), drawn_digits(2_000, seed=2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    train(model, x, y, epochs=5)
    original = copy.deepcopy(model).eval()
    report("float", original, x_test, y_test)
    report("dynamic int8", bitwright.quantize_dynamic(original), x_test, y_test)

    formats = {"weights": "int4-channel", "activations": "int8-tensor-asym"}
    prepared = bitwright.calibrate(bitwright.prepare(original, x[:100], **formats), x[:2_000].split(200))
    static = bitwright.convert(prepared)
    report("static int4", static, x_test, y_test)

    student = bitwright.prepare_qat(model.train(), x[:1_000], **formats)
    train(student, x, y, epochs=2, rate=3e-4)
    report("QAT int4", bitwright.convert(student.eval()), x_test, y_test)

    student = bitwright.prepare_qat(model.train(), x[:1_000], **formats)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-4)
    batches = list(zip(x.split(128), y.split(128), strict=True))
    bitwright.distill(student, original, batches, temperature=2.0, alpha=0.7, epochs=2, optimizer=optimizer)
    distilled = bitwright.convert(student.eval())
    report("distilled int4", distilled, x_test, y_test)

    print(bitwright.layers(distilled))
    print("codes of layer 3:", *distilled.state_dict()["3.codes"][:, :16].tolist(), sep="\n  ")


if __name__ == "__main__":
    main()
