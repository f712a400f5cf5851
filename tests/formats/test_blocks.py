"""From floats to llama.cpp's blocks in native code: rounding in one go, quotients without dividing, bits side by side."""

import importlib

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize as by_the_package

from bitwright.formats import ggml, ggml_codes
from bitwright.formats.ggml import TYPES
from bitwright.kernels import native, rounding
from bitwright.methods.rtn import rtn
from bitwright.methods.search import ONE_LEVEL, search
from bitwright.numerics.codec import decode, encode
from bitwright.numerics.loss import energy
from bitwright.numerics.qtensor import Scales
from bitwright.numerics.scheme import Scheme
from twins import SCHEMES, in_torch, same, weights

needs_native = pytest.mark.skipif(native is None, reason="the extension was not built")
IN_ONE_GO = [text for text in SCHEMES if Scheme.parse(text).scale in ONE_LEVEL]


@pytest.mark.parametrize("text", IN_ONE_GO)
@pytest.mark.parametrize(("N", "K"), [(37, 512), (16, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_search_in_one_go_gives_the_same_bits(isa: str, text: str, N: int, K: int, dtype: torch.dtype) -> None:
    scheme, w = Scheme.parse(text), weights(N, K).to(dtype)
    importance = torch.rand(K, generator=torch.Generator().manual_seed(1))
    for known, steps in [(None, 8), (importance, 8), (None, 2), (importance, 2)]:
        found = search(w, known, scheme, steps=steps)
        expected = in_torch(lambda known=known, steps=steps: search(w.float(), known, scheme, steps=steps))
        assert same(found.q, expected.q) and expected.energies is None and found.energies is not None
        missing = w.float() - decode(found.q)
        torch.testing.assert_close(found.energies[0], energy(missing, known), rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(found.energies[1], energy(w.float(), known), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("text", ["q4_0", "q8_0", "q4_1", "q5_0", "int4-g32-asym"])
def test_a_quick_search_finds_almost_as_much(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never less than round to nearest; of the ranges that it tries all but a hundredth of what rounding again finds."""
    scheme, w = Scheme.parse(text), weights(64, 1024).bfloat16().float()
    lost = [
        energy(w - decode(q), None).view(-1).sum() for q in (search(w, None, scheme, steps=2).q, rtn(w, None, scheme).q)
    ]
    monkeypatch.setattr(importlib.import_module("bitwright.methods.search"), "QUICK", 0)
    slowly = energy(w - decode(search(w, None, scheme, steps=2).q), None).sum()
    assert lost[0] < 0.95 * lost[1] and slowly * 0.999 < lost[0] < slowly * 1.01


@needs_native
def test_losses_by_another_measure_are_not_given(isa: str) -> None:
    w, gram = weights(16, 64), torch.eye(64)
    assert search(w, gram, Scheme.parse("int4-g32")).energies is None
    assert search(w, torch.ones(64), Scheme.parse("int4-g32"), objective="mse").energies is None


@pytest.mark.parametrize(
    "text", ["q4_0", "q8_0", "q4_1", "int4-g32-asym", "int8-g64-asym-f32", "int2-g32-asym1", "nf4-g32"]
)
def test_quotients_half_way_between_codes_fall_as_divided(isa: str, text: str) -> None:
    """Products with the inverse are off in their last bits; where those decide, it must not show."""
    scheme, generator = Scheme.parse(text), torch.Generator().manual_seed(0)
    lo, hi = (0, 255) if scheme.levels.levels or scheme.zero == "min" else (scheme.levels.lo, scheme.levels.hi)
    g = scheme.group_length(1 << 20)
    scale = torch.rand(400, 8, generator=generator) + 0.01
    zero = None if scheme.symmetric else torch.randint(lo, hi + 1, scale.shape, generator=generator).float()
    if scheme.zero == "min":
        zero = -torch.rand(scale.shape, generator=generator)
    codes = torch.randint(lo - 1, hi + 2, (400, 8, g), generator=generator) + 0.5
    wide = 0 if zero is None else zero[..., None]
    w = codes * scale[..., None] + wide if scheme.zero == "min" else (codes - wide) * scale[..., None]
    for step in (0, 1, 2, 3, -1, -2, -3):
        near = w.clone()
        for _ in range(abs(step)):
            near = torch.nextafter(near, torch.full_like(near, step * torch.inf))
        near = near.view(400, -1)
        assert same(rounding.encode(near, Scales(scale, zero), scheme), encode(near, Scales(scale, zero), scheme))


@pytest.mark.parametrize("value", [1e-38, 1e-30, 1e30, 3e38, 0.0])
def test_scales_whose_inverse_is_of_no_use(isa: str, value: float) -> None:
    scheme, w = Scheme.parse("int4-g32-f32"), torch.randn(8, 64) * max(value, 1e-38) * 3
    scales = Scales(torch.full((8, 2), value), None)
    assert same(rounding.encode(w, scales, scheme), encode(w, scales, scheme))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0"])
def test_rounding_to_nearest_takes_the_scales_that_llama_cpp_takes(kind: str) -> None:
    """The largest weight gets the lowest code, by a scale of either sign."""
    w = weights(37, 512)[6:]  # those before are zeros, or too small for an f16
    theirs = by_the_package(w.numpy(), gguf.GGMLQuantizationType[kind])
    mine = ggml.encode(rtn(w, None, TYPES[kind].scheme).q, TYPES[kind]).numpy()
    size = TYPES[kind].bytes
    assert np.array_equal(mine.reshape(-1, size)[:, :2], theirs.reshape(-1, size)[:, :2])


@needs_native
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_and_codes_are_those_of_the_twins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = search(weights(37, 512), None, TYPES[kind].scheme).q
    blocks, codes = ggml.encode(q, TYPES[kind]), ggml_codes.codes_of(kind, ggml.encode(q, TYPES[kind]))
    assert torch.equal(codes, q.codes)
    monkeypatch.setattr(ggml, "native", None)
    monkeypatch.setattr(ggml_codes, "native", None)
    assert torch.equal(ggml.encode(q, TYPES[kind]), blocks)
    assert torch.equal(ggml_codes.codes_of(kind, blocks), codes)


@needs_native
def test_shapes_are_checked() -> None:
    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    assert native is not None
    native.put_side_by_side(bytes_of(3, 32), bytes_of(3, 18)[:, 2:], 16, 4, 8)
    native.take_side_by_side(bytes_of(3, 18)[:, 2:], bytes_of(3, 32), 16, 4, 8)
    native.put_rows(bytes_of(3, 4), bytes_of(3, 8)[:, 4:])
    for packed, out, n, bits in [((3, 16), (3, 31), 16, 4), ((3, 16), (2, 32), 16, 4), ((3, 16), (3, 32), 12, 4),
                                 ((3, 16), (3, 32), 16, 3), ((3, 16), (3, 32), 0, 4)]:  # fmt: skip
        with pytest.raises(ValueError, match=r"must be|whole eights"):
            native.take_side_by_side(bytes_of(*packed), bytes_of(*out), n, bits, 0)
        with pytest.raises(ValueError, match=r"must be|whole eights"):
            native.put_side_by_side(bytes_of(*out), bytes_of(*packed), n, bits, 0)
    with pytest.raises(ValueError, match="less must be"):
        native.take_side_by_side(bytes_of(3, 16), bytes_of(3, 32), 16, 4, 129)
    with pytest.raises(ValueError, match="altogether"):
        native.put_side_by_side(bytes_of(3, 33)[:, 1:], bytes_of(3, 16), 16, 4, 0)
    with pytest.raises(ValueError, match="one shape"):
        native.put_rows(bytes_of(3, 4), bytes_of(3, 5))
    with pytest.raises(ValueError, match="K entries"):
        rounding.searched(torch.zeros(2, 64), torch.ones(63), Scheme.parse("int4-g32"), [(1.0, 1.0)])
