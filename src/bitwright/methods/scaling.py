"""Channel scaling, shared by AWQ and SmoothQuant: candidate scales are tried one after the other, the best is kept.

Both move a factor s [K] from the inputs of some matrices into the matrices: x wᵀ = (x / s) (w s)ᵀ. They differ in the
candidates and in the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.methods.search import best_scales
from bitwright.numerics.codec import fit, rounded
from bitwright.numerics.scheme import Scheme

TRIAL_ROWS = 256  # rows of each matrix that candidates are judged on, about
TRIAL_STEPS = 4  # steps of the scale search, half of what rounding itself takes


@dataclass(frozen=True)
class Reader:
    """A matrix that reads the input.

    w            [N, K]
    scheme       what it will be rounded to; None: it stays in float
    activations  what its inputs will be rounded to, if they are
    searched     whether its scales will be searched, rather than taken from each group's extremes
    """

    w: Tensor
    scheme: Scheme | None
    activations: Scheme | None = None
    searched: bool = False

    def sampled(self) -> "Reader":
        """The same matrix with a sample of its rows."""
        return replace(self, w=self.w[:: max(1, len(self.w) // TRIAL_ROWS)])

    def rounded(self, s: Tensor, importance: Tensor | None) -> Tensor:
        """Q(w s) / s [N, K]: what multiplies x when w s is rounded to nearest and x is divided by s.

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
    """Channel scales s [K] and the exponent α that they come from; 0 stands for s = 1."""

    s: Tensor
    exponent: float


@dataclass(frozen=True)
class Candidates:
    """Channel scales to choose from, and the loss of some s [K] by which they are compared."""

    scalings: tuple[Scaling, ...]
    loss: Callable[[Tensor], float]

    def best(self) -> Scaling:
        """The candidate of least loss, the first among equals."""
        return min(self.scalings, key=lambda candidate: self.loss(candidate.s))


def centred(s: Tensor) -> Tensor:
    """s divided by the geometric mean of its extremes, √(max s · min s), so that weights keep their size on the whole."""
    return s / (s.max() * s.min()).sqrt()


def relative(statistic: Tensor, smallest: float) -> Tensor:
    """A statistic of each channel [K] divided by its maximum, at least `smallest`; ones where all are 0."""
    top = statistic.max()
    return (statistic / top).clamp(min=smallest) if top > 0 else torch.ones_like(statistic)


def identity(like: Tensor) -> Scaling:
    """No scaling: s = 1 for as many channels as `like` has."""
    return Scaling(torch.ones_like(like), 0.0)
