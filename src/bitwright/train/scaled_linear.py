"""A linear layer on a quantized weight whose scales are trained, each by a factor; the codes stay as they are."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.numerics.codec import decode, group_view, per_column, snap
from bitwright.numerics.qtensor import QTensor


class ScaledLinear(nn.Module):
    """y = x (f ∘ W)ᵀ + b: W [N, K] quantized, f [N, G] trained, one factor for each group. `q` stays as it was read."""

    bias: Tensor | None

    def __init__(self, q: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.q, self.factor = q, nn.Parameter(torch.ones_like(q.scales.scale))
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's type."""
        y: Tensor = _Product.apply(x, self.factor, self.q)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        """f ∘ W [N, K], float32, for a forward that reads it (Mamba's): decoded as a whole."""
        return decode(self.q) * per_column(self.factor, self.q.scheme, self.q.shape[1])

    def scaled(self) -> QTensor:
        """The matrix with its scales times the factors, rounded to what the file can hold."""
        scales = self.q.scales
        minimum = self.q.scheme.zero == "min"
        zero = scales.zero * self.factor.detach() if minimum and scales.zero is not None else scales.zero
        return replace(self.q, scales=snap(scales.scale * self.factor.detach(), zero, self.q.scheme))


class _Product(torch.autograd.Function):
    """x (f ∘ W)ᵀ; W is decoded for each pass, so that no float copy of it stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, q: QTensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.q = q
        return x @ _scaled(decode(q), factor, q).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, factor), q = ctx.saved_tensors, ctx.q
        w = decode(q)
        dw = dy.flatten(0, -2).T.float() @ x.flatten(0, -2).float()
        df = group_view(dw.mul_(w), q.scheme).sum(-1).view_as(factor)
        return dy @ _scaled(w, factor, q).to(dy.dtype), df, None


def _scaled(w: Tensor, factor: Tensor, q: QTensor) -> Tensor:
    return w.mul_(per_column(factor, q.scheme, w.shape[1]))
