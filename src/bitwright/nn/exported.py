"""Trace a converted module with torch.export, for modules that torch.fx cannot trace.

The result is a graph of ATen operators in which quantized layers are still single operations. Such a layer is run while the
module is traced, but what it does is not: an operator that makes results of the same shapes stands for it. In the finished
graph this operator becomes a call of the layer. (Traced inside, a grouped convolution has a product for each of its groups.)
"""

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from bitwright.errors import FormatError
from bitwright.nn.batches import tensors
from bitwright.nn.tree import copied, named, no_fast_path

# (Name of the layer, its arguments with `Numbered` in place of tensors, where its results are) of each call.
Call = tuple[str, Any, Any]

DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
)  # fmt: skip
NEW = {torch.ops.aten.new_zeros.default: 0, torch.ops.aten.new_ones.default: 1}  # of a tensor they take the type alone


def _stand_in(inputs: list[Tensor], sizes: list[int], kinds: list[int], call: int) -> list[Tensor]:
    """Stands for a call of a layer in a traced graph: empty results. sizes: of all of them, one after the other; kinds: the
    number of dimensions and the place in DTYPES of each; call: its number."""
    left, device = iter(sizes), inputs[0].device if inputs else None
    return [
        torch.empty([next(left) for _ in range(ndim)], dtype=DTYPES[dtype], device=device)
        for ndim, dtype in zip(kinds[::2], kinds[1::2], strict=True)
    ]


quantized_layer = torch.library.custom_op("bitwright::quantized_layer", _stand_in, mutates_args=())
quantized_layer.register_fake(_stand_in)


class Numbered:
    """A tensor's place in the inputs of `quantized_layer`."""

    def __init__(self, place: int) -> None:
        self.place = place


class Calls:
    """Layers whose calls are recorded while a module is traced."""

    def __init__(self) -> None:
        self.made: list[Call] = []

    def record(self, layer: nn.Module, name: str) -> None:
        """Let a layer record its calls."""
        forward = layer.forward

        def recorded(*args: Any, **options: Any) -> Any:
            with disable_proxy_modes_tracing():
                results, form = pytree.tree_flatten(forward(*args, **options))
            given, inside = pytree.tree_flatten((args, options))
            inputs = [x for x in given if isinstance(x, Tensor)]
            places = iter(range(len(inputs)))
            numbered = [Numbered(next(places)) if isinstance(x, Tensor) else x for x in given]
            kept = [x for x in results if isinstance(x, Tensor)]
            sizes = [size for x in kept for size in x.shape]
            kinds = [number for x in kept for number in (x.ndim, DTYPES.index(x.dtype))]
            passed = iter(quantized_layer(inputs, sizes, kinds, len(self.made)))
            paths = _paths(pytree.tree_unflatten(results, form))
            self.made.append((name, pytree.tree_unflatten(numbered, inside), paths))
            return pytree.tree_unflatten([next(passed) if isinstance(x, Tensor) else x for x in results], form)

        layer.forward = recorded


def _paths(results: Any) -> list[tuple[int, ...]]:
    """The indices that lead to each tensor of nested tuples."""
    if isinstance(results, Tensor):
        return [()]
    return [(i, *path) for i, each in enumerate(results or ()) for path in _paths(each)]


class Flat(nn.Module):
    """A module called with the values of its arguments in order, that returns the tensors of its result as a tuple."""

    def __init__(self, inner: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *values: Any) -> tuple[Tensor, ...]:
        return tuple(tensors(self.inner(**dict(zip(self.names, values, strict=True)))))


@torch.no_grad()
def exported(
    module: nn.Module,
    given: Mapping[str, Any],
    free: Mapping[str, Collection[int]],
    leaves: Collection[type],
    *,
    core: bool = False,
) -> tuple[fx.GraphModule, dict[str, set[int]]]:
    """Trace a module; returns the graph, whose placeholders have the arguments' names, and the free dimensions of each.

    given   arguments of the example by name
    free    name -> dimensions of variable size; those that the module fixes are left out of the result
    leaves  classes of layers that stay single operations
    core    decompose what is left into torch's core operators

    Raises FormatError, with torch.export's reason, if it cannot be traced.
    """
    names, calls = [name for name, value in given.items() if isinstance(value, Tensor)], Calls()
    fixed = {name: value for name, value in given.items() if name not in names}
    source = copied(module).eval()
    inside: set[int] = set()
    for paths, layer in named(source):
        if type(layer) in leaves and id(layer) not in inside:
            inside.update(id(child) for child in layer.modules())
            calls.record(layer, paths[0])
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(free.get(name, ()), auto) for name in names)
    flat = Flat(source, [*names, *fixed])
    try:
        with no_fast_path():
            program = torch.export.export(
                flat,
                (*(given[name] for name in names), *fixed.values()),
                dynamic_shapes=((*shapes, *(None for _ in fixed)),),
                strict=False,
            ).run_decompositions(None if core else {})
    except Exception as error:
        message = f"torch.export cannot trace it: {type(error).__name__}: {error}".splitlines()[0]
        raise FormatError(message, where=type(module).__name__, remedy="export the parts that can be") from error
    graph = program.module(check_guards=False)
    graph.graph.set_codegen(fx.graph.CodeGen())
    found = _named_inputs(graph, [*names, *fixed])
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.bitwright.quantized_layer.default:
            _call(graph, node, module, calls.made[node.args[3]])
    _without_statistics(graph)
    _without_checks(graph)
    _fold_constants(graph)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph, {name: set(free.get(name, ())) & found[name] for name in names}


def _named_inputs(graph: fx.GraphModule, names: list[str]) -> dict[str, set[int]]:
    """Give placeholders the names of arguments; name -> its dimensions without a fixed size."""
    free: dict[str, set[int]] = {}
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), names, strict=True):
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        free[name] = {axis for axis, size in enumerate(shape) if not is_concrete_int(size)}
        with graph.graph.inserting_before(node):
            new = graph.graph.placeholder(name)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    return free


def _call(graph: fx.GraphModule, node: fx.Node, module: nn.Module, call: Call) -> None:
    """Put the call of a layer in the place of the operator that stands for it."""
    name, arguments, paths = call
    inputs: Any = node.args[0]
    args, options = pytree.tree_map(lambda x: inputs[x.place] if isinstance(x, Numbered) else x, arguments)
    path = f"layers.{name}"
    graph.add_submodule(path, module.get_submodule(name))
    with graph.graph.inserting_before(node):
        new = graph.graph.call_module(path, args, options)
        for user in list(node.users):
            found = new
            for index in paths[user.args[1]]:
                found = graph.graph.call_function(operator.getitem, (found, index))
            user.replace_all_uses_with(found)
            graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _without_checks(graph: fx.GraphModule) -> None:
    """Remove torch.export's checks of sizes and types."""
    for node in reversed(list(graph.graph.nodes)):
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_function" and (name.startswith(("_assert", "sym_constrain"))) and not node.users:
            graph.graph.erase_node(node)


def _without_statistics(graph: fx.GraphModule) -> None:
    """Batch norms as the operator that returns their result alone."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            *inputs, momentum, eps = node.args
            with graph.graph.inserting_before(node):
                new = graph.graph.call_function(
                    torch.ops.aten.batch_norm.default, (*inputs, False, momentum, eps, False)
                )
            for user in [user for user in node.users if user.args[1] == 0]:
                user.replace_all_uses_with(new)
                graph.graph.erase_node(user)


def _is_constant(node: fx.Node, known: Mapping[fx.Node, Any]) -> bool:
    """Whether an operation, which is not random, depends on what is known alone."""
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.op == "call_function" and not random and all(source in known for source in node.all_input_nodes)


def _fold_constants(graph: fx.GraphModule) -> None:
    """Compute what depends on neither inputs nor weights, such as the masks of shifted windows, and hold it as a buffer.

    Codes of weights thus stay codes. Single numbers are left: a size that another operator takes must stay one.
    """
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.target in NEW and all(isinstance(size, int) for size in node.args[1]):
            known[node] = torch.full(node.args[1], NEW[node.target], dtype=node.meta["val"].dtype)
        elif _is_constant(node, known):
            args, options = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **options)  # functional, since torch.export has made it so
    for count, node in enumerate(known):
        inside = all(user in known for user in node.users)
        if not inside and isinstance(known[node], Tensor):
            graph.register_buffer(f"constant_{count}", known[node])
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"constant_{count}"))
