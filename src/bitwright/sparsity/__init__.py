"""Pruning: which weights to remove. (w, gram, *, sparsity or pattern, options) -> Pruned; one file a method.

Imports: errors, numerics, methods.
"""

from collections.abc import Callable

from bitwright.sparsity.magnitude import Pruned, magnitude
from bitwright.sparsity.obs import prune
from bitwright.sparsity.sparsegpt import sparsegpt
from bitwright.sparsity.wanda import wanda

PRUNERS: dict[str, Callable[..., Pruned]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "obs": prune,
}

__all__ = ["PRUNERS", "Pruned", "magnitude", "prune", "sparsegpt", "wanda"]
