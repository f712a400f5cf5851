"""What a rounding method returns: the quantized weight, and what the ledger must know about how it came to be."""

from dataclasses import dataclass

from bitwright.qtensor import QTensor


@dataclass(frozen=True)
class Outcome:
    """q: the quantized weight. damping: share of the mean diagonal added to the Gram; fallback: why less was done."""

    q: QTensor
    damping: float = 0.0
    fallback: str = ""
