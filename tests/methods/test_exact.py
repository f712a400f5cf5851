"""Weights that already lie on a scheme's grid come back as they are, by every method."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.methods import METHODS
from bitwright.methods.exact import on_grid
from bitwright.numerics.codec import code_dtype, code_range, decode, scale_range
from bitwright.numerics.loss import loss
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import SUPERBLOCK, Scheme
from quantized_weights import assert_representable, one_thread, random_weight

__all__ = ["one_thread"]  # a fixture that every test here uses

K = 512
TWO_LEVEL = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
TYPES = (*TWO_LEVEL, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_0", "iq4_nl")


def correlated(seed: int = 1) -> Tensor:
    x = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(seed))
    x = x + 0.5 * x.roll(1, 1)
    return x.T @ x / len(x)


def random_codes(scheme: Scheme, g: torch.Generator, N: int) -> Tensor:
    """Any codes; over a minimum, every group has one of the lowest three, as encoders see to."""
    low, high = code_range(scheme)
    codes = torch.randint(low, high + 1, (N, scheme.groups(K), scheme.group_length(K)), generator=g)
    if scheme.zero == "min":
        codes[..., 5] = torch.randint(0, 3, codes.shape[:2], generator=g)
    return codes.view(N, K).to(code_dtype(scheme))


def random_scales(scheme: Scheme, g: torch.Generator, N: int, exponent: int | None = None) -> Scales:
    """Any scales that the scheme can store; with an exponent, so few bits that decoded weights fit into bfloat16."""
    G, both = scheme.groups(K), scheme.zero == "signed"

    def f16(*shape: int) -> Tensor:
        if exponent is not None:
            return torch.full(shape, 2.0**exponent)
        sign = torch.randint(0, 2, shape, generator=g) * 2 - 1 if both else 1
        return ((torch.rand(shape, generator=g) + 0.2) * 1e-2).half().float() * sign

    if scheme.scale == "f16":
        return Scales(
            f16(N, G), -f16(N, G) * torch.randint(0, 2, (N, G), generator=g) if scheme.zero == "min" else None
        )
    low, high = scale_range(scheme) if exponent is None else (-2 if both else 0, 2)
    outer, blocks = f16(N, K // SUPERBLOCK), SUPERBLOCK // scheme.group_length(K)
    each = outer.repeat_interleave(blocks, 1)
    scale = torch.randint(low, high + 1, (N, G), generator=g) * each + 0.0
    if scheme.zero != "min":
        return Scales(scale, None, outer)
    return Scales(scale, -torch.randint(0, high + 1, (N, G), generator=g) * each, outer, outer)


def lying_on(scheme: Scheme, *, N: int = 12, seed: int = 0, exponent: int | None = None) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return decode(QTensor(random_codes(scheme, g, N), random_scales(scheme, g, N, exponent), scheme, (N, K)))


@pytest.mark.parametrize("method", ["search", "gptq", "gptaq", "hqq", "obq", "autoround"])
@pytest.mark.parametrize("text", TYPES)
def test_the_same_values_come_back(text: str, method: str) -> None:
    scheme = Scheme.parse(text)
    if (method == "hqq" and scheme.zero != "min") or (method == "autoround" and scheme.levels.levels is not None):
        pytest.skip("no method for this scheme")
    w, options = lying_on(scheme), {}
    if method == "gptaq":  # inputs that have drifted would have other weights
        options = {"drift": 0.1 * torch.randn(K, K, generator=torch.Generator().manual_seed(3))}
    kept = w.clone()
    q = METHODS[method](w, correlated(), scheme, **options).q
    assert torch.equal(decode(q), w)
    assert_representable(q.scales, scheme)
    assert torch.equal(w, kept)


@pytest.mark.parametrize("method", ["search", "gptq"])
@pytest.mark.parametrize("text", TYPES)
def test_the_same_values_come_back_from_bfloat16(text: str, method: str) -> None:
    scheme = Scheme.parse(text)
    w = lying_on(scheme, exponent=-7).bfloat16()
    assert torch.equal(w.float(), lying_on(scheme, exponent=-7))  # nothing is lost
    assert torch.equal(decode(METHODS[method](w, correlated(), scheme).q), w.float())


@pytest.mark.parametrize("text", ["q3_k", "q6_k", "iq4_xs", "q4_0", "q5_0", "q4_k"])
def test_weights_that_were_rounded_to_bfloat16_are_what_the_result_rounds_to(text: str) -> None:
    """Codes and scales as encoders choose them: those of a search."""
    scheme = Scheme.parse(text)
    w = decode(METHODS["search"](random_weight(24, K), None, scheme).q).bfloat16()
    q = METHODS["gptq"](w.float(), correlated(), scheme).q
    assert (decode(q).bfloat16() == w).all(1).float().mean() >= 0.9
    assert loss(w.float(), decode(q)) < 1e-5


@pytest.mark.parametrize("text", TYPES)
def test_ordinary_weights_are_not_taken_for_exact_ones(text: str) -> None:
    w = random_weight(40, K)
    w[:, 300:] = 0  # a block of zeros lies on every grid
    for given in (w, w.bfloat16(), w.half()):
        assert on_grid(given, Scheme.parse(text)) is None


@pytest.mark.parametrize("text", ["q4_k", "q6_k", "q5_0", "q4_1"])
def test_only_rows_that_lie_on_the_grid_stay(text: str) -> None:
    scheme, w, gram = Scheme.parse(text), random_weight(32, K), correlated()
    w[::2] = lying_on(scheme, N=16)
    for method in (METHODS["search"], METHODS["gptq"]):
        q = method(w, gram, scheme).q
        alone = method(w[1::2], gram, scheme).q
        assert torch.equal(decode(q)[::2], w[::2])
        assert loss(w[1::2], decode(q)[1::2], gram) == pytest.approx(loss(w[1::2], decode(alone), gram), rel=0.02)


def test_pruned_weights_stay_zero() -> None:
    scheme = Scheme.parse("q4_0")
    w, pruned = lying_on(scheme), torch.rand(12, K, generator=torch.Generator().manual_seed(2)) < 0.5
    assert not bool(decode(METHODS["gptq"](w, correlated(), scheme, pruned=pruned).q)[pruned].any())


@pytest.mark.parametrize("text", ["int4-g32-asym", "int4-channel", "nf4-g64-dq", "iq2_xxs", "mxfp4", "nvfp4"])
def test_schemes_that_are_not_known(text: str) -> None:
    assert on_grid(lying_on(Scheme.parse("q4_0")), Scheme.parse(text)) is None


def test_a_convolution_and_rows_that_fill_no_block() -> None:
    scheme = Scheme.parse("q4_1")
    w: Any = lying_on(scheme, N=6)
    assert torch.equal(decode(METHODS["search"](w.reshape(6, 8, 8, 8), None, scheme).q).reshape(6, K), w)
    assert on_grid(w[:, : K - 8], scheme) is None
