"""SmoothQuant: move the outlier channels of activations into the weights, so that inputs are easier to round.

Xiao et al. 2022 (arXiv:2211.10438), equation 4: s = max |x|^α / max |w|^(1 − α) for each input channel, the maximum over all
matrices that read it. The paper takes one α for a model; here each input has its own: the α of least output error on a
sample of tokens, with inputs and weights rounded as they will be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.scaling import Candidates, Reader, Scaling, centred, identity, relative
from bitwright.numerics.codec import fit, rounded
from bitwright.numerics.scheme import TENSOR, Scheme

SMALLEST = 1e-5  # of the largest channel, at least: for channels that are never active, or have no weights


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant's options. points: size of the grid of α, at least 1; RecipeError for less."""

    points: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.points, int) or self.points < 1:
            remedy = 'transforms = [{ name = "smooth", points = 20 }]'
            raise RecipeError(f"a grid of {self.points} points: smooth's points must be at least 1", remedy=remedy)

    def candidates(
        self, readers: Sequence[Reader], sample: Tensor, extremes: Tensor, reach: Tensor, peak: Tensor
    ) -> Candidates:
        """Channel scales for the matrices that read one input.

        readers   the matrices [N, K]; those without a scheme stay in float
        sample    [S, K] some tokens
        extremes  [2, K] min and max of x, for static ranges
        reach     [K] max |w| over the readers; peak [K]: max |x|; both equal for channels that must share a scale
        """
        x, w = relative(peak, SMALLEST), relative(reach, SMALLEST)
        grid = [identity(peak)]
        for exponent in (i / self.points for i in range(1, self.points + 1)):
            grid.append(Scaling(centred(x**exponent / w ** (1 - exponent)), exponent))
        some = [reader.sampled() for reader in readers]
        meant = [sample @ reader.w.T for reader in some]

        def loss(s: Tensor) -> float:
            return sum(_missed(reader, out, sample, extremes, s) for reader, out in zip(some, meant, strict=True))

        return Candidates(tuple(grid), loss)


def _missed(reader: Reader, meant: Tensor, sample: Tensor, extremes: Tensor, s: Tensor) -> float:
    """Relative squared error of one matrix's outputs on the sample; meant: the float outputs."""
    w = reader.rounded(s, sample.square().mean(0) if reader.searched else None)
    x = sample if reader.activations is None else _rounded_inputs(sample, extremes, s, reader.activations)
    return float((x @ w.T - meant).square().sum() / meant.square().sum().clamp(min=1e-30))


def _rounded_inputs(sample: Tensor, extremes: Tensor, s: Tensor, scheme: Scheme) -> Tensor:
    """Q(x / s) s: rounded inputs in terms of the unscaled matrix."""
    scales = fit(extremes / s, scheme) if scheme.group == TENSOR else None
    return rounded(sample / s, scheme, scales) * s


def reach_of(readers: Sequence[Reader]) -> Tensor:
    """max |w| of each input channel [K] over all matrices."""
    return torch.stack([reader.w.abs().amax(0) for reader in readers]).amax(0)
