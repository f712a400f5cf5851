"""A temperature for the logits: one factor on the last norm, chosen on the calibration text within a bound on KL.

A factor s on all logits is temperature scaling (Guo et al. 2017, arXiv:1706.04599), and costs nothing where the last norm takes
it in. Rounding leaves predictions less sure, or surer, than the float model's, and most models are surer than what they read
allows. In s, KL to the float model is a parabola, lowest near 1, while −log p of the text is nearly a line there: a little of
one buys much of the other. `budget` says how much: a share of the KL that rounding cost.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import copysign, inf, sqrt

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.models.skeleton import Skeleton

STEP = 0.01  # how far from 1 the two other factors lie that are tried
TOKENS = 16384  # are enough for one number
LOGITS_AT_ONCE = 1 << 24
PROOF = 2.0  # a power of two: only a norm that multiplies otherwise moves the digits
Three = tuple[float, float, float]  # a mean over tokens at the factors 1 − STEP, 1 and 1 + STEP


def with_output_temperature(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    tokens: Tensor,
    budget: float,
) -> dict[str, Tensor]:
    """The vectors between the last block and the logits, times the factor that is chosen; float32.

    weights  the float parameters outside the blocks, by name; rounded: those of them that were rounded, as they are decoded
    streams  what the last block gives, as rounded and in float, for the tokens [S, T]: batches [B, T, H]
    budget   how much KL may rise above the least that a factor can make it, as a share of that. An embedding that is the head
             is rounded last, so the streams do not know of that: it will blur what they show
    Raises RecipeError where no such vectors make the logits larger, as under a soft cap.
    """
    vectors = [name for name in skeleton.outer_names() if name in weights and weights[name].ndim == 1]
    offset = _offset(skeleton, weights, vectors, states[0][0][:1])
    both = skeleton.embedding_name == skeleton.head_name
    s = factor(*_costs(skeleton, weights, {**weights, **rounded}, states, tokens), budget, blurs=both)
    return {name: (weights[name].float() + offset) * s - offset for name in vectors}


def factor(kl: Three, loss: Three, budget: float, *, blurs: bool = False) -> float:
    """The factor that makes −log p (loss) least among those that cost no more than the budget of KL.

    blurs: more rounding than these figures know of will make the model less sure: KL counts as least at 1 or above.
    """
    least, flat = kl[1], (kl[0] + kl[2] - 2 * kl[1]) / STEP**2
    nearest = (kl[0] - kl[2]) / (2 * STEP * flat)  # less 1: where KL is least
    least -= flat * nearest**2 / 2
    nearest = max(nearest, 0.0) if blurs else nearest
    room = sqrt(2 * budget * least / flat)
    slope, bend = (loss[2] - loss[0]) / (2 * STEP), (loss[0] + loss[2] - 2 * loss[1]) / STEP**2
    wanted = -slope / bend if bend > 0 else -copysign(inf, slope)
    return 1 + min(max(wanted, nearest - room), nearest + room)


def _costs(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    tokens: Tensor,
) -> tuple[Three, Three]:
    """KL(float ‖ rounded) and −log p of the tokens, both means, at the three factors."""
    sums, count = torch.zeros(2, 3, dtype=torch.float64), 0
    at_once = max(1, LOGITS_AT_ONCE // skeleton.config.get_text_config().vocab_size)
    for x, original, targets in _pieces(states, tokens, at_once):
        skeleton.load(dict(weights))
        log_p = skeleton.head(original[None])[0].log_softmax(-1)
        skeleton.load(dict(rounded))
        logits = skeleton.head(x[None])[0]
        for i, s in enumerate((1 - STEP, 1.0, 1 + STEP)):
            log_q = (logits * s).log_softmax(-1)
            sums[0, i] += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            sums[1, i] -= log_q.gather(-1, targets[:, None]).sum()
        count += len(targets)
    skeleton.unload_outside()
    (a, b, c), (d, e, f) = (sums / count).tolist()
    return (a, b, c), (d, e, f)


def _pieces(
    states: tuple[Sequence[Tensor], Sequence[Tensor]], tokens: Tensor, at_once: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both streams [n, H] and the next tokens [n], some at a time, until there were enough."""
    begin = 0
    for given, original in zip(*states, strict=True):
        targets = tokens[begin : begin + len(given), 1:].flatten()
        both = (t[:, :-1].flatten(0, 1) for t in (given, original))
        yield from zip(*(t.split(at_once) for t in (*both, targets)), strict=True)
        begin += len(given)
        if begin * tokens.shape[1] >= TOKENS:
            return


def _offset(skeleton: Skeleton, weights: Mapping[str, Tensor], vectors: list[str], hidden: Tensor) -> float:
    """0, or 1 for norms that multiply by 1 + weight (Gemma): by trying which one doubles the logits."""
    skeleton.load(dict(weights))
    plain = skeleton.head(hidden)
    for offset in (0.0, 1.0):
        skeleton.load({name: (weights[name].float() + offset) * PROOF - offset for name in vectors})
        if torch.allclose(skeleton.head(hidden), PROOF * plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            return offset
    remedy = "leave out temper"
    raise RecipeError("no factor on the last norm multiplies this model's logits", where="temper", remedy=remedy)
