"""Integer layers: Linear and convolutions, dynamic (float inputs, quantized at run time) or static (int8 inputs); Embedding."""

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
    require_device,
    rescaled,
    scaled_product,
)  # fmt: skip
from bitwright.nn.native import Memory, dense, empty_output, handles, packed
from bitwright.nn.stored_codes import StoredCodes
from bitwright.numerics.codec import code_range
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import CHANNEL, TENSOR, Scheme

Source = nn.Linear | nn.Conv1d | nn.Conv2d


class IntegerProduct(StoredCodes):
    """Base class of static and dynamic layers: int8 weights, and their product with int8 activations.

    codes  int8 [N, K], the integer weights; for a convolution K = kh·kw·C / groups, in this order
    """

    lender: "tuple[IntegerProduct, ...]"

    def __init__(
        self, source: Source, weight: IntegerWeight, *, label: str, where: str, lender: "IntegerProduct | None" = None
    ) -> None:
        """label: the schemes, for repr. lender: the integer form of the same layer at an earlier call, to share its codes."""
        super().__init__()
        self.describe(source)
        self.window = window_of(source)
        self.flat = isinstance(source, nn.Conv1d)  # computed as a 2-D convolution of height 1
        self.least = () if self.window is None else self.window.least()[1 if self.flat else 0 :]
        self.channels = source.in_features if isinstance(source, nn.Linear) else source.in_channels
        self.depthwise = self.window is not None and self.window.groups == self.channels == len(weight.values)
        self.label, self.where, self.outputs, self.memory = label, where, len(weight.values), Memory()
        self.lender = () if lender is None else (lender,)  # in a tuple, so that it is not registered as a submodule
        if lender is None:
            self.store(weight)

    def __getattr__(self, name: str) -> Any:
        if name == "codes" and self.__dict__.get("lender"):
            return self.lender[0].codes
        return super().__getattr__(name)

    def natively(self, x: Tensor, dtype: torch.dtype, multiply: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Call a native kernel `multiply(x, output)` on x [..., K] or [B, C, H, W] (B or H may be missing); the output."""
        axes = 2 if self.window is None else 3 if self.flat else 4
        seen = x if x.ndim == axes else x.reshape(-1, x.shape[-1]) if self.window is None else x[None]
        y = empty_output(seen, self.window, self.outputs, dtype)
        multiply(seen, y)
        return y if x.ndim == axes else y.view(*x.shape[:-1], y.shape[1]) if self.window is None else y[0]

    def check(self, x: Tensor) -> None:
        """SchemeError for a device without integer products, or an input with another number of channels than the weights',
        or smaller than the kernel."""
        require_device(x, self.where)
        axis = -1 if self.window is None else -2 if self.flat else -3
        if x.ndim < -axis or x.shape[axis] != self.channels:
            message = f"an input of shape {tuple(x.shape)}, where axis {axis} should be {self.channels}"
            raise SchemeError(message, where=self.where, remedy="give it what the float module was made for")
        if self.least and any(n < least for n, least in zip(x.shape[axis + 1 :], self.least, strict=True)):
            message = f"an input of shape {tuple(x.shape)}, where images of {self.least} are the smallest"
            raise SchemeError(message, where=self.where, remedy="give it larger inputs")

    def multiplied(self, x: Tensor, multiply: Multiply) -> Tensor:
        """x int8 [..., K] or a padded [B, C, H, W] -> [..., N] or [B, H', W', N], by calls of `multiply`."""
        if self.window is not None:
            return convolution(x, self.codes, self.window, multiply)
        return multiply(x.reshape(-1, x.shape[-1]), self.codes, slice(None)).view(*x.shape[:-1], len(self.codes))

    def accumulated(self, x: Tensor, scale: Tensor, constant: Tensor) -> Tensor:
        """constant + scale · (x wᵀ) in float32; x as in `multiplied`, scale [N, G]."""
        if self.depthwise and self.window is not None:
            return rescaled(depthwise(x, self.codes, self.window), scale[:, 0], constant)
        return self.multiplied(x, lambda rows, w, n: scaled_product(rows, w, scale[n], constant[n]))

    def decoded(self, scale: Tensor) -> Tensor:
        """The dequantized weight in the float layer's shape and dtype. scale: [N, G]."""
        rows = spread(self.codes, scale)
        if self.window is not None:
            rows = rows.view(len(rows), *self.window.kernel, -1).movedim(-1, 1)
            rows = rows[:, :, 0] if self.flat else rows
        return rows.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels} → {len(self.codes)}, {self.label}"


class DynamicProduct(IntegerProduct):
    """Linear or convolution with dynamic quantization of its inputs: per row, for a convolution per image.

    scale  float32 [N, G], of the weights
    sums   float32 [N], Σ w of each output, to be multiplied by the inputs' zero points; empty if these are symmetric
    bias   float32 [N], or None
    """

    scale: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(
        self,
        source: Source,
        weight: IntegerWeight,
        *,
        activations: Scheme,
        label: str,
        where: str,
        lender: IntegerProduct | None = None,
    ) -> None:
        super().__init__(source, weight, label=label, where=where, lender=lender)
        self.activations = activations
        self.register_buffer("scale", weight.scale)
        self.register_buffer("sums", row_sums(weight) if activations.zero == "asym" else torch.zeros(0))
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().float().clone())

    @classmethod
    def of(
        cls, source: Source, q: QTensor, *, activations: Scheme, where: str, lender: IntegerProduct | None = None
    ) -> Self:
        """The dynamic layer for a float layer whose weight was quantized to q, with columns in the order of `matrix`."""
        weight = integer_weight(q, where=where)
        label = f"{named(q.scheme)} × {activations}"
        return cls(source, weight, activations=activations, label=label, where=where, lender=lender)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the float layer's shape and dtype."""
        return self.decoded(self.scale)

    def offset(self) -> Tensor:
        """The bias [N], zeros if there is none."""
        return torch.zeros_like(self.scale[:, 0]) if self.bias is None else self.bias

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach()
        self.check(x)
        if handles(x, torch.float32):
            layer, rounding = self.memory.of(self, self.prepared)
            threads = torch.get_num_threads()
            return self.natively(dense(x), x.dtype, lambda x, y: layer.numbers_to_numbers(x, y, *rounding, threads))
        if self.window is None:
            codes, s, z = codes_of_rows(x.reshape(-1, x.shape[-1]), self.activations)
            y = self.centred(codes, z).mul_(s).add_(self.offset())
            return y.view(*x.shape[:-1], len(self.codes)).to(x.dtype)
        seen = self.window.padded(images(x, flat=self.flat), 0.0).permute(0, 2, 3, 1)  # before rounding: 0 has a code
        rows, s, z = codes_of_rows(seen.reshape(seen.shape[0], -1), self.activations)
        codes = rows.view(seen.shape).permute(0, 3, 1, 2)
        s, z = s[..., None, None], None if z is None else z[..., None, None]
        return like(self.centred(codes, z).mul_(s).add_(self.offset()), x, flat=self.flat).to(x.dtype)

    def prepared(self) -> tuple[Any, tuple[float, float, float, bool]]:
        """The packed layer for the native extension, and how it quantizes inputs: lowest and highest code, 1 / the level that
        the absmax is scaled to, whether there are zero points."""
        for other in self.lender:
            assert isinstance(other, DynamicProduct)
            return other.memory.of(other, other.prepared)
        layer = packed(self.codes, self.scale, self.offset(), self.sums, window=self.window, channels=self.channels)
        low, high = code_range(self.activations)
        return layer, (low, high, 1.0 / (self.activations.levels.reach or high), self.activations.zero == "asym")

    def centred(self, codes: Tensor, z: Tensor | None) -> Tensor:
        """Σ (c − z) w, in float32."""
        y = self.accumulated(codes, self.scale, torch.zeros_like(self.scale[:, 0]))
        return y if z is None else y.sub_(z * self.sums)


class StaticProduct(IntegerProduct):
    """Linear or convolution with static quantization: int8 in, int8 (requantized) or float out.

    multiplier  float32 [N, G]: s_in · s_w / s_out
    constant    float32 [N]: bias / s_out + z_out − z_in · Σ w · s_in / s_out
    entry       float32 [2]: scale and zero point of the input
    exit        float32 [4]: scale, zero point, lowest and highest code of the output; empty if the output is float
    """

    multiplier: Tensor
    constant: Tensor
    entry: Tensor
    exit: Tensor

    def __init__(
        self,
        source: Source,
        q: QTensor,
        *,
        entry: Tensor,
        exit: Tensor,
        activations: Scheme,
        where: str,
        lender: IntegerProduct | None = None,
    ) -> None:
        weight = integer_weight(q, where=where)
        label = f"{named(q.scheme)} × {named(activations)}"
        super().__init__(source, weight, label=label, where=where, lender=lender)
        self.has_bias = source.bias is not None
        s_in, z_in = entry.double()[:2]
        s_out, z_out = exit.double()[:2] if len(exit) else torch.tensor([1.0, 0.0], dtype=torch.float64)
        bias = torch.zeros(1) if source.bias is None else source.bias.detach()
        self.fine = q.scheme.levels.bits == activations.levels.bits == 8 and activations.zero == "asym"
        constant = (bias.double() - z_in * s_in * row_sums(weight).double()) / s_out + z_out
        self.register_buffer("multiplier", (weight.scale.double() * s_in / s_out).float())
        self.register_buffer("constant", constant.float())
        self.register_buffer("entry", entry[:2].clone())
        self.register_buffer("exit", exit.clone())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the float layer's shape and dtype."""
        return self.decoded(self.weight_scale())

    @property
    def bias(self) -> Tensor | None:
        """The float layer's bias, or None."""
        return self.offset().to(self.dtype) if self.has_bias else None

    def weight_scale(self) -> Tensor:
        """The scales of the weights, float32 [N, G], derived from the multiplier."""
        s_out = self.exit[0].double() if len(self.exit) else 1.0
        return (self.multiplier.double() * s_out / self.entry[0].double()).float()

    def offset(self) -> Tensor:
        """The bias float32 [N], derived from `constant`."""
        s_in, z_in = self.entry.double()
        s_out, z_out = self.exit.double()[:2] if len(self.exit) else torch.tensor([1.0, 0.0], dtype=torch.float64)
        sums = row_sums(IntegerWeight(self.codes, self.weight_scale())).double()
        return ((self.constant.double() - z_out) * s_out + z_in * s_in * sums).float()

    def forward(self, input: Tensor) -> Tensor:
        x = input
        self.check(x)
        if handles(x, torch.int8):
            layer, border, bounds = self.memory.of(self, self.prepared)
            threads = torch.get_num_threads()
            if bounds:
                return self.natively(x, x.dtype, lambda x, y: layer.codes_to_codes(x, y, border, *bounds, threads))
            y = self.natively(x, torch.float32, lambda x, y: layer.codes_to_numbers(x, y, border, threads))
            return y.to(self.dtype)
        codes = x if self.window is None else self.window.padded(images(x, flat=self.flat), self.entry[1])
        exits = len(self.exit)
        y = self.rounded(codes) if exits else self.accumulated(codes, self.multiplier, self.constant).to(self.dtype)
        return y if self.window is None else like(y, x, flat=self.flat)

    def prepared(self) -> tuple[Any, int, list[float]]:
        """The packed layer for the native extension, the code of the padding, and the output's lowest and highest code."""
        layer = packed(
            self.codes, self.multiplier, self.constant, torch.zeros(0), window=self.window, channels=self.channels
        )
        return layer, int(self.entry[1]), self.exit[2:].tolist()

    def rounded(self, codes: Tensor) -> Tensor:
        """The requantized output, int8."""
        low, high = self.exit[2:]
        scale, constant = self.multiplier, self.constant
        if scale.shape[1] > 1 or self.depthwise:
            return self.accumulated(codes, scale, constant).round_().clamp_(low, high).to(torch.int8)
        return self.multiplied(codes, lambda rows, w, n: requantized(rows, w, scale[n, 0], constant[n], low, high))


class IntegerEmbedding(StoredCodes):
    """Embedding with integer weights: codes int8 [V, E], scale float32 [V, G]; rows are dequantized as they are read."""

    scale: Tensor

    def __init__(self, source: nn.Module, q: QTensor, *, where: str) -> None:
        super().__init__()
        self.describe(source)
        weight = integer_weight(q, where=where)
        self.label, self.where = named(q.scheme), where
        self.store(weight)
        self.register_buffer("scale", weight.scale)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the float layer's dtype."""
        return spread(self.codes, self.scale).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] -> [..., E]."""
        return spread(self.codes[input], self.scale[input]).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.codes.shape[0]}, {self.codes.shape[1]}, {self.label}"


class IntegerEmbeddingBag(IntegerEmbedding):
    """EmbeddingBag with integer weights: dequantized rows are summed, averaged or maximized."""

    mode: str
    include_last_offset: bool
    padding_idx: int | None

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag's."""
        n = input.numel()
        places = torch.arange(n, device=input.device).view(input.shape)
        rows = super().forward(input.reshape(-1))
        gone = None
        if self.padding_idx is not None:  # padding does not count: it maps to one more row, which is the padding_idx
            gone, rows = n, torch.nn.functional.pad(rows, (0, 0, 0, 1))
            places = places.masked_fill(input == self.padding_idx, n)
        return torch.nn.functional.embedding_bag(
            places,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=gone,
        )


class StoredWeight(StoredCodes):
    """The integer form of `HeldWeight`, a weight [N, ...] that a forward reads directly: dequantized whenever it is read."""

    scale: Tensor

    def __init__(self, q: QTensor, shape: torch.Size, dtype: torch.dtype, *, where: str) -> None:
        super().__init__()
        weight = integer_weight(q, where=where)
        self.shape, self.dtype, self.label = shape, dtype, named(q.scheme)
        self.store(weight)
        self.register_buffer("scale", weight.scale)

    def forward(self) -> Tensor:
        """The dequantized weight, in its own shape and dtype."""
        return self.shaped(spread(self.codes, self.scale)).to(self.dtype)

    def shaped(self, rows: Tensor) -> Tensor:
        """Rows [N, K] in the weight's own shape."""
        return rows.view(len(rows), *self.shape[2:], self.shape[1]).movedim(-1, 1) if len(self.shape) > 2 else rows

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {self.label}"


def spread(codes: Tensor, scale: Tensor) -> Tensor:
    """Dequantize: codes [..., K] times the scale [..., G] of their group -> float32 [..., K]."""
    g = -(-codes.shape[-1] // scale.shape[-1])
    return codes.float() * scale.repeat_interleave(g, dim=-1)[..., : codes.shape[-1]]


def named(scheme: Scheme) -> str:
    """A scheme's text without "-f32", for repr, as all scales here are float32."""
    return str(scheme).removesuffix("-f32")


def row_sums(weight: IntegerWeight) -> Tensor:
    """Σ w over the inputs of each output, float32 [N], of the quantized weights."""
    g = -(-weight.values.shape[1] // weight.scale.shape[1])
    sums = torch.stack([part.sum(1) for part in weight.values.double().split(g, 1)], dim=1)
    return (sums * weight.scale).sum(1).float()


def window_of(source: Source) -> Window | None:
    """The geometry of a convolution, which is padded by zeros (rearranged.py); None for Linear."""
    if isinstance(source, nn.Linear):
        return None
    left, right, *rows = source._reversed_padding_repeated_twice
    top, bottom = rows or (0, 0)
    kernel, stride, dilation = (_pair(tuple(each)) for each in (source.kernel_size, source.stride, source.dilation))
    return Window(kernel, stride, (left, right, top, bottom), dilation, source.groups)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """One or two sizes as (height, width); the height of a 1-D convolution is 1."""
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def matrix(w: Tensor) -> Tensor:
    """A weight [N, ...] as a matrix [N, K], with a convolution's input channels last, the order of patches."""
    return w.movedim(1, -1).flatten(1) if w.ndim > 2 else w


def check_group(scheme: Scheme, source: nn.Module, where: str) -> None:
    """SchemeError for a convolution with groups along K: its integer form needs one scale per output or tensor."""
    if not isinstance(source, nn.Linear | nn.Embedding | nn.EmbeddingBag) and scheme.group not in (CHANNEL, TENSOR):
        message = f"a {type(source).__name__} has no integer form with groups of {scheme.group}"
        raise SchemeError(message, where=where, remedy="a scheme by channel, such as int8-channel")
