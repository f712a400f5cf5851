"""Products of float inputs with packed quantized weights: `Packed` is a quantized matrix in the kernels' layout.

y = x Wᵀ, x [M, K] in float32 or bfloat16, W [N, K] quantized. Inputs are rounded first: to 16 bits, which is finer than
bfloat16 and serves as "weight-only", or to 8, twice as fast. With both as integers,

    y = s_x s_w (Σ X_q W_q − z_w Σ X_q)    or, with minima,    s_x s_w Σ X_q W_q + s_x m Σ X_q

where Σ X_q of each group is computed once for all outputs. Sums over at most 256 columns are exact 32-bit integers, and
are then added up in float32. One layout serves every instruction set: panels of 16 rows, tiles of 32 columns.

Where the extension was not built, `product` decodes some rows at a time and multiplies in torch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import KernelError
from bitwright.kernels import native
from bitwright.kernels.by_rows import back, times
from bitwright.numerics.codec import code_dtype, code_range, decode
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import CHANNEL, TENSOR, Scheme
from bitwright.system.device import best_dtype

PANEL, TILE, FOUR, BLOCK = 16, 32, 64, 256
WEIGHTS_AT_ONCE = 1 << 22  # weights packed at a time, or decoded where torch multiplies
APART = 32  # numbers between columns of decoded rows: columns a power of two apart would share few places of a cache
MANY = 128  # inputs from which on decoding and a product in bfloat16 take less time than one in integers
# A codebook's levels as integers: exact for all but nf4, whose levels take two bytes.
FACTORS = {
    "fp4": 2.0, "iq4nl": 1.0, "iq1": 8.0, "iq2": 8.0, "iq3xxs": 2.0, "iq3s": 1.0, "binary": 1.0, "nf4": 32512.0,
    "iq1_s": 8.0, "iq1_m": 8.0, "iq2_xxs": 8.0, "iq2_xs": 8.0, "iq2_s": 8.0, "iq3_xxs": 2.0, "iq3_s": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A quantized matrix [N, K] in the kernels' layout: flat tensors, P = N / 16 panels (N padded to 64), tiles of 32 columns.

    panels   uint8 [P · K/32 · 64 · bits]: tile by tile, bit planes of 4, 2 and 1 bits, each vector [16 rows][4 columns]
    scale    float16 [P · G · 16], in units of its row's power of two `unit` [N] float32
    point    uint8, as scale: the zero point, counted from the lowest code; None: one zero point for all groups
    minimum  float16, as scale: the offset of groups that have one
    """

    panels: Tensor
    scale: Tensor
    point: Tensor | None
    minimum: Tensor | None
    unit: Tensor
    scheme: Scheme
    N: int
    K: int

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.panels, self.scale, self.point, self.minimum, self.unit)
        return sum(t.nbytes for t in parts if t is not None)


def handles(p: Packed, x: Tensor) -> bool:
    """Whether the extension is built and takes this: all but 8-bit codebooks, on a CPU, x in float32 or bfloat16."""
    known = p.scheme.levels.levels is None or p.scheme.grid in FACTORS
    return native is not None and known and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def pack(q: QTensor) -> Packed:
    """Pack a quantized matrix for the kernels; its scales are rounded to float16 multiples of a power of two a row."""
    N, K = q.codes.shape
    scheme = q.scheme
    lowest = code_range(scheme)[0]
    some = max(FOUR, WEIGHTS_AT_ONCE // K // FOUR * FOUR)  # rows at a time, to save memory
    panels = [_panels((part.short() - lowest).to(torch.uint8), scheme.levels.bits) for part in q.codes.split(some)]
    G = scheme.groups(K)
    scale = q.scales.scale.expand(N, G) if scheme.group == TENSOR else q.scales.scale
    zero = None if q.scales.zero is None else q.scales.zero.expand(N, G)
    least = zero if scheme.zero == "min" else None
    extreme = scale.abs().amax(1) if least is None else torch.maximum(scale.abs().amax(1), least.abs().amax(1))
    unit = torch.exp2(torch.frexp(extreme).exponent.clamp(-120, 120).float())
    return Packed(
        panels=torch.cat(panels),
        scale=_table(scale / unit[:, None]).half(),
        point=_table(zero - lowest).to(torch.uint8) if zero is not None and least is None else None,
        minimum=None if least is None else _table(least / unit[:, None]).half(),
        unit=unit / FACTORS.get(scheme.grid, 1.0),
        scheme=scheme,
        N=N,
        K=K,
    )


def _table(values: Tensor) -> Tensor:
    """A value per group [N, G] -> the panels' order [P · G · 16], padded with zeros."""
    N = len(values)
    padded = torch.nn.functional.pad(values, (0, 0, 0, -N % FOUR))
    return padded.view(-1, FOUR, values.shape[1]).transpose(1, 2).reshape(-1).contiguous()


def _panels(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes uint8 [N, K] -> panels, as in `Packed`."""
    N, K = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -K % TILE, 0, -N % FOUR))
    vectors = padded.view(-1, 4, PANEL, padded.shape[1] // TILE, 8, 4).permute(0, 3, 1, 4, 2, 5).reshape(-1, 8, 64)
    if bits == 8:
        return vectors.reshape(-1).contiguous()
    planes, below = [], 0
    for width in (4, 2, 1):
        if bits & width:
            part = vectors >> below & ((1 << width) - 1)
            side = part.view(len(part), width, 8 // width, 64)  # one vector of bytes holds 8 / width vectors of codes
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)[:, None]
            planes.append((side << shifts).sum(2, dtype=torch.uint8))
            below += width
    return torch.cat(planes, 1).reshape(-1).contiguous()


def matrix_of(p: Packed) -> object:
    """The extension's own description of a packed matrix."""
    assert native is not None
    high, low, offset = _tables(p.scheme)
    g = p.scheme.group_length(p.K)
    return native.Matrix(
        p.panels,
        p.scale,
        p.point,
        p.minimum,
        p.unit,
        bits=p.scheme.levels.bits,
        offset=offset,
        high=high,
        low=low,
        N=p.N,
        K=p.K,
        g=g if g < BLOCK and isinstance(p.scheme.group, int) else math.ceil(g / BLOCK) * BLOCK,
    )


@lru_cache(maxsize=64)
def _tables(scheme: Scheme) -> tuple[list[int], list[int], int]:
    """The integer that stands for each code in a product, as high and low bytes, and the offset that it counts from."""
    levels = scheme.levels.levels
    if levels is None:
        return [], [], -code_range(scheme)[0]
    numbers = [round(level * FACTORS[scheme.grid]) for level in levels]
    if scheme.grid == "nf4":
        shifted = [n + (128 << 8) for n in numbers]
        return [n >> 8 for n in shifted], [n & 255 for n in shifted], 128
    offset = -min(numbers)
    return [n + offset for n in numbers], [], offset


def product(
    x: Tensor, p: Packed, *, bits: int = 16, by_row: bool = False, floats: torch.dtype = torch.float32
) -> Tensor:
    """x [M, K] times a packed matrix [N, K]: x Wᵀ [M, N] float32.

    bits: what inputs are rounded to, 16 or 8; by_row: under one scale for each row of x, not one for 256 columns.
    Differentiable in x, as if it were not rounded. floats: the type in which its gradient is multiplied; where it is bfloat16
    and that is fast, many inputs in training are multiplied in it too, and the result is.
    KernelError for x of another shape, or not of floats.
    """
    if x.ndim != 2 or x.shape[1] != p.K or not x.is_floating_point():
        kind = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        raise KernelError(f"inputs of {kind} for a matrix {p.N} × {p.K}", remedy=f"give floats [M, {p.K}]")
    if torch.compiler.is_compiling():
        parts = (p.panels, p.scale, p.point, p.minimum, p.unit)
        return torch.ops.bitwright.product(x, *parts, str(p.scheme), p.N, p.K, bits, by_row)
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(x, p, bits, by_row, floats)  # type: ignore[no-untyped-call]
    return _product(x, p, bits=bits, by_row=by_row)


def _product(x: Tensor, p: Packed, *, bits: int, by_row: bool) -> Tensor:
    """The same without its gradient."""
    if not handles(p, x):
        return _in_torch(x.float(), p, bits=bits, by_row=by_row)
    assert native is not None
    y = torch.empty(len(x), p.N)
    native.product(matrix_of(p), x.contiguous(), y, bits // 8, by_row, torch.get_num_threads())
    return y


class _Differentiable(torch.autograd.Function):
    """`product`, and dx = dy W by rows decoded anew, some at a time: no float copy of a weight is kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Packed, bits: int, by_row: bool, floats: torch.dtype) -> Tensor:
        ctx.p, ctx.dtype, ctx.floats = p, x.dtype, floats
        if floats == torch.bfloat16 == best_dtype(x.device) and bits == 16 and len(x) >= MANY:
            return times(x.to(floats), all_rows(p, floats))
        return _product(x, p, bits=bits, by_row=by_row)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return back(dy.to(ctx.floats), all_rows(ctx.p, ctx.floats)).to(ctx.dtype), None, None, None, None


def all_rows(p: Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    """All rows of a packed matrix as floats, some at a time."""
    return (rows(p, first, last, dtype) for first, last in _steps(p))


def rows(p: Packed, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows first..last [n, K] of a packed matrix in `dtype`; first is a multiple of 64, and last too, or N."""
    if not handles(p, p.unit.new_empty(0, dtype=dtype)):
        return decoded(p, first, last).to(dtype)
    assert native is not None
    columns, known = torch.empty(p.K, last - first + APART, dtype=dtype), p.scheme.levels.levels
    levels = [] if known is None else [*known, *[0.0] * (16 - len(known))]
    factor = FACTORS.get(p.scheme.grid, 1.0)
    native.decode_rows(matrix_of(p), levels, factor, first, last, columns, torch.get_num_threads())
    return columns[:, : last - first].T


@torch.library.custom_op("bitwright::product", mutates_args=())
def _operator(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    point: Tensor | None,
    minimum: Tensor | None,
    unit: Tensor,
    scheme: str,
    N: int,
    K: int,
    bits: int,
    by_row: bool,
) -> Tensor:
    """`product` as torch.compile and torch.export see it: one operator on plain tensors."""
    return product(x, Packed(panels, scale, point, minimum, unit, Scheme.parse(scheme), N, K), bits=bits, by_row=by_row)


@_operator.register_fake
def _(
    x: Tensor,
    panels: Tensor,
    scale: Tensor,
    point: Tensor | None,
    minimum: Tensor | None,
    unit: Tensor,
    scheme: str,
    N: int,
    K: int,
    bits: int,
    by_row: bool,
) -> Tensor:
    return x.new_empty((len(x), N), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------ the same in torch


def _in_torch(x: Tensor, p: Packed, *, bits: int, by_row: bool) -> Tensor:
    """`product` on decoded weights, some rows at a time; inputs are rounded to 8 bits as in the kernels, not to 16."""
    if bits == 8:
        x = rounded_spans(x, p.K if by_row else BLOCK)
    return times(x, (decoded(p, first, last) for first, last in _steps(p)))


def _steps(p: Packed) -> Iterator[tuple[int, int]]:
    """First and last of the rows that are decoded in one go."""
    step = max(1, WEIGHTS_AT_ONCE // p.K // FOUR) * FOUR
    return ((first, min(first + step, p.N)) for first in range(0, p.N, step))


def rounded_spans(x: Tensor, span: int) -> Tensor:
    """x [M, K] rounded to 8 bits under one scale for each `span` columns."""
    v = torch.nn.functional.pad(x, (0, -x.shape[1] % span)).unflatten(1, (-1, span))
    scale = v.abs().amax(-1, keepdim=True) / 127
    q = torch.where(scale > 0, torch.round(v * (1 / scale)), 0.0)
    return (q * scale).flatten(1)[:, : x.shape[1]]


def decoded(p: Packed, first: int, last: int) -> Tensor:
    """Rows first..last [n, K] of a packed matrix in float32; first is a multiple of 64."""
    bits, scheme = p.scheme.levels.bits, p.scheme
    G, here = scheme.groups(p.K), slice(first // FOUR, -(-last // FOUR))

    def table(values: Tensor) -> Tensor:  # undoes `_table`
        return values.view(-1, G, FOUR)[here].transpose(1, 2).reshape(-1, G)[: last - first].float()

    codes = _codes(p.panels.view(-1, 4 * 8 * bits * 8 * -(-p.K // TILE))[here], bits, p.K)[: last - first]
    unit = p.unit[first:last, None] * FACTORS.get(scheme.grid, 1.0)
    scale = table(p.scale) * unit
    zero = table(p.minimum) * unit if p.minimum is not None else None
    lowest = code_range(scheme)[0]
    if p.point is not None:
        zero = table(p.point) + lowest
    codes = (codes.short() + lowest).to(code_dtype(scheme))
    if scheme.group == TENSOR:
        scheme = replace(scheme, group=CHANNEL)
    return decode(QTensor(codes, Scales(scale, zero), scheme, tuple(codes.shape)))


def _codes(panels: Tensor, bits: int, K: int) -> Tensor:
    """Codes uint8 [n, K] of consecutive groups of four panels: undoes `_panels`."""
    tiles = panels.view(-1, bits, 64)
    if bits == 8:
        vectors = tiles
    else:
        vectors, below, at = torch.zeros(len(tiles), 8, 64, dtype=torch.uint8, device=panels.device), 0, 0
        for width in (4, 2, 1):
            if bits & width:
                shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=panels.device)
                plane = tiles[:, at : at + width, None] >> shifts[None, None, :, None]
                vectors |= (plane & ((1 << width) - 1)).view(len(tiles), 8, 64) << below
                below, at = below + width, at + width
    fours = vectors.view(len(panels), -1, 4, 8, PANEL, 4).permute(0, 2, 4, 1, 3, 5)
    return fours.reshape(len(panels) * FOUR, -1)[:, :K]
