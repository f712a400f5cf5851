"""Normalize a traced graph: in-place operations become functional, keyword arguments positional, functional calls layers."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bitwright.nn.layout import reads_views
from bitwright.nn.trace import Interpreter, first
from bitwright.nn.tree import Kept

# In-place operators, and those that give the same as a new tensor.
IN_PLACE: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    operator.imatmul: operator.matmul,
}  # fmt: skip


def functionalized(graph: fx.GraphModule, example: tuple[Any, ...], *, root: bool) -> str | None:
    """Replace all in-place operations of a graph; returns None, or the reason why that is not possible.

    example: the inputs, on which the graph is run to see what changes in place. root: the graph is the whole module, whose
    inputs nobody reads afterwards. Nodes with tensors get meta["shape"].
    """
    _positional(graph)
    watched = _Watched(graph)
    try:
        with torch.no_grad():
            watched.run(*example)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"its graph cannot be run: {error}".splitlines()[0]
    if not root and watched.inputs_changed():
        return "it changes its input in place"
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    reasons = (_obstacle(graph, node, changed, order) for node, changed in watched.changes.items())
    reason = next((reason for reason in reasons if reason), None)
    if reason:
        return reason
    for node, changed in watched.changes.items():
        _functional_form(graph, node)
        for before in (each for each, same in changed.items() if same or node.target is with_item):
            later = {user for user in before.users if order[user] > order[node]}
            before.replace_all_uses_with(node, delete_user_cb=later.__contains__)
    _of_any_layout(graph, root=root)
    graph.graph.lint()
    graph.recompile()
    return None


def _of_any_layout(graph: fx.GraphModule, *, root: bool) -> None:
    """Let `reshape` do what `view` does, which integer convolutions' results, channels last in memory, do not allow; and give
    results that may be viewed to who reads a graph that is a part of a module."""
    for node in filter(reads_views, graph.graph.nodes):
        node.target = str(node.target).replace("view", "reshape")
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    for node in () if root else output.all_input_nodes:
        if len(node.meta.get("shape", ())) > 2:
            with graph.graph.inserting_before(output):
                laid_out = graph.graph.call_method("contiguous", (node,))
            laid_out.meta["shape"] = node.meta["shape"]
            output.replace_input_with(node, laid_out)


class _Watched(Interpreter):
    """Interprets a graph, and detects by torch's version counters which tensors each node changes in place.

    changes: node -> the nodes whose values it changed, and whether each is the same tensor as its result.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.changes: dict[fx.Node, dict[fx.Node, bool]] = {}
        self.versions: dict[fx.Node, int] = {}
        self.given: list[tuple[Tensor, int]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder" and isinstance(result, Tensor):
            result = result.detach()  # shares memory and version with what was given
            self.given.append((result, result._version))
        changed = {m: _same(x, result) for m, x in self.env.items() if self._has_changed(m, x)}
        if getattr(self._module(n), "inplace", False):
            changed |= {m: True for m in n.args[:1] if isinstance(m, fx.Node)}
        if changed:
            self.changes[n] = changed
        if isinstance(result, Tensor):
            self.versions[n] = result._version
            n.meta["shape"] = tuple(result.shape)
        return result

    def _has_changed(self, node: fx.Node, x: Any) -> bool:
        if not isinstance(x, Tensor) or x._version == self.versions[node]:
            return False
        self.versions[node] = x._version
        return True

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def inputs_changed(self) -> bool:
        return any(x._version != version for x, version in self.given)


def _same(x: Tensor, result: Any) -> bool:
    """Whether a result is the tensor x: same memory, shape and strides."""
    return isinstance(result, Tensor) and (x.data_ptr(), x.shape, x.stride()) == (
        result.data_ptr(),
        result.shape,
        result.stride(),
    )


def _obstacle(
    graph: fx.GraphModule, node: fx.Node, changed: dict[fx.Node, bool], order: dict[fx.Node, int]
) -> str | None:
    """The reason why an in-place operation cannot be replaced by a functional one; None if it can."""
    if not _functional_form(graph, node, only_ask=True):
        return f"{node.name} changes its input in place, and has no other form"
    for before, same in changed.items():
        if before.op == "get_attr":
            return f"{node.name} changes the module's own {before.target!r}"
        whole = same or (node.target is operator.setitem and before is first(node))
        written_back = node.next.target is operator.setitem and node.next.args[0::2] == (before, node)  # x[i] += y
        if not (whole or written_back) and any(order[user] > order[node] for user in before.users):
            return f"{node.name} changes in place a part of what is read later"
    return None


def _functional_form(graph: fx.GraphModule, node: fx.Node, *, only_ask: bool = False) -> bool:
    """Replace a node's in-place operation by the functional one; False if there is none. only_ask: do not replace."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(getattr(module, "inplace", None), bool) and not only_ask:
            module.inplace = False  # type: ignore[assignment]
        return isinstance(getattr(module, "inplace", None), bool)
    target, args, kwargs = _functional_call(node)
    if target is not None and not only_ask:
        node.target, node.args, node.kwargs = target, args, kwargs
    return target is not None


def _functional_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target and arguments of the functional form, such as x.add(y) for x.add_(y), F.relu(x) for F.relu_(x) or inplace=True;
    target None if there is none."""
    target, args, kwargs = node.target, node.args, node.kwargs
    name = str(target) if isinstance(target, str) else getattr(target, "__name__", "")
    plain = name[:-1] if name.endswith("_") and not name.startswith("_") else ""
    if isinstance(target, str):
        return plain if plain and hasattr(Tensor, plain) else None, args, kwargs
    if target is operator.setitem:
        return with_item, args, kwargs
    if target in IN_PLACE:
        return IN_PLACE[target], args, kwargs
    if plain:
        return getattr(functional, plain, None) or getattr(torch, plain, None), args, kwargs
    if target.__module__ == "torch.nn.functional":
        bound = inspect.signature(target).bind(*args, **kwargs)
        if bound.arguments.get("inplace"):
            bound.arguments["inplace"] = False
            return target, bound.args, bound.kwargs
    return None, args, kwargs


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """x after x[index] = value, as a new tensor."""
    x = x.clone()
    x[index] = value
    return x


def _positional(graph: fx.GraphModule) -> None:
    """Make keyword arguments positional (layer(input=x), torch.add(input=a, other=b)), as the other passes expect."""
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.kwargs:
            bound = inspect.signature(graph.get_submodule(str(node.target)).forward).bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        elif node.op == "call_function" and not node.args and "input" in node.kwargs:
            named = dict(node.kwargs)
            node.args = tuple(named.pop(name) for name in ("input", "other") if name in named)
            node.kwargs = named


# -------------------------------------------------------------------------------------------------- functional products

GEOMETRY = ("stride", "padding", "dilation", "groups")
CONVOLUTIONS: dict[Callable[..., Any], type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    functional.conv1d: nn.Conv1d, functional.conv2d: nn.Conv2d, functional.conv3d: nn.Conv3d,
}  # fmt: skip


def lift_products(graph: fx.GraphModule, prefix: str, kept: Kept) -> set[int]:
    """Replace F.linear and F.conv* with parameters as weights by layers; returns the ids of these weights."""
    parameters = dict(graph.named_parameters())
    lifted: set[int] = set()
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or (node.target is not functional.linear and node.target not in CONVOLUTIONS):
            continue
        named = dict(zip(("input", "weight", "bias", *GEOMETRY), node.args, strict=False)) | node.kwargs
        held = [_held(named.get(name), parameters) for name in ("weight", "bias")]
        if held[0] is None or (held[1] is None and named.get("bias") is not None):
            continue
        if kept.covers(f"{prefix}.{named['weight'].target}".lstrip(".")) or not _constant(named):
            continue
        layer = _layer(node.target, held[0], held[1], {name: named[name] for name in GEOMETRY if name in named})
        lifted.add(id(held[0]))
        name = _free_name(graph, str(named["weight"].target).rpartition(".")[0], node)
        graph.add_submodule(name, layer)
        node.op, node.target, node.args, node.kwargs = "call_module", name, (named["input"],), {}
        read = [named[each].target for each in ("weight", "bias") if named.get(each) is not None]
        graph.graph.eliminate_dead_code()
        for target in read:
            forget(graph, str(target))
    graph.recompile()
    return lifted


def forget(graph: fx.GraphModule, target: str) -> None:
    """Remove a parameter that no node reads any more, unless a layer holds it."""
    owner, _, name = target.rpartition(".")
    if any(node.op == "get_attr" and node.target == target for node in graph.graph.nodes):
        return
    holder = graph.get_submodule(owner)
    if holder is graph or type(holder) is nn.Module:
        holder._parameters.pop(name, None)


POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
POOLS: dict[Callable[..., Any], type[nn.Module]] = {
    functional.max_pool1d: nn.MaxPool1d, functional.max_pool2d: nn.MaxPool2d,
    torch.max_pool1d: nn.MaxPool1d, torch.max_pool2d: nn.MaxPool2d,
}  # fmt: skip


def lift_calls(graph: fx.GraphModule, training: dict[str, float]) -> None:
    """Replace functional max pools, which have an integer form, and F.dropout by layers; dropout then follows training mode.

    training: name of each F.dropout node that is active in training -> its rate.
    """
    for node in list(graph.graph.nodes):
        named = dict(zip(POOL, node.args, strict=False)) | node.kwargs
        if node.op == "call_function" and node.target in POOLS and isinstance(named.get("input"), fx.Node):
            x = named.pop("input")
            if any(isinstance(value, fx.Node) for value in named.values()):
                continue
            layer = POOLS[node.target](**named)
        elif node.name in training:
            x, layer = first(node), nn.Dropout(training[node.name])
        else:
            continue
        graph.add_submodule(f"{node.name}_layer", layer.train(graph.training))
        node.op, node.target, node.args, node.kwargs = "call_module", f"{node.name}_layer", (x,), {}
    graph.recompile()


def _held(node: Any, parameters: dict[str, nn.Parameter]) -> nn.Parameter | None:
    read = isinstance(node, fx.Node) and node.op == "get_attr"
    return parameters.get(str(node.target)) if read else None


def _constant(named: dict[str, Any]) -> bool:
    """Whether a convolution's stride, padding, dilation and groups are constants."""
    return not any(isinstance(named.get(name), fx.Node) for name in GEOMETRY)


def _layer(function: Any, weight: nn.Parameter, bias: nn.Parameter | None, geometry: dict[str, Any]) -> nn.Module:
    has_bias = bias is not None
    layer: nn.Module
    if function is functional.linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta")
    else:
        channels = weight.shape[1] * geometry.get("groups", 1)
        kernel = tuple(weight.shape[2:])
        layer = CONVOLUTIONS[function](
            channels, weight.shape[0], kernel, bias=has_bias, device="meta", **geometry  # type: ignore[arg-type]
        )  # fmt: skip
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer.train(False)


def _free_name(graph: fx.GraphModule, owner: str, node: fx.Node) -> str:
    """A name for a new layer: that of the module that held the weight, if nothing else of it is used; else the node's."""
    path = f"{owner}."
    users = [n for n in graph.graph.nodes if n.op in ("call_module", "get_attr") and str(n.target).startswith(path)]
    alone = all(set(n.users) == {node} for n in users)
    called = any(n.op == "call_module" and n.target == owner for n in graph.graph.nodes)
    return owner if owner and alone and not called else f"{node.name}_layer"
