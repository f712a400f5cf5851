"""ONNX files beside our own integers: the same outputs, through onnxruntime."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bitwright
from bitwright.errors import BitwrightError, FormatError, VerificationError
from bitwright.nn import onnx_check
from bitwright.nn.batches import outputs
from bitwright.nn.onnx_writer import Writer
from conftest import ISAS
from small_modules import converted, images, relative, residual


def by_onnxruntime(file: Path, x: Tensor, *, fused: bool = False) -> Tensor:
    """The file's operators one by one; or fused, as users run it: then a code midway between two may go the other way, and
    products of int8 saturate at 16 bits on processors with AVX2 and no VNNI."""
    options = onnxruntime.SessionOptions()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("activations", ["int8-tensor", "int8-tensor-asym", "int4-tensor-asym"])
@torch.no_grad()
def test_static_modules(activations: str, tmp_path: Path) -> None:
    x = images()
    integer = converted(residual(), x, activations=activations, observer="minmax")
    file = bitwright.export_onnx(integer, x[:2], tmp_path / "m.onnx")
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm", "MaxPool", "Gather"} <= kinds
    stored = {t.name: t for t in onnx.load(file).graph.initializer}
    assert sum(t.data_type == onnx.TensorProto.INT8 and numpy.prod(t.dims) > 8 for t in stored.values()) >= 6
    ours, theirs = integer(x), by_onnxruntime(file, x)  # another batch than the example's
    low, high = ours.aminmax()
    assert (ours - theirs).abs().max() <= (high - low) / (1 << int(activations[3]))
    assert relative(ours, theirs) < 0.01
    if any("vnni" in isa for isa in ISAS):
        assert relative(ours, by_onnxruntime(file, x, fused=True)) < 0.01 * (16 if "int4" in activations else 1)


@torch.no_grad()
def test_a_bias_of_more_steps_than_int32_holds(tmp_path: Path) -> None:
    """Quiet inputs, as behind many layers of random weights."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(20, 16) * 1e-9
    torch.nn.init.zeros_(net[0].bias)
    integer = converted(net, x)
    theirs = by_onnxruntime(bitwright.export_onnx(integer, x, tmp_path / "m.onnx"), x)
    assert relative(integer(x), theirs) < 1e-3


@torch.no_grad()
def test_trained_modules_and_one_dimension(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU6(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(32, 3))
    x = torch.randn(20, 4, 8)
    integer = bitwright.convert(bitwright.prepare_qat(net, x, weights="int4-channel").eval())
    theirs = by_onnxruntime(bitwright.export_onnx(integer, x, tmp_path / "m.onnx"), x)
    assert relative(integer(x), theirs) < 0.02


@pytest.mark.parametrize("scheme", [
    "int4-g32", "int4-g16-asym", "int8-g64", "int8-channel", "int8-tensor", "int4-channel-asym", "int2-g32", "int3-g32-asym",
    "int6-channel",
])  # fmt: skip
@torch.no_grad()
def test_packed_weights(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(96, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 5, bias=False)).eval()
    x = torch.randn(7, 96)
    packed = bitwright.quantize_weights(net, [x], scheme=scheme)
    file = bitwright.export_onnx(packed, x, tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(file).graph.node].count("MatMulNBits") == 2
    theirs = by_onnxruntime(file, x)
    assert relative(packed(x), theirs) < 1e-3
    assert relative(packed(x), theirs) < relative(net(x), theirs)


@torch.no_grad()
def test_embeddings(tmp_path: Path) -> None:
    index = torch.arange(9)[:, None]
    integer = converted(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3)).eval(), index)
    assert (
        relative(integer(index), by_onnxruntime(bitwright.export_onnx(integer, index, tmp_path / "m.onnx"), index))
        < 0.01
    )


class Computes(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.compute = nn.Linear(8, 8), nn.Linear(8, 8), compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


@pytest.mark.parametrize(
    "compute",
    [
        lambda net, x: net.a(x[:, 0]).view(8, x.size(0)),
        lambda net, x: torch.cat([net.a(x), net.b(x).tanh()], -1).permute(0, 2, 1).mean((1, 2)),
        lambda net, x: net.b(net.a(x).view(x.shape[0] * x.shape[1], -1)).reshape(x.size(0), x.size(1), -1),
        lambda net, x: net.b(functional.softmax(net.a(x) @ net.b(x).transpose(-2, -1), dim=-1) @ x),
        lambda net, x: net.a(x) / net.b(x).norm(dim=-1, keepdim=True),
        lambda net, x: functional.normalize(net.a(x), dim=2) * torch.linalg.vector_norm(net.b(x)),
        lambda net, x: (net.a(x), net.b(x)[:, 1:3]),
    ],
    ids=["view", "cat", "shapes", "attention", "norm", "normalize", "outputs"],
)
@torch.no_grad()
def test_operations_between_layers(compute: Callable[..., Any], tmp_path: Path) -> None:
    """Another batch than the example's, and another length."""
    torch.manual_seed(0)
    x, other = torch.randn(4, 6, 8), torch.randn(3, 9, 8)
    integer = converted(Computes(compute).eval(), x)
    file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", dynamic_axes={"x": (0, 1)})
    assert relative(outputs(integer, other)[0], by_onnxruntime(file, other)) < 1e-3


@torch.no_grad()
def test_onnxruntime_computes_every_product_in_integers(tmp_path: Path) -> None:
    """Convolutions, depthwise too, and Linears to codes and to float, as its optimizer leaves them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(),
                        nn.Linear(128, 8), nn.ReLU(), nn.Linear(8, 4)).eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    file = bitwright.export_onnx(converted(net, x), x, tmp_path / "m.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2 and kinds.count("QGemm") == 2 and "DequantizeLinear" not in kinds


@torch.no_grad()
def test_activations_of_onnxruntime_and_of_tensorrt(tmp_path: Path) -> None:
    """uint8 with the ReLU in the lowest code and an int32 bias; int8."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, 8, 8)
    for activations, expected in (("uint8", onnx.TensorProto.UINT8), ("int8", onnx.TensorProto.INT8)):
        scheme = "int8-tensor-asym" if activations == "uint8" else "int8-tensor"
        integer = converted(net, x, activations=scheme)
        file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", activations=activations, opset=19)
        graph = onnx.load(file).graph
        stored = {t.name: t for t in graph.initializer}
        zeros = [stored[node.input[2]].data_type for node in graph.node if node.op_type == "QuantizeLinear"]
        assert set(zeros) == {expected} and relative(integer(x), by_onnxruntime(file, x)) < 1e-3
        assert ("Relu" in {node.op_type for node in graph.node}) is (activations == "int8")


def test_what_has_no_onnx_form(tmp_path: Path) -> None:
    x, file = torch.randn(3, 64), tmp_path / "m.onnx"
    net = nn.Sequential(nn.Linear(64, 4)).eval()
    odd = nn.Sequential(nn.Linear(64, 4), nn.Fold((1, 4), (1, 1))).eval()
    with pytest.raises(FormatError, match=r"^1: Fold has no ONNX form here"):
        bitwright.export_onnx(bitwright.quantize_dynamic(odd), torch.randn(3, 2, 64), file)
    with pytest.raises(FormatError, match=r"^0: a weight in groups has no ONNX form"):
        bitwright.export_onnx(converted(net, x, weights="int4-g32"), x, file)
    with pytest.raises(FormatError, match="float32 or int64"):
        bitwright.export_onnx(converted(net, x), (x.double(),), file)
    assert not file.exists()


def test_without_the_package(tmp_path: Path) -> None:
    script = "import sys; sys.modules['onnx'] = None; import torch, bitwright\n"
    script += "bitwright.export_onnx(torch.nn.ReLU(), torch.ones(1), 'x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert "the package onnx is not installed" in done.stderr and "bitwright[onnx]" in done.stderr


class Enlarged(nn.Module):
    """As heads of segmentation: the logits enlarged to the size of the image, or of another tensor, or by a factor."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.conv, self.head, self.size = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1), size

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.conv(x).relu())
        if self.size == "image's":
            return functional.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        if self.size == "one side's":
            return functional.interpolate(y, size=x.shape[-1], mode="nearest")
        if self.size == "both sides'":
            return functional.interpolate(y, size=(x.shape[2], x.size(3)), mode="bicubic")
        return functional.interpolate(y, scale_factor=2.0)


@pytest.mark.parametrize("size", ["image's", "one side's", "both sides'", "a factor"])
@torch.no_grad()
def test_resizing(size: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    integer = converted(Enlarged(size).eval(), x)
    theirs = by_onnxruntime(bitwright.export_onnx(integer, x, tmp_path / "m.onnx"), x)
    assert theirs.shape == (2, 4, 16, 16)
    assert relative(integer(x), theirs) < 0.01


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(2, 1), 1])
@torch.no_grad()
def test_borders_of_convolutions(mode: str, padding: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, (5, 3), padding=padding, padding_mode=mode)
    same = nn.Conv2d(4, 4, (4, 3), padding="same", dilation=(2, 1), padding_mode=mode)
    net, x = nn.Sequential(first, same, nn.Conv2d(4, 2, 3, padding=1)).eval(), torch.randn(2, 3, 12, 12)
    mixed = converted(net, x, keep={"0": "float", "1": "float"})
    file = bitwright.export_onnx(mixed, x, tmp_path / "f.onnx", check=False)
    assert relative(mixed(x), by_onnxruntime(file, x)) < 1e-3
    integer = converted(net, x)
    file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False)
    assert relative(integer(x), by_onnxruntime(file, x)) < 0.01
    if mode == "circular":
        with pytest.raises(FormatError, match="circular"):
            bitwright.export_onnx(integer, x, tmp_path / "n.onnx", opset=17)


@torch.no_grad()
def test_the_bias_of_a_row_of_zeros_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(20, 16)
    net[0].weight[2:5] = 0
    net[2].weight[:] = 0
    integer = converted(net, x)
    theirs = by_onnxruntime(bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False), x)
    assert float(theirs.abs().max()) > 0.01 and relative(integer(x), theirs) < 1e-3


@torch.no_grad()
def test_softplus_and_divided_sums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softplus(beta=3.0), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    integer = bitwright.quantize_dynamic(net, keep={"3": "float"})
    file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False)
    assert relative(integer(x), by_onnxruntime(file, x)) < 1e-3
    net[2] = nn.AvgPool2d(2, divisor_override=3).eval()
    with pytest.raises(FormatError, match="divisor"):
        bitwright.export_onnx(bitwright.quantize_dynamic(net), x, tmp_path / "n.onnx")


@torch.no_grad()
def test_a_file_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(20, 16)
    integer = converted(net, x)
    encoded = Writer.encoded
    monkeypatch.setattr(Writer, "encoded", lambda self, x, affine, name: encoded(self, x, affine * 1.2, name))
    with pytest.raises(VerificationError, match="something else from the file: input_1_codes is"):
        bitwright.export_onnx(integer, x, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False)
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel"))
    )
    with pytest.raises(FormatError, match="onnxruntime cannot run it: no kernel"):
        bitwright.export_onnx(integer, x, tmp_path / "n.onnx")


class OfSeveral(nn.Module):
    """A module whose one argument holds several tensors."""

    def __init__(self, *keys: Any) -> None:
        super().__init__()
        self.layer, self.keys = nn.Linear(8, 4), keys

    def forward(self, several: Any) -> Tensor:
        first, second = (several[key] for key in self.keys)
        return self.layer(first) + self.layer(second)


@pytest.mark.parametrize(
    ("several", "keys"), [([torch.ones(2, 8)] * 2, (0, 1)), ({"a": torch.ones(2, 8), "b": torch.ones(2, 8)}, "ab")]
)
def test_an_input_of_several_tensors_is_named(several: Any, keys: Any, tmp_path: Path) -> None:
    net = bitwright.quantize_dynamic(OfSeveral(*keys).eval())
    with pytest.raises(FormatError, match=f"input several is a {type(several).__name__} of tensors"):
        bitwright.export_onnx(net, (several,), tmp_path / "m.onnx")


class After(nn.Module):
    """A Linear layer, and a function of its outputs."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.compute = nn.Linear(16, 16), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.a(x))


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.max(-1)[0], "argmax of max": lambda y: y.max(1)[1], "min of all": lambda y: y - y.min(),
    "max of two": lambda y: torch.max(y, 2 * y), "argmax": lambda y: y.argmax(-1),
    "argmin": lambda y: y.argmin(1, keepdim=True),
    "amax": lambda y: y.amax((1, 2)), "std": lambda y: y.std(-1), "var": lambda y: y.var(1, keepdim=True),
    "biased": lambda y: y.var(-1, unbiased=False), "topk": lambda y: y.topk(3, -1)[0],
    "least": lambda y: y.topk(2, 1, False)[1],
    "sort": lambda y: y.sort(-1, descending=True)[0], "prod": lambda y: y.prod(-1),
    "logsumexp": lambda y: y.logsumexp(-1),
    "any": lambda y: (y > 1).any(-1), "all": lambda y: (y > -1).all(1), "count": lambda y: (y > 0).sum(-1),
    "clamp": lambda y: torch.clamp(y, max=y.mean(-1, keepdim=True)), "trunc": lambda y: (3 * y).trunc(),
    "remainder": lambda y: y.remainder(0.3), "tan": lambda y: (y / 2).tan(), "log1p": lambda y: y.abs().log1p(),
    "expm1": torch.expm1, "selu": functional.selu, "celu": lambda y: functional.celu(y, 0.7),
    "threshold": lambda y: functional.threshold(y, 0.1, -1.0), "logsigmoid": functional.logsigmoid,
    "index_select": lambda y: y.index_select(1, torch.tensor([0, 3])), "instance_norm": functional.instance_norm,
    "rms_norm": lambda y: functional.rms_norm(y, (16,)), "cosine": lambda y: functional.cosine_similarity(y, y + 1, -1),
    "unfold": lambda y: functional.unfold(y.unsqueeze(1).repeat(1, 2, 1, 1), (3, 2), dilation=(1, 2), padding=(1, 0), stride=2),
    "lerp": lambda y: torch.lerp(y, 2 * y, 0.3), "tile": lambda y: torch.tile(y, (1, 1, 2)),
    "pixel_unshuffle": lambda y: functional.pixel_unshuffle(y.view(-1, 1, 8, 12), 2),
}  # fmt: skip


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_operations(name: str, static: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = After(OPERATIONS[name]).eval(), torch.randn(2, 6, 16)
    integer = converted(net, x) if static else bitwright.quantize_dynamic(net)
    file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False)
    more = torch.cat([x, x.flip(1)])
    ours, theirs = integer(more), by_onnxruntime(file, more)
    assert ours.dtype == theirs.dtype and relative(ours.double(), theirs.double()) < 1e-3


@torch.no_grad()
def test_a_batch_norm_of_the_second_of_three_dimensions_is_not_folded_into_a_linear(tmp_path: Path) -> None:
    """Also where it has as many channels as the layer has outputs."""
    for channels in (6, 16):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(channels), nn.ReLU()), torch.randn(4, channels, 16)
        (
            nn.init.uniform_(net[1].weight),
            nn.init.uniform_(net[1].running_mean),
            nn.init.uniform_(net[1].running_var, 0.1),
        )
        integer = converted(net.eval(), x)
        assert relative(net(x), integer(x)) < 0.02
        file = bitwright.export_onnx(integer, x, tmp_path / "m.onnx", check=False)
        assert relative(integer(x), by_onnxruntime(file, x)) < 1e-3
    flat = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).eval()
    assert not any(isinstance(m, nn.BatchNorm1d) for m in converted(flat, torch.randn(20, 16)).modules())


@torch.no_grad()
def test_differences_that_only_grow_are_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code midway between two may go the other way, and many layers make much of it."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(16) for layer in (nn.Linear(16, 16), nn.Tanh()))).eval()
    integer, x = bitwright.quantize_dynamic(net), torch.randn(20, 16)
    computed, step = onnx_check._computed, 0.0

    def drifting(model: onnx.ModelProto, *others: Any) -> dict[str, Tensor]:
        places = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
        last = max(places.values())
        return {name: t * (1 + 0.2 * (places[name] / last) ** step) for name, t in computed(model, *others).items()}

    monkeypatch.setattr(onnx_check, "_computed", drifting)
    step = 1.0  # little by little
    bitwright.export_onnx(integer, x, tmp_path / "m.onnx")
    step = 0.01  # at once
    with pytest.raises(VerificationError, match="something else"):
        bitwright.export_onnx(integer, x, tmp_path / "n.onnx")


def test_a_place_where_no_file_can_be_is_named_before_tracing(tmp_path: Path) -> None:
    module, x = bitwright.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval()), torch.rand(2, 4)
    arguments: list[tuple[Any, Any, str]] = [
        (x, tmp_path / "none" / "m.onnx", "does not exist"),
        (tmp_path / "m.onnx", x, "no name"),
    ]
    for example, file, message in arguments:
        with pytest.raises(BitwrightError, match=message):
            bitwright.export_onnx(module, example, file)
