"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

The layer's loss is tr(E H Eᵀ) with E = w − decoded and H the (damped) Gram of its inputs. With H = U Uᵀ, U upper
triangular in the order of the visit, it is ‖E U‖², and column k of E U holds no error of a later column:
Eₖ Uₖₖ + Σ (i < k) Eᵢ Uᵢₖ. So when column k's turn comes, the best it can aim at is wₖ + Σ (i < k) Eᵢ Uᵢₖ / Uₖₖ, and
missing that by e costs (e Uₖₖ)². This is GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), whose R with
H⁻¹ = RᵀR is U⁻¹; but neither H nor U is ever inverted, which saves more than half of the preparation.

What a plain version lacks and this one does:
- columns are visited in the order of falling diag(H), *units* (the columns whose scales are chosen together) kept whole
  and in place, so no index is needed at run time;
- a unit's scales are searched when it is reached, on weights that already carry earlier errors, with the importance
  Uₖₖ² that a rounding error really has; rows are rounded alongside with scales fixed beforehand, and whichever
  loses less is kept;
- inputs that are never active get w = 0; damping grows until the factor exists; else the fallback is on record;
- `descend` then improves codes and scales by coordinate descent.

The loop works on wᵀ, so that each column of w is contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.codec import QTensor, Scales, code_dtype, fit, map_rows, reshaped, round_to, rows
from bitwright.errors import NumericsError, RecipeError
from bitwright.kernels import rounding
from bitwright.methods.descend import descend
from bitwright.methods.outcome import Outcome
from bitwright.methods.search import best_scales, search
from bitwright.scheme import TENSOR, Scheme

TRIAL_ROWS = 256  # rows that decide for a matrix of more than four times as many
DAMPINGS = (1.0, 10.0, 100.0)  # factors on the damping asked for, tried in turn


def gptq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block: int = 128,
    sweeps: int | None = None,
    compensated_scales: bool = True,
) -> Outcome:
    """Round w with error feedback.

    w                   [N, K], or a convolution's [N, ...]
    gram                [K, K] = XᵀX / T; required
    damping             share of the mean diagonal added to the diagonal; raised tenfold, twice, if H cannot be factored
    block               columns whose updates are applied together to the rest (lazy batches)
    sweeps              passes of coordinate descent afterwards; 0 is GPTQ as published; None: 1, below 4 bits 2
    compensated_scales  try scales searched on compensated weights beside those fixed beforehand
    Raises RecipeError without a Gram or for options that mean nothing, NumericsError if the Gram is not finite.
    """
    if gram is None:
        raise RecipeError("gptq needs calibration", remedy="give calibration text, or use --method search or rtn")
    if not torch.isfinite(gram).all():
        raise NumericsError("the Gram matrix of the inputs is not finite", remedy="look for overflow in the model")
    _check_options(damping, block, scheme.unit)
    sweeps = (2 if scheme.levels.bits < 4 else 1) if sweeps is None else sweeps
    matrix = w.reshape(w.shape[0], -1).float()
    dead = gram.diagonal() == 0
    if dead.any():
        matrix = matrix.masked_fill(dead, 0.0)
    factor = factorize(gram, scheme, damping)
    if factor is None:
        reason = f"gptq -> search: the Gram cannot be factored with damping up to {damping * DAMPINGS[-1]:g}"
        return Outcome(reshaped(search(matrix, gram, scheme).q, tuple(w.shape)), damping * DAMPINGS[-1], reason)
    q = _round(matrix, factor, scheme, block, compensated_scales)
    ridge = factor.damping * float(gram.diagonal().mean())
    q = descend(matrix, gram, q, sweeps=sweeps, block=block, ridge=ridge)
    return Outcome(reshaped(q, tuple(w.shape)), factor.damping)


@dataclass(frozen=True)
class Factor:
    """H = U Uᵀ in the order of the visit.

    order [K]: columns as visited; spread [K, K]: Uᵢₖ / Uₖₖ, what of column i's error column k takes on; pivots [K]: Uₖₖ;
    damping: the share of the mean diagonal that it took.
    """

    order: Tensor
    spread: Tensor
    pivots: Tensor
    damping: float


def visiting_order(diagonal: Tensor, unit: int | None) -> Tensor:
    """Columns by falling diagonal; units by falling mean and kept together; a short last unit stays last."""
    K = len(diagonal)
    if unit is None or unit >= K:
        return diagonal.argsort(descending=True, stable=True)
    whole = diagonal[: K // unit * unit].view(-1, unit)
    units = whole.mean(1).argsort(descending=True, stable=True)
    inside = whole.argsort(dim=1, descending=True, stable=True) + unit * torch.arange(len(whole))[:, None].to(
        whole.device
    )
    tail = diagonal[len(whole) * unit :].argsort(descending=True, stable=True) + len(whole) * unit
    return torch.cat([inside[units].flatten(), tail])


def factorize(gram: Tensor, scheme: Scheme, damping: float) -> Factor | None:
    """U by one Cholesky of H in reversed order; None if H is not positive however much it is damped."""
    diagonal = gram.diagonal()
    order = visiting_order(diagonal, scheme.unit)
    backwards = order.flip(0)
    mean = float(diagonal.mean())
    for times in DAMPINGS:
        H = gram[backwards][:, backwards]
        H.diagonal().add_(max(damping * times * mean, torch.finfo(H.dtype).tiny))
        lower, failed = torch.linalg.cholesky_ex(H)  # H reversed = L Lᵀ, so H = U Uᵀ with U = L reversed
        del H
        if not failed and float(lower.diagonal().min()) > 0:
            upper = lower.flip(0, 1)
            pivots = upper.diagonal().clone()
            return Factor(order, upper.div_(pivots), pivots, damping * times)
    return None


def _check_options(damping: float, block: int, unit: int | None) -> None:
    if not damping > 0 or block < 1:
        raise RecipeError(f"damping {damping} and block {block} must be above 0", remedy="such as 0.01 and 128")
    if unit is not None and unit % block and block % unit:
        message = f"blocks of {block} columns cut through units of {unit}"
        raise RecipeError(message, remedy="a block that divides the unit, or is a multiple of it")


def _round(w: Tensor, factor: Factor, scheme: Scheme, block: int, compensated: bool) -> QTensor:
    """Round under scales fixed beforehand and under those of compensated weights, whichever loses less.

    A small matrix is rounded both ways and each row keeps the better; of a large one a sample of its rows is, and all
    rows go the way that won there.
    """
    N, K = w.shape
    importance = torch.empty(K, device=w.device)
    importance[factor.order] = factor.pivots.square()
    by_units = compensated and scheme.unit is not None and scheme.unit < K
    if by_units and N > 4 * TRIAL_ROWS:
        _, lost = _round_both_ways(w[:: N // TRIAL_ROWS], factor, scheme, importance, block)
        fixed, refitted = lost.sum(1).tolist()
        if refitted < fixed:
            return _round_columns(w, factor, scheme, fit(w, scheme), importance, block, refit_from=0)[0]
        by_units = False
    if by_units:
        return _round_both_ways(w, factor, scheme, importance, block)[0]
    scales = best_scales(w, scheme, importance)
    return _round_columns(w, factor, scheme, scales, importance, block, refit_from=N)[0]


def _round_both_ways(
    w: Tensor, factor: Factor, scheme: Scheme, importance: Tensor, block: int
) -> tuple[QTensor, Tensor]:
    """Both ways stacked in one visit: the better of each row, and the losses [2, N] under fixed and refitted scales."""
    N = len(w)
    twice = map_rows(lambda t: torch.cat([t, t]), scheme, best_scales(w, scheme, importance))
    q, lost = _round_columns(torch.cat([w, w]), factor, scheme, twice, importance, block, refit_from=N)
    lost = lost.view(2, N)
    return pick_rows(lost[1] < lost[0], rows(q, N, 2 * N), rows(q, 0, N)), lost


def pick_rows(mask: Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Row by row a where the mask [N] holds, else b; both of one scheme and shape."""
    column = mask[:, None]
    scales = map_rows(lambda x, y: torch.where(column, x, y), a.scheme, a.scales, b.scales)
    return QTensor(torch.where(column, a.codes, b.codes), scales, a.scheme, a.shape)


def _round_columns(
    w: Tensor, factor: Factor, scheme: Scheme, scales: Scales, importance: Tensor, block: int, *, refit_from: int
) -> tuple[QTensor, Tensor]:
    """The visit: round each column and spread its error over the later ones. Also each row's loss [N].

    Rows from `refit_from` on get new scales at the first column of each unit.
    """
    N, K = w.shape
    order, spread = factor.order, factor.spread
    original = w.T[order]  # [K, N]
    wt = original.clone()  # what each column aims at, as errors come in
    tables = _Tables(scales, scheme, N, K)
    groups = order // scheme.group_length(K)
    unit = scheme.unit or K
    codes, lost = torch.empty(K, N, dtype=code_dtype(scheme), device=w.device), torch.zeros(N, device=w.device)
    for start in range(0, K, block):
        stop = min(start + block, K)
        errors = torch.empty_like(wt[start:stop])
        for begin in range(start, stop, min(unit, block)):
            end = min(begin + unit, stop)
            if begin % unit == 0 and refit_from < N:
                tables.refit(wt, order, begin, unit, importance, refit_from)
            now, near = wt[begin:end], spread[begin:end, begin:end]
            codes[begin:end], new = tables.visit(now, original[begin:end], near, groups[begin:end])
            errors[begin - start : end - start] = new
            wt[end:stop].addmm_(spread[begin:end, end:stop].T, new)
        missed = wt[start:stop] - original[start:stop] + errors  # aim − decoded
        lost += missed.mul_(factor.pivots[start:stop, None]).square_().sum(0)
        wt[stop:].addmm_(spread[start:stop, stop:].T, errors)
    codes[order] = codes.clone()
    return QTensor(codes.T.contiguous(), tables.scales(), scheme, (N, K)), lost


class _Tables:
    """The scales of all groups, laid out [G, N] for the visit, replaceable unit by unit."""

    def __init__(self, scales: Scales, scheme: Scheme, N: int, K: int) -> None:
        G = scheme.groups(K)
        self.scheme, self.start = scheme, scales
        self.scale = scales.scale.expand(N, G).T.contiguous()
        self.zero = None if scales.zero is None else scales.zero.expand(N, G).T.contiguous()
        self.outer = None if scales.outer is None else scales.outer.clone()
        self.outer_zero = None if scales.outer_zero is None else scales.outer_zero.clone()

    def visit(self, aim: Tensor, true: Tensor, spread: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Round n columns in turn: codes [n, N], errors [n, N]; aim [n, N] takes on the errors of earlier ones."""
        if rounding.handles(self.scheme, aim):
            return rounding.visit(aim, true, spread, self.scheme, groups, self.scale, self.zero)
        codes, errors = [], torch.empty_like(aim)
        for i, group in enumerate(groups.tolist()):
            zero = None if self.zero is None else self.zero[group]
            code, decoded = round_to(aim[i], self.scale[group], zero, self.scheme)
            codes.append(code.to(code_dtype(self.scheme)))
            torch.sub(true[i], decoded, out=errors[i])
            aim[i + 1 :].addr_(spread[i, i + 1 :], errors[i])
        return torch.stack(codes), errors

    def refit(self, wt: Tensor, order: Tensor, at: int, unit: int, importance: Tensor, first: int) -> None:
        """Search the scales of the unit that begins at visit `at` on the weights as they stand, rows `first` on."""
        columns = order[at : at + unit]
        begin = int(columns.min())
        here = slice(begin, begin + len(columns))
        w = torch.empty(wt.shape[1] - first, len(columns), device=wt.device)
        w[:, columns - begin] = wt[at : at + unit, first:].T
        whole_tensor = self.outer if self.scheme.scale == "e4m3" else None
        found = best_scales(w, self.scheme, importance[here], outer=whole_tensor)
        g = self.scheme.group_length(len(order))
        into = slice(begin // g, begin // g + found.scale.shape[1])
        self.scale[into, first:] = found.scale.T
        if self.zero is not None and found.zero is not None:
            self.zero[into, first:] = found.zero.T
        if whole_tensor is None:
            block = begin // unit
            for table, new in ((self.outer, found.outer), (self.outer_zero, found.outer_zero)):
                if table is not None and new is not None:
                    table[first:, block : block + 1] = new

    def scales(self) -> Scales:
        """Back to the shapes they came in."""
        if self.scheme.group == TENSOR:
            return self.start
        zero = None if self.zero is None else self.zero.T.contiguous()
        return Scales(self.scale.T.contiguous(), zero, self.outer, self.outer_zero)
