"""AWQ: weights that meet large inputs are rounded finely, by scaling them up and their inputs down.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: s = (mean |x|)^α for each input channel, over √(max s · min s); α from a
grid of 20 points in [0, 1), 0 being no scaling. What is minimised is the error of the outputs. The paper runs the layer
for each α; the Gram of the inputs gives the same squared error, tr(E gram Eᵀ) with E = w − Q(w s) / s, without a run.
Clipping, the method's second part, is the scale search of `search`, which follows by default, and which Q already
contains: scales chosen for rounding that does not clip are not the best for rounding that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.scaling import Reader, Scaling, best_scaling, centred, identity, relative
from bitwright.numerics.loss import energy

SMALLEST = 1e-4  # of the largest mean |x|: channels that are hardly ever active do not blow up their weights


@dataclass(frozen=True)
class Awq:
    """points: of the grid of α. RecipeError for none."""

    points: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.points, int) or self.points < 1:
            raise RecipeError(f"a grid of {self.points} points", remedy="awq's points must be at least 1, such as 20")

    def scaling(self, readers: Sequence[Reader], gram: Tensor, mean: Tensor) -> Scaling:
        """Channel scales for the matrices that read one input.

        readers  the matrices [N, K]; those without a scheme do not count
        gram     [K, K] = XᵀX / T;  mean [K]: mean |x|, the same for channels that must share a scale
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

        return best_scaling(grid, loss)
