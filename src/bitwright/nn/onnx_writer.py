"""Build the ONNX nodes and initializers of a traced graph, one operation after another."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from bitwright.nn.batches import cloned, tensors
from bitwright.nn.onnx_aten import ATEN
from bitwright.nn.onnx_layers import LAYERS
from bitwright.nn.onnx_operators import FUNCTIONS, MODULES
from bitwright.nn.onnx_writes import Made, arguments_of, integers, no_form, source
from bitwright.nn.trace import Recorder, require_same
from bitwright.nn.tree import kind

SPLITS = ("chunk", "split", "split_with_sizes", "unbind", "tensor_split")


class Writer:
    """Builds the ONNX nodes and initializers of one graph.

    given   arguments of the example by name; tensors are the graph's inputs
    shift   added to int8 codes (128 for uint8)
    made    names of the results of a node with several
    shapes  of values that are written and no node of the graph
    """

    def __init__(self, graph: fx.GraphModule, given: Mapping[str, Any], shift: int, opset: int) -> None:
        self.graph, self.given, self.shift, self.opset = graph, given, shift, opset
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.inputs: list[tuple[str, Tensor]] = []
        self.outputs: list[str] = []
        self.made: dict[fx.Node, Made] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.seen = Values(graph)
        args = [
            given.get(str(node.target), next(iter(node.args), None))
            for node in graph.graph.find_nodes(op="placeholder")
        ]
        with torch.no_grad():
            self.seen.run(*cloned(tuple(args)))

    def written(self) -> Self:
        """Write every operation, in the order of computation."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.input(node, str(node.target))
            elif node.op == "output":
                self.output(node.args[0], "result")
            elif node in self.seen.constants:
                if any(user not in self.seen.constants for user in node.users):
                    self.kept(node, self.seen.constants[node])
            elif node.op == "call_module":
                self.module(node, self.graph.get_submodule(str(node.target)))
            elif node.target is not require_same and tensors(self.seen.of.get(node)):
                self.function(node)
        return self

    def input(self, node: fx.Node, name: str) -> None:
        """Write an input of the graph, under the name of the argument."""
        if isinstance(self.given.get(name), Tensor):
            self.inputs.append((name, self.given[name]))
            if node.name != name:  # torch.fx renames what is a word of Python
                self.op("Identity", [name], name=node.name)

    def kept(self, node: fx.Node, value: Any) -> None:
        """Write a value that depends on no input."""
        if isinstance(value, Tensor):
            self.op("Identity", [self.constant(value)], name=node.name)
        elif tensors(value):
            self.made[node] = tuple(self.constant(x) for x in tensors(value))

    def output(self, value: Any, name: str) -> None:
        """Write the graph's outputs: the tensors in nested tuples, lists and dicts."""
        if isinstance(value, fx.Node) and value in self.made:
            value = self.made[value]
        if isinstance(value, fx.Node | str):
            name = f"{name}_{len(self.outputs)}" if name in self.outputs else name
            self.outputs.append(self.op("Identity", [str(value)], name=name))
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
            made = write(self, node, module)
            self.made |= {node: made} if made is not None else {}
            return
        if kind(module) not in MODULES:
            raise no_form(str(node.target), type(module).__name__)
        name, attributes = MODULES[kind(module)]
        names, form = FUNCTIONS[name]
        found = dict(zip(names, node.args, strict=False)) | {each: getattr(module, each, None) for each in attributes}
        self.finish(node, form(self, {each.lstrip("*"): value for each, value in found.items() if each[0] != "_"}))

    def function(self, node: fx.Node) -> None:
        """Write a function or method call, or an ATen operator."""
        target: Any = node.target
        aten = isinstance(target, torch._ops.OpOverload)
        packet = target.overloadpacket if aten else target
        name = str(getattr(packet, "__name__", packet))
        whole = node.args[0] if node.args else None
        if name == "getitem" and isinstance(whole, fx.Node) and whole in self.made:
            part: Any = self.made[whole]
            part = part[node.args[1]]
            self.finish(node, part) if isinstance(part, str) else self.made.update({node: part})
        elif name in SPLITS:
            self.made[node] = self.split(node)
        else:
            table = ATEN if name in ATEN and (aten or name not in FUNCTIONS) else FUNCTIONS
            if name not in table:
                raise no_form(node.name, name)
            names, form = table[name]
            made = form(self, arguments_of(node, names))
            self.finish(node, made) if isinstance(made, str) else self.made.update({node: made})

    def split(self, node: fx.Node) -> Made:
        """Write a split of a tensor along a dimension; unbind's parts lose the dimension."""
        whole: Any = node.args[0]
        parts, shape = self.seen.of[node], self.shape(whole)
        gone = parts[0].ndim < len(shape)
        dim: Any = node.kwargs.get("dim", node.args[-1] if len(node.args) > (1 if gone else 2) else 0)
        axis = int(dim) % len(shape)
        sizes = self.constant(integers(*(1 if gone else part.shape[axis] for part in parts)))
        names = self.several("Split", [self.value(whole), sizes], len(parts), axis=axis)
        return tuple(self.op("Squeeze", [name, self.constant(integers(axis))]) if gone else name for name in names)

    def finish(self, node: fx.Node, made: str) -> None:
        """Name the output that was written last after the node."""
        self.op("Identity", [made], name=node.name)

    def op(self, kind: str, inputs: list[str], *, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Add an ONNX node; returns the name of its output."""
        import onnx

        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [name], domain=domain, **attributes))
        return name

    def several(self, kind: str, inputs: list[str], count: int, **attributes: Any) -> list[str]:
        """Add an ONNX node with several outputs; returns their names."""
        import onnx

        names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(onnx.helper.make_node(kind, inputs, names, **attributes))
        return names

    def constant(self, x: Tensor) -> str:
        """Add an initializer; returns its name."""
        import onnx

        name = f"stored_{len(self.tensors)}"
        self.tensors.append(onnx.numpy_helper.from_array(x.detach().contiguous().numpy(), name))
        return name

    def value(self, x: Any) -> str:
        """The name of an argument: a tensor of the graph, or a tensor or number that becomes an initializer."""
        if isinstance(x, str):
            return x
        if isinstance(x, fx.Node):
            if isinstance(self.seen.of.get(x), Tensor):
                return x.name
            return self.op("Cast", [self.op("Squeeze", [self.sizes((x,))])], to=1)  # a size, as float
        return self.constant(x if isinstance(x, Tensor) else torch.tensor(float(x)))

    def parts(self, x: Any) -> Made:
        """The names of an argument that is a tensor, or a tuple of tensors."""
        if isinstance(x, tuple | list):
            return tuple(self.parts(each) for each in x)
        return self.made[x] if x in self.made else self.value(x)

    def shape(self, node: Any) -> tuple[int, ...]:
        """The shape of a tensor of the graph, for the example."""
        return self.shapes[node] if isinstance(node, str) else tuple(self.example(node).shape)

    def example(self, node: Any) -> Any:
        """A node's value for the example: a tensor without data, a size, or what is no node as it is."""
        return self.seen.of[node] if isinstance(node, fx.Node) else node

    def sizes(self, x: Any) -> str:
        """Sizes, constant or computed from shapes, as the name of an int64 vector."""
        parts: list[str] = []
        for each in x if isinstance(x, tuple) else (x,):
            parts.append(self.size(each) if isinstance(each, fx.Node) else self.constant(integers(int(each))))
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, axis=0)

    def size(self, node: fx.Node) -> str:
        """A node whose value is a size, or several, as the name of an int64 vector."""
        name = str(getattr(node.target, "__name__", node.target)).split(".")[0]
        if isinstance(self.seen.of[node], Tensor):
            return self.op("Reshape", [self.op("Cast", [node.name], to=7), self.constant(integers(1))])
        if name in ("size", "sym_size") or (node.target is getattr and node.args[1] == "shape"):
            whole = self.op("Shape", [source(node)])
            dim = node.args[1] if name != "getattr" and len(node.args) > 1 else node.kwargs.get("dim")
            return whole if dim is None else self.picked(whole, dim)
        if name == "getitem" and isinstance(node.args[0], fx.Node):
            return self.picked(self.size(node.args[0]), node.args[1])
        if name in ARITHMETIC:
            return self.op(ARITHMETIC[name], [self.sizes((each,)) for each in node.args])
        raise no_form(node.name, f"{name} of sizes")

    def picked(self, whole: str, index: Any) -> str:
        """One size, or a slice of them."""
        if isinstance(index, slice):
            begin, end = index.start or 0, 99 if index.stop is None else index.stop
            return self.op("Slice", [whole, self.constant(integers(begin)), self.constant(integers(end))])
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


ARITHMETIC = {"add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "truediv": "Div"}


class Values(Recorder):
    """Records the value of every node, of tensors only shape and dtype; and those that depend on no input, in full.

    constants  node -> its value
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, partial(torch.empty_like, device="meta"))
        self.constants: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        pure = n.op in ("call_function", "call_method") and n.target is not require_same
        if n.op == "get_attr" or (pure and all(m in self.constants for m in n.all_input_nodes)):
            self.constants[n] = result
        return result
