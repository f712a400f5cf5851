"""The records that `compare` fills in and its page shows: the float original, and each candidate."""

import math
from dataclasses import dataclass, field

from bitwright.errors import NumericsError

UNIFORM, MIX, RECIPE = "scheme", "mix", "recipe"  # kinds of candidates


@dataclass(frozen=True)
class Original:
    """The float original: the size and perplexity that candidates are compared with. Its KL is 0."""

    scheme: str  # "bfloat16"
    bits_per_weight: float
    bytes: int
    perplexity: float
    perplexity_stderr: float


@dataclass(frozen=True)
class Candidate:
    """The result of one method at one scheme. KL in nats a token; errors are standard errors, NaN if unknown.

    statistics  "one-shot" (from the float model), "sequential" (each block's behind the quantized blocks before) or "none"
    seconds     without the shared calibration pass
    losses      relative output loss by module name
    kind        UNIFORM (`scheme` for all matrices), MIX (llama.cpp's, of that name) or RECIPE (a file of that name)
    given       by module name: its scheme, and bits a weight
    Raises NumericsError for an impossible number: a size of 0, a negative KL.
    """

    scheme: str
    method: str
    statistics: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    perplexity_stderr: float
    kl_mean: float
    kl_stderr: float
    kl_p999: float
    top1: float
    seconds: float
    peak_rss_bytes: int
    losses: dict[str, float]
    fallbacks: int
    kind: str = UNIFORM
    given: dict[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("bits_per_weight", "bytes", "perplexity", "kl_mean", "seconds", "peak_rss_bytes"):
            value, sized = getattr(self, name), name in ("bits_per_weight", "bytes")
            if value < 0 or (sized and not 0 < value < math.inf):
                remedy = "run the comparison again with --restart"
                raise NumericsError(f"{name} is {value}", where=f"{self.scheme} {self.method}", remedy=remedy)
