"""Write bitwright's quantized layers as ONNX nodes: QDQ form for static ones, MatMulNBits for packed weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.nn import onnx_dynamic
from bitwright.nn.convert import Call
from bitwright.nn.layers import IntegerEmbedding, StaticProduct, StoredWeight
from bitwright.nn.onnx_operators import FUNCTIONS, MODULES
from bitwright.nn.onnx_writes import Arguments, Made, Writes, integers, no_form, source
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.nn.tree import kind
from bitwright.nn.weightonly import PackedLinear

MICROSOFT = "com.microsoft"
WIDE, NARROW = 128, 32  # groups of MatMulNBits for a scheme without any; onnxruntime knows 16 to 256
EXACT_STEPS = 1 << 20  # of the bias of a row of zeros
MOST_STEPS = 1 << 30  # of a bias in int32: its sum with the products is to fit too


def _product(writer: Writes, node: fx.Node, layer: StaticProduct) -> None:
    """Write a static Linear or convolution: Σ (x − z) w · s + bias.

    The bias is int32 with the scale s_in · s_w, as onnxruntime's integer kernels need it; float below 8 bits, where these
    steps are coarse, for symmetric schemes, as TensorRT needs it, and where it is so many steps that int32 does not hold it.
    """
    if layer.multiplier.shape[1] > 1:
        raise no_form(str(node.target), "a weight in groups")
    scale = _scale(layer)
    step = scale.double() * layer.entry[0].double()
    steps = (layer.offset().double() / step).round()
    bias = []
    if layer.has_bias and layer.fine and float(steps.abs().max()) < MOST_STEPS:
        bias = [_dequantized(writer, steps.to(torch.int32), step.float(), axis=0)]
    elif layer.has_bias:
        bias = [writer.constant(layer.offset())]
    if layer.window is None:
        _gemm(writer, node, layer, scale, bias)
        return
    x = writer.decoded(source(node), layer.entry)
    window, first = layer.window, 1 if layer.flat else 0
    codes = layer.codes.view(len(layer.codes), *window.kernel, -1).permute(0, 3, 1, 2)
    codes = codes[:, :, 0] if layer.flat else codes
    w = _dequantized(writer, codes, scale, axis=0)
    left, right, top, bottom = window.padding
    y = writer.op(
        "Conv",
        [x, w, *bias],
        pads=[left, right] if layer.flat else [top, left, bottom, right],
        strides=window.stride[first:],
        dilations=window.dilation[first:],
        kernel_shape=window.kernel[first:],
        group=window.groups,
    )
    _left(writer, layer, y, node.name)


def _scale(layer: StaticProduct) -> Tensor:
    """The scale of each row of weights [N]; of a row of zeros, which is 0, one in whose steps its bias is a whole number."""
    scale = layer.weight_scale()[:, 0]
    of_bias = (layer.offset().double().abs() / layer.entry[0].double() / EXACT_STEPS).float()
    return scale.where(scale != 0, of_bias.where(of_bias != 0, torch.ones_like(scale)))


def _gemm(writer: Writes, node: fx.Node, layer: StaticProduct, scale: Tensor, bias: list[str]) -> None:
    """Write a Linear as a Gemm of rows, to codes or to float: engines fuse it either way, and a MatMul to float they do not."""
    codes, shape = source(node), writer.shape(node.args[0])
    flat = len(shape) == 2
    rows = codes if flat else writer.op("Reshape", [codes, writer.constant(integers(-1, shape[-1]))])
    w = _dequantized(writer, layer.codes.T, scale, axis=1)
    y = writer.op("Gemm", [writer.decoded(rows, layer.entry), w, *bias])
    made = _left(writer, layer, y, node.name if flat else f"{node.name}_rows")
    if not flat:
        above = writer.op(
            "Slice", [writer.op("Shape", [codes]), *(writer.constant(integers(i)) for i in (0, len(shape) - 1))]
        )
        whole = writer.op("Concat", [above, writer.constant(integers(len(layer.codes)))], axis=0)
        writer.op("Reshape", [made, whole], name=node.name)


def _dequantized(writer: Writes, codes: Tensor, scale: Tensor, *, axis: int) -> str:
    """Write stored codes, with one scale for each index of an axis. Their zero points, all 0, are written too: without them
    onnxruntime fuses no Gemm."""
    zeros = torch.zeros(len(scale), dtype=codes.dtype)
    return writer.op("DequantizeLinear", [writer.constant(x) for x in (codes, scale, zeros)], axis=axis)


def _left(writer: Writes, layer: StaticProduct, y: str, name: str) -> str:
    """Write the output of a product: quantized to codes, or float if the layer's output is float."""
    if len(layer.exit):
        writer.encoded(y, layer.exit, name)
    else:
        writer.op("Identity", [y], name=name)
    return name


def _add(writer: Writes, node: fx.Node, layer: StaticAdd) -> None:
    pairs = zip(node.args, (layer.left, layer.right), strict=True)
    total = writer.op("Add", [writer.decoded(str(a), affine) for a, affine in pairs])
    writer.encoded(total, layer.exit, node.name)


def _mean(writer: Writes, node: fx.Node, layer: StaticMean) -> None:
    """Write an average pooling, of a module or a function."""
    x, pool = writer.decoded(source(node), layer.entry), layer.pool
    if isinstance(pool, nn.Module):
        name, attributes = MODULES[kind(pool)]
        found: Arguments = {each: getattr(pool, each) for each in attributes}
    else:
        assert isinstance(pool, Call)
        name = str(getattr(pool.target, "__name__", pool.target))
        found = dict(zip(FUNCTIONS[name][0][1:], pool.others, strict=False)) | pool.named
    writer.shapes[x] = writer.shape(node.args[0])
    writer.encoded(FUNCTIONS[name][1](writer, found | {"input": x}), layer.exit, node.name)


def _max(writer: Writes, node: fx.Node, layer: StaticMax) -> None:
    left, right, top, bottom = layer.window.padding
    first = 1 if layer.flat else 0
    writer.op(
        "MaxPool",
        [source(node)],
        name=node.name,
        kernel_shape=layer.window.kernel[first:],
        strides=layer.window.stride[first:],
        dilations=layer.window.dilation[first:],
        pads=[left, right] if layer.flat else [top, left, bottom, right],
    )


def _quantize(writer: Writes, node: fx.Node, layer: Quantize) -> None:
    writer.encoded(source(node), layer.affine, node.name)


def _dequantize(writer: Writes, node: fx.Node, layer: Dequantize) -> None:
    writer.op("Identity", [writer.decoded(source(node), layer.affine)], name=node.name)


def _table(writer: Writes, node: fx.Node, layer: Table) -> None:
    """Write a lookup table (exact)."""
    index = writer.op("Cast", [source(node)], to=6)  # int32
    if not writer.shift:
        index = writer.op("Add", [index, writer.constant(torch.tensor(128, dtype=torch.int32))])
    writer.op("Gather", [writer.constant(writer.codes(layer.table)), index], name=node.name)


def _stored(writer: Writes, node: fx.Node, layer: StoredWeight) -> None:
    """Write a quantized weight that other operations read: codes, if rows have one scale each."""
    if layer.scale.shape[1] > 1 or layer.dtype != torch.float32:
        made = writer.constant(layer())
    else:
        made = _dequantized(writer, layer.shaped(layer.codes), layer.scale[:, 0], axis=0)
    writer.op("Identity", [made], name=node.name)


def _embedding(writer: Writes, node: fx.Node, layer: IntegerEmbedding) -> None:
    if layer.scale.shape[1] > 1:
        raise no_form(str(node.target), "an embedding in groups")
    index = source(node)
    rows = writer.op("Cast", [writer.op("Gather", [writer.constant(layer.codes), index])], to=1)  # float
    writer.op("Mul", [rows, writer.op("Gather", [writer.constant(layer.scale), index])], name=node.name)


def _packed(writer: Writes, node: fx.Node, layer: PackedLinear) -> None:
    """Write com.microsoft's MatMulNBits: unsigned codes of 4 or 8 bits, the low half of a byte first; zero points by group.

    Codes of other widths lie in the next of these. A scale for a whole row, or for all of them, is repeated for each group.
    """
    q, scheme, group = layer.quantized(), layer.scheme, layer.scheme.group
    N, K = q.codes.shape
    group = group if isinstance(group, int) else WIDE if K >= WIDE else NARROW
    bits = 4 if scheme.levels.bits <= 4 else 8
    G, low = math.ceil(K / group), -(1 << (bits - 1))
    codes = nn.functional.pad(q.codes.int() - low, (0, G * group - K), value=-low)
    parts = [_bytes(codes, bits).view(N, G, -1), q.scales.scale.float().expand(N, G).flatten()]
    if q.scales.zero is not None:
        parts.append(_bytes(q.scales.zero.int().expand(N, G) - low, bits).flatten())
    x = writer.op(
        "MatMulNBits",
        [source(node), *(writer.constant(part) for part in parts)],
        domain=MICROSOFT,
        K=K,
        N=N,
        bits=bits,
        block_size=group,
    )
    if layer.bias is not None:
        writer.op("Add", [x, writer.constant(layer.bias)], name=node.name)
    else:
        writer.op("Identity", [x], name=node.name)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [N, C] of 4 or 8 bits into bytes, two 4-bit codes in each."""
    if bits == 8:
        return codes.to(torch.uint8)
    even = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (even[:, ::2] | even[:, 1::2] << 4).to(torch.uint8)


Write = Callable[[Writes, fx.Node, Any], Made]
# Class -> writer of its node: it names its one output after the node, or returns the names of several.
LAYERS: dict[type[nn.Module], Write] = {
    **onnx_dynamic.LAYERS,
    StaticProduct: _product,
    StaticAdd: _add,
    StaticMean: _mean,
    StaticMax: _max,
    Table: _table,
    IntegerEmbedding: _embedding,
    StoredWeight: _stored,
    PackedLinear: _packed,
    Quantize: _quantize,
    Dequantize: _dequantize,
}
