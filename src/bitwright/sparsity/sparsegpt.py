"""SparseGPT: GPTQ's column loop, in which weights are set to 0 instead of being rounded.

Frantar & Alistarh 2023 (arXiv:2301.00774, algorithm 1): column after column, what is removed is made up for by the columns
that are still to come. Which weights are removed is chosen for `BLOCK` columns at a time (of every m neighbours for a
pattern), when their turn comes, so on weights that already carry the errors of earlier ones: those of least w² Uₖₖ², the
error that their removal leaves (see methods/gptq.py for U; the paper's w² / [H⁻¹]ₖₖ² has the Cholesky factor of H⁻¹).

Two differences. For a pattern, each m neighbours stay together and the groups are taken by falling mean square of their inputs.
And for a share: the paper removes the same share of each block; here a block loses as many weights as it has among those of
least w² Uₖₖ² in the whole matrix, so that blocks of quiet inputs lose more; the loss is 4 to 10 % lower on correlated inputs.
"""

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.methods.gptq import Factor, column_order, factorize
from bitwright.sparsity.magnitude import Pruned, Target
from bitwright.sparsity.wanda import checked

BLOCK = 128  # columns whose mask is chosen together, and whose errors reach the others in one product


def sparsegpt(
    w: Tensor,
    gram: Tensor | None,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> Pruned:
    """Remove weights column by column, and let the columns to come make up for each.

    w        [N, K], or a convolution's [N, ...]
    gram     [K, K] = XᵀX / T; required
    damping  share of the mean diagonal added to the diagonal
    sparsity and pattern: see `Target`, with its errors. Raises RecipeError without a Gram, or for a pattern that does not
    divide 128 columns; NumericsError if the Gram is not finite or cannot be factored.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    gram = checked(gram, matrix.shape[1], "sparsegpt").float()
    if pattern is not None and BLOCK % pattern[1]:
        message = f"a pattern of every {pattern[1]} does not divide blocks of {BLOCK} columns"
        raise RecipeError(message, remedy="pattern=(2, 4), or a sparsity")
    own = torch.arange(len(gram), device=gram.device)
    factor = factorize(gram, own if pattern is None else column_order(gram.diagonal(), pattern[1]), damping)
    if factor is None:
        remedy = "more calibration text, or wanda"
        raise NumericsError("the Gram matrix of the inputs cannot be factored", remedy=remedy)
    left, gone = _without(matrix, factor, target)
    return Pruned(left.view_as(w).to(w.dtype), gone.view_as(w), factor.damping)


def _without(w: Tensor, factor: Factor, target: Target) -> tuple[Tensor, Tensor]:
    """The pruned matrix and its mask [N, K]."""
    original = w.T[factor.order].contiguous()  # [K, N]
    now, gone = original.clone(), torch.zeros_like(original, dtype=torch.bool)
    cost = (original * factor.pivots[:, None]).abs()
    before = target.lowest(cost, cost.numel()) if target.pattern is None else gone
    for begin in range(0, len(now), BLOCK):
        end = min(begin + BLOCK, len(now))
        step = end - begin if target.pattern is None else target.pattern[1]
        for start in range(begin, end, step):
            stop = min(start + step, end)
            cost = (now[start:stop] * factor.pivots[start:stop, None]).abs()
            count = None if target.pattern is not None else int(before[start:stop].sum())
            gone[start:stop] = target.lowest(cost.T.contiguous(), cost.numel(), count).T
            for i in range(start, stop):
                now[i].masked_fill_(gone[i], 0.0)
                now[i + 1 : end].addr_(factor.propagation[i, i + 1 : end], original[i] - now[i])
        now[end:].addmm_(factor.propagation[begin:end, end:].T, original[begin:end] - now[begin:end])
    found, mask = torch.empty_like(now), torch.empty_like(gone)
    found[factor.order], mask[factor.order] = now, gone
    return found.T.contiguous(), mask.T.contiguous()
