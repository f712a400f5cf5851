"""Export of converted modules to ONNX: QDQ form for integer layers, MatMulNBits for packed weights.

QDQ: engines fuse DequantizeLinear → operation → QuantizeLinear into integer arithmetic; others compute the same in float.
Activations are uint8, which onnxruntime's x86 kernels need, or int8 for TensorRT. Source: the operator specifications of
ONNX and of com.microsoft. Needs the package onnx (the extra `bitwright[onnx]`).
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import FormatError
from bitwright.nn.arguments import bound
from bitwright.nn.batches import Batch, cloned, outputs
from bitwright.nn.convert import Call
from bitwright.nn.layers import IntegerEmbedding, StaticProduct, StoredWeight
from bitwright.nn.onnx_operators import FUNCTIONS, MODULES, Arguments, arguments_of, integers, no_form
from bitwright.nn.rounded import Entered
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.nn.trace import Tracer, first, require_same
from bitwright.nn.tree import kind
from bitwright.nn.weightonly import PackedLinear
from bitwright.numerics.codec import code_range

if TYPE_CHECKING:
    import onnx

OPSETS, MICROSOFT = range(17, 22), "com.microsoft"
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}  # opset -> the first IR version that has it
SHIFT = {"uint8": 128, "int8": 0}  # added to int8 codes in the file


def export_onnx(
    module: nn.Module,
    example_inputs: Batch,
    file: str | Path,
    *,
    activations: str = "uint8",
    dynamic_axes: Mapping[str, Sequence[int]] | None = None,
    opset: int = 21,
) -> Path:
    """Write a module of `convert` or `quantize_weights` as an ONNX file.

    example_inputs  a batch of inputs
    activations     "uint8" for onnxruntime on x86, "int8" for TensorRT, with symmetric schemes
    dynamic_axes    input name -> dimensions of variable size; None: the first dimension of every input
    opset           17 to 21

    Raises FormatError, with its name, for an operation that has no ONNX form here, such as dynamic layers.
    """
    try:
        import onnx
    except ImportError:
        raise FormatError("the package onnx is not installed", remedy="pip install bitwright[onnx]") from None
    if activations not in SHIFT or opset not in OPSETS:
        message = f"activations {activations!r} in opset {opset}"
        raise FormatError(message, remedy='activations "uint8" or "int8", opset 17 to 21')
    graph = module if isinstance(module, fx.GraphModule) else _traced(module)
    given = bound(module, example_inputs)
    if isinstance(given, str):
        raise FormatError(given, where=type(module).__name__, remedy="example_inputs as the module is called with")
    writer = Writer(graph, given, SHIFT[activations], opset)
    writer.write()
    values = [
        _value(name, x, (dynamic_axes or {}).get(name, () if dynamic_axes else (0,))) for name, x in writer.inputs
    ]
    results = []
    for name, x in zip(writer.outputs, outputs(module, example_inputs), strict=True):
        results.append(_value(name, x, range(x.ndim) if dynamic_axes else range(min(1, x.ndim))))
    made = onnx.helper.make_graph(writer.nodes, "bitwright", values, results, writer.tensors)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSIONS[opset], producer_name="bitwright")
    onnx.checker.check_model(model)
    Path(file).write_bytes(model.SerializeToString())
    return Path(file)


class _Packed(Tracer):
    """A tracer for which bitwright's quantized layers are single operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = type(m).__module__.startswith("bitwright.nn") and not isinstance(m, Entered)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> fx.GraphModule:
    try:
        return fx.GraphModule(module, _Packed().trace(module))
    except Exception as error:
        message = f"cannot be traced: {type(error).__name__}: {error}".splitlines()[0]
        raise FormatError(message, where=type(module).__name__, remedy="export the parts that can be") from error


def _value(name: str, x: Any, free: Sequence[int]) -> "onnx.ValueInfoProto":
    import onnx

    kinds = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.int64: onnx.TensorProto.INT64,
        torch.bool: onnx.TensorProto.BOOL,
    }
    if not isinstance(x, Tensor) or x.dtype not in kinds:
        raise FormatError("inputs and outputs are to be float32 or int64 tensors, or truth values", where=name)
    axes = {axis % x.ndim for axis in free} if x.ndim else set()
    sizes = [("batch" if i == 0 else f"{name}_{i}") if i in axes else n for i, n in enumerate(x.shape)]
    return onnx.helper.make_tensor_value_info(name, kinds[x.dtype], sizes)


class Writer:
    """Builds the ONNX nodes and initializers of one graph.

    given  arguments of the example by name; tensors are the graph's inputs
    shift  added to int8 codes (128 for uint8)
    """

    def __init__(self, graph: fx.GraphModule, given: Mapping[str, Any], shift: int, opset: int) -> None:
        self.graph, self.given, self.shift, self.opset = graph, given, shift, opset
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.inputs: list[tuple[str, Tensor]] = []
        self.outputs: list[str] = []
        self.seen = Values(graph)
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        args = [given.get(str(node.target), next(iter(node.args), None)) for node in placeholders]
        with torch.no_grad():
            self.seen.run(*cloned(tuple(args)))

    def write(self) -> None:
        """Write every operation, in the order of computation."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                if isinstance(self.given.get(str(node.target)), Tensor):
                    self.inputs.append((node.name, self.given[str(node.target)]))
            elif node.op == "output":
                self.output(node.args[0], "result")
            elif node.op == "get_attr":
                found = operator.attrgetter(str(node.target))(self.graph)
                self.op("Identity", [self.constant(found)], name=node.name)
            elif node.op == "call_module":
                self.module(node, self.graph.get_submodule(str(node.target)))
            elif node.target is not require_same and isinstance(self.seen.of.get(node), Tensor):
                self.function(node, str(getattr(node.target, "__name__", node.target)))

    def output(self, value: Any, name: str) -> None:
        """Write the graph's outputs: the tensors in nested tuples, lists and dicts."""
        if isinstance(value, fx.Node):
            taken = name in self.outputs
            name = f"{name}_{len(self.outputs)}" if taken else name
            self.outputs.append(self.op("Identity", [value.name], name=name))
        elif isinstance(value, dict):
            for key, each in value.items():
                self.output(each, str(key))
        elif isinstance(value, tuple | list):
            for each in value:
                self.output(each, name)

    def module(self, node: fx.Node, module: nn.Module) -> None:
        """Write a bitwright layer, or a torch.nn module."""
        write = LAYERS.get(type(module))
        if write is not None:
            write(self, node, module)
            return
        if kind(module) not in MODULES:
            raise no_form(str(node.target), type(module).__name__)
        name, attributes = MODULES[kind(module)]
        names, form = FUNCTIONS[name]
        found = dict(zip(names, node.args, strict=False)) | {each: getattr(module, each) for each in attributes}
        self.finish(node, form(self, {each.lstrip("*"): value for each, value in found.items() if each[0] != "_"}))

    def function(self, node: fx.Node, name: str) -> None:
        """Write a function or method call."""
        if name in ("chunk", "split"):
            return  # the reader of one of its parts writes it
        if name not in FUNCTIONS:
            raise no_form(node.name, name)
        names, form = FUNCTIONS[name]
        self.finish(node, form(self, arguments_of(node, names)))

    def finish(self, node: fx.Node, made: str) -> None:
        """Name the output that was written last after the node."""
        self.op("Identity", [made], name=node.name)

    def op(self, kind: str, inputs: list[str], *, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add an ONNX node; returns the name of its output."""
        import onnx

        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def constant(self, x: Tensor) -> str:
        """Add an initializer; returns its name."""
        import onnx

        name = f"stored_{len(self.tensors)}"
        self.tensors.append(onnx.numpy_helper.from_array(x.detach().contiguous().numpy(), name))
        return name

    def value(self, x: Any) -> str:
        """The name of an argument: a tensor of the graph, or a tensor or number that becomes an initializer."""
        if isinstance(x, fx.Node):
            if isinstance(self.seen.of.get(x), Tensor):
                return x.name
            return self.op("Cast", [self.op("Squeeze", [self.sizes((x,))])], to=1)  # a size, as float
        return self.constant(x if isinstance(x, Tensor) else torch.tensor(float(x)))

    def shape(self, node: Any) -> tuple[int, ...]:
        """The shape of a tensor of the graph, for the example."""
        return tuple(self.seen.of[node].shape)

    def sizes(self, x: Any) -> str:
        """Sizes, constant or computed from shapes, as the name of an int64 vector."""
        parts: list[str] = []
        for each in x if isinstance(x, tuple) else (x,):
            parts.append(self.size(each) if isinstance(each, fx.Node) else self.constant(integers(int(each))))
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, axis=0)

    def size(self, node: fx.Node) -> str:
        """A node whose value is a size, or several, as the name of an int64 vector."""
        name = str(getattr(node.target, "__name__", node.target))
        if name == "size" or (node.target is getattr and node.args[1] == "shape"):
            whole = self.op("Shape", [source(node)])
            dim = node.args[1] if name == "size" and len(node.args) > 1 else node.kwargs.get("dim")
            return whole if dim is None else self.picked(whole, dim)
        if name == "getitem" and isinstance(node.args[0], fx.Node):
            return self.picked(self.size(node.args[0]), node.args[1])
        if name in ARITHMETIC:
            return self.op(ARITHMETIC[name], [self.sizes((each,)) for each in node.args])
        raise no_form(node.name, f"{name} of sizes")

    def picked(self, whole: str, index: Any) -> str:
        """One size, or a slice of them."""
        if isinstance(index, slice):
            ends = [
                self.constant(integers(end)) for end in (index.start or 0, index.stop if index.stop is not None else 99)
            ]
            return self.op("Slice", [whole, *ends])
        return self.op("Gather", [whole, self.sizes((index,))], axis=0)

    def decoded(self, codes: str, affine: Tensor) -> str:
        """Write a DequantizeLinear: codes -> float."""
        return self.op("DequantizeLinear", [codes, *self.affine(affine)])

    def encoded(self, x: str, affine: Tensor, name: str) -> None:
        """Write a QuantizeLinear: float -> codes; before it a ReLU or other bound that the codes' range does not imply."""
        scale, zero, low, high = affine.tolist()
        if low == zero > -128 and high == 127:
            x = self.op("Relu", [x])
        elif (low, high) != (-128, 127):
            x = self.op("Clip", [x, *(self.constant(torch.tensor((end - zero) * scale)) for end in (low, high))])
        self.op("QuantizeLinear", [x, *self.affine(affine)], name=name)

    def affine(self, affine: Tensor) -> list[str]:
        """Scale and zero point."""
        return [self.constant(affine[0]), self.constant(self.codes(affine[1]))]

    def codes(self, x: Tensor) -> Tensor:
        """int8 codes in the file's type, uint8 or int8."""
        return (x.int() + self.shift).to(torch.uint8 if self.shift else torch.int8)


class Values(fx.Interpreter):
    """Interprets a graph, and records the value of every node, for shapes and dtypes. of: node -> value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.of: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = torch.empty_like(result, device="meta") if isinstance(result, Tensor) else result
        return result


ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "truediv": "Div"}


def source(node: fx.Node) -> str:
    """The name of a node's first argument."""
    found = first(node)
    if found is None:
        raise no_form(node.name, "an operation on constants")
    return found.name


# --------------------------------------------------------------------------------------------------------------- layers


def _product(writer: Writer, node: fx.Node, layer: StaticProduct) -> None:
    """Write a static Linear or convolution: Σ (x − z) w · s + bias.

    The bias is int32 with the scale s_in · s_w, as onnxruntime's integer kernels need it; float below 8 bits, where these
    steps are coarse, and for symmetric schemes, as TensorRT needs it.
    """
    if layer.multiplier.shape[1] > 1:
        raise no_form(str(node.target), "a weight in groups")
    scale = layer.weight_scale()[:, 0]
    step = scale.double() * layer.entry[0].double()
    steps = (layer.offset().double() / step.where(step != 0, torch.ones_like(step))).round()
    bias = []
    if layer.has_bias and not layer.fine:
        bias = [writer.constant(layer.offset())]
    elif layer.has_bias:
        stored = writer.constant(steps.clamp(-(2**31), 2**31 - 1).to(torch.int32))
        bias = [writer.op("DequantizeLinear", [stored, writer.constant(step.float())], axis=0)]
    if layer.window is None:
        _gemm(writer, node, layer, scale, bias)
        return
    x = writer.decoded(source(node), layer.entry)
    window, first = layer.window, 1 if layer.flat else 0
    codes = layer.codes.view(len(layer.codes), *window.kernel, -1).permute(0, 3, 1, 2)
    codes = codes[:, :, 0] if layer.flat else codes
    w = writer.op("DequantizeLinear", [writer.constant(codes), writer.constant(scale)], axis=0)
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


def _gemm(writer: Writer, node: fx.Node, layer: StaticProduct, scale: Tensor, bias: list[str]) -> None:
    """Write a Linear: MatMul and Add to float; Gemm to codes, which engines fuse, with leading dimensions flattened to rows."""
    codes, shape = source(node), writer.shape(node.args[0])
    if not len(layer.exit):
        w = writer.op("DequantizeLinear", [writer.constant(layer.codes.T), writer.constant(scale)], axis=1)
        y = writer.op("MatMul", [writer.decoded(codes, layer.entry), w])
        y = writer.op("Add", [y, *bias]) if bias else y
        writer.op("Identity", [y], name=node.name)
        return
    flat = len(shape) == 2
    rows = codes if flat else writer.op("Reshape", [codes, writer.constant(integers(-1, shape[-1]))])
    w = writer.op("DequantizeLinear", [writer.constant(layer.codes.T), writer.constant(scale)], axis=1)
    y = writer.op("Gemm", [writer.decoded(rows, layer.entry), w, *bias])
    made = _left(writer, layer, y, node.name if flat else f"{node.name}_rows")
    if not flat:
        above = writer.op(
            "Slice", [writer.op("Shape", [codes]), *(writer.constant(integers(i)) for i in (0, len(shape) - 1))]
        )
        whole = writer.op("Concat", [above, writer.constant(integers(len(layer.codes)))], axis=0)
        writer.op("Reshape", [made, whole], name=node.name)


def _left(writer: Writer, layer: StaticProduct, y: str, name: str) -> str:
    """Write the output of a product: quantized to codes, or float if the layer's output is float."""
    if len(layer.exit):
        writer.encoded(y, layer.exit, name)
    else:
        writer.op("Identity", [y], name=name)
    return name


def _add(writer: Writer, node: fx.Node, layer: StaticAdd) -> None:
    pairs = zip(node.args, (layer.left, layer.right), strict=True)
    total = writer.op("Add", [writer.decoded(str(a), affine) for a, affine in pairs])
    writer.encoded(total, layer.exit, node.name)


def _mean(writer: Writer, node: fx.Node, layer: StaticMean) -> None:
    """Write an average pooling, of a module or a function."""
    x, pool = writer.decoded(source(node), layer.entry), layer.pool
    if isinstance(pool, nn.Module):
        name, attributes = MODULES[kind(pool)]
        found: Arguments = {each: getattr(pool, each) for each in attributes}
    else:
        assert isinstance(pool, Call)
        name = str(getattr(pool.target, "__name__", pool.target))
        found = dict(zip(FUNCTIONS[name][0][1:], pool.others, strict=False)) | pool.named
    shape = writer.shape(node.args[0])
    writer.encoded(FUNCTIONS[name][1](_At(writer, x, shape), found | {"input": x}), layer.exit, node.name)


class _At:
    """A writer that also knows the shape of one value that is no node of the graph."""

    def __init__(self, writer: Writer, x: str, shape: tuple[int, ...]) -> None:
        self.writer, self.x, self.known, self.opset = writer, x, shape, writer.opset
        self.op, self.constant, self.sizes = writer.op, writer.constant, writer.sizes

    def value(self, x: Any) -> str:
        return self.x if isinstance(x, str) else self.writer.value(x)

    def shape(self, node: Any) -> tuple[int, ...]:
        return self.known if isinstance(node, str) else self.writer.shape(node)


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
    """Write a lookup table (exact)."""
    index = writer.op("Cast", [source(node)], to=6)  # int32
    if not writer.shift:
        index = writer.op("Add", [index, writer.constant(torch.tensor(128, dtype=torch.int32))])
    writer.op("Gather", [writer.constant(writer.codes(layer.table)), index], name=node.name)


def _stored(writer: Writer, node: fx.Node, layer: StoredWeight) -> None:
    """Write a quantized weight that other operations read."""
    writer.op("Identity", [writer.constant(layer())], name=node.name)


def _embedding(writer: Writer, node: fx.Node, layer: IntegerEmbedding) -> None:
    if layer.scale.shape[1] > 1:
        raise no_form(str(node.target), "an embedding in groups")
    index = source(node)
    rows = writer.op("Cast", [writer.op("Gather", [writer.constant(layer.codes), index])], to=1)  # float
    writer.op("Mul", [rows, writer.op("Gather", [writer.constant(layer.scale), index])], name=node.name)


def _packed(writer: Writer, node: fx.Node, layer: PackedLinear) -> None:
    """Write com.microsoft's MatMulNBits: unsigned codes of 4 or 8 bits, the low half of a byte first; zero points by group."""
    q, bits, group = layer.quantized(), layer.scheme.levels.bits, layer.scheme.group
    N, K = q.codes.shape
    if bits not in (4, 8) or not isinstance(group, int):
        raise no_form(str(node.target), f"a weight of scheme {layer.scheme}")
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


Write = Callable[[Writer, fx.Node, Any], None]
LAYERS: dict[type[nn.Module], Write] = {
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
