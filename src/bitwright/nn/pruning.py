"""Prune the weights of any module before quantization; later steps keep the zeros."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bitwright.calibration.statistics import Gram
from bitwright.errors import CalibrationError, RecipeError, one_of
from bitwright.nn.batches import Batch
from bitwright.nn.dynamic import nothing_to_quantize
from bitwright.nn.grams import grams_of
from bitwright.nn.layers import matrix
from bitwright.nn.plain import plain
from bitwright.nn.tree import Kept, copied, layers_of, quantizable, refuse_complex, require_mode
from bitwright.sparsity import PRUNERS

KINDS: dict[type[nn.Module], None] = {nn.Linear: None, nn.Conv1d: None, nn.Conv2d: None}


@torch.no_grad()
def prune(
    module: nn.Module,
    batches: Iterable[Batch] = (),
    *,
    method: str = "magnitude",
    sparsity: float | str = 0.5,
    keep: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Set weights of Linear layers and convolutions to 0.

    batches   calibration inputs, needed by all methods but "magnitude"
    method    "magnitude": the smallest weights; "wanda": the smallest |weight| · ‖input‖ (Sun et al. 2023, arXiv:2306.11695);
              "sparsegpt": column by column, compensated by the columns to come (Frantar and Alistarh 2023, arXiv:2301.00774);
              "obs": those that add least error, compensated by the others (Frantar and Alistarh 2022, arXiv:2208.11580; up to
              1024 inputs)
    sparsity  the fraction that is set to 0, such as 0.5, or a pattern n:m of which n stay, such as "2:4"
    keep      patterns of module names -> "float": not pruned

    A weight that is exactly 0 stays 0 in every later step: static and dynamic quantization, `prepare_qat`,
    `quantize_weights`. Raises RecipeError for training mode, an unknown method or an invalid sparsity; CalibrationError if
    a method needs inputs of a layer that no batch reaches.
    """
    module = quantizable(module)
    require_mode(module, training=False)
    if method not in PRUNERS:
        raise RecipeError(f"unknown method {method!r}", remedy=one_of(method, PRUNERS))
    target = _target(sparsity)
    kept = Kept(module, keep or {})
    pruned = plain(module if inplace else copied(module), kept)
    layers = layers_of(pruned, KINDS, kept)
    if not layers:
        raise nothing_to_quantize(module)
    for name, layer in layers:
        refuse_complex(layer, name)
    grams = {} if method == "magnitude" else _grams(pruned, layers, list(batches))
    for name, layer in layers:
        weight = layer.get_parameter("weight")
        if method != "magnitude" and name not in grams:
            raise CalibrationError(
                f"method {method} needs to see inputs", where=name, remedy="batches that reach this layer"
            )
        grouped = getattr(layer, "groups", 1) > 1  # groups have different inputs: pruned by magnitude
        gram = grams[name].value() if name in grams and not grouped else None
        found = PRUNERS["magnitude" if gram is None else method](matrix(weight), gram, **target).weight
        weight.copy_(found if weight.ndim == 2 else _as_kernel(found, weight))
    return pruned


def _target(sparsity: float | str) -> dict[str, float | tuple[int, int]]:
    """A fraction, or a pattern such as "2:4", as the pruners' keyword arguments."""
    if not isinstance(sparsity, str):
        return {"sparsity": sparsity}
    n, colon, m = sparsity.partition(":")
    if not (colon and n.isdigit() and m.isdigit()):
        raise RecipeError(f"sparsity {sparsity!r} is no share and no pattern", remedy='such as 0.5, or "2:4"')
    return {"pattern": (int(n), int(m))}


def _as_kernel(rows: Tensor, weight: Tensor) -> Tensor:
    """Undo `matrix`: rows [N, K] in the shape of a convolution's weight."""
    return rows.view(len(rows), *weight.shape[2:], weight.shape[1]).movedim(-1, 1)


def _grams(module: nn.Module, layers: list[tuple[str, nn.Module]], batches: list[Batch]) -> dict[str, Gram]:
    """The Gram matrix XᵀX of each layer's inputs, in the column order of `matrix`; a placeholder for grouped convolutions."""
    grouped = {name for name, layer in layers if getattr(layer, "groups", 1) > 1}
    watched = [(name, layer) for name, layer in layers if name not in grouped]
    return grams_of(module, watched, batches, _rows) | {name: Gram(1) for name in grouped}


def _rows(x: Tensor, layer: nn.Module) -> Tensor:
    """The inputs of a layer as rows [T, K]; for a convolution its patches."""
    if isinstance(layer, nn.Linear):
        return x
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    one = isinstance(layer, nn.Conv1d)
    x = x if x.ndim == (3 if one else 4) else x[None]
    x = nn.functional.pad(x, layer._reversed_padding_repeated_twice)
    x = x.unsqueeze(-2) if one else x
    first = (1,) if one else ()
    seen = nn.functional.unfold(
        x, first + layer.kernel_size, first + layer.dilation, 0, first + layer.stride
    )  # fmt: skip
    return seen.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1, 2).transpose(1, 2).flatten(0, 1)
