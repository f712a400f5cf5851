"""Refine the second level of the k-quants' scales: integers of 4, 6 or 8 bits under one f16 per 256 weights.

Merely rounding searched scales to the second level loses much of what the search gained, most of all at 4 bits (Q2_K). So, as
in llama.cpp's k-quants, codes are chosen again under the stored scales. Beyond that, each group tries the integers next to
its own, the super-block's f16 is solved for by least squares, and both are repeated. Each step keeps the better, so none
can raise the error.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.kernels import rounding
from bitwright.numerics.codec import (
    by_block,
    each_group,
    group_view,
    integers_of,
    pairwise_sum,
    round_to,
    safe,
    scale_range,
    values,
)
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme

ROUNDS = 2
MOVES = torch.tensor([[0.0, 0], [-1, 0], [1, 0], [-2, 0], [2, 0]])  # steps of a scale's integer
MOVES_OF_ODD = 2 * MOVES[:3]
MOVES_OF_TWO = torch.tensor(
    [[0.0, 0], [0, -1], [0, 1], [-1, 0], [1, 0], [-1, -1], [1, 1], [-1, 1], [1, -1]]
)  # steps of a scale's integer and a minimum's


def refine(w: Tensor, scheme: Scheme, weight: Tensor, start: Scales, *, rounds: int = ROUNDS) -> Scales:
    """Refine scales of the k encodings, from `start`. w [N, K]; weight [K] ≥ 0: importance of the columns."""
    moves = MOVES_OF_TWO if scheme.zero == "min" else MOVES
    if scheme.levels.odd:
        moves, rounds = MOVES_OF_ODD, min(rounds, 1)
    if rounding.handles(scheme, w):
        return rounding.refine(w, weight, scheme, start, moves, scale_range(scheme), rounds)
    state = _State(w, scheme, weight, start)
    for _ in range(rounds):
        state.try_neighbours(moves)
        state.try_outer()
    state.try_neighbours(moves)
    return state.scales


class _State:
    """The current scales, and each group's weighted squared error under them [N, G]."""

    def __init__(self, w: Tensor, scheme: Scheme, weight: Tensor, start: Scales) -> None:
        self.scheme, self.scales = scheme, start
        self.v, self.u = group_view(w, scheme), group_view(weight[None], scheme)
        self.error = torch.full_like(start.scale, torch.inf)

    def try_neighbours(self, moves: Tensor) -> None:
        """Give each group the best of the integers around its own, scale and minimum together."""
        s, (low, high) = self.scales, scale_range(self.scheme)
        own = self._integers(s.scale, s.outer)
        other = None if s.zero is None or s.outer_zero is None else self._integers(-s.zero, s.outer_zero)
        best = Best()
        for by_scale, by_minimum in moves:
            scale, zero = self._under((own + by_scale).clamp(low, high), s.outer), s.zero
            if other is not None:
                zero = -self._under((other + by_minimum).clamp(low, high), s.outer_zero)
            best.meet(self._error(scale, zero), Scales(scale, zero))
        self.error, self.scales = best.error, replace(s, scale=best.scale, zero=best.zero)

    def try_outer(self) -> None:
        """Give each super-block the least-squares f16s for its codes and integers, where they lower the error."""
        s = self.scales
        outer, outer_zero = self._solved()
        scale, zero = self._under(self._integers(s.scale, s.outer), outer), s.zero
        if zero is not None and outer_zero is not None:
            zero = -self._under(self._integers(-zero, s.outer_zero), outer_zero)
        error = self._error(scale, zero)
        better = pairwise_sum(by_block(error, self.scheme)) < pairwise_sum(by_block(self.error, self.scheme))  # [N, S]
        each = each_group(better, self.scheme, error.shape[1])
        self.error = torch.where(each, error, self.error)
        self.scales = Scales(
            torch.where(each, scale, s.scale),
            None if zero is None or s.zero is None else torch.where(each, zero, s.zero),
            None if outer is None or s.outer is None else torch.where(better, outer, s.outer),
            None if outer_zero is None or s.outer_zero is None else torch.where(better, outer_zero, s.outer_zero),
        )

    def _error(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Each group's weighted squared error under a scale and zero."""
        _, decoded = self._rounded(scale, zero)
        return pairwise_sum((self.v - decoded).square_() * self.u)

    def _rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor]:
        offset = None if zero is None else zero[..., None]
        return round_to(self.v, scale[..., None], offset, self.scheme, inverse=True, importance=self.u)

    def _solved(self) -> tuple[Tensor | None, Tensor | None]:
        """The f16s [N, S] that minimise Σ weight · (w − outer · integer · v(c) + outer_zero · minimum)²."""
        s, scheme, v, u = self.scales, self.scheme, self.v, self.u
        c = values(self._rounded(s.scale, s.zero)[0], scheme)
        if s.zero is not None and s.outer_zero is None:
            c = c - s.zero[..., None]
        uc = u * c
        cc, cv = by_block(pairwise_sum(uc * c), scheme), by_block(pairwise_sum(uc * v), scheme)
        own = by_block(self._integers(s.scale, s.outer), scheme)
        aa, av = pairwise_sum(own * own * cc), pairwise_sum(own * cv)
        if s.zero is None or s.outer is None or s.outer_zero is None:
            return _stored(av / safe(aa), s.outer), None
        uu, c1, v1 = (by_block(pairwise_sum(x), scheme) for x in (u.expand_as(v), uc, u * v))
        other = by_block(self._integers(-s.zero, s.outer_zero), scheme)
        ab, bb, bv = pairwise_sum(own * other * c1), pairwise_sum(other * other * uu), pairwise_sum(other * v1)
        det = aa * bb - ab * ab
        outer, outer_zero = (bb * av - ab * bv) / safe(det), (ab * av - aa * bv) / safe(det)
        good = (det > 0) & (outer > 0) & (outer_zero >= 0)
        outer = torch.where(good, outer, av / safe(aa))
        return _stored(outer, s.outer), _stored(torch.where(good, outer_zero, s.outer_zero), s.outer_zero)

    def _integers(self, x: Tensor, outer: Tensor | None) -> Tensor:
        assert outer is not None
        return integers_of(x, outer, self.scheme)

    def _under(self, integers: Tensor, outer: Tensor | None) -> Tensor:
        assert outer is not None
        return integers * each_group(outer, self.scheme, integers.shape[-1])


def _stored(wanted: Tensor, old: Tensor | None) -> Tensor | None:
    """`wanted` rounded to f16; `old` where it is not finite."""
    assert old is not None
    wanted = torch.where(wanted.isfinite(), wanted, old)
    return wanted.clamp(-65504, 65504).half().float()


class Best:
    """The best candidate so far, group by group: error, scale, zero [N, G]; the first among equals."""

    error: Tensor
    scale: Tensor
    zero: Tensor | None
    empty = True

    def meet(self, error: Tensor, s: Scales) -> None:
        """Take over the groups where this candidate has a lower error."""
        if self.empty:
            self.error, self.scale, self.zero, self.empty = error, s.scale, s.zero, False
            return
        better = error < self.error
        self.error, self.scale = torch.where(better, error, self.error), torch.where(better, s.scale, self.scale)
        if s.zero is not None and self.zero is not None:
            self.zero = torch.where(better, s.zero, self.zero)
