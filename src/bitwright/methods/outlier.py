"""Outlier separation: a few input channels stay in float, the others are rounded without them.

LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) keeps the channels whose inputs exceed a threshold of 6 and multiplies the
rest in int8; AWQ's first experiment (Lin et al. 2023, arXiv:2306.00978, table 1) keeps 0.1, 1 or 3 % of the channels, chosen by
their inputs, by their weights, or at random. Here both are a choice of columns; any method rounds the others.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import RecipeError

By = Literal["activation", "weight", "random"]
BYS = ("activation", "weight", "random")


@dataclass(frozen=True)
class Outlier:
    """Which input channels stay in float.

    threshold  the channels where any |x| exceeds it; without a fraction
    fraction   instead, this share of the channels, at least one: the largest by `by`
    by         "activation": mean |x|; "weight": root mean square weight; "random": drawn by `seed`
    Raises RecipeError for options out of range.
    """

    threshold: float = 6.0
    fraction: float | None = None
    by: By = "activation"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise RecipeError(
                f"an outlier threshold of {self.threshold}", remedy="give a positive one, such as threshold = 6.0"
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise RecipeError(
                f"an outlier fraction of {self.fraction}", remedy="give one between 0 and 1, such as fraction = 0.01"
            )
        if self.by not in BYS:
            raise RecipeError(f"outliers chosen by {self.by!r}", remedy=f"one of {', '.join(BYS)}")
        if self.fraction is None and self.by != "activation":
            raise RecipeError(f"outliers by {self.by} need a fraction", remedy="add one, such as fraction = 0.01")

    def expected(self, K: int) -> int | None:
        """How many of K channels stay in float; None: known only after calibration."""
        return None if self.fraction is None else max(1, round(self.fraction * K))

    def columns(self, w: Tensor, peak: Tensor, mean: Tensor) -> Tensor:
        """The channels [k], rising. w [N, K]: all matrices that read the input, stacked; peak, mean [K]: max and mean |x|."""
        count = self.expected(w.shape[1])
        if count is None:
            return (peak > self.threshold).nonzero()[:, 0]
        if self.by == "random":
            rank = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(self.seed)).to(w.device)
        else:
            rank = mean if self.by == "activation" else w.float().square().mean(0)
        return rank.argsort(descending=True, stable=True)[:count].sort().values
