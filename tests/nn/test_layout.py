"""Integer convolutions in modules that `view` their results, as many that classify images do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright

CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(2, 4, 3), (3, 2, 9)), (nn.Conv2d(2, 4, 3), (3, 2, 9, 9)), (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 9, 9)),
    (nn.Conv3d(2, 4, 3), (3, 2, 5, 5, 5)), (nn.ConvTranspose2d(2, 4, 3, 2), (3, 2, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 3), (3, 2, 3, 3, 3)),
    (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), (3, 2, 9, 9)),
]  # fmt: skip


class Classifier(nn.Module):
    def __init__(self, layer: nn.Module, n: int, traceable: bool) -> None:
        super().__init__()
        self.layer, self.between, self.head, self.traceable = layer, nn.ReLU(), nn.Linear(n, 3), traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        y = self.between(self.layer(x))
        return self.head(y.view(y.size(0), -1))


def static(net: nn.Module, x: Tensor, **schemes: Any) -> nn.Module:
    return bitwright.convert(bitwright.calibrate(bitwright.prepare(net, x, **schemes), [x]))


WAYS = {
    "dynamic": lambda net, x: bitwright.quantize_dynamic(net),
    "static": static,
    "tokens": lambda net, x: bitwright.convert(bitwright.prepare(net, x, activations="int8-token")),
    "weights": lambda net, x: bitwright.quantize_weights(net, [x], scheme="int8-channel", method="rtn"),
    "trained": lambda net, x: bitwright.convert(bitwright.prepare_qat(net.train(), x).eval()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("traceable", [True, False], ids=["traced", "not traced"])
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda case: str(case)[:24])
def test_results_can_be_viewed(layer: nn.Module, shape: tuple[int, ...], traceable: bool, way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    net = Classifier(layer, layer(x)[0].numel(), traceable).eval()
    expected = net(x).detach()
    with torch.no_grad():
        found = WAYS[way](net, x)(x)
    assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_only_what_is_viewed_is_laid_out_anew() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    integer = bitwright.quantize_dynamic(net)
    assert not any(layer._forward_hooks for layer in integer.modules())
    last = bitwright.quantize_dynamic(Classifier(net, 4 * 25, True).eval())
    assert [name for name, layer in last.named_modules() if layer._forward_hooks] == ["layer.1"]
