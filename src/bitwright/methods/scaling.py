"""What AWQ and SmoothQuant share: channel scales tried one after the other, the best kept.

Both move a factor s [K] from the inputs of some matrices into the matrices: x wᵀ = (x / s) (w s)ᵀ. They differ in the
scales they try and in what they measure.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.methods.search import best_scales
from bitwright.numerics.codec import fit, rounded
from bitwright.numerics.scheme import Scheme

TRIAL_ROWS = 256  # of each matrix decide
TRIAL_STEPS = 4  # of the search of scales, half of what rounding itself takes


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the input.

    w: [N, K];  scheme: what it will be rounded to, None: it stays;  activations: what its inputs will be rounded to;
    searched: under searched scales, rather than those of each group's extremes.
    """

    w: Tensor
    scheme: Scheme | None
    activations: Scheme | None = None
    searched: bool = False

    def sampled(self) -> "Reader":
        """Some of its rows."""
        return replace(self, w=self.w[:: max(1, len(self.w) // TRIAL_ROWS)])

    def rounded(self, s: Tensor, importance: Tensor | None) -> Tensor:
        """The matrix [N, K] that x meets when w s is rounded to nearest and x is divided by s: Q(w s) / s.

        importance [K]: mean x², for the search of scales.
        """
        if self.scheme is None:
            return self.w
        scaled = self.w * s
        if self.searched:
            importance = None if importance is None else importance / s.square()
            scales = best_scales(scaled, self.scheme, importance, steps=TRIAL_STEPS)
        else:
            scales = fit(scaled, self.scheme)
        return rounded(scaled, self.scheme, scales) / s


@dataclass(frozen=True)
class Scaling:
    """Channel scales [K] and the exponent that made them; exponent 0 stands for the identity, s = 1."""

    s: Tensor
    exponent: float


def best_scaling(candidates: Iterable[Scaling], loss: Callable[[Tensor], float]) -> Scaling:
    """The candidate of least loss; the first of equals."""
    return min(candidates, key=lambda candidate: loss(candidate.s))


def centred(s: Tensor) -> Tensor:
    """s over the geometric mean of its extremes, so that scales neither grow nor shrink on the whole."""
    return s / (s.max() * s.min()).sqrt()


def relative(statistic: Tensor, smallest: float) -> Tensor:
    """A statistic of each channel over its largest, and at least `smallest`; ones where all are 0."""
    top = statistic.max()
    return (statistic / top).clamp(min=smallest) if top > 0 else torch.ones_like(statistic)


def identity(like: Tensor) -> Scaling:
    """No scaling, for as many channels."""
    return Scaling(torch.ones_like(like), 0.0)
