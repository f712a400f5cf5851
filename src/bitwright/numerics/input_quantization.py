"""What an engine does to the inputs of a quantized layer before it multiplies: rotate, round, keep some channels in float."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.codec import rounded
from bitwright.numerics.hadamard import hadamard
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme


@dataclass(frozen=True)
class InputQuantization:
    """In this order:

    rotate    block length of an online Hadamard rotation (QuaRot, arXiv:2404.00456), whose inverse is in the weights; 0: none
    outliers  channels [k] that stay in float, and do not count for the range of the others (LLM.int8(), arXiv:2208.07339)
    scheme    what the inputs are rounded to, per token or per tensor; None: they stay in float
    scales    fixed by calibration (static); None: from each input's own range (dynamic)
    """

    scheme: Scheme | None = None
    scales: Scales | None = None
    outliers: Tensor | None = None
    rotate: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as it enters the product."""
        x = hadamard(x, self.rotate) if self.rotate else x
        if self.scheme is None:
            return x
        if self.outliers is None:
            return rounded(x, self.scheme, self.scales)
        spared = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        spared[self.outliers] = True
        return torch.where(spared, x, rounded(x.masked_fill(spared, 0), self.scheme, self.scales))
