"""Integer layers: Linear and convolutions on inputs rounded as they come (dynamic) or on codes (static), and Embedding."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from bitwright.errors import SchemeError
from bitwright.nn.integer import (
    IntegerWeight,
    Multiply,
    Window,
    codes_of_rows,
    convolution,
    depthwise,
    images,
    integer_weight,
    like,
    requantized,
    rescaled,
    scaled_product,
)  # fmt: skip
from bitwright.nn.native import Memory, dense, empty_output, handles, packed
from bitwright.numerics.codec import code_range
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import CHANNEL, TENSOR, Scheme

Source = nn.Linear | nn.Conv1d | nn.Conv2d


class IntegerProduct(nn.Module):
    """What a static and a dynamic layer share: the int8 weights, and their product with codes.

    codes  int8 [N, K]: the weights' integers, K = kh·kw·C / groups for a convolution, in this order
    """

    codes: Tensor

    def __init__(self, source: Source, weight: IntegerWeight, *, label: str, where: str) -> None:
        super().__init__()
        self.window = window_of(source, where)
        self.flat = isinstance(source, nn.Conv1d)  # one axis less than the arithmetic's
        self.least = () if self.window is None else self.window.least()[1 if self.flat else 0 :]
        self.channels = source.in_features if isinstance(source, nn.Linear) else source.in_channels
        self.depthwise = self.window is not None and self.window.groups == self.channels == len(weight.values)
        self.label, self.where, self.outputs, self.memory = label, where, len(weight.values), Memory()
        self.register_buffer("codes", weight.values)

    def natively(self, x: Tensor, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], None]) -> Tensor:
        """x [..., K] or [B, C, H, W], or without B or H -> what `multiply` writes into an empty tensor for its result."""
        axes = 2 if self.window is None else 3 if self.flat else 4
        seen = x if x.ndim == axes else x.reshape(-1, x.shape[-1]) if self.window is None else x[None]
        y = empty_output(seen, self.window, self.outputs, dtype)
        multiply(seen, y)
        return y if x.ndim == axes else y.view(*x.shape[:-1], y.shape[1]) if self.window is None else y[0]

    def check(self, x: Tensor) -> None:
        """SchemeError for an input of another width than the weights', or smaller than a convolution's window."""
        axis = -1 if self.window is None else -2 if self.flat else -3
        if x.ndim < -axis or x.shape[axis] != self.channels:
            message = f"an input of shape {tuple(x.shape)}, where axis {axis} should be {self.channels}"
            raise SchemeError(message, where=self.where, remedy="give it what the float module was made for")
        if self.least and any(n < least for n, least in zip(x.shape[axis + 1 :], self.least, strict=True)):
            message = f"an input of shape {tuple(x.shape)}, where images of {self.least} are the smallest"
            raise SchemeError(message, where=self.where, remedy="give it larger inputs")

    def multiplied(self, x: Tensor, multiply: Multiply) -> Tensor:
        """x int8 [..., K] or a padded [B, C, H, W] -> [..., N] or [B, H', W', N], through one product or several."""
        if self.window is not None:
            return convolution(x, self.codes, self.window, multiply)
        return multiply(x.reshape(-1, x.shape[-1]), self.codes, slice(None)).view(*x.shape[:-1], len(self.codes))

    def accumulated(self, x: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
        """constant + scale · (x wᵀ) in float32; x as in `multiplied`, scale [N, G]."""
        if self.depthwise and self.window is not None:
            return rescaled(depthwise(x, self.codes, self.window), scale[:, 0], constant)
        return self.multiplied(x, lambda rows, w, n: scaled_product(rows, w, scale[n], constant[n]))

    def extra_repr(self) -> str:
        return f"{self.channels} → {len(self.codes)}, {self.label}"


class DynamicProduct(IntegerProduct):
    """Linear or convolution whose inputs are rounded as they come: each row, or each image, by its own range.

    scale  float32 [N, G]: the weights';  sums float32 [N]: Σ w of each output, which a zero point is multiplied by
    bias   float32 [N]
    """

    scale: Tensor
    sums: Tensor
    bias: Tensor

    def __init__(self, source: Source, weight: IntegerWeight, *, activations: Scheme, label: str, where: str) -> None:
        super().__init__(source, weight, label=label, where=where)
        self.activations = activations
        N, bias = len(weight.values), source.bias
        self.register_buffer("scale", weight.scale)
        self.register_buffer("sums", row_sums(weight) if activations.zero == "asym" else torch.zeros(0))
        self.register_buffer("bias", torch.zeros(N) if bias is None else bias.detach().float().clone())

    @classmethod
    def of(cls, source: Source, q: QTensor, *, activations: Scheme, where: str) -> Self:
        """The layer whose weights were quantized to q, in the order of `matrix`."""
        weight = integer_weight(q, where=where)
        return cls(source, weight, activations=activations, label=f"{q.scheme} × {activations}", where=where)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        x = x.detach()
        if handles(x, torch.float32):
            layer, rounding = self.memory.of(self, self.prepared)
            threads = torch.get_num_threads()
            return self.natively(dense(x), x.dtype, lambda x, y: layer.numbers_to_numbers(x, y, *rounding, threads))
        if self.window is None:
            codes, s, z = codes_of_rows(x.reshape(-1, x.shape[-1]), self.activations)
            y = self.centred(codes, z).mul_(s).add_(self.bias)
            return y.view(*x.shape[:-1], len(self.codes)).to(x.dtype)
        seen = self.window.padded(images(x, flat=self.flat), 0.0).permute(0, 2, 3, 1)  # before rounding: 0 has a code
        rows, s, z = codes_of_rows(seen.reshape(len(seen), -1), self.activations)
        codes = rows.view(seen.shape).permute(0, 3, 1, 2)
        s, z = s[..., None, None], None if z is None else z[..., None, None]
        return like(self.centred(codes, z).mul_(s).add_(self.bias), x, flat=self.flat).to(x.dtype)

    def prepared(self) -> tuple[Any, tuple[float, float, float, bool]]:
        """The layer for the extension, and how it rounds: lowest and highest code, 1 / reach, whether zeros move."""
        layer = packed(self.codes, self.scale, self.bias, self.sums, window=self.window, channels=self.channels)
        low, high = code_range(self.activations)
        return layer, (low, high, 1.0 / (self.activations.levels.reach or high), self.activations.zero == "asym")

    def centred(self, codes: Tensor, z: Tensor | None) -> Tensor:
        """Σ (c − z) w, in float32."""
        y = self.accumulated(codes, self.scale, torch.zeros_like(self.bias))
        return y if z is None else y.sub_(z * self.sums)


class StaticProduct(IntegerProduct):
    """Linear or convolution on codes of a known scale, to codes of the next layer's, or to float.

    multiplier  float32 [N, G]: s_in · s_w / s_out
    constant    float32 [N]: bias / s_out + z_out − z_in · Σ w · s_in / s_out
    entry       float32 [2]: scale and zero point of the input's codes
    exit        float32 [4]: scale, zero point, lowest and highest code of the output; [0]: the output is float
    """

    multiplier: Tensor
    constant: Tensor
    entry: Tensor
    exit: Tensor

    def __init__(
        self, source: Source, q: QTensor, *, entry: Tensor, exit: Tensor, activations: Scheme, where: str
    ) -> None:
        weight = integer_weight(q, where=where)
        super().__init__(source, weight, label=f"{q.scheme} × {activations}", where=where)
        s_in, z_in = entry.double()[:2]
        s_out, z_out = exit.double()[:2] if len(exit) else torch.tensor([1.0, 0.0], dtype=torch.float64)
        bias = torch.zeros(len(weight.values)) if source.bias is None else source.bias.detach()
        constant = (bias.double() - z_in * s_in * row_sums(weight).double()) / s_out + z_out
        self.register_buffer("multiplier", (weight.scale.double() * s_in / s_out).float())
        self.register_buffer("constant", constant.float())
        self.register_buffer("entry", entry[:2].clone())
        self.register_buffer("exit", exit.clone())

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        if handles(x, torch.int8):
            layer, border, bounds = self.memory.of(self, self.prepared)
            threads = torch.get_num_threads()
            if bounds:
                return self.natively(x, x.dtype, lambda x, y: layer.codes_to_codes(x, y, border, *bounds, threads))
            return self.natively(x, torch.float32, lambda x, y: layer.codes_to_numbers(x, y, border, threads))
        codes = x if self.window is None else self.window.padded(images(x, flat=self.flat), float(self.entry[1]))
        y = self.rounded(codes) if len(self.exit) else self.accumulated(codes, self.multiplier, self.constant)
        return y if self.window is None else like(y, x, flat=self.flat)

    def prepared(self) -> tuple[Any, int, list[float]]:
        """The layer for the extension, the border's code, and the lowest and highest code of the output."""
        layer = packed(
            self.codes, self.multiplier, self.constant, torch.zeros(0), window=self.window, channels=self.channels
        )
        return layer, int(self.entry[1]), self.exit[2:].tolist()

    def rounded(self, codes: Tensor) -> Tensor:
        """The output's codes."""
        low, high = self.exit[2:].tolist()
        scale, constant = self.multiplier, self.constant
        if scale.shape[1] > 1 or self.depthwise:
            return self.accumulated(codes, scale, constant).round_().clamp_(low, high).to(torch.int8)
        return self.multiplied(codes, lambda rows, w, n: requantized(rows, w, scale[n, 0], constant[n], low, high))


class IntegerEmbedding(nn.Module):
    """Embedding [V, E] with a scale for each row; float32 comes out. codes int8 [V, E], scale float32 [V, G]."""

    codes: Tensor
    scale: Tensor

    def __init__(self, q: QTensor, *, where: str) -> None:
        super().__init__()
        weight = integer_weight(q, where=where)
        self.label, self.where = str(q.scheme), where
        self.register_buffer("codes", weight.values)
        self.register_buffer("scale", weight.scale)

    def forward(self, index: Tensor) -> Tensor:
        """index [...] -> [..., E]."""
        rows, scale = self.codes[index].float(), self.scale[index]
        g = -(-rows.shape[-1] // scale.shape[-1])
        return rows * scale.repeat_interleave(g, dim=-1)[..., : rows.shape[-1]]

    def extra_repr(self) -> str:
        return f"{self.codes.shape[0]}, {self.codes.shape[1]}, {self.label}"


def row_sums(weight: IntegerWeight) -> Tensor:
    """Σ w of each output [N], of the weights as they are stored."""
    g = -(-weight.values.shape[1] // weight.scale.shape[1])
    sums = torch.stack([part.sum(1) for part in weight.values.double().split(g, 1)], dim=1)
    return (sums * weight.scale).sum(1).float()


def window_of(source: Source, where: str = "") -> Window | None:
    """The geometry of a convolution; None for Linear. SchemeError for borders that are not zeros."""
    if isinstance(source, nn.Linear):
        return None
    if source.padding_mode != "zeros":
        remedy = 'padding_mode="zeros", or keep the layer in float'
        raise SchemeError(
            f"convolutions padded by {source.padding_mode!r} have no integer form", where=where, remedy=remedy
        )
    left, right, *rows = source._reversed_padding_repeated_twice
    top, bottom = rows or (0, 0)
    kernel, stride, dilation = (_pair(tuple(each)) for each in (source.kernel_size, source.stride, source.dilation))
    return Window(kernel, stride, (left, right, top, bottom), dilation, source.groups)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of one or two sizes."""
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def matrix(w: Tensor) -> Tensor:
    """A weight [N, ...] as [N, K], the channels of a convolution last: the order in which patches are read."""
    return w.movedim(1, -1).flatten(1) if w.ndim > 2 else w


def check_group(scheme: Scheme, source: nn.Module, where: str) -> None:
    """SchemeError for groups along K in a convolution: its integer form sums over all of K at once."""
    if not isinstance(source, nn.Linear | nn.Embedding) and scheme.group not in (CHANNEL, TENSOR):
        message = f"a {type(source).__name__} has no integer form with groups of {scheme.group}"
        raise SchemeError(message, where=where, remedy="a scheme by channel, such as int8-channel")
