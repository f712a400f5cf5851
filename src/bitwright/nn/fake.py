"""Fake quantization of weights and activations: quantize and dequantize forward, straight-through estimator backward."""

import copy
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from bitwright.calibration.ranges import Histogram, finite_extremes, static_scales
from bitwright.errors import CalibrationError
from bitwright.nn.layers import matrix
from bitwright.numerics.codec import code_range, encode, fit, group_view, round_to, safe, snap, values
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import TOKEN, Scheme

Phase = Literal["pass", "watch", "round", "follow"]


class StraightThrough(torch.autograd.Function):
    """decode(encode(x)) forward. Backward, x gets the gradient unchanged (straight-through), and the scale gets LSQ's.

    clip: x outside the range of the codes gets no gradient, for activations and learned scales. Weights whose scales follow
    them always get it; otherwise weights beyond the mean magnitude (ternary, binary) would never change.

    Sources: Bengio et al. 2013, arXiv:1308.3432 (the estimator); Esser et al. 2020, arXiv:1902.08153, eq. 3 (the
    scale's gradient: the code less x / s inside the range, the code at its ends); Ma et al. 2024, arXiv:2402.17764
    (ternary) and Rastegari et al. 2016, arXiv:1603.05279 (binary), both under the mean magnitude.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, clip: bool) -> Tensor:
        _, decoded = round_to(x, scale, zero, scheme)
        ctx.save_for_backward(x, scale, torch.zeros_like(scale) if zero is None else zero, decoded)
        ctx.scheme, ctx.clip = scheme, clip
        return decoded

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, scale, zero, decoded) = grads, ctx.saved_tensors
        low, high = _limits(ctx.scheme)
        if ctx.scheme.zero == "min":  # w = s·c + m: the minimum is subtracted, the rest is symmetric
            x, decoded, zero = x - zero, decoded - zero, torch.zeros_like(zero)
        ratio, value = x / safe(scale), decoded / safe(scale)
        inside = (ratio >= low - zero) & (ratio <= high - zero)
        to_scale = None
        if ctx.needs_input_grad[1]:
            to_scale = (grad * torch.where(inside, value - ratio, value)).sum_to_size(scale.shape)
        return grad * inside if ctx.clip else grad, to_scale, None, None, None


def _limits(scheme: Scheme) -> tuple[float, float]:
    """The range of w / s (+ z) that is not clipped: rounding changes it by at most half a step."""
    if scheme.levels.levels is not None:
        return min(scheme.levels.levels), max(scheme.levels.levels)
    low, high = code_range(scheme)
    return low - 0.5, high + 0.5


def fake(x: Tensor, scales: Scales, scheme: Scheme, *, clip: bool = True) -> Tensor:
    """Fake quantization of x [N, K], with straight-through gradients; computed in float32."""
    zero = None if scales.zero is None else scales.zero[..., None]
    grouped = group_view(x.float(), scheme)
    decoded: Tensor = StraightThrough.apply(  # type: ignore[no-untyped-call]
        grouped, scales.scale[..., None], zero, scheme, clip
    )
    return decoded.reshape(len(x), -1)[:, : x.shape[1]].to(x.dtype)


class Step(nn.Module):
    """Learned scales (LSQ): the parameter is log2(scale / start); gradients are scaled by 1 / √(values · highest level)
    (LSQ, arXiv:1902.08153, section 2.2).

    With the exponent as the parameter, an optimizer's step changes the scale by a factor that does not depend on the scale's
    size: Jain et al. 2020, arXiv:1903.08066, section 3. Zero points and minima are not learned.
    """

    start: Tensor
    zero: Tensor | None

    def __init__(self, first: Scales, count: int, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("start", first.scale)
        self.register_buffer("zero", first.zero)
        self.exponent = nn.Parameter(torch.zeros_like(first.scale))
        highest = float(values(torch.tensor([code_range(scheme)[1]]), scheme).abs().max())
        self.damping = (count / first.scale.numel() * max(1.0, highest)) ** -0.5

    def forward(self) -> Scales:
        """The scales as they will be stored (snapped), with the scaled gradient."""
        wanted = self.start * torch.exp2(self.exponent)
        stored = snap(wanted.detach(), self.zero, self.scheme)
        damped = wanted * self.damping
        return replace(stored, scale=stored.scale + (damped - damped.detach()))


class FakeWeight(nn.Module):
    """Fake quantization of a weight. Scales are recomputed from the weight, or learned.

    mask  True for weights that are not 0, if some are: pruned weights stay 0 in training; else None
    """

    mask: Tensor | None

    def __init__(self, w: Tensor, scheme: Scheme, *, learned: bool) -> None:
        super().__init__()
        self.scheme = scheme
        kept = w.detach() != 0
        self.register_buffer("mask", kept if bool(kept.any()) and not bool(kept.all()) else None)
        first = fit(matrix(w.detach().float()), scheme)
        self.learned = Step(first, w.numel(), scheme) if learned else None

    def scales(self, w: Tensor) -> Scales:
        """The current scales for a weight w [N, K]."""
        return fit(w.detach().float(), self.scheme) if self.learned is None else self.learned()

    def pruned(self, w: Tensor) -> Tensor:
        """The weight with zeros where the mask has them."""
        return w if self.mask is None else w * self.mask

    def encoded(self, w: Tensor) -> QTensor:
        """The quantized weight, as a matrix [N, K] with a convolution's channels last."""
        flat = matrix(self.pruned(w).detach().float())
        found = self.scales(flat)
        return encode(flat, replace(found, scale=found.scale.detach()), self.scheme)

    def part(self, rows: slice) -> Self:
        """The fake quantization of some rows of the weight."""
        part = copy.deepcopy(self)
        part.mask = None if self.mask is None else self.mask[rows]
        if part.learned is not None:
            part.learned.start, zero = part.learned.start[rows], part.learned.zero
            part.learned.zero = None if zero is None else zero[rows]
            part.learned.exponent = nn.Parameter(part.learned.exponent.detach()[rows])
        return part

    def forward(self, w: Tensor) -> Tensor:
        flat = matrix(self.pruned(w))
        rounded = fake(flat, self.scales(flat), self.scheme, clip=self.learned is not None)
        return rounded if w.ndim == 2 else rounded.view(len(w), *w.shape[2:], w.shape[1]).movedim(-1, 1)


class Edge(nn.Module):
    """Observer and fake quantization of one activation, at a place where `convert` will make it integer.

    phase   "pass": does nothing; "watch": records the range; "round": fake quantization; "follow": in training records a moving
            average of the range and quantizes, in eval mode only quantizes
    images  for schemes per token: whether a token is a whole image (convolutions) rather than a row
    """

    def __init__(
        self, scheme: Scheme, *, observer: str, percentile: float | None, where: str, images: bool = False
    ) -> None:
        super().__init__()
        self.scheme, self.observer, self.percentile, self.where = scheme, observer, percentile, where
        self.images = images
        self.phase: Phase = "pass"
        self.histogram = Histogram(where)
        self.learned: Step | None = None
        self.values = 0  # number of values in one sample

    def forward(self, x: Tensor) -> Tensor:
        if self.phase == "watch":
            self.histogram.update(x)
            self.values = x.numel() // max(1, len(x))
        elif self.phase == "follow" and self.training and self.scheme.group != TOKEN:
            low, high = finite_extremes(x.detach(), self.where)
            self.histogram.merge(
                Histogram(self.where, low=low, high=high, average_low=low, average_high=high, batches=1)
            )
        if self.phase in ("pass", "watch") or not x.numel():
            return x
        if self.scheme.group != TOKEN:
            return fake(x.reshape(len(x), -1), self.scales(), self.scheme).view(x.shape)
        rows = x.flatten(1) if self.images else x.reshape(-1, x.shape[-1])
        return fake(rows, fit(rows.detach(), self.scheme), self.scheme, clip=False).view(x.shape)

    def scales(self) -> Scales:
        """The scale [1, 1] (and zero point); 1 if all values were 0. CalibrationError if no range was recorded."""
        if self.learned is not None:
            return self.learned()
        if not self.histogram.tokens and not self.histogram.batches:
            remedy = f'inputs that reach it, or keep={{"{self.where.removesuffix(".input")}": "float"}}'
            raise CalibrationError("no activations were seen: there is no range", where=self.where, remedy=remedy)
        found = static_scales(self.histogram, self.scheme, observer=self.observer, percentile=self.percentile)
        return replace(found, scale=safe(found.scale))

    def get_extra_state(self) -> Tensor:
        """The recorded histogram as one float64 tensor, for state dicts and safetensors files."""
        return self.histogram.packed()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the histogram from `get_extra_state`."""
        self.histogram = Histogram.unpacked(state, where=self.where)

    def learn(self) -> None:
        """Make the scale a learned parameter (LSQ), starting from the recorded range."""
        self.learned = Step(self.scales(), max(1, self.values), self.scheme)

    def affine(self) -> Tensor:
        """[scale, zero point, lowest code, highest code], float32 [4]."""
        scales, (low, high) = self.scales(), code_range(self.scheme)
        zero = 0.0 if scales.zero is None else float(scales.zero)
        return torch.tensor([float(scales.scale.detach()), zero, low, high])

    def extra_repr(self) -> str:
        return f"{self.where}: {self.scheme}"
