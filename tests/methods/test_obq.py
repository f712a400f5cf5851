"""OBQ: the inverse without a row and column, GPTQ's codes in GPTQ's order, and a better loss in its own."""

import pytest
import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError, SchemeError
from bitwright.methods import gptq
from bitwright.methods.gptq import column_order
from bitwright.methods.obq import Inverses, _rounded, inverse_hessian, obq, without
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search
from bitwright.numerics.codec import decode, per_column
from bitwright.numerics.loss import loss
from bitwright.numerics.scheme import Scheme
from bitwright.sparsity.obs import prune


def problem(N: int = 12, K: int = 64, T: int = 500) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(K)
    x = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=g))
    return torch.randn(N, K, generator=g) * 0.05, x.T @ x / T


def test_lemma_1_is_inverting_afresh() -> None:
    """Remove weights from H = 2XXᵀ, other ones in each row, and compare."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = 2 * x @ x.T
    left, rests = Inverses(torch.linalg.inv(H), 3, 3), [list(range(9)) for _ in range(3)]
    for step in ([0, 4, 8], [5, 5, 5], [8, 0, 4]):
        shares = left.remove(torch.tensor(step))
        for row, (rest, p) in enumerate(zip(rests, step, strict=True)):
            before = torch.linalg.inv(H[rest][:, rest])[:, rest.index(p)]
            torch.testing.assert_close(shares[row, rest], before / before[rest.index(p)])
            assert int(shares[row].count_nonzero()) == len(rest)
            rest.remove(p)
            afresh = torch.linalg.inv(H[rest][:, rest])
            found = left.inverse - left.columns[row, : left.gone].T @ left.columns[row, : left.gone]
            torch.testing.assert_close(found[rest][:, rest], afresh)
            torch.testing.assert_close(left.diagonal[row, rest], afresh.diagonal())
            assert left.here[row].nonzero()[:, 0].tolist() == rest


@pytest.mark.parametrize("text", ["int4-g32", "int3-g64-asym", "int2-channel", "nf4-g32"])
@pytest.mark.parametrize("K", [64, 80])
def test_in_gptqs_order_it_is_gptq(text: str, K: int) -> None:
    w, gram = problem(K=K)
    scheme = Scheme.parse(text)
    expected = gptq(w, gram, scheme, sweeps=0, compensated_scales=False).q
    scale, zero = expected.scales.scale, expected.scales.zero
    found = _rounded(
        w,
        inverse_hessian(gram, 0.01)[0],
        scheme,
        per_column(scale, scheme, K).expand(12, K),
        None if zero is None else per_column(zero, scheme, K).expand(12, K),
        column_order(gram.diagonal(), scheme.unit),
        torch.zeros(12, K, dtype=torch.bool),
    )
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
    inverse = inverse_hessian(gram, 0.01)[0]
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
    with pytest.raises(RecipeError, match="would take hours"):
        obq(torch.zeros(2, 2048), torch.eye(2048), Scheme.parse("int4-g32"))
    with pytest.raises(RecipeError, match="unknown order"):
        obq(w, gram, Scheme.parse("int4-g32"), order="random")  # type: ignore[arg-type]
    with pytest.raises(NumericsError, match="not positive definite"):
        obq(w, gram - 100 * torch.eye(64), Scheme.parse("int4-g32"))
    gram[:, 7], gram[7] = gram[:, 8], gram[8]
    for same in (
        gram[8, 8],
        gram[8, 8].nextafter(torch.tensor(torch.inf)),
    ):  # two inputs that are the same, but for a bit
        gram[7, 7] = same
        with pytest.raises(NumericsError, match="not positive definite"):
            obq(w, gram, Scheme.parse("int4-g32"), damping=0)


# ----------------------------------------------------------------------------------------------- pruned and quantized

ZEROS = [
    "int4-g32",
    "int3-g32-asym",
    "int2-channel-asym1",
    "nf4-g32-dq",
    "fp8-channel",
    "mxfp4",
    "nvfp4",
    "ternary-channel",
    "q6_k",
]


def masked(N: int = 12, K: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """A problem, and a mask of other weights and another number of them in each row, none in the last."""
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < torch.linspace(0.9, 0.1, N)[:, None]
    mask[-1] = False
    return *problem(N, K), mask


@pytest.mark.parametrize("order", ["greedy", "curvature"])
@pytest.mark.parametrize("text", ZEROS)
def test_pruned_weights_are_exactly_zero(text: str, order: str) -> None:
    w, gram, mask = masked()
    decoded = decode(obq(w, gram, Scheme.parse(text), order=order, pruned=mask).q)  # type: ignore[arg-type]
    assert not decoded[mask].any()
    assert decoded[~mask].any()


@pytest.mark.parametrize("order", ["greedy", "curvature"])
def test_what_is_left_is_obq_without_the_pruned_columns(order: str) -> None:
    """Cut the pruned columns out of H, refit by least squares, invert afresh, and round the short row: the same codes."""
    w, gram, mask = masked()
    scheme = Scheme.parse("int3-channel")
    q = obq(w, gram, scheme, order=order, pruned=mask).q  # type: ignore[arg-type]
    H = torch.linalg.inv(inverse_hessian(gram, 0.01)[0])
    for row in range(len(w)):
        rest = (~mask[row]).nonzero()[:, 0]
        own = H[rest][:, rest]
        refitted = torch.linalg.solve(own, H[rest] @ w[row].double())[None].float()
        visit = column_order(gram.diagonal()[rest], None) if order == "curvature" else None
        scale = q.scales.scale[row : row + 1].expand(1, len(rest))
        alone = _rounded(refitted, torch.linalg.inv(own), scheme, scale, None, visit, torch.zeros_like(refitted).bool())
        assert torch.equal(alone[0], q.codes[row, rest])


def test_pruning_with_quantization_in_mind_loses_less() -> None:
    """Than to round and then cut, or to cut and then round to nearest; and it is idempotent."""
    w, gram, mask = masked(N=32)
    scheme = Scheme.parse("int4-channel")
    q = obq(w, gram, scheme, pruned=mask).q
    cut = decode(obq(w, gram, scheme).q).masked_fill(mask, 0)
    refitted = without(w, inverse_hessian(gram, 0.01)[0], mask)
    nearest = decode(search(refitted, gram, scheme).q)
    lost = [loss(w, decoded, gram) for decoded in (refitted, decode(q), nearest, cut)]
    print(lost)
    assert lost[0] < lost[1] < lost[2] < 0.7 * lost[3]
    assert torch.equal(obq(refitted, gram, scheme, pruned=mask).q.codes, q.codes)


def test_a_mask_of_nothing_changes_nothing_and_masks_are_not_changed() -> None:
    w, gram, mask = masked()
    scheme, kept = Scheme.parse("int3-g32-asym"), (w.clone(), mask.clone())
    obq(w, gram, scheme, pruned=mask)
    assert torch.equal(w, kept[0]) and torch.equal(mask, kept[1])
    q = obq(w.reshape(12, 16, 2, 2), gram, scheme, pruned=torch.zeros(12, 16, 2, 2, dtype=torch.bool)).q
    assert torch.equal(q.codes, obq(w, gram, scheme).q.codes)
    assert q.shape == (12, 16, 2, 2)
    gram = gram.double()
    kept = gram.clone(), mask
    obq(w, gram, scheme)
    assert torch.equal(gram, kept[0])


@pytest.mark.parametrize("text", ["q4_1", "iq4_nl", "binary-channel", "q4_k"])
def test_schemes_without_a_zero_are_refused(text: str) -> None:
    w, gram, mask = masked()
    with pytest.raises(SchemeError, match="no code for zero"):
        obq(w, gram, Scheme.parse(text), pruned=mask)


@pytest.mark.parametrize("wrong", [torch.zeros(12, 63, dtype=torch.bool), torch.zeros(12, 64), True])
def test_what_is_not_a_mask_is_refused(wrong: object) -> None:
    w, gram = problem()
    with pytest.raises(RecipeError, match="not a mask of bool"):
        obq(w, gram, Scheme.parse("int4-g32"), pruned=wrong)  # type: ignore[arg-type]


def test_damping_grows_where_the_gram_has_rounding_errors() -> None:
    """As of few tokens in bfloat16: its least eigenvalues are below zero by more than the damping."""
    x = torch.randn(100, 32) + 6
    gram = x.T @ x / 100
    gram -= 0.02 * gram.diagonal().mean() * torch.eye(32)
    assert float(torch.linalg.eigvalsh(gram).min()) < -0.01 * float(gram.diagonal().mean())
    w = torch.randn(4, 32)
    found = obq(w, gram, Scheme.parse("int4-g32"))
    assert found.damping == 0.1 and loss(w, decode(found.q), gram) < 0.1
    pruned = prune(w, gram, sparsity=0.5)
    assert pruned.damping == 0.1 and int(pruned.mask.sum()) == 64
    with pytest.raises(NumericsError, match="not positive definite"):
        obq(w, gram - 10 * gram.diagonal().mean() * torch.eye(32), Scheme.parse("int4-g32"))
