"""What an engine does to the inputs of a quantized layer before it multiplies: rotate, round, keep some channels in float."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.codec import fit, group_view, rounded, safe, snap
from bitwright.numerics.hadamard import hadamard
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme


@dataclass(frozen=True)
class InputQuantization:
    """In this order:

    rotate     block length of an online Hadamard rotation (QuaRot, arXiv:2404.00456), whose inverse is in the weights; 0: none
    outliers   channels [k] that stay in float, and do not count for the range of the others (LLM.int8(), arXiv:2208.07339)
    threshold  magnitude from which a value puts its channel among those for this call (LLM.int8(), as well); 0: none does
    scheme     what the inputs are rounded to: by token, in groups along K, or as a whole tensor; None: they stay in float
    scales     fixed by calibration (static); None: from each input's own range (dynamic)
    upper      magnitude at which ranges end that come from the input itself (FBGEMM): larger values become it; None: none do
    outer      [1, 1], the divisor of dynamic scales in e4m3, fixed by calibration (NVFP4's input_global_scale)
    """

    scheme: Scheme | None = None
    scales: Scales | None = None
    outliers: Tensor | None = None
    rotate: int = 0
    threshold: float = 0.0
    outer: Tensor | None = None
    upper: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] as it enters the product."""
        return self.round(hadamard(x, self.rotate) if self.rotate else x)

    def round(self, x: Tensor) -> Tensor:
        """The same of inputs that are rotated already."""
        if self.scheme is None:
            return x
        matrix = x.reshape(-1, x.shape[-1]).float()
        matrix = matrix if self.upper is None else matrix.clamp(-self.upper, self.upper)
        spared = torch.zeros(matrix.shape[1], dtype=torch.bool, device=x.device)
        if self.outliers is not None:
            spared[self.outliers.to(x.device)] = True
        loud = matrix.abs() >= self.threshold if self.threshold else None
        counted = matrix.masked_fill(spared, 0) if loud is None else matrix.masked_fill(loud, 0)
        outer = None if self.outer is None else self.outer.to(x.device)
        scales = dynamic_scales(counted, self.scheme, outer) if self.scales is None else self.scales.to(x.device)
        spared = spared if loud is None else spared | loud.any(0)
        found = _under(matrix, self.scheme, scales)
        return torch.where(spared, matrix, found).reshape(x.shape).to(x.dtype)


def _under(x: Tensor, scheme: Scheme, scales: Scales) -> Tensor:
    """x [T, K] rounded under these scales."""
    if scheme.grid != "fp4":
        return rounded(x, scheme, scales)
    scale = safe(scales.scale)[..., None]
    return (_e2m1(group_view(x, scheme) / scale) * scale).reshape(len(x), -1)[:, : x.shape[1]]


def dynamic_scales(x: Tensor, scheme: Scheme, outer: Tensor | None = None) -> Scales:
    """The scales that engines choose for inputs x [T, K] as they come. outer: see `InputQuantization`.

    In the microscaling formats an exponent is that of the group's largest value, one more from 1.75 of its power of two on,
    less the grid's own largest exponent (OCP MX 1.0, 6.3, rounded as compressed-tensors and vLLM do); in all others the
    largest value is sent to the grid's end, by a division: below 8 bits that end lies halfway between two codes, and a
    scale that is an ulp off sends the largest negative value to the other of them.
    """
    top = scheme.reach
    if not scheme.symmetric or top is None:
        return fit(x, scheme, outer=outer)
    largest = group_view(x, scheme).abs().amax(-1)
    if scheme.scale != "e8m0":
        return snap(largest / top, None, scheme, outer=outer)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa · 2^exponent, mantissa in [1/2, 1)
    exponent = (exponent - 1 + (mantissa >= 0.875).int() - math.floor(math.log2(top))).clamp(-127, 127)
    return Scales(torch.where(largest == 0, largest, torch.exp2(exponent.float())))


def _e2m1(v: Tensor) -> Tensor:
    """The nearest numbers of FP4, halves to the even mantissa, as engines round inputs."""
    step = torch.where(v.abs() < 2, 0.5, torch.where(v.abs() < 4, 1.0, 2.0))
    return (torch.round(v / step) * step).clamp(-6, 6)
