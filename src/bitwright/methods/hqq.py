"""HQQ: tune each group's float minimum by an error norm that is robust to outliers; no calibration.

Badri & Shaji 2023 (half-quadratic quantization): minimise Σ |w − decoded|ᵖ with p < 1 over the offset of each group. With an
auxiliary error e it splits into two steps that are solved in closed form,

    e = shrink(w − decoded, β),   shrink(x, β) = sign(x) · max(0, |x| − |x|ᵖ⁻¹ / β)
    m = mean over the group of w − e − s c

and β grows from step to step. Here the best offset of all steps is kept, by the norm itself after rounding to its encoding.
"""

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.outcome import Outcome
from bitwright.numerics.codec import encode, group_view, raw_scales, round_to, snap
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme


def hqq(
    w: Tensor,
    gram: Tensor | None,
    scheme: Scheme,
    *,
    norm: float = 0.7,
    steps: int = 20,
    beta: float = 10.0,
    growth: float = 1.01,
) -> Outcome:
    """Round w [N, K] (or [N, ...]) to nearest under tuned minima.

    norm p, steps, β's start (in units of 1 / scale) and growth as in the paper; the Gram is not used.
    Raises RecipeError for a scheme without a float minimum (an integer zero point would hardly ever move by a whole step),
    and for options out of range.
    """
    if scheme.zero != "min":
        raise RecipeError(
            f"hqq tunes float minima, and {scheme} has none", remedy="a min scheme such as q4_1, or method search"
        )
    if not 0 < norm <= 1 or steps < 0 or beta <= 0 or growth < 1:
        raise RecipeError("norm must be in (0, 1], beta above 0, growth at least 1", remedy="such as 0.7, 10 and 1.01")
    matrix = w.reshape(w.shape[0], -1).float()
    v = group_view(matrix, scheme)
    real = group_view(torch.ones_like(matrix[:1]), scheme)  # 0 where a short last group was padded
    found = snap(*raw_scales(v, matrix.shape[1], scheme), scheme)
    best, least = found, _lost(v, found, scheme, norm, real)
    for step in range(steps):
        found = _moved(v, found, scheme, norm, beta * growth**step, real)
        lost = _lost(v, found, scheme, norm, real)
        better = lost < least
        least = torch.where(better, lost, least)
        assert best.zero is not None and found.zero is not None
        best = Scales(best.scale, torch.where(better, found.zero, best.zero), best.outer, best.outer_zero)
    return Outcome(encode(w, snap(best.scale, best.zero, scheme), scheme))


def _lost(v: Tensor, s: Scales, scheme: Scheme, norm: float, real: Tensor) -> Tensor:
    """Σ |v − decoded|ᵖ of each group."""
    return ((v - _decoded(v, s, scheme)[1]).abs().pow(norm) * real).sum(-1)


def _decoded(v: Tensor, s: Scales, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and decoded weights by groups."""
    return round_to(v, s.scale[..., None], None if s.zero is None else s.zero[..., None], scheme)


def _moved(v: Tensor, s: Scales, scheme: Scheme, norm: float, beta: float, real: Tensor) -> Scales:
    """One half-quadratic step: a new offset for codes as they are."""
    codes, decoded = _decoded(v, s, scheme)
    scale = torch.where(s.scale == 0, 1.0, s.scale)[..., None]
    x = (v - decoded) / scale
    error = x.sign() * (x.abs() - x.abs().clamp(min=1e-8).pow(norm - 1) / beta).clamp(min=0) * scale
    zero = ((v - error - codes * scale) * real).sum(-1) / real.sum(-1)
    return snap(s.scale, zero.clamp(max=0), scheme)
