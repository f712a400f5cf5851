"""Weights to quantize, schemes of every kind, and what must hold of any scales."""

import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from bitwright.numerics.codec import dynamic_map
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import PRESETS, Scheme

IN_RUNS = [name for name in PRESETS if Scheme.parse(name).levels.run > 1]  # codes from codebooks: one stands for all
FAMILIES = (
    *(name for name in PRESETS if name not in IN_RUNS[1:]),
    "int4-g128", "int3-g64-asym", "int2-g32-asym", "int4-g32-asym1-bf16", "int8-channel", "int8-channel-asym-f32",
    "int8-tensor", "int8-tensor-asym", "int6-channel-min-f32", "nf4-g64", "nf4-g64-dq", "int4-g64-asym-dq", "fp4-channel",
    "fp8-channel", "fp8-tensor", "int8-g128-e8m0", "int4-g16-asym-e4m3", "ternary-channel", "ternary-g32-e8m0", "binary-g32",
    "binary-tensor", "iq4nl-g64-bf16",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two threads than on one, six times so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_weight(N: int, K: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, groups of different centres."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(N, K // 16 + 1, generator=g).repeat_interleave(16, dim=1)[:, :K]
    return (torch.randn(N, K, generator=g) + 0.3 * centre) * torch.rand(N, 1, generator=g).add(0.1)


def assert_same(a: Scales, b: Scales) -> None:
    for field in fields(Scales):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        assert x is None or torch.equal(x, y), field.name


def assert_representable(scales: Scales, scheme: Scheme) -> None:
    """What will be read back from the file is what the codes were chosen against, bit for bit."""
    s, encoding = scales.scale, scheme.scale
    assert s.dtype == torch.float32
    assert torch.isfinite(s).all()
    if encoding == "e8m0":
        assert torch.equal(torch.frexp(s[s != 0]).mantissa, torch.full_like(s[s != 0], 0.5))
    elif encoding == "e4m3":
        assert scales.outer is not None
        assert scales.outer.shape == (1, 1)
        local = (s.double() * scales.outer.double()).float().to(torch.float8_e4m3fn).float()
        assert torch.equal(local / scales.outer, s)
    elif encoding == "dq8":
        assert_in_dynamic_map(scales)
    elif encoding in ("k8", "k6", "k4"):
        bits = int(encoding[1:])
        assert_integer_multiples(s, scales.outer, 2 ** (bits - 1) - 1 if scheme.symmetric else 2**bits - 1, scheme)
        if scheme.zero == "min":
            assert scales.zero is not None
            assert_integer_multiples(-scales.zero, scales.outer_zero, 2**bits - 1, scheme)
    else:
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[encoding]
        assert torch.equal(s.to(kind).float(), s)
        if scheme.zero == "min":
            assert scales.zero is not None
            assert torch.equal(scales.zero.to(kind).float(), scales.zero)
    if scheme.symmetric:
        assert scales.zero is None
    else:
        assert_zeros(scales, scheme)


def assert_zeros(scales: Scales, scheme: Scheme) -> None:
    zero = scales.zero
    assert zero is not None
    assert zero.shape == scales.scale.shape
    if scheme.zero == "min":
        assert (zero <= 0).all()
        return
    assert torch.equal(zero, zero.round())
    assert zero.min() >= scheme.levels.lo + (scheme.zero == "asym1")
    assert zero.max() <= scheme.levels.hi


def assert_integer_multiples(x: Tensor, outer: Tensor | None, top: int, scheme: Scheme) -> None:
    """x [N, G] = integer × f16 of its block of 256 weights, integers in 0..top, or −top−1..top if they are signed."""
    assert outer is not None
    assert isinstance(scheme.group, int)
    per_block = 256 // scheme.group
    assert outer.shape == (x.shape[0], math.ceil(x.shape[1] / per_block))
    assert torch.equal(outer.half().float(), outer)
    each = outer.repeat_interleave(per_block, dim=1)[:, : x.shape[1]]
    integers = torch.where(each == 0, 0.0, x / torch.where(each == 0, 1.0, each)).round()
    assert integers.min() >= (-top - 1 if scheme.zero == "signed" else 0)
    assert integers.max() <= top
    assert torch.equal(integers * each, x)


def assert_in_dynamic_map(scales: Scales) -> None:
    assert scales.outer is not None
    assert scales.outer_zero is not None
    flat = scales.scale.flatten()
    assert scales.outer.shape == (math.ceil(flat.numel() / 256), 1)
    for i, absmax in enumerate(scales.outer.flatten()):
        representable = dynamic_map() * absmax + scales.outer_zero.flatten()
        assert torch.isin(flat[256 * i : 256 * i + 256], representable).all()
