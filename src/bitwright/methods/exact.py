"""Weights that already lie on a scheme's grid, and the scales that give them back.

A model that was trained for a format, or published in it and decoded, has codes that cannot be bettered. A search comes near
them and, where scales have two levels, seldom onto them. Here they are computed, in double precision:

1. In a group all weights are s·v(c), or s·c + m. For each number of steps that the largest of them may be away from 0 (or
   from the lowest), the least first, the others are held against the multiples of that step, with the error that the
   rounding of the weights themselves allows.
2. In a super-block steps are integers times an f16: the largest step is given each integer in turn, and that is taken under
   which all others are nearest to integers. Minima likewise, but that a group's lowest code may be above 0.
3. The f16s are solved for by least squares. Proof: what is decoded, rounded to the type that w is held in, is w.

A few rows are tried first: with ordinary weights they are all that is tried.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from itertools import product
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from bitwright.kernels.rounding import encode
from bitwright.methods.outcome import Outcome
from bitwright.numerics.codec import code_range, decode, fit, nearest, safe, scale_range
from bitwright.numerics.qtensor import QTensor, Scales, map_rows, pick_rows, reshaped
from bitwright.numerics.scheme import Scheme

SAMPLED = (4, 256)  # rows and columns tried first: so few that ordinary weights cost next to nothing
AT_ONCE = 1 << 18  # weights at a time
SLACK = 1.0  # of the rounding of a group's largest weight: by so much the line through its weights may miss
ULPS = (0, 1, -1, 2, -2)  # f16s tried around the one of least squares
SHIFTS = (1, 4)  # lowest codes that a group may have: 0, as most encoders see to; then a few more
Method = TypeVar("Method", bound=Callable[..., Outcome])
SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits of the types that weights are held in


def keep_exact(method: Method) -> Method:
    """The method, but rows that lie on the scheme's grid come back as they are: nothing can be better."""

    @wraps(method)
    def kept(w: Tensor, gram: Tensor | None, scheme: Scheme, **options: Any) -> Outcome:
        found = None if options.get("pruned") is not None else on_grid(w, scheme)
        if found is None:
            return method(w, gram, scheme, **options)
        q, exact = found
        if bool(exact.all()):
            return Outcome(q)
        other = method(w, gram, scheme, **options)
        picked = pick_rows(exact, *(reshaped(part, tuple(part.codes.shape)) for part in (q, other.q)))
        return replace(other, q=reshaped(picked, tuple(w.shape)), energies=None)

    return cast(Method, kept)


def on_grid(w: Tensor, scheme: Scheme) -> tuple[QTensor, Tensor] | None:
    """w [N, ...] of any float type quantized, and the rows [N] that lose nothing by it; None if there are none.

    Known are groups of freely chosen codes under scales of f16, k8, k6 or k4, without an integer zero point.
    """
    matrix, unit = w.detach().reshape(len(w), -1).cpu(), scheme.unit
    if not _known(scheme) or unit is None or not matrix.numel() or matrix.shape[1] % unit:
        return None
    rows, columns = SAMPLED
    if not _promising(matrix[:: max(1, len(matrix) // rows), :columns].float(), scheme, unit):
        return None
    plain, dtype = matrix.float(), _held_in(matrix)
    scales = fit(plain, scheme)  # round to nearest's: right more often than not where there is one level
    left = (~_given_back(plain, encode(plain, scales, scheme), dtype)).nonzero()[:, 0]
    if len(left):
        solved, _ = _solved(plain[left], scheme)
        scales = map_rows(lambda table, new: table.index_copy(0, left, new), scheme, scales, solved)
    q = encode(plain, scales, scheme)
    exact = _given_back(plain, q, dtype)
    return (reshaped(q, tuple(w.shape)).to(w.device), exact.to(w.device)) if bool(exact.any()) else None


def _promising(w: Tensor, scheme: Scheme, unit: int) -> bool:
    """Whether any block of w that is not 0 lies on the grid. With codes of 8 bits, of which there are many to try, as by round
    to nearest."""
    if scheme.levels.bits < 8:
        found = _solved(w, scheme)[1]
    else:
        dtype, plain = _held_in(w), decode(encode(w, fit(w, scheme), scheme))
        found = (plain.to(dtype) == w.to(dtype)).unflatten(1, (-1, unit)).all(2)
    return bool((found & w.unflatten(1, (-1, unit)).any(2)).any())


def _given_back(w: Tensor, q: QTensor, dtype: torch.dtype) -> Tensor:
    """The rows [N] of w that q gives back in the type that they are held in."""
    return (decode(q).to(dtype) == w.to(dtype)).all(1)


def _held_in(w: Tensor) -> torch.dtype:
    """The shortest float type that holds w."""
    short = (t for t in SIGNIFICAND if t != torch.float32 and torch.equal(w.to(t).float(), w.float()))
    return next(short, torch.float32)


def _known(scheme: Scheme) -> bool:
    free = scheme.levels.run == 1 and scheme.levels.reach is not None and len(scheme.levels.levels or ()) <= 16
    return free and scheme.scale in ("f16", "k8", "k6", "k4") and scheme.zero in ("sym", "signed", "min")


def _solved(w: Tensor, scheme: Scheme) -> tuple[Scales, Tensor]:
    """Scales of w [N, K], and where they give its blocks back: bool [N, S]. Elsewhere they may be any."""
    assert isinstance(scheme.group, int) and scheme.unit is not None
    N, dtype = len(w), _held_in(w)
    blocks = w.double().reshape(-1, scheme.unit // scheme.group, scheme.group)
    parts = [_of_blocks(part, scheme, dtype) for part in blocks.split(max(1, AT_ONCE // scheme.unit))]
    outer, integer, done = (torch.cat(part) for part in zip(*parts, strict=True))
    table = (integer * outer[:, None]).float().view(N, -1, 2)  # [N, G, 2]
    scale, zero = table[..., 0].contiguous(), (0.0 - table[..., 1]) if scheme.zero == "min" else None
    if scheme.scale == "f16":
        return Scales(scale, zero), done.view(N, -1)
    first, second = outer.float().view(N, -1, 2).unbind(2)
    return Scales(scale, zero, first.contiguous(), None if zero is None else second.contiguous()), done.view(N, -1)


def _of_blocks(v: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks v [B, J, g]: their two f16s [B, 2], integers of scales and minima [B, J, 2]; where these give v back, bool [B].

    As if v were what was decoded, to float32's precision, then as if that had been rounded to dtype.
    """
    outer, integer = v.new_zeros(len(v), 2), v.new_zeros(*v.shape[:2], 2)
    done = torch.zeros(len(v), dtype=torch.bool)
    for significand in sorted({SIGNIFICAND[torch.float32], SIGNIFICAND[dtype]}, reverse=True):
        rest = (~done).nonzero()[:, 0]
        groups, found = _steps(v[rest], scheme, significand)
        for guess in _guesses(scheme):
            left = (found & ~done[rest]).nonzero()[:, 0]
            if not len(left):
                break
            c, integers = guess(groups.of(left), scheme)
            f16s, right = _proved(v[rest[left]], c, integers, scheme, dtype)
            here = rest[left[right]]
            outer[here], integer[here], done[here] = f16s[right], integers[right], True
    return outer, integer, done


@dataclass(frozen=True)
class Groups:
    """Groups of blocks as they were found one by one: v = low + step · c.

    v, half    [B, J, g] the weights, and what their own rounding may have moved them by
    step, low  [B, J]
    c          [B, J, g] values of codes; with a minimum the lowest in each group is 0
    fixed      bool [B, J]: -c are no values of codes
    """

    v: Tensor
    half: Tensor
    step: Tensor
    low: Tensor
    c: Tensor
    fixed: Tensor

    def of(self, blocks: Tensor) -> "Groups":
        """Some of the blocks."""
        return Groups(*(getattr(self, field.name)[blocks] for field in fields(self)))


def _steps(v: Tensor, scheme: Scheme, significand: int) -> tuple[Groups, Tensor]:
    """The groups of v [B, J, g], and in which blocks all of them were found."""
    half = _half_ulp(v, significand)
    flat, allowed = v.flatten(0, 1), half.flatten(0, 1)
    low = flat.amin(1, keepdim=True) if scheme.zero == "min" else torch.zeros_like(flat[:, :1])
    top = (flat - low).gather(1, (flat - low).abs().argmax(1, keepdim=True))
    step, c, left = torch.zeros_like(top), torch.zeros_like(flat), (top[:, 0] != 0).nonzero()[:, 0]
    for level in _levels(scheme):
        own, error = flat[left], allowed[left]
        near = _values((own - low[left]) * level / top[left], scheme)
        slope, offset = _line(own, near, error, scheme)
        slack = SLACK * error.amax(1, keepdim=True) + 1e-12 * top[left].abs()
        fits = ((own - offset - slope * near).abs() <= error + slack).all(1)
        here = left[fits]
        step[here], low[here], c[here], left = slope[fits], offset[fits], near[fits], left[~fits]
    found = torch.ones(len(flat), dtype=torch.bool).index_fill(0, left, False)
    sign = torch.where((step < 0) & (scheme.zero == "sym"), -1.0, 1.0).double()
    step, c = step * sign, c * sign
    fixed = ~torch.isclose(_values(-c, scheme), -c).all(1)
    B, J = v.shape[:2]
    groups = Groups(v, half, step.view(B, J), low.view(B, J), c.view(v.shape), fixed.view(B, J))
    return groups, found.view(B, J).all(1)


def _line(v: Tensor, c: Tensor, half: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Slope and offset [M, 1] of v [M, g] over c, by least squares; the offset is 0 in schemes without minima."""
    weight = _weight(half)
    total = weight.sum(1, keepdim=True)
    shift = (weight * c).sum(1, keepdim=True) / total if scheme.zero == "min" else torch.zeros_like(total)
    centred = c - shift
    slope = (weight * centred * v).sum(1, keepdim=True) / safe((weight * centred * centred).sum(1, keepdim=True))
    offset = (weight * (v - slope * c)).sum(1, keepdim=True) / total
    return slope, offset if scheme.zero == "min" else torch.zeros_like(offset)


def _weight(half: Tensor) -> Tensor:
    """Weights of squared errors by how precise a number is, within reason for those near 0."""
    return 1 / (half + 0.01 * half.amax(-1, keepdim=True)).clamp(min=1e-30).square()


def _half_ulp(v: Tensor, significand: int) -> Tensor:
    """Half the distance of v to the next number that has so many bits; 0 for 0."""
    return torch.exp2(torch.frexp(v).exponent.double() - significand - 1).masked_fill(v == 0, 0.0)


def _levels(scheme: Scheme) -> list[float]:
    """Values that a group's outermost weight may stand for.

    Under a second level the least first: a group whose codes are all multiples of some number then has a multiple of its
    step, which is a multiple of the f16 too. Under an f16 of its own the largest first, which encoders see to.
    """
    low, high = code_range(scheme)
    if scheme.levels.levels is not None:
        rising = sorted((level for level in scheme.levels.levels if level), key=abs)
    else:
        rising = [float(n if scheme.zero == "min" else -n) for n in range(1, high + 1)]
        lowest = [] if scheme.zero == "min" else [float(low)]  # which has no opposite
        rising = rising + lowest if scheme.zero == "signed" else lowest + rising
    return rising[::-1] if scheme.scale == "f16" else rising


def _values(x: Tensor, scheme: Scheme) -> Tensor:
    """The values of codes nearest to x."""
    if scheme.levels.levels is None:
        return x.round().clamp(*code_range(scheme))
    table = torch.tensor(sorted(scheme.levels.levels), dtype=x.dtype)
    return table[nearest(x, table)]


def _guesses(scheme: Scheme) -> list[Callable[[Groups, Scheme], tuple[Tensor, Tensor]]]:
    """Functions that guess the values of codes [B, J, g] and the integers [B, J, 2] of groups, in the order to be tried."""
    if scheme.scale == "f16":
        lowest = range(code_range(scheme)[1] + 1 if scheme.zero == "min" else 1)
        return [partial(_of_one_level, shift=shift) for shift in lowest]
    if scheme.zero == "min":
        return [partial(_with_minima, shifts=shifts) for shifts in SHIFTS]
    low, high = scale_range(scheme)
    return [partial(_symmetric, most=most, sign=sign) for most in (-low, high) for sign in (1, -1) if most > 0]


def _of_one_level(s: Groups, scheme: Scheme, *, shift: int) -> tuple[Tensor, Tensor]:
    """shift: the lowest code of all groups."""
    one = torch.ones_like(s.step)
    return s.c + shift, torch.stack([one, one * (scheme.zero == "min")], 2)


def _symmetric(s: Groups, scheme: Scheme, *, most: int, sign: int) -> tuple[Tensor, Tensor]:
    """sign: that of the f16; most: the largest integer. Where steps may take either sign, integers are below 0."""
    below = torch.full_like(s.step, -1.0)
    wanted = torch.where(s.fixed | (scheme.zero == "sym"), sign * s.step.sign(), below)
    turned = wanted * sign * s.step.sign()
    integer = wanted * _multiples(s.step.abs(), most)
    return s.c * turned[..., None], torch.stack([integer, torch.zeros_like(integer)], 2)


def _with_minima(s: Groups, scheme: Scheme, *, shifts: int) -> tuple[Tensor, Tensor]:
    """shifts: how many lowest codes of a group are thought of."""
    _, high = scale_range(scheme)
    integer = _multiples(s.step, high)
    minimum, shift = _minima(_aligned(s, integer), scheme, shifts, high)
    return s.c + shift[..., None], torch.stack([integer, minimum], 2)


def _multiples(step: Tensor, most: int) -> Tensor:
    """Integers of steps [B, J] ≥ 0 under the unit that they are nearest to multiples of; the largest has 1 to `most`."""
    unit = step.amax(1, keepdim=True) / _falling(most, step)  # [B, most]
    ratio = step[:, None] / safe(unit)[..., None]
    off = ((ratio - ratio.round()).abs() / safe(ratio)).amax(2)
    return ratio.round()[torch.arange(len(step)), _best_unit(off, unit)]


def _falling(most: int, like: Tensor) -> Tensor:
    return torch.arange(most, 0, -1, dtype=like.dtype)


def _best_unit(off: Tensor, unit: Tensor) -> Tensor:
    """The place [B] of the unit [B, L] that misses the least, `off`; of those that miss as little, one that is an f16, or the
    first."""
    not_f16 = (unit.half().double() - unit).abs() > 1e-6 * unit
    return (off.round(decimals=9) + 5e-10 * not_f16).argmin(1)


def _aligned(s: Groups, integer: Tensor) -> Groups:
    """Steps as multiples of one unit, which is known better than they are, and offsets under them."""
    unit = (s.step * integer).sum(1, keepdim=True) / safe(integer.square().sum(1, keepdim=True))
    step, weight = unit * integer, _weight(s.half)
    return replace(s, step=step, low=(weight * (s.v - step[..., None] * s.c)).sum(2) / weight.sum(2))


def _minima(s: Groups, scheme: Scheme, shifts: int, most: int) -> tuple[Tensor, Tensor]:
    """The integers of minima, and each group's lowest code, below `shifts` or what makes its minimum 0: both [B, J]."""
    every = torch.arange(len(s.low))
    shift = torch.arange(float(shifts), dtype=s.low.dtype).expand(*s.low.shape, -1)
    shift = torch.cat([shift, (s.low / safe(s.step)).round().clamp(min=0)[..., None]], 2)  # [B, J, A]
    size = s.step[..., None] * shift - s.low[..., None]
    fits = s.c.amax(-1, keepdim=True) + shift <= code_range(scheme)[1]
    largest = size[every, s.low.argmin(1), :shifts]  # [B, A]
    unit = (largest[:, None] / _falling(most, largest)[:, None]).flatten(1)  # [B, L]
    ratio = size[:, None] / safe(unit)[..., None, None]  # [B, L, J, A]
    off = (ratio - ratio.round()).abs() / ratio.round().abs().clamp(min=1)
    off = off.masked_fill(~fits[:, None] | (ratio.round() > most) | (ratio.round() < 0), torch.inf)
    least, which = off.min(3)
    best = _best_unit(least.amax(2), unit)
    which = which[every, best]  # [B, J]
    ratio = ratio[every, best].gather(2, which[..., None])[..., 0]
    return ratio.round(), shift.gather(2, which[..., None])[..., 0]


def _proved(v: Tensor, c: Tensor, integer: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two f16s [B, 2] of blocks v [B, J, g] whose values of codes and integers are known; whether they give v back [B]."""
    weight = _weight(_half_ulp(v, SIGNIFICAND[dtype]).flatten(1)).view(v.shape)
    solved = _least_squares(v, integer[..., :1] * c, -integer[..., 1:].expand_as(c), weight)
    low, high = scale_range(scheme) if scheme.scale != "f16" else (1, 1)
    right = ((integer >= min(low, 0)) & (integer <= high)).flatten(1).all(1)
    right &= (c == _values(c, scheme)).flatten(1).all(1) | (scheme.levels.levels is not None)
    found, proved = solved.clone(), torch.zeros_like(right)
    for ulps in product(ULPS, ULPS if scheme.zero == "min" else (0,)):
        f16s = _beside(solved, torch.tensor(ulps, dtype=torch.int16))
        scale, minimum = (integer * f16s[:, None]).float()[:, :, None].unbind(3)
        decoded = c.float() * scale
        decoded = decoded - minimum if scheme.zero == "min" else decoded
        same = right & ~proved & (f16s[:, 1] >= 0) & (decoded.to(dtype) == v.to(dtype)).flatten(1).all(1)
        found, proved = torch.where(same[:, None], f16s, found), proved | same
    return found, proved


def _least_squares(v: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """x, y [B, 2] of least Σ weight (v − x a − y b)² in each block; all [B, J, g]. y = 0 where b is."""
    pairs = ((a, a), (a, b), (b, b), (a, v), (b, v))
    aa, ab, bb, av, bv = ((weight * p * q).flatten(1).sum(1) for p, q in pairs)
    det = aa * bb - ab * ab
    both = det > 1e-12 * aa * bb
    x = torch.where(both, (bb * av - ab * bv) / safe(det), av / safe(aa))
    y = torch.where(both, (aa * bv - ab * av) / safe(det), torch.where(aa == 0, bv / safe(bb), torch.zeros_like(bb)))
    return torch.stack([x, y], 1)


def _beside(x: Tensor, ulps: Tensor) -> Tensor:
    """The f16 that is so many places beside that of x."""
    near = x.clamp(-65504, 65504).half()
    return (near.view(torch.int16) + ulps * (near != 0)).view(torch.float16).double()
