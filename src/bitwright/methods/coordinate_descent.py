"""Coordinate descent on tr(E H Eᵀ), E = w − decoded, over codes and scales, from any quantized start.

With all other codes fixed, the best code of column j is the one nearest to decodedⱼ + (E H)ⱼ / Hⱼⱼ
(QuantEase, Behdin et al. 2023, arXiv:2309.01885, eq. 7), and with all codes fixed the best scale of a group solves one
linear equation. A sweep goes through the groups in turn, scale first, then its columns. Neither step can raise the loss,
so the result is never worse than the start. GPTQ rounds each column once, before the later ones; a sweep rounds it again,
knowing them: it takes 4 to 12 % off the loss, more at fewer bits.

`pull` [K, N] is (E H)ᵀ, minus half the gradient of the loss by the decoded weights: what each column is drawn towards.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.kernels import rounding
from bitwright.methods.keeping_zeros import with_zeros
from bitwright.methods.runs import RunState
from bitwright.numerics.codec import decode, per_column, round_to, safe, same_sign, snap, values
from bitwright.numerics.matmul import add_product
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import SUPERBLOCK, TENSOR

SOLVABLE = ("f32", "f16", "bf16")  # encodings where a group's scale is stored by itself, and almost freely


def coordinate_descent(
    w: Tensor,
    gram: Tensor,
    q: QTensor,
    *,
    sweeps: int = 1,
    block: int = 128,
    ridge: float = 0.0,
    gone: Tensor | None = None,
    fast: bool = False,
) -> QTensor:
    """Improve the codes of q, a quantization of w [N, K], under H = gram + ridge·I; and scales, if groups store their own.

    sweeps  passes over all columns; 0 returns q. Where codes come in runs, a step moves a run's: see runs.py
    block   columns whose changes reach the others in one product
    ridge   like GPTQ's damping, keeps few calibration tokens from being overfitted
    gone    [N, K], True where the weight is pruned, which q decodes to 0: it stays so, and scales stay as they are
    fast    large products in bfloat16 (see numerics/matmul.py): a step may then raise the loss by their rounding errors
    """
    if sweeps <= 0:
        return q
    K = w.shape[1]
    step = q.scheme.group_length(K)
    solve = gone is None and isinstance(q.scheme.group, int) and q.scheme.scale in SOLVABLE
    span = max(step, block // step * step) if solve else block
    in_runs = q.scheme.levels.run > 1
    state = RunState(w, q) if in_runs else _State(w, q, gone)
    sweep = _Sweep(state, gram, ridge, solve=solve, span=SUPERBLOCK if in_runs else span, fast=fast)
    for _ in range(sweeps):
        sweep.run()
    return state.result()


class _Sweep:
    """One pass over all columns, in their own order."""

    def __init__(
        self, state: "_State | RunState", gram: Tensor, ridge: float, *, solve: bool, span: int, fast: bool
    ) -> None:
        floor = 1e-6 * float(gram.diagonal().mean()) + torch.finfo(torch.float32).tiny
        self.curvature = (gram.diagonal() + ridge).clamp(min=floor)
        self.state, self.gram, self.ridge = state, gram, ridge
        self.solve, self.span, self.fast = solve, span, fast

    def run(self) -> None:
        """All columns, beginning with the pull H Eᵀ of the current state."""
        before = self.state.decoded.clone()
        missing = self.state.wt - before
        pull = missing * self.ridge  # [K, N], H Eᵀ
        add_product(pull, self.gram, missing, fast=self.fast)
        del missing
        self._columns(0, len(pull), pull, before)

    def _columns(self, begin: int, end: int, pull: Tensor, before: Tensor) -> None:
        """Columns begin..end: the first half, then the pull that its changes cause on the second, then the second."""
        spans = -(-(end - begin) // self.span)
        if spans < 2:
            here = slice(begin, end)
            near = self.gram[here, here]
            self.state.improve(here, pull[here], near, self.curvature[here], self.ridge, solve=self.solve)
            return
        middle = begin + spans // 2 * self.span
        self._columns(begin, middle, pull, before)
        moved = self.state.decoded[begin:middle] - before[begin:middle]
        add_product(pull[middle:end], self.gram[middle:end, begin:middle], moved, alpha=-1, fast=self.fast)
        self._columns(middle, end, pull, before)


class _State:
    """Codes, decoded weights and scales in the transposed layout [K, N] that a sweep updates in place."""

    def __init__(self, w: Tensor, q: QTensor, gone: Tensor | None) -> None:
        N, K = w.shape
        self.q, self.scheme, self.g, self.gone = q, q.scheme, q.scheme.group_length(K), gone
        G = q.scheme.groups(K)
        self.wt, self.decoded = w.T.contiguous(), _transposed(decode(replace(q, shape=(N, K))))
        self.codes = _transposed(q.codes)
        self.scale = _transposed(q.scales.scale.expand(N, G))
        self.zero = None if q.scales.zero is None else q.scales.zero.expand(N, G).T.contiguous()
        if gone is not None:  # a scale for each weight: 0 where it is pruned, so that every code stands for 0 there
            self.g, self.scale = 1, _by_column(q.scales.scale, q).masked_fill_(gone.T, 0.0)
            self.zero = None if q.scales.zero is None else _by_column(q.scales.zero, q)

    def improve(self, here: slice, pull: Tensor, H: Tensor, curvature: Tensor, ridge: float, *, solve: bool) -> None:
        """Improve the columns `here`, group by group, the scale first; pull [n, N] and H [n, n] are those of these columns."""
        if rounding.handles(self.scheme, pull):
            rounding.sweep(
                self.decoded[here],
                pull,
                self.codes[here],
                self.scheme,
                self.scale,
                self.zero,
                H,
                curvature,
                ridge=ridge,
                solve=solve,
                begin=here.start,
                g=self.g,
            )
            return
        n = len(pull)
        for begin in range(0, n, self.g if solve else n):
            end = min(begin + self.g, n) if solve else n
            own = slice(begin, end)
            moved = self.decoded[here][own].clone()
            if solve:
                self.solve_scale(here.start + begin, here.start + end, pull[own], H[own, own], ridge)
            self.sweep_columns(here.start + begin, here.start + end, pull[own], H[own, own], curvature[own].tolist())
            pull[end:].addmm_(H[end:, own], self.decoded[here][own] - moved, alpha=-1)

    def sweep_columns(self, begin: int, end: int, own: Tensor, near: Tensor, curvature: list[float]) -> None:
        """Choose each code of columns begin..end anew, and keep their pull `own` up to date."""
        chosen, became = [], []
        for i, old in enumerate(self.decoded[begin:end].unbind()):
            if i == 0 or (begin + i) % self.g == 0:
                group = (begin + i) // self.g
                scale = self.scale[group]
                zero = None if self.zero is None else self.zero[group]
            target = torch.add(old, own[i], alpha=1 / curvature[i])
            code, decoded = round_to(target, scale, zero, self.scheme)
            chosen.append(code)
            became.append(decoded)
            own[i + 1 :].addr_(near[i, i + 1 :], decoded - old, alpha=-1)
        self.codes[begin:end] = torch.stack(chosen)
        self.decoded[begin:end] = torch.stack(became)

    def solve_scale(self, begin: int, end: int, pull: Tensor, H: Tensor, ridge: float) -> None:
        """Set the scale of the group begin..end to its least-squares value, rounded as stored, where that loses less."""
        group, own = begin // self.g, slice(begin, end)
        c = values(self.codes[own], self.scheme)
        if self.zero is not None and self.scheme.zero != "min":
            c = c - self.zero[group]
        slope = (pull * c).sum(0)
        bent = torch.addmm(c, H, c, beta=ridge)
        curvature = (c * bent).sum(0)
        old = self.scale[group]
        wanted = old + slope / safe(curvature)
        wanted = torch.where(same_sign(wanted, old) & wanted.isfinite(), wanted, old)
        zero = None if self.zero is None or self.scheme.zero == "min" else self.zero[group]
        new = snap(wanted, zero, replace(self.scheme, zero="sym", grid="int8")).scale
        change = new - old
        change = torch.where(change * (2 * slope - change * curvature) > 0, change, torch.zeros_like(change))
        self.scale[group] = torch.where(change == 0, old, new)
        self.decoded[own] = self._decoded(own, group)
        pull.addcmul_(bent, change, value=-1)

    def _decoded(self, own: slice, group: int) -> Tensor:
        """Decoded weights of one group, by the same operations as `codec.decode`: the same bits."""
        c = values(self.codes[own], self.scheme)
        if self.zero is None:
            return c * self.scale[group]
        if self.scheme.zero == "min":
            return c * self.scale[group] + self.zero[group]
        return (c - self.zero[group]) * self.scale[group]

    def result(self) -> QTensor:
        """The quantized weight as it is now."""
        s = self.q.scales
        if self.gone is not None:
            return replace(self.q, codes=with_zeros(self.codes.T.contiguous(), self.gone, s, self.scheme))
        scale = s.scale if self.scheme.group == TENSOR else self.scale.T.contiguous()
        return replace(self.q, codes=self.codes.T.contiguous(), scales=Scales(scale, s.zero, s.outer, s.outer_zero))


def _by_column(table: Tensor, q: QTensor) -> Tensor:
    """Scales (or zeros) [N, G] of q, one for each weight: [K, N]."""
    N, K = q.codes.shape
    return _transposed(per_column(table, q.scheme, K).expand(N, K))


def _transposed(t: Tensor) -> Tensor:
    """A transposed copy: `.T.contiguous()` is no copy where an axis has length 1."""
    return t.T.clone(memory_format=torch.contiguous_format)
