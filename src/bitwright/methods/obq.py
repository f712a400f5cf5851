"""OBQ: one weight at a time, the one that costs least first, and the rest of its row makes up for it exactly.

Optimal Brain Surgeon (Hassibi & Stork 1992) removes the weight p of least wₚ² / [H⁻¹]ₚₚ and moves all others by
−wₚ [H⁻¹]₍:,ₚ₎ / [H⁻¹]ₚₚ. ExactOBS (Frantar & Alistarh 2022, arXiv:2208.11580) does so row by row and updates the inverse by
removing a row and a column (Lemma 1) instead of inverting again; OBQ is the same with the distance to the nearest code
in the place of wₚ. GPTQ is OBQ with one order for all rows; with that order (`order="curvature"`) both give the same
codes, which makes this the oracle of `gptq`. Its cost is N K³, so it serves small layers only.
"""

from typing import Literal

import torch
from torch import Tensor

from bitwright.codec import code_dtype, round_to, spread
from bitwright.errors import NumericsError, RecipeError
from bitwright.methods.gptq import visiting_order
from bitwright.methods.outcome import Outcome
from bitwright.methods.search import best_scales
from bitwright.qtensor import QTensor, reshaped
from bitwright.scheme import Scheme

LARGEST_K = 1024
AT_ONCE = 1 << 24  # entries of inverses held at a time


def obq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    order: Literal["greedy", "curvature"] = "greedy",
    fast: bool = False,
) -> Outcome:
    """Round w [N, K] (or a convolution's [N, ...]), K ≤ 1024, under scales searched beforehand.

    gram     [K, K] = XᵀX / T; required
    damping  share of the mean diagonal added to the diagonal
    order    "greedy": each row takes its cheapest weight next; "curvature": all rows by falling diagonal, as GPTQ
    fast     taken for the sake of a common signature; nothing here is large
    Raises RecipeError without a Gram, for larger K or another order; NumericsError if H is not positive definite.
    """
    if gram is None:
        raise RecipeError("obq needs calibration", remedy="give calibration text, or use --method search or rtn")
    if order not in ("greedy", "curvature"):
        raise RecipeError(f"unknown order {order!r}", remedy="greedy or curvature")
    matrix = w.reshape(w.shape[0], -1).float().masked_fill(gram.diagonal() == 0, 0.0)
    N, K = matrix.shape
    if K > LARGEST_K:
        raise RecipeError(f"obq on K = {K} would take days", remedy=f"method gptq, or K up to {LARGEST_K}")
    inverse = inverse_hessian(gram, damping)
    scales = best_scales(matrix, scheme, 1 / inverse.diagonal())
    scale = spread(scales.scale, scheme, K).expand(N, K)
    zero = None if scales.zero is None else spread(scales.zero, scheme, K).expand(N, K)
    fixed = visiting_order(gram.diagonal(), scheme.unit) if order == "curvature" else None
    parts = []
    for rows in torch.arange(N).split(max(1, AT_ONCE // (K * K))):
        parts.append(_rounded(matrix[rows], inverse, scheme, scale[rows], None if zero is None else zero[rows], fixed))
    q = QTensor(torch.cat(parts), scales, scheme, (N, K))
    return Outcome(reshaped(q, tuple(w.shape)), damping)


def inverse_hessian(gram: Tensor, damping: float) -> Tensor:
    """(gram + damping · mean diagonal · I)⁻¹ in float64. NumericsError if that is not positive definite."""
    H = gram.double()
    H.diagonal().add_(damping * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(H)
    if failed:
        raise NumericsError("the damped Gram is not positive definite", remedy="more damping, or more calibration text")
    return torch.cholesky_inverse(factor)


def removed(inverse: Tensor, p: Tensor) -> Tensor:
    """Lemma 1: from H⁻¹ [R, K, K] of each row, that of H without row and column p [R]; those become zeros."""
    some = torch.arange(len(p))
    column = inverse[some, :, p]  # [R, K]
    pivot = column[some, p]
    left = inverse - column[:, :, None] * (column / pivot[:, None])[:, None, :]
    left[some, :, p] = 0
    left[some, p, :] = 0
    return left


def _rounded(
    w: Tensor, inverse: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None, order: Tensor | None
) -> Tensor:
    """Codes [R, K] of a few rows; order [K], or None: greedy."""
    R, K = w.shape
    some = torch.arange(R)
    now, left = w.double(), inverse.expand(R, K, K).clone()
    codes = torch.zeros(R, K, dtype=code_dtype(scheme))
    done = torch.zeros(R, K, dtype=torch.bool)
    for step in range(K):
        code, decoded = round_to(now.float(), scale, zero, scheme)
        missed = now - decoded
        if order is None:
            cost = missed.square() / left.diagonal(dim1=1, dim2=2)
            cost = torch.where(
                missed.abs() > 0.51 * scale, -missed.abs().double(), cost
            )  # out of reach: before it gets worse
            p = cost.masked_fill(done, torch.inf).argmin(1)
        else:
            p = order[step].expand(R)
        codes[some, p] = code[some, p].to(codes.dtype)
        done[some, p] = True
        share = left[some, :, p] / left[some, p, p][:, None]  # [R, K]
        now = now - missed[some, p][:, None] * share
        left = removed(left, p)
    return codes
