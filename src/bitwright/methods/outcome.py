"""What a rounding method returns: the quantized weight, and what the ledger must know about how it came to be."""

from dataclasses import dataclass

from torch import Tensor

from bitwright.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Outcome:
    """q: the quantized weight. damping: share of the mean diagonal added to the Gram; fallback: why less was done; missed: the
    energy of each row's error and of each row [N] float64, by the columns' importance, where the method came by them.
    """

    q: QTensor
    damping: float = 0.0
    fallback: str = ""
    missed: tuple[Tensor, Tensor] | None = None
