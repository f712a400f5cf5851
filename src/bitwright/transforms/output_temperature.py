"""Output temperature: one factor on all logits, chosen on the calibration text within a bound on KL, folded into the last norm.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599) costs nothing at run time where the last norm's weight takes the factor
s in. Quantization makes predictions less or more confident than the float model's, and most models are overconfident. As
functions of s, KL to the float model is a parabola with its minimum near 1, while −log p of the text is nearly a line there: a
small rise of KL buys a large fall of −log p. `budget` bounds the rise, as a share of the least KL.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import copysign, inf, sqrt

import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.models.skeleton import Skeleton
from bitwright.system import distributed

STEP = 0.01  # distance from 1 of the two other factors that are measured
TOKENS = 16384  # most tokens measured on
LOGITS_AT_ONCE = 1 << 24
PROOF = 2.0  # test factor; a power of two changes no mantissas
Three = tuple[float, float, float]  # a mean over tokens at the factors 1 − STEP, 1 and 1 + STEP


def with_output_temperature(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    tokens: Tensor,
    budget: float,
) -> dict[str, Tensor]:
    """The weight vectors between the last block and the logits (the last norm), times the chosen factor; float32.

    weights  float parameters outside the blocks, by name; rounded: the quantized ones among them, decoded
    states   outputs of the last block, quantized model's and float model's, for the tokens [S, T]: batches [B, T, H]
    budget   how much KL may rise above its least over all factors, as a share of that
    Raises RecipeError where a factor on these vectors does not multiply the logits, as under a soft cap.
    """
    vectors = [name for name in skeleton.outer_names() if name in weights and weights[name].ndim == 1]
    offset = _offset(skeleton, weights, vectors, states[0][0][:1])
    both = skeleton.embedding_name == skeleton.head_name
    s = factor(*_costs(skeleton, weights, {**weights, **rounded}, states, tokens), budget, blurs=both)
    return {name: (weights[name].float() + offset) * s - offset for name in vectors}


def factor(kl: Three, loss: Three, budget: float, *, blurs: bool = False) -> float:
    """The factor of least −log p (loss) for which KL stays within the budget; by parabolas through the three points.

    blurs: the embedding is the head too, and its rounding, not yet in these figures, will make predictions less confident:
    the factor of least KL is taken to be 1 at least.
    """
    least, curvature = kl[1], (kl[0] + kl[2] - 2 * kl[1]) / STEP**2
    nearest = (kl[0] - kl[2]) / (2 * STEP * curvature)  # factor of least KL, minus 1
    least -= curvature * nearest**2 / 2
    nearest = max(nearest, 0.0) if blurs else nearest
    allowed = sqrt(2 * budget * least / curvature)
    slope, bend = (loss[2] - loss[0]) / (2 * STEP), (loss[0] + loss[2] - 2 * loss[1]) / STEP**2
    wanted = -slope / bend if bend > 0 else -copysign(inf, slope)
    return 1 + min(max(wanted, nearest - allowed), nearest + allowed)


def _costs(
    skeleton: Skeleton,
    weights: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    tokens: Tensor,
) -> tuple[Three, Three]:
    """Mean KL(float ‖ quantized) and mean −log p of the tokens, in nats, at the three factors."""
    sums, count = torch.zeros(2, 3, dtype=torch.float64), 0
    at_once = max(1, LOGITS_AT_ONCE // skeleton.config.get_text_config().vocab_size)
    for x, original, targets in _pieces(states, tokens, at_once):
        skeleton.load(dict(weights))
        log_p = skeleton.head(original[None])[0].log_softmax(-1)
        skeleton.load(dict(rounded))
        logits = skeleton.head(x[None])[0]
        for i, s in enumerate((1 - STEP, 1.0, 1 + STEP)):
            log_q = (logits * s).log_softmax(-1)
            sums[0, i] += torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).cpu()
            sums[1, i] -= log_q.gather(-1, targets[:, None].to(log_q.device)).sum().cpu()
        count += len(targets)
    skeleton.unload_outside()
    whole = distributed.total(sums) / distributed.total(torch.tensor(count))
    (a, b, c), (d, e, f) = whole.tolist()
    return (a, b, c), (d, e, f)


def _pieces(
    states: tuple[Sequence[Tensor], Sequence[Tensor]], tokens: Tensor, at_once: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states of both models [n, H] and the next tokens [n], piece by piece, up to `TOKENS`."""
    begin = 0
    for given, original in zip(*states, strict=True):
        targets = tokens[begin : begin + len(given), 1:].flatten()
        both = (t[:, :-1].flatten(0, 1) for t in (given, original))
        yield from zip(*(t.split(at_once) for t in (*both, targets)), strict=True)
        begin += len(given)
        if begin * tokens.shape[1] >= TOKENS:
            return


def _offset(skeleton: Skeleton, weights: Mapping[str, Tensor], vectors: list[str], hidden: Tensor) -> float:
    """0, or 1 for norms that multiply by 1 + weight (Gemma): whichever lets the logits be doubled."""
    skeleton.load(dict(weights))
    plain = skeleton.head(hidden)
    for offset in (0.0, 1.0):
        skeleton.load({name: (weights[name].float() + offset) * PROOF - offset for name in vectors})
        if torch.allclose(skeleton.head(hidden), PROOF * plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max())):
            return offset
    remedy = "leave temper out of the recipe"
    raise RecipeError("no factor on the last norm multiplies this model's logits", where="temper", remedy=remedy)
