"""Integer convolutions give results whose channels are last in memory: where a forward cannot have that, and what helps."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.nn.trace import traced

VIEWS = ("view", "view_as")


def reads_views(node: fx.Node) -> bool:
    """Whether a node is `x.view(sizes)` or `x.view_as(y)`, which not all layouts in memory allow."""
    to_type = any(isinstance(each, torch.dtype) for each in (*node.args, *node.kwargs.values()))
    return node.op == "call_method" and node.target in VIEWS and not to_type


def viewed(module: nn.Module, layers: Iterable[str]) -> set[str]:
    """Which of these layers' results a module views, as they are or after operations; all where it cannot be traced."""
    names = set(layers)
    needed = inspect.signature(module.forward).parameters.values()
    given = {p.name: torch.zeros(0) for p in needed if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    graph = traced(module, given)
    if isinstance(graph, str):
        return names
    found = set[str]()
    for node in filter(reads_views, graph.graph.nodes):
        for source in _behind(node, names):
            found |= {name for name in names if f"{name}.".startswith(f"{source}.")}
    return found


def _behind(node: fx.Node, names: set[str]) -> Iterator[str]:
    """The nearest modules before a node that are, or hold, one of the layers."""
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        before = waiting.pop()
        target = str(before.target)
        if before.op == "call_module" and any(f"{name}.".startswith(f"{target}.") for name in names):
            yield target
        elif before not in seen:
            waiting += before.all_input_nodes
        seen.add(before)


def contiguous(_: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> Tensor:
    """A forward hook: the result contiguous in memory, as a float layer's is."""
    return result.contiguous()
