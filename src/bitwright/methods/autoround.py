"""AutoRound: choose the codes of a whole block by gradient on the block's output.

After Cheng et al. 2023 (SignRound, arXiv:2309.05516). Every weight gets an offset V in [−½, ½] before rounding and every
group a stretch of its scale; gradients pass straight through the rounding, and are followed in steps of one size, that
shrinks to nothing. What is minimised is the squared difference between the rounded block's output and the float
block's, each on the inputs that it would really get; so a block also makes up for what the blocks before it lost.

Three things are done otherwise than in the paper. Not the sign of a gradient is followed but the gradient over its own
root mean square: steps of the same size on average, and less noise where a sign means nothing. The start is GPTAQ's
result rather than the nearest codes: `base` moves each weight towards the middle of the interval that rounds to its
code, so V = 0 *is* that start. And the better of start and end on all of the calibration inputs is kept, so tuning can
never make a block worse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.codec import code_dtype, code_range, decode, group_view, snap
from bitwright.errors import RecipeError
from bitwright.methods.gptaq import gptaq
from bitwright.methods.outcome import Outcome
from bitwright.qtensor import QTensor, Scales
from bitwright.scheme import TENSOR, Scheme

MEMORY = 0.95  # of a gradient's mean square, from step to step
INSIDE = 0.4  # how far from its code a weight may start: what GPTQ moved must not fall back at the first step
Forward = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """iterations: steps; windows: calibration windows in a step; lr: first step of V, falling to 0 (None: so that V can
    just cross its range); scale_lr: the same for the relative stretch of scales; seed: of the draw.
    """

    iterations: int = 200
    windows: int = 8
    lr: float | None = None
    scale_lr: float = 0.001
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Options":
        """Those of a method's options that are about tuning; the others are about its start."""
        return cls(**{name: value for name, value in options.items() if name in cls.__dataclass_fields__})

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.windows < 1 or self.scale_lr < 0 or (self.lr is not None and self.lr <= 0):
            raise RecipeError("iterations, windows and steps must be above 0", remedy="such as 200, 8 and 0.005")


def autoround(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    iterations: int = Options.iterations,
    windows: int = Options.windows,
    lr: float | None = Options.lr,
    scale_lr: float = Options.scale_lr,
    seed: int = Options.seed,
    cross: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """Where tuning starts: GPTAQ's result. `tune` does the rest, on a block.

    w, gram, cross as for `gptaq`; the other options are those of `Options`. Raises RecipeError for a grid that is not of
    integers.
    """
    Options(iterations, windows, lr, scale_lr, seed)
    if scheme.levels.levels is not None:
        raise RecipeError(f"autoround tunes integer codes, not {scheme.grid}", remedy="int2 to int8, or method gptaq")
    return gptaq(w, gram, scheme, cross=cross, fast=fast)


def tune(
    forward: Forward,
    inputs: Tensor,
    targets: Tensor,
    weights: dict[str, Tensor],
    start: dict[str, QTensor],
    how: Options,
) -> dict[str, QTensor]:
    """Better codes and scales for the matrices of a block.

    forward          (decoded weights by name, x [B, T, H]) -> the block's output [B, T, H], differentiable in the weights
    inputs, targets  [S, T, H]: what the rounded block is given, and what the float block made of the float inputs
    weights          the float matrices [N, K] by name; start: what they were rounded to
    """
    if how.iterations == 0:
        return start
    how = replace(how, windows=min(how.windows, len(inputs)))
    knobs = {name: _Knobs(weights[name], q) for name, q in start.items()}
    for step, some in enumerate(_draws(len(inputs), how)):
        missed = forward({name: k.decoded() for name, k in knobs.items()}, inputs[some]) - targets[some]
        free = [knob for k in knobs.values() for knob in (k.offset, k.stretch)]
        gradients = iter(torch.autograd.grad(missed.float().square().mean(), free))
        left = 1 - step / how.iterations
        for k in knobs.values():
            k.move(next(gradients), next(gradients), left * (how.lr or 1 / how.iterations), left * how.scale_lr)
    end = {name: k.result() for name, k in knobs.items()}
    return end if _error(forward, inputs, targets, end, how) < _error(forward, inputs, targets, start, how) else start


def _draws(windows: int, how: Options) -> Iterator[Tensor]:
    """Which windows each step looks at: all in turn, shuffled anew each time."""
    generator = torch.Generator().manual_seed(how.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(how.iterations):
        if len(order) < how.windows:
            order = torch.cat([order, torch.randperm(windows, generator=generator)])
        yield order[: how.windows].sort().values
        order = order[how.windows :]


@torch.no_grad()
def _error(forward: Forward, inputs: Tensor, targets: Tensor, q: dict[str, QTensor], how: Options) -> float:
    """The squared difference of outputs over all windows."""
    decoded = {name: decode(replace(one, shape=tuple(one.codes.shape))) for name, one in q.items()}
    parts = zip(inputs.split(how.windows), targets.split(how.windows), strict=True)
    return sum(float((forward(decoded, x) - y).float().square().sum(dtype=torch.float64)) for x, y in parts)


class _Knobs:
    """What is tuned of one matrix: offset [N, G, g] and stretch [N, G, 1]."""

    def __init__(self, w: Tensor, q: QTensor) -> None:
        self.q, self.scheme = q, q.scheme
        self.w = group_view(w.float(), self.scheme)
        self.scale = q.scales.scale[..., None]
        self.zero = torch.zeros(()) if q.scales.zero is None else q.scales.zero[..., None]
        self.movable = self.scheme.scale in ("f32", "f16", "bf16") and self.scheme.group != TENSOR
        codes = group_view(q.codes.float(), self.scheme)
        lo, hi = code_range(self.scheme)
        place = _place(self.w, self.scale, self.zero, self.scheme)
        low = torch.where(codes == lo, -torch.inf, codes - INSIDE)
        high = torch.where(codes == hi, torch.inf, codes + INSIDE)
        self.base = torch.clamp(place, low, high) - place
        self.offset = torch.zeros_like(self.w, requires_grad=True)
        self.stretch = torch.zeros_like(self.scale, requires_grad=True)
        self.moments = [torch.zeros_like(self.w), torch.zeros_like(self.scale)]
        self.moves = 0

    @torch.no_grad()
    def move(self, offset: Tensor, stretch: Tensor, lr: float, scale_lr: float) -> None:
        """One step against the gradients, each over its own root mean square so far."""
        self.moves += 1
        rates = (lr, scale_lr if self.movable else 0.0)
        for knob, gradient, moment, rate in zip(
            (self.offset, self.stretch), (offset, stretch), self.moments, rates, strict=True
        ):
            moment.lerp_(gradient.square(), 1 - MEMORY)
            size = (moment / (1 - MEMORY**self.moves)).sqrt_()
            knob.addcdiv_(gradient, size.clamp_(min=torch.finfo(size.dtype).tiny), value=-rate)
        self.offset.clamp_(-0.5, 0.5)

    def _now(self) -> Tensor:
        """The scales as they would be stored."""
        if not self.movable:
            return self.scale
        wanted = self.scale * (1 + self.stretch.detach())
        return snap(wanted, None, replace(self.scheme, zero="sym")).scale

    def decoded(self) -> Tensor:
        """The weights [N, K] that the knobs stand for, differentiable in them."""
        fixed = (self.scale, self._now(), self.zero, self.scheme)
        v = _StraightThrough.apply(self.w, self.base, self.offset, self.stretch, *fixed)  # type: ignore[no-untyped-call]
        return v.reshape(len(self.q.codes), -1)[:, : self.q.codes.shape[1]]

    def result(self) -> QTensor:
        """Codes and scales as they are now."""
        scale = self._now()
        place = _place(self.w, scale, self.zero, self.scheme) + self.base + self.offset.detach()
        codes = torch.round(place).clamp(*code_range(self.scheme)).to(code_dtype(self.scheme))
        codes = codes.reshape(len(self.q.codes), -1)[:, : self.q.codes.shape[1]].contiguous()
        s = self.q.scales
        return replace(self.q, codes=codes, scales=Scales(scale[..., 0], s.zero, s.outer, s.outer_zero))


def _place(w: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Where w lies among the codes, before rounding."""
    divisor = torch.where(scale == 0, 1.0, scale)
    return (w - zero) / divisor if scheme.zero == "min" else w / divisor + zero


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of no rounding, except where a code is clamped."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, base: Tensor, offset: Tensor, stretch: Tensor, start: Tensor,
        scale: Tensor, zero: Tensor, scheme: Scheme,
    ) -> Tensor:  # fmt: skip
        """The decoded weights [N, G, g]; `scale` is `start` stretched, as stored."""
        lo, hi = code_range(scheme)
        plain = _place(w, scale, zero, scheme)
        place = plain + base + offset
        codes = torch.round(place)
        inside = (codes >= lo) & (codes <= hi)
        codes.clamp_(lo, hi)
        if scheme.zero == "min":
            by_scale, decoded = codes, codes * scale + zero
        else:
            by_scale = codes - zero
            decoded, plain = by_scale * scale, plain - zero
        ctx.save_for_backward(by_scale - plain * inside, inside, scale, start)
        return decoded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """To offset and stretch; nothing else is tuned."""
        by_scale, inside, scale, start = ctx.saved_tensors
        stretch = (grad * by_scale).sum(-1, keepdim=True) * start
        return None, None, grad * scale * inside, stretch, None, None, None, None
