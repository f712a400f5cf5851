"""Products of packed weights: every instruction set against float64, and against one another bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright import kernels
from bitwright.errors import KernelError
from bitwright.kernels import matmul
from bitwright.kernels.matmul import Packed, decoded, matrix_of, pack, product, rows
from bitwright.methods.rtn import rtn
from bitwright.numerics.codec import decode
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import Scheme
from conftest import ISAS

native = kernels.native
needs_native = pytest.mark.skipif(native is None, reason="the extension was not built")
SCHEMES = [
    "int4-g128", "int3-g64-asym", "int2-g32-asym1", "int8-channel", "int6-g16-min-bf16", "int5-g32-min-f32", "q4_k",
    "q6_k", "q2_k", "q3_k", "q4_0", "iq4_xs", "nf4-g64", "nf4-g64-dq", "mxfp4", "nvfp4", "iq4nl-g32", "ternary-channel",
    "binary-g32", "iq1-g16-sym-k6", "iq2-g32-sym-k6", "iq3xxs-g32-sym-k6", "iq3s-g32-sym-k6",
    "int8-g256-asym-f32", "int4-g128-min", "int7-g128-asym", "int4-tensor", "int4-channel-asym",
]  # fmt: skip
BLOCKED = [scheme for scheme in SCHEMES if Scheme.parse(scheme).scale.startswith("k")]


def quantized(scheme: str, N: int, K: int) -> QTensor:
    """Rows of all sizes; one of zeros, one of nearly nothing, one huge, one with a group of zeros."""
    generator = torch.Generator().manual_seed(N * K)
    w = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    if N > 4:
        w[1] = 0
        w[2] *= 1e-30
        w[3] *= 1e4
    w[0, : K // 4] = 0
    return rtn(w, None, Scheme.parse(scheme)).q


def inputs(M: int, K: int) -> Tensor:
    generator = torch.Generator().manual_seed(M + K)
    return torch.randn(M, K, generator=generator) * torch.rand(M, 1, generator=generator)


def error(y: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error of any number of y = x w', relative to |x| |w| of its two rows."""
    x, w = x.double(), w.double()
    lengths = x.norm(dim=1)[:, None] * w.norm(dim=1)[None]
    return float(((y - x @ w.T).abs() / lengths.clamp(min=1e-300)).max())


def by_rows(p: Packed) -> Tensor:
    return torch.cat([decoded(p, n, min(n + 64, p.N)) for n in range(0, p.N, 64)])


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8-channel"])
def test_what_is_packed_decodes_to_the_weight(scheme: str) -> None:
    """Codes exactly; scales to a float16 in units of their row."""
    q = quantized(scheme, 130, 512)
    w, again = decode(q), by_rows(pack(q))
    limit = w.abs().amax(1, keepdim=True) * 2.0**-9
    assert ((w - again).abs() <= limit).all()


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_decoded_to_the_twin_s_bits(isa: str, scheme: str) -> None:
    """Both types, all rows and only the last, columns that fill no tile."""
    K = 512 if scheme in BLOCKED else 333
    p = pack(quantized(scheme, 131, K))
    for dtype in (torch.float32, torch.bfloat16):
        for first, last in ((0, 131), (0, 64), (128, 131)):
            found = rows(p, first, last, dtype)
            assert found.shape == (last - first, K)
            assert found.dtype == dtype
            assert torch.equal(found, decoded(p, first, last).to(dtype))


def test_scales_of_float16_are_kept_exactly() -> None:
    q = quantized("int4-g128-asym", 70, 512)
    assert torch.equal(by_rows(pack(q)), decode(q))


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 37, 256), (2, 64, 512), (3, 1, 768), (5, 100, 544), (19, 70, 1024), (131, 33, 256)]
)
def test_products_agree_with_float64(isa: str, scheme: str, M: int, N: int, K: int) -> None:
    q = quantized(scheme, N, 512 if K == 544 and scheme in BLOCKED else K)
    p = pack(q)
    x = inputs(M, p.K)
    assert error(product(x, p), x, by_rows(p)) < 6e-5
    assert error(product(x, p, bits=8), x, by_rows(p)) < 3e-3
    assert error(product(x.bfloat16(), p), x.bfloat16(), by_rows(p)) < 6e-5


@pytest.mark.parametrize("scheme", ["int4-g64", "int3-g64-asym", "nf4-g64-dq", "q4_k", "ternary-channel"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 37, 256), (3, 130, 320), (131, 70, 333)])
@pytest.mark.parametrize("floats", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [matmul.WEIGHTS_AT_ONCE, 1])
def test_gradients_agree_with_float64(
    isa: str, scheme: str, M: int, N: int, K: int, floats: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dx = dy W: all rows decoded together, or 64 at a time. And the product that it belongs to."""
    monkeypatch.setattr(matmul, "WEIGHTS_AT_ONCE", at_once)
    monkeypatch.setattr(matmul, "best_dtype", lambda _: torch.bfloat16)
    p = pack(quantized(scheme, N, 512 if scheme == "q4_k" else K))
    x, dy = inputs(M, p.K).requires_grad_(), inputs(M, N)
    y = product(x, p, floats=floats)
    y.backward(dy.to(y.dtype))
    limit = 6e-5 if floats == torch.float32 else 2.0**-8
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert y.dtype == (floats if M >= matmul.MANY else torch.float32)
    assert error(x.grad, dy, by_rows(p).T) < limit
    assert error(y.detach(), x.detach(), by_rows(p)) < (limit if M >= matmul.MANY else 6e-5)


def test_without_the_extension_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    p, dy = pack(quantized("nf4-g64-dq", 130, 320)), inputs(5, 130)
    found = []
    for there in (native, None):
        monkeypatch.setattr(matmul, "native", there)
        x = inputs(5, 320).requires_grad_()
        product(x, p).backward(dy)
        found.append(x.grad)
    torch.testing.assert_close(*found)


def test_no_float_copy_is_kept_for_the_way_back() -> None:
    p, kept = pack(quantized("int4-g64", 256, 512)), list[Tensor]()

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        product(inputs(200, 512).requires_grad_(), p, floats=torch.bfloat16)
    assert sum(t.nbytes for t in kept) < 256 * 512


@needs_native
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_instruction_set_gives_the_same_bits(scheme: str) -> None:
    assert native is not None
    p, x = pack(quantized(scheme, 70, 512)), inputs(9, 512)
    before, found = native.current(), []
    try:
        for name in ISAS:
            native.choose(name)
            found.append([product(x[:M], p, bits=bits) for M in (1, 2, 3, 7, 9) for bits in (8, 16)])
    finally:
        native.choose(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("scheme", ["int4-g128", "int8-channel", "q4_k", "int3-g64-asym", "mxfp4"])
def test_the_twin_in_torch_rounds_inputs_alike(scheme: str, by_row: bool) -> None:
    p, x = pack(quantized(scheme, 70, 768)), inputs(5, 768)
    ours = product(x, p, bits=8, by_row=by_row)
    theirs = matmul._in_torch(x, p, bits=8, by_row=by_row)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3  # inputs between two codes may go either way


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 20),
    N=st.integers(1, 80),
    K=st.integers(1, 300),
    bits=st.integers(2, 8),
    group=st.sampled_from(["g16", "g32", "g64", "g128", "g256", "channel"]),
    zero=st.sampled_from(["sym", "asym", "min"]),
)
def test_any_shape(M: int, N: int, K: int, bits: int, group: str, zero: str) -> None:
    """Half a step of inputs in 16 bits for every column, and what float32 sums lose."""
    p = pack(quantized(f"int{bits}-{group}-{zero}", N, K))
    x, w = inputs(M, K).double(), by_rows(p).double()
    half = x.abs().amax(1, keepdim=True) / 32512 / 2  # [M, 1]
    sums = x.norm(dim=1)[:, None] * w.norm(dim=1)[None]  # [M, N]
    assert bool(((product(x.float(), p) - x @ w.T).abs() <= half * w.abs().sum(1)[None] + 4e-6 * sums).all())


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    p, x = pack(quantized("int4-g128", 500, 512)), inputs(40, 512)
    once, before = product(x, p), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(x, p), once)
        assert torch.equal(product(x[:1], p), product(x[:2], p)[:1])
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_input_gives_the_same_whatever_is_multiplied_with_it(scheme: str, bits: int) -> None:
    """One, a few and many inputs have loops of their own."""
    p, x = pack(quantized(scheme, 70, 512)), inputs(9, 512)
    whole = product(x, p, bits=bits)
    for M in (1, 2, 3, 5, 8):
        assert torch.equal(product(x[:M], p, bits=bits), whole[:M])


@needs_native
def test_what_is_not_finite_stays_where_it_is() -> None:
    p, x = pack(quantized("int4-g128", 70, 512)), inputs(4, 512)
    clean = product(x, p)
    x[1, 3], x[2, 300], x[3] = float("nan"), float("inf"), 0.0
    y = product(x, p)
    assert torch.equal(y[0], clean[0])
    assert y[1].isnan().all()
    assert y[2].isnan().all()
    assert (y[3] == 0).all()


def test_no_inputs_give_no_outputs() -> None:
    assert product(torch.empty(0, 512), pack(quantized("int4-g128", 70, 512))).shape == (0, 70)


def test_strided_inputs_are_taken() -> None:
    p, x = pack(quantized("int4-g128", 70, 512)), inputs(6, 1024)
    assert torch.equal(product(x[::2, ::2], p), product(x[::2, ::2].contiguous(), p))


@pytest.mark.parametrize("shape", [(2, 511), (512,), (1, 2, 512)])
def test_inputs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(KernelError, match="for a matrix 70 × 512"):
        product(torch.zeros(shape), pack(quantized("int4-g128", 70, 512)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(KernelError, match=f"{str(dtype)[6:]} .* for a matrix 70 × 512"):
        product(torch.zeros(2, 512, dtype=dtype), pack(quantized("int4-g128", 70, 512)))


@needs_native
def test_the_extension_checks_what_it_is_given() -> None:
    assert native is not None
    p = pack(quantized("int4-g128", 70, 512))
    good = {
        "panels": p.panels,
        "scale": p.scale,
        "point": p.point,
        "minimum": p.minimum,
        "unit": p.unit,
        "bits": 4,
        "offset": 8,
        "high": [],
        "low": [],
        "N": 70,
        "K": 512,
        "g": 128,
    }
    bad = [
        {"panels": p.panels[:-1].contiguous()},
        {"scale": p.scale[:-1].contiguous()},
        {"scale": p.scale.float()},
        {"unit": p.unit[1:]},
        {"bits": 9},
        {"bits": 0},
        {"offset": 256},
        {"N": 0},
        {"K": 0},
        {"g": 24},
        {"g": 8},
        {"g": 300},
        {"N": 129},
        {"K": 1024},
        {"point": torch.zeros(3, dtype=torch.uint8)},
        {"minimum": p.scale[:5].contiguous()},
        {"high": [1] * 17},
        {"low": [1]},
        {"high": [1], "low": [1, 2]},
        {"minimum": p.scale, "point": torch.zeros(len(p.scale), dtype=torch.uint8)},
    ]
    for change in bad:
        with pytest.raises((ValueError, TypeError)):
            native.Matrix(**(good | change))
    matrix, y = matrix_of(p), torch.empty(2, 70)
    for x, out, count in (
        (torch.zeros(2, 511), y, 1),
        (torch.zeros(2, 512), torch.empty(2, 69), 1),
        (torch.zeros(2, 512), y, 3),
        (torch.zeros(2, 512, dtype=torch.float64), y, 1),
        (torch.zeros(2, 1024)[:, ::2], y, 1),
    ):
        with pytest.raises((ValueError, TypeError)):
            native.product(matrix, x, out, count, False, 1)
    room = torch.empty(512, 70)
    native.decode_rows(matrix, [], 1.0, 64, 70, room, 1)
    for level, first, last, to in (
        ([0.0] * 16, 0, 64, room),
        ([], 1, 64, room),
        ([], -64, 0, room),
        ([], 0, 0, room),
        ([], 0, 63, room),
        ([], 64, 71, room),
        ([], 0, 70, torch.empty(512, 69)),
        ([], 0, 70, torch.empty(511, 70)),
        ([], 0, 70, torch.empty(512, 70, dtype=torch.float16)),
        ([], 0, 70, torch.empty(512, 140)[:, ::2]),
    ):
        with pytest.raises((ValueError, TypeError)):
            native.decode_rows(matrix, level, 1.0, first, last, to, 1)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 37, 256), (3, 130, 77), (4, 1, 31), (8, 70, 64)])
def test_float_weights_multiply_as_they_are_stored(isa: str, dtype: torch.dtype, M: int, N: int, K: int) -> None:
    """Each input as if it were alone."""
    assert native is not None
    w, x, y, alone = inputs(N, K).to(dtype), inputs(M, K), torch.empty(M, N), torch.empty(1, N)
    native.product_of_floats(w, x, y, 2)
    assert error(y, x, w) < 1e-6
    native.product_of_floats(w, x[-1:].contiguous(), alone, 2)
    assert torch.equal(y[-1:], alone)
    with pytest.raises((ValueError, TypeError)):
        native.product_of_floats(w.double(), x, y, 2)
    with pytest.raises(ValueError, match="K columns"):
        native.product_of_floats(w, x[:, 1:].contiguous(), y, 2)
