"""A module made ready for calibration or training: graphs where it traces, and edges where values will be codes."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.calibration.ranges import RANGES
from bitwright.errors import CalibrationError, NumericsError, RecipeError, one_of
from bitwright.nn.dynamic import DYNAMIC, Kept, nothing_to_quantize, require_mode
from bitwright.nn.fake import Edge
from bitwright.nn.integer import check_activations
from bitwright.nn.layers import check_group
from bitwright.nn.plan import codes, fuses, role_of, role_unless_kept
from bitwright.nn.trace import CARRY, OTHER, PRODUCT, bare_weights, fold_norms, traced
from bitwright.numerics.scheme import TENSOR, TOKEN, Scheme

Batch = Tensor | tuple[Any, ...] | dict[str, Any]  # what a module is called with: f(x), f(*x) or f(**x)


class Prepared(nn.Module):
    """A module with edges. `body` is what it was, as graphs where it traces; it computes what the original did."""

    def __init__(self, body: nn.Module, weights: Scheme, activations: Scheme, kept: Kept) -> None:
        super().__init__()
        self.body, self.weights, self.activations, self.kept = body, weights, activations, kept

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the original's."""
        shortcut = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the modules that hold them
        try:
            return self.body(*inputs, **named)
        finally:
            torch.backends.mha.set_fastpath_enabled(shortcut)

    def edges(self) -> list[Edge]:
        """All places where values will be codes."""
        return [module for module in self.modules() if isinstance(module, Edge)]


def prepare(
    module: nn.Module,
    example_inputs: Batch,
    *,
    weights: str = "int8-channel",
    activations: str = "int8-tensor",
    observer: str = "mse",
    percentile: float | None = None,
    keep: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> Prepared:
    """The module with places to observe, for `calibrate` and then `convert`: post-training static quantization.

    example_inputs  one batch: a tensor, a tuple of arguments, or a dict of named ones
    weights         scheme of the weights: integers, ternary or binary, by channel
    activations     "int8-tensor" or "int8-tensor-asym", or fewer bits: one fixed scale for each place; or by token, as
                    they come ("int8-token"): then only products are integer, and there is nothing to calibrate
    observer        how ranges are read from what was seen: "minmax", "average", "percentile", "mse", "kl"
    percentile      of that observer; None: 99.9
    keep            patterns of module names -> "float", or "bf16"

    What cannot be traced is taken apart, and its layers are prepared one by one. Raises RecipeError for a module in
    training mode, with nothing to quantize, that was prepared before, whose trace computes something else, or with
    weights that no layer of torch.nn holds where it cannot be traced; SchemeError for schemes without integer form.
    """
    if observer not in RANGES:
        raise RecipeError(f"unknown observer {observer!r}", remedy=one_of(observer, RANGES))
    require_mode(module, training=False)
    return _prepared(module, example_inputs, weights, activations, observer, percentile, keep, inplace)


def _prepared(
    module: nn.Module,
    example: Batch,
    weights: str,
    activations: str,
    observer: str,
    percentile: float | None,
    keep: Mapping[str, str] | None,
    inplace: bool,
) -> Prepared:
    if isinstance(module, Prepared) or any(isinstance(child, Edge) for child in module.modules()):
        raise RecipeError("already prepared", where=type(module).__name__, remedy="prepare the float module")
    of_weights, of_values = Scheme.parse(weights), Scheme.parse(activations)
    check_activations(of_values, TENSOR, TOKEN)
    kept = Kept(module, keep or {})
    target = module if inplace else copy.deepcopy(module)
    expected = run(copy.deepcopy(module), example)
    maker = Maker(target, example, of_weights, of_values, observer, percentile, kept)
    prepared = Prepared(maker.made(target, ""), of_weights, of_values, kept).eval()
    if not prepared.edges() and not any(type(child) in DYNAMIC for child in prepared.modules()):
        raise nothing_to_quantize(module)
    _check_same(expected, run(prepared, example), type(module).__name__)
    return prepared


@torch.no_grad()
def run(module: nn.Module, batch: Batch) -> Any:
    """What the module makes of a batch."""
    if isinstance(batch, dict):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def calibrate(prepared: Prepared, batches: Iterable[Batch]) -> Prepared:
    """Run the batches (of inputs only, no labels) through the module and remember what values each edge saw.

    Batches count on top of those of earlier calls. Raises RecipeError in training mode or for another kind of module,
    CalibrationError where there are no batches, NumericsError, naming the edge, for values that are not finite.
    """
    require_prepared(prepared)
    require_mode(prepared, training=False)
    phases = [(edge, edge.phase) for edge in prepared.edges()]
    count = 0
    for edge, _ in phases:
        edge.phase = "watch"
    try:
        for batch in batches:
            _run_named(prepared, batch)
            count += 1
    finally:
        for edge, phase in phases:
            edge.phase = phase
    if not count:
        raise CalibrationError("no batches", remedy="give at least one batch of inputs")
    return prepared


def _run_named(prepared: Prepared, batch: Batch) -> None:
    """Run a batch; where torch refuses its shape, CalibrationError names the layer that it came to."""
    reached = [""]
    layers = [(name, module) for name, module in prepared.body.named_modules() if not list(module.children())]
    handles = [module.register_forward_pre_hook(lambda *_, name=name: reached.append(name)) for name, module in layers]
    try:
        run(prepared, batch)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise CalibrationError(message, where=reached[-1], remedy="batches shaped as example_inputs were") from error
    finally:
        for handle in handles:
            handle.remove()


def require_prepared(module: nn.Module) -> None:
    """RecipeError unless `prepare` or `prepare_qat` made the module."""
    if isinstance(module, Prepared):
        return
    integer = any(type(child).__module__.startswith("bitwright.nn") for child in module.modules())
    message = "converted already" if integer else "not prepared"
    remedy = "convert what prepare returned, once" if integer else "bitwright.prepare(module, example_inputs) first"
    raise RecipeError(message, where=type(module).__name__, remedy=remedy)


def _check_same(expected: Any, found: Any, where: str) -> None:
    """RecipeError if a graph does not compute what the module does."""
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    for a, b in pairs:
        if a.is_floating_point() and not bool(torch.isfinite(a).all()):
            raise NumericsError("the outputs are not finite", where=where, remedy="look for NaN in its weights")
        if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * _size(a)):
            message = "its graph computes something else: what it does depends on values or on state"
            raise RecipeError(message, where=where, remedy='keep={"the submodule": "float"}, or move the condition out')


def _size(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, tuple | list) else []


# ------------------------------------------------------------------------------------------------------------- graphs


class Maker:
    """Makes graphs with edges out of a tree of modules."""

    def __init__(
        self,
        root: nn.Module,
        example: Batch,
        weights: Scheme,
        activations: Scheme,
        observer: str,
        percentile: float | None,
        kept: Kept,
    ) -> None:
        self.weights, self.activations, self.kept = weights, activations, kept
        self.observer, self.percentile = observer, percentile
        self.given = tensors_given(root, example)
        self.done: dict[int, nn.Module] = {}

    def made(self, module: nn.Module, name: str) -> nn.Module:
        """The module as a graph with edges if it can be one; else itself, with its children so made."""
        if id(module) not in self.done:
            self.done[id(module)] = self._made(module, name)
        return self.done[id(module)]

    def _made(self, module: nn.Module, name: str) -> nn.Module:
        if self.kept.covers(name) or (type(module) in DYNAMIC and role_of(module) == OTHER):
            return module
        given = self.given.get(name, 1 if role_of(module) == PRODUCT else 0)
        graph = traced(module, given) if given else "it is called with more than tensors"
        if isinstance(graph, str):
            self.refuse_own_weights(module, name, graph)
            for child_name, child in list(module.named_children()):
                setattr(module, child_name, self.made(child, f"{name}.{child_name}".lstrip(".")))
            return module
        for weight in (f"{name}.{weight}".lstrip(".") for weight in bare_weights(graph)):
            if not self.kept.covers(weight):
                message = "a product with a weight that no layer of torch.nn holds"
                raise RecipeError(message, where=weight, remedy=f'use a layer, or keep={{"{weight}": "float"}}')
        fold_norms(graph)
        self.insert_edges(graph, name)
        return graph

    def refuse_own_weights(self, module: nn.Module, name: str, reason: str) -> None:
        """RecipeError for a module that cannot be traced and holds a matrix itself: nothing would quantize it."""
        if type(module).__module__.startswith("torch.nn."):
            return
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1 and not self.kept.covers(f"{name}.{parameter_name}".lstrip(".")):
                message = f"cannot be traced ({reason}), and holds the weight {parameter_name!r} itself"
                where = name or type(module).__name__
                full = f"{name}.{parameter_name}".lstrip(".")
                remedy = f'put the weight into a layer of torch.nn, or keep={{"{full}": "float"}}'
                raise RecipeError(message, where=where, remedy=remedy)

    def insert_edges(self, graph: fx.GraphModule, prefix: str) -> None:
        """Edges behind all values that will be codes: results of integer operations, and inputs of products."""
        roles = {node: role_unless_kept(graph, node, prefix, self.kept) for node in graph.graph.nodes}
        for node in (node for node in roles if roles[node] == PRODUCT):
            check_group(self.weights, graph.get_submodule(str(node.target)), f"{prefix}.{node.target}".lstrip("."))
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

    def insert(
        self, graph: fx.GraphModule, node: fx.Node, readers: list[fx.Node], prefix: str, *, images: bool = False
    ) -> None:
        """An edge behind a node, for those that read it."""
        what = str(node.target) if node.op in ("call_module", "placeholder") else node.name
        where = f"{prefix}.{what}".lstrip(".")
        edge = Edge(self.activations, observer=self.observer, percentile=self.percentile, where=where, images=images)
        name = f"{node.name}_codes"
        name = f"{name}_images" if name in dict(graph.named_children()) else name
        graph.add_submodule(name, edge)
        with graph.graph.inserting_after(node):
            new = graph.graph.call_module(name, (node,))
        for reader in readers:
            reader.replace_input_with(node, new)


def tensors_given(root: nn.Module, example: Batch) -> dict[str, int]:
    """How many tensors each submodule is called with; those that are called with anything else are left out."""
    counts: dict[str, set[int]] = {}

    def hook(name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            plain = not named and all(isinstance(x, Tensor) for x in inputs)
            counts.setdefault(name, set()).add(len(inputs) if plain else 0)

        return record

    handles = [m.register_forward_pre_hook(hook(name), with_kwargs=True) for name, m in root.named_modules()]
    try:
        run(root, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found.pop() for name, found in counts.items() if len(found) == 1}
