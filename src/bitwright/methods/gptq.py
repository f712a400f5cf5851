"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

The layer's loss is tr(E H Eᵀ) with E = w − decoded and H the (damped) Gram of its inputs. With H = U Uᵀ, U upper
triangular in column order, it is ‖E U‖², and column k of E U holds no error of a later column:
Eₖ Uₖₖ + Σ (i < k) Eᵢ Uᵢₖ. So the best target for column k is wₖ + Σ (i < k) Eᵢ Uᵢₖ / Uₖₖ, and missing that by e costs
(e Uₖₖ)². This is GPTQ (Frantar et al. 2022, arXiv:2210.17323, algorithm 1), whose R with H⁻¹ = RᵀR is U⁻¹; but neither
H nor U is ever inverted, which saves more than half of the preparation.

Beyond the paper:
- columns are rounded in the order of falling diag(H) ("act-order"), but *units*, the columns whose scales are chosen
  together, stay whole and in place: static groups, so no index is needed at run time;
- a unit's scales are searched when its turn comes, on weights that already carry earlier errors, with the importance
  Uₖₖ² that a rounding error has there; each row is also rounded with scales fixed beforehand, and keeps the better;
- input channels that are never active get w = 0; damping grows until the factor exists; else `search` takes over, on record;
- coordinate descent then improves codes and scales: see coordinate_descent.py;
- pruned weights stay 0: their columns are rounded under a scale of 0, and what that misses is made up for like any error
  (the joint pass of SparseGPT, Frantar & Alistarh 2023, arXiv:2301.00774, section 3.5).

The loop works on wᵀ, so that each column of w is contiguous.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.kernels import rounding
from bitwright.methods.coordinate_descent import coordinate_descent
from bitwright.methods.keeping_zeros import mask_of, with_zeros
from bitwright.methods.outcome import Outcome
from bitwright.methods.runs import round_group
from bitwright.methods.search import best_scales, search
from bitwright.numerics.codec import choose, code_dtype, fit, round_to
from bitwright.numerics.matmul import add_product
from bitwright.numerics.qtensor import QTensor, Scales, map_rows, pick_rows, reshaped, rows, stacked
from bitwright.numerics.scheme import SUPERBLOCK, TENSOR, Scheme

TRIAL_ROWS = (
    256  # sampled rows that decide between fixed and refitted scales, for a matrix of more than four times as many
)
AT_ONCE = 1 << 23  # weights rounded at a time, in whole rows: their float32 copies take 32 MB each
RIDGE = 0.1  # share of the damping that coordinate descent keeps: by measurement, with few tokens and with many
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
    pruned: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """Round w with error feedback (Frantar et al. 2022, algorithm 1).

    w                   [N, K], or a convolution's [N, ...]
    gram                [K, K] = XᵀX / T; required
    damping             share of the mean diagonal added to the diagonal; times 10 and times 100 if H cannot be factored
    block               columns rounded before their errors reach the others, in one product (lazy batches)
    sweeps              passes of coordinate descent afterwards; 0 is GPTQ as published; None: 1, below 4 bits 2, in runs 4
    compensated_scales  try scales searched on compensated weights beside those fixed beforehand
    pruned              bool, of w's shape: True where the weight is to be exactly zero; the others make up for it
    fast                large products in bfloat16: see numerics/matmul.py
    Raises RecipeError without a Gram or for options that mean nothing, NumericsError if the Gram is not finite, SchemeError
    if weights are pruned and the scheme has no code for zero.
    """
    gram = _usable(gram)
    _check_options(damping, block, scheme.unit)
    sweeps = _usual_sweeps(scheme) if sweeps is None else sweeps
    matrix = w.reshape(w.shape[0], -1).float()
    dead = gram.diagonal() == 0
    if dead.any():
        matrix = matrix.masked_fill(dead, 0.0)
    gone = None if pruned is None else mask_of(pruned, w, scheme)
    factor = factorize(gram, column_order(gram.diagonal(), scheme.unit, scheme.levels.run), damping)
    if factor is None:
        reason = f"gptq -> search: the Gram cannot be factored with damping up to {damping * DAMPINGS[-1]:g}"
        left = matrix if gone is None else matrix.masked_fill(gone, 0.0)
        return Outcome(reshaped(search(left, gram, scheme).q, tuple(w.shape)), damping * DAMPINGS[-1], reason)
    how = LoopOptions(block if scheme.levels.run == 1 else max(block, scheme.group_length(block)), fast)
    how = replace(how, way=_best_way(matrix, gone, factor, scheme, how) if compensated_scales else "fixed")
    ridge = RIDGE * factor.damping * float(gram.diagonal().mean())
    parts, some = [], max(1, AT_ONCE // matrix.shape[1]) if scheme.rowwise else len(matrix)
    for at in range(0, len(matrix), some):
        part, mask = matrix[at : at + some], None if gone is None else gone[at : at + some]
        q, _ = _round(part, mask, factor, scheme, how)
        parts.append(coordinate_descent(part, gram, q, sweeps=sweeps, block=block, ridge=ridge, gone=mask, fast=fast))
    return Outcome(reshaped(stacked(parts), tuple(w.shape)), factor.damping)


@dataclass(frozen=True)
class Factor:
    """H = U Uᵀ in column order.

    order        [K] the columns in the order in which they are rounded
    propagation  [K, K] Uᵢₖ / Uₖₖ: the share of column i's error that column k takes on
    pivots       [K] Uₖₖ
    damping      share of the mean diagonal that was added
    """

    order: Tensor
    propagation: Tensor
    pivots: Tensor
    damping: float


@dataclass(frozen=True)
class LoopOptions:
    """Options of the column loop.

    block  columns whose errors reach the others in one product
    fast   large products in bfloat16
    way    scales "fixed" beforehand, "refit" unit by unit on compensated weights, or "both": each row keeps the better
    """

    block: int = 128
    fast: bool = False
    way: Literal["fixed", "refit", "both"] = "fixed"


def column_order(diagonal: Tensor, unit: int | None, run: int = 1) -> Tensor:
    """Columns by falling diagonal [K] of H; units by falling mean, each kept together; a short last unit stays last.

    run: above 1, columns keep their order within a unit: a run's codes are chosen together, and a group's with its scale.
    """
    K = len(diagonal)
    if unit is None or unit >= K:
        return torch.arange(K, device=diagonal.device) if run > 1 else diagonal.argsort(descending=True, stable=True)
    whole = diagonal[: K // unit * unit].view(-1, unit)
    units = whole.mean(1).argsort(descending=True, stable=True)
    parts = [*whole, diagonal[len(whole) * unit :]]
    if run > 1:
        inside = [torch.arange(len(part), device=part.device) for part in parts]
    else:
        inside = [part.argsort(descending=True, stable=True) for part in parts]
    return torch.cat([inside[i] + i * unit for i in [*units.tolist(), len(whole)]])


def factorize(gram: Tensor, order: Tensor, damping: float) -> Factor | None:
    """U for columns in this order [K], by one Cholesky factorization of H in reversed order; None if no damping suffices."""
    diagonal = gram.diagonal()
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


def _usual_sweeps(scheme: Scheme) -> int:
    """Passes of coordinate descent, by measurement: the fewer codes, and the less freely chosen, the more they gain."""
    return 4 if scheme.levels.run > 1 else 2 if scheme.levels.bits < 4 else 1


def _usable(gram: Tensor | None) -> Tensor:
    """The Gram; RecipeError or NumericsError as of `gptq`."""
    if gram is None:
        raise RecipeError("gptq needs calibration", remedy="give --calib general, or --method search")
    if not torch.isfinite(gram).all():
        remedy = "activations overflow: give other calibration text, or --method search"
        raise NumericsError("the Gram matrix of the inputs is not finite", remedy=remedy)
    return gram


def _check_options(damping: float, block: int, unit: int | None) -> None:
    if not damping > 0 or block < 1:
        remedy = "options = { damping = 0.01, block = 128 }"
        raise RecipeError(f"damping {damping} and block {block} must be above 0", remedy=remedy)
    if unit is not None and unit % block and block % unit:
        message = f"blocks of {block} columns cut through units of {unit}"
        raise RecipeError(message, remedy=f"options = {{ block = {unit} }}")


def _best_way(
    w: Tensor, gone: Tensor | None, factor: Factor, scheme: Scheme, how: LoopOptions
) -> Literal["fixed", "refit", "both"]:
    """ "both" for a small matrix; for a large one the better of "fixed" and "refit" on a sample of its rows."""
    N, K = w.shape
    if scheme.unit is None or scheme.unit >= K:
        return "fixed"
    if N <= 4 * TRIAL_ROWS and scheme.levels.run == 1:
        return "both"
    step = max(1, N // TRIAL_ROWS)
    mask = None if gone is None else gone[::step]
    fixed, refitted = _round(w[::step], mask, factor, scheme, replace(how, way="both"))[1].sum(1).tolist()
    return "refit" if refitted < fixed else "fixed"


def _round(w: Tensor, gone: Tensor | None, factor: Factor, scheme: Scheme, how: LoopOptions) -> tuple[QTensor, Tensor]:
    """Round the rows of w but those weights that are pruned, where the mask `gone` [N, K] is true.

    Also the rows' losses: [N]; or, both ways, [2, N] under fixed and under refitted scales.
    """
    N, K = w.shape
    importance = torch.empty(K, device=w.device)
    importance[factor.order] = factor.pivots.square()
    left = w if gone is None else w.masked_fill(gone, 0.0)  # a weight of 0 asks nothing of the scales
    if how.way == "refit":
        return _round_columns(w, factor, scheme, fit(left, scheme), importance, how, refit_from=0, gone=gone)
    scales = best_scales(left, scheme, importance)
    if how.way == "fixed":
        return _round_columns(w, factor, scheme, scales, importance, how, refit_from=N, gone=gone)
    twice = map_rows(lambda t: torch.cat([t, t]), scheme, scales)
    w, gone = torch.cat([w, w]), None if gone is None else torch.cat([gone, gone])
    q, lost = _round_columns(w, factor, scheme, twice, importance, how, refit_from=N, gone=gone)
    lost = lost.view(2, N)
    return pick_rows(lost[1] < lost[0], rows(q, N, 2 * N), rows(q, 0, N)), lost


def _round_columns(
    w: Tensor,
    factor: Factor,
    scheme: Scheme,
    scales: Scales,
    importance: Tensor,
    how: LoopOptions,
    *,
    refit_from: int,
    gone: Tensor | None = None,
) -> tuple[QTensor, Tensor]:
    """The column loop: round each column, propagate its error to the later ones. Also each row's loss [N].

    From row `refit_from` on, scales are searched anew at the first column of each unit.
    """
    loop = _ColumnLoop(w, gone, factor, scheme, scales, importance, how, refit_from)
    loop.columns(0, w.shape[1])
    codes, found = torch.empty_like(loop.codes), loop.tables.scales()
    codes[factor.order] = loop.codes
    codes = codes.T.contiguous()
    codes = codes if gone is None else with_zeros(codes, gone, found, scheme)
    return QTensor(codes, found, scheme, (w.shape[0], w.shape[1])), loop.lost


class _ColumnLoop:
    """All columns in column order, transposed: [K, N]."""

    def __init__(
        self,
        w: Tensor,
        gone: Tensor | None,
        factor: Factor,
        scheme: Scheme,
        scales: Scales,
        importance: Tensor,
        how: LoopOptions,
        refit_from: int,
    ) -> None:
        N, K = w.shape
        self.gone = None if gone is None else gone.T[factor.order]
        self.factor, self.importance, self.how = factor, importance, how
        self.original = w.T[factor.order]
        self.target = self.original.clone()  # the columns plus the errors propagated so far
        self.errors = torch.empty_like(self.target)  # original − decoded
        self.codes = torch.empty(K, N, dtype=code_dtype(scheme), device=w.device)
        self.lost = torch.zeros(N, device=w.device)
        self.tables = _Tables(scales, scheme, N, K)
        self.groups = factor.order // scheme.group_length(K)
        self.unit = scheme.unit or K
        self.refit_from = refit_from

    def columns(self, begin: int, end: int) -> None:
        """Round columns begin..end: the first half, its errors propagated to the second, then the second.

        Halving puts most of the work into a few large products. Units are cut only where they are longer than a block.
        """
        step = self.how.block if self.unit >= end - begin else max(self.how.block, self.unit)
        steps = -(-(end - begin) // step)
        if steps < 2:
            self._block(begin, end)
            return
        middle = begin + steps // 2 * step
        self.columns(begin, middle)
        propagation = self.factor.propagation[begin:middle, middle:end].T
        add_product(self.target[middle:end], propagation, self.errors[begin:middle], fast=self.how.fast)
        self.columns(middle, end)

    def _block(self, begin: int, end: int) -> None:
        """Columns begin..end unit by unit: new scales where rows are refitted, then one column after the other."""
        for start in range(begin, end, min(self.unit, self.how.block)):
            stop = min(start + self.unit, end)
            own = slice(start, stop)
            if start % self.unit == 0 and self.refit_from < self.target.shape[1]:
                left = self.target if self.gone is None else self.target.masked_fill(self.gone, 0.0)
                self.tables.refit(left, self.factor.order, start, self.unit, self.importance, self.refit_from)
            near, gone = self.factor.propagation[own, own], None if self.gone is None else self.gone[own]
            codes, errors = self.tables.round_columns(
                self.target[own], self.original[own], near, self.groups[own], self.factor.pivots[own], gone
            )
            self.codes[own], self.errors[own] = codes, errors
            add_product(self.target[stop:end], self.factor.propagation[own, stop:end].T, errors)
        here = slice(begin, end)
        missed = self.target[here] - self.original[here] + self.errors[here]  # target − decoded
        self.lost += missed.mul_(self.factor.pivots[here, None]).square_().sum(0)


class _Tables:
    """The scales of all groups, laid out [G, N] for the column loop, replaceable unit by unit."""

    def __init__(self, scales: Scales, scheme: Scheme, N: int, K: int) -> None:
        G = scheme.groups(K)
        self.scheme, self.start = scheme, scales
        self.scale = scales.scale.expand(N, G).T.contiguous()
        self.zero = None if scales.zero is None else scales.zero.expand(N, G).T.contiguous()
        self.outer = None if scales.outer is None else scales.outer.clone()
        self.outer_zero = None if scales.outer_zero is None else scales.outer_zero.clone()

    def round_columns(
        self,
        target: Tensor,
        true: Tensor,
        propagation: Tensor,
        groups: Tensor,
        pivots: Tensor,
        gone: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Round n columns in turn: codes [n, N], errors [n, N]; target [n, N] takes on the errors of earlier ones.

        gone [n, N]: where weights are pruned. There every code stands for 0, since its scale is 0.
        """
        if self.scheme.levels.run > 1:
            return self._round_runs(target, true, propagation, groups, pivots)
        scale, zeros = self.scale, self.zero
        if gone is not None:
            scale, zeros = scale[groups].masked_fill_(gone, 0.0), None if zeros is None else zeros[groups]
            groups = torch.arange(len(groups), device=groups.device)
        if rounding.handles(self.scheme, target):
            return rounding.round_columns(target, true, propagation, self.scheme, groups, scale, zeros)
        codes, errors = [], torch.empty_like(target)
        for i, group in enumerate(groups.tolist()):
            zero = None if zeros is None else zeros[group]
            code, decoded = round_to(target[i], scale[group], zero, self.scheme)
            codes.append(code.to(code_dtype(self.scheme)))
            torch.sub(true[i], decoded, out=errors[i])
            target[i + 1 :].addr_(propagation[i, i + 1 :], errors[i])
        return torch.stack(codes), errors

    def _round_runs(
        self, target: Tensor, true: Tensor, propagation: Tensor, groups: Tensor, pivots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`round_columns` group by group, where codes come in runs: scales may change; pivots [n]: Uₖₖ."""
        assert self.outer is not None  # all grids with runs have super-blocks
        levels, errors, g = [], torch.empty_like(target), self.scheme.group_length(len(target))
        for start in range(0, len(target), g):
            group, own, later = int(groups[start]), slice(start, start + g), slice(start + g, None)
            outer = self.outer[:, group * g // SUPERBLOCK]
            factor = propagation[own, own] * pivots[own]
            level, scale = round_group(target[own].T, true[own].T, factor, self.scale[group], outer, self.scheme)
            self.scale[group] = scale
            levels.append(level.T)
            torch.sub(true[own], (level * scale[:, None]).T, out=errors[own])
            target[own] += propagation[own, own].triu(1).T @ errors[own]
            target[later] += propagation[own, later].T @ errors[own]
        return choose(torch.cat(levels), self.scheme), errors

    def refit(self, target: Tensor, order: Tensor, at: int, unit: int, importance: Tensor, first: int) -> None:
        """Search the scales of the unit that begins at order[at], on compensated weights, for rows from `first` on."""
        columns = order[at : at + unit]
        begin = int(columns.min())
        here = slice(begin, begin + len(columns))
        w = torch.empty(target.shape[1] - first, len(columns), device=target.device)
        w[:, columns - begin] = target[at : at + unit, first:].T
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
        """The scales as `Scales` has them, [N, G]."""
        if self.scheme.group == TENSOR:
            return self.start
        zero = None if self.zero is None else self.zero.T.contiguous()
        return Scales(self.scale.T.contiguous(), zero, self.outer, self.outer_zero)
