"""The codebooks of llama.cpp's IQ1, IQ2 and IQ3 types: which combinations of neighbouring codes there are, and the nearest.

Such a type stores the index of a codebook's entry for 4 or 8 neighbouring weights, not a code for each. IQ2 and IQ3: an entry
has magnitudes, and every weight has a sign of its own; in IQ2_XXS, IQ2_XS and IQ3_XXS seven signs are stored for eight weights,
and an even number of them is negative. IQ1: an entry has digits -1, 0, 1, all of them moved by 1/8 in one direction, which is
stored for 8 weights (IQ1_M) or 32 (IQ1_S). The codebooks are those in the gguf package. Source: ggml-common.h, ggml-quants.c.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from gguf import quants
from torch import Tensor

from bitwright.numerics.scheme import GRIDS
from bitwright.system.native import native

AT_ONCE = 1 << 14  # weights rounded at a time, so that their candidates stay in the cache
NEAR = 8  # entries compared: by measurement at most 1 % of the error is lost (IQ1), mostly less than 0.2 %
DIGIT_STEP = 0.125  # by which IQ1's digits are moved
# The codebook of each grid, and the integer in its table that stands for the magnitude 1.
TABLES = {
    "iq1_s": (quants.IQ1_S, 1), "iq1_m": (quants.IQ1_S, 1), "iq2_xxs": (quants.IQ2_XXS, 8), "iq2_xs": (quants.IQ2_XS, 8),
    "iq2_s": (quants.IQ2_S, 8), "iq3_xxs": (quants.IQ3_XXS, 4), "iq3_s": (quants.IQ3_S, 1),
}  # fmt: skip
EVEN = ("iq2_xxs", "iq2_xs", "iq3_xxs")  # of 8 signs, an even number is negative
SIGNED = 8  # weights whose signs are stored together, where their number is even


@dataclass(frozen=True)
class Lattice:
    """The codebook of a grid.

    points  [V, P, d] float32: V variants (IQ1's digits moved up and down; else 1) of P entries of d values
    codes   uint8 [V, P, d]: the same as codes of the grid
    even    whether an even number of 8 weights is negative
    signs   whether entries are magnitudes, and every weight has a sign
    run     weights that share a variant
    top     the highest code: that of -v is `top` minus that of v
    """

    points: Tensor
    codes: Tensor
    even: bool
    signs: bool
    run: int
    top: int

    def index(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The number of each entry of codes uint8 [..., n]: (variant, entry) of each d weights, int64 [..., n / d]; entry -1
        where the codebook has no such combination. Signs are left aside."""
        d = self.points.shape[2]
        digits = codes.unflatten(-1, (-1, d)).long()
        if self.signs:
            digits = torch.where(digits > self.top // 2, digits, self.top - digits)
        found = self._numbers[(digits * self._places).sum(-1)]
        P = self.points.shape[1]
        return torch.where(found < 0, 0, found // P), torch.where(found < 0, -1, found % P)

    @cached_property
    def near(self) -> list[tuple[Tensor, Tensor]]:
        """Of each variant: the L values that an entry can have in one place, and for all L^d combinations of them, the numbers
        of the nearest entries, int64 [L^d, NEAR]."""
        found = []
        for points in self.points:
            levels = points.unique()
            norms = points.square().sum(1)
            parts = torch.cartesian_prod(*[levels] * points.shape[1]).split(1 << 11)
            near = [torch.addmm(-norms, part, points.T, alpha=2).topk(NEAR, 1).indices for part in parts]
            found.append((levels, torch.cat(near)))
        return found

    @property
    def width(self) -> int:
        """Weights that are chosen without regard to any others."""
        return max(self.run, self.points.shape[2], SIGNED if self.even else 1)

    @cached_property
    def codebook(self) -> object:
        """The extension's own description of the codebook."""
        assert native is not None
        middle = torch.stack([_middle(levels) for levels, _ in self.near])
        near = torch.stack([entries for _, entries in self.near]).int()
        return native.Codebook(
            self.points, self.codes, middle, near, self.levels, self.width, self.run, self.signs, self.even
        )

    @cached_property
    def levels(self) -> Tensor:
        """The value of each code."""
        values = torch.zeros(self.top + 1)
        values[self.codes.flatten().long()] = self.points.flatten()
        return values

    @property
    def _places(self) -> Tensor:
        return (self.top + 1) ** torch.arange(self.points.shape[2])

    @cached_property
    def _numbers(self) -> Tensor:
        """The number variant · P + entry of every combination of codes, -1 where there is none."""
        table = torch.full(((self.top + 1) ** self.points.shape[2],), -1, dtype=torch.int64)
        entries = self.codes.flatten(0, 1).long()
        table[(entries * self._places).sum(-1)] = torch.arange(len(entries))
        return table


@lru_cache(maxsize=8)
def lattice(grid: str) -> Lattice:
    """The codebook of a grid with runs; KeyError for another grid."""
    source, unit = TABLES[grid]
    source.init_grid()  # type: ignore[no-untyped-call]
    points = torch.from_numpy(np.array(source.grid, np.float32)).flatten(0, 2)[None] / unit
    signs = source is not quants.IQ1_S
    points = points if signs else torch.cat([points + DIGIT_STEP, points - DIGIT_STEP])
    levels = torch.tensor(GRIDS[grid].levels)
    codes = torch.searchsorted(levels, points.contiguous()).to(torch.uint8)
    return Lattice(points, codes, grid in EVEN, signs, GRIDS[grid].run, len(levels) - 1)


def nearest(x: Tensor, grid: str, importance: Tensor | None = None) -> Tensor:
    """The codes of the entries nearest to x, weights over their scale: [..., n] -> uint8 [..., n].

    importance  a weight of each squared difference, ≥ 0, of a shape that broadcasts to x; None: all count alike
    Rows of n that fill no whole runs are filled with zeros. With even signs, the sign of the weight that loses least is turned.
    """
    one, n = lattice(grid), x.shape[-1]
    width = one.width
    u = None if importance is None else importance.expand_as(x)
    if n % width:
        x = torch.nn.functional.pad(x, (0, -n % width))
        u = None if u is None else torch.nn.functional.pad(u, (0, -n % width))
    shape = x.shape
    runs, of_runs = x.reshape(-1, width), None if u is None else u.reshape(-1, width)
    if native is not None and x.device.type == "cpu":
        return _natively(one, runs, of_runs).view(shape)[..., :n]
    step = max(1, AT_ONCE // width)
    found = [
        _of_runs(one, part, None if of_runs is None else of_runs[at : at + step])
        for at, part in zip(range(0, len(runs), step), runs.split(step), strict=True)
    ]
    return torch.cat(found).view(shape)[..., :n]


def _natively(one: Lattice, x: Tensor, u: Tensor | None) -> Tensor:
    """`_of_runs` in native code, the same codes."""
    assert native is not None
    codes = torch.empty(x.shape, dtype=torch.uint8)
    weight = None if u is None else u.float().contiguous()
    native.nearest_runs(one.codebook, x.float().contiguous(), weight, codes, torch.get_num_threads())
    return codes


def _middle(levels: Tensor) -> Tensor:
    """Half way between neighbouring levels."""
    return (levels[1:] + levels[:-1]) / 2


def _of_runs(one: Lattice, x: Tensor, u: Tensor | None) -> Tensor:
    """`nearest` for x [R, width], whole runs."""
    if not one.signs:
        return _entries(one, x, u)
    negative, size = x < 0, x.abs()
    if not one.even:
        return _turned(one, _entries(one, size, u), negative)
    negative, signed = negative.unflatten(-1, (-1, SIGNED)), size.unflatten(-1, (-1, SIGNED))
    odd = negative.sum(-1, keepdim=True) % 2 == 1
    weight = 1.0 if u is None else u.unflatten(-1, (-1, SIGNED))
    least = (weight * signed.square()).argmin(-1, keepdim=True)
    turned = torch.zeros_like(negative).scatter_(-1, least, odd)
    codes = _entries(one, torch.where(turned, -signed, signed).flatten(-2), u)
    magnitude = one.levels[codes.long()].unflatten(-1, (-1, SIGNED))
    least = (weight * signed * magnitude).argmin(-1, keepdim=True)  # what turning a sign costs, but for a factor of 4
    turned = torch.zeros_like(negative).scatter_(-1, least, odd)
    return _turned(one, codes, (negative ^ turned).flatten(-2))


def _turned(one: Lattice, codes: Tensor, negative: Tensor) -> Tensor:
    return torch.where(negative, one.top - codes, codes)


def _entries(one: Lattice, x: Tensor, u: Tensor | None) -> Tensor:
    """The codes of the nearest entries, the same variant for all of a run: [R, width] -> uint8 [R, width]."""
    V, P, d = one.points.shape
    R, wanted = len(x), x.reshape(-1, d)
    weight = torch.ones_like(wanted) if u is None else u.reshape(-1, d)
    scores, entries = zip(*(_best(one, v, wanted, weight) for v in range(V)), strict=True)
    best, entry = torch.stack(scores, 1).view(R, -1, V), torch.stack(entries, 1).view(R, -1, V)  # [R, width / d, V]
    share = max(1, one.run // d)
    of_run = _in_turn(best.unflatten(1, (-1, share)).unbind(2))
    variant = of_run.argmax(-1, keepdim=True).repeat_interleave(share, 1)
    return one.codes.view(V * P, d)[(variant * P + entry.gather(2, variant))[..., 0]].flatten(1)


def _best(one: Lattice, variant: int, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry to x [M, d] of those near its digits: Σ u (2 x p - p²) [M], which it has highest of all; its number."""
    points, (levels, near) = one.points[variant], one.near[variant]
    digits = torch.zeros_like(x)
    for middle in _middle(levels).tolist():
        digits += x > middle
    places = float(len(levels)) ** torch.arange(x.shape[1] - 1, -1, -1.0)
    candidates = near[(digits @ places).long()]
    found = points[candidates.flatten()].view(len(x), -1, x.shape[1])
    each, pull = range(x.shape[1]), 2 * u * x
    scores = _in_turn([pull[:, i, None] * found[..., i] for i in each])
    scores = scores - _in_turn([found[..., i].square() * u[:, i, None] for i in each])
    score, k = scores.max(1)
    return score, candidates.gather(1, k[:, None])[:, 0]


def _in_turn(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the terms from the first to the last, in the order in which the extension adds them."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
