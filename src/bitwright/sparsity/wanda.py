"""Wanda: prune by weight magnitude times input norm, row by row.

Sun et al. 2023 (arXiv:2306.11695), equation 1: the score |w| · ‖x‖ for each weight and its input over all tokens. ‖xₖ‖² is
T · gramₖₖ, and the constant T changes no order.
"""

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.sparsity.magnitude import Pruned, Target


def wanda(
    w: Tensor, gram: Tensor | None, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None
) -> Pruned:
    """Remove the least |w| · √gramₖₖ of each row, or of every m neighbours; the others keep their values.

    w [N, K], or a convolution's [N, ...]; gram [K, K] = XᵀX / T; sparsity and pattern: see `Target`, with its errors.
    Raises RecipeError without a Gram or for one of another K, NumericsError if it is not finite.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    seen = checked(gram, matrix.shape[1], "wanda").diagonal().clamp(min=0)
    mask = target.lowest(matrix.abs() * seen.sqrt(), matrix.shape[1]).view_as(w)
    return Pruned(w.masked_fill(mask, 0.0), mask)


def checked(gram: Tensor | None, K: int, name: str) -> Tensor:
    """The Gram, if the pruner `name` can use it; else RecipeError or NumericsError."""
    if gram is None:
        raise RecipeError(f"{name} needs calibration", remedy="give the Gram of the layer's inputs, or use magnitude")
    if gram.shape != (K, K):
        raise RecipeError(
            f"a Gram {list(gram.shape)} is not that of weights with K = {K}",
            remedy=f"give the layer's own Gram, [{K}, {K}]",
        )
    if not torch.isfinite(gram).all():
        raise NumericsError(
            "the Gram matrix of the inputs is not finite", remedy="give other calibration text, or use magnitude"
        )
    return gram
