"""The second level of the k-quants' scales: integers of 4, 6 or 8 bits under one f16 in 256 weights.

Searched scales that are merely rounded to the second level lose much of what the search has won, most of all at 4 bits
(Q2_K). So, as llama.cpp does for its k-quants, codes are chosen again under the stored scales; and further: each group
tries the integers next to its own, the f16 that they all stand under is solved for by least squares, and both are
repeated. Each step keeps what loses least, so no step can make it worse.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.codec import by_block, each_group, folded, group_view, integers_of, round_to, safe, scale_range, values
from bitwright.kernels import rounding
from bitwright.qtensor import Scales
from bitwright.scheme import Scheme

ROUNDS = 2


def refine(w: Tensor, scheme: Scheme, weight: Tensor, start: Scales, *, rounds: int = ROUNDS) -> Scales:
    """Better integers and f16s for scales of the k encodings. w [N, K], weight [K] ≥ 0: the importance of columns."""
    state = _State(w, scheme, weight, start)
    for _ in range(rounds):
        state.try_neighbours()
        state.try_outer()
    state.try_neighbours()
    return state.scales


class _State:
    """The scales as they stand, and what each group loses under them [N, G]."""

    def __init__(self, w: Tensor, scheme: Scheme, weight: Tensor, start: Scales) -> None:
        self.w, self.scheme, self.weight, self.scales = w, scheme, weight, start
        self.error = torch.full_like(start.scale, torch.inf)

    def try_neighbours(self) -> None:
        """Each group takes the best of the integers around its own, scale and minimum together."""
        s, (low, high) = self.scales, scale_range(self.scheme)
        integers = self._integers(s.scale, s.outer)
        if s.zero is None:
            moves = torch.tensor([0, -1, 1, -2, 2])[:, None, None]
            scales, zeros = self._under((integers + moves).clamp(low, high), s.outer), None
        else:
            moves = torch.tensor([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0], [-1, -1], [1, 1], [-1, 1], [1, -1]])
            by_scale, by_zero = moves.T[:, :, None, None]
            minima = self._integers(-s.zero, s.outer_zero)
            scales = self._under((integers + by_scale).clamp(low, high), s.outer)
            zeros = -self._under((minima + by_zero).clamp(low, high), s.outer_zero)
        self.error, scale, zero = pick(self.w, self.scheme, self.weight, scales, zeros)
        self.scales = replace(s, scale=scale, zero=zero)

    def try_outer(self) -> None:
        """Each super-block takes the f16s of least squares for the codes and integers that it has, if they lose less."""
        s = self.scales
        outer, outer_zero = self._solved()
        scale = self._under(self._integers(s.scale, s.outer), outer)
        zero = None if s.zero is None else -self._under(self._integers(-s.zero, s.outer_zero), outer_zero)
        error, _, _ = pick(self.w, self.scheme, self.weight, scale[None], None if zero is None else zero[None])
        better = by_block(error, self.scheme).sum(-1) < by_block(self.error, self.scheme).sum(-1)  # [N, S]
        each = each_group(better, self.scheme, error.shape[1])
        self.error = torch.where(each, error, self.error)
        self.scales = Scales(
            torch.where(each, scale, s.scale),
            None if zero is None or s.zero is None else torch.where(each, zero, s.zero),
            None if outer is None or s.outer is None else torch.where(better, outer, s.outer),
            None if outer_zero is None or s.outer_zero is None else torch.where(better, outer_zero, s.outer_zero),
        )

    def _solved(self) -> tuple[Tensor | None, Tensor | None]:
        """The f16s [N, S] that minimise Σ weight · (w − outer · integer · v(c) + outer_zero · minimum)²."""
        s, scheme = self.scales, self.scheme
        v, u = group_view(self.w, scheme), group_view(self.weight[None], scheme)
        codes, _ = round_to(v, s.scale[..., None], None if s.zero is None else s.zero[..., None], scheme)
        c, integers = values(codes, scheme), self._integers(s.scale, s.outer)
        cc, cv = (by_block(x, scheme) for x in (folded(u * c * c), folded(u * c * v)))
        own = by_block(integers, scheme)
        aa, av = (own.square() * cc).sum(-1), (own * cv).sum(-1)
        if s.zero is None or s.outer is None or s.outer_zero is None:
            return _stored(av / safe(aa), s.outer), None
        u_ = u.expand_as(v)
        uu, c1, v1 = (by_block(folded(x), scheme) for x in (u_, u_ * c, u_ * v))
        other = by_block(self._integers(-s.zero, s.outer_zero), scheme)
        ab, bb, bv = (own * other * c1).sum(-1), (other.square() * uu).sum(-1), (other * v1).sum(-1)
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
    """As an f16; the old one where there is nothing to want."""
    assert old is not None
    wanted = torch.where(wanted.isfinite(), wanted, old)
    return wanted.clamp(-65504, 65504).half().float()


def pick(
    w: Tensor, scheme: Scheme, weight: Tensor, scales: Tensor, zeros: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The best of C scales (and zeros) [C, N, G] for each group: error, scale and zero [N, G]; the first of equals."""
    if rounding.handles(scheme, w):
        return rounding.pick(w, scheme, weight, scales, zeros)
    v, u = group_view(w, scheme), group_view(weight[None], scheme)
    best = Best()
    for i, scale in enumerate(scales):
        zero = None if zeros is None else zeros[i]
        _, decoded = round_to(v, scale[..., None], None if zero is None else zero[..., None], scheme)
        best.meet(folded((v - decoded).square_() * u), Scales(scale, zero))
    return best.error, best.scale, best.zero


class Best:
    """What has lost least so far, group by group: error, scale, zero [N, G]; the first of equals."""

    error: Tensor
    scale: Tensor
    zero: Tensor | None
    empty = True

    def meet(self, error: Tensor, s: Scales) -> None:
        """Replace what has been beaten."""
        if self.empty:
            self.error, self.scale, self.zero, self.empty = error, s.scale, s.zero, False
            return
        better = error < self.error
        self.error, self.scale = torch.where(better, error, self.error), torch.where(better, s.scale, self.scale)
        if s.zero is not None and self.zero is not None:
            self.zero = torch.where(better, s.zero, self.zero)
