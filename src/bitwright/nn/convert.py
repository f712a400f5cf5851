"""`convert`: rewrite the graphs of a calibrated or trained module into integer layers, with int8 activations between them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.nn.batches import outputs
from bitwright.nn.check import Check, check_outputs, in_phase, require_check, rounded_twin
from bitwright.nn.dynamic import DYNAMIC, dynamic, weight_of
from bitwright.nn.fake import Edge
from bitwright.nn.layers import DynamicProduct, IntegerProduct, StaticProduct
from bitwright.nn.layout import contiguous
from bitwright.nn.plan import fuses, role_of, role_unless_kept
from bitwright.nn.prepare import Prepared, require_prepared
from bitwright.nn.rounded import Entered
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.nn.trace import ADD, CARRY, MEAN, PRODUCT, RELU, SHAPE, UNARY, bound, first
from bitwright.nn.tree import layers_of, named, off_the_fast_path, replaced, require_mode
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TOKEN, Scheme


@torch.no_grad()
def convert(prepared: Prepared, *, check: Check = "error") -> nn.Module:
    """The integer module: int8 weights, int8 activations between layers, float where there is no integer form.

    LSTM, GRU, RNN and attention become dynamic layers. `prepared` is not changed.

    check  the first calibration batch (or the example) is run through the float module, through one with fake quantization,
           and through the integer module. If this differs from float by more than quantization explains, the first wrong
           operation is named, as an "error" or a warning ("warn"); "off": no comparison

    Raises RecipeError for a module that was not prepared, was converted already, or is in training mode; CalibrationError,
    with the edge's name, if it saw no values; VerificationError if `check` finds a difference.
    """
    require_prepared(prepared)
    require_mode(prepared, training=False)
    require_check(check)
    body = copy.deepcopy(prepared.body)
    for name, module in list(body.named_modules()):
        if isinstance(module, fx.GraphModule):
            Rewriting(module, prepared, name).run()
    tokens = _by_token(prepared.activations)
    for names, module in named(body):
        if isinstance(module, Entered) and isinstance(module.edge, Edge):
            body = replaced(body, module, entered(module, prepared, names[0]))
    for name, module in layers_of(body, DYNAMIC, prepared.kept):
        if role_of(module) != PRODUCT:
            body = replaced(body, module, dynamic(module, prepared.weights.at(name), tokens, where=name))
    body = off_the_fast_path(prepared.kept.apply(body)).eval()
    if check != "off":
        _check(prepared, body, check)
    return body


def _by_token(activations: Scheme) -> Scheme:
    """The scheme by which dynamic layers round their inputs."""
    return replace(activations, group=TOKEN, scale="f32")


def _check(prepared: Prepared, converted: nn.Module, check: Check) -> None:
    """Compare the integer module with the float one. A trained module is compared with its own fake-quantized outputs; how far
    those are from its float outputs is what quantization explains."""
    twin = in_phase(prepared, "round")
    if any(edge.phase in ("round", "follow") for edge in prepared.edges()):
        explained, expected = outputs(in_phase(prepared, "pass"), prepared.batch), outputs(twin, prepared.batch)
    else:
        layers, tokens = layers_of(twin.get_submodule("body"), DYNAMIC, prepared.kept), _by_token(prepared.activations)
        rounded_twin(twin, layers, prepared.weights, tokens, edges=True)
        explained, expected = outputs(twin, prepared.batch), outputs(prepared, prepared.batch)
    check_outputs(converted, prepared.batch, expected, explained, check, twin.get_submodule("body"))


def entered(module: Entered, prepared: Prepared, where: str) -> nn.Module:
    """The integer form of a single layer with the quantization of its input."""
    edge, layer = module.edge, module.layer
    assert isinstance(edge, Edge) and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    q, activations = weight_of(layer, prepared.weights.at(where), where), prepared.activations
    if edge.scheme.group == TOKEN:
        product = DynamicProduct.of(layer, q, activations=activations, where=where)
        product.register_forward_hook(contiguous)
        return product
    affine = edge.affine()
    static = StaticProduct(layer, q, entry=affine, exit=torch.zeros(0), activations=activations, where=where)
    return Entered(Quantize(affine, where=edge.where), static)


class Rewriting:
    """Rewrites one graph into integer operations. affines: node with integer values -> its affine (static.py)."""

    def __init__(self, graph: fx.GraphModule, prepared: Prepared, prefix: str) -> None:
        self.graph, self.prepared, self.prefix = graph, prepared, prefix
        self.affines: dict[fx.Node, Tensor] = {}
        floats = [p.dtype for p in graph.parameters() if p.is_floating_point()]
        self.dtype = floats[0] if floats else torch.float32
        self.roles = {n: role_unless_kept(graph, n, prefix, prepared.kept) for n in graph.graph.nodes}
        self.quantized: dict[str, QTensor] = {}
        self.layers: dict[fx.Node, Any] = {
            n: graph.get_submodule(str(n.target)) for n in graph.graph.nodes if n.op == "call_module"
        }

    def run(self) -> None:
        """Rewrite all nodes, in the order of computation."""
        for node in list(self.graph.graph.nodes):
            if self.is_edge(node):
                self.edge(node)
            elif self.role(node) == PRODUCT and first(node) in self.affines and not self.leads_to_edge(node):
                self.become(node, self.product(node, torch.zeros(0)), node.args[:1])
            elif self.role(node) == CARRY and first(node) in self.affines:
                self.affines[node] = self.entry(node)
                if isinstance(self.layers.get(node), nn.MaxPool1d | nn.MaxPool2d):
                    self.become(node, StaticMax(self.layers[node]), node.args)
        for node in list(self.affines):
            self.to_float(node)
        self.graph.graph.eliminate_dead_code()
        self.graph.delete_all_unused_submodules()
        self.graph.graph.lint()
        self.graph.recompile()

    def edge(self, node: fx.Node) -> None:
        """Remove an edge: it becomes the requantization of the integer operation before it, or a `Quantize`."""
        edge, source = self.layers[node], first(node)
        assert isinstance(edge, Edge) and source is not None
        if edge.scheme.group == TOKEN:
            for reader in list(node.users):
                self.become(reader, self.on_tokens(reader), (source,))
            return
        behind, affine = source, edge.affine()
        whole = affine
        before = first(source)
        if self.role(source) == RELU and before and fuses(before, self.roles):
            affine, behind = clipped(affine, bound(self.graph, source)), before
        make = MAKERS.get(self.role(behind))
        inputs = [a for a in behind.args if isinstance(a, fx.Node)]
        if make is None or not all(a in self.affines for a in inputs):
            self.become(node, Quantize(whole, where=edge.where), (source,))
        else:
            self.become(node, make(self, behind, affine), tuple(inputs))
        self.affines[node] = whole

    def become(self, node: fx.Node, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Let a node call this module instead, under the name of the layer that it replaces."""
        name = str(node.target)
        if isinstance(module, IntegerProduct):
            name = module.where.removeprefix(self.prefix).lstrip(".")
            if module.lender:
                name = f"{name}_{node.name}"  # a layer that is called twice has one integer form for each call
        self.graph.add_submodule(name, module)
        node.op, node.target, node.args, node.kwargs = "call_module", name, inputs, {}

    def product(self, node: fx.Node, exit: Tensor) -> nn.Module:
        """The static form of a Linear or convolution. exit: affine of the output, empty for float."""
        layer, where, q, lender = self.weights(node)
        activations = self.prepared.activations
        return StaticProduct(
            layer, q, entry=self.entry(node), exit=exit, activations=activations, where=where, lender=lender
        )

    def on_tokens(self, node: fx.Node) -> nn.Module:
        """The dynamic form of a Linear or convolution."""
        layer, where, q, lender = self.weights(node)
        activations = self.prepared.activations
        return DynamicProduct.of(layer, q, activations=activations, where=where, lender=lender)

    def weights(self, node: fx.Node) -> tuple[Any, str, QTensor, Any]:
        """For a product: the float layer, its name, its quantized weight, and the integer form of an earlier call, or None."""
        layer, name = self.layers[node], str(node.target)
        where = f"{self.prefix}.{name}".lstrip(".")
        if name not in self.quantized:
            self.quantized[name] = weight_of(layer, self.prepared.weights.at(where), where)
        made = self.graph.get_submodule(name)
        return layer, where, self.quantized[name], made if isinstance(made, IntegerProduct) else None

    def total(self, node: fx.Node, exit: Tensor) -> nn.Module:
        """The integer form of a sum."""
        left, right = (self.affines[a] for a in node.args if isinstance(a, fx.Node))
        return StaticAdd(left, right, exit)

    def mean(self, node: fx.Node, exit: Tensor) -> nn.Module:
        """The integer form of a mean."""
        return StaticMean(self.function(node), self.entry(node), exit)

    def table(self, node: fx.Node, exit: Tensor) -> nn.Module:
        """The integer form of a unary function: a lookup table."""
        return Table(self.function(node), self.entry(node), exit, label=str(node.target))

    def entry(self, node: fx.Node) -> Tensor:
        """The affine of a node's first argument."""
        source = first(node)
        assert source is not None
        return self.affines[source]

    def function(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """A node's operation as a function of its first argument."""
        if node.op == "call_module":
            return self.layers[node]
        return Call(node.op, node.target, tuple(node.args[1:]), dict(node.kwargs))

    def to_float(self, node: fx.Node) -> None:
        """Insert a `Dequantize` between a node with integer values and its readers that compute in float."""
        readers = [user for user in node.users if not self.reads_codes(user)]
        if not readers:
            return
        name = f"{node.name}_float"
        self.graph.add_submodule(name, Dequantize(self.affines[node], self.dtype))
        with self.graph.graph.inserting_after(node):
            new = self.graph.graph.call_module(name, (node,))
        for reader in readers:
            reader.replace_input_with(node, new)

    def reads_codes(self, node: fx.Node) -> bool:
        """Whether a node computes on integers, or reads only the shape."""
        module = self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        integer = isinstance(module, StaticProduct | StaticAdd | StaticMax | StaticMean | Table)
        return integer or (node in self.affines and self.role(node) == CARRY) or self.role(node) == SHAPE

    def leads_to_edge(self, node: fx.Node) -> bool:
        """Whether an edge follows a node, or the ReLU that is fused into it."""
        users = list(node.users)
        if fuses(node, self.roles):
            users = list(users[0].users)
        return any(self.is_edge(user) for user in users)

    def is_edge(self, node: fx.Node) -> bool:
        """Whether a node is an edge."""
        return isinstance(self.layers.get(node), Edge)

    def role(self, node: Any) -> str:
        """A node's role before rewriting; "" for anything else."""
        return self.roles.get(node, "") if isinstance(node, fx.Node) else ""


MAKERS: dict[str, Callable[[Rewriting, fx.Node, Tensor], nn.Module]] = {
    PRODUCT: Rewriting.product,
    ADD: Rewriting.total,
    MEAN: Rewriting.mean,
    UNARY: Rewriting.table,
    RELU: Rewriting.table,
}


@dataclass(frozen=True)
class Call:
    """A function or method call in a graph, as a function of its first argument."""

    op: str
    target: Any
    others: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        if self.op == "call_method":
            return getattr(x, self.target)(*self.others, **self.named)
        return self.target(x, *self.others, **self.named)


def clipped(affine: Tensor, highest: float) -> Tensor:
    """Fuse a ReLU into an affine: codes are clamped to those of 0 and `highest`."""
    scale, zero, low, high = affine.tolist()
    top = min(high, zero + round(min(highest, 256 * scale) / scale))
    return torch.tensor([scale, zero, max(low, zero), top])
