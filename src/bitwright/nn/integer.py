"""Integer arithmetic of quantized layers: int8 × int8 products accumulated in int32, then scaled in float32.

With activations x ≈ s·(c − z) and weights w ≈ t·v, where c and v are int8 and t is the scale of an output row,

    Σ x w = s·t·(Σ c v − z·Σ v).

Σ c v is an integer product, z·Σ v a constant (Jacob et al. 2018, arXiv:1712.05877, eq. 7).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.errors import SchemeError
from bitwright.kernels.matmul import FACTORS
from bitwright.numerics.codec import choose, fit, raw_scales, safe
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TOKEN, Scheme

DEVICES = ("cpu", "cuda", "meta")  # where torch multiplies int8
CHUNK = 1 << 17  # outputs computed in one step, so that they stay in the cache
MOST_INPUTS = (1 << 31) // (1 << 14) - 1  # the largest K for which a sum of products of at most 128 · 128 fits an int32


def product(x: Tensor, w: Tensor) -> Tensor:
    """x int8 [T, K], w int8 [N, K] -> x wᵀ int32 [T, N], exact. All integer products in torch go through this function."""
    if x.shape[1] == 1:  # torch._int_mm does not write the result for K = 1
        return x.int() * w.int().T
    if x.is_cuda:
        return product_on_gpu(x, w)
    return torch._int_mm(x.contiguous(), w.T)  # it is wrong for rows that overlap in memory, as patches may


def require_device(x: Tensor, where: str) -> None:
    """SchemeError, for a layer's name, if a tensor is on a device that has no integer products."""
    if x.device.type not in DEVICES:
        message = f"there are no products of int8 on device {x.device.type!r}"
        raise SchemeError(message, where=where, remedy=f'.to("cpu"), or one of {", ".join(DEVICES)}')


def product_on_gpu(x: Tensor, w: Tensor) -> Tensor:
    """As `product`; torch._int_mm needs there at least 17 rows, and numbers of inputs and outputs that 8 divides."""
    rows, columns = max(17 - len(x), 0), -x.shape[1] % 8
    x, padded = pad(x, (0, columns, 0, rows)), pad(w, (0, columns, 0, -len(w) % 8))
    return torch._int_mm(x.contiguous(), padded.T)[: len(x) - rows, : len(w)]


def scaled_product(x: Tensor, w: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
    """constant + Σ_g scale_g · (x_g w_gᵀ), with one integer product for each group of input channels.

    scale float32 [N, G], constant float32 [N] -> float32 [T, N]
    """
    if scale.shape[1] == 1:
        return rescaled(product(x, w), scale[:, 0], constant)
    g = -(-w.shape[1] // scale.shape[1])
    total = constant.expand(x.shape[0], -1).clone()
    for columns, weights, of_group in zip(x.split(g, 1), w.split(g, 1), scale.unbind(1), strict=True):
        total += product(columns, weights.contiguous()) * of_group
    return total


def rescaled(total: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
    """scale · total + constant: int32 [..., N], float32 [N] -> float32 [..., N].

    Two operations, each rounded: addcmul might use a fused multiply-add, and the native kernels do not.
    """
    return (total * scale).add_(constant)


def requantized(x: Tensor, w: Tensor, scale: Tensor, constant: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Product and requantization: scale · (x wᵀ) + constant, rounded and clamped to codes low … high.

    x int8 [T, K], w int8 [N, K], scale and constant float32 [N] -> int8 [T, N]. Computed for some rows at a time, so that the
    int32 sums stay in the cache.
    """
    if torch.compiler.is_compiling():  # the number of steps would depend on the batch
        return rescaled(product(x, w), scale, constant).round_().clamp_(low, high).to(torch.int8)
    codes = torch.empty(len(x), len(w), dtype=torch.int8, device=x.device)
    rows = max(256, CHUNK // len(w))
    for part, out in zip(x.split(rows), codes.split(rows), strict=True):
        out.copy_(rescaled(product(part, w), scale, constant).round_().clamp_(low, high))
    return codes


# ------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Window:
    """The geometry of a convolution or pooling, in pairs (height, width); a 1-D one has height 1.

    padding: numbers of zeros at the left, right, top and bottom. A weight's columns are ordered [kh, kw, C / groups].
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int = 1

    def count(self, n: int, axis: int) -> int:
        """Output size along an axis (0: height, 1: width) for a padded input size n."""
        return (n - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1

    def least(self) -> tuple[int, int]:
        """Height and width of the smallest input without padding."""
        left, right, top, bottom = self.padding
        height, width = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))
        return height - top - bottom, width - left - right

    def padded(self, x: Tensor, value: Tensor | float) -> Tensor:
        """x [B, C, H, W] padded with a value. If that is a tensor, its number is not read, so that torch.export works."""
        if not any(self.padding):
            return x
        if not isinstance(value, Tensor):
            return torch.nn.functional.pad(x, self.padding, value=value)
        inside = torch.nn.functional.pad(torch.ones_like(x[:1, :1], dtype=torch.bool), self.padding)
        return torch.where(inside, torch.nn.functional.pad(x, self.padding), value.to(x.dtype))

    def patches(self, x: Tensor) -> Tensor:
        """The patches of a padded x [B, C, H, W] (im2col), as a view [B, H', W', kh, kw, C]."""
        rows, columns = self.count(x.shape[2], 0), self.count(x.shape[3], 1)
        batch, channel, row, column = x.stride()
        sizes = (x.shape[0], rows, columns, *self.kernel, x.shape[1])
        steps = (row * self.stride[0], column * self.stride[1], row * self.dilation[0], column * self.dilation[1])
        return x.as_strided(sizes, (batch, *steps, channel))


def images(x: Tensor, *, flat: bool) -> Tensor:
    """x as [B, C, H, W]. flat: x has no H (1-D convolution); B may be missing too."""
    x = x.unsqueeze(-2) if flat else x
    return x.unsqueeze(0) if x.ndim == 3 else x


def like(y: Tensor, x: Tensor, *, flat: bool) -> Tensor:
    """y [B, H', W', N] -> [B, N, H', W'] in channels-last memory, without the dimensions that the input x lacks."""
    y = y.permute(0, 3, 1, 2)
    y = y.squeeze(-2) if flat else y
    return y if y.ndim == x.ndim else y.squeeze(0)


Multiply = Callable[[Tensor, Tensor, slice], Tensor]  # rows [T, K], weights [n, K], which of the N outputs -> [T, n]


def taps(patches: Tensor) -> list[Tensor]:
    """Patches [B, H', W', kh, kw, C] as kh·kw views [B, H', W', C], one for each position in the kernel."""
    return [tap for row in patches.unbind(3) for tap in row.unbind(3)]


def convolution(x: Tensor, w: Tensor, window: Window, multiply: Multiply) -> Tensor:
    """Convolution as matrix products, one for each group: padded x int8 [B, C, H, W], w int8 [N, kh·kw·C / groups] ->
    [B, H', W', N]."""
    patches = window.patches(x)
    n, each = len(w) // window.groups, x.shape[1] // window.groups
    outputs = []
    for group, weights in enumerate(w.split(n)):
        part = patches if window.groups == 1 else patches[..., group * each : (group + 1) * each]
        outputs.append(multiply(_rows(part), weights, slice(group * n, group * n + n)))
    whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return whole.view(*patches.shape[:3], len(w))


def _rows(patches: Tensor) -> Tensor:
    """Patches [B, H', W', kh, kw, C] as rows [B·H'·W', kh·kw·C]."""
    if patches.shape[-1] >= 8:
        return patches.flatten(3).flatten(0, 2)
    return torch.cat(taps(patches), dim=-1).flatten(0, 2)  # few channels: a tap at a time is faster


def depthwise(x: Tensor, w: Tensor, window: Window) -> Tensor:
    """Depthwise convolution -> int32 [B, H', W', N]. Summed over kernel positions, as matrix products would be too thin."""
    patches = window.patches(x)
    total = torch.zeros(*patches.shape[:3], len(w), dtype=torch.int32, device=w.device)
    for tap, weight in zip(taps(patches), w.int().unbind(1), strict=True):
        total.addcmul_(tap.int(), weight)
    return total


# -------------------------------------------------------------------------------------------------------- activations


def codes_of_rows(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dynamic quantization of x [T, K] per row: codes int8 [T, K], scale [T, 1], zero point [T, 1] or None.

    A row with a NaN gets a NaN scale, so that its results are NaN, as in float.
    """
    x = x.float()
    scale, zero = raw_scales(x[:, None], x.shape[1], scheme)
    scaled = x / safe(scale)
    return choose(scaled if zero is None else scaled.add_(zero), scheme).to(torch.int8), scale, zero


def activations_of(text: str) -> Scheme:
    """Parse a scheme of activations. Scales are float32 unless the text says f16, in which small ones would underflow."""
    parsed = Scheme.parse(text)
    return replace(parsed, scale="f32") if parsed.scale == "f16" and not text.endswith("-f16") else parsed


def storable(w: Tensor, scheme: Scheme) -> Scheme:
    """The scheme for a weight [N, K], with float32 scales if some would underflow or overflow in float16."""
    if scheme.scale != "f16":
        return scheme
    wanted, held = fit(w, replace(scheme, scale="f32")).scale.abs(), torch.finfo(torch.float16)
    lost = ((wanted > 0) & (wanted < held.smallest_normal)) | (wanted > held.max)
    return replace(scheme, scale="f32") if bool(lost.any()) else scheme


def check_activations(scheme: Scheme, *groups: str) -> None:
    """SchemeError unless activations are integers, "sym" or "asym", with scales per one of `groups` (token, tensor)."""
    if scheme.group not in groups or not scheme.grid.startswith("int") or scheme.zero not in ("sym", "asym"):
        message = f"activations of scheme {str(scheme)!r} cannot be multiplied as integers here"
        raise SchemeError(message, remedy=f"int8-{groups[0]} or int8-{groups[0]}-asym, or fewer bits")
    if scheme.group == TOKEN and scheme.scale != "f32":
        raise SchemeError("scales taken as the tokens come are not stored", remedy="leave the scale encoding out")


# ------------------------------------------------------------------------------------------------------------ weights


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers without zero points: values int8 [N, K], scale float32 [N, G]; w ≈ scale · values.

    bits: of two's complement that hold every value of its scheme; 8 hold them all
    """

    values: Tensor
    scale: Tensor
    bits: int = 8


def integer_weight(q: QTensor, *, where: str) -> IntegerWeight:
    """A quantized weight as integers, zero points subtracted.

    SchemeError for schemes whose levels are not integers, values beyond int8, or a K that may overflow int32 sums.
    """
    grid, remedy = (
        q.scheme.levels,
        "int2 to int8 (sym), int2 to int7 (asym), ternary, binary, fp4 or one of iq1 to iq4nl",
    )
    if q.scheme.zero == "min" or q.scheme.grid in ("nf4", "fp8"):
        raise SchemeError(f"weights of scheme {str(q.scheme)!r} are not integers", where=where, remedy=remedy)
    if q.codes.shape[1] > MOST_INPUTS:
        message = f"{q.codes.shape[1]} inputs may overflow an int32 sum"
        raise SchemeError(message, where=where, remedy=f"at most {MOST_INPUTS}, or keep the layer in float")
    factor = FACTORS.get(q.scheme.grid, 1.0)
    if grid.levels is None:
        values = q.codes.int()
    else:
        values = (torch.tensor(grid.levels, device=q.codes.device) * factor).int()[q.codes.long()]
    if q.scales.zero is not None:
        zero = q.scales.zero.int()
        g = q.scheme.group_length(q.codes.shape[1])
        values = values - zero.repeat_interleave(g, dim=1)[:, : values.shape[1]]
    if int(values.min()) < -128 or int(values.max()) > 127:
        raise SchemeError(
            f"weights of {str(q.scheme)!r} less their zero points exceed int8", where=where, remedy=remedy
        )
    scale = (q.scales.scale / factor).expand(len(values), -1)
    return IntegerWeight(values.to(torch.int8), scale.contiguous(), _bits(q.scheme))


def _bits(scheme: Scheme) -> int:
    """Bits of two's complement that hold every value of `integer_weight`."""
    grid = scheme.levels
    if grid.levels is None:
        return min(8, grid.bits + (not scheme.symmetric))  # less a zero point, codes reach as far to both sides
    largest = max(abs(level) for level in grid.levels) * FACTORS.get(scheme.grid, 1.0)
    return min(8, int(largest).bit_length() + 1)
