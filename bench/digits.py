"""A convolutional classifier of drawn digits, quantized four ways at 8 and 4 bits, beside torch.ao on the same machine.

    python -m bench.digits [--parts accuracy,speed,wide,mobile] [--repeat 7] [--threads N]

Accuracy on 2,000 images; the state dict's bytes; milliseconds a pass at batch 1 and 64, medians, the contenders taking
turns. "wide": a Linear of 2048 × 2048 at batch 512 against float32. "mobile": a small network of depthwise convolutions,
squeeze-excitation and hard-swish, trained with 8 bits and with 4-bit weights and activations.

GOMP_SPINCOUNT is 1000 unless it is set: by default torch's OpenMP threads keep looking for work, on the cores that
bitwright's pool needs, for milliseconds after every operation. torch.ao itself is up to a third faster with the default.
"""

import argparse
import copy
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from examples.drawn_digits import drawn_digits
from torch import Tensor, nn
from torch.nn import functional

import bitwright
from bench.measure import table


def network() -> nn.Sequential:
    """Two convolutions with batch norms, pools, and two Linears: 430 thousand weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


class Excitation(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, arXiv:1709.01507), with a hard sigmoid as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True)
        self.squeeze, self.excite = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.excite(self.act(self.squeeze(self.pool(x)))))


def mobile_network() -> nn.Sequential:
    """Two blocks as in MobileNetV3 (Howard et al. 2019, arXiv:1905.02244): 3 thousand weights."""
    parts: list[nn.Module] = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.Hardswish(inplace=True)]
    for channels, wider, stride in ((16, 24, 2), (24, 32, 1)):
        parts += [
            nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels),
            nn.BatchNorm2d(channels),
            nn.Hardswish(inplace=True),
            Excitation(channels),
            nn.Conv2d(channels, wider, 1),
            nn.BatchNorm2d(wider),
        ]
    return nn.Sequential(*parts, nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def mobile(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    """Quantization-aware training of the mobile network."""
    model = mobile_network()
    train(model, x, y, epochs=6, rate=3e-3)
    model.eval()
    rows = [["float", f"{accuracy(model, x_test, y_test):.2%}"]]
    for bits in (8, 4):
        formats = {"weights": f"int{bits}-channel", "activations": f"int{bits}-tensor-asym"}
        aware = bitwright.prepare_qat(copy.deepcopy(model).train(), x[:512], learned=True, **formats)
        train(aware, x, y, epochs=4, rate=1e-3)
        rows.append([f"QAT {bits}", f"{accuracy(bitwright.convert(aware.eval()), x_test, y_test):.2%}"])
        print(*rows[-1], flush=True)
    print(table(["mobile network, bits", "right"], rows))


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, rate: float) -> None:
    """Adam on batches of 128."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that are classified rightly."""
    return float((torch.cat([model(part) for part in x.split(250)]).argmax(1) == y).float().mean())


def size(model: nn.Module) -> int:
    """Bytes of the state dict as tensors; for torch.ao, whose weights are packed, as saved."""
    tensors = list(model.state_dict().values())
    if all(isinstance(t, Tensor) and not t.is_quantized for t in tensors):
        return sum(t.numel() * t.element_size() for t in tensors)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def contenders(x: Tensor, y: Tensor) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The float model and its quantized forms."""
    model = network()
    train(model, x, y, epochs=3, rate=1e-3)
    model.eval()
    made: dict[str, nn.Module] = {"float": model}
    for bits in (8, 4):
        formats = {"weights": f"int{bits}-channel", "activations": f"int{bits}-tensor-asym"}
        made[f"dynamic {bits}"] = bitwright.quantize_dynamic(
            model, f"int{bits}-channel", activations=f"int{bits}-token-asym"
        )
        prepared = bitwright.prepare(model, x[:64], **formats)
        made[f"static {bits}"] = bitwright.convert(bitwright.calibrate(prepared, x[:1024].split(128)))
        aware = bitwright.prepare_qat(copy.deepcopy(model).train(), x[:512], learned=True, **formats)
        train(aware, x, y, epochs=1, rate=3e-4)
        made[f"QAT {bits}"] = bitwright.convert(aware.eval())
    return model, made


def by_torch_ao(model: nn.Module, x: Tensor, engine: str) -> nn.Module:
    """The same network through torch.ao's eager static quantization."""
    warnings.filterwarnings("ignore")
    from torch.ao import quantization as ao

    torch.backends.quantized.engine = engine
    wrapped = nn.Sequential(ao.QuantStub(), *copy.deepcopy(model), ao.DeQuantStub()).eval()
    fused = ao.fuse_modules(wrapped, [["1", "2", "3"], ["5", "6", "7"], ["10", "11"]])
    fused.qconfig = ao.get_default_qconfig(engine)
    prepared = ao.prepare(fused)
    with torch.no_grad():
        for part in x[:1024].split(128):
            prepared(part)
    return ao.convert(prepared)


def milliseconds(runs: dict[str, Callable[[], object]], repeat: int, calls: int) -> dict[str, float]:
    """The median time of a call of each; they take turns, so that a slow moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            run()
            begun = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - begun) / calls * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


@torch.no_grad()
def speed(model: nn.Module, static: nn.Module, x: Tensor, repeat: int) -> None:
    """Milliseconds of the static model beside float and torch.ao."""
    engines = {f"torch.ao {engine}": engine for engine in ("x86", "fbgemm", "onednn")}
    rows = []
    for batch, calls in ((1, 50), (64, 5)):
        part = x[:batch]
        runs: dict[str, Callable[[], object]] = {
            "float": lambda p=part: model(p),
            "bitwright": lambda p=part: static(p),
        }  # type: ignore[misc]
        for name, engine in engines.items():
            peer = by_torch_ao(model, x, engine)

            def run(peer: nn.Module = peer, engine: str = engine, part: Tensor = part) -> Tensor:
                torch.backends.quantized.engine = engine
                return peer(part)

            runs[name] = run
        times = milliseconds(runs, repeat, calls)
        rows.append([str(batch), *(f"{t:.3f} ({t / times['bitwright']:.2f} ×)" for t in times.values())])
    print(table(["batch", *times], rows))


@torch.no_grad()
def wide(repeat: int) -> None:
    """One wide Linear, dynamic and static, against float32."""
    rows = []
    for width in (2048, 4096):
        layer, x = nn.Sequential(nn.Linear(width, width)).eval(), torch.randn(512, width)
        dynamic = bitwright.quantize_dynamic(layer)
        static = bitwright.convert(bitwright.calibrate(bitwright.prepare(layer, x, observer="minmax"), [x]))
        runs: dict[str, Callable[[], object]] = {
            "float32": lambda layer=layer, x=x: layer(x),  # type: ignore[misc]
            "dynamic": lambda layer=dynamic, x=x: layer(x),  # type: ignore[misc]
            "static": lambda layer=static, x=x: layer(x),  # type: ignore[misc]
        }
        times = milliseconds(runs, repeat, 3)
        rows.append([str(width), *(f"{t:.1f} ({times['float32'] / t:.2f} ×)" for t in times.values())])
    print(table(["width, batch 512", *times], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="accuracy,speed,wide")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts = args.parts.split(",")
    torch.manual_seed(0)
    if "accuracy" in parts:
        (x, y), (x_test, y_test) = drawn_digits(10_000, seed=1), drawn_digits(2_000, seed=2)
        model, made = contenders(x, y)
        made["torch.ao x86"] = by_torch_ao(model, x, "x86")
        rows = [
            [
                name,
                f"{accuracy(module, x_test, y_test):.2%}",
                f"{size(module):,}",
                f"{size(model) / size(module):.2f} ×",
            ]
            for name, module in made.items()
        ]
        print(table(["model, bits", "right", "bytes", "smaller"], rows))
    if "mobile" in parts:
        mobile(*drawn_digits(6_000, seed=1), *drawn_digits(2_000, seed=2))
    if "speed" in parts:
        x, _ = drawn_digits(1_024, seed=3)
        model = network().eval()
        formats = {"weights": "int8-channel", "activations": "int8-tensor-asym"}
        prepared = bitwright.calibrate(bitwright.prepare(model, x[:64], **formats), [x])
        speed(model, bitwright.convert(prepared), x, args.repeat)
    if "wide" in parts:
        wide(args.repeat)


if __name__ == "__main__":
    main()
