"""Fake quantization: rounded forward, straight through backward; of weights, and of the values between layers."""

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
    """decode(encode(x)) forward. Backward, x gets the gradient as it is, and the scale gets LSQ's.

    clip: no gradient for an x outside the range of the codes: for activations, and where scales are learned. Weights
    under scales of their own always get it, or those beyond a mean magnitude (ternary, binary) would never move again.

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
        if ctx.scheme.zero == "min":  # w = s·c + m: a minimum is a float, and moves the codes' range
            x, decoded, zero = x - zero, decoded - zero, torch.zeros_like(zero)
        ratio, value = x / safe(scale), decoded / safe(scale)
        inside = (ratio >= low - zero) & (ratio <= high - zero)
        to_scale = None
        if ctx.needs_input_grad[1]:
            to_scale = (grad * torch.where(inside, value - ratio, value)).sum_to_size(scale.shape)
        return grad * inside if ctx.clip else grad, to_scale, None, None, None


def _limits(scheme: Scheme) -> tuple[float, float]:
    """The range of w / s (+ z) that rounding moves by half a step at most."""
    if scheme.levels.levels is not None:
        return min(scheme.levels.levels), max(scheme.levels.levels)
    low, high = code_range(scheme)
    return low - 0.5, high + 0.5


def fake(x: Tensor, scales: Scales, scheme: Scheme, *, clip: bool = True) -> Tensor:
    """A matrix x [N, K] as its codes stand for it, straight through for gradients; computed in float32."""
    zero = None if scales.zero is None else scales.zero[..., None]
    grouped = group_view(x.float(), scheme)
    decoded: Tensor = StraightThrough.apply(  # type: ignore[no-untyped-call]
        grouped, scales.scale[..., None], zero, scheme, clip
    )
    return decoded.reshape(len(x), -1)[:, : x.shape[1]].to(x.dtype)


class Step(nn.Module):
    """A learned scale: LSQ's gradient, damped by 1 / √(values · highest level) (section 2.2), on the scale's exponent.

    With the exponent as the parameter, a step of an optimizer changes the scale by a factor, whatever its size and
    the learning rate's: Jain et al. 2020, arXiv:1903.08066, section 3. Zero points and minima stay where the first
    range put them.
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
        """The scales as they will be stored, with the damped gradient."""
        wanted = self.start * torch.exp2(self.exponent)
        stored = snap(wanted.detach(), self.zero, self.scheme)
        damped = wanted * self.damping
        return replace(stored, scale=stored.scale + (damped - damped.detach()))


class FakeWeight(nn.Module):
    """What becomes of a weight: what its codes stand for. The scales follow the weight, or are learned.

    mask  of the weights that are not 0, where some are and not all: what was pruned stays 0 while the others train
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
        """The scales under which w [N, K] is rounded now."""
        return fit(w.detach().float(), self.scheme) if self.learned is None else self.learned()

    def pruned(self, w: Tensor) -> Tensor:
        """The weight with zeros where the mask has them."""
        return w if self.mask is None else w * self.mask

    def encoded(self, w: Tensor) -> QTensor:
        """The codes of a weight, as a matrix with a convolution's channels last."""
        flat = matrix(self.pruned(w).detach().float())
        found = self.scales(flat)
        return encode(flat, replace(found, scale=found.scale.detach()), self.scheme)

    def part(self, rows: slice) -> Self:
        """The same for some rows of the weight."""
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
    """A place between layers where values are to be codes.

    phase  "pass": nothing happens; "watch": the histogram counts what comes by; "round": the values are rounded to
           what codes stand for; "follow": both while training, and in eval mode they are rounded.
    images  under a scheme by token, whether a token is a whole image, as for a convolution, or a row
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
        self.values = 0  # in one sample of what came by

    def forward(self, x: Tensor) -> Tensor:
        if self.phase == "watch":
            self.histogram.update(x)
            self.values = x.numel() // max(1, len(x))
        elif self.phase == "follow" and self.training and self.scheme.group != TOKEN:
            low, high = finite_extremes(x.detach(), self.where)
            self.histogram.merge(
                Histogram(self.where, low=low, high=high, average_low=low, average_high=high, batches=1)
            )
        if self.phase in ("pass", "watch"):
            return x
        if self.scheme.group != TOKEN:
            return fake(x.reshape(len(x), -1), self.scales(), self.scheme).view(x.shape)
        rows = x.flatten(1) if self.images else x.reshape(-1, x.shape[-1])
        return fake(rows, fit(rows.detach(), self.scheme), self.scheme, clip=False).view(x.shape)

    def scales(self) -> Scales:
        """The scale [1, 1] (and zero) of the codes: 1 where all values were 0. CalibrationError where no range was seen."""
        if self.learned is not None:
            return self.learned()
        if not self.histogram.tokens and not self.histogram.batches:
            remedy = f'inputs that reach it, or keep={{"{self.where.removesuffix(".input")}": "float"}}'
            raise CalibrationError("no activations were seen: there is no range", where=self.where, remedy=remedy)
        found = static_scales(self.histogram, self.scheme, observer=self.observer, percentile=self.percentile)
        return replace(found, scale=safe(found.scale))

    def get_extra_state(self) -> Tensor:
        """The ranges seen, as one float64 tensor: what state dicts, safetensors files among them, hold of an edge."""
        return self.histogram.packed()

    def set_extra_state(self, state: Tensor) -> None:
        """What `get_extra_state` gave."""
        self.histogram = Histogram.unpacked(state, where=self.where)

    def learn(self) -> None:
        """Make the scale a parameter, starting from the range seen. LSQ counts the values of one sample."""
        self.learned = Step(self.scales(), max(1, self.values), self.scheme)

    def affine(self) -> Tensor:
        """[scale, zero point, lowest code, highest code], float32 [4]."""
        scales, (low, high) = self.scales(), code_range(self.scheme)
        zero = 0.0 if scales.zero is None else float(scales.zero)
        return torch.tensor([float(scales.scale.detach()), zero, low, high])

    def extra_repr(self) -> str:
        return f"{self.where}: {self.scheme}"
