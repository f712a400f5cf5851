"""What calibration knows of an input: gathered while a model runs, then given to methods as plain tensors.

Statistics belong to an *input*, not to a layer: modules that read the same tensor share one `Inputs`.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitwright.calibration.ranges import Histogram
from bitwright.calibration.statistics import Cross, Gram, Range
from bitwright.errors import CalibrationError

SAMPLED = 512  # tokens of an input that are kept as they are


@dataclass(frozen=True)
class Inputs:
    """Statistics of one input x [T, K] and the full names of the modules that read it; None: not gathered.

    gram [K, K] = XᵀX / T, or [K], its diagonal, where that is all there is
    drift [K, K] = (X₀ − X)ᵀX / T, X₀ what the float model has in the place of X
    residual [N, K] = (R₀ − R)ᵀX / T, R the residual stream that the module's output is added to, R₀ the float model's
    mean [K]: mean |x|;  low, high [K]: extremes;  sample [S, K]: some tokens, float32;  histogram: of all values
    borrowed: tokens beside those that stand for all of a layer, where the router sends an expert few
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
        """Whether it is known how channels go together."""
        return self.gram is not None and self.gram.ndim == 2

    @property
    def peak(self) -> Tensor:
        """max |x| of each channel [K]. CalibrationError if ranges were not gathered."""
        if self.low is None or self.high is None:
            raise CalibrationError("the ranges of this input were not gathered", where=", ".join(self.names))
        return torch.maximum(self.low.abs(), self.high.abs())

    def divided(self, s: Tensor) -> "Inputs":
        """The statistics of x / s, s [K] > 0.

        All follow exactly but the histogram, whose channels were pooled: it is that of the sample, between the exact
        extremes.
        """
        gram, drift = (None if m is None else m / s / s[:, None] for m in (self.gram, self.drift))
        residual, mean, low, high, sample = (
            None if t is None else t / s for t in (self.residual, self.mean, self.low, self.high, self.sample)
        )  # each [.., K]
        changed = replace(self, gram=gram, drift=drift, residual=residual, mean=mean, low=low, high=high, sample=sample)
        return replace(changed, histogram=changed._histogram_of_sample())

    def without(self, columns: Tensor) -> "Inputs":
        """The statistics of x with these channels [k] set to 0. The histogram as in `divided`."""
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

    def _histogram_of_sample(self) -> Histogram | None:
        if self.histogram is None or self.sample is None or self.low is None or self.high is None:
            return None
        histogram = Histogram()
        histogram.update(self.sample)
        histogram.update(torch.stack([self.low, self.high]))
        return histogram


@dataclass
class Gathering:
    """The statistics of one input while batches come in.

    detailed: ranges, a sample and a histogram too, as some methods ask for. expected: tokens that will come.
    """

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
        """Nothing seen yet of an input like x [..., K]."""
        K = x.shape[-1]
        gathering = cls([], Gram(K, x.device))
        if detailed:
            gathering.range, gathering.histogram = Range.empty(K), Histogram()
            gathering.stride = max(1, expected // SAMPLED)
        return gathering

    def update(
        self, x: Tensor, original: Tensor | None = None, ahead: Tensor | None = None, counting: Tensor | None = None
    ) -> None:
        """One more batch x [..., K].

        original: what the float model has in its place; ahead [..., N]: the float model's residual stream less this one;
        counting [...]: how much each token counts. The differences are taken in float32, before anything is multiplied:
        X₀ᵀX − XᵀX would be one of nearly equal sums, of which bfloat16 leaves nothing.
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

    def value(self) -> Inputs:
        """What was gathered; the running sums are used up."""
        tokens, names = self.gram.tokens, tuple(self.names)
        drift, residual = (None if cross is None else cross.value() for cross in (self.drift, self.residual))
        gram, self.drift, self.residual = self.gram.value(), None, None
        known = Inputs(names, tokens, gram, drift, residual)
        if self.range is None:
            return known
        low, high, mean = self.range.value()
        return replace(known, mean=mean, low=low, high=high, sample=torch.cat(self.sample), histogram=self.histogram)
