"""Cross-entropy over a large vocabulary in little memory.

torch's takes a copy of the logits in float32, their logarithms, and two gradients of that size: for 512 tokens and 49,000 words
600 MB, more than a small model. Here the gradient is computed with the loss, some tokens at a time, in the logits' type.
"""

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1 << 22  # logits


def cross_entropy(logits: Tensor, wanted: Tensor, ignored: int) -> Tensor:
    """The sum of −log p of the wanted tokens. logits [n, V] of any float type; wanted int64 [n], `ignored` where none is."""
    result: Tensor = _CrossEntropy.apply(logits, wanted, ignored)  # type: ignore[no-untyped-call]
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, ignored: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if logits.requires_grad else None
        some = max(1, AT_ONCE // logits.shape[1])
        for at in range(0, len(logits), some):
            here = slice(at, at + some)
            x, counted = logits[here].float(), wanted[here] != ignored
            target = wanted[here].where(counted, 0)[:, None]
            whole = x.logsumexp(1, keepdim=True)
            total += ((whole - x.gather(1, target))[:, 0] * counted).sum()
            if gradient is not None:  # softmax, less 1 where the wanted token is
                p = (x - whole).exp_()
                p.scatter_add_(1, target, torch.full_like(whole, -1.0))
                gradient[here] = p.mul_(counted[:, None])
        ctx.gradient = gradient
        return total.float()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        return None if ctx.gradient is None else ctx.gradient * slope.to(ctx.gradient.dtype), None, None
