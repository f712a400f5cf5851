"""Decide which activations of a graph are quantized to integer codes, and which stay in float."""

from torch import fx, nn

from bitwright.nn.trace import ADD, CARRY, MEAN, OTHER, PRODUCT, RELU, UNARY, first, role
from bitwright.nn.tree import Kept, kind

FOLLOWS = (
    ADD,
    MEAN,
    UNARY,
    RELU,
    CARRY,
)  # computed on codes only if their inputs are codes and a product needs the result


def role_unless_kept(graph: fx.GraphModule, node: fx.Node, prefix: str, kept: Kept) -> str:
    """A node's role; OTHER (float) for modules kept in float, and pools without an integer form."""
    if node.op == "call_module":
        layer = graph.get_submodule(str(node.target))
        if has_no_integer_form(layer) or kept.covers(f"{prefix}.{node.target}".lstrip(".")):
            return OTHER
    return role(graph, node) if first(node) is not None else OTHER


def has_no_integer_form(layer: nn.Module) -> bool:
    """Whether a pool (ceil_mode, return_indices) has no integer form here."""
    return isinstance(layer, nn.MaxPool1d | nn.MaxPool2d) and (layer.ceil_mode or layer.return_indices)


def role_of(module: nn.Module) -> str:
    """PRODUCT for Linear and convolutions, else OTHER."""
    return PRODUCT if kind(module) in (nn.Linear, nn.Conv1d, nn.Conv2d) else OTHER


def fuses(node: fx.Node, roles: dict[fx.Node, str]) -> bool:
    """Whether a product or sum is followed by a ReLU only, which is then fused into it."""
    users = list(node.users)
    return roles[node] in (PRODUCT, ADD) and len(users) == 1 and roles.get(users[0]) == RELU


def codes(graph: fx.GraphModule, roles: dict[fx.Node, str]) -> set[fx.Node]:
    """The nodes whose values will be integer codes.

    A product's result is, if another product reads it, directly or through operations that work on codes. Such an operation
    needs codes for all of its inputs; otherwise it becomes OTHER in `roles`, and the search is repeated.
    """
    nodes = list(graph.graph.nodes)
    while True:
        wanted: set[fx.Node] = set()
        for node in reversed(nodes):
            if any(roles[u] == PRODUCT or (roles[u] in FOLLOWS and u in wanted) for u in node.users):
                wanted.add(node)
        emits: set[fx.Node] = set()
        for node in nodes:
            if node in wanted and (
                roles[node] == PRODUCT or (roles[node] in FOLLOWS and _all_codes(node, roles, emits))
            ):
                emits.add(node)
        lacking = [node for node in wanted - emits if roles[node] in FOLLOWS]
        if not lacking:
            return emits
        roles.update(dict.fromkeys(lacking, OTHER))


def _all_codes(node: fx.Node, roles: dict[fx.Node, str], emits: set[fx.Node]) -> bool:
    """Whether a node's inputs are codes: both operands of a sum, the first argument of any other operation."""
    if roles[node] == ADD:
        return len(node.args) == 2 and all(isinstance(a, fx.Node) and a in emits for a in node.args) and not node.kwargs
    return bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0] in emits
