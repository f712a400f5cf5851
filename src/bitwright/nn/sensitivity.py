"""What each layer costs when it alone is quantized: where bits matter, before any are spent."""

from collections.abc import Iterable

import torch
from torch import nn

from bitwright.errors import CalibrationError
from bitwright.nn.dynamic import DYNAMIC, dynamic, nothing_to_quantize, replaced, require_mode
from bitwright.nn.prepare import Batch, run, tensors
from bitwright.numerics.loss import ratio
from bitwright.numerics.scheme import Scheme


def sensitivity(
    module: nn.Module, batches: Iterable[Batch], *, weights: str = "int8-channel", activations: str = "int8-token"
) -> dict[str, float]:
    """Name of each layer -> the share of the outputs' energy that is lost when only this layer is quantized.

    Dearest first. Inputs are rounded as they come. The module is the same afterwards. Raises as `quantize_dynamic`
    does, and CalibrationError where there are no batches.
    """
    require_mode(module, training=False)
    scheme, rounding, kept = Scheme.parse(weights), Scheme.parse(activations), list(batches)
    if not kept:
        raise CalibrationError("no batches", remedy="give at least one batch of inputs")
    names = [name for name, child in module.named_modules() if type(child) in DYNAMIC]
    if not names:
        raise nothing_to_quantize(module)
    expected = [tensors(run(module, batch)) for batch in kept]
    costs = {}
    for name in names:
        layer = module.get_submodule(name)
        trial = replaced(module, name, dynamic(layer, scheme, rounding, where=name).eval())
        try:
            costs[name] = _lost(expected, [tensors(run(trial, batch)) for batch in kept])
        finally:
            replaced(module, name, layer)
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


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
