"""Gram matrices of the inputs of a module's layers, from batches of its own inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from bitwright.calibration.statistics import Gram
from bitwright.nn.batches import Batch, require_finite, run
from bitwright.nn.tree import no_fast_path


def grams_of(
    module: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Batch],
    rows: Callable[[Tensor, nn.Module], Tensor] = lambda x, _: x,
) -> dict[str, Gram]:
    """The Gram matrix XᵀX [K, K] of each layer's inputs, by name; a layer that no batch reaches is missing.

    rows: makes the rows [..., K] that count of a layer's input and the layer. NumericsError for inputs that are not finite.
    """
    grams: dict[str, Gram] = {}

    def hook(name: str) -> Any:
        def see(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = rows(inputs[0] if inputs else named["input"], layer)
            require_finite([x], "the inputs", name)
            grams.setdefault(name, Gram(x.shape[-1])).update(x)

        return see

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers]
    try:
        with no_fast_path():
            for batch in batches:
                run(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return grams
