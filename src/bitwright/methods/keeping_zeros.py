"""What methods with error feedback do with pruned weights: they stay exactly zero, and the others make up for them."""

import torch
from torch import Tensor

from bitwright.errors import RecipeError, SchemeError
from bitwright.numerics.codec import per_column, round_to
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme

WITH_ZERO = "give a sym or asym scheme of integers, nf4, fp4 or fp8, such as int4-g128"


def mask_of(pruned: Tensor, w: Tensor, scheme: Scheme) -> Tensor:
    """The mask as a matrix [N, K]. SchemeError for a scheme without a code for zero, RecipeError for another shape."""
    if not scheme.holds_zero:
        raise SchemeError(f"{scheme} has no code for zero", remedy=WITH_ZERO)
    if not isinstance(pruned, Tensor) or pruned.dtype != torch.bool or pruned.shape != w.shape:
        raise RecipeError(
            f"pruned is not a mask of bool, {list(w.shape)}",
            remedy="give the mask that a function of bitwright.sparsity returned",
        )
    return pruned.reshape(len(w), -1)


def with_zeros(codes: Tensor, gone: Tensor, scales: Scales, scheme: Scheme) -> Tensor:
    """codes [N, K] with the code for 0 wherever the mask `gone` [N, K] is true."""
    N, K = codes.shape
    scale = per_column(scales.scale, scheme, K).expand(N, K)
    zero = None if scales.zero is None else per_column(scales.zero, scheme, K).expand(N, K)
    nothing, _ = round_to(torch.zeros_like(scale), scale, zero, scheme)
    return torch.where(gone, nothing.to(codes.dtype), codes)
