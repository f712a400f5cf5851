"""`prepare` and `calibrate`: insert observers into a module, and record the ranges of its activations (static quantization)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.calibration.ranges import RANGES
from bitwright.errors import CalibrationError, NumericsError, RecipeError, one_of
from bitwright.nn.batches import Batch, outputs, run_named
from bitwright.nn.dynamic import DYNAMIC, nothing_to_quantize, refuse_max_norm
from bitwright.nn.edges import Maker
from bitwright.nn.fake import Edge
from bitwright.nn.integer import activations_of, check_activations
from bitwright.nn.plain import plain
from bitwright.nn.tree import (
    Kept,
    copied,
    layers_of,
    no_fast_path,
    off_the_fast_path,
    quantizable,
    refuse_complex,
    refuse_hooks,
    require_mode,
)
from bitwright.nn.weight_schemes import WeightSchemes
from bitwright.numerics.scheme import TENSOR, TOKEN, Scheme


class Prepared(nn.Module):
    """A module with observers (`Edge`). body: the original, traced where possible, which computes the same."""

    def __init__(self, body: nn.Module, weights: WeightSchemes, activations: Scheme, kept: Kept, batch: Batch) -> None:
        """batch: on which `convert` compares the results: the example, or the first calibration batch."""
        super().__init__()
        self.body, self.weights, self.activations, self.kept, self.batch = body, weights, activations, kept, batch

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the original module's."""
        with no_fast_path():
            return self.body(*inputs, **named)

    def edges(self) -> list[Edge]:
        """All edges: places where activations will be quantized."""
        return [module for module in self.modules() if isinstance(module, Edge)]


def prepare(
    module: nn.Module,
    example_inputs: Batch,
    *,
    weights: str = "int8-channel",
    activations: str = "int8-tensor-asym",
    observer: str = "mse",
    percentile: float | None = None,
    keep: Mapping[str, str] | None = None,
    schemes: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> Prepared:
    """Insert observers into a module, for `calibrate` and `convert`: post-training static quantization.

    example_inputs  one batch: a tensor, a tuple of arguments, or a dict of named ones
    weights         scheme of the weights: integers, ternary or binary, by channel
    activations     "int8-tensor-asym" or "int8-tensor", or fewer bits: static, one scale for each activation; or dynamic
                    ("int8-token"): then only products are integer, and no calibration is needed
    observer        how a range is chosen from the recorded values: "minmax", "average", "percentile", "mse", "kl"
    percentile      of that observer; None: 99.9
    keep            patterns of module names -> "float", or "bf16"
    schemes         patterns of layers' names -> a scheme of theirs, in place of `weights`; what `keep` matches has none

    Layers of modules that cannot be traced are prepared one by one. Raises RecipeError for a module in training mode, with
    nothing to quantize, that was prepared before, whose graph computes something else, or that cannot be traced and has
    weights outside of torch.nn layers; SchemeError for schemes without an integer form.
    """
    if observer not in RANGES:
        raise RecipeError(f"unknown observer {observer!r}", remedy=one_of(observer, RANGES))
    module = quantizable(module)
    require_mode(module, training=False)
    of_weights = WeightSchemes.of(module, weights, schemes)
    return _prepared(module, example_inputs, of_weights, activations, observer, percentile, keep, inplace, False)


def prepared_for_training(
    module: nn.Module,
    example_inputs: Batch,
    weights: WeightSchemes,
    activations: str,
    observer: str,
    keep: Mapping[str, str] | None,
    inplace: bool,
) -> Prepared:
    """`prepare` for quantization-aware training, of a module in eval mode; dropout still works in training mode."""
    return _prepared(module, example_inputs, weights, activations, observer, None, keep, inplace, True)


def _prepared(
    module: nn.Module,
    example: Batch,
    of_weights: WeightSchemes,
    activations: str,
    observer: str,
    percentile: float | None,
    keep: Mapping[str, str] | None,
    inplace: bool,
    training: bool,
) -> Prepared:
    if isinstance(module, Prepared) or any(isinstance(child, Edge) for child in module.modules()):
        raise RecipeError("already prepared", where=type(module).__name__, remedy="prepare the float module")
    of_values = activations_of(activations)
    check_activations(of_values, TENSOR, TOKEN)
    kept = Kept(module, keep or {})
    with no_fast_path():
        source = copied(module)
        run_named(source, example, RecipeError, "example_inputs as the module is called with")
        expected = outputs(source, example)  # the second run, as a stateful module gives another result
        del source

        def made(*, whole: bool) -> Prepared:
            target = plain(module if inplace else copied(module), kept)
            for name, layer in layers_of(target, DYNAMIC, kept):
                refuse_hooks(layer, name)
                refuse_max_norm(layer, name)
                refuse_complex(layer, name)
            maker = Maker(target, example, of_weights, of_values, observer, percentile, kept, training, whole=whole)
            body = off_the_fast_path(maker.made(target, ""))
            return Prepared(body, of_weights, of_values, kept, example).eval()

        prepared = made(whole=True)
        if not prepared.edges() and not layers_of(prepared, DYNAMIC, Kept(prepared, {})):
            raise nothing_to_quantize(module)
        error = _difference(expected, outputs(prepared, example), type(module).__name__)
        if error is not None and not inplace:  # something that is in no graph, such as autocast
            prepared = made(whole=False)
            error = error if _difference(expected, outputs(prepared, example), "") is not None else None
        if error is not None:
            raise error
    return prepared


def calibrate(prepared: Prepared, batches: Iterable[Batch]) -> Prepared:
    """Run batches (inputs only, no labels) through the module, and record the range of every activation.

    Batches add to those of earlier calls. Raises RecipeError in training mode, or for a module that was not prepared;
    CalibrationError if there are no batches; NumericsError, with the edge's name, for values that are not finite.
    """
    require_prepared(prepared)
    require_mode(prepared, training=False)
    phases = [(edge, edge.phase) for edge in prepared.edges()]
    count = 0
    for edge, _ in phases:
        edge.phase = "watch"
    try:
        for batch in batches:
            with no_fast_path():  # the body, whose signature tells which batches it takes
                run_named(prepared.body, batch, CalibrationError, "batches shaped as example_inputs were")
            prepared.batch = batch if not count else prepared.batch
            count += 1
    finally:
        for edge, phase in phases:
            edge.phase = phase
    if not count:
        raise CalibrationError("no batches", remedy="give at least one batch of inputs")
    return prepared


def require_prepared(module: nn.Module) -> None:
    """RecipeError unless the module is from `prepare` or `prepare_qat`."""
    if isinstance(module, Prepared):
        return
    integer = any(type(child).__module__.startswith("bitwright.nn") for child in module.modules())
    message = "converted already" if integer else "not prepared"
    remedy = "convert what prepare returned, once" if integer else "bitwright.prepare(module, example_inputs) first"
    raise RecipeError(message, where=type(module).__name__, remedy=remedy)


def _difference(left: list[Tensor], right: list[Tensor], where: str) -> RecipeError | None:
    """The error for a graph whose outputs differ from the module's; NumericsError if these are not finite."""
    message = "its graph computes something else: what it does depends on values or on state"
    different = RecipeError(message, where=where, remedy='keep={"the submodule": "float"}, or move the condition out')
    if len(left) != len(right):
        return different
    for a, b in zip(left, right, strict=True):
        if a.is_floating_point() and not bool(torch.isfinite(a).all()):
            raise NumericsError(
                "the outputs are not finite",
                where=where,
                remedy="look for NaN in the example inputs and in its weights",
            )
        a, b = (x.float() if x.dtype == torch.bool else x for x in (a, b))
        most = 1e-3 if a.dtype == torch.float32 else max(1e-3, 4 * EPSILON.get(a.dtype, 0.0))
        if a.shape != b.shape or not torch.allclose(a.float(), b.float(), rtol=most, atol=most * _size(a)):
            return different
    return None


EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}


def _size(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
