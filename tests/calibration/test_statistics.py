"""Statistics of inputs: streams equal the whole, merges equal one stream, and bfloat16 products cost the codes nothing."""

import pytest
import torch

from bitwright.calibration import statistics
from bitwright.calibration.statistics import Gram, Range
from bitwright.methods import gptq
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import loss
from bitwright.numerics.scheme import Scheme


def inputs(T: int, K: int, seed: int = 0) -> torch.Tensor:
    """Correlated inputs with a mean and a few channels thirty times as large, as language models have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g) @ torch.randn(K, K, generator=g) / K**0.5 + 0.3
    x[:, ::37] *= 30
    return x


def test_the_stream_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PANEL", 7)
    x = inputs(90, 33)
    gram = Gram(33)
    for batch in x.view(3, 5, 6, 33).unbind():
        gram.update(batch)
    expected = x.double().T @ x.double() / 90
    torch.testing.assert_close(gram.value().double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_merged_streams_are_one_stream() -> None:
    x = inputs(64, 20)
    a, b, whole = Gram(20), Gram(20), Gram(20)
    a.update(x[:24])
    b.update(x[24:])
    whole.update(x)
    a.merge(b)
    assert a.tokens == 64
    torch.testing.assert_close(a.value(), whole.value())
    low, high, mean = Range.empty(20), Range.empty(20), Range.empty(20)
    low.update(x[:24])
    high.update(x[24:])
    mean.update(x)
    low.merge(high)
    for one, other in zip(low.value(), mean.value(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(low.value()[2], x.abs().mean(0))


def test_an_update_leaves_its_input_alone() -> None:
    x = inputs(16, 8)
    before = x.clone()
    Gram(8).update(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("text", ["int4-g128-asym", "int2-g64-asym"])
def test_bfloat16_products_cost_the_codes_nothing(text: str) -> None:
    """Codes from the bfloat16 Gram lose as little, under the exact Gram, as those from the float64 one."""
    K = 256
    x = inputs(8192, K).bfloat16()
    fast, exact = Gram(K), x.double().T @ x.double() / len(x)
    for batch in x.split(2048):
        fast.update(batch)
    rough = fast.value()
    assert not torch.equal(rough, exact.float()), "nothing was rounded: the test proves nothing"
    w = torch.randn(512, K, generator=torch.Generator().manual_seed(1)) * 0.02
    from_fast, from_exact = gptq(w, rough, Scheme.parse(text)), gptq(w, exact.float(), Scheme.parse(text))
    assert from_fast.damping == from_exact.damping == 0.01
    ratio = loss(w, decode(from_fast.q), exact.float()) / loss(w, decode(from_exact.q), exact.float())
    assert ratio == pytest.approx(1, abs=0.01)
