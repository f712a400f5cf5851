"""QTensor: a quantized weight, codes and their scales as the file will hold them; its rows, and several stacked."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from bitwright.errors import SchemeError
from bitwright.numerics.scheme import TENSOR, Scheme


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix, exactly as they will be read back from a file.

    scale       [N, G] float32 ([1, 1] for group "tensor")
    zero        None; integers in the code range as float32 ("asym"); minima m ≤ 0 ("min"); shape as scale
    outer       second level of the scales: f16 per super-block [N, S] (k8, k6, k4), absmax per block of 256 scales (dq8),
                per-tensor divisor [1, 1] (e4m3); None for encodings of one level
    outer_zero  the same for the minima (k6, k4), and dq8's mean [1, 1]
    """

    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None
    outer_zero: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        zero, outer, outer_zero = (
            None if t is None else t.to(device) for t in (self.zero, self.outer, self.outer_zero)
        )
        return replace(self, scale=self.scale.to(device), zero=zero, outer=outer, outer_zero=outer_zero)


@dataclass(frozen=True)
class Outliers:
    """Input channels that stay in float (LLM.int8(), arXiv:2208.07339): columns [k] int64, rising; weight [N, k] float."""

    columns: Tensor
    weight: Tensor


@dataclass(frozen=True)
class QTensor:
    """A quantized weight: codes + group scales (+ zeros).

    codes     [N, K] int8 for int grids with "sym" or "asym" and for ternary, else uint8
    scales    `Scales`, exactly as the file will hold them
    shape     of the source tensor; codes have it reshaped to [shape[0], -1]
    outliers  columns that stay in float, in place of what their codes stand for; None: none do
    order     [K] int64, the input that each column of the codes belongs to, for files with permuted columns (GPTQ's
              desc_act); None: column k belongs to input k

    Raises SchemeError where the shapes do not fit together.
    """

    codes: Tensor
    scales: Scales
    scheme: Scheme
    shape: tuple[int, ...]
    outliers: Outliers | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.numel() != math.prod(self.shape):
            message = f"codes {tuple(self.codes.shape)} do not fill a tensor of shape {self.shape}"
            raise SchemeError(message, remedy="give codes [N, K] with N K weights")
        if self.outliers is not None and self.outliers.weight.shape != (len(self.codes), len(self.outliers.columns)):
            message = f"outlier weights {tuple(self.outliers.weight.shape)} do not fill {len(self.codes)} rows"
            raise SchemeError(message, remedy=f"give weights [{len(self.codes)}, {len(self.outliers.columns)}]")
        if self.order is not None and len(self.order) != self.codes.shape[1]:
            message = f"an order of {len(self.order)} columns, but codes of {self.codes.shape[1]}"
            raise SchemeError(message, remedy=f"give an order [{self.codes.shape[1]}]")

    def to(self, device: torch.device) -> "QTensor":
        """The same on another device."""
        spared, order = self.outliers, self.order
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            outliers=None if spared is None else Outliers(spared.columns.to(device), spared.weight.to(device)),
            order=None if order is None else order.to(device),
        )


def map_rows(f: Callable[..., Tensor], scheme: Scheme, *tables: Scales) -> Scales:
    """Apply f to the scale tensors that have a row for each output (of each of `tables`); those of the whole tensor stay."""
    grouped, blocked = scheme.group != TENSOR, scheme.scale in ("k8", "k6", "k4")

    def one(name: str, by_row: bool) -> Tensor | None:
        found = [getattr(table, name) for table in tables]
        return f(*found) if by_row and found[0] is not None else found[0]

    scale = one("scale", grouped)
    assert scale is not None
    return Scales(scale, one("zero", grouped), one("outer", blocked), one("outer_zero", blocked))


def rows(q: QTensor, start: int, stop: int, step: int = 1) -> QTensor:
    """Rows start..stop, or every step-th of them: undoes `stacked`."""
    here = slice(start, stop, step)
    scales = map_rows(lambda t: t[here], q.scheme, q.scales)
    kept = None if q.outliers is None else replace(q.outliers, weight=q.outliers.weight[here])
    codes = q.codes[here]
    return QTensor(codes, scales, q.scheme, (len(codes), q.codes.shape[1]), kept, q.order)


def reordered(q: QTensor, order: Tensor) -> QTensor:
    """The same matrix with its rows permuted: row i of the result is row order[i]."""
    kept = None if q.outliers is None else replace(q.outliers, weight=q.outliers.weight[order])
    return replace(q, codes=q.codes[order], scales=map_rows(lambda t: t[order], q.scheme, q.scales), outliers=kept)


def permuted(x: Tensor, order: Tensor | None, dim: int = -1) -> Tensor:
    """x with place i of a dimension taken from place order[i], such as the columns of a matrix in a file; None: as they are."""
    return x if order is None else x.index_select(dim, order)


def unpermuted(x: Tensor, order: Tensor | None, dim: int = -1) -> Tensor:
    """Undoes `permuted` by the same order, a permutation."""
    return x if order is None else x.index_select(dim, order.argsort())


def head_by_head(heads: tuple[int, int], K: int) -> Tensor | None:
    """The order in which K inputs, that come as (groups, heads in each), have the first heads of all groups first, then the
    second ones; None: as they come.

    >>> head_by_head((2, 2), 8)
    tensor([0, 1, 4, 5, 2, 3, 6, 7])
    """
    groups, each = heads
    return torch.arange(K).view(groups, each, -1).transpose(0, 1).flatten() if groups > 1 and each > 1 else None


def pick_rows(mask: Tensor, a: QTensor, b: QTensor) -> QTensor:
    """Row by row a where the mask [N] is true, else b; both of one scheme and shape."""
    column = mask[:, None]
    scales = map_rows(lambda x, y: torch.where(column, x, y), a.scheme, a.scales, b.scales)
    return QTensor(torch.where(column, a.codes, b.codes), scales, a.scheme, a.shape)


def stacked(parts: list[QTensor]) -> QTensor:
    """Matrices of one scheme and K, concatenated along N."""
    if len(parts) == 1:
        return parts[0]
    codes, scheme = torch.cat([q.codes for q in parts]), parts[0].scheme
    scales = map_rows(lambda *tables: torch.cat(tables), scheme, *(q.scales for q in parts))
    return QTensor(codes, scales, scheme, tuple(codes.shape))


def reshaped(q: QTensor, shape: tuple[int, ...]) -> QTensor:
    """The same weight with another shape of the source tensor, such as a convolution's."""
    return replace(q, shape=shape)
