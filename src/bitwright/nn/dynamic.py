"""Post-training dynamic quantization: integer weights; activations are quantized at run time, without calibration."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from bitwright.errors import NumericsError, RecipeError
from bitwright.nn.attention import IntegerAttention
from bitwright.nn.bare_weights import Reads, multiplied_in
from bitwright.nn.batches import Batch, outputs, require_finite, run, run_named, same_draws, tensors
from bitwright.nn.check import Check, check_outputs, require_check, rounded_twin
from bitwright.nn.dropin import Replacement
from bitwright.nn.integer import activations_of, check_activations, storable
from bitwright.nn.layers import (
    DynamicProduct,
    IntegerEmbedding,
    IntegerEmbeddingBag,
    Source,
    StoredWeight,
    check_group,
    matrix,
)
from bitwright.nn.layout import contiguous, viewed
from bitwright.nn.plain import plain
from bitwright.nn.recurrent import Cell, IntegerCell, IntegerRecurrent, Recurrent
from bitwright.nn.rounded import HeldWeight, trained
from bitwright.nn.trace import traced
from bitwright.nn.tree import (
    Kept,
    copied,
    kind,
    layers_of,
    no_fast_path,
    off_the_fast_path,
    quantizable,
    refuse_complex,
    replaced,
    require_mode,
    with_hooks_of,
)
from bitwright.nn.weight_schemes import WeightSchemes
from bitwright.numerics.codec import encode, fit
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TOKEN, Scheme


def quantize_dynamic(
    module: nn.Module,
    scheme: str = "int8-channel",
    *,
    activations: str = "int8-token",
    keep: Mapping[str, str] | None = None,
    schemes: Mapping[str, str] | None = None,
    inplace: bool = False,
    example_inputs: Batch | None = None,
    check: Check = "error",
) -> nn.Module:
    """Replace Linear, convolutions, LSTM, GRU, RNN, MultiheadAttention and Embedding by dynamically quantized integer layers.

    scheme          of the weights: integers, ternary or binary; by channel, or in groups for Linear
    activations     "int8-token" or "int8-token-asym", or fewer bits: per row, for a convolution per image
    keep            patterns of module names -> "float", or "bf16" for float weights and products in bfloat16
    schemes         patterns of layers' names -> a scheme of theirs, in place of `scheme`; what `keep` matches has none
    inplace         change `module` itself; otherwise a copy is changed
    example_inputs  a batch on which the result is compared with the float module, as in `convert`; None: no comparison
    check           if they differ by more than quantization explains: "error", "warn", "off"

    Raises RecipeError for a module in training mode, one with nothing to quantize, a weight outside of torch.nn layers, or
    a pattern that matches nothing; SchemeError for schemes whose codes are not integers; NumericsError for weights that
    are not finite; VerificationError if `check` finds a difference.
    """
    module = quantizable(module)
    require_mode(module, training=False)
    require_check(check)
    weights, rounding = WeightSchemes.of(module, scheme, schemes), activations_of(activations)
    check_activations(rounding, TOKEN)
    kept = Kept(module, keep or {})
    source = plain(copied(module), kept) if example_inputs is not None and check != "off" else None
    target = plain(module if inplace else copied(module), kept)
    refuse_bare_weights(target, kept, example_inputs)
    layers = layers_of(target, DYNAMIC, kept)
    if not layers:
        raise nothing_to_quantize(module)
    convolutions = [name for name, child in layers if isinstance(child, nn.Conv1d | nn.Conv2d)]
    plain_memory = viewed(target, convolutions) if convolutions else set()
    for name, child in layers:
        new = dynamic(child, weights.at(name), rounding, where=name)
        if name in plain_memory:
            new.register_forward_hook(contiguous)
        target = replaced(target, child, with_hooks_of(new, child))
    target = off_the_fast_path(kept.apply(target)).eval()
    if source is not None and example_inputs is not None:
        remedy = "example_inputs as the module is called with"
        with same_draws():
            expected = tensors(run_named(source, example_inputs, RecipeError, remedy))
        require_finite(expected, "the outputs", type(module).__name__)
        twin = rounded_twin(source, layers_of(source, DYNAMIC, kept), weights, rounding, edges=False)
        check_outputs(target, example_inputs, expected, outputs(twin, example_inputs), check)
    return target


def dynamic(module: nn.Module, weights: Scheme, activations: Scheme, *, where: str) -> nn.Module:
    """The dynamic integer form of one module of a class in `DYNAMIC`."""
    refuse_complex(module, where)
    check_group(weights, module, where)
    return DYNAMIC[kind(module)](module, weights, activations, where)


def quantized(w: Tensor, scheme: Scheme, where: str) -> QTensor:
    """A weight [N, ...] rounded to nearest, as a matrix [N, K] (`matrix`). NumericsError for NaN or Inf."""
    flat = matrix(w.detach().float())
    if not bool(torch.isfinite(flat).all()):
        raise NumericsError("the weights are not finite", where=where, remedy="look for NaN or Inf in the module")
    scheme = storable(flat, scheme)
    return encode(flat, fit(flat, scheme), scheme)


def weight_of(layer: nn.Module, scheme: Scheme, where: str, name: str = "weight") -> QTensor:
    """A layer's quantized weight: with the scales of its quantization-aware training, or else rounded to nearest."""
    w, fake = trained(layer, name)
    return quantized(w, scheme, where) if fake is None else fake.encoded(w)


def _product(module: Source, weights: Scheme, activations: Scheme, where: str) -> DynamicProduct:
    return DynamicProduct.of(module, weight_of(module, weights, where), activations=activations, where=where)


def _part(weights: Scheme, activations: Scheme, where: str) -> Callable[[nn.Linear, str], DynamicProduct]:
    """A function that makes the integer form of a matrix inside a module (`where`)."""
    return lambda source, name: _product(source, weights, activations, f"{where}.{name}")


def _cell(module: Cell, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    return IntegerCell(module, _part(weights, activations, where), where=where)


def _recurrent(module: Recurrent, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    return IntegerRecurrent(module, _part(weights, activations, where), where=where)


def _attention(module: nn.MultiheadAttention, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    return IntegerAttention(module, _part(weights, activations, where), where=where)


def _embedding(module: nn.Embedding | nn.EmbeddingBag, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    refuse_max_norm(module, where)
    form = IntegerEmbeddingBag if isinstance(module, nn.EmbeddingBag) else IntegerEmbedding
    return form(module, weight_of(module, weights, where), where=where)


def _held(module: HeldWeight, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    w = module._parameters["weight"]
    return StoredWeight(weight_of(module, weights, where), w.shape, w.dtype, where=where)  # type: ignore[union-attr]


DYNAMIC: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: _product,
    nn.Conv1d: _product,
    nn.Conv2d: _product,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.LSTMCell: _cell,
    nn.GRUCell: _cell,
    nn.RNNCell: _cell,
    nn.MultiheadAttention: _attention,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    HeldWeight: _held,
}


LISTS = (nn.ParameterList, nn.ParameterDict)  # what reads their parameters is elsewhere


def refuse_max_norm(module: nn.Module, where: str) -> None:
    """RecipeError for an embedding with a max_norm."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        remedy = f'keep={{"{where}": "float"}}'
        raise RecipeError("an embedding with max_norm changes as it is read", where=where, remedy=remedy)


def nothing_to_quantize(module: nn.Module) -> RecipeError:
    """The error for a module in which no layer can be quantized, or all are kept in float."""
    if any(isinstance(child, Replacement) for child in module.modules()):
        where = type(module).__name__
        return RecipeError("nothing to quantize: already quantized", where=where, remedy="start from the float module")
    kinds = ", ".join(kind.__name__ for kind in DYNAMIC if kind is not HeldWeight)
    return RecipeError("nothing to quantize", where=type(module).__name__, remedy=f"a module with any of {kinds}")


def refuse_bare_weights(module: nn.Module, kept: Kept, example: Batch | None) -> None:
    """RecipeError for a weight outside of torch.nn layers, found by running the example or, without one, by tracing.

    What neither shows is warned of: it stays in float.
    """
    held = {id(p) for child in module.modules() if kind(child) in DYNAMIC for p in child.parameters()}
    names = [name for name, p in module.named_parameters() if p.ndim > 1 and id(p) not in held]
    names = [name for name in names if not kept.covers(name)]
    if not names:
        return
    found, unknown = (
        (read_by_products(module, example), set[str]()) if example is not None else _in_graphs(module, names)
    )
    for name in names:
        if name in found:
            raise bare_weight(name)
    doubtful = [name for name in names if name in unknown and sum(n > 1 for n in module.get_parameter(name).shape) > 1]
    if doubtful:
        message = "no layer holds these, they stay float; example_inputs would show whether products read them"
        more = f" and {len(doubtful) - 4} more" if len(doubtful) > 4 else ""
        warnings.warn(f"{', '.join(doubtful[:4])}{more}: {message}", stacklevel=3)


def _in_graphs(module: nn.Module, names: Sequence[str]) -> tuple[set[str], set[str]]:
    """Those of these parameters that products read, in the module's graph or else in that of the module that holds them.

    And those of which that is not known, as neither can be traced.
    """
    graph = _graph(module)
    if graph is not None:
        return set(multiplied_in(graph)), set()
    found, unknown = set[str](), set[str]()
    for holder in {name.rpartition(".")[0] for name in names}:
        own = {name for name in names if name.rpartition(".")[0] == holder}
        held_by = module.get_submodule(holder)
        if kind(held_by).__module__.startswith("torch.nn.modules") and not isinstance(held_by, LISTS):
            continue  # a layer, listed as such
        graph = _graph(held_by) if holder else None
        if graph is None:
            unknown |= own
        else:
            found |= own & {f"{holder}.{name}" for name in multiplied_in(graph)}
    return found, unknown


def _graph(module: nn.Module) -> fx.GraphModule | None:
    """A module traced without an example; None if it cannot be."""
    needed = inspect.signature(module.forward).parameters.values()
    given = {p.name: torch.zeros(0) for p in needed if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    graph = traced(module, given)
    return None if isinstance(graph, str) else graph


def bare_weight(name: str) -> RecipeError:
    """The error for a weight outside of torch.nn layers."""
    message = "a product with a weight that no layer of torch.nn holds"
    return RecipeError(message, where=name, remedy=f'use a layer, or keep={{"{name}": "float"}}')


@torch.no_grad()
def read_by_products(module: nn.Module, example: Batch) -> set[str]:
    """Names of the parameters that a forward uses in products outside of layers."""
    layers = [child for child in module.modules() if kind(child).__module__.startswith("torch.nn.modules")]
    layers = [child for child in layers if not list(child.children()) or kind(child) in DYNAMIC]
    with no_fast_path(), Reads(module, layers) as reads:
        run(module, example)
    return reads.found
