"""Magnitude pruning: remove the smallest weights, whatever their inputs. Also what all pruners share: `Target`, `Pruned`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError


@dataclass(frozen=True)
class Pruned:
    """A pruner's result. weight: w with zeros, same shape, type; mask: bool, True where removed; damping: as in `Outcome`."""

    weight: Tensor
    mask: Tensor
    damping: float = 0.0

    def rows(self, start: int, stop: int, step: int = 1) -> "Pruned":
        """Rows start..stop, or every step-th of them."""
        here = slice(start, stop, step)
        return Pruned(self.weight[here], self.mask[here], self.damping)


@dataclass(frozen=True)
class Target:
    """How many weights to remove: a share of all, or a pattern.

    sparsity  share in [0, 1) of the weights, to the nearest whole number of them
    pattern   (n, m): of every m neighbours along K, n stay, such as (2, 4)
    Raises RecipeError unless exactly one of the two is given and in range.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.pattern is None):
            found = f"sparsity {self.sparsity} and pattern {self.pattern}: give one of the two"
            raise RecipeError(found, remedy="sparsity=0.5, or pattern=(2, 4)")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise RecipeError(
                f"sparsity {self.sparsity} is outside [0, 1)", remedy="sparsity=0.5 removes half of the weights"
            )
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise RecipeError(f"pattern {self.pattern} is not n of m with 0 < n < m", remedy="pattern=(2, 4)")

    def matrix(self, w: Tensor) -> Tensor:
        """w [N, ...] as a float32 matrix [N, K]. RecipeError if the pattern does not fit K, NumericsError for NaN or Inf."""
        matrix = w.reshape(w.shape[0], -1).float()
        self.check(matrix.shape[1])
        if not torch.isfinite(matrix).all():
            raise NumericsError("the weights are not finite", remedy="get a good copy of the checkpoint")
        return matrix

    def check(self, K: int) -> None:
        """RecipeError if the pattern does not fit rows of K weights."""
        if self.pattern is not None and K % self.pattern[1]:
            message = f"K = {K} is not a multiple of the pattern's {self.pattern[1]}"
            raise RecipeError(message, remedy="a pattern that divides K, or a sparsity")

    def lowest(self, score: Tensor, pool: int, count: int | None = None) -> Tensor:
        """The mask [N, K] of the weights of lowest score [N, K], the first among equals.

        Scores are compared among the m neighbours of a pattern, or else among `pool` neighbours: K for each row by itself,
        N · K for the whole matrix. count: how many of each pool; None: the share of it.
        """
        if self.pattern is not None:
            count, pool = self.pattern[1] - self.pattern[0], self.pattern[1]
        elif count is None:
            count = self.count(pool)
        pools = score.reshape(-1, pool)
        first = pools.argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(pools, dtype=torch.bool).scatter_(1, first, True).view_as(score)

    def count(self, pool: int) -> int:
        """How many of `pool` weights to remove."""
        if self.pattern is not None:
            return pool // self.pattern[1] * (self.pattern[1] - self.pattern[0])
        assert self.sparsity is not None  # see __post_init__
        return round(self.sparsity * pool)


def magnitude(
    w: Tensor, gram: Tensor | None, *, sparsity: float | None = None, pattern: tuple[int, int] | None = None
) -> Pruned:
    """Remove the smallest |w| of the whole matrix, or of every m neighbours; the others keep their values.

    w [N, K], or a convolution's [N, ...]; the Gram is not used; sparsity, pattern and errors: see `Target`.
    """
    target = Target(sparsity, pattern)
    matrix = target.matrix(w)
    mask = target.lowest(matrix.abs(), matrix.numel()).view_as(w)
    return Pruned(w.masked_fill(mask, 0.0), mask)
