"""ONNX files of dynamic layers, recurrent ones, attention, 3-D convolutions, and of modules that torch.fx cannot trace."""

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import bitwright
from bitwright.errors import FormatError
from bitwright.nn.batches import outputs
from bitwright.nn.exported import exported
from bitwright.nn.onnx_layers import LAYERS
from bitwright.nn.rearranged import LEAVES
from small_modules import converted, relative

X = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(5))
OTHER = torch.randn(7, 4, 8, generator=torch.Generator().manual_seed(6))  # more steps, more sequences


def by_onnxruntime(integer: nn.Module, example: Any, file: Path, given: Any, **options: Any) -> list[Tensor]:
    """Exported with an example, run on another batch; without fused kernels, whose products of int8 may saturate."""
    bitwright.export_onnx(integer, example, file, **options)
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), plain, providers=["CPUExecutionProvider"])
    feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feeds)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@torch.no_grad()
def test_recurrent_layers(kind: type[nn.LSTM], tmp_path: Path) -> None:
    """Exactly the float layer with our decoded weights; near our integers, which round inputs and states too."""
    torch.manual_seed(0)
    for options in ({"batch_first": True}, {"num_layers": 2, "bidirectional": True}):
        net = kind(8, 6, **options).eval()
        integer = bitwright.quantize_dynamic(net)
        for part, layers in (("ih", integer.ofinput), ("hh", integer.ofstate)):
            names = [name for name in dict(net.named_parameters()) if name.startswith(f"weight_{part}")]
            for name, layer in zip(names, layers, strict=True):
                net.get_parameter(name).copy_(layer.weight)
        found = by_onnxruntime(integer, X, tmp_path / "m.onnx", (OTHER,), dynamic_axes={"input": (0, 1)})
        for exact, ours, theirs in zip(outputs(net, OTHER), outputs(integer, OTHER), found, strict=True):
            assert relative(exact, theirs) < 1e-4
            assert relative(ours, theirs) < 0.03
        weights = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if len(t.dims) == 2 and min(t.dims) >= 6]
        assert weights and all(t.data_type == onnx.TensorProto.INT8 for t in weights)


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lstm, self.out = nn.Linear(8, 8), nn.LSTM(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        y, state = self.lstm(self.fc(x), (h, c))
        return self.out(y), state


@torch.no_grad()
def test_states_in_and_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torch.randn(1, 3, 6), torch.randn(1, 3, 6)
    integer = converted(Remembers().eval(), (X, *state))
    found = by_onnxruntime(integer, (X, *state), tmp_path / "m.onnx", (X, *state))
    assert [tuple(y.shape) for y in found] == [(5, 3, 2), (1, 3, 6), (1, 3, 6)]
    assert all(relative(a, b) < 0.03 for a, b in zip(outputs(integer, (X, *state)), found, strict=True))


class Attends(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=batch_first), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> Any:
        y, weights = self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding)
        return self.out(y), weights


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_attention(batch_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = X.transpose(0, 1) if batch_first else X
    mask, padding = torch.ones(5, 5).triu(1) * -1e4, torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    given = (x, mask, padding)
    integer = converted(Attends(batch_first=batch_first).eval(), given)
    found = by_onnxruntime(integer, given, tmp_path / "m.onnx", given, opset=17)
    assert all(relative(a, b) < 1e-3 for a, b in zip(outputs(integer, given), found, strict=True))


@torch.no_grad()
def test_dynamic_products_and_three_dimensions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(4, 6, 3, stride=(2, 1, 1), padding=1, groups=2), nn.ReLU(), nn.Conv3d(6, 3, (1, 3, 3)),
                        nn.Flatten(2), nn.Linear(48, 4)).eval()  # fmt: skip
    x, other = torch.randn(2, 4, 5, 6, 6), torch.randn(3, 4, 5, 6, 6)
    asym = bitwright.quantize_dynamic(net, activations="int8-token-asym")
    for integer in (converted(net, x), bitwright.quantize_dynamic(net), asym):
        assert relative(integer(other), by_onnxruntime(integer, x, tmp_path / "m.onnx", (other,))[0]) < 3e-3


class Rearranges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.shuffle = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Any:
        left, right = self.first(x).chunk(2, 1)
        y = torch.roll(torch.cat([right, left.flip(3)], 1), (1, -2), (2, 3))
        y = functional.adaptive_avg_pool2d(self.shuffle(y), (5, 7))
        return (
            self.last(y),
            torch.where(left > 0, right, x).masked_fill(x < 0, -1.0),
            torch.einsum("bchw,bdhw->bcd", left, x),
        )


@torch.no_grad()
def test_rearranged_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 6, 6)
    integer = converted(Rearranges().eval(), x)
    found = by_onnxruntime(integer, x, tmp_path / "m.onnx", (other,))
    assert all(relative(a, b) < 3e-3 for a, b in zip(outputs(integer, other), found, strict=True))


class Branches(nn.Module):
    """torch.fx cannot trace it, as it asks tensors for their sizes in conditions; torch.export can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.out = nn.Linear(8, 8), nn.LSTMCell(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Any:
        if x.shape[-1] != 8 or x.ndim != 3:
            raise ValueError("rows of 8")
        gone = torch.arange(x.shape[0])[:, None] >= lengths[None]
        left, right = self.first(x).masked_fill(gone[..., None], 0.0).chunk(2, -1)
        return {"logits": self.out(torch.cat([right, left], -1)), "state": self.cell(x[-1])}


@torch.no_grad()
def test_what_torch_fx_cannot_trace(tmp_path: Path) -> None:
    """Another batch than the example's; quantized layers keep their integers."""
    torch.manual_seed(0)
    net, given, other = Branches().eval(), (X, torch.tensor([5, 2, 1])), (OTHER[:5], torch.tensor([1, 5, 3, 2]))
    axes = {"x": (1,), "lengths": (0,)}
    integer = converted(net, given)
    found = by_onnxruntime(integer, given, tmp_path / "m.onnx", other, dynamic_axes=axes)
    assert all(relative(a, b) < 1e-3 for a, b in zip(outputs(integer, other), found, strict=True))
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in stored) == 4


class Volumes(nn.Module):
    """3-D convolutions, one of them with a group for each channel, behind a condition on sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Conv3d(2, 8, 3, padding=1), nn.Conv3d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 4:
            raise ValueError("four planes at least")
        return self.each(self.first(x).relu())


@torch.no_grad()
def test_what_is_inside_of_a_layer_is_not_traced(tmp_path: Path) -> None:
    """A grouped convolution has a product for each group, and a network of them took torch.export many minutes."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 6, 6)
    integer = converted(Volumes().eval(), x)
    graph, _ = exported(integer, {"x": x}, {"x": [0]}, {*LAYERS, *LEAVES})
    assert len(graph.graph.nodes) < 40
    assert not any("_int_mm" in str(node.target) for node in graph.graph.nodes)
    other = torch.randn(3, 2, 5, 6, 6)
    found = by_onnxruntime(integer, x, tmp_path / "m.onnx", (other,))
    assert relative(integer(other), found[0]) < 3e-3


def windowed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As in Swin's attention: a function that torch.fx does not look into, which writes a mask piece by piece."""
    mask = x.new_zeros((6, 6))
    for count, (first, last) in enumerate([(0, 2), (2, 5), (5, 6)]):
        mask[first:last] = count
    y = functional.linear(x, weight, bias)
    return (y @ y.transpose(1, 2) + (mask - mask.T).masked_fill(mask != mask.T, -100.0)).softmax(-1)


fx.wrap("windowed")


class Windows(nn.Module):
    """Weights that are read where no layer is called, and a batch norm behind what is not its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.out = nn.Linear(8, 64), nn.BatchNorm1d(6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(windowed(x, self.qkv.weight, self.qkv.bias) @ x))


@torch.no_grad()
def test_what_depends_on_no_input_is_computed_beforehand(tmp_path: Path) -> None:
    """But codes of weights stay codes."""
    torch.manual_seed(0)
    x, other = torch.randn(2, 6, 8), torch.randn(3, 6, 8)
    integer = converted(Windows().eval(), x)
    found = by_onnxruntime(integer, x, tmp_path / "m.onnx", (other,))
    assert relative(integer(other), found[0]) < 3e-3
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert not {node.op_type for node in graph.node} & {"ScatterND", "ScatterElements"}
    assert any(t.data_type == onnx.TensorProto.INT8 and 64 in t.dims for t in graph.initializer)
    assert not any(t.data_type == onnx.TensorProto.FLOAT and list(t.dims) == [64, 8] for t in graph.initializer)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + torch.rand(6, 8))


def test_random_numbers_are_not_computed_beforehand() -> None:
    x = torch.randn(2, 6, 8)
    graph, _ = exported(bitwright.quantize_dynamic(Noisy().eval()), {"x": x}, {"x": [0]}, {*LAYERS, *LEAVES})
    assert any(node.target is torch.ops.aten.rand.default for node in graph.graph.nodes)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) < 1e9 else x


def test_what_depends_on_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"^Reads: torch.export cannot trace it: .*"):
        bitwright.export_onnx(bitwright.quantize_dynamic(Reads().eval()), X, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


class Styled(nn.Module):
    """An instance norm by running statistics, behind a layer whose results have channels last."""

    def __init__(self, *, traceable: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Conv2d(4, 8, 3),
            nn.InstanceNorm2d(8, track_running_stats=True),
            nn.Conv2d(8, 3, 1),
        )
        self.norm.running_mean, self.norm.running_var = torch.randn(8), torch.rand(8) + 0.5
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        return self.last(y if self.traceable or float(y.shape[2]) > 1 else -y)


@pytest.mark.parametrize("traceable", [True, False])
@torch.no_grad()
def test_instance_norms_by_running_statistics(traceable: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, other = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 6, 6)
    integer = converted(Styled(traceable=traceable).eval(), x)
    assert relative(integer(other), by_onnxruntime(integer, x, tmp_path / "m.onnx", (other,))[0]) < 3e-3
