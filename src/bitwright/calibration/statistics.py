"""Streaming statistics of an input: Gram, cross moments, ranges. Update with a batch, merge, ask for the value.

They belong to an *input*, not to a layer: q, k and v read the same tensor and share one Gram.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.system import distributed

PANEL = 512  # columns of the Gram computed at a time; only panels on or above the diagonal are
CHUNK = 4096  # bfloat16 tokens multiplied at a time


class Gram:
    """Streaming XᵀX / T, float32 [K, K], over all tokens seen.

    The matrix is symmetric: panels below the diagonal are mirrored at the end, which saves up to half of the work.
    Inputs in bfloat16 are multiplied as they are, two to six times faster than in float32 on processors that can: each
    product of `CHUNK` tokens is summed in float32, comes out rounded to bfloat16, and is added up in float32. The
    rounding errors of many chunks cancel; the codes' loss does not suffer (tests/calibration/test_statistics.py).
    """

    def __init__(self, K: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(K, K, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """x [..., K]: one more batch of inputs, any float type."""
        x = x.detach().reshape(-1, x.shape[-1])
        for chunk in x.split(CHUNK) if x.dtype == torch.bfloat16 else [x.float()]:
            for start in range(0, len(self.total), PANEL):
                panel = chunk[:, start : start + PANEL].T
                self.total[start : start + PANEL, start:].add_(panel @ chunk[:, start:])
        self.tokens += len(x)

    def merge(self, other: "Gram") -> None:
        """Add the statistics of another one."""
        self.total += other.total
        self.tokens += other.tokens

    def pool(self) -> None:
        """Replace the sum by that over all processes that work together."""
        distributed.total(self.total)
        self.tokens = int(distributed.total(torch.tensor(self.tokens)))

    def free(self) -> None:
        """Give the memory back."""
        self.total = torch.zeros(0, 0)

    def value(self) -> Tensor:
        """The Gram [K, K]; zeros before the first token. Takes the memory of the running sum."""
        mean = self.total.div_(max(1, self.tokens))
        self.tokens = min(1, self.tokens)
        for start in range(0, len(mean), PANEL):
            stop = start + PANEL
            mean[stop:, start:stop] = mean[start:stop, stop:].T
        return mean


class Cross:
    """Streaming AᵀX / T, float32 [M, K]: cross moments of another quantity A with an input X. Summed as in `Gram`."""

    def __init__(self, M: int, K: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(M, K, device=device)
        self.tokens = 0

    def update(self, a: Tensor, x: Tensor) -> None:
        """One more batch a [..., M], x [..., K] of the same tokens; computed in the type of x."""
        a, x = (t.detach().reshape(-1, t.shape[-1]) for t in (a, x))
        for left, right in zip(a.split(CHUNK), x.split(CHUNK), strict=True):
            right = right if right.dtype == torch.bfloat16 else right.float()
            left = left.to(right.dtype)
            for start in range(0, len(self.total), PANEL):
                self.total[start : start + PANEL].add_(left[:, start : start + PANEL].T @ right)
        self.tokens += len(x)

    def merge(self, other: "Cross") -> None:
        """Add the statistics of another one."""
        self.total += other.total
        self.tokens += other.tokens

    def pool(self) -> None:
        """Replace the sum by that over all processes that work together."""
        distributed.total(self.total)
        self.tokens = int(distributed.total(torch.tensor(self.tokens)))

    def value(self) -> Tensor:
        """The matrix [M, K]; zeros before the first token. Takes the memory of the running sum."""
        mean, self.tokens = self.total.div_(max(1, self.tokens)), min(1, self.tokens)
        return mean


@dataclass
class Range:
    """Streaming extremes and mean magnitude of each input channel, float32 [K]."""

    low: Tensor
    high: Tensor
    magnitude: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, K: int, device: torch.device | None = None) -> "Range":
        """Nothing seen yet: low = +inf, high = −inf."""
        low, high = (torch.full((K,), end, device=device) for end in (float("inf"), float("-inf")))
        return cls(low, high, torch.zeros(K, device=device))

    def update(self, x: Tensor) -> None:
        """x [..., K]: one more batch of inputs."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        self.magnitude = self.magnitude + x.abs().sum(0)
        self.tokens += len(x)

    def merge(self, other: "Range") -> None:
        """Add the statistics of another one."""
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.magnitude = self.magnitude + other.magnitude
        self.tokens += other.tokens

    def pool(self) -> None:
        """Replace all by those over all processes that work together."""
        distributed.least(self.low)
        distributed.most(self.high)
        distributed.total(self.magnitude)
        self.tokens = int(distributed.total(torch.tensor(self.tokens)))

    def value(self) -> tuple[Tensor, Tensor, Tensor]:
        """(low, high, mean |x|) of each channel."""
        return self.low, self.high, self.magnitude / max(1, self.tokens)
