"""AutoRound: choose the codes of a block's matrices together, by gradient descent on the block's output error.

After Cheng et al. 2023 (SignRound, arXiv:2309.05516). Every weight has a variable V in [−½, ½] that is added before
rounding, and every group a variable stretch of its scale. Gradients pass straight through the rounding (straight-through
estimator); step sizes fall linearly to 0. The loss is the squared difference between the output of the quantized block
on what the quantized blocks before give, and that of the float block on the float model's activations, relative to the
latter's size token by token. So a block also makes up for the errors of the blocks before it.

Three differences from the paper. Steps follow the gradient divided by its root mean square (as in RMSprop) rather than its
sign: steps of the same size on average, with less noise where a gradient is near 0. The start is GPTAQ's result rather than
the nearest codes: `base` moves each weight well inside the interval that rounds to its GPTAQ code, so that V = 0 is that
result. And of start and end the better on a sample of the inputs is kept, so that tuning never makes a block worse.
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
from bitwright.numerics.codec import code_dtype, code_range, decode, group_view, pairwise_sum, safe, snap
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TENSOR, Scheme
from bitwright.system import distributed

MEMORY = 0.95  # decay of the running mean of squared gradients, a step
INSIDE = (
    0.4  # most codes between a weight and its code at the start: a code of GPTAQ's must not flip back at the first step
)
WALK = 0.11  # default lr times √iterations: how far a random walk takes V
JUDGED = 32  # windows, or somewhat more, on which end and start are compared
Forward = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """Options of the tuning.

    iterations  steps
    windows     calibration windows in a step, of each process that works on it
    lr          first step of V, falling linearly to 0; None: 0.11 / √iterations (a random walk over a tenth of V's range)
    scale_lr    the same for the relative stretch of scales
    seed        of the order in which windows are drawn
    Raises RecipeError for a number out of range.
    """

    iterations: int = 200
    windows: int = 1
    lr: float | None = None
    scale_lr: float = 0.001
    seed: int = 0

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Options":
        """The tuning options among a method's options; the others are GPTAQ's."""
        return cls(**{name: value for name, value in options.items() if name in cls.__dataclass_fields__})

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.windows < 1 or self.scale_lr < 0 or (self.lr is not None and self.lr <= 0):
            found = f"iterations {self.iterations}, windows {self.windows}, lr {self.lr}, scale_lr {self.scale_lr}"
            remedy = "options = { iterations = 200, windows = 8, lr = 0.005 }"
            message = f"{found}: iterations and scale_lr must be at least 0, windows and lr must be above 0"
            raise RecipeError(message, remedy=remedy)


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
    pruned: Tensor | None = None,
    fast: bool = False,
) -> Outcome:
    """The start of AutoRound: GPTAQ's result for one matrix. `tune` goes on from there, block by block.

    w, gram, drift, residual, pruned, fast: as for `gptaq`; the other options: see `Options`. Raises RecipeError for a codebook.
    """
    Options(iterations, windows, lr, scale_lr, seed)
    if scheme.levels.levels is not None:
        remedy = "give int2 to int8, or --method gptaq"
        raise RecipeError(f"autoround tunes integer codes, not {scheme.grid}", remedy=remedy)
    return gptaq(w, gram, scheme, drift=drift, residual=residual, pruned=pruned, fast=fast)


def tune(
    forward: Forward,
    inputs: Tensor,
    targets: Tensor,
    weights: dict[str, Tensor],
    start: dict[str, QTensor],
    how: Options,
    pruned: dict[str, Tensor] | None = None,
) -> dict[str, QTensor]:
    """Tune codes and scales of a block's matrices; the start where the end is no better.

    forward          (decoded weights by name, x [B, T, H]) -> the block's output [B, T, H], differentiable in the weights
    inputs, targets  [S, T, H]: inputs of the quantized block; outputs of the float block on the float model's activations.
                     Decoded weights are of their float type
    weights, start   the float matrices [N, K] by name; what they were quantized to
    pruned           masks [N, K] by name: where weights stay 0, as they are in `weights` and `start`
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
        gradients = tuple(distributed.total(gradient) for gradient in gradients)  # steps ask for their directions only
        left = (1 - step / how.iterations) * (1 - MEMORY ** (step + 1)) ** 0.5  # bias correction, as in Adam
        for (name, k), gradient in zip(variables.items(), gradients, strict=True):
            if pruned and name in pruned:
                gradient = gradient.masked_fill(pruned[name], 0.0)
            move(k, gradient, rate=left * (how.lr or WALK / how.iterations**0.5), scale_rate=left * how.scale_lr)
    end = {name: result(variables[name], q) for name, q in start.items()}
    before, after = (_error(forward, inputs, targets, q, how.windows) for q in (start, end))
    return end if after < before else start


def _sizes(targets: Tensor) -> Tensor:
    """The root mean square of each token [S, T, 1], by which its error is divided: the next reader of a block's output is a
    norm, and a token with massive activations (arXiv:2402.17762) must not outweigh all others.
    """
    return targets.float().square().mean(-1, keepdim=True).sqrt_().clamp_(min=torch.finfo(torch.float32).tiny)


def _draws(windows: int, how: Options) -> Iterator[Tensor]:
    """Indices of each step's windows: all in turn, shuffled anew for each pass."""
    generator = torch.Generator().manual_seed(how.seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(how.iterations):
        if len(order) < how.windows:
            order = torch.cat([order, torch.randperm(windows, generator=generator)])
        yield order[: how.windows].sort().values
        order = order[how.windows :]


@torch.no_grad()
def _error(forward: Forward, inputs: Tensor, targets: Tensor, q: dict[str, QTensor], windows: int) -> float:
    """The loss of quantized matrices on a sample of the inputs, as many windows at a time as in a step."""
    decoded = {name: decode(replace(one, shape=tuple(one.codes.shape))).to(inputs.dtype) for name, one in q.items()}
    parts = zip(inputs.split(windows), targets.split(windows), strict=True)
    judged = islice(parts, 0, None, max(1, len(inputs) // JUDGED))
    shares = ((forward(decoded, x) - y).float() / _sizes(y) for x, y in judged)
    own = sum(float(share.square().sum(dtype=torch.float64)) for share in shares)
    return float(distributed.total(torch.tensor(own, dtype=torch.float64)))


def variables_of(w: Tensor, q: QTensor, dtype: torch.dtype) -> RoundingVariables:
    """Variables that stand for q, each weight well inside the interval that rounds to its code; decoded weights of `dtype`."""
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
    """One step against the gradient [N, K] by the decoded weights (None: no step); then decode anew.

    Every variable moves by rate · gradient / its running root mean square. Rounding has derivative 1, and 0 where a code
    is clamped.
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
    """From the gradient by the decoded weights [N, G, g] those by offset [N, G, g] and stretch [N, G]."""
    (by, inside), (plain, _) = _rounded(k), _places(k)
    to_stretch = pairwise_sum(gradient * (by - torch.where(inside, plain, 0.0))) * k.start
    return torch.where(inside, gradient * k.scale[..., None], 0.0), to_stretch


def _follow(variable: Tensor, gradient: Tensor, square: Tensor, rate: float) -> None:
    """A step against the gradient over its running root mean square, operation by operation as in native code."""
    square += (gradient * gradient - square) * (1 - MEMORY)
    size = square.double().sqrt_().float()  # torch's float32 square root is not always correctly rounded
    variable -= gradient / size.clamp_(min=torch.finfo(size.dtype).tiny) * rate


def _places(k: RoundingVariables) -> tuple[Tensor, Tensor]:
    """w / scale (over its minimum, where there is one), before any offset [N, G, g]; and the integer zero point."""
    w, divisor = group_view(k.w, k.scheme), safe(k.scale)[..., None]
    zero = torch.zeros(()) if k.zero is None else k.zero[..., None]
    if k.scheme.zero == "min":
        return (w - zero) / divisor, torch.zeros(())
    return w / divisor, zero


def _rounded(k: RoundingVariables) -> tuple[Tensor, Tensor]:
    """Codes minus the integer zero point [N, G, g], which multiply the scales; and which codes are not clamped."""
    (plain, zero), (lo, hi) = _places(k), code_range(k.scheme)
    codes = torch.round(plain + zero + group_view(k.base + k.offset, k.scheme))
    return codes.clamp(lo, hi) - zero, (codes >= lo) & (codes <= hi)


def _matrix(grouped: Tensor, like: Tensor) -> Tensor:
    """[N, G, g] -> [N, K] without padding: undoes `group_view`."""
    return grouped.reshape(len(like), -1)[:, : like.shape[1]].contiguous()


def result(k: RoundingVariables, start: QTensor) -> QTensor:
    """The quantized matrix that the variables stand for. Raises SchemeError if gradients were not finite."""
    snap(k.scale, None, replace(k.scheme, zero="sym"))
    by, _ = _rounded(k)
    codes = _matrix(by + _places(k)[1], k.w).to(code_dtype(k.scheme))
    return replace(start, codes=codes, scales=replace(start.scales, scale=k.scale))
