"""Find weights outside of torch.nn layers: parameters that a forward uses in a matrix product or convolution directly."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright.nn.tree import kind

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "convolution", "mkldnn_rnn_layer")
MATMULS = (
    "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "bilinear", "tensordot",
    *(f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)),
)  # fmt: skip


class Reads(TorchDispatchMode):
    """Dispatch mode that records the parameters which products read outside of layers. found: their names.

    A tensor computed from parameters alone (a transpose, a standardized weight) counts as these parameters.
    """

    def __init__(self, root: nn.Module, layers: Collection[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[str] = set()
        self.inside = 0
        self.of: dict[int, tuple[Tensor, frozenset[str]]] = {}
        for name, parameter in root.named_parameters():
            if parameter.ndim > 1:
                self.of[id(parameter)] = parameter, frozenset([name])
        self.storages = {p.untyped_storage()._cdata: names for p, names in self.of.values()}
        self.handles = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        self.handles += [layer.register_forward_hook(self._leave) for layer in layers]

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, *_: Any) -> None:
        self.inside -= 1

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            read = [self._names(x) for x in args if isinstance(x, Tensor)]
            if func.overloadpacket.__name__.strip("_") in PRODUCTS:
                self.found |= {name for names in read for name in names}
            elif read and all(read) and isinstance(result, Tensor):
                self.of[id(result)] = (
                    result,
                    frozenset().union(*read),
                )  # keeps the tensor alive, so that its id is unique
        return result

    def _names(self, x: Tensor) -> frozenset[str]:
        if id(x) in self.of:
            return self.of[id(x)][1]
        return self.storages.get(x.untyped_storage()._cdata, frozenset())


def multiplied_by_name(root: nn.Module, names: Collection[str], owners: Collection[type[nn.Module]]) -> list[str]:
    """Those of the parameters `names` that belong to no layer of these classes."""
    inside = {id(p) for module in root.modules() if kind(module) in owners for p in module.parameters()}
    return [name for name, p in root.named_parameters() if name in names and id(p) not in inside]


def multiplied_in(graph: fx.GraphModule) -> list[str]:
    """Names of the parameters that products in a traced graph read, directly or through operations on parameters alone."""
    parameters, found = dict(graph.named_parameters()), []
    made_of: dict[fx.Node, frozenset[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            p = parameters.get(str(node.target))
            if p is not None and p.ndim > 1:
                made_of[node] = frozenset([str(node.target)])
        elif node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target))
            read = [made_of.get(each, frozenset()) for each in node.all_input_nodes]
            if name in MATMULS:
                found += [name for names in read for name in sorted(names)]
            elif read and all(read):
                made_of[node] = frozenset().union(*read)
    return list(dict.fromkeys(found))
