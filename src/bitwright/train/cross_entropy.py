"""Cross-entropy over a large vocabulary in little memory.

torch's takes a copy of the logits in float32, their logarithms, and two gradients of that size: for 512 tokens and 49,000 words
600 MB, more than a small model. Here the gradient is computed with the loss, some tokens at a time, in the logits' type.
"""

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1 << 19  # logits: their float32 copy stays in the cache


def cross_entropy(logits: Tensor, wanted: Tensor, ignored: int, *, over: float = 1.0) -> Tensor:
    """The sum of −log p of the wanted tokens, over so many. logits [n, V] of any float type; wanted int64 [n], `ignored` where
    none is. Divided here, the gradient need not be multiplied once more."""
    result: Tensor = _CrossEntropy.apply(logits, wanted, ignored, over)  # type: ignore[no-untyped-call]
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, ignored: int, over: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        some = max(1, AT_ONCE // logits.shape[1])
        for at in range(0, len(logits), some):
            here = slice(at, at + some)
            x, share = logits[here].float(), (wanted[here] != ignored)[:, None] / over
            target = wanted[here, None].where(share > 0, 0)
            largest = x.amax(1, keepdim=True)
            p = (x - largest).exp_()
            whole = p.sum(1, keepdim=True)
            total += ((whole.log() + largest - x.gather(1, target)) * share).sum()
            if gradient is not None:  # softmax, less 1 where the wanted token is
                gradient[here] = p.mul_(share / whole).scatter_add_(1, target, -share)
        ctx.gradient = gradient
        return total.float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None or float(slope) == 1:
            return ctx.gradient, None, None, None
        return ctx.gradient * slope.to(ctx.gradient.dtype), None, None, None
