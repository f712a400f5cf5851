"""Trace a module into graphs, and insert an `Edge` (observer, fake quantization) where activations will be quantized."""

from typing import Any

from torch import fx, nn

from bitwright.errors import RecipeError
from bitwright.nn.arguments import arguments, one_way
from bitwright.nn.batches import Batch, bound, cloned
from bitwright.nn.dynamic import DYNAMIC, bare_weight, read_by_products
from bitwright.nn.fake import Edge
from bitwright.nn.functionalize import forget, functionalized, lift_calls, lift_products
from bitwright.nn.layers import check_group
from bitwright.nn.plan import codes, fuses, role_of, role_unless_kept
from bitwright.nn.rounded import ROUNDED, Entered, HeldWeight
from bitwright.nn.trace import CARRY, OTHER, PRODUCT, dropped_in_training, fold_norms, traced
from bitwright.nn.tree import Kept, copied, kind
from bitwright.nn.weight_schemes import WeightSchemes
from bitwright.numerics.scheme import TOKEN, Scheme


class Maker:
    """Turns a tree of modules into graphs with edges.

    training  for quantization-aware training, not only for eval mode
    whole     the root may become one graph; else only modules within it
    """

    def __init__(
        self,
        root: nn.Module,
        example: Batch,
        weights: WeightSchemes,
        activations: Scheme,
        observer: str,
        percentile: float | None,
        kept: Kept,
        training: bool,
        *,
        whole: bool = True,
    ) -> None:
        self.root, self.example, self.training, self.whole = root, example, training, whole
        self.weights, self.activations, self.kept = weights, activations, kept
        self.observer, self.percentile = observer, percentile
        self.multiplied = bare_names(root, kept, example)
        self.calls: dict[str, list[dict[str, Any]]] = {}
        self.done: dict[int, nn.Module] = {}

    def made(self, module: nn.Module, name: str) -> nn.Module:
        """The module as a graph with edges if it can be traced; else itself, with its children turned into graphs."""
        if id(module) not in self.done:
            self.done[id(module)] = self._made(module, name)
        return self.done[id(module)]

    def _made(self, module: nn.Module, name: str) -> nn.Module:
        if self.kept.covers(name) or (kind(module) in DYNAMIC and role_of(module) == OTHER):
            return module
        if role_of(module) == PRODUCT:
            return self.entered(module, name)
        graph = self.graph(module, name)
        if isinstance(graph, str):
            self.refuse_own_weights(module, name, graph)
            if not name:
                self.calls = arguments(self.root, self.example)
            for child_name, child in list(module._modules.items()):
                full = f"{name}.{child_name}".lstrip(".")
                if child is not None and not (self.training and self.unreached(child, full)):
                    setattr(module, child_name, self.made(child, full))
            return module
        self.insert_edges(graph, name)
        return graph

    def unreached(self, module: nn.Module, name: str) -> bool:
        """Whether the example calls neither a module nor any submodule, as an auxiliary head for training; it stays float."""
        inside = (f"{name}.{path}".rstrip(".") for path, _ in module.named_modules(remove_duplicate=False))
        return not any(path in self.calls for path in inside)

    def entered(self, module: nn.Module, name: str) -> Entered:
        """A single layer with an edge at its input."""
        check_group(self.weights.at(name), module, name)
        return Entered(self.edge(f"{name}.input".lstrip("."), images=not isinstance(module, nn.Linear)), module)

    def graph(self, module: nn.Module, name: str) -> fx.GraphModule | str:
        """The module as a graph without in-place operations, whose products are layers; or the reason why it has none."""
        if type(module).__module__.startswith("torch.nn.modules") and not list(module.children()):
            return "a single operation"
        if not (name or self.whole):
            return "its graph computes something else"
        given = bound(module, self.example) if not name else one_way(self.calls.get(name, []))
        if isinstance(given, str):
            return given
        graph = traced(module, given)
        if isinstance(graph, str):
            return graph
        dropped = dropped_in_training(module, given, graph) if self.training else {}
        if isinstance(dropped, str):
            return dropped
        inputs = [
            given.get(str(n.target), next(iter(n.args), None)) for n in graph.graph.nodes if n.op == "placeholder"
        ]
        reason = functionalized(graph, cloned(tuple(inputs)), root=not name)
        if reason:
            return reason
        lifted = lift_products(graph, name, self.kept)
        lift_calls(graph, dropped)
        held = hold_weights(graph, module, name, self.kept)
        for weight, p in graph.named_parameters():
            full = f"{name}.{weight}".lstrip(".")
            if full in self.multiplied and id(p) not in lifted | held:
                raise bare_weight(full)
        fold_norms(graph, cloned(tuple(inputs)))
        return graph

    def refuse_own_weights(self, module: nn.Module, name: str, reason: str) -> None:
        """RecipeError for a module that cannot be traced and uses a weight of its own in a product: it would stay float."""
        for parameter_name, _ in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}".lstrip(".")
            if full in self.multiplied:
                message = f"cannot be traced ({reason}), and holds the weight {parameter_name!r} itself"
                where = name or type(module).__name__
                remedy = f'put the weight into a layer of torch.nn, or keep={{"{full}": "float"}}'
                raise RecipeError(message, where=where, remedy=remedy)

    def insert_edges(self, graph: fx.GraphModule, prefix: str) -> None:
        """Insert an edge after every value that will be quantized: results of integer operations, inputs of products."""
        roles = {node: role_unless_kept(graph, node, prefix, self.kept) for node in graph.graph.nodes}
        for node in (node for node in roles if roles[node] == PRODUCT):
            name = f"{prefix}.{node.target}".lstrip(".")
            check_group(self.weights.at(name), graph.get_submodule(str(node.target)), name)
        tokens = self.activations.group == TOKEN
        emits = set() if tokens else codes(graph, roles)
        for node in list(graph.graph.nodes):
            if node in emits and roles[node] != CARRY and not fuses(node, roles):
                self.insert(graph, node, list(node.users), prefix)
        for node in list(graph.graph.nodes):
            if roles.get(node) == PRODUCT:
                source = node.args[0]
                if source in roles and source not in emits:
                    readers = [user for user in source.users if roles.get(user) == PRODUCT]
                    images = {r: not isinstance(graph.get_submodule(str(r.target)), nn.Linear) for r in readers}
                    alike = [r for r in readers if images[r] == images[node] or not tokens]
                    self.insert(graph, source, alike, prefix, images=images[node])
        graph.graph.lint()
        graph.recompile()

    def edge(self, where: str, *, images: bool) -> Edge:
        """A new edge. where: for errors; images: see `Edge`."""
        return Edge(self.activations, observer=self.observer, percentile=self.percentile, where=where, images=images)

    def insert(
        self, graph: fx.GraphModule, node: fx.Node, readers: list[fx.Node], prefix: str, *, images: bool = False
    ) -> None:
        """Insert an edge after a node, for the given readers."""
        what = str(node.target) if node.op in ("call_module", "placeholder") else node.name
        name = f"{node.name}_codes"
        name = f"{name}_images" if name in dict(graph.named_children()) else name
        graph.add_submodule(name, self.edge(f"{prefix}.{what}".lstrip("."), images=images))
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(name, (node,))
        for reader in readers:
            reader.replace_input_with(node, new)


def bare_names(root: nn.Module, kept: Kept, example: Batch) -> set[str]:
    """Names of parameters outside of layers, not kept in float, that products read."""
    held = {id(p) for child in root.modules() if kind(child) in DYNAMIC for p in child.parameters()}
    names = {name for name, p in root.named_parameters() if p.ndim > 1 and id(p) not in held}
    names = {name for name in names if not kept.covers(name)}
    return names & read_by_products(copied(root), example) if names else set()


def hold_weights(graph: fx.GraphModule, source: nn.Module, prefix: str, kept: Kept) -> set[int]:
    """Turn weights of layers that a graph reads without calling the layer into modules; ids of these weights.

    They are then quantized too, although the product itself is computed in float.
    """
    found: set[int] = set()
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        owner, _, name = str(node.target).rpartition(".")
        layer = source.get_submodule(owner)
        weight = layer._parameters.get(name)
        if weight is None or weight.ndim < 2 or kind(layer) not in ROUNDED:
            continue
        if kept.covers(f"{prefix}.{owner}".lstrip(".")):
            continue
        graph.add_submodule(f"{node.name}_held", HeldWeight(weight))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(f"{node.name}_held", ())
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        forget(graph, str(node.target))
        found.add(id(weight))
    graph.recompile()
    return found
