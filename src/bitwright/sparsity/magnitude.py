"""Magnitude pruning: the smallest weights go, whatever their inputs are. Here too: what every pruner is asked and returns."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError


@dataclass(frozen=True)
class Pruned:
    """weight: w with zeros, in its shape and type. mask: bool, True where a weight was removed. damping: as in `Outcome`."""

    weight: Tensor
    mask: Tensor
    damping: float = 0.0


@dataclass(frozen=True)
class Target:
    """How many weights go: a share of them all, or a pattern.

    sparsity  share in [0, 1) of the weights that are removed, to the nearest whole number of them
    pattern   (n, m): of every m neighbours along K, n stay, such as (2, 4)
    Raises RecipeError unless exactly one of the two is given and means something.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            raise RecipeError("give either a sparsity or a pattern", remedy="such as sparsity 0.5, or pattern (2, 4)")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RecipeError(f"sparsity {self.sparsity} is outside [0, 1)", remedy="such as 0.5: half of the weights")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise RecipeError(f"pattern {self.pattern} is not n of m with 0 < n < m", remedy="such as (2, 4)")

    def matrix(self, w: Tensor) -> Tensor:
        """w [N, ...] as a float32 matrix [N, K]. RecipeError if the pattern does not fit K, NumericsError for NaN or Inf."""
        matrix = w.reshape(w.shape[0], -1).float()
        if self.pattern is not None and matrix.shape[1] % self.pattern[1]:
            message = f"K = {matrix.shape[1]} is not a multiple of the pattern's {self.pattern[1]}"
            raise RecipeError(message, remedy="a pattern that divides K, or a sparsity")
        if not torch.isfinite(matrix).all():
            raise NumericsError("the weights are not finite", remedy="look for NaN or Inf in the checkpoint")
        return matrix

    def lowest(self, score: Tensor, pool: int) -> Tensor:
        """The mask [N, K] of the weights of lowest score [N, K]; of equal ones, the first.

        Compared are the m neighbours of a pattern, or else `pool` neighbours: K is each row by itself, N · K all of them.
        """
        if self.pattern is not None:
            count, pool = self.pattern[1] - self.pattern[0], self.pattern[1]
        else:
            count = self.count(pool)
        pools = score.reshape(-1, pool)
        first = pools.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(pools, dtype=torch.bool).scatter_(1, first, True).view_as(score)

    def count(self, pool: int) -> int:
        """How many of `pool` weights go."""
        if self.pattern is not None:
            return pool // self.pattern[1] * (self.pattern[1] - self.pattern[0])
        assert self.sparsity is not None  # as __post_init__ has made sure
        return round(self.sparsity * pool)


def magnitude(
    w: Tensor, gram: Tensor | None, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None
) -> Pruned:
    """Remove the smallest |w| of the whole matrix, or of every m neighbours; the others stay as they are.

    w [N, K], or a convolution's [N, ...]; the Gram is not looked at; sparsity and pattern as in `Target`, with its errors.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    mask = target.lowest(matrix.abs(), matrix.numel()).view_as(w)
    return Pruned(w.masked_fill(mask, 0.0), mask)
