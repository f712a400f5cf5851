"""Integer layers in native code: the same bits as in torch, under every instruction set, and no crash for what does not fit."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitwright
from bitwright.kernels import native
from bitwright.nn import native as layers
from bitwright.nn.dynamic import quantized
from bitwright.nn.integer import IntegerWeight, Window
from bitwright.nn.layers import DynamicProduct, IntegerProduct, Source, StaticProduct
from bitwright.nn.native import handles, packed
from bitwright.nn.static import Quantize, StaticAdd, StaticMax, Table
from bitwright.numerics.scheme import Scheme

pytestmark = pytest.mark.skipif(native is None, reason="the extension was not built")
TOKEN_ASYM = Scheme.parse("int8-token-asym")
SOURCES = [
    nn.Linear(1, 1), nn.Linear(65, 33), nn.Linear(300, 150, bias=False), nn.Conv2d(8, 16, 3, padding=1, stride=2),
    nn.Conv2d(3, 70, 3, padding=1), nn.Conv2d(40, 40, 5, padding=2, groups=40), nn.Conv2d(24, 24, (3, 1), groups=24),
    nn.Conv2d(8, 16, 3, groups=2, dilation=2), nn.Conv2d(8, 16, (2, 3), padding="same"), nn.Conv2d(20, 4, 1),
    nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(17, 130, 3, padding=1, dilation=(1, 2)), nn.Conv1d(8, 16, 5, padding=2, stride=3),
    nn.Conv1d(8, 8, 4, padding="same", groups=8), nn.Conv1d(6, 200, 2),
]  # fmt: skip


def inputs(source: Source, count: int, *, seed: int = 0) -> Tensor:
    """Float inputs of a layer: `count` rows or images, none like the others in size."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(source, nn.Linear):
        x = torch.randn(count, source.in_features, generator=generator)
    else:
        x = torch.randn(
            count, source.in_channels, *((11,) if isinstance(source, nn.Conv1d) else (9, 11)), generator=generator
        )
    return x * torch.rand(count, *[1] * (x.ndim - 1), generator=generator) + 0.3


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def static(source: Source, scheme: str, exit: Tensor) -> StaticProduct:
    q = quantized(source.weight, Scheme.parse(scheme), "")
    return StaticProduct(source, q, entry=torch.tensor([0.02, 5.0]), exit=exit, activations=TOKEN_ASYM, where="layer")


def in_torch(compute: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(layers, "native", None)
        return compute()


def same(module: nn.Module, monkeypatch: pytest.MonkeyPatch, *given: Tensor) -> None:
    """The same bits, shape and type in native code and in torch."""
    assert all(handles(x, x.dtype) for x in given)
    found, expected = module(*given), in_torch(lambda: module(*given), monkeypatch)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


def orders(x: Tensor) -> list[Tensor]:
    """x as it is, with the channels last, and as every other row of something larger."""
    wide = torch.stack([x, x], 1)[:, 0]
    return [x, wide, x.movedim(1, -1).contiguous().movedim(-1, 1)]


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize(
    "exit", [[], [0.05, -7.0, -128.0, 127.0], [0.05, 3.0, 3.0, 90.0]], ids=["float", "codes", "relu"]
)
@torch.no_grad()
def test_static_layers(isa: str, source: Source, exit: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = static(source, "int8-channel", torch.tensor(exit))
    for count in (1, 2, 7, 100):
        x = codes(*inputs(source, count).shape)
        for each in orders(x):
            same(layer, monkeypatch, each)
    same(layer, monkeypatch, x[0])
    same(layer, monkeypatch, x[:0])


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("activations", ["int8-token", "int8-token-asym", "int3-token-asym"])
@torch.no_grad()
def test_dynamic_layers(isa: str, source: Source, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized(source.weight, Scheme.parse("int8-channel"), "")
    layer = DynamicProduct.of(source, q, activations=Scheme.parse(activations), where="")
    for count in (1, 2, 7, 100):
        x = inputs(source, count)
        x[-1] *= 0 if count == 7 else 1e30 if count == 100 else 1
        for each in orders(x):
            same(layer, monkeypatch, each)
    same(layer, monkeypatch, x[0])
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    assert layer(x)[:2].isnan().all() and layer(x)[2:].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g16-asym", "ternary-channel", "int5-tensor"])
@torch.no_grad()
def test_groups_of_columns(isa: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = nn.Linear(100, 37)  # a short last group
    q = quantized(source.weight, Scheme.parse(scheme), "")
    same(static(source, scheme, torch.zeros(0)), monkeypatch, codes(9, 100))
    same(static(source, scheme, torch.tensor([0.1, 0.0, -128.0, 127.0])), monkeypatch, codes(3, 5, 100))
    same(DynamicProduct.of(source, q, activations=TOKEN_ASYM, where=""), monkeypatch, torch.randn(9, 100))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_convolutions_of_any_shape(data: st.DataObject) -> None:
    """Integer sums against float64, which holds them exactly."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    groups = data.draw(st.integers(1, 4))
    n, c, kernel, dilation = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20)), pair(1, 4), pair(1, 2)
    conv = nn.Conv2d(c * groups, n * groups, kernel, pair(1, 3), pair(0, 2), dilation, groups, bias=False).double()
    sizes = [d * (k - 1) + data.draw(st.integers(1, 6)) for d, k in zip(dilation, kernel, strict=True)]
    w, x = codes(*conv.weight.shape), codes(data.draw(st.integers(1, 5)), c * groups, *sizes)
    conv.weight.data = w.double()
    weight = IntegerWeight(w.movedim(1, -1).flatten(1), torch.ones(n * groups, 1))
    layer = StaticProduct.__new__(StaticProduct)
    IntegerProduct.__init__(layer, conv, weight, label="", where="")
    for name, value in (("multiplier", weight.scale), ("constant", torch.zeros(n * groups)), ("exit", torch.zeros(0))):
        layer.register_buffer(name, value)
    layer.register_buffer("entry", torch.tensor([1.0, 0.0]))
    assert torch.equal(layer(x).double(), conv(x.double()))


def test_the_largest_sums_do_not_saturate(isa: str) -> None:
    """Instructions that add pairs in 16 bits would."""
    K = 300
    for value in (-128, 127):
        w, x = torch.full((5, K), -128, dtype=torch.int8), torch.full((20, K), value, dtype=torch.int8)
        layer = packed(w, torch.ones(5, 1), torch.zeros(5), torch.zeros(0), window=None, channels=K)
        y = torch.empty(20, 5)
        layer.codes_to_numbers(x, y, 0, 1)
        assert torch.equal(y, torch.full((20, 5), float(value * -128 * K)))


def test_what_stands_between_layers(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    affine, other = torch.tensor([0.03, 4.0, -128.0, 127.0]), torch.tensor([0.05, -9.0, -100.0, 60.0])
    for shape in ((7,), (3, 5, 6, 7), (2, 3, 50)):
        x, a, b = torch.randn(shape) * 3, codes(*shape), codes(*shape)
        same(Quantize(affine, where=""), monkeypatch, x)
        same(StaticAdd(affine, other, affine), monkeypatch, a, b)
        same(Table(torch.sigmoid, affine, other, label=""), monkeypatch, a)
        if a.ndim > 1:
            same(Quantize(other, where=""), monkeypatch, x.transpose(0, 1))
            same(StaticAdd(affine, other, affine), monkeypatch, a.transpose(0, 1), b.transpose(0, 1))
            same(StaticAdd(affine, other, affine), monkeypatch, a, b.transpose(0, 1).contiguous().transpose(0, 1))
    for pool in (nn.MaxPool2d(2), nn.MaxPool2d((3, 2), 2, 1, (2, 1)), nn.MaxPool2d(3, 1, 1)):
        for channels in (1, 16, 70):
            for each in orders(codes(3, channels, 9, 13)):
                same(StaticMax(pool), monkeypatch, each)
    same(StaticMax(nn.MaxPool1d(3, 2, 1)), monkeypatch, codes(3, 20, 13))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}], ids=str
)
@torch.no_grad()
def test_recurrent_layers(
    isa: str, kind: type[nn.LSTM | nn.GRU], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates differ in the last places, which may move a code of the next state."""
    for B, T, H in ((1, 9, 5), (3, 250, 16), (200, 3, 33)):
        source = kind(7, H, **options).eval()
        layer, x = bitwright.quantize_dynamic(source, activations="int8-token-asym"), torch.randn(T, B, 7)
        count = len(layer.ofinput)
        length = T if options.get("batch_first") else B
        first = [torch.randn(count, length, H) for _ in range(2)]
        state = tuple(first) if kind is nn.LSTM else first[0]
        before = [each.clone() for each in first]
        y, last = layer(x, state)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "native", None)
            expected, ends = layer(x, state)
        assert all(torch.equal(a, b) for a, b in zip(before, first, strict=True))
        pairs = [(y, expected), *zip(*((s if isinstance(s, tuple) else (s,)) for s in (last, ends)), strict=True)]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=0.02)
            assert (a - b).abs().mean() < 1e-4
    with pytest.raises(bitwright.errors.SchemeError, match="axis -1 should be 7"):
        layer(torch.randn(T, B, 8))
    with pytest.raises(ValueError, match="must be"):
        layer(x, tuple(s[:, :1] for s in first) if kind is nn.LSTM else first[0][:, :1])


@torch.no_grad()
def test_threads_make_no_difference() -> None:
    layer, x = static(nn.Conv2d(32, 64, 3), "int8-channel", torch.zeros(0)), codes(40, 32, 14, 14)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@torch.no_grad()
def test_what_was_packed_follows_the_buffers() -> None:
    """Loading a state, changing a buffer in place, copies and files."""
    x = torch.randn(5, 8)
    first, second = (bitwright.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)).eval()) for _ in range(2))
    expected, before = first(x), second(x)
    again = copy.deepcopy(second)
    file = io.BytesIO()
    torch.save(second, file)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(x), expected) and not torch.equal(expected, before)
    assert torch.equal(again(x), before)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), before)
    second[0].bias.add_(1)
    assert torch.allclose(second(x), expected + 1)
    assert torch.equal(first.double().float()(x), expected)


def test_arrays_that_do_not_fit_are_refused() -> None:
    assert native is not None
    w, numbers = torch.zeros(1 * 16 * 8, dtype=torch.int8), torch.zeros(16)
    options: dict[str, Any] = {
        "w": w, "start": numbers.int(), "scale": numbers, "constant": numbers, "sums": numbers, "N": 3, "groups": 1, "C": 8,
        "groups_of_k": 1, "taps": (1, 1), "tap_step": 0, "steps": 2, "kernel": (1, 1), "stride": (1, 1), "dilation": (1, 1),
        "padding": (0, 0, 0, 0),
    }  # fmt: skip
    wrong: list[dict[str, Any]] = [
        {"w": w[:-1]}, {"start": numbers.int()[:3]}, {"scale": numbers[:3]}, {"constant": numbers[:3]}, {"sums": numbers[:3]},
        {"N": 0}, {"groups": 2}, {"steps": 0}, {"groups_of_k": 2}, {"stride": (0, 1)}, {"padding": (-1, 0, 0, 0)},
        {"taps": (1, 100), "w": torch.zeros(100 * 128, dtype=torch.int8), "tap_step": 8},
        {"taps": (9, 1), "w": torch.zeros(9 * 128, dtype=torch.int8)},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(ValueError, match=r"must|\["):
            native.IntegerLayer(**(options | change))
    layer, x, y = native.IntegerLayer(**options), codes(4, 8), torch.empty(4, 3)
    layer.codes_to_numbers(x, y, 0, 1)
    for bad_x, bad_y in ((x[:, :7], y), (x, y[:3]), (x, torch.empty(3, 4).T), (x, torch.empty(4, 2)), (x[0], y[0])):
        with pytest.raises(ValueError, match="must"):
            layer.codes_to_numbers(bad_x, bad_y, 0, 1)
    with pytest.raises(ValueError, match="codes are"):
        layer.codes_to_codes(x, torch.empty(4, 3, dtype=torch.int8), 0, -129, 127, 1)
    with pytest.raises(ValueError, match="contiguous"):
        layer.numbers_to_numbers(torch.randn(4, 16)[:, ::2], y, -127, 127, 1 / 127, False, 1)
    with pytest.raises(TypeError):
        layer.codes_to_numbers(x.float(), y, 0, 1)
    with pytest.raises(ValueError, match="gaps"):
        native.add_codes(codes(4, 8)[:, ::2], codes(4, 8)[:, ::2], codes(4, 8)[:, ::2], [1, 1, 0], -128, 127, 1)
    with pytest.raises(ValueError, match="alike"):
        native.enter_codes(torch.randn(3, 4), codes(4, 3).T, 1.0, 0.0, -128, 127, 1)
    with pytest.raises(ValueError, match="256"):
        native.look_up_codes(x, codes(255), codes(4, 8), 1)
    for channels_last in (codes(1, 3, 4, 4), codes(1, 4, 4, 3).permute(0, 3, 1, 2)[:, :, :, :1]):
        with pytest.raises(ValueError, match="must"):
            native.largest_codes(channels_last, codes(1, 3, 2, 2), (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), 1)


@torch.no_grad()
def test_images_smaller_than_the_window() -> None:
    layer = static(nn.Conv2d(4, 4, 3), "int8-channel", torch.zeros(0))
    with pytest.raises(bitwright.errors.SchemeError, match=r"^layer: an input of shape \(1, 4, 2, 9\)"):
        layer(codes(1, 4, 2, 9))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_who_traces_sees_tensor_operations() -> None:
    """Native calls would be left out of a graph, and their results taken for constants."""
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(5, 8)
    integer = bitwright.convert(bitwright.calibrate(bitwright.prepare(net, x), [x]))
    packed_weights = bitwright.quantize_weights(net, scheme="int4-g16", method="rtn")
    for each in (integer, bitwright.quantize_dynamic(net), packed_weights):
        torch.testing.assert_close(torch.export.export(each, (x,)).module()(-x), each(-x), rtol=1e-3, atol=1e-3)
        if each is not packed_weights:  # torch.jit has no form of its unpacking
            assert torch.equal(torch.jit.trace(each, (x,))(-x), each(-x))
        assert not torch.allclose(each(-x), each(x))


def test_windows_count_alike() -> None:
    window = Window((3, 2), (2, 1), (1, 0, 2, 1), (2, 3))
    x = torch.zeros(1, 1, 12, 9)
    padded = window.padded(x, 0)
    patches = window.patches(padded)
    conv = nn.Conv2d(1, 1, (3, 2), (2, 1), dilation=(2, 3))
    assert tuple(patches.shape[1:3]) == tuple(conv(padded).shape[2:])
