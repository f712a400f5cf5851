"""An evaluation in words: how much was lost, and what the figures cannot tell."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitwright.evaluation.evaluate import Evaluation


# Upper bound of mean KL in nats a token, and what that means for the model's use.
BANDS = (
    (0.01, "practically lossless"),
    (0.05, "very good"),
    (0.15, "good"),
    (0.5, "a noticeable loss"),
    (math.inf, "poor"),
)
ALONE = "Perplexity alone does not tell what was lost: give the original as --reference."


def band(kl: float) -> str:
    """The verdict on a mean KL; poor if it is not finite."""
    return next((words for below, words in BANDS if kl < below), BANDS[-1][1])


def verdict(found: "Sequence[Evaluation]") -> list[str]:
    """Sentences about texts evaluated together: one for each text and how to read them; none without a reference."""
    if any(one.kl_mean is None for one in found):
        return [ALONE]
    steps = [f"below {below:g} {words}" for below, words in BANDS[:-1]]
    scale = f"Mean KL in nats a token: {', '.join(steps)}; above, {BANDS[-1][1]}."
    return [*(_sentence(one, one.kl_mean) for one in found if one.kl_mean is not None), scale]


def _sentence(one: "Evaluation", kl: float) -> str:
    """The sentence about one text."""
    own = with_error(one.perplexity, one.perplexity_stderr, 2)
    theirs = with_error(one.reference_perplexity, one.reference_perplexity_stderr, 2)
    ratio = with_error(one.perplexity_ratio, one.perplexity_ratio_stderr, 4)
    return (
        f"{short_name(one.text)}, {one.tokens:,} tokens: {band(kl)}. Mean KL {with_error(kl, one.kl_stderr, 5)} nats a token; "
        f"perplexity {own}, the reference's {theirs} (ratio {ratio})."
    )


def with_error(value: float | None, error: float | None, digits: int) -> str:
    """A number and its standard error, if it has one."""
    if value is None:
        return "–"
    if error is None or not math.isfinite(error):
        return _written(value, digits)
    return f"{_written(value, digits)} ± {_written(error, digits)}"


def _written(number: float, digits: int) -> str:
    """A number of any size, such as a broken model's perplexity."""
    return f"{number:,.{digits}f}" if abs(number) < 1e6 else f"{number:.2e}"


def short_name(text: str, most: int = 24) -> str:
    """A text's name for a terminal: a file without its directory, a long one shortened in the middle."""
    name = Path(text).name
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"
