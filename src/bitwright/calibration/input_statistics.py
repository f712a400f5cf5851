"""Statistics of a layer's input: gathered while the model runs, then passed to methods as plain tensors.

They belong to an *input*, not to a layer: modules that read the same tensor share one `Inputs`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.ranges import Histogram, together
from bitwright.calibration.statistics import Cross, Gram, Range
from bitwright.errors import CalibrationError
from bitwright.system import distributed

SAMPLED = 512  # tokens of an input that are kept as a sample


@dataclass(frozen=True)
class Inputs:
    """Statistics of one input x [T, K], float32, and the full names of the modules that read it. None: not gathered.

    gram       [K, K] XᵀX / T, or only its diagonal [K], as from an importance matrix
    drift      [K, K] (X₀ − X)ᵀX / T; X₀: the same input in the float model
    residual   [N, K] (R₀ − R)ᵀX / T; R: the residual stream that the module's output is added to, R₀: the float model's
    mean       [K] mean |x|
    low, high  [K] extremes
    sample     [S, K] some tokens
    histogram  of all values, channels pooled
    borrowed   tokens beside its own that stand for all of the layer, of an expert to which the router sends few
    """

    names: tuple[str, ...] = ()
    tokens: int = 0
    gram: Tensor | None = None
    drift: Tensor | None = None
    residual: Tensor | None = None
    mean: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    sample: Tensor | None = None
    histogram: Histogram | None = None
    borrowed: int = 0

    @property
    def correlated(self) -> bool:
        """Whether the Gram is known in full, with correlations between channels."""
        return self.gram is not None and self.gram.ndim == 2

    @property
    def peak(self) -> Tensor:
        """max |x| of each channel [K]. CalibrationError if ranges were not gathered."""
        if self.low is None or self.high is None:
            remedy = "calibrate with a text, not with an importance matrix: --calib general"
            message = "the ranges of this input were not gathered"
            raise CalibrationError(message, where=", ".join(self.names), remedy=remedy)
        return torch.maximum(self.low.abs(), self.high.abs())

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device; histograms stay on the CPU."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **moved)

    def divided(self, s: Tensor) -> "Inputs":
        """The statistics of x / s, s [K] > 0.

        All are exact but the histogram, in which channels are pooled: it becomes that of the sample, between the exact
        extremes.
        """
        gram, drift = (None if m is None else m / s / s[:, None] for m in (self.gram, self.drift))
        residual, mean, low, high, sample = (
            None if t is None else t / s for t in (self.residual, self.mean, self.low, self.high, self.sample)
        )  # each [.., K]
        changed = replace(self, gram=gram, drift=drift, residual=residual, mean=mean, low=low, high=high, sample=sample)
        return replace(changed, histogram=changed._histogram_of_sample())

    def without(self, columns: Tensor) -> "Inputs":
        """The statistics of x with these channels [k] set to 0; the histogram as in `divided`."""
        residual, mean, low, high, sample = (
            None if t is None else t.index_fill(-1, columns, 0)
            for t in (self.residual, self.mean, self.low, self.high, self.sample)
        )
        gram, drift = (
            None if m is None else m.index_fill(0, columns, 0).index_fill_(1, columns, 0)
            for m in (self.gram, self.drift)
        )
        changed = replace(self, gram=gram, drift=drift, residual=residual, mean=mean, low=low, high=high, sample=sample)
        return replace(changed, histogram=changed._histogram_of_sample())

    def reordered(self, order: Tensor) -> "Inputs":
        """The statistics of x with its channels in this order [K]."""
        gram, drift, residual, mean, low, high, sample = (
            None if t is None else t[..., order]
            for t in (self.gram, self.drift, self.residual, self.mean, self.low, self.high, self.sample)
        )
        gram = gram if gram is None or gram.ndim == 1 else gram[order]
        drift = None if drift is None else drift[order]
        return replace(self, gram=gram, drift=drift, residual=residual, mean=mean, low=low, high=high, sample=sample)

    def _histogram_of_sample(self) -> Histogram | None:
        if self.histogram is None or self.sample is None or self.low is None or self.high is None:
            return None
        histogram = Histogram()
        histogram.update(self.sample)
        histogram.update(torch.stack([self.low, self.high]))
        return histogram


def pooled(some: Sequence[Inputs]) -> Inputs:
    """The statistics by which channels are scaled, of several inputs together, such as those of all experts of a layer.

    Each counts by its tokens; all must have been gathered alike. Drift, residual and histogram are left out.
    """
    if len(some) == 1:
        return some[0]
    counts = [float(max(1, one.tokens)) for one in some]
    low, high = ([t for one in some if (t := one.low if least else one.high) is not None] for least in (True, False))
    samples = [one.sample for one in some if one.sample is not None]
    return Inputs(
        tuple(name for one in some for name in one.names),
        sum(one.tokens for one in some),
        gram=_mean([one.gram for one in some if one.gram is not None], counts),
        mean=_mean([one.mean for one in some if one.mean is not None], counts),
        low=torch.stack(low).amin(0) if low else None,
        high=torch.stack(high).amax(0) if high else None,
        sample=torch.cat(samples)[:: len(some)] if samples else None,
    )


def _mean(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor | None:
    """The mean weighted by counts; None of none."""
    if not tensors:
        return None
    total = torch.zeros_like(tensors[0])
    for tensor, count in zip(tensors, counts, strict=True):
        total.add_(tensor, alpha=count / sum(counts))
    return total


@dataclass
class Gathering:
    """Running statistics of one input, batch by batch."""

    names: list[str]
    gram: Gram
    drift: Cross | None = None
    residual: Cross | None = None
    range: Range | None = None
    histogram: Histogram | None = None
    sample: list[Tensor] = field(default_factory=list)
    stride: int = 1

    @classmethod
    def of(cls, x: Tensor, *, detailed: bool, expected: int) -> "Gathering":
        """Empty statistics for inputs like x [..., K].

        detailed: ranges, a sample and a histogram too, which some methods need; expected: tokens to come in all.
        """
        K = x.shape[-1]
        gathering = cls([], Gram(K, x.device))
        if detailed:
            gathering.range, gathering.histogram = Range.empty(K, x.device), Histogram()
            gathering.stride = max(1, expected * distributed.count() // SAMPLED)
        return gathering

    def update(
        self, x: Tensor, original: Tensor | None = None, ahead: Tensor | None = None, counting: Tensor | None = None
    ) -> None:
        """One more batch x [..., K].

        original [..., K]: the float model's, for drift; ahead [..., N]: the float model's residual stream minus this one;
        counting [...]: each token's weight. X₀ − X is taken in float32 before it is multiplied: X₀ᵀX − XᵀX would be a
        difference of nearly equal sums, which cancels in bfloat16.
        """
        apart = None if original is None else original.float() - x.float()
        counted = x
        if counting is not None:
            root = counting.sqrt()[..., None]
            counted = (x.float() * root).to(x.dtype)
            apart, ahead = (None if t is None else t * root for t in (apart, ahead))
        self.gram.update(counted)
        if apart is not None:
            self.drift = self.drift or Cross(x.shape[-1], x.shape[-1], x.device)
            self.drift.update(apart, counted)
        if ahead is not None:
            self.residual = self.residual or Cross(ahead.shape[-1], x.shape[-1], x.device)
            self.residual.update(ahead, counted)
        if self.range is not None and self.histogram is not None:
            self.range.update(x)
            self.histogram.update(x)
            self.sample.append(x.detach().reshape(-1, x.shape[-1])[:: self.stride].float())

    def _pool(self) -> None:
        """Replace the running sums by those over all processes."""
        if distributed.count() == 1:
            return
        for sums in (self.gram, self.drift, self.residual):
            if sums is not None:
                sums.pool()
        if self.range is not None and self.histogram is not None:
            self.range.pool()
            self.histogram = together(self.histogram)
            own = torch.cat(self.sample)
            self.sample = [sample.to(own.device) for sample in distributed.everyone(own.cpu())]

    def value(self) -> Inputs:
        """The statistics, of all processes that work together; takes the running sums' memory, so nothing can be added
        afterwards."""
        self._pool()
        tokens, names = self.gram.tokens, tuple(self.names)
        drift, residual = (None if cross is None else cross.value() for cross in (self.drift, self.residual))
        gram, self.drift, self.residual = self.gram.value(), None, None
        known = Inputs(names, tokens, gram, drift, residual)
        if self.range is None:
            return known
        low, high, mean = self.range.value()
        return replace(known, mean=mean, low=low, high=high, sample=torch.cat(self.sample), histogram=self.histogram)
