"""Search: choose each group's scale (and zero) for the least weighted squared error of rounding to nearest.

For every group, the range [min, max] is narrowed (or its two ends are moved) in steps; for the codes of each step the scale
(and minimum) is solved for by least squares, and the candidate of least weighted squared error wins. Clipping an outlier
buys finer steps for all others. The error's weights are 1 ("mse"), the Gram's diagonal ("weighted": the mean squared input
of each column), or an importance that the caller has (GPTQ's is in gptq.py). With at most `QUICK` steps it is quick:
candidates are compared by the error of their own codes under the solved scale, which follows from the sums of the least
squares, only the winner is rounded again, and a second level's integers are tried once.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.kernels import rounding
from bitwright.methods.outcome import Outcome
from bitwright.methods.superblocks import ROUNDS, Best, refine
from bitwright.numerics.codec import (
    decode,
    fit,
    group_view,
    pairwise_sum,
    raw_scales,
    round_to,
    safe,
    same_sign,
    snap,
    values,
)
from bitwright.numerics.qtensor import Scales, map_rows
from bitwright.numerics.scheme import TENSOR, Scheme

Objective = Literal["mse", "weighted", "percentile"]
QUICK = 2  # most steps of a quick search
ONE_LEVEL = ("f32", "f16", "bf16", "e8m0")  # encodings that round each scale by itself
SUPERBLOCKS = ("k8", "k6", "k4")  # integers under a common f16
SECOND = {4: 0.93, 5: 1.06, 6: 1.03, 8: 1.01}  # by bits: the one factor beside 1 that gains most, for a quick search
# Factors on the range between which the best one lies, where codes are chosen in runs.
IN_RUNS = {
    "iq1_s": (1.0, 0.3), "iq1_m": (1.0, 0.3), "iq2_xxs": (1.2, 0.5), "iq2_xs": (1.2, 0.5), "iq2_s": (1.2, 0.5),
    "iq3_xxs": (1.2, 0.6), "iq3_s": (1.2, 0.6),
}  # fmt: skip
CHUNK = 1 << 19  # weights searched at a time: enough to keep all threads busy, in little memory


def search(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    objective: Objective = "weighted",
    percentile: float = 99.9,
    steps: int = 8,
) -> Outcome:
    """Round to nearest under searched scales.

    w           [N, K] of any float type
    gram        [K, K] or its diagonal [K], for "weighted"; None: all columns count alike, as for "mse"
    objective   "weighted", "mse", or "percentile": clip each group at that percentile of |w| instead of searching
    steps       candidates for the range
    Raises RecipeError for an unknown objective or a percentile outside (0, 100], SchemeError for a weight that is not finite.
    """
    if objective == "percentile":
        matrix = w.reshape(w.shape[0], -1).float()
        return Outcome(rounding.encode(w, _clipped(matrix, scheme, percentile), scheme))
    if objective not in ("mse", "weighted"):
        raise RecipeError(
            f"unknown objective {objective!r}", remedy='options = { objective = "weighted" }, or "mse" or "percentile"'
        )
    known = gram if objective == "weighted" else None
    importance = None if known is None else (known if known.ndim == 1 else known.diagonal()).clamp(min=0)
    if w.ndim == 2 and scheme.scale in ONE_LEVEL and rounding.handles(scheme, w):
        q, lost, whole = rounding.searched(
            w, importance, scheme, _shrinks(scheme, steps, nearest=True), quick=steps <= QUICK
        )
        if not bool(lost.sum().isfinite()):
            snap(q.scales.scale, None, scheme)  # raises SchemeError where a weight is not finite
        return Outcome(q, energies=(lost, whole) if known is gram and (gram is None or gram.ndim == 1) else None)
    w = w.float()
    scales = best_scales(w.reshape(len(w), -1), scheme, importance, steps=steps, nearest=True)
    return Outcome(rounding.encode(w, scales, scheme, importance=importance))


def _clipped(w: Tensor, scheme: Scheme, percentile: float) -> Scales:
    """Scales from each group's extremes after clipping at a percentile of |w|, group by group."""
    if not 0 < percentile <= 100:
        raise RecipeError(f"percentile {percentile} is outside (0, 100]", remedy="options = { percentile = 99.9 }")
    v = group_view(w, scheme)
    padding = torch.zeros(v.shape[1], dtype=torch.long, device=w.device)
    if isinstance(scheme.group, int):
        padding[-1] = -w.shape[1] % scheme.group  # the padding of a short last group sorts first and does not count
    rank = (percentile / 100 * (v.shape[-1] - padding)).round().long().clamp(min=1) + padding - 1
    limit = v.abs().sort(dim=-1).values.gather(-1, rank[None, :, None].expand(len(v), -1, 1))
    return snap(*raw_scales(v.clamp(-limit, limit), w.shape[1], scheme), scheme)


def best_scales(
    w: Tensor,
    scheme: Scheme,
    importance: Tensor | None,
    *,
    outer: Tensor | None = None,
    steps: int = 8,
    nearest: bool = False,
) -> Scales:
    """The scales of least weighted squared error.

    w [N, K], importance [K] ≥ 0 or None, outer as in `codec.fit`; nearest: have RTN's scales among the candidates.
    """
    if outer is None and scheme.scale == "e4m3":
        outer = fit(w, scheme).outer  # one divisor for the whole tensor, from its extremes
    chunks = w.split(max(1, CHUNK // w.shape[1])) if scheme.group != TENSOR else [w]
    shrinks, quick = _shrinks(scheme, steps, nearest=nearest), steps <= QUICK or scheme.levels.run > 1
    parts = [_best_raw(chunk, scheme, importance, shrinks, quick) for chunk in chunks]
    scale = torch.cat([part[0] for part in parts])
    zero = None if parts[0][1] is None else torch.cat([part[1] for part in parts if part[1] is not None])
    found = snap(scale, zero, scheme, outer=outer)
    if scheme.scale in ONE_LEVEL:
        return found
    if scheme.scale in SUPERBLOCKS:
        weight = torch.ones_like(w[0]) if importance is None else importance.float()
        refined = [
            refine(chunk, scheme, weight, part, rounds=0 if steps <= QUICK else ROUNDS)
            for chunk, part in zip(chunks, _split(found, scheme, chunks), strict=True)
        ]
        return map_rows(lambda *parts: torch.cat(parts), scheme, *refined)
    return _no_worse(w, scheme, importance, found, fit(w, scheme, outer=outer))


def _split(scales: Scales, scheme: Scheme, chunks: Sequence[Tensor]) -> list[Scales]:
    """The scales of each chunk of rows."""
    ends = list(accumulate(len(chunk) for chunk in chunks))
    return [map_rows(lambda t, b=b, e=e: t[b:e], scheme, scales) for b, e in zip([0, *ends], ends, strict=False)]


def _no_worse(w: Tensor, scheme: Scheme, importance: Tensor | None, found: Scales, plain: Scales) -> Scales:
    """The found scales, or row by row RTN's where rounding to the second level has lost more than the search gained."""
    weight = torch.ones_like(w[0]) if importance is None else importance
    lost = [((w - decode(rounding.encode(w, s, scheme))).square() * weight).sum(1) for s in (found, plain)]
    if not scheme.rowwise:
        return found if float(lost[0].sum()) <= float(lost[1].sum()) else plain
    better = (lost[0] <= lost[1])[:, None]
    return map_rows(lambda x, y: torch.where(better, x, y), scheme, found, plain)


def _best_raw(
    w: Tensor, scheme: Scheme, importance: Tensor | None, shrinks: list[tuple[float, float]], quick: bool
) -> tuple[Tensor, Tensor | None]:
    """The search, not yet rounded to a second level: scale [N, G], zero [N, G] or None."""
    one_level = scheme if scheme.scale in ONE_LEVEL else replace(scheme, scale="f32")
    weight = torch.ones_like(w[0]) if importance is None else importance.float()
    if rounding.handles(scheme, w):
        return rounding.search(w, weight, one_level, shrinks, quick=quick)
    v = group_view(w, scheme)
    weight = group_view(weight[None].expand_as(w) if scheme.group == TENSOR else weight[None], scheme)
    best, totals = Best(), _totals(v, weight)
    for shrink, above in shrinks:
        s = snap(*raw_scales(v, w.shape[1], scheme, shrink, above), one_level)
        codes, lost = _rounded(v, weight, s, scheme)
        m = _moments(v, codes, weight, s, scheme)
        solved = snap(*_least_squares(m, totals, s, scheme), one_level)
        if quick:
            best.meet(_lost_by(m, totals, solved, scheme), solved)
            continue
        best.meet(lost, s)
        best.meet(_rounded(v, weight, solved, scheme)[1], solved)
    return best.scale, best.zero


def _rounded(v: Tensor, weight: Tensor, s: Scales, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The codes of groups v [N, G, g] under a scale and zero, and their weighted squared error [N, G]."""
    zero = None if s.zero is None else s.zero[..., None]
    codes, decoded = round_to(v, s.scale[..., None], zero, scheme, inverse=True, importance=weight)
    return codes, pairwise_sum((v - decoded).square_() * weight)


def _shrinks(scheme: Scheme, steps: int, *, nearest: bool = False) -> list[tuple[float, float]]:
    """Candidate factors on the range, for its parts below and above 0.

    Coarse grids gain by clipping; fine ones clip little, and gain by ranges a little wider than the weights'. With an offset
    the two ends move independently, in 2 · steps pairs, a little outwards too: in groups with about as many weights as
    codes, much depends on how weights happen to fall between codes.
    """
    bits = scheme.levels.bits
    if scheme.levels.run > 1:
        return [(s, s) for s in torch.linspace(*IN_RUNS[scheme.grid], max(2, 3 * steps // 4)).tolist()]
    if not scheme.symmetric:
        return _pairs(scheme, bits, steps)
    widest, narrowest = {1: (1.0, 0.6), 2: (1.0, 0.35), 3: (1.0, 0.5), 4: (1.0, 0.65)}.get(bits, (1.05, 0.97))
    if scheme.zero == "signed" or bits in (5, 6):
        widest, narrowest = {3: (1.15, 0.6), 4: (1.08, 0.7), 5: (1.1, 0.88), 6: (1.15, 0.93)}.get(
            bits, (widest, narrowest)
        )
    if scheme.scale == "e8m0":
        widest = 1.5  # a power of two may round down to a range that is too narrow
    if steps <= 2:
        return [(s, s) for s in (1.0, SECOND.get(bits, 0.85))[:steps]]
    tried = torch.linspace(widest, narrowest, steps)
    tried[(tried - 1).abs().argmin()] = 1  # one candidate is the range itself
    if scheme.zero != "signed" or not scheme.reach or not scheme.levels.reach:
        return [(s, s) for s in tried.tolist()]
    wider = (
        scheme.reach / scheme.levels.reach
    )  # RTN's range reaches further than that of `levels.reach`, which the factors multiply
    own = [(1.0, 1.0)] if nearest else []
    return own + [(sign * s * wider, sign * s * wider) for s in tried.tolist() for sign in (1, -1)]


def _pairs(scheme: Scheme, bits: int, steps: int) -> list[tuple[float, float]]:
    """`_shrinks` for schemes with an offset."""
    outer, inner = {1: (1.1, 0.5), 2: (1.1, 0.5), 3: (1.1, 0.6), 4: (1.1, 0.8)}.get(bits, (1.07, 0.93))
    tried = max(2, round((2 * steps) ** 0.5))
    if scheme.zero == "min":
        inner = 0.85 if bits == 4 else inner
        # By measurement: at two bits the second level undoes what more pairs find; without one they gain at four and five bits.
        tried = tried + (bits >= 4) if scheme.scale in ONE_LEVEL else min(tried, 3) if bits <= 2 else tried
    ends = torch.linspace(outer, inner, tried).tolist()
    return [(1.0, 1.0), *product(ends, repeat=2)]


class Totals(NamedTuple):
    """Sums over each group that do not depend on codes, [N, G]: of u v², u, u v for weights v of importance u."""

    vv: Tensor
    u: Tensor
    v: Tensor


def _totals(v: Tensor, weight: Tensor) -> Totals:
    """`Totals` of groups v [N, G, g]."""
    wv = weight * v
    return Totals(pairwise_sum(wv * v), pairwise_sum(weight), pairwise_sum(wv))


class Moments(NamedTuple):
    """Sums over each group that depend on codes, [N, G]: of u c², u c v, u c for the values c of codes."""

    cc: Tensor
    cv: Tensor
    c: Tensor


def _moments(v: Tensor, codes: Tensor, weight: Tensor, s: Scales, scheme: Scheme) -> Moments:
    """`Moments` of codes [N, G, g], counted from the zero point in s."""
    c = values(codes, scheme)
    if scheme.zero == "asym" or scheme.zero == "asym1":
        assert s.zero is not None
        c = c - s.zero[..., None]
    wc = weight * c
    return Moments(pairwise_sum(wc * c), pairwise_sum(wc * v), pairwise_sum(wc))


def _least_squares(m: Moments, t: Totals, s: Scales, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """The scale (and minimum) that minimises Σ u · (v − decoded)² for fixed codes; that of s where the system is singular."""
    if scheme.zero != "min":
        solved = m.cv / safe(m.cc)
        return torch.where(same_sign(solved, s.scale) & solved.isfinite(), solved, s.scale), s.zero
    det = t.u * m.cc - m.c * m.c
    scale = (t.u * m.cv - m.c * t.v) / safe(det)
    low = ((t.v - scale * m.c) / safe(t.u)).clamp(max=0)
    scale = torch.where(low == 0, m.cv / safe(m.cc), scale)
    good = (det > 0) & (scale > 0) & scale.isfinite() & low.isfinite()
    assert s.zero is not None
    return torch.where(good, scale, s.scale), torch.where(good, low, s.zero)


def _lost_by(m: Moments, t: Totals, s: Scales, scheme: Scheme) -> Tensor:
    """Σ u · (v − decoded)² of fixed codes under the scale (and minimum) s."""
    lost = t.vv + s.scale * (s.scale * m.cc - 2 * m.cv)
    if scheme.zero != "min":
        return lost
    assert s.zero is not None
    return lost + s.zero * (s.zero * t.u - 2 * t.v + 2 * s.scale * m.c)
