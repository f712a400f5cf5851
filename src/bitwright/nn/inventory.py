"""List the layers of a converted module, and whether each computes in integers, bfloat16 or float."""

from dataclasses import dataclass

from torch import fx, nn

from bitwright.nn.layers import DynamicProduct, IntegerEmbedding, StaticProduct, StoredWeight
from bitwright.nn.static import Dequantize, Quantize, StaticAdd, StaticMax, StaticMean, Table
from bitwright.nn.trace import CARRY, MODULES, SHAPE, role
from bitwright.nn.tree import Bf16, kind, quantizable

INTEGER = (DynamicProduct, StaticProduct, StaticAdd, StaticMax, StaticMean, Table, IntegerEmbedding, StoredWeight)


@dataclass(frozen=True)
class Layer:
    """One operation. kind: "integer", "codes" (quantize, dequantize), "bf16" or "float"; bytes: of its tensors."""

    name: str
    kind: str
    what: str
    bytes: int


class Inventory(tuple[Layer, ...]):
    """All operations, in the module's order; str() gives a table."""

    __slots__ = ()

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self), default=0)
        return "\n".join(f"{each.name:{width}}  {each.kind:8} {each.bytes:>10,}  {each.what}" for each in self)


def layers(module: nn.Module) -> Inventory:
    """The operations of a converted (or float) module, those that stayed in float included.

    Functional operations are listed only for traced modules; in the forward of a module that could not be traced they are
    float, and not listed. RecipeError for what is no module, for TorchScript and for layers whose shapes are not known yet.
    """
    found: list[Layer] = []
    _collect(quantizable(module), "", found)
    return Inventory(found)


def _collect(module: nn.Module, name: str, found: list[Layer]) -> None:
    computed = _kind(module)
    if computed or not list(module.children()):
        if MODULES.get(kind(module)) != CARRY:  # reshapes and the like compute nothing
            found.append(
                Layer(name, computed or "float", f"{type(module).__name__}({module.extra_repr()})", _bytes(module))
            )
        return
    if isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            plain = node.op in ("call_function", "call_method") and role(module, node) not in (CARRY, SHAPE)
            if plain:
                found.append(Layer(f"{name}.{node.name}".lstrip("."), "float", str(node.target), 0))
    for own, p in module.named_parameters(recurse=False):
        found.append(
            Layer(f"{name}.{own}".lstrip("."), "float", f"Parameter{list(p.shape)}", p.numel() * p.element_size())
        )
    for child_name, child in module.named_children():
        _collect(child, f"{name}.{child_name}".lstrip("."), found)


def _kind(module: nn.Module) -> str:
    if isinstance(module, INTEGER):
        return "integer"
    if isinstance(module, Quantize | Dequantize):
        return "codes"
    return "bf16" if isinstance(module, Bf16) else ""


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
