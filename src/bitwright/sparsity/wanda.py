"""Wanda: a weight counts by its size times that of its input, against the other weights of its row.

Sun et al. 2023 (arXiv:2306.11695), equation 1: |w| · ‖x‖ for each weight and its input over all tokens. ‖xₖ‖² is T · gramₖₖ,
and T, the same for all, changes no order.
"""

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.sparsity.magnitude import Pruned, Target


def wanda(
    w: Tensor, gram: Tensor | None, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None
) -> Pruned:
    """Remove the least |w| · √gramₖₖ of each row, or of every m neighbours; the others stay as they are.

    w [N, K], or a convolution's [N, ...]; gram [K, K] = XᵀX / T; sparsity and pattern as in `Target`, with its errors.
    Raises RecipeError without a Gram or for one of another K, NumericsError if it is not finite.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    seen = checked(gram, matrix.shape[1], "wanda").diagonal().clamp(min=0)
    mask = target.lowest(matrix.abs() * seen.sqrt(), matrix.shape[1]).view_as(w)
    return Pruned(w.masked_fill(mask, 0.0), mask)


def checked(gram: Tensor | None, K: int, name: str) -> Tensor:
    """The Gram, if the pruner of that name can use it."""
    if gram is None:
        raise RecipeError(f"{name} needs calibration", remedy="give calibration text, or use magnitude")
    if gram.shape != (K, K):
        raise RecipeError(
            f"a Gram {list(gram.shape)} is not that of weights with K = {K}", remedy="the layer's own Gram"
        )
    if not torch.isfinite(gram).all():
        raise NumericsError("the Gram matrix of the inputs is not finite", remedy="look for overflow in the model")
    return gram
