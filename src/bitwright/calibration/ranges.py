"""Static ranges of activations: a streaming histogram, and five observers that choose a range from it.

An engine that rounds activations with one fixed scale per tensor must know their range beforehand. During calibration a
`Histogram` counts an input's values; then an observer of `RANGES` says where to clip, and `static_scales` turns that into
the scale that the file will hold.

Bins are short floating-point numbers: sign, exponent and nine bits of mantissa. So a bin's value is within a relative 2^-10
of all values in it, and every bfloat16 number has a bin of its own: for inputs in bfloat16 nothing is lost. Bins never
move, so merging is addition and the order of batches does not matter; and unlike with bins of equal width, one outlier
of a million does not take the resolution of a million values near one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial
from typing import Self

import torch
from torch import Tensor

from bitwright.errors import CalibrationError, CheckpointError, NumericsError, RecipeError, SchemeError
from bitwright.numerics.codec import code_range, raw_scales, round_to, snap
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import TENSOR, Scheme
from bitwright.system import distributed

DROPPED = 14  # low bits of a float32 that a bin ignores: 23 bits of mantissa minus 9
BINS = 1 << (31 - DROPPED)  # bins for each sign
CHUNK = 1 << 21  # values binned at a time


@dataclass(eq=False)
class Histogram:
    """Streaming histogram of all values of one input.

    where                      the input's name, for errors
    momentum                   of the moving averages, in [0, 1)
    counts                     int64 [2, BINS], on the CPU: negative values, then the others, by rising magnitude
    low, high                  the extremes, exact (of float32)
    average_low, average_high  Σ momentum^age · a batch's extreme / Σ momentum^age, over all batches
    tokens, batches            what was seen: rows of K values, and calls of `update`
    """

    where: str = ""
    momentum: float = 0.9
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64), repr=False)
    low: float = math.inf
    high: float = -math.inf
    average_low: float = 0.0
    average_high: float = 0.0
    tokens: int = 0
    batches: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum {self.momentum} is outside [0, 1)", where=self.where, remedy="such as 0.9")

    def update(self, x: Tensor) -> None:
        """Count one more batch x [..., K] of any float type. NumericsError, with nothing counted, if a value is not finite."""
        flat, counts = x.detach().reshape(-1), torch.zeros(2 * BINS, dtype=torch.int64)
        if not len(flat):
            return
        low, high, tokens = math.inf, -math.inf, len(flat) // x.shape[-1] if x.ndim else 1
        for chunk in (part.float() for part in flat.split(CHUNK)):
            least, most = finite_extremes(chunk, self.where)
            low, high = min(low, least), max(high, most)
            counts += torch.bincount(bin_of(chunk), minlength=2 * BINS).cpu()
        self.merge(Histogram(self.where, self.momentum, counts.view(2, BINS), low, high, low, high, tokens, batches=1))

    def merge(self, other: "Histogram") -> None:
        """Add another histogram; for the moving averages, its batches come after these."""
        if other.momentum != self.momentum:
            message = f"averages of momentum {self.momentum} and {other.momentum} cannot be merged"
            raise RecipeError(message, where=self.where, remedy="calibrate both with one momentum")
        if not other.batches:
            return
        past, present = (1 - self.momentum**histogram.batches for histogram in (self, other))
        past *= self.momentum**other.batches
        self.average_low = (past * self.average_low + present * other.average_low) / (past + present)
        self.average_high = (past * self.average_high + present * other.average_high) / (past + present)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.counts = self.counts + other.counts
        self.tokens, self.batches = self.tokens + other.tokens, self.batches + other.batches

    def points(self) -> tuple[Tensor, Tensor]:
        """Values float32 [P], ascending, the first and last exact, and their counts int64 [P]."""
        table = bin_values()
        n = torch.cat([self.counts[0].flip(0), self.counts[1]])
        x = torch.cat([-table.flip(0), table])[n > 0]
        if len(x):
            x[0], x[-1] = self.low, self.high
        return x, n[n > 0]

    def state(self) -> dict[str, Tensor]:
        """The tensors that a store keeps: non-empty bins only."""
        bins = self.counts.view(-1).nonzero()[:, 0]
        reals = [self.low, self.high, self.average_low, self.average_high, self.momentum]
        return {
            "bins": bins.int(),
            "counts": self.counts.view(-1)[bins],
            "reals": torch.tensor(reals, dtype=torch.float64),
            "seen": torch.tensor([self.tokens, self.batches]),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor], *, where: str = "") -> Self:
        """Undoes `state`. CheckpointError for tensors that are no histogram."""
        _check_state(state, where)
        low, high, average_low, average_high, momentum = state["reals"].tolist()
        counts = torch.zeros(2 * BINS, dtype=torch.int64)
        counts[state["bins"].long()] = state["counts"]
        seen = state["seen"].tolist()
        return cls(where, momentum, counts.view(2, BINS), low, high, average_low, average_high, *seen)

    def packed(self) -> Tensor:
        """The same in one tensor, float64, which holds every number exactly: reals [5], seen [2], then bins, then counts."""
        state = self.state()
        return torch.cat([state[name].double() for name in ("reals", "seen", "bins", "counts")])

    @classmethod
    def unpacked(cls, packed: Tensor, *, where: str = "") -> Self:
        """The histogram that `packed` gave. CheckpointError where the tensor cannot be one."""
        rest = packed[7:].long()
        bins, counts = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        state = {"reals": packed[:5].double(), "seen": packed[5:7].long(), "bins": bins.int(), "counts": counts}
        return cls.from_state({name: t.cpu() for name, t in state.items()}, where=where)


def bin_of(x: Tensor) -> Tensor:
    """The bin of each value, int32, 0 to 2·BINS: its float32 bits, rounded to nine bits of mantissa.

    An arithmetic shift keeps the sign in front, so that negative values come first, by rising magnitude.
    """
    return x.float().view(torch.int32).add(1 << (DROPPED - 1)).bitwise_right_shift_(DROPPED).add_(BINS)


@lru_cache(maxsize=1)
def bin_values() -> Tensor:
    """The magnitude of each bin, float32 [BINS]; of the non-finite ones only infinity is used."""
    return (torch.arange(BINS, dtype=torch.int32) << DROPPED).view(torch.float32)


def together(own: Histogram) -> Histogram:
    """The histogram of all processes that work together; for the moving averages, their batches come in the order of ranks."""
    if distributed.count() == 1:
        return own
    whole = Histogram(own.where, own.momentum)
    for one in distributed.everyone(own):
        whole.merge(one)
    return whole


def finite_extremes(x: Tensor, where: str) -> tuple[float, float]:
    """The least and the greatest value. NumericsError for NaN or Inf among them."""
    low, high = (float(extreme) for extreme in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        remedy = "run the model in bfloat16 or float32, or look for NaN in its weights"
        raise NumericsError(f"activations are not finite: between {low} and {high}", where=where, remedy=remedy)
    return low, high


def _check_state(state: dict[str, Tensor], where: str) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    P = state["bins"].numel() if "bins" in state else 0
    sound = shapes == {"bins": (P,), "counts": (P,), "reals": (5,), "seen": (2,)}
    if not (sound and ((state["bins"] >= 0) & (state["bins"] < 2 * BINS) & (state["counts"] > 0)).all()):
        raise CheckpointError(f"not a histogram: {shapes}", where=where, remedy="delete it and calibrate again")


# -------------------------------------------------------------------------------------------------------------- ranges


def extremes(histogram: Histogram) -> tuple[float, float]:
    """The exact extremes. CalibrationError where nothing was seen."""
    if not histogram.tokens:
        remedy = "calibrate with text or data that reaches this layer"
        raise CalibrationError("no activations were seen: there is no range", where=histogram.where, remedy=remedy)
    return histogram.low, histogram.high


def minmax(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The extremes: nothing of what was seen is clipped."""
    return extremes(histogram)


def average(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """Moving averages of the batches' extremes: a rare extreme counts by its share of the batches."""
    extremes(histogram)
    return histogram.average_low, histogram.average_high


def quantiles(histogram: Histogram, scheme: Scheme, *, percentile: float = 99.9) -> tuple[float, float]:
    """The range that holds `percentile` percent of the values, by nearest ranks; the rest is clipped.

    Symmetric schemes: of |x|. Those with a zero: half of the rest on either side. RecipeError outside (0, 100].
    """
    if not 0 < percentile <= 100:
        raise RecipeError(f"percentile {percentile} is outside (0, 100]", where=histogram.where, remedy="such as 99.9")
    low, high = extremes(histogram)
    x, n = histogram.points()
    share = Fraction(str(percentile)) / 100  # in decimal: in binary, 99.9 % of 1000 would round up to all 1000
    if scheme.zero == "sym":
        limit = _quantile(x.abs(), n, share)
        return max(low, -limit), min(high, limit)
    return -_quantile(-x, n, (1 + share) / 2), _quantile(x, n, (1 + share) / 2)


def _quantile(x: Tensor, n: Tensor, share: Fraction) -> float:
    """The least x for which values up to x make at least `share` of the counts n."""
    x, order = x.sort()
    reached = n[order].cumsum(0)
    return float(x[torch.searchsorted(reached, math.ceil(share * int(reached[-1])))])


# -------------------------------------------------------------------------------------------------------------- search

Cost = Callable[[Tensor, Tensor], Tensor]  # low, high [C] float64 -> float64 [C]
FINE = torch.exp2(torch.linspace(-1 / 8, 1 / 8, 129, dtype=torch.float64))  # steps of 1/512 octave: a bin's width
BOTH, LOW, HIGH = (torch.tensor(sides) for sides in ([True, True], [True, False], [False, True]))
AT_ONCE = 16  # candidates whose costs are computed together, so that intermediates stay in the cache
REFINE = 4  # bins of the reference distribution for each code


def mse(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The range of least squared error, clipping and rounding together, under scales as they are stored."""
    moves = [BOTH] if scheme.zero == "sym" else [BOTH, HIGH, LOW, HIGH, LOW]
    return _search(partial(_squared_error, *histogram.points(), scheme), histogram, scheme, moves)


def kl(histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
    """The clip whose quantized distribution diverges least from the original: entropy calibration.

    Source: S. Migacz, "8-bit Inference with TensorRT", NVIDIA, GPU Technology Conference 2017. The reference P is the
    histogram inside the clip, with all values outside added to its end bins; the candidate Q is the histogram inside the
    clip, without those, averaged over the bins that share a code; the clip of least KL(P‖Q) wins.

    As in the talk, one magnitude is searched for both sides: with two, a whole side could be clipped away, since KL does
    not measure how far values move. Four differences. Bins are cut anew for each candidate, `REFINE` a code (the talk: 1 to
    16), so that one outlier does not put all other values into one bin. Codes, scales and zero points are the scheme's own,
    as stored. Exact zeros are left out: every clip represents them exactly. And the divergence that few values have by
    chance, (bins − codes) / 2n on average (G. Miller, "Note on the bias of information estimates", 1955), is subtracted.
    RecipeError for codebooks such as fp8: their steps are unequal.
    """
    if scheme.levels.levels is not None:
        message = f"observer kl needs codes in equal steps, which {scheme.grid} does not have"
        raise RecipeError(message, where=histogram.where, remedy="mse, percentile, average or minmax")
    return _search(partial(_divergence, histogram, *_distribution(histogram), scheme), histogram, scheme, [BOTH])


def _search(cost: Cost, histogram: Histogram, scheme: Scheme, moves: list[Tensor]) -> tuple[float, float]:
    """The range of least cost: each move clips one side, or both, at the best magnitude, given the moves before it."""
    low, high = min(extremes(histogram)[0], 0.0), max(histogram.high, 0.0)
    reach = max(-low, high)
    limit = torch.tensor((-reach, reach) if scheme.zero == "sym" else (low, high), dtype=torch.float64)
    best = float(cost(*limit[:, None])), limit
    coarse = _coarse(histogram, reach)
    for sides in moves:
        best = _cut(cost, limit, best, sides, coarse)
    first, last = best[1].tolist()
    return max(first, low), min(last, high)


def _coarse(histogram: Histogram, reach: float) -> Tensor:
    """Candidate factors on the range: eight an octave, down to two octaves below the median non-zero magnitude; then 0."""
    x, n = histogram.points()
    octaves = math.ceil(math.log2(4 * reach / _quantile(x[x != 0].abs(), n[x != 0], Fraction(1, 2)))) if reach else 0
    factors = torch.exp2(-torch.arange(8 * octaves + 1, dtype=torch.float64) / 8)
    return torch.nn.functional.pad(factors, (0, 1))


def _cut(cost: Cost, limit: Tensor, best: tuple[float, Tensor], sides: Tensor, coarse: Tensor) -> tuple[float, Tensor]:
    """The best cost and its range [2] after one coarse and one fine search for where to clip `sides` of the limits."""
    top = limit[sides].abs().max()
    for factors in (coarse, FINE):
        t = (top * factors)[:, None]
        ranges = torch.where(sides, torch.maximum(torch.minimum(limit, t), -t), best[1])
        costs = torch.cat([cost(*part.T) for part in ranges.split(AT_ONCE)])
        at = costs.argmin()
        top = t[at, 0]
        if float(costs[at]) < best[0]:
            best = float(costs[at]), ranges[at]
    return best


def _squared_error(x: Tensor, n: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """Σ n (x − rounded x)² under each range, [C]; x, n [P] as `points` gives them."""
    s = _scales(low, high, scheme)
    _, decoded = round_to(x, s.scale, s.zero, scheme)
    return (x - decoded).double().square_() @ n.double()


def _distribution(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """The distribution of non-zero values: edges [M], ascending, and how many values lie below each, both float64.

    Each value is spread over all numbers that round to the same bfloat16, whose spacing is no structure to preserve.
    """
    near = torch.nn.functional.pad(histogram.counts, (2, 2)).view(2, -1, 4).sum(-1)[:, 1:]
    last = 0x7F80  # infinity, as a bfloat16: the largest finite numbers are nearest to it, and its cell ends with them
    edge = ((torch.arange(last + 1, dtype=torch.int32) << 16) + (1 << 15)).view(torch.float32).double()
    edge[last] = torch.finfo(torch.float32).max
    mass = torch.cat([near[0, :last].flip(0), near.new_zeros(1), near[1, :last]])
    return torch.cat([-edge.flip(0), edge]), torch.nn.functional.pad(mass.cumsum(0), (1, 0)).double()


def _divergence(histogram: Histogram, edge: Tensor, below: Tensor, scheme: Scheme, low: Tensor, high: Tensor) -> Tensor:
    """KL(P‖Q) of each range [C], in nats; edge, below [M] as `_distribution` gives them."""
    codes = 1 << scheme.levels.bits
    start, stop = low.clamp(min=min(histogram.low, 0.0))[:, None], high.clamp(max=max(histogram.high, 0.0))[:, None]
    cut = start + (stop - start) * torch.linspace(0, 1, REFINE * codes + 1, dtype=torch.float64)
    cumulative = _interpolated(cut, edge, below)
    # Half of the extreme's cell lies beyond it; a clip at the extreme leaves nothing outside.
    cumulative[:, 0].masked_fill_(start[:, 0] <= histogram.low, 0)
    cumulative[:, -1].masked_fill_(stop[:, 0] >= histogram.high, float(below[-1]))
    inside = cumulative.diff()
    s = _scales(low, high, scheme)
    code, _ = round_to((cut[:, 1:] + cut[:, :-1]).float() / 2, s.scale, s.zero, scheme)
    q, by_code = _averaged(inside, code.long() - code_range(scheme)[0], codes)
    q = (q + 1 / q.shape[1]) / (
        q.sum(1, keepdim=True) + 1
    )  # one more value, spread evenly, so that no bin of Q is empty
    n, p = below[-1].clamp(min=1), inside.clone()
    p[:, 0] += cumulative[:, 0]
    p[:, -1] += below[-1] - cumulative[:, -1]
    chance = (inside.clamp(max=1).sum(1) - by_code.clamp(max=1).sum(1)) / (2 * n)
    return torch.xlogy(p / n, p / n / q).sum(1) - chance


def _interpolated(x: Tensor, edge: Tensor, below: Tensor) -> Tensor:
    """How many values lie below x, interpolated linearly between edges."""
    at = torch.searchsorted(edge, x, right=True).sub_(1).clamp_(0, len(edge) - 2)
    share = ((x - edge[at]) / (edge[at + 1] - edge[at])).clamp_(0, 1)
    return torch.lerp(below[at], below[at + 1], share)


def _averaged(mass: Tensor, code: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Each bin's mass [C, F] replaced by the mean over the bins of its code; the mass of each code."""
    zero = mass.new_zeros(len(mass), codes)
    total, width = (zero.scatter_add(1, code, each) for each in (mass, torch.ones_like(mass)))
    return (total / width.clamp(min=1)).gather(1, code), total


# -------------------------------------------------------------------------------------------------------------- scales

Observer = Callable[[Histogram, Scheme], tuple[float, float]]
RANGES: dict[str, Observer] = {"minmax": minmax, "average": average, "percentile": quantiles, "mse": mse, "kl": kl}


def static_scales(
    histogram: Histogram, scheme: Scheme, *, observer: str = "mse", percentile: float | None = None
) -> Scales:
    """The fixed scale [1, 1] (and zero) of an input, for a scheme such as int8-tensor-asym or fp8-tensor.

    observer    a key of `RANGES`: how the range is chosen
    percentile  for that observer; None: 99.9

    Raises CalibrationError where nothing was seen; RecipeError for an unknown observer or one that does not fit the grid,
    and for a percentile out of bounds or with another observer; SchemeError for a scheme of more than one scale.
    """
    if observer not in RANGES:
        raise RecipeError(f"unknown observer {observer!r}", where=histogram.where, remedy=f"one of {', '.join(RANGES)}")
    if percentile is not None and observer != "percentile":
        raise RecipeError(
            f"observer {observer} has no percentile",
            where=histogram.where,
            remedy="leave it out, or use observer percentile",
        )
    choose = RANGES[observer] if percentile is None else partial(quantiles, percentile=percentile)
    low, high = (torch.tensor([end], dtype=torch.float64) for end in choose(histogram, scheme))
    return _scales(low, high, scheme)


def _scales(low: Tensor, high: Tensor, scheme: Scheme) -> Scales:
    """The scale of each range, as stored: low, high [C] -> scale [C, 1]."""
    if scheme.group != TENSOR or scheme.scale not in ("f32", "f16", "bf16") or scheme.levels.reach is None:
        remedy = "a scheme such as int8-tensor, int8-tensor-asym or fp8-tensor, its scale in f32, f16 or bf16"
        raise SchemeError(f"scheme {str(scheme)!r} has not one scale that a range decides", remedy=remedy)
    ends = torch.stack([low, high], dim=-1).float()
    return snap(*raw_scales(ends[:, None], 2, scheme), scheme)
