"""`Pruning`: which method prunes, and how much, as a text such as "wanda:0.5" or "sparsegpt:2:4"."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from bitwright.errors import RecipeError, one_of
from bitwright.sparsity import PRUNERS, Pruned
from bitwright.sparsity.magnitude import Target

EXAMPLE = "such as wanda:0.5, magnitude:0.3 or sparsegpt:2:4"


@dataclass(frozen=True)
class Pruning:
    """How the weights of a matrix are pruned before they are rounded.

    method  a key of `sparsity.PRUNERS`; target: how many weights
    """

    method: str
    target: Target

    @classmethod
    def parse(cls, text: str) -> Self:
        """METHOD:SHARE or METHOD:N:M. RecipeError for anything else."""
        method, _, amount = text.partition(":")
        if method not in PRUNERS:
            raise RecipeError(f"unknown pruning method {method!r}", remedy=f"{one_of(method, PRUNERS)}; {EXAMPLE}")
        try:
            return cls(method, target_of(amount))
        except RecipeError as error:
            error.where, error.remedy = f"pruning {text!r}", EXAMPLE
            raise

    def __str__(self) -> str:
        pattern, share = self.target.pattern, self.target.sparsity
        return f"{self.method}:{share:g}" if pattern is None else f"{self.method}:{pattern[0]}:{pattern[1]}"

    @property
    def needs_calibration(self) -> bool:
        """Whether it uses statistics of the inputs."""
        return self.method != "magnitude"

    @property
    def rowwise(self) -> bool:
        """Whether a row's mask does not depend on other rows."""
        return self.method == "wanda" or self.target.pattern is not None

    def removed(self, N: int, K: int) -> int:
        """How many weights of a matrix [N, K] become zero. RecipeError for a pattern that does not divide K."""
        self.target.check(K)
        return N * self.target.count(K) if self.method == "wanda" else self.target.count(N * K)

    def __call__(self, w: Tensor, gram: Tensor | None) -> Pruned:
        """Prune w [N, K]; gram [K, K] = XᵀX / T or its diagonal [K]. Raises as the method does."""
        whole = gram.diag() if gram is not None and gram.ndim == 1 else gram
        return PRUNERS[self.method](w, whole, sparsity=self.target.sparsity, pattern=self.target.pattern)


def target_of(amount: str) -> Target:
    """A share such as "0.5", or a pattern such as "2:4" of which two stay. RecipeError for anything else."""
    n, colon, m = amount.partition(":")
    if colon and n.isdecimal() and m.isdecimal():
        return Target(pattern=(int(n), int(m)))
    try:
        return Target(float(amount))
    except ValueError as error:
        raise RecipeError(f"{amount!r} is no share and no pattern", remedy='such as 0.5, or "2:4"') from error
