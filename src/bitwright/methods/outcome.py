"""What a rounding method returns: the quantized weight, and what the ledger records of it."""

from dataclasses import dataclass

from torch import Tensor

from bitwright.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Outcome:
    """What a method returns.

    q         the quantized weight
    damping   share of the mean diagonal that was added to the Gram
    fallback  what was done instead of what was asked, and why; "" if nothing
    energies  energy of each row's error and of each row, both [N] float64 (see numerics/loss.py), if the method computed them
    """

    q: QTensor
    damping: float = 0.0
    fallback: str = ""
    energies: tuple[Tensor, Tensor] | None = None
