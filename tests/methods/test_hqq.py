"""HQQ: the half-quadratic steps against a slow oracle, and a smaller norm than the extremes give."""

import pytest
import torch
from torch import Tensor

from bitwright.errors import RecipeError
from bitwright.methods.hqq import hqq
from bitwright.methods.rtn import rtn
from bitwright.numerics.codec import decode, encode, fit
from bitwright.numerics.scheme import Scheme

SCHEMES = ["int4-g64-min", "int3-g32-min-bf16", "int2-g32-min-f32", "q4_1", "q4_k"]


def weights(N: int = 40, K: int = 256) -> Tensor:
    """Heavy tails, and groups that lie to one side."""
    g = torch.Generator().manual_seed(K)
    w = torch.randn(N, K, generator=g) * torch.rand(N, K, generator=g).pow(-0.5) * 0.02
    w[:5] += 0.03
    w[5] = 0
    return w


def norm(w: Tensor, decoded: Tensor, p: float = 0.7) -> float:
    return float((w - decoded).abs().double().pow(p).sum())


@pytest.mark.parametrize("K", [256, 200])
@pytest.mark.parametrize("text", SCHEMES)
def test_the_norm_falls(text: str, K: int) -> None:
    w, scheme = weights(K=K), Scheme.parse(text)
    before = w.clone()
    q = hqq(w, None, scheme).q
    plain = rtn(w, None, scheme).q
    if scheme.scale != "k6":  # there the minima of 256 weights share a scale, and groups are no longer free
        assert norm(w, decode(q)) < norm(w, decode(plain))
    assert norm(w, decode(q)) < 1.01 * norm(w, decode(plain))
    again = encode(w, q.scales, scheme)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(w, before)
    assert not decode(q)[5].any()


def test_no_step_is_rtn() -> None:
    w, scheme = weights(), Scheme.parse("int4-g64-min")
    assert torch.equal(hqq(w, None, scheme, steps=0).q.codes, rtn(w, None, scheme).q.codes)


def test_against_a_slow_oracle() -> None:
    """One group, float minimum, float64, written from the paper."""
    w = weights(K=32)[7:8]
    scheme = Scheme.parse("int3-g32-min-f32")
    s = fit(w, scheme)
    scale, m = float(s.scale), float(s.zero)  # type: ignore[arg-type]
    best = (norm(w, decode(encode(w, s, scheme))), m)
    x = [float(v) for v in w[0]]
    for step in range(20):
        beta = 10.0 * 1.01**step
        codes = [min(7, max(0, round((v - m) / scale))) for v in x]
        residue = [(v - (c * scale + m)) / scale for v, c in zip(x, codes, strict=True)]
        shrunk = [(1 if r > 0 else -1) * max(0.0, abs(r) - max(abs(r), 1e-8) ** -0.3 / beta) * scale for r in residue]
        m = min(0.0, sum(v - e - scale * c for v, e, c in zip(x, shrunk, codes, strict=True)) / 32)
        lost = sum(abs(v - (min(7, max(0, round((v - m) / scale))) * scale + m)) ** 0.7 for v in x)
        if lost < best[0]:
            best = (lost, m)
    q = hqq(w, None, scheme).q
    assert norm(w, decode(q)) == pytest.approx(best[0], rel=1e-3)
    assert q.scales.zero is not None and float(q.scales.zero) == pytest.approx(best[1], rel=1e-3)


def test_refusals() -> None:
    w = weights()
    with pytest.raises(RecipeError, match="has none"):
        hqq(w, None, Scheme.parse("int4-g64-asym"))
    for bad in ({"norm": 0.0}, {"norm": 1.5}, {"steps": -1}, {"beta": 0.0}, {"growth": 0.9}):
        with pytest.raises(RecipeError, match="must be in"):
            hqq(w, None, Scheme.parse("q4_1"), **bad)  # type: ignore[arg-type]
