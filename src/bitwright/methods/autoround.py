"""AutoRound: choose the codes of a whole block by gradient on the block's output.

After Cheng et al. 2023 (SignRound, arXiv:2309.05516). Every weight gets an offset V in [−½, ½] before rounding and every
group a stretch of its scale; gradients pass straight through the rounding, and are followed in steps of one size, that
shrinks to nothing. What is minimised is the squared difference between the rounded block's output and the float
block's, each on the inputs that it would really get, as a share of the float one token by token; so a block also makes up
for what the blocks before it lost.

Three things are done otherwise than in the paper. Not the sign of a gradient is followed but the gradient over its own
root mean square: steps of the same size on average, and less noise where a sign means nothing. The start is GPTAQ's
result rather than the nearest codes: `base` moves each weight towards the middle of the interval that rounds to its
code, so V = 0 *is* that start. And the better of start and end, on a sample of the inputs, is kept, so that tuning does
not make a block worse.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.kernels import rounding
from bitwright.kernels.rounding import RoundingVariables
from bitwright.methods.gptaq import gptaq
from bitwright.methods.outcome import Outcome
from bitwright.numerics.codec import code_dtype, code_range, decode, folded, group_view, safe, snap
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TENSOR, Scheme

MEMORY = 0.95  # of a gradient's mean square, from step to step
INSIDE = 0.4  # how far from its code a weight may start: what GPTQ moved must not fall back at the first step
WALK = 0.11  # first step of offsets times the root of the number of steps: how far chance alone takes one
JUDGED = 32  # windows, or somewhat more, on which the end is compared with the start
Forward = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """iterations: steps; windows: calibration windows in a step; lr: first step of V, falling to 0 (None: so that
    chance alone takes V a tenth of its range); scale_lr: the same for the relative stretch of scales; seed: of the draw.
    """

    iterations: int = 200
    windows: int = 1
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
    drift: Tensor | None = None,
    residual: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """Where tuning starts: GPTAQ's result. `tune` does the rest, on a block.

    w, gram, drift, residual as for `gptaq`; the other options are those of `Options`. Raises RecipeError for a grid that is
    not of integers.
    """
    Options(iterations, windows, lr, scale_lr, seed)
    if scheme.levels.levels is not None:
        raise RecipeError(f"autoround tunes integer codes, not {scheme.grid}", remedy="int2 to int8, or method gptaq")
    return gptaq(w, gram, scheme, drift=drift, residual=residual, fast=fast)


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
    inputs, targets  [S, T, H]: what the rounded block is given, and what the float block made of the float inputs; the
                     decoded weights are of their type
    weights          the float matrices [N, K] by name; start: what they were rounded to
    """
    if how.iterations == 0:
        return start
    how = replace(how, windows=min(how.windows, len(inputs)))
    variables = {name: variables_of(weights[name], q, inputs.dtype) for name, q in start.items()}
    sizes = _sizes(targets)
    for step, some in enumerate(_draws(len(inputs), how)):
        missed = forward({name: k.decoded for name, k in variables.items()}, inputs[some]) - targets[some]
        error = (missed.float() / sizes[some]).square().mean()
        gradients = torch.autograd.grad(error, [k.decoded for k in variables.values()])
        left = (1 - step / how.iterations) * (1 - MEMORY ** (step + 1)) ** 0.5  # a young running mean is too small
        for k, gradient in zip(variables.values(), gradients, strict=True):
            move(k, gradient, rate=left * (how.lr or WALK / how.iterations**0.5), scale_rate=left * how.scale_lr)
    end = {name: result(variables[name], q) for name, q in start.items()}
    before, after = (_error(forward, inputs, targets, q, how.windows) for q in (start, end))
    return end if after < before else start


def _sizes(targets: Tensor) -> Tensor:
    """The root mean square of each token [S, T, 1]: what reads a block's output is a norm, so an error counts by its share of
    it, and a token with a massive activation (arXiv:2402.17762) as any other.
    """
    return targets.float().square().mean(-1, keepdim=True).sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)


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
def _error(forward: Forward, inputs: Tensor, targets: Tensor, q: dict[str, QTensor], windows: int) -> float:
    """The squared difference of outputs over a sample of the inputs, as many windows at a time as in a step."""
    decoded = {name: decode(replace(one, shape=tuple(one.codes.shape))).to(inputs.dtype) for name, one in q.items()}
    parts = zip(inputs.split(windows), targets.split(windows), strict=True)
    judged = islice(parts, 0, None, max(1, len(inputs) // JUDGED))
    shares = ((forward(decoded, x) - y).float() / _sizes(y) for x, y in judged)
    return sum(float(share.square().sum(dtype=torch.float64)) for share in shares)


def variables_of(w: Tensor, q: QTensor, dtype: torch.dtype) -> RoundingVariables:
    """Rounding variables that stand for q, each weight well inside the interval that rounds to its code; decoded as `dtype`."""
    scheme, w = q.scheme, w.float().contiguous()
    scale, zero = q.scales.scale.contiguous(), None if q.scales.zero is None else q.scales.zero.contiguous()
    movable = scheme.scale in ("f32", "f16", "bf16") and scheme.group != TENSOR
    offset, square, stretch, stretch_square = (torch.zeros_like(x) for x in (w, w, scale, scale))
    decoded = torch.empty_like(w, dtype=dtype).requires_grad_()
    k = RoundingVariables(
        scheme, w, offset, offset, square, scale, scale.clone(), stretch, stretch_square, zero, decoded, movable
    )
    plain, integer = _places(k)
    place = plain + integer
    codes, (lo, hi) = group_view(q.codes.float(), scheme), code_range(scheme)
    low = torch.where(codes == lo, -torch.inf, codes - INSIDE)
    high = torch.where(codes == hi, torch.inf, codes + INSIDE)
    k = replace(k, base=_matrix(torch.clamp(place, low, high) - place, w))
    move(k, None)
    return k


@torch.no_grad()
def move(k: RoundingVariables, gradient: Tensor | None, *, rate: float = 0.0, scale_rate: float = 0.0) -> None:
    """One step against the gradient [N, K] of the decoded weights, if there is one; then decode anew.

    Every knob moves by its gradient over that gradient's root mean square so far, times its rate. Rounding counts as if
    it were none, except where a code is clamped.
    """
    if rounding.handles(k.scheme, k.w):
        rounding.tune(k, gradient, rate=rate, scale_rate=scale_rate, fresh=1 - MEMORY)
        return
    if gradient is not None:
        _move(k, group_view(gradient.float(), k.scheme), rate, scale_rate)
    by, _ = _rounded(k)
    decoded = by * k.scale[..., None]
    if k.zero is not None and k.scheme.zero == "min":
        decoded += k.zero[..., None]
    k.decoded.copy_(_matrix(decoded, k.w))


def _move(k: RoundingVariables, gradient: Tensor, rate: float, scale_rate: float) -> None:
    """The step itself; gradient [N, G, g]."""
    to_offset, to_stretch = _slopes(k, gradient)
    _follow(k.offset, _matrix(to_offset, k.w), k.square, rate)
    k.offset.clamp_(-0.5, 0.5)
    if k.movable:
        _follow(k.stretch, to_stretch, k.stretch_square, scale_rate)
        k.scale.copy_(snap(k.start * (1 + k.stretch), None, replace(k.scheme, zero="sym")).scale)


def _slopes(k: RoundingVariables, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of the decoded weights [N, G, g] those of offset [N, G, g] and stretch [N, G]."""
    (by, inside), (plain, _) = _rounded(k), _places(k)
    to_stretch = folded(gradient * (by - torch.where(inside, plain, 0.0))) * k.start
    return torch.where(inside, gradient * k.scale[..., None], 0.0), to_stretch


def _follow(knob: Tensor, gradient: Tensor, square: Tensor, rate: float) -> None:
    """A step against the gradient over its root mean square: one operation at a time, as native code does it."""
    square += (gradient * gradient - square) * (1 - MEMORY)
    size = square.double().sqrt_().float()  # torch's root of a float32 is not always the nearest number
    knob -= gradient / size.clamp_(min=torch.finfo(size.dtype).tiny) * rate


def _places(k: RoundingVariables) -> tuple[Tensor, Tensor]:
    """Where the weights lie among the codes before any offset [N, G, g]: w over its scale, and the integer zero point."""
    w, divisor = group_view(k.w, k.scheme), safe(k.scale)[..., None]
    zero = torch.zeros(()) if k.zero is None else k.zero[..., None]
    if k.scheme.zero == "min":
        return (w - zero) / divisor, torch.zeros(())
    return w / divisor, zero


def _rounded(k: RoundingVariables) -> tuple[Tensor, Tensor]:
    """What multiplies the scales: codes less the integer zero point [N, G, g]; and which codes are not clamped."""
    (plain, zero), (lo, hi) = _places(k), code_range(k.scheme)
    codes = torch.round(plain + zero + group_view(k.base + k.offset, k.scheme))
    return codes.clamp(lo, hi) - zero, (codes >= lo) & (codes <= hi)


def _matrix(grouped: Tensor, like: Tensor) -> Tensor:
    """[N, G, g] -> [N, K] without padding: the way back from `group_view`."""
    return grouped.reshape(len(like), -1)[:, : like.shape[1]].contiguous()


def result(k: RoundingVariables, start: QTensor) -> QTensor:
    """Codes and scales as they are now. Raises SchemeError if the gradients were not finite."""
    snap(k.scale, None, replace(k.scheme, zero="sym"))
    by, _ = _rounded(k)
    codes = _matrix(by + _places(k)[1], k.w).to(code_dtype(k.scheme))
    return replace(start, codes=codes, scales=replace(start.scales, scale=k.scale))
