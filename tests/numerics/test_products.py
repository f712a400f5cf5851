"""Large products: exact, or in bfloat16 where that costs the codes nothing."""

import pytest
import torch

from bitwright.methods import gptq
from bitwright.numerics import matmul as products
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import loss
from bitwright.numerics.matmul import add_product
from bitwright.numerics.scheme import Scheme


def matrices(M: int, L: int, N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(M * L + N)
    return torch.randn(M, N, generator=g), torch.randn(L, M, generator=g).T, torch.randn(L, N, generator=g)


@pytest.mark.parametrize(("fast", "error"), [(False, 1e-6), (True, 1e-2)])
@pytest.mark.parametrize("alpha", [1.0, -1.0])
@pytest.mark.parametrize("M", [1, 16, 37])
def test_products_are_added(monkeypatch: pytest.MonkeyPatch, M: int, alpha: float, fast: bool, error: float) -> None:
    monkeypatch.setattr(products, "ROWS", 16)
    to, a, b = matrices(M, 40, 23)
    expected = to.double() + alpha * (a.double() @ b.double())
    a_before, b_before = a.clone(), b.clone()
    add_product(to, a, b, alpha=alpha, fast=fast)
    assert (to - expected).abs().max() <= error * (a.double().abs() @ b.double().abs()).max()
    assert torch.equal(a, a_before) and torch.equal(b, b_before)


def test_into_a_part_of_a_matrix() -> None:
    whole, (_, a, b) = torch.zeros(50, 23), matrices(30, 40, 23)
    add_product(whole[10:40], a, b, fast=True)
    assert not whole[:10].any() and not whole[40:].any()
    torch.testing.assert_close(whole[10:40], a @ b, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("text", ["int4-g128-asym", "int2-g64", "int3-channel"])
def test_fast_gptq_loses_no_more(text: str) -> None:
    K, scheme = 512, Scheme.parse(text)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2048, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5
    x[:, ::37] *= 10
    gram, w = x.T @ x / len(x), torch.randn(256, K, generator=g) * 0.02
    exact, fast = (gptq(w, gram, scheme, fast=f).q for f in (False, True))
    assert not torch.equal(exact.codes, fast.codes), "nothing was rounded otherwise: the test proves nothing"
    ratio = loss(w, decode(fast), gram) / loss(w, decode(exact), gram)
    assert ratio == pytest.approx(1, abs=0.01)
