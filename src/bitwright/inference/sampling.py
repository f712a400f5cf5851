"""Sampling: how the next token is chosen from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import InputError

LIKELIEST = 256  # of which most nuclei consist: the rest of the vocabulary is sorted only where they do not suffice


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0; else drawn from the fewest that have probability top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"temperature {self.temperature}, top-p {self.top_p}", remedy="temperature from 0, top-p above 0 to 1"
            )

    def pick(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token from logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        chances = ((logits - logits.max()) / self.temperature).softmax(-1)  # none grows beyond bounds when it is near 0
        if self.top_p == 1:
            return _drawn(chances, generator)
        kept, order = nucleus(chances, self.top_p)
        return int(order[_drawn(kept, generator)])


def nucleus(chances: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of probabilities [V] that sum to top_p, largest first, and their places (arXiv:1904.09751)."""
    largest, order = chances.topk(min(LIKELIEST, len(chances)))
    if float(largest.sum()) < top_p:
        largest, order = chances.sort(descending=True)
    count = int((largest.cumsum(0) - largest < top_p).sum())  # the first always stays
    return largest[: max(1, count)], order[: max(1, count)]


def _drawn(weights: Tensor, generator: torch.Generator) -> int:
    """A place of weights [n], with a chance in proportion to each: where a uniform number falls in their running sum."""
    total = weights.double().cumsum(0)
    point = torch.rand((), dtype=torch.float64, generator=generator) * total[-1]
    return min(int(torch.searchsorted(total, point, right=True)), int(weights.nonzero()[-1]))
