"""Sensitivity analysis: the output error of a module when one layer at a time is quantized."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from bitwright.errors import CalibrationError
from bitwright.nn.batches import Batch, outputs, require_finite
from bitwright.nn.dynamic import DYNAMIC, dynamic, nothing_to_quantize
from bitwright.nn.integer import activations_of
from bitwright.nn.plain import plain
from bitwright.nn.tree import Kept, copied, layers_of, no_fast_path, quantizable, replaced, require_mode
from bitwright.numerics.loss import ratio
from bitwright.numerics.scheme import Scheme


def sensitivity(
    module: nn.Module, batches: Iterable[Batch], *, weights: str = "int8-channel", activations: str = "int8-token"
) -> dict[str, float]:
    """Layer -> relative squared error of the outputs, Σ (y − ŷ)² / Σ y², if only this layer is dynamically quantized.

    The most sensitive layer is first. The module itself is not changed. Raises as `quantize_dynamic`, CalibrationError if there
    are no batches, and NumericsError if the outputs are not finite.
    """
    module = quantizable(module)
    require_mode(module, training=False)
    scheme, rounding, kept = Scheme.parse(weights), activations_of(activations), given(batches)
    module = plain(copied(module), Kept(module, {}))
    layers = layers_of(module, DYNAMIC, Kept(module, {}))
    if not layers:
        raise nothing_to_quantize(module)
    errors = errors_alone(
        module, layers, kept, lambda name, layer: {"": dynamic(layer, scheme, rounding, where=name).eval()}
    )
    return dict(sorted(((name, of[""]) for name, of in errors.items()), key=lambda item: -item[1]))


def given(batches: Iterable[Batch]) -> list[Batch]:
    """The batches. CalibrationError if there are none."""
    kept = list(batches)
    if not kept:
        raise CalibrationError("no batches", remedy="give at least one batch of inputs")
    return kept


def errors_alone(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Batch],
    forms: Callable[[str, nn.Module], Mapping[str, nn.Module]],
) -> dict[str, dict[str, float]]:
    """Layer -> form -> relative squared error of the outputs if only this layer has this form.

    forms: for a layer and its name, what may stand in its place, by name. NumericsError if the outputs are not finite.
    """
    errors: dict[str, dict[str, float]] = {}
    with no_fast_path():
        name = type(module).__name__
        expected = [require_finite(outputs(module, batch), "the outputs", name) for batch in batches]
        for name, layer in layers:
            errors[name] = {}
            for form, other in forms(name, layer).items():
                module = replaced(module, layer, other)
                errors[name][form] = _lost(expected, [outputs(module, batch) for batch in batches])
                module = replaced(module, other, layer)
    return errors


def _lost(expected: list[list[torch.Tensor]], found: list[list[torch.Tensor]]) -> float:
    """Σ (found − expected)² / Σ expected², over all floating-point outputs."""
    pairs = [
        (a.double(), b.double())
        for left, right in zip(expected, found, strict=True)
        for a, b in zip(left, right, strict=True)
        if a.is_floating_point()
    ]
    lost = torch.stack([(a - b).square().sum() for a, b in pairs])
    return ratio(lost, torch.stack([a.square().sum() for a, _ in pairs]))
