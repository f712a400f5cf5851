"""AWQ: scale up the weights of salient input channels before rounding, and scale those inputs down.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: s = (mean |x|)^α for each input channel, divided by √(max s · min s); α from
a grid of 20 points in [0, 1), of which 0 means no scaling. The α of least output error is taken. The paper runs the layer
for each α; the Gram of the inputs gives the same squared error, tr(E gram Eᵀ) with E = w − Q(w s) / s, without a run.
Clipping, the method's second part, is the scale search of `search`, which follows by default. Q contains it too, where it
will follow: scales that are best without clipping are not the best with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.scaling import Candidates, Reader, Scaling, centred, identity, relative
from bitwright.numerics.loss import energy

SMALLEST = 1e-4  # of the largest mean |x|, at least: channels that are hardly ever active must not make s huge


@dataclass(frozen=True)
class Awq:
    """AWQ's options. points: size of the grid of α, at least 1; RecipeError for less."""

    points: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.points, int) or self.points < 1:
            remedy = 'transforms = [{ name = "awq", points = 20 }]'
            raise RecipeError(f"a grid of {self.points} points: awq's points must be at least 1", remedy=remedy)

    def candidates(self, readers: Sequence[Reader], gram: Tensor, mean: Tensor) -> Candidates:
        """Channel scales for the matrices that read one input.

        readers  the matrices [N, K]; those that stay in float (no scheme) do not count
        gram     [K, K] = XᵀX / T
        mean     [K] mean |x|, equal for channels that must share a scale
        """
        some = [reader.sampled() for reader in readers]
        importance = gram.diagonal().clamp(min=0)
        activity = relative(mean, SMALLEST)
        grid = [identity(mean)]
        for exponent in (i / self.points for i in range(1, self.points)):
            grid.append(Scaling(centred(activity**exponent), exponent))

        def loss(s: Tensor) -> float:
            missed = (r.w - r.rounded(s, importance) for r in some if r.scheme is not None)
            return sum(float(energy(error, gram).sum()) for error in missed)

        return Candidates(tuple(grid), loss)
