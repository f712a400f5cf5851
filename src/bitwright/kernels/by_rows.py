"""Products with a matrix W [N, K] of which only some rows at a time are there as floats, forward and backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Rows = Callable[[torch.dtype], Iterable[Tensor]]  # all rows in a type, some at a time


def times(x: Tensor, rows: Iterable[Tensor]) -> Tensor:
    """x Wᵀ [M, N], x [M, K] in the rows' type."""
    parts = [x @ w.T for w in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def back(dy: Tensor, rows: Iterable[Tensor]) -> Tensor:
    """dy W [M, K], dy [M, N] in the rows' type; what several parts give is added up in float32."""
    at, dx = 0, None
    for w in rows:
        part = dy[:, at : at + len(w)] @ w
        at, dx = at + len(w), part if dx is None else dx.float().add_(part)
    return torch.zeros(len(dy), 0) if dx is None else dx


def product(x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """x Wᵀ in a type, differentiable in x: rows are made anew for the way back, so that none of them stay."""
    result: Tensor = _Product.apply(x, rows, dtype)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
        ctx.rows, ctx.dtype, ctx.given = rows, dtype, x.dtype
        return times(x.to(dtype), rows(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return back(dy.to(ctx.dtype), ctx.rows(ctx.dtype)).to(ctx.given), None, None
