"""GPTQ and coordinate descent where codes come in runs (IQ1, IQ2, IQ3): a group at a time, its scale with its codes.

Moving the weights of a run by δ changes the loss tr(E H Eᵀ) by δ H δᵀ − 2 δ p, with H the run's own block and p = E H there.
Without a codebook δ = p H⁻¹ were best; the entry nearest to that, by the diagonal of H, is next to the best of all entries
with all signs (IQ2_XXS on real Grams: 0.0421 and 0.0420 after a sweep), and it is taken where the whole form falls.

A group's scale is an odd integer times its super-block's f16. A search knows the diagonal of H only, and integers are coarse.
So a group is rounded under several of them, run by run, and keeps the one that loses least.
"""

import torch
from torch import Tensor

from bitwright.numerics import lattice
from bitwright.numerics.codec import choose, code_dtype, integers_of, safe, scale_range, values
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import SUPERBLOCK, Scheme

MOVES = (0, -2, 2)  # steps of a group's integer in a sweep
FIRST_MOVES = (0, -2, 2, -4, 4)  # and where it is rounded for the first time
SOFT = 1e-4  # share of the mean curvature added where a target is solved for: a Gram of few tokens has none in some directions


def runs_of(n: int, scheme: Scheme) -> list[slice]:
    """n columns cut into the runs that are rounded together; the last may be short."""
    width = lattice.lattice(scheme.grid).width
    return [slice(at, min(at + width, n)) for at in range(0, n, width)]


def entries(wanted: Tensor, scale: Tensor, scheme: Scheme, curvature: Tensor) -> Tensor:
    """The values [N, n] of the codebook's entries nearest to wanted [N, n] under scale [N, 1]; curvature [n]: importance."""
    return values(lattice.nearest(wanted / safe(scale), scheme.grid, curvature[None]), scheme)


# -------------------------------------------------------------------------------------------------------------- GPTQ


def round_group(
    target: Tensor, true: Tensor, factor: Tensor, scale: Tensor, outer: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """GPTQ for the columns of one group under the best of several scales: the values of codes [N, g], the scale [N].

    target, true  [N, g] the weights with the errors carried to them, and without
    factor        [g, g] their block of U, H = U Uᵀ
    scale, outer  [N] where to begin, and the f16 that it is a multiple of
    """
    low, high = scale_range(scheme)
    own = torch.round(scale / safe(outer))
    parts = []
    for by in FIRST_MOVES:
        tried = (own + by).clamp(low, high) * outer
        parts.append((*_compensated(target, true, factor, tried[:, None], scheme), tried))
    levels, losses, scales = (torch.stack(part) for part in zip(*parts, strict=True))
    best, row = losses.argmin(0), torch.arange(len(target), device=target.device)
    return levels[best, row], scales[best, row]


def _compensated(target: Tensor, true: Tensor, factor: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Values [N, g] of codes chosen run by run, each carrying its error to the later ones, and their loss [N].

    For a run with its block U of the factor the loss is ‖c + E U‖², c what earlier errors left there, E = true − decoded: it
    is that of rounding true + c U⁻¹ to an entry.
    """
    pivots = factor.diagonal()
    carried = (target - true) * pivots  # [N, g], (E U) of all earlier columns
    level, lost = torch.empty_like(target), torch.zeros_like(target[:, 0])
    for run in runs_of(target.shape[1], scheme):
        U = factor[run, run]
        H = U @ U.T
        wanted = true[:, run] + torch.linalg.solve_triangular(U, carried[:, run], upper=True, left=False)
        found = entries(wanted, scale, scheme, H.diagonal())
        error = wanted - found * scale
        again = entries(wanted + (error @ H) / H.diagonal() - error, scale, scheme, H.diagonal())
        first, second = ((wanted - x * scale) @ U for x in (found, again))
        better = (second.square().sum(1) < first.square().sum(1))[:, None]
        level[:, run] = torch.where(better, again, found)
        lost += torch.where(better, second, first).square().sum(1)
        carried += (true[:, run] - level[:, run] * scale) @ factor[run]
    return level, lost


# ------------------------------------------------------------------------------------------------ coordinate descent


class RunState:
    """The weight as it is now, transposed: what a sweep of coordinate_descent.py improves, a super-block at a time.

    wt, decoded  [K, N]
    level        [K, N] the values of the codes: decoded = level · (integer · outer)
    integer      [G, N] odd
    outer        [S, N] f16
    """

    def __init__(self, w: Tensor, q: QTensor) -> None:
        assert q.scales.outer is not None  # all grids with runs have super-blocks
        self.q, self.scheme, self.g = q, q.scheme, q.scheme.group_length(w.shape[1])
        self.wt, self.level = w.T.contiguous(), values(q.codes, q.scheme).T.contiguous()
        self.integer = integers_of(q.scales.scale, q.scales.outer, q.scheme).T.contiguous()
        self.outer = q.scales.outer.T.contiguous()
        self.decoded = self.level * self._scale().repeat_interleave(self.g, 0)[: w.shape[1]]

    def improve(
        self, here: slice, pull: Tensor, H: Tensor, curvature: Tensor, ridge: float, *, solve: bool = True
    ) -> None:
        """Improve the super-block in columns `here`; pull [n, N] and H [n, n], without the ridge, are those of its columns."""
        block, pull = here.start // SUPERBLOCK, pull.T.contiguous()
        H = H + (curvature - H.diagonal()).diag()
        for begin in range(0, len(H), self.g):
            own = slice(begin, min(begin + self.g, len(H)))
            moved = self._improve_group(here.start + begin, block, pull[:, own], H[own, own])
            pull.addmm_(moved, H[own], alpha=-1)
        self._solve_outer(here, block, pull, H)

    def _improve_group(self, begin: int, block: int, pull: Tensor, H: Tensor) -> Tensor:
        """Improve the group that begins in this column; pull [N, g]. Gives the change of its weights [N, g]."""
        here, group = slice(begin, begin + len(H)), begin // self.g
        low, high = scale_range(self.scheme)
        level, integer, outer = self.level[here].T, self.integer[group], self.outer[block]
        now = self.decoded[here].T
        soft = H + SOFT * H.diagonal().mean() * torch.eye(len(H), device=H.device)
        solved = [torch.linalg.inv(soft[run, run]) for run in runs_of(len(H), self.scheme)]
        found = [(torch.zeros_like(outer), integer, level, torch.zeros_like(now))]
        for by in MOVES:
            tried = (integer + by).clamp(low, high)
            scale = (tried * outer)[:, None]
            new = self._rounded(level, now, pull, H, scale, solved)
            moved = new * scale - now
            found.append(((moved * (2 * pull - moved @ H)).sum(1), tried, new, moved))
        gains, integers, levels, moves = (torch.stack(part) for part in zip(*found, strict=True))
        best, row = gains.argmax(0), torch.arange(len(outer), device=outer.device)
        moved = moves[best, row]
        self.integer[group], self.level[here] = integers[best, row], levels[best, row].T
        self.decoded[here] = self.level[here] * (self.integer[group] * outer)
        return moved

    def _rounded(
        self, level: Tensor, now: Tensor, pull: Tensor, H: Tensor, scale: Tensor, solved: list[Tensor]
    ) -> Tensor:
        """The values of codes [N, g] under another scale [N, 1], each run chosen anew where that loses less."""
        level, pull = level.clone(), pull - (level * scale - now) @ H
        for run, inverse in zip(runs_of(len(H), self.scheme), solved, strict=True):
            old, own = level[:, run], H[run, run]
            new = entries(old * scale + pull[:, run] @ inverse, scale, self.scheme, own.diagonal())
            moved = (new - old) * scale
            better = ((moved * (2 * pull[:, run] - moved @ own)).sum(1) > 0)[:, None]
            level[:, run] = torch.where(better, new, old)
            pull.addmm_(moved * better, H[run], alpha=-1)
        return level

    def _solve_outer(self, here: slice, block: int, pull: Tensor, H: Tensor) -> None:
        """Set the super-block's f16 to its least-squares value where that loses less."""
        groups = slice(here.start // self.g, -(-here.stop // self.g))
        integer = self.integer[groups].repeat_interleave(self.g, 0)[: len(H)]
        one = self.level[here] * integer  # [n, N], the weights under an f16 of 1
        slope, bend, old = (one * pull.T).sum(0), (one * (H @ one)).sum(0), self.outer[block]
        wanted = old + slope / safe(bend)
        new = torch.where(wanted.isfinite() & (wanted > 0), wanted, old).clamp(max=65504).half().float()
        change = new - old
        self.outer[block] = torch.where(change * (2 * slope - change * bend) > 0, new, old)
        self.decoded[here] = self.level[here] * (integer * self.outer[block])

    def _scale(self) -> Tensor:
        return self.integer * self.outer.repeat_interleave(SUPERBLOCK // self.g, 0)[: len(self.integer)]  # [G, N]

    def result(self) -> QTensor:
        """The quantized weight as it is now."""
        scales = Scales(self._scale().T.contiguous(), None, self.outer.T.contiguous())
        codes = choose(self.level, self.scheme).to(code_dtype(self.scheme))
        return QTensor(codes.T.contiguous(), scales, self.scheme, self.q.shape)
