"""Compare a converted module with its float original, and locate the first operation that computes something else.

The error that quantization explains is measured on a twin: the float module with fake quantization at the same places.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from bitwright.errors import RecipeError, VerificationError, one_of
from bitwright.nn.batches import Batch, outputs, tensors
from bitwright.nn.dropin import Replacement
from bitwright.nn.fake import Edge, Phase
from bitwright.nn.integer import storable
from bitwright.nn.layers import matrix
from bitwright.nn.tree import no_fast_path
from bitwright.nn.weight_schemes import WeightSchemes
from bitwright.numerics.codec import decode, encode, fit, rounded
from bitwright.numerics.scheme import Scheme

Check = Literal["error", "warn", "off"]
CHECKS = ("error", "warn", "off")
MORE = 3.0  # the integer module's error may be this many times the twin's
LEAST = 0.05  # relative error of an output that is always accepted
WRONG = 0.25  # relative difference of an operation's result from which on it counts as wrong


def require_check(check: str) -> None:
    """RecipeError for an unknown value of `check`."""
    if check not in CHECKS:
        raise RecipeError(f"unknown check {check!r}", remedy=one_of(check, CHECKS))


def differs(expected: list[Tensor], rounded: list[Tensor], found: list[Tensor]) -> str:
    """Compare outputs: expected of the float module, rounded of its twin, found of the converted module.

    Returns how they differ; "" if quantization explains it.
    """
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    for i, (a, b, c) in enumerate(zip(expected, rounded, found, strict=True)):
        if a.shape != c.shape:
            return f"output {i} has shape {tuple(c.shape)} instead of {tuple(a.shape)}"
        if not a.is_floating_point() or not a.numel():
            continue
        size = float(a.double().norm())
        explained, off = (float((x.double() - a.double()).norm()) for x in (b, c))
        if not off <= MORE * explained + LEAST * size:
            share = off / size if size else float("inf")
            return f"output {i} is {share:.2f} of its size off, where rounding explains {explained / (size or 1):.2f}"
    return ""


def report(message: str, where: str, check: Check) -> None:
    """Raise VerificationError, or warn with check="warn"."""
    error = VerificationError(
        f"the converted module does not compute what the float module does: {message}",
        where=where,
        remedy=f'keep={{"{where}": "float"}} leaves this operation as it is; check="warn" converts all the same',
    )
    if check == "error":
        raise error
    warnings.warn(str(error), stacklevel=3)


def check_outputs(
    found: nn.Module, batch: Batch, expected: list[Tensor], rounded: list[Tensor], check: Check, twin: nn.Module | None = None
) -> None:  # fmt: skip
    """VerificationError, or a warning, if a module's outputs are further from `expected` than `rounded` (the twin's) explains.

    twin: the module with fake quantization, by which the first wrong operation is found; None: it is not looked for.
    """
    with no_fast_path():
        message = differs(expected, rounded, outputs(found, batch))
        if message:
            report(message, first_wrong(twin, found, batch) if twin is not None else type(found).__name__, check)


# ---------------------------------------------------------------------------------------------------------------- twins


@torch.no_grad()
def rounded_twin(
    source: nn.Module, layers: list[tuple[str, nn.Module]], weights: WeightSchemes, activations: Scheme, *, edges: bool
) -> nn.Module:
    """Make the twin, in place: the float module with quantized and dequantized weights of these layers.

    activations: scheme of the dynamic quantization of products' inputs. edges: whether those of Linear and convolutions are
    rounded in front of them already. A recurrent layer rounds its state at every step, which torch's has no place for: here
    what comes out of it is rounded.
    """
    for name, layer in layers:
        for parameter in layer.parameters():
            if parameter.ndim > 1:
                parameter.copy_(_rounded_weight(parameter, weights.at(name)))
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
            layer.register_forward_pre_hook(lambda _, inputs: (*_all_rounded(inputs[:3], activations), *inputs[3:]))
        elif not edges and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.register_forward_pre_hook(_rounding(activations, images=not isinstance(layer, nn.Linear)))
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            layer.register_forward_hook(lambda _, inputs, result: _all_rounded(result, activations))
    return source


def _all_rounded(values: Any, scheme: Scheme) -> Any:
    """All float tensors in there rounded, row by row."""
    return tree_map(lambda x: rounded(x, scheme) if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def _rounded_weight(w: Tensor, scheme: Scheme) -> Tensor:
    flat = matrix(w.detach().float())
    scheme = storable(flat, scheme)
    found = decode(encode(flat, fit(flat, scheme), scheme))
    return found if w.ndim == 2 else found.view(len(w), *w.shape[2:], w.shape[1]).movedim(-1, 1)


def _rounding(scheme: Scheme, *, images: bool) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> Any:
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor):
            return None
        rows = x.flatten(1) if images else x
        return rounded(rows, scheme).view(x.shape), *inputs[1:]

    return hook


# ------------------------------------------------------------------------------------------------- the first that is wrong


def first_wrong(twin: nn.Module, found: nn.Module, batch: Batch) -> str:
    """The name of the first operation whose result differs from the twin's by `WRONG`; of the worst if none does."""
    expected: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    order: list[str] = []
    pairs = list(_pairs(twin, found))
    handles = [a.register_forward_hook(_keep(expected, name, [])) for name, a, _ in pairs]
    handles += [b.register_forward_hook(_keep(seen, name, order)) for name, _, b in pairs]
    try:
        outputs(twin, batch)
        outputs(found, batch)
    finally:
        for handle in handles:
            handle.remove()
    worst, most = type(found).__name__, 0.0
    for name in order:
        a, b = expected.get(name), seen[name]
        if a is None or a.shape != b.shape:
            continue
        off = float((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-30))
        if not off < WRONG:
            return name
        worst, most = (name, off) if off > most else (worst, most)
    return worst


def _pairs(twin: nn.Module, found: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(Name, twin's module, converted module) for modules that correspond: by the nodes of graphs, else by name."""
    others, done = dict(twin.named_modules()), set[int]()
    for path, module in found.named_modules():
        other = others.get(path)
        if isinstance(module, fx.GraphModule) and isinstance(other, fx.GraphModule):
            nodes = {n.name: n for n in other.graph.nodes if n.op == "call_module"}
            for node in module.graph.nodes:
                if node.op == "call_module" and node.name in nodes:
                    mine = module.get_submodule(str(node.target))
                    done.add(id(mine))
                    theirs = other.get_submodule(str(nodes[node.name].target))
                    yield _label(path, node, mine, theirs), theirs, mine
        elif isinstance(module, Replacement) and other is not None and id(module) not in done:
            yield path, other, module


def _label(path: str, node: fx.Node, mine: nn.Module, theirs: nn.Module) -> str:
    where = getattr(mine, "where", "") or (theirs.where if isinstance(theirs, Edge) else str(node.target))
    return str(where) or path


def _keep(into: dict[str, Tensor], name: str, order: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, _: Any, result: Any) -> None:
        x = next(iter(tensors(result)), None)
        if x is None or name in into:
            return
        affine = module._buffers.get("exit", module._buffers.get("affine"))
        if x.dtype == torch.int8 and isinstance(affine, Tensor) and len(affine):
            x = (x.float() - affine[1]) * affine[0]
        elif not x.is_floating_point():
            return
        into[name] = x.detach().clone()
        order.append(name)

    return hook


def in_phase(prepared: nn.Module, phase: Phase) -> nn.Module:
    """A copy of a prepared module with all edges in this phase."""
    twin = copy.deepcopy(prepared)
    for module in twin.modules():
        if isinstance(module, Edge):
            module.phase = phase
    return twin
