"""A module as a graph of operations, each in one of a few roles.

Graphs are torch.fx's, which call the module's own layers: names, hooks and patterns of `keep` stay those of the module.
torch.export would follow more of Python, but for the shapes that it saw alone, and gives back operators on loose tensors. What
fx cannot trace is taken apart instead: its products become integers all the same, and what passes between them stays float.
"""

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import type_before_parametrizations

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

# What each operation is to integer arithmetic. A product or a sum is computed in integers, a mean of codes too; a function
# of one value becomes a table of 256; what only moves values moves codes as well. Everything else stays in float.
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
    torch.flatten: CARRY, torch.reshape: CARRY, torch.permute: CARRY, torch.transpose: CARRY, torch.squeeze: CARRY,
    torch.unsqueeze: CARRY, functional.dropout: CARRY,
    getattr: SHAPE,
}  # fmt: skip
MATMULS = (
    operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum, functional.linear, functional.conv1d,
    functional.conv2d,
)  # fmt: skip
METHODS: dict[str, str] = {
    "add": ADD, "add_": ADD, "relu": RELU, "relu_": RELU, "sigmoid": UNARY, "tanh": UNARY,
    **dict.fromkeys(("view", "reshape", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"), CARRY),
    "size": SHAPE, "dim": SHAPE,
}  # fmt: skip
BOUNDS: dict[Any, float] = {nn.ReLU6: 6.0, functional.relu6: 6.0}  # of those in role RELU: how far up they go


class Tracer(fx.Tracer):
    """Modules of torch.nn with nothing inside, and attention, are single operations; all others are looked into."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("torch.nn") or isinstance(m, nn.MultiheadAttention)
        return own and (not list(m.children()) or isinstance(m, nn.MultiheadAttention))


def traced(module: nn.Module, given: int) -> fx.GraphModule | str:
    """The module, called with so many tensors, as a graph that shares its parameters; or why it cannot be one."""
    if type(module).__module__.startswith("torch.nn.modules") and not list(module.children()):
        module = nn.Sequential(module)
    others = list(inspect.signature(module.forward).parameters.values())[given:]
    fixed = {other.name: other.default for other in others if other.kind is other.POSITIONAL_OR_KEYWORD}
    try:
        graph = Tracer().trace(module, fixed or None)
    except Exception as error:  # noqa: BLE001  a trace runs foreign code on values that are not there yet
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return fx.GraphModule(module, graph, type(module).__name__)


def role(graph: fx.GraphModule, node: fx.Node) -> str:
    """What a node is to integer arithmetic."""
    if node.op == "call_module":
        return MODULES.get(kind(graph.get_submodule(str(node.target))), OTHER)
    if node.op == "call_method":
        return METHODS.get(str(node.target), OTHER)
    if node.op == "call_function" and callable(node.target):
        return FUNCTIONS.get(node.target, OTHER)
    return OTHER


def kind(module: nn.Module) -> type[nn.Module]:
    """The module's own class, its weights parametrized or not."""
    found: type[nn.Module] = type_before_parametrizations(module)
    return found


def bound(graph: fx.GraphModule, node: fx.Node) -> float:
    """How far up a node in role RELU goes."""
    found = type(graph.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    return BOUNDS.get(found, float("inf"))


def fold_norms(graph: fx.GraphModule) -> None:
    """Batch norms behind a Linear or convolution that nothing else reads become part of it, with their statistics frozen."""
    for node in list(graph.graph.nodes):
        before = first(node)
        if node.op != "call_module" or before is None or before.op != "call_module":
            continue
        fused = _fused(graph.get_submodule(str(before.target)), graph.get_submodule(str(node.target)))
        if fused is not None and len(before.users) == 1 and _calls(graph, before) == 1:
            graph.set_submodule(str(before.target), fused)
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """A new layer that computes norm(layer(x)); None where there is none."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) or norm.running_mean is None:
        return None
    layer, norm = copy.deepcopy(layer).eval(), copy.deepcopy(norm).eval()
    fused: nn.Linear | nn.Conv1d | nn.Conv2d
    if isinstance(layer, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
        fused = fuse_linear_bn_eval(layer, norm)
    elif isinstance(layer, nn.Conv1d if isinstance(norm, nn.BatchNorm1d) else nn.Conv2d):
        fused = fuse_conv_bn_eval(layer, norm)
    else:
        return None
    for parameter in fused.parameters():  # a bias that the layer did not have would not be trained
        parameter.requires_grad_(layer.weight.requires_grad)
    return fused


def bare_weights(graph: fx.GraphModule) -> list[str]:
    """Names of parameters that products read without a layer of torch.nn."""
    read = [n for n in graph.graph.nodes if n.op == "get_attr" and any(user.target in MATMULS for user in n.users)]
    parameters = dict(graph.named_parameters())
    return [str(n.target) for n in read if str(n.target) in parameters]


def first(node: fx.Node) -> fx.Node | None:
    """The node that a node reads first."""
    found = node.args[0] if node.args else None
    return found if isinstance(found, fx.Node) else None


def _calls(graph: fx.GraphModule, node: fx.Node) -> int:
    """How often the module of a node is called."""
    return sum(other.op == "call_module" and other.target == node.target for other in graph.graph.nodes)
