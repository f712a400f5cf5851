"""What the native extension and its twin in torch are compared on."""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from bitwright.kernels import rounding
from bitwright.numerics.qtensor import QTensor

T = TypeVar("T")


SCHEMES = [
    "int4-g128", "int3-g64-asym", "int2-g32-asym1", "int8-channel", "int6-g16-min-bf16", "int5-g32-min-f32", "q4_k",
    "q6_k", "q2_k", "q3_k", "q4_0", "iq4_xs", "nf4-g64",
    "nf4-g64-dq", "mxfp4", "nvfp4", "iq4nl-g32", "iq2-g16", "iq3xxs-g32", "ternary-channel", "binary-g32",
    "int8-g256-asym-f32", "int4-g128-min", "int4-g32-asym-k6", "int4-g64-min-k6",
]  # fmt: skip


def in_torch(f: Callable[[], T]) -> T:
    """What f gives with the twins in force."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "handles", lambda *_: False)
        return f()


def weights(N: int, K: int) -> Tensor:
    """Rows of all sizes; one of zeros, one with a group of one sign, one of nearly nothing."""
    generator = torch.Generator().manual_seed(N * K)
    w = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    w[3] = 0
    w[4, :100] = w[4, :100].abs()
    w[5] *= 1e-30
    return w


def same(a: QTensor, b: QTensor) -> bool:
    tables = [(getattr(a.scales, n), getattr(b.scales, n)) for n in ("scale", "zero", "outer", "outer_zero")]
    return torch.equal(a.codes, b.codes) and all(
        (x is None) == (y is None) and (x is None or torch.equal(x, y)) for x, y in tables
    )
