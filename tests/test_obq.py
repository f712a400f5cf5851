"""OBQ: the inverse without a row and column, GPTQ's codes in GPTQ's order, and a better loss in its own."""

import pytest
import torch
from torch import Tensor

from bitwright.codec import decode, spread
from bitwright.errors import NumericsError, RecipeError
from bitwright.loss import loss
from bitwright.methods import gptq
from bitwright.methods.gptq import visiting_order
from bitwright.methods.obq import _rounded, inverse_hessian, obq, removed
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search
from bitwright.scheme import Scheme


def problem(N: int = 12, K: int = 64, T: int = 500) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=g))
    return torch.randn(N, K, generator=g) * 0.05, x.T @ x / T


def test_lemma_1_is_inverting_afresh() -> None:
    """Remove p from H = 2XXᵀ and compare."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = 2 * x @ x.T
    p = torch.tensor([0, 4, 8])
    found = removed(torch.linalg.inv(H).expand(3, 9, 9), p)
    for one, gone in zip(found, p.tolist(), strict=True):
        rest = [i for i in range(9) if i != gone]
        torch.testing.assert_close(one[rest][:, rest], torch.linalg.inv(H[rest][:, rest]))
        assert not one[gone].any() and not one[:, gone].any()
    twice = removed(found[:1], torch.tensor([5]))[0]
    rest = [1, 2, 3, 4, 6, 7, 8]
    torch.testing.assert_close(twice[rest][:, rest], torch.linalg.inv(H[rest][:, rest]))


@pytest.mark.parametrize("text", ["int4-g32", "int3-g64-asym", "int2-channel", "nf4-g32"])
@pytest.mark.parametrize("K", [64, 80])
def test_in_gptqs_order_it_is_gptq(text: str, K: int) -> None:
    w, gram = problem(K=K)
    scheme = Scheme.parse(text)
    expected = gptq(w, gram, scheme, sweeps=0, compensated_scales=False).q
    scale, zero = expected.scales.scale, expected.scales.zero
    found = _rounded(
        w, inverse_hessian(gram, 0.01), scheme, spread(scale, scheme, K).expand(12, K),
        None if zero is None else spread(zero, scheme, K).expand(12, K), visiting_order(gram.diagonal(), scheme.unit),
    )  # fmt: skip
    assert torch.equal(found, expected.codes)


def test_its_own_order_loses_less() -> None:
    lost = {"greedy": 0.0, "curvature": 0.0, "search": 0.0, "rtn": 0.0}
    for K in (48, 64, 96):
        w, gram = problem(N=32, K=K)
        scheme = Scheme.parse("int3-channel")
        for name in ("greedy", "curvature"):
            lost[name] += loss(w, decode(obq(w, gram, scheme, order=name).q), gram)  # type: ignore[arg-type]
        lost["search"] += loss(w, decode(search(w, gram, scheme).q), gram)
        lost["rtn"] += loss(w, decode(rtn(w, None, scheme).q), gram)
    print(lost)
    assert lost["greedy"] < 0.7 * lost["search"] < lost["rtn"]
    assert lost["greedy"] < 1.05 * lost["curvature"]


def test_one_step_is_optimal_brain_surgeons() -> None:
    """With one weight rounded, the others move where a least-squares solution puts them."""
    w, gram = problem(N=1, K=6)
    inverse = inverse_hessian(gram, 0.01)
    H = torch.linalg.inv(inverse)
    p, value = 2, 0.123
    moved = w[0].double() - (w[0, p] - value) * inverse[:, p] / inverse[p, p]
    assert float(moved[p]) == pytest.approx(value)
    rest = [0, 1, 3, 4, 5]
    by_hand = w[0, rest].double() - torch.linalg.solve(H[rest][:, rest], H[rest, p]) * (value - w[0, p].double())
    torch.testing.assert_close(moved[rest], by_hand)


def test_rows_at_a_time_and_purity(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    w, gram = problem(N=10, K=32)
    kept = w.clone(), gram.clone()
    whole = obq(w, gram, Scheme.parse("int3-g32")).q
    monkeypatch.setattr(sys.modules["bitwright.methods.obq"], "AT_ONCE", 3 * 32 * 32)
    assert torch.equal(obq(w, gram, Scheme.parse("int3-g32")).q.codes, whole.codes)
    assert torch.equal(w, kept[0]) and torch.equal(gram, kept[1])


def test_dead_columns_become_zero_and_convolutions_keep_their_shape() -> None:
    w, gram = problem(N=8, K=36)
    gram[5], gram[:, 5] = 0, 0
    q = obq(w.reshape(8, 4, 3, 3), gram, Scheme.parse("int4-channel")).q
    assert decode(q).shape == (8, 4, 3, 3)
    assert not decode(q).reshape(8, 36)[:, 5].any()


def test_refusals() -> None:
    w, gram = problem()
    with pytest.raises(RecipeError, match="needs calibration"):
        obq(w, None, Scheme.parse("int4-g32"))
    with pytest.raises(RecipeError, match="would take days"):
        obq(torch.zeros(2, 2048), torch.eye(2048), Scheme.parse("int4-g32"))
    with pytest.raises(RecipeError, match="unknown order"):
        obq(w, gram, Scheme.parse("int4-g32"), order="random")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="not positive definite"):
        obq(w, gram - 100 * torch.eye(64), Scheme.parse("int4-g32"))
