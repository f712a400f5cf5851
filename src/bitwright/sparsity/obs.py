"""Optimal Brain Surgeon: remove the weight that raises the loss least once all others are refitted, refit them, repeat.

Hassibi & Stork 1992: let the loss have the Hessian H. Removing weight p and moving all others to their best values adds

    wₚ² / (2 [H⁻¹]ₚₚ),   and moves w by −wₚ [H⁻¹]₍:,ₚ₎ / [H⁻¹]ₚₚ.

For a layer's squared error ‖(ŵ − w) X‖² that is exact, and H = 2XXᵀ (X [K, T] in the papers), the same for all rows. Per
token, the loss of a row is e gram eᵀ and H = 2 gram: then the formula above is the rise of `loss.energy`. ExactOBS
(Frantar & Alistarh 2022, arXiv:2208.11580, section 4) prunes each row by itself, one weight at a time, and records the rise
of every step; the steps of all rows are then taken in the order of their rise until enough weights are removed. So all
rows together decide how many weights each of them loses. The cost is N K³: for small layers only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.obq import AT_ONCE, LARGEST_K, Inverses, inverse_hessian, without
from bitwright.sparsity.magnitude import Pruned, Target
from bitwright.sparsity.wanda import checked


def saliency(w: Tensor, inverse: Tensor) -> Tensor:
    """wₚ² / (2 [H⁻¹]ₚₚ) [N, K]: rise of the loss when that weight alone is removed and all others are refitted.

    w [N, K]; inverse [K, K], or [N, K, K] for rows that differ: of the loss's Hessian, with the factor 2 of its second
    derivative. So H = 2XXᵀ gives the rise of ‖e X‖², H = 2 gram that of e gram eᵀ, and H = gram gives half of that.
    """
    return _rise(w, inverse.diagonal(dim1=-2, dim2=-1))


def prune(
    w: Tensor,
    gram: Tensor | None,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> Pruned:
    """Remove weights so that the loss under `gram` rises least, greedily step by step, and refit the others.

    w        [N, K], or a convolution's [N, ...]; K ≤ 1024
    gram     [K, K] = XᵀX / T; required
    damping  share of the mean diagonal added to the diagonal
    sparsity and pattern: see `Target`, with its errors. Weights whose input is always 0 are removed first, at no cost.
    Raises RecipeError without a Gram, for larger K or a damping below 0; NumericsError if the Gram is not finite, or
    the damped Gram not positive definite.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    K = matrix.shape[1]
    if K > LARGEST_K:
        raise RecipeError(f"obs on K = {K} would take hours", remedy=f"use wanda, or K up to {LARGEST_K}")
    if not 0 <= damping < torch.inf:
        raise RecipeError(f"damping {damping} is not a number from 0 on", remedy="damping=0.01")
    gram = checked(gram, K, "obs")
    inverse, damping = inverse_hessian(
        gram, damping
    )  # of half the Hessian: a constant factor changes neither order nor weights
    live = matrix.masked_fill(gram.diagonal() == 0, 0.0)
    mask = cheapest(traced(live, inverse, pattern), target.count(matrix.numel()), K)
    return Pruned(without(matrix, inverse, mask).view_as(w).to(w.dtype), mask.view_as(w), damping)


@dataclass(frozen=True)
class Trace:
    """Each row pruned by itself. order [N, S]: the column removed at each step; rise [N, S]: what that added to the loss."""

    order: Tensor
    rise: Tensor


def traced(w: Tensor, inverse: Tensor, pattern: tuple[int, int] | None = None) -> Trace:
    """Prune each row of w [N, K] weight by weight: to the last one, or as far as a pattern asks for.

    inverse [K, K]: H⁻¹ in float64, in which the units of `Trace.rise` are those of `saliency`.
    """
    K = w.shape[1]
    parts = [_traced(rows.double(), inverse, pattern) for rows in w.split(max(1, AT_ONCE // (K * K)))]
    return Trace(torch.cat([part.order for part in parts]), torch.cat([part.rise for part in parts]))


def cheapest(trace: Trace, count: int, K: int) -> Tensor:
    """The mask [N, K] after `count` steps, each taken from the row whose next one is cheapest (ExactOBS's global step).

    The steps of a row have a fixed order, so a step ranks by the largest rise so far in its row: sorted by that, steps come
    in the same order as from a heap of the rows' next steps.
    """
    N, S = trace.rise.shape
    taken = trace.rise.cummax(1).values.flatten().argsort(stable=True)[:count]
    steps = (taken // S).bincount(minlength=N)  # of each row
    gone = torch.arange(S, device=steps.device) < steps[:, None]
    return torch.zeros(N, K, dtype=torch.bool, device=steps.device).scatter_(1, trace.order, gone)


def _traced(w: Tensor, inverse: Tensor, pattern: tuple[int, int] | None) -> Trace:
    """`traced` for a few rows."""
    R, K = w.shape
    n, m = pattern or (0, K)  # of every m neighbours n stay
    some = torch.arange(R, device=w.device)
    now, left = w.clone(), Inverses(inverse, R, K // m * (m - n))
    order, rise = [], []
    for _ in range(K // m * (m - n)):
        here = left.here.view(R, -1, m)
        free = (here & (here.sum(2, keepdim=True) > n)).view(R, K)
        least, p = _rise(now, left.diagonal).masked_fill(~free, torch.inf).min(1)
        now -= now[some, p][:, None] * left.remove(p)
        order.append(p)
        rise.append(least)
    return Trace(torch.stack(order, 1), torch.stack(rise, 1))


def _rise(w: Tensor, diagonal: Tensor) -> Tensor:
    """`saliency` from the inverse's diagonal."""
    return w.square() / (2 * diagonal)
