"""OBQ (Optimal Brain Quantizer): round one weight at a time, the cheapest first; the rest of its row makes up for it exactly.

Optimal Brain Surgeon (Hassibi & Stork 1992) removes the weight p of least wₚ² / [H⁻¹]ₚₚ and moves all others by
−wₚ [H⁻¹]₍:,ₚ₎ / [H⁻¹]ₚₚ. ExactOBS (Frantar & Alistarh 2022, arXiv:2208.11580) does so row by row and updates the inverse by
removing a row and a column (Lemma 1, `Inverses`) instead of inverting again; OBQ is the same with the distance to the
nearest code in place of wₚ. GPTQ is OBQ with one order for all rows; with that order (`order="curvature"`) both give the same
codes, so the tests hold `gptq` against this. The cost is N K³: for small layers only.

Pruning and quantizing combine: weights that are to be zero are removed first, exactly, and the others are then rounded with
what is left of each row's inverse.
"""

from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.methods.gptq import DAMPINGS, column_order
from bitwright.methods.keeping_zeros import mask_of
from bitwright.methods.outcome import Outcome
from bitwright.methods.search import best_scales
from bitwright.numerics.codec import code_dtype, per_column, round_to
from bitwright.numerics.qtensor import QTensor, reshaped
from bitwright.numerics.scheme import Scheme

LARGEST_K = 1024
AT_ONCE = 1 << 24  # numbers in the inverses held at a time


def obq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    order: Literal["greedy", "curvature"] = "greedy",
    pruned: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """Round w [N, K] (or a convolution's [N, ...]), K ≤ 1024, under scales searched beforehand.

    gram     [K, K] = XᵀX / T; required
    damping  share of the mean diagonal added to the diagonal
    order    "greedy": each row takes its cheapest weight next; "curvature": all rows by falling diagonal, as GPTQ
    pruned   bool, of w's shape: True where the weight is to be exactly zero; the others make up for it, then are rounded
    fast     ignored: the same signature as the other calibrated methods
    Raises RecipeError without a Gram, for larger K, another order or a mask of another shape; SchemeError if weights are
    pruned and the scheme has no code for zero; NumericsError if H is not positive definite.
    """
    if gram is None:
        raise RecipeError("obq needs calibration", remedy="give --calib general, or --method search")
    if order not in ("greedy", "curvature"):
        raise RecipeError(f"unknown order {order!r}", remedy='options = { order = "greedy" }, or "curvature"')
    matrix = w.reshape(w.shape[0], -1).float().masked_fill(gram.diagonal() == 0, 0.0)
    N, K = matrix.shape
    if K > LARGEST_K:
        raise RecipeError(f"obq on K = {K} would take hours", remedy=f"give --method gptq, or K up to {LARGEST_K}")
    inverse, damping = inverse_hessian(gram, damping)
    gone = torch.zeros_like(matrix, dtype=torch.bool)
    if pruned is not None:
        gone = mask_of(pruned, w, scheme)
        matrix = without(matrix, inverse, gone)
    scales = best_scales(matrix, scheme, 1 / inverse.diagonal())
    scale = per_column(scales.scale, scheme, K).expand(N, K)
    zero = None if scales.zero is None else per_column(scales.zero, scheme, K).expand(N, K)
    fixed = column_order(gram.diagonal(), scheme.unit) if order == "curvature" else None
    parts = []
    for rows in torch.arange(N).split(max(1, AT_ONCE // (K * K))):
        offset = None if zero is None else zero[rows]
        parts.append(_rounded(matrix[rows], inverse, scheme, scale[rows], offset, fixed, gone[rows]))
    q = QTensor(torch.cat(parts), scales, scheme, (N, K))
    return Outcome(reshaped(q, tuple(w.shape)), damping)


def inverse_hessian(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """(gram + damping · mean diagonal · I)⁻¹ in float64, and the damping: as in GPTQ, ten and a hundred times that asked for
    where H cannot be factored.

    NumericsError if no such is positive definite, or if to the Gram's own precision a column depends linearly on others.
    """
    for times in DAMPINGS:
        H = gram.to(torch.float64, copy=True)
        H.diagonal().add_(times * damping * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny)
        factor, failed = torch.linalg.cholesky_ex(H)
        own = (
            factor.diagonal().square() / H.diagonal()
        )  # share of each column's variance that those before do not explain
        if not failed and float(own.min()) > torch.finfo(gram.dtype).eps:
            return torch.cholesky_inverse(factor), times * damping
    raise NumericsError("the damped Gram is not positive definite", remedy="more damping, or more calibration text")


class Inverses:
    """H⁻¹ of R rows, as each row loses its weights one by one: Lemma 1 of ExactOBS.

    Lemma 1 subtracts from H⁻¹ the outer product u uᵀ with u its column p divided by √[H⁻¹]ₚₚ. Here H⁻¹ is left as it is and
    the vectors u are kept, since a step needs only the diagonal and one column of the difference: half of the arithmetic
    and hardly any writing.

    diagonal  [R, K] of each row's inverse as it is now
    here      bool [R, K]: weights not removed yet
    columns   [R, steps, K]: the vectors u of the `gone` steps so far
    """

    def __init__(self, inverse: Tensor, R: int, steps: int) -> None:
        K = len(inverse)
        self.inverse, self.diagonal = inverse, inverse.diagonal().repeat(R, 1)
        self.here = torch.ones(R, K, dtype=torch.bool, device=inverse.device)
        self.columns, self.gone = inverse.new_empty(R, steps, K), 0

    def remove(self, p: Tensor) -> Tensor:
        """Remove weight p [R] of each row. Gives [H⁻¹]₍:,ₚ₎ / [H⁻¹]ₚₚ [R, K] from before, 0 where weights had been removed."""
        some = torch.arange(len(p), device=p.device)
        earlier = self.columns[:, : self.gone]
        column = (self.inverse[p] - (earlier[some, :, p][:, None] @ earlier)[:, 0]) * self.here
        pivot = column[some, p][:, None]
        self.columns[:, self.gone] = column / pivot.sqrt()
        self.diagonal -= self.columns[:, self.gone].square()
        self.here[some, p] = False
        self.gone += 1
        return column / pivot


def without(w: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """w [N, K] with zeros where `pruned` [N, K] is True, the other weights of each row refitted.

    Optimal Brain Surgeon for many weights at a time (arXiv:2208.11580, section 4, group OBS): with P the pruned weights
    of a row, w − H⁻¹₍:,P₎ (H⁻¹₍P,P₎)⁻¹ w₍P₎, which is the least-squares solution. `inverse` may be any multiple of H⁻¹.
    Rows without pruned weights, and columns uncorrelated with all others, keep their bits. float64 inside, then w's type.
    """
    K = w.shape[1]
    parts = []
    for own, gone in zip(*(t.split(max(1, AT_ONCE // (K * K))) for t in (w.double(), pruned)), strict=True):
        there = inverse * (gone[:, :, None] & gone[:, None, :])
        there.diagonal(dim1=1, dim2=2).add_(~gone)  # the identity for weights that stay: they solve to 0
        share = torch.linalg.solve(there, own * gone)  # [R, K]
        parts.append((own - share @ inverse).masked_fill(gone, 0.0))
    return torch.cat(parts).to(w.dtype)


def _rounded(
    w: Tensor, inverse: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor | None, order: Tensor | None, pruned: Tensor
) -> Tensor:
    """Codes [R, K] of a few rows; order [K], or None: greedy; weights `pruned` [R, K], zeros in w, are removed first."""
    R, K = w.shape
    some = torch.arange(R, device=w.device)
    now, left = w.double(), Inverses(inverse, R, K)
    codes = torch.zeros(R, K, dtype=code_dtype(scheme), device=w.device)
    for _ in range(K):
        code, decoded = round_to(now.float(), scale, zero, scheme)
        missed = now - decoded
        if order is None:
            cost = missed.square() / left.diagonal
            cost = torch.where(
                missed.abs() > 0.51 * scale, -missed.abs().double(), cost
            )  # out of reach: before it gets worse
        else:
            cost = order.argsort().double().expand(R, K)  # the step at which each column's turn comes
        p = cost.masked_fill(pruned, -torch.inf).masked_fill(~left.here, torch.inf).argmin(1)
        codes[some, p] = code[some, p].to(codes.dtype)
        now = now - missed[some, p][:, None] * left.remove(p)
    return codes
