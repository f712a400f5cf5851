"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

The layer's loss is tr(E H Eᵀ) with E = w − decoded and H the (damped) Gram of its inputs. Rounding column j with error e
costs e² / (H⁻¹)ⱼⱼ once all later columns have moved by −e·(H⁻¹)ⱼ: / (H⁻¹)ⱼⱼ to compensate (OBS). With R the upper
Cholesky factor of H⁻¹ = RᵀR, all those inverses of shrinking matrices are read off the rows of R
(Frantar et al. 2022, arXiv:2210.17323, algorithm 1), and the losses of a row add up to exactly its tr(E H Eᵀ).

What a plain version lacks and this one does:
- columns are visited in the order of falling diag(H), *units* (the columns whose scales are chosen together) kept whole
  and in place, so no index is needed at run time;
- a unit's scales are searched when it is reached, on weights that already carry earlier errors, with the importance
  1 / Rⱼⱼ² that a rounding error really has; the same rows are rounded alongside with scales fixed beforehand, and each
  row keeps whichever lost less;
- inputs that are never active get w = 0; damping grows until the factor exists; else the fallback is on record;
- `descend` then improves codes and scales by coordinate descent.

The loop works on wᵀ, so that each column of w is contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.codec import QTensor, Scales, code_dtype, map_rows, round_to, rows, safe
from bitwright.errors import NumericsError, RecipeError
from bitwright.methods.descend import descend
from bitwright.methods.outcome import Outcome
from bitwright.methods.search import best_scales, search
from bitwright.scheme import TENSOR, Scheme

DAMPINGS = (1.0, 10.0, 100.0)  # factors on the damping asked for, tried in turn


def gptq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block: int = 128,
    sweeps: int = 2,
    compensated_scales: bool = True,
) -> Outcome:
    """Round w with error feedback.

    w                   [N, K], or a convolution's [N, ...]
    gram                [K, K] = XᵀX / T; required
    damping             share of the mean diagonal added to the diagonal; raised tenfold, twice, if H cannot be factored
    block               columns whose updates are applied together to the rest (lazy batches)
    sweeps              passes of coordinate descent afterwards; 0 is GPTQ as published
    compensated_scales  also try scales searched on compensated weights
    Raises RecipeError without a Gram, NumericsError if it is not finite.
    """
    if gram is None:
        raise RecipeError("gptq needs calibration", remedy="give calibration text, or use --method search or rtn")
    if not torch.isfinite(gram).all():
        raise NumericsError("the Gram matrix of the inputs is not finite", remedy="look for overflow in the model")
    matrix = w.reshape(w.shape[0], -1).float()
    dead = gram.diagonal() <= 0
    if dead.any():
        matrix = matrix.masked_fill(dead, 0.0)
    factor = factorize(gram, scheme, damping)
    if factor is None:
        reason = f"gptq -> search: the Gram cannot be factored with damping up to {damping * DAMPINGS[-1]:g}"
        return Outcome(search(w, gram, scheme).q, damping * DAMPINGS[-1], reason)
    q = _round_both_ways(matrix, factor, scheme, block, compensated_scales)
    q = descend(matrix, gram, q, sweeps=sweeps, block=block)
    return Outcome(QTensor(q.codes, q.scales, scheme, tuple(w.shape)), factor.damping)


@dataclass(frozen=True)
class Factor:
    """The order of the visit [K], R [K, K] with H⁻¹ = RᵀR in that order, the damping that it took."""

    order: Tensor
    upper: Tensor
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
    """R by one Cholesky of H in reversed order and one triangular inverse; H⁻¹ itself is never formed."""
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
            identity = torch.eye(len(lower), device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return Factor(order, inverse.flip(0, 1), damping * times)
    return None


def _round_both_ways(w: Tensor, factor: Factor, scheme: Scheme, block: int, compensated: bool) -> QTensor:
    """Round under scales fixed beforehand and, stacked below, under scales of compensated weights; best of each row."""
    N, K = w.shape
    importance = torch.empty(K, device=w.device)
    importance[factor.order] = factor.upper.diagonal().square().reciprocal()
    fixed = best_scales(w, scheme, importance)
    if not compensated or scheme.unit is None or scheme.unit >= K:
        return _round_columns(w, factor, scheme, fixed, importance, block, refit_from=N)[0]
    twice = map_rows(lambda t: torch.cat([t, t]), scheme, fixed)
    q, lost = _round_columns(torch.cat([w, w]), factor, scheme, twice, importance, block, refit_from=N)
    first, second = lost.view(2, N)
    return pick_rows(second < first, rows(q, N, 2 * N), rows(q, 0, N))


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
    order, R = factor.order, factor.upper
    wt = w.T[order].contiguous()  # [K, N]
    tables = _Tables(scales, scheme, N, K)
    groups = (order // scheme.group_length(K)).tolist()
    steps = R.diagonal().tolist()
    unit = scheme.unit or K
    codes = torch.empty(K, N, dtype=code_dtype(scheme), device=w.device)
    lost = torch.zeros(N, device=w.device)
    for start in range(0, K, block):
        now = wt[start : start + block]
        near = R[start : start + block, start : start + block]
        errors = torch.empty_like(now)
        for i, column in enumerate(now):
            at = start + i
            if at % unit == 0 and at > 0 and refit_from < N:
                tables.refit(wt, order, at, unit, importance, refit_from)
            code, decoded = tables.round(column, groups[at])
            codes[at] = code
            error = torch.sub(column, decoded, out=errors[i]).div_(steps[at])
            lost.addcmul_(error, error)
            now[i + 1 :].addr_(near[i, i + 1 :], error, alpha=-1)
        wt[start + block :].addmm_(R[start : start + block, start + block :].T, errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(K, device=order.device)
    return QTensor(codes[back].T.contiguous(), tables.scales(), scheme, (N, K)), lost


class _Tables:
    """The scales of all groups, laid out [G, N] for the visit, replaceable unit by unit."""

    def __init__(self, scales: Scales, scheme: Scheme, N: int, K: int) -> None:
        G = scheme.groups(K)
        self.scheme, self.start = scheme, scales
        self.scale = scales.scale.expand(N, G).T.contiguous()
        self.divisor = safe(self.scale)
        self.zero = None if scales.zero is None else scales.zero.expand(N, G).T.contiguous()
        self.outer = None if scales.outer is None else scales.outer.clone()
        self.outer_zero = None if scales.outer_zero is None else scales.outer_zero.clone()

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes and decoded values of one column [N]."""
        zero = None if self.zero is None else self.zero[group]
        return round_to(column, self.scale[group], zero, self.scheme, self.divisor[group])

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
        self.divisor[into, first:] = safe(found.scale).T
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
