"""prepare, calibrate, convert: codes from layer to layer, the same numbers as fake quantization, and every refusal."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.errors import CalibrationError, NumericsError, RecipeError, SchemeError
from bitwright.nn.dynamic import quantized
from bitwright.nn.fake import Edge, FakeWeight
from bitwright.nn.layers import DynamicProduct, StaticProduct
from bitwright.nn.prepare import Prepared
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.numerics.scheme import Scheme
from small_modules import Products, converted, images, random_int8, relative, residual


def rounding(prepared: Prepared) -> Prepared:
    """What fake quantization makes of a calibrated module: weights and edges rounded in float."""
    for edge in prepared.edges():
        edge.phase = "round"
    for layer in list(prepared.body.modules()):
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            fake = FakeWeight(layer.weight, prepared.weights.default, learned=False)
            nn.utils.parametrize.register_parametrization(layer, "weight", fake, unsafe=True)
    return prepared


@pytest.mark.parametrize("activations", ["int8-tensor", "int8-tensor-asym", "int4-tensor-asym"])
@pytest.mark.parametrize("weights", ["int8-channel", "int4-channel", "ternary-channel"])
@torch.no_grad()
def test_integers_compute_what_fake_quantization_does(weights: str, activations: str) -> None:
    """Within one step of the output: only what lies between two codes may fall to the other side."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 4))
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    prepared = bitwright.prepare(net.eval(), x, weights=weights, activations=activations, observer="minmax")
    bitwright.calibrate(prepared, [x])
    integer = bitwright.convert(prepared)
    difference = (rounding(prepared)(x) - integer(x)).abs()
    low, high = integer(x).aminmax()
    step = (high - low) / (1 << int(activations[3])) + 1e-6
    assert difference.max() <= step
    assert (difference > 1e-4 * (high - low)).float().mean() < 0.02  # and hardly anything does


@torch.no_grad()
def test_codes_flow_from_layer_to_layer(products: set[torch.dtype]) -> None:
    net, x = residual(), images()
    integer = converted(net, x, activations="int8-tensor-asym")
    assert relative(net(x), integer(x)) < 0.03
    types: dict[str, torch.dtype] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, y: Tensor) -> None:
            types[name] = y.dtype

        return hook

    for name, module in integer.named_modules():
        module.register_forward_hook(listen(name))
    with Products() as seen:
        integer(x)
    assert set(seen.types) == products and len(seen.types) in (0, 6 - 1)  # the depthwise one is no matrix product
    assert {types[name] for name in ("conv1", "conv2", "conv3", "pool")} == {torch.int8}
    kinds = [type(module) for module in integer.modules()]
    assert [kinds.count(kind) for kind in (StaticProduct, StaticAdd, StaticMax, StaticMean, Table)] == [6, 1, 1, 1, 1]
    assert kinds.count(Quantize) == 2 and kinds.count(Dequantize) == 0 and kinds.count(nn.BatchNorm2d) == 0
    floats = [layer.name for layer in bitwright.layers(integer) if layer.kind == "float"]
    assert set(floats) == {"norm", "sigmoid"}
    assert "StaticProduct(3 → 16, int8-channel × int8-tensor-asym)" in str(bitwright.layers(integer))


def test_every_large_tensor_of_the_state_is_int8() -> None:
    net = residual()
    integer = converted(net, images())
    for name, tensor in integer.state_dict().items():
        assert tensor.dtype == torch.int8 or tensor.numel() <= 32, name
    other = converted(net, 2 * images())
    x = images()
    with torch.no_grad():
        assert not torch.equal(other(x), integer(x))
        other.load_state_dict(integer.state_dict())
        assert torch.equal(other(x), integer(x))


@torch.no_grad()
def test_a_relu6_stops_at_six() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU6(), nn.Linear(1, 1, bias=False)).eval()
    net[0].weight[:], net[2].weight[:] = 1, 1
    integer = converted(net, torch.linspace(-10, 10, 101)[:, None], observer="minmax")
    found = integer(torch.tensor([[-3.0], [2.0], [9.0]]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 6.0]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("pool", "shape"),
    [(nn.MaxPool2d(2), (2, 3, 28, 28)), (nn.MaxPool2d((3, 2), stride=2, padding=1, dilation=(2, 1)), (2, 3, 13, 9)),
     (nn.MaxPool1d(3, padding=1), (2, 3, 200)), (nn.MaxPool2d(2), (3, 8, 8)), (nn.MaxPool1d(2), (3, 8))],
)  # fmt: skip
@pytest.mark.parametrize("last", [False, True])
def test_a_max_pool_of_codes(pool: nn.Module, shape: tuple[int, ...], last: bool) -> None:
    x = random_int8(*shape)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x
    assert torch.equal(StaticMax(pool)(x).float(), pool(x.float()))


class Untraceable(nn.Module):
    """Branches on a value, so that it is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.block = (
            nn.Embedding(9, 8),
            nn.Linear(8, 8),
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        )
        self.lstm, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, index: Tensor, scale: float = 1.0) -> Tensor:
        x = self.first(self.embed(index)) * scale
        if float(x.sum()) > 1e9:
            x = -x
        return self.last(self.lstm(self.block(x))[0])


@torch.no_grad()
def test_what_cannot_be_traced_is_taken_apart(products: set[torch.dtype]) -> None:
    torch.manual_seed(0)
    net, index = Untraceable().eval(), torch.arange(9).view(3, 3)
    for example in ((index,), {"index": index, "scale": 2.0}, (index, 2.0)):
        prepared = bitwright.calibrate(bitwright.prepare(net, example), [example])
        integer = bitwright.convert(prepared)
        expected = net(**example) if isinstance(example, dict) else net(*example)
        found = integer(**example) if isinstance(example, dict) else integer(*example)
        assert relative(expected, found) < 0.05
        with Products() as seen:
            integer(index)
        assert set(seen.types) == products
    assert not any(tensor.is_floating_point() and tensor.numel() > 40 for tensor in integer.state_dict().values())


@torch.no_grad()
def test_prepare_by_token_needs_no_calibration() -> None:
    net, x = residual(), images()
    integer = bitwright.convert(bitwright.prepare(net, x, activations="int8-token"))
    assert relative(net(x), integer(x)) < 0.03
    assert sum(isinstance(module, DynamicProduct) for module in integer.modules()) == 6


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse", "kl"])
@torch.no_grad()
def test_every_observer(observer: str) -> None:
    net, x = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), torch.randn(400, 20)
    prepared = bitwright.prepare(net, x, observer=observer)
    bitwright.calibrate(bitwright.calibrate(prepared, [x[:200]]), x[200:].split(100))
    assert [edge.histogram.batches for edge in prepared.edges()] == [3, 3]
    assert relative(net(x), bitwright.convert(prepared)(x)) < 0.05


@torch.no_grad()
def test_layers_that_are_kept() -> None:
    net, x = residual(), images()
    integer = converted(net, x, keep={"conv*": "float", "fc2": "bf16"})
    state = integer.state_dict()
    assert state["conv1.weight"].dtype == torch.float32 and state["fc2.inner.weight"].dtype == torch.bfloat16
    assert state["fc1.codes"].dtype == torch.int8
    assert relative(net(x), integer(x)) < 0.03


@torch.no_grad()
def test_preparing_changes_nothing() -> None:
    net, x = residual(), images()
    before, state = net(x), {name: t.clone() for name, t in net.state_dict().items()}
    prepared = bitwright.calibrate(bitwright.prepare(net, x), [x])
    torch.testing.assert_close(prepared(x), before, rtol=1e-4, atol=1e-4)
    first, second = bitwright.convert(prepared), bitwright.convert(prepared)
    assert torch.equal(first(x), second(x))
    assert torch.equal(net(x), before) and all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert any(isinstance(module, Edge) for module in prepared.modules())
    copied = prepared.body.get_parameter("fc1.weight")
    shared = bitwright.prepare(net, x, inplace=True).body.get_parameter("fc1.weight")
    assert shared is net.fc1.weight is not copied


@torch.no_grad()
def test_sensitivity_finds_the_layer_that_bits_hurt() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)).eval()
    net[1].weight[:, 0] *= 300  # a channel so large that it leaves few codes to the others
    net[0].weight[0], net[0].bias[0] = 0, 0
    x = torch.randn(50, 32)
    layer, before = net[1], net(x)
    costs = bitwright.sensitivity(net, [x], weights="int4-channel")
    assert next(iter(costs)) == "1" and costs["1"] > 10 * costs["0"] > 0
    assert net[1] is layer and torch.equal(net(x), before)
    alone = bitwright.quantize_dynamic(net, "int4-channel", keep={"0": "float", "2": "float"})(x)
    assert costs["1"] == pytest.approx(float((alone - before).square().sum() / before.square().sum()), rel=1e-4)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.weight if float(x.sum()) < 1e9 else x)


class Multiplying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = nn.Module(), nn.Linear(4, 4)
        self.inner.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.inner.weight)


class Counting(nn.Module):
    """Computes something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


def test_what_prepare_refuses() -> None:
    x, net = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    with pytest.raises(RecipeError, match="in train mode, where eval is needed"):
        bitwright.prepare(copy.deepcopy(net).train(), x)
    with pytest.raises(RecipeError, match=r"^Sequential: nothing to quantize"):
        bitwright.prepare(nn.Sequential(nn.ReLU()).eval(), x)
    with pytest.raises(RecipeError, match="already prepared"):
        bitwright.prepare(bitwright.prepare(net, x), x)
    with pytest.raises(RecipeError, match="unknown observer 'median'"):
        bitwright.prepare(net, x, observer="median")
    with pytest.raises(SchemeError, match="cannot be multiplied"):
        bitwright.prepare(net, x, activations="fp8-tensor")
    with pytest.raises(RecipeError, match=r"^Functional: cannot be traced \(TypeError.*holds the weight 'weight'"):
        bitwright.prepare(Functional().eval(), x)
    with pytest.raises(RecipeError, match=r"^inner.weight: a product with a weight that no layer of torch.nn holds"):
        bitwright.prepare(Multiplying().eval(), x)
    bitwright.prepare(Multiplying().eval(), x, keep={"inner.weight": "float"})
    with pytest.raises(RecipeError, match=r"^Counting: its graph computes something else"):
        bitwright.prepare(Counting().eval(), x)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"^Sequential: the outputs are not finite"):
        bitwright.prepare(net, x)


def test_what_calibrate_refuses() -> None:
    x, net = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    prepared = bitwright.prepare(net, x)
    with pytest.raises(CalibrationError, match="no batches"):
        bitwright.calibrate(prepared, [])
    with pytest.raises(RecipeError, match=r"^Sequential: not prepared"):
        bitwright.calibrate(net, [x])  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match=r"^input: activations are not finite"):
        bitwright.calibrate(prepared, [x.masked_fill(x > 0, float("nan"))])
    with pytest.raises(CalibrationError, match=r"^0: .*shapes"):
        bitwright.calibrate(prepared, [x, x[:, :3]])
    assert {edge.phase for edge in prepared.edges()} == {"pass"}
    with pytest.raises(RecipeError, match="in train mode"):
        bitwright.calibrate(prepared.train(), [x])
    with pytest.raises(CalibrationError, match="no batches"):
        bitwright.sensitivity(net, [])
    with pytest.raises(RecipeError, match="nothing to quantize"):
        bitwright.sensitivity(nn.ReLU().eval(), [x])


def test_what_convert_refuses() -> None:
    x, net = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    prepared = bitwright.prepare(net, x)
    with pytest.raises(CalibrationError, match=r"^input: no activations were seen"):
        bitwright.convert(prepared)
    with pytest.raises(RecipeError, match="not prepared"):
        bitwright.convert(net)  # type: ignore[arg-type]
    bitwright.calibrate(prepared, [x])
    with pytest.raises(RecipeError, match="in train mode"):
        bitwright.convert(prepared.train())
    integer = bitwright.convert(prepared.eval())
    with pytest.raises(RecipeError, match="converted already"):
        bitwright.convert(integer)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match=r"^0: an input of shape \(5, 3\)"):
        integer(x[:, :3])
    with torch.no_grad():
        net[0].bias[:] = -1e3  # the ReLU behind never fires
        torch.testing.assert_close(converted(net, x)(x), net(x))  # all zeros have a scale: any


@torch.no_grad()
def test_values_that_never_change_have_a_scale_unless_they_are_zero() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    x = torch.full((5, 4), 3.0)
    for activations in ("int8-tensor", "int8-tensor-asym"):
        assert relative(net(x), converted(net, x, activations=activations)(x)) < 0.02


def test_weights_of_a_convolution_have_their_channels_last() -> None:
    conv = nn.Conv2d(3, 2, 2)
    q = quantized(conv.weight, Scheme.parse("int8-channel"), "")
    assert q.codes.shape == (2, 12) and q.codes[0, 0].sign() == conv.weight[0, 0, 0, 0].sign()
    torch.testing.assert_close(bitwright.numerics.codec.decode(q)[1, 1], conv.weight[1, 1, 0, 0], rtol=0, atol=0.01)
