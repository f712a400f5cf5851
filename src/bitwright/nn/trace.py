"""Trace a module into a torch.fx graph, and classify its operations by how integer arithmetic handles them.

torch.fx keeps the module's own layers, so that names, hooks and patterns of `keep` still apply. torch.export would trace more
of Python, but specializes on the example's shapes, and gives operators on loose tensors instead of layers. In a module that fx
cannot trace, layers are still quantized one by one, and the activations between them stay in float. Only ONNX files, which need
a graph, are made from torch.export's there (exported.py).
"""

import copy
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import has_side_effect
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from bitwright.errors import RecipeError
from bitwright.nn.batches import draws
from bitwright.nn.rearranged import LEAVES
from bitwright.nn.tree import kind

PRODUCT, ADD, MEAN, UNARY, RELU, CARRY, SHAPE, OTHER = [
    "product",
    "add",
    "mean",
    "unary",
    "relu",
    "carry",
    "shape",
    "other",
]

# Roles of operations. PRODUCT, ADD and MEAN have integer forms; a UNARY function becomes a table of 256 values; RELU is fused
# or becomes a table; CARRY only moves values or takes maxima, and works on codes as well; SHAPE reads sizes; OTHER is float.
MODULES: dict[type[nn.Module], str] = {
    nn.Linear: PRODUCT, nn.Conv1d: PRODUCT, nn.Conv2d: PRODUCT,
    nn.ReLU: RELU, nn.ReLU6: RELU,
    nn.AvgPool1d: MEAN, nn.AvgPool2d: MEAN, nn.AdaptiveAvgPool1d: MEAN, nn.AdaptiveAvgPool2d: MEAN,
    nn.GELU: UNARY, nn.SiLU: UNARY, nn.Sigmoid: UNARY, nn.Tanh: UNARY, nn.Hardswish: UNARY, nn.Hardsigmoid: UNARY,
    nn.ELU: UNARY, nn.LeakyReLU: UNARY, nn.Softplus: UNARY, nn.Mish: UNARY,
    nn.Identity: CARRY, nn.Flatten: CARRY, nn.Unflatten: CARRY, nn.MaxPool1d: CARRY, nn.MaxPool2d: CARRY,
    nn.Dropout: CARRY, nn.Dropout1d: CARRY, nn.Dropout2d: CARRY,
}  # fmt: skip
FUNCTIONS: dict[Callable[..., Any], str] = {
    operator.add: ADD, operator.iadd: ADD, torch.add: ADD,
    functional.relu: RELU, torch.relu: RELU, functional.relu6: RELU,
    functional.avg_pool1d: MEAN, functional.avg_pool2d: MEAN,
    functional.adaptive_avg_pool1d: MEAN, functional.adaptive_avg_pool2d: MEAN,
    functional.gelu: UNARY, functional.silu: UNARY, functional.hardswish: UNARY, functional.leaky_relu: UNARY,
    functional.elu: UNARY, torch.sigmoid: UNARY, functional.sigmoid: UNARY, torch.tanh: UNARY, functional.tanh: UNARY,
    functional.hardsigmoid: UNARY, functional.mish: UNARY, functional.softplus: UNARY,
    torch.flatten: CARRY, torch.reshape: CARRY, torch.permute: CARRY, torch.transpose: CARRY, torch.squeeze: CARRY,
    torch.unsqueeze: CARRY, functional.dropout: CARRY,
    getattr: SHAPE,
}  # fmt: skip
METHODS: dict[str, str] = {
    "add": ADD, "relu": RELU, "sigmoid": UNARY, "tanh": UNARY,
    **dict.fromkeys(("view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"), CARRY),
    "size": SHAPE, "dim": SHAPE,
}  # fmt: skip
BOUNDS: dict[Any, float] = {nn.ReLU6: 6.0, functional.relu6: 6.0}  # upper bounds of operations in role RELU


class Tracer(fx.Tracer):
    """A torch.fx tracer: torch.nn modules without children, and attention, are single operations; others are traced into.

    fixed: arguments of the forward that are no tensors, and become constants; the graph refuses other values for them.
    """

    def __init__(self, fixed: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.fixed = fixed or {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy for a node's value."""
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        """As torch.fx's. TypeError for a mapping of a class of its own (transformers' outputs), which would become a dict."""
        if isinstance(a, dict) and type(a) not in MAPPINGS:
            raise TypeError(f"a graph does not keep a {type(a).__name__}")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, LEAVES):
            return True
        own = kind(m).__module__.startswith("torch.nn.modules") and not isinstance(m, CONTAINERS)
        return own and (not list(m.children()) or isinstance(m, nn.MultiheadAttention))

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        """Placeholders for all arguments of the forward; the fixed ones are replaced by their values inside."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args):
            name = str(arg.node.target) if isinstance(arg, fx.Proxy) else ""
            if name in self.fixed:
                self.create_proxy("call_function", require_same, (arg, self.fixed[name], name), {})
                args[i] = self.fixed[name]
        return function, args


class Interpreter(fx.Interpreter):
    """torch.fx's, but functions get plain lists and dicts, as from the graph's code: they may change them."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {name: _mutable(value) for name, value in kwargs.items()}


class Recorder(Interpreter):
    """Interprets a graph; `of` has the value of every node, with what `keep` makes of each tensor in it."""

    def __init__(self, graph: fx.GraphModule, keep: Callable[[Tensor], Any]) -> None:
        super().__init__(graph)
        self.keep, self.of = keep, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.of[n] = fx.node.map_aggregate(result, lambda x: self.keep(x) if isinstance(x, Tensor) else x)
        return result


def _mutable(x: Any) -> Any:
    if type(x) is immutable_list:
        return [_mutable(each) for each in x]
    return {key: _mutable(value) for key, value in x.items()} if type(x) is immutable_dict else x


MAPPINGS = (dict, OrderedDict, immutable_dict)


class Value(fx.Proxy):
    """A proxy that records in-place operations: torch.fx's own would trace `x += y` as `x = x + y`."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")


def _in_place(name: str) -> Callable[[Value, Any], Any]:
    function = getattr(operator, f"__i{name}__")
    return lambda x, y: x.tracer.create_proxy("call_function", function, (x, y), {})


for _name in IN_PLACE:
    setattr(Value, f"__i{_name}__", _in_place(_name))


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def require_same(value: Any, expected: Any, name: str) -> Any:
    """RecipeError if an argument is not the value that was fixed when the graph was traced."""
    if isinstance(value, fx.Proxy):  # torch.fx traces a graph again when it is loaded from a file
        return value.tracer.create_proxy("call_function", require_same, (value, expected, name), {})
    if value is not expected and (isinstance(value, Tensor) or value != expected):
        message = f"the argument {name!r} was {expected!r} in example_inputs, and the graph was made for that"
        raise RecipeError(message, where=name, remedy=f"prepare the module with example_inputs that give {name!r}")
    return None


has_side_effect(require_same)
VARIOUS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SIMPLE = (bool, int, float, str, type(None))
PRESERVED = "_user_preserved_attributes"  # torch.fx's name for attributes that a copy of a graph keeps


def traced(module: nn.Module, given: Mapping[str, Any]) -> fx.GraphModule | str:
    """Trace a module into a graph that shares its weights; or the reason why it cannot be traced.

    given: the arguments of the forward by name. Tensors become the graph's inputs; all others must be simple values, equal to
    the defaults, and are fixed.
    """
    fixed = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        required = parameter.default is parameter.empty
        value = given.get(name, None if required else parameter.default)
        if isinstance(value, Tensor) or (parameter.kind in VARIOUS and not value):
            continue
        if not isinstance(value, SIMPLE) or (name in given and not required and value != parameter.default):
            return f"its argument {name!r} is no tensor"
        fixed[name] = value
    try:
        graph, random = draws(lambda: Tracer(fixed).trace(module))
    except Exception as error:  # noqa: BLE001  a trace runs foreign code on values that are not there yet
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if random:
        return "it draws random numbers, which a graph would keep for ever"
    made = fx.GraphModule(module, graph, type(module).__name__)
    simple = {name: value for name, value in vars(module).items() if name not in vars(made) and _simple(value)}
    made.meta[PRESERVED] = simple  # torch.fx copies these; what holds the module may read them
    for name, value in simple.items():
        setattr(made, name, value)
    return made


def _simple(value: Any) -> bool:
    return isinstance(value, SIMPLE) or (isinstance(value, tuple | list) and all(map(_simple, value)))


def dropped_in_training(module: nn.Module, given: Mapping[str, Any], graph: fx.GraphModule) -> dict[str, float] | str:
    """F.dropout node -> its rate in training mode; or the reason why the graph in training mode is another."""
    modes = {child: child.training for child in module.modules()}
    module.train()
    try:
        other = traced(module, given)
    finally:
        for child, mode in modes.items():
            child.training = mode
    if isinstance(other, str):
        return other
    rates: dict[str, float] = {}
    for a, b in zip_longest(graph.graph.nodes, other.graph.nodes):
        if a is None or b is None or (a.op, a.target, a.name) != (b.op, b.target, b.name):
            return "it computes something else in training mode"
        if a.target is functional.dropout:
            bound = inspect.signature(functional.dropout).bind(*b.args, **b.kwargs)
            bound.apply_defaults()
            rates |= {a.name: bound.arguments["p"]} if bound.arguments["training"] else {}
        elif (str(a.args), str(a.kwargs)) != (str(b.args), str(b.kwargs)):
            return "it computes something else in training mode"
    return rates


def role(graph: fx.GraphModule, node: fx.Node) -> str:
    """The role of a node: PRODUCT, ADD, …, OTHER."""
    if node.op == "call_module":
        return MODULES.get(kind(graph.get_submodule(str(node.target))), OTHER)
    if node.op == "call_method":
        return METHODS.get(str(node.target), OTHER)
    if node.op == "call_function" and callable(node.target):
        return FUNCTIONS.get(node.target, OTHER)
    return OTHER


def bound(graph: fx.GraphModule, node: fx.Node) -> float:
    """The upper bound of a node in role RELU; inf for a plain ReLU."""
    found = kind(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return BOUNDS.get(found, float("inf"))


def fold_norms(graph: fx.GraphModule, example: tuple[Any, ...]) -> None:
    """Fold batch norms into the Linear or convolution before them, with frozen statistics, if nothing else reads its result.

    example: values of the graph's inputs. Behind a Linear, a norm's channels are its outputs only where there are rows alone.
    """
    rows = _ranks(graph, example)
    for node in list(graph.graph.nodes):
        before = first(node)
        if node.op != "call_module" or before is None or before.op != "call_module":
            continue
        fused = _fused(graph.get_submodule(str(before.target)), graph.get_submodule(str(node.target)))
        rowwise = not isinstance(fused, nn.Linear) or rows.get(before) == 2
        if fused is not None and rowwise and len(before.users) == 1 and _calls(graph, before) == 1:
            graph.set_submodule(str(before.target), fused)
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


@torch.no_grad()
def _ranks(graph: fx.GraphModule, example: tuple[Any, ...]) -> dict[fx.Node, int]:
    """The number of dimensions of each node's tensor; none are looked at without a batch norm of one dimension."""
    recorder = Recorder(graph, lambda t: t.ndim)
    if any(isinstance(module, nn.BatchNorm1d) for module in graph.modules()):
        recorder.run(*example)
    return recorder.of


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """A new layer that computes norm(layer(x)); None if the two cannot be fused."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
        return None
    layer, norm = copy.deepcopy(layer).eval(), copy.deepcopy(norm).eval()
    fused: nn.Linear | nn.Conv1d | nn.Conv2d
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d) and layer.out_features == norm.num_features:
        fused = fuse_linear_bn_eval(layer, norm)
    elif isinstance(layer, nn.Conv1d if isinstance(norm, nn.BatchNorm1d) else nn.Conv2d):
        fused = fuse_conv_bn_eval(layer, norm)
    else:
        return None
    for parameter in fused.parameters():  # a bias that the fusion has added would not be trained otherwise
        parameter.requires_grad_(layer.weight.requires_grad)
    return fused


def first(node: fx.Node) -> fx.Node | None:
    """A node's first argument, if it is a node."""
    found = node.args[0] if node.args else None
    return found if isinstance(found, fx.Node) else None


def _calls(graph: fx.GraphModule, node: fx.Node) -> int:
    """The number of calls of a node's module in the graph."""
    return sum(other.op == "call_module" and other.target == node.target for other in graph.graph.nodes)
