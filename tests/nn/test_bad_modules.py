"""What users give by mistake: named, with a remedy, and never silent."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.errors import CalibrationError, NumericsError, RecipeError, SchemeError
from bitwright.nn import layers
from bitwright.nn.integer import product, product_on_gpu
from small_modules import converted

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(4))


def net() -> nn.Module:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


class Lacks(nn.Module):
    """As torch does for half precision where a device has no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise NotImplementedError("\"lacks_kernel\" not implemented for 'Half'")
        return x


def test_half_precision_that_the_device_lacks() -> None:
    half = nn.Sequential(nn.Linear(16, 16), Lacks(), nn.Linear(16, 4)).eval().half()
    for way in (
        lambda: bitwright.prepare(half, X.half()),
        lambda: bitwright.quantize_dynamic(half, example_inputs=X.half()),
    ):
        with pytest.raises(
            RecipeError, match=r"^1: \"lacks_kernel\" not implemented for 'Half'\s+remedy: module.float()"
        ):
            way()


@pytest.mark.parametrize(
    "way",
    [
        lambda x: bitwright.calibrate(bitwright.prepare(net(), X), [x]),
        lambda x: bitwright.prepare(net(), x),
        lambda x: bitwright.quantize_dynamic(net(), example_inputs=x),
        lambda x: bitwright.quantize_weights(net(), [x], scheme="int8-g16"),
        lambda x: bitwright.quantize_weights(net(), [x], scheme="int8-g16", method="rtn"),
        lambda x: bitwright.sensitivity(net(), [x]),
        lambda x: bitwright.prune(net(), [x], method="wanda"),
    ],
    ids=["calibrate", "prepare", "dynamic", "gptq", "rtn", "sensitivity", "prune"],
)
def test_nan_in_the_batches(way: Callable[[Tensor], object]) -> None:
    x = X.clone()
    x[3, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"^\w+: .* are not finite"):
        way(x)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare, self.usual = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.rare(x) if float(x.sum()) > 1e9 else self.usual(x)


def test_a_layer_that_the_example_does_not_reach() -> None:
    with pytest.raises(CalibrationError, match=r'^rare.input: no activations were seen[^"]*keep={"rare": "float"}'):
        converted(Chooses().eval(), X)
    with pytest.raises(CalibrationError, match=r"^rare: method gptq needs to see inputs"):
        bitwright.quantize_weights(Chooses().eval(), [X], scheme="int8-g16")


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(16, 4), nn.Buffer(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) + self.calls


def test_a_state_that_is_changed_in_place() -> None:
    with pytest.raises(
        RecipeError, match=r"^Counts: its graph computes something else: what it does depends on .* state"
    ):
        bitwright.prepare(Counts().eval(), X)


def test_a_device_without_products_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [bitwright.quantize_dynamic(net()), converted(net(), X)]
    monkeypatch.setattr(layers, "DEVICES", ("cuda",))
    for integer in made:
        with pytest.raises(SchemeError, match=r"^0: there are no products of int8 on device 'cpu'\s+remedy: .to"):
            integer(X)


@pytest.mark.parametrize("shape", [(5, 13, 11), (17, 8, 16), (40, 3, 1)])
def test_products_padded_for_a_gpu(shape: tuple[int, int, int]) -> None:
    T, N, K = shape
    x, w = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((T, K), (N, K)))
    assert torch.equal(product_on_gpu(x, w), product(x, w))
