"""Converted modules as ONNX: QuantizeLinear / DequantizeLinear around float operations, and MatMulNBits for packed weights.

An engine that knows the pattern fuses DequantizeLinear → operation → QuantizeLinear into integer arithmetic; one that does
not computes the same in float. Formats: the operators' pages of ONNX (opset 21) and of com.microsoft.
Needs the package onnx (the extra `bitwright[onnx]`).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import FormatError
from bitwright.nn.integer import IntegerWeight
from bitwright.nn.layers import IntegerEmbedding, StaticProduct, row_sums
from bitwright.nn.prepare import Batch
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.nn.trace import Tracer, first
from bitwright.nn.weightonly import PackedLinear
from bitwright.numerics.codec import code_range

if TYPE_CHECKING:
    import onnx

OPSET, MICROSOFT = 21, "com.microsoft"


def export_onnx(module: nn.Module, example_inputs: Batch, file: str | Path) -> Path:
    """Write a module of `convert` or `quantize_weights` as an ONNX file; the first axis of inputs and outputs is free.

    example_inputs  a tensor or a tuple of them. Raises FormatError, naming it, for an operation without an ONNX form
    here: dynamic layers among them, which quantize by rows.
    """
    try:
        import onnx
    except ImportError:
        raise FormatError("the package onnx is not installed", remedy="pip install bitwright[onnx]") from None
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    graph = module if isinstance(module, fx.GraphModule) else _traced(module)
    with torch.no_grad():
        outputs = module(*inputs)
    writer = Writer(graph)
    writer.write()
    values = [_value(name, x) for name, x in zip(writer.inputs, inputs, strict=True)]
    made = onnx.helper.make_graph(writer.nodes, "bitwright", values, [_value(writer.output, outputs)], writer.tensors)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=10, producer_name="bitwright")
    onnx.checker.check_model(model)
    Path(file).write_bytes(model.SerializeToString())
    return Path(file)


class _Packed(Tracer):
    """Layers of this package are single operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("bitwright.nn") or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(module, _Packed().trace(module))
    except Exception as error:
        message = f"cannot be traced: {type(error).__name__}: {error}".splitlines()[0]
        raise FormatError(message, where=type(module).__name__, remedy="export the parts that can be") from error


def _value(name: str, x: Tensor) -> "onnx.ValueInfoProto":
    import onnx

    kinds = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}
    if not isinstance(x, Tensor) or x.dtype not in kinds:
        raise FormatError("inputs and outputs are to be float32 or int64 tensors", where=name)
    return onnx.helper.make_tensor_value_info(name, kinds[x.dtype], ["batch", *x.shape[1:]])


class Writer:
    """The nodes and tensors of one graph, as they come."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.inputs: list[str] = []
        self.output = ""

    def write(self) -> None:
        """Every operation, in the order of computation."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.inputs.append(node.name)
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise FormatError("more than one output has no ONNX form here", where="output")
                self.output = self.op("Identity", [source(node)], name="result")
            elif node.op == "call_module":
                module = self.graph.get_submodule(str(node.target))
                write = MODULES.get(type(module))
                if write is None:
                    raise _no_form(str(node.target), type(module).__name__)
                write(self, node, module)
            elif str(node.target) not in SHAPES and not self.function(node):
                raise _no_form(node.name, str(node.target))

    def op(self, kind: str, inputs: list[str], *, name: str = "", domain: str = "", **attributes: Any) -> str:
        """One node; the name of its output."""
        import onnx

        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def constant(self, x: Tensor) -> str:
        """A stored tensor; its name."""
        import onnx

        name = f"stored_{len(self.tensors)}"
        self.tensors.append(onnx.numpy_helper.from_array(x.detach().contiguous().numpy(), name))
        return name

    def decoded(self, codes: str, affine: Tensor) -> str:
        """Codes as floats."""
        return self.op("DequantizeLinear", [codes, *self.affine(affine)])

    def encoded(self, x: str, affine: Tensor, name: str) -> None:
        """Floats as codes: a ReLU or other bound first, where the codes do not fill int8."""
        scale, zero, low, high = affine.tolist()
        if low == zero and high == 127:
            x = self.op("Relu", [x])
        elif (low, high) != (-128, 127):
            x = self.op("Clip", [x, *(self.constant(torch.tensor((end - zero) * scale)) for end in (low, high))])
        self.op("QuantizeLinear", [x, *self.affine(affine)], name=name)

    def affine(self, affine: Tensor) -> list[str]:
        """Scale and zero point."""
        return [self.constant(affine[0]), self.constant(affine[1].to(torch.int8))]

    def function(self, node: fx.Node) -> bool:
        """A function or method of the graph, if it has an ONNX form."""
        name, args = str(getattr(node.target, "__name__", node.target)), node.args
        if name in PLAIN:
            self.op(PLAIN[name], [a.name if isinstance(a, fx.Node) else self.number(a) for a in args], name=node.name)
        elif name in ("view", "reshape"):
            sizes = args[1:] if not isinstance(args[1], tuple | list) else tuple(args[1])
            shape = torch.tensor([0 if isinstance(size, fx.Node) else size for size in sizes])  # 0: as in the input
            self.op("Reshape", [source(node), self.constant(shape)], name=node.name)
        elif name == "flatten" and args[1:] == (1,):
            self.op("Flatten", [source(node)], name=node.name)
        elif name == "contiguous":
            self.op("Identity", [source(node)], name=node.name)
        else:
            return False
        return True

    def number(self, x: Any) -> str:
        """A Python number as a stored tensor."""
        return self.constant(torch.tensor(float(x)))


PLAIN = {"add": "Add", "iadd": "Add", "mul": "Mul", "sub": "Sub", "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh",
         "gelu": "Gelu"}  # fmt: skip
SHAPES = ("size", "dim", "<built-in function getattr>")


def source(node: fx.Node) -> str:
    """The name of what a node reads first."""
    found = first(node)
    if found is None:
        raise _no_form(node.name, "an operation on constants")
    return found.name


def _no_form(where: str, what: str) -> FormatError:
    remedy = "a module of bitwright.convert or bitwright.quantize_weights, made of static layers"
    return FormatError(f"{what} has no ONNX form here", where=where, remedy=remedy)


# --------------------------------------------------------------------------------------------------------------- layers


def _product(writer: Writer, node: fx.Node, layer: StaticProduct) -> None:
    """Σ (x − z) w · s + bias: the bias is what is left of `constant` when zero points are taken out."""
    if layer.multiplier.shape[1] > 1:
        raise _no_form(str(node.target), "a weight in groups")
    s_in, z_in = layer.entry.double()
    s_out, z_out = layer.exit.double()[:2] if len(layer.exit) else torch.tensor([1.0, 0.0], dtype=torch.float64)
    scale = layer.multiplier[:, 0].double() * s_out / s_in
    sums = row_sums(IntegerWeight(layer.codes, scale.float()[:, None])).double()
    bias = writer.constant(((layer.constant.double() - z_out) * s_out + z_in * s_in * sums).float())
    x = writer.decoded(source(node), layer.entry)
    if layer.window is None:
        w = writer.op("DequantizeLinear", [writer.constant(layer.codes.T), writer.constant(scale.float())], axis=1)
        y = writer.op("Add", [writer.op("MatMul", [x, w]), bias])
    else:
        window = layer.window
        codes = layer.codes.view(len(layer.codes), *window.kernel, -1).permute(0, 3, 1, 2)
        codes = codes[:, :, 0] if layer.flat else codes
        w = writer.op("DequantizeLinear", [writer.constant(codes), writer.constant(scale.float())], axis=0)
        left, right, top, bottom = window.padding
        pads = [left, right] if layer.flat else [top, left, bottom, right]
        first = 1 if layer.flat else 0
        y = writer.op(
            "Conv",
            [x, w, bias],
            pads=pads,
            strides=window.stride[first:],
            dilations=window.dilation[first:],
            kernel_shape=window.kernel[first:],
            group=window.groups,
        )
    if len(layer.exit):
        writer.encoded(y, layer.exit, node.name)
    else:
        writer.op("Identity", [y], name=node.name)


def _add(writer: Writer, node: fx.Node, layer: StaticAdd) -> None:
    pairs = zip(node.args, (layer.left, layer.right), strict=True)
    total = writer.op("Add", [writer.decoded(str(a), affine) for a, affine in pairs])
    writer.encoded(total, layer.exit, node.name)


def _mean(writer: Writer, node: fx.Node, layer: StaticMean) -> None:
    pool, x = layer.pool, writer.decoded(source(node), layer.entry)
    size = getattr(pool, "output_size", None) or (getattr(pool, "others", None) or [None])[0]
    if size not in (1, (1, 1), [1, 1]):
        raise _no_form(str(node.target), "a mean other than over whole images")
    writer.encoded(writer.op("GlobalAveragePool", [x]), layer.exit, node.name)


def _max(writer: Writer, node: fx.Node, layer: StaticMax) -> None:
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


def _quantize(writer: Writer, node: fx.Node, layer: Quantize) -> None:
    writer.encoded(source(node), layer.affine, node.name)


def _dequantize(writer: Writer, node: fx.Node, layer: Dequantize) -> None:
    writer.op("Identity", [writer.decoded(source(node), layer.affine)], name=node.name)


def _table(writer: Writer, node: fx.Node, layer: Table) -> None:
    """A look-up, exactly."""
    wide = writer.op("Cast", [source(node)], to=6)  # int32
    index = writer.op("Add", [wide, writer.constant(torch.tensor(128, dtype=torch.int32))])
    writer.op("Gather", [writer.constant(layer.table), index], name=node.name)


def _embedding(writer: Writer, node: fx.Node, layer: IntegerEmbedding) -> None:
    if layer.scale.shape[1] > 1:
        raise _no_form(str(node.target), "an embedding in groups")
    index = source(node)
    rows = writer.op("Cast", [writer.op("Gather", [writer.constant(layer.codes), index])], to=1)  # float
    writer.op("Mul", [rows, writer.op("Gather", [writer.constant(layer.scale), index])], name=node.name)


def _packed(writer: Writer, node: fx.Node, layer: PackedLinear) -> None:
    """com.microsoft's MatMulNBits: codes from 0 on, 4 or 8 bits, low ones first; a zero point for each group, if any."""
    q, bits, group = layer.quantized(), layer.scheme.levels.bits, layer.scheme.group
    N, K = q.codes.shape
    if bits not in (4, 8) or not isinstance(group, int):
        raise _no_form(str(node.target), f"a weight of scheme {layer.scheme}")
    G, low = math.ceil(K / group), code_range(layer.scheme)[0]
    codes = nn.functional.pad(q.codes.int() - low, (0, G * group - K), value=-low)
    parts = [_bytes(codes, bits).view(N, G, -1), q.scales.scale.flatten()]
    if q.scales.zero is not None:
        parts.append(_bytes(q.scales.zero.int() - low, bits).flatten())
    x = writer.op(
        "MatMulNBits",
        [source(node), *(writer.constant(part) for part in parts)],
        domain=MICROSOFT,
        K=K,
        N=N,
        bits=bits,
        block_size=group,
    )
    if layer.bias.numel():
        writer.op("Add", [x, writer.constant(layer.bias)], name=node.name)
    else:
        writer.op("Identity", [x], name=node.name)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, C] of 4 or 8 bits as bytes, two of 4 bits in each."""
    if bits == 8:
        return codes.to(torch.uint8)
    even = nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return (even[:, ::2] | even[:, 1::2] << 4).to(torch.uint8)


def _plain(kind: str) -> "Write":
    def write(writer: Writer, node: fx.Node, module: Any) -> None:
        writer.op(kind, [source(node)], name=node.name)

    return write


def _norm(writer: Writer, node: fx.Node, module: nn.LayerNorm) -> None:
    inputs = [source(node), writer.constant(module.weight)]
    inputs += [writer.constant(module.bias)] if isinstance(module.bias, Tensor) else []
    axis = -len(module.normalized_shape)
    writer.op("LayerNormalization", inputs, name=node.name, axis=axis, epsilon=module.eps)


Write = Callable[[Writer, fx.Node, Any], None]
MODULES: dict[type[nn.Module], Write] = {
    StaticProduct: _product,
    StaticAdd: _add,
    StaticMean: _mean,
    StaticMax: _max,
    Table: _table,
    IntegerEmbedding: _embedding,
    PackedLinear: _packed,
    Quantize: _quantize,
    Dequantize: _dequantize,
    nn.LayerNorm: _norm,
    **{kind: _plain("Identity") for kind in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)},
    nn.Flatten: _plain("Flatten"),
    nn.ReLU: _plain("Relu"),
    nn.GELU: _plain("Gelu"),
    nn.Sigmoid: _plain("Sigmoid"),
    nn.Tanh: _plain("Tanh"),
}
