"""Small modules, what they are given, and which products they compute."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import bitwright

MATMULS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "linear",
    "addmv",
    "mv",
    "dot",
    "lstm",
    "gru",
    "matmul",
    "einsum",
)


class Products(TorchDispatchMode):
    """Records the type of the first operand of every matrix product and convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_int_mm" or any(word == name.strip("_") for word in MATMULS):
            self.types += [a.dtype for a in args if isinstance(a, Tensor)][:1]
        return func(*args, **(kwargs or {}))


def relative(expected: Tensor, found: Tensor) -> float:
    assert expected.shape == found.shape
    return float((expected - found).norm() / expected.norm())


def random_int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


class Residual(nn.Module):
    """Every kind of operation: products with and without batch norms and ReLUs, a sum, pools, a table, float islands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 16, 1)
        self.pool, self.act, self.relu6 = nn.MaxPool2d(2), nn.GELU(), nn.ReLU6()
        self.fc1, self.norm, self.fc2, self.drop = (
            nn.Linear(16, 32),
            nn.LayerNorm(32),
            nn.Linear(32, 10),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        y = self.relu6(self.norm2(self.conv2(x)))
        x = functional.relu(self.conv3(y) + x)
        x = self.act(self.conv3(self.pool(x)))
        x = functional.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
        return self.fc2(self.drop(self.norm(self.fc1(x).sigmoid())))


def residual() -> Residual:
    torch.manual_seed(0)
    net = Residual()
    for norm in (net.norm1, net.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net.eval()


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def converted(net: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    return bitwright.convert(bitwright.calibrate(bitwright.prepare(net, x, **options), [x]))
