"""Pruning: Optimal Brain Surgeon against exact least squares, the global step against a heap, patterns, refusals."""

import heapq
import itertools
import sys

import pytest
import torch
from torch import Tensor

from bitwright.errors import NumericsError, RecipeError
from bitwright.methods.obq import Inverses, inverse_hessian, obq, without
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import energy, loss
from bitwright.numerics.scheme import Scheme
from bitwright.sparsity import PRUNERS, magnitude, prune, wanda
from bitwright.sparsity.obs import Trace, cheapest, saliency, traced


def problem(N: int = 16, K: int = 48, T: int = 400) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram of inputs that are correlated and of unlike size."""
    g = torch.Generator().manual_seed(K)
    x = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=g))
    x *= torch.randn(K, generator=g).exp()
    return torch.randn(N, K, generator=g) * 0.05, x.T @ x / T


def refitted(w: Tensor, H: Tensor, rest: list[int]) -> Tensor:
    """The least-squares oracle: zeros but at `rest`, where (ŵ − w) H (ŵ − w)ᵀ is least. w [K], float64."""
    best = torch.zeros_like(w)
    best[rest] = torch.linalg.solve(H[rest][:, rest], H[rest] @ w)
    return best


def by_hand(w: Tensor, H: Tensor) -> tuple[list[int], list[float]]:
    """Greedy removal of every weight of a row w [K], everything solved afresh at every step for each candidate."""
    rest, order, total = list(range(len(w))), [], [0.0]
    while rest:
        tries = []
        for p in rest:
            e = refitted(w, H, [i for i in rest if i != p]) - w
            tries.append((float(e @ H @ e), p))
        least, p = min(tries)
        total.append(least)
        order.append(p)
        rest.remove(p)
    return order, [b - a for a, b in itertools.pairwise(total)]


# ------------------------------------------------------------------------------------------- Optimal Brain Surgeon


def test_saliency_is_the_rise_of_the_squared_error() -> None:
    """H = 2XXᵀ: remove each weight by itself, solve for the others on the inputs themselves."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 30, generator=g, dtype=torch.float64)  # [K, T], as the papers have it
    w = torch.randn(2, 7, generator=g, dtype=torch.float64)
    found = saliency(w, torch.linalg.inv(2 * x @ x.T))
    for row, p in itertools.product(range(2), range(7)):
        rest = [i for i in range(7) if i != p]
        others = torch.linalg.lstsq(x[rest].T, x.T @ w[row]).solution
        assert float(found[row, p]) == pytest.approx(float((x[rest].T @ others - x.T @ w[row]).square().sum()))
    torch.testing.assert_close(saliency(w, torch.linalg.inv(x @ x.T)), found / 2)
    torch.testing.assert_close(saliency(w, torch.linalg.inv(2 * x @ x.T).expand(2, 7, 7)), found)


def test_saliency_after_a_removal_is_that_of_the_smaller_problem() -> None:
    """Lemma 1: remove p from H = 2XXᵀ, and invert afresh what is left."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 40, generator=g, dtype=torch.float64)
    H, p = 2 * x @ x.T, 4
    rest = [i for i in range(9) if i != p]
    w, left = torch.randn(1, 9, generator=g, dtype=torch.float64), Inverses(torch.linalg.inv(H), 1, 1)
    moved = w - w[:, p] * left.remove(torch.tensor([p]))
    torch.testing.assert_close(moved[0], refitted(w[0], H, rest))
    inverse = torch.linalg.inv(H[rest][:, rest])
    torch.testing.assert_close(left.diagonal[0, rest], inverse.diagonal())
    torch.testing.assert_close((moved.square() / (2 * left.diagonal))[:, rest], saliency(moved[:, rest], inverse))


def test_the_first_step_is_the_best_of_all() -> None:
    """One weight of one row: brute force over all of them."""
    w, gram = problem(N=5, K=12)
    H = gram.double()
    for row in w:
        tries = [refitted(row.double(), H, [i for i in range(12) if i != p]) for p in range(12)]
        lost = [loss(row[None], one.float()[None], gram) for one in tries]
        found = prune(row[None], gram, sparsity=1 / 12, damping=0)
        assert int(found.mask.nonzero()[0, 1]) == lost.index(min(lost))
        torch.testing.assert_close(found.weight[0], tries[lost.index(min(lost))].float())
        assert loss(row[None], found.weight, gram) == pytest.approx(min(lost), rel=1e-4)


def test_a_trace_is_greedy_removal_with_everything_solved_afresh() -> None:
    w, gram = problem(N=3, K=14)
    inverse = inverse_hessian(gram, 0.01)[0]
    H = torch.linalg.inv(inverse)
    trace = traced(w, inverse / 2)
    for row in range(3):
        order, rise = by_hand(w[row].double(), H)
        assert trace.order[row].tolist() == order
        torch.testing.assert_close(trace.rise[row], torch.tensor(rise, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(trace.rise.sum(1), energy(w.double(), H))  # in the end all is lost


def test_refitting_is_least_squares_and_so_are_the_single_steps() -> None:
    w, gram = problem(N=6, K=20)
    inverse = inverse_hessian(gram, 0.01)[0]
    H = torch.linalg.inv(inverse)
    found = prune(w, gram, sparsity=0.6)
    for row in range(6):
        rest = (~found.mask[row]).nonzero()[:, 0].tolist()
        torch.testing.assert_close(found.weight[row], refitted(w[row].double(), H, rest).float(), atol=1e-7, rtol=1e-5)
    left, now = Inverses(inverse, 6, 12), w.double()
    trace = traced(w, inverse / 2)
    for step in range(12):
        p = trace.order[:, step]
        now = now - now[torch.arange(6), p][:, None] * left.remove(p)
    mask = cheapest(Trace(trace.order, torch.arange(20.0).expand(6, 20)), 6 * 12, 20)  # the same number from each row
    torch.testing.assert_close(without(w.double(), inverse, mask), now.masked_fill(mask, 0), atol=1e-12, rtol=1e-8)
    assert float(now[mask].abs().max()) < 1e-12


def test_not_far_from_the_best_of_all_masks() -> None:
    """Every way to keep 4 weights of 9."""
    for seed in range(4):
        w, gram = problem(N=1, K=9 + seed)
        ways = itertools.combinations(range(9 + seed), 4)
        best = min(loss(w, refitted(w[0].double(), gram.double(), list(way))[None], gram) for way in ways)
        found = prune(w, gram, sparsity=(5 + seed) / (9 + seed), damping=1e-7)
        assert best <= loss(w, found.weight, gram) * (1 + 1e-4)
        assert loss(w, found.weight, gram) < 1.5 * best


# -------------------------------------------------------------------------------------------------- the global step


@pytest.mark.parametrize("count", [0, 1, 17, 30, 60])
def test_the_global_step_is_a_heap_of_each_rows_next(count: int) -> None:
    """With rises that fall as well as grow."""
    g = torch.Generator().manual_seed(count)
    rise = torch.rand(5, 12, generator=g, dtype=torch.float64)
    order = torch.stack([torch.randperm(12, generator=g) for _ in range(5)])
    heap, steps = [(float(rise[row, 0]), row) for row in range(5)], [0] * 5
    heapq.heapify(heap)
    for _ in range(count):
        _, row = heapq.heappop(heap)
        steps[row] += 1
        if steps[row] < 12:
            heapq.heappush(heap, (float(rise[row, steps[row]]), row))
    mask = cheapest(Trace(order, rise), count, 12)
    for row in range(5):
        assert set(mask[row].nonzero()[:, 0].tolist()) == set(order[row, : steps[row]].tolist())


def test_rows_that_matter_less_lose_more() -> None:
    w, gram = problem(N=24)
    w *= torch.linspace(0.3, 3, 24)[:, None]
    found = prune(w, gram, sparsity=0.5)
    counts = found.mask.sum(1)
    assert int(counts[:8].min()) > int(counts[-8:].max())
    each = torch.cat([prune(row[None], gram, sparsity=0.5).weight for row in w])
    assert loss(w, found.weight, gram) < 0.9 * loss(w, each, gram)


# ------------------------------------------------------------------------------------------------------ all pruners


def test_obs_loses_less_than_wanda_and_wanda_less_than_magnitude() -> None:
    w, gram = problem(N=32, K=64)
    inverse = inverse_hessian(gram, 0.01)[0]
    for options in ({"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": (2, 4)}):
        lost = {name: loss(w, pruner(w, gram, **options).weight, gram) for name, pruner in PRUNERS.items()}
        lost["wanda, refitted"] = loss(w, without(w, inverse, wanda(w, gram, **options).mask), gram)  # type: ignore[arg-type]
        print(options, lost)
        assert lost["obs"] < lost["wanda, refitted"] < lost["wanda"] < lost["magnitude"]
        assert lost["obs"] < 0.6 * lost["wanda"]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.77, 0.9999])
@pytest.mark.parametrize("name", PRUNERS)
def test_just_as_many_as_asked(name: str, sparsity: float) -> None:
    w, gram = problem()
    w[3] = w[4]  # ties
    found = PRUNERS[name](w, gram, sparsity=sparsity)
    each = round(sparsity * 48)
    assert int(found.mask.sum()) == (16 * each if name == "wanda" else round(sparsity * 16 * 48))
    assert name != "wanda" or (found.mask.sum(1) == each).all()
    assert not found.weight[found.mask].any()
    assert found.weight[~found.mask].all()
    if sparsity == 0:
        assert torch.equal(found.weight, w)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("name", PRUNERS)
def test_patterns_hold_everywhere(name: str, pattern: tuple[int, int]) -> None:
    w, gram = problem()
    found = PRUNERS[name](w, gram, pattern=pattern)
    assert ((found.weight != 0).view(-1, pattern[1]).sum(1) == pattern[0]).all()
    assert torch.equal(found.weight == 0, found.mask)


def test_a_pattern_is_chosen_step_by_step_too() -> None:
    """2:4 on 8 weights: the cheapest of those whose four have not lost two yet, everything solved afresh."""
    w, gram = problem(N=6, K=8)
    H, found = gram.double(), prune(w, gram, pattern=(2, 4), damping=0)
    for row in range(6):
        rest = list(range(8))
        while len(rest) > 4:
            free = [p for p in rest if len([q for q in rest if q // 4 == p // 4]) > 2]
            errors = {p: refitted(w[row].double(), H, [i for i in rest if i != p]) - w[row].double() for p in free}
            rest.remove(min(free, key=lambda p: float(errors[p] @ H @ errors[p])))
        assert (~found.mask[row]).nonzero()[:, 0].tolist() == rest


def test_with_a_diagonal_gram_it_is_size_alone() -> None:
    """Inputs that have nothing to do with one another: the lowest w² gramₖₖ of all go, and nothing makes up for them."""
    w, gram = problem()
    gram = gram.diagonal().diag()
    score = w.double().square() * (gram.diagonal().double() + 0.01 * gram.diagonal().mean())
    found = prune(w, gram, sparsity=0.4)
    lowest = score.flatten().argsort()[: round(0.4 * 16 * 48)]
    assert torch.equal(found.mask, torch.zeros(16 * 48, dtype=torch.bool).index_fill(0, lowest, True).view(16, 48))
    assert torch.equal(found.weight, w.masked_fill(found.mask, 0))
    kept = prune(w, gram, pattern=(2, 4), damping=0).mask
    assert torch.equal(kept, wanda(w, gram, pattern=(2, 4)).mask)


def test_magnitude_and_wanda_by_hand() -> None:
    w = torch.tensor([[3.0, -1.0, 0.5, 2.0], [-8.0, 7.0, 6.0, -5.0]])
    gram = torch.diag(torch.tensor([1.0, 100.0, 1.0, 0.0]))
    keep = torch.tensor([[0.0, 0, 0, 0], [-8, 7, 6, -5]])
    assert torch.equal(magnitude(w, None, sparsity=0.5).weight, keep)
    assert torch.equal(wanda(w, gram, sparsity=0.5).weight, torch.tensor([[3.0, -1, 0, 0], [-8, 7, 0, 0]]))
    assert torch.equal(magnitude(w, None, pattern=(1, 2)).weight, torch.tensor([[3.0, 0, 0, 2], [-8, 0, 6, 0]]))
    assert torch.equal(wanda(w, gram, pattern=(1, 2)).weight, torch.tensor([[0.0, -1, 0.5, 0], [0, 7, 6, 0]]))
    assert torch.equal(magnitude(torch.ones(1, 4), None, sparsity=0.5).mask, torch.tensor([[True, True, False, False]]))


@pytest.mark.parametrize("name", PRUNERS)
def test_arguments_stay_as_they_are_and_results_are_like_them(name: str) -> None:
    w, gram = problem()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given, inputs = w.to(dtype), gram.to(torch.float64 if dtype == torch.float64 else torch.float32)
        kept = given.clone(), inputs.clone()
        found = PRUNERS[name](given.view(16, 12, 2, 2), inputs, sparsity=0.5)
        assert found.weight.dtype == dtype
        assert found.weight.shape == found.mask.shape == (16, 12, 2, 2)
        assert torch.equal(given, kept[0])
        assert torch.equal(inputs, kept[1])
        assert torch.equal(found.mask.view(16, 48), PRUNERS[name](given, inputs, sparsity=0.5).mask)


def test_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem()
    whole = prune(w, gram, sparsity=0.5)
    for module in ("bitwright.methods.obq", "bitwright.sparsity.obs"):
        monkeypatch.setattr(sys.modules[module], "AT_ONCE", 3 * 48 * 48)
    found = prune(w, gram, sparsity=0.5)
    assert torch.equal(found.mask, whole.mask)
    torch.testing.assert_close(found.weight, whole.weight)


def test_inputs_that_are_never_there_go_first() -> None:
    w, gram = problem()
    dead = [5, 20, 21]
    gram[dead], gram[:, dead] = 0, 0
    for damping in (0.01, 0.0):
        found = prune(w, gram, sparsity=0.3, damping=damping)
        assert found.mask[:, dead].all()
        assert int(found.mask.sum()) == round(0.3 * 16 * 48)
        assert found.damping == damping
    few = prune(w, gram, sparsity=0.02)
    assert not few.mask.any(0)[[i for i in range(48) if i not in dead]].any()
    assert torch.equal(few.weight, w.masked_fill(few.mask, 0))  # nothing to make up for
    assert prune(w, torch.zeros(48, 48), sparsity=0.5).mask.float().mean() == 0.5


def test_pruned_then_quantized() -> None:
    """2:4 in int4: zeros stay, and the loss is near that of pruning alone."""
    w, gram = problem(N=24, K=64)
    found, scheme = prune(w, gram, pattern=(2, 4)), Scheme.parse("int4-g32")
    decoded = decode(obq(w, gram, scheme, pruned=found.mask).q)
    assert ((decoded != 0).view(-1, 4).sum(1) <= 2).all()
    assert torch.equal(decode(obq(found.weight, gram, scheme, pruned=found.mask).q), decoded)
    cut = loss(w, decode(obq(w, gram, scheme).q).masked_fill(found.mask, 0), gram)
    lost = loss(w, found.weight, gram), loss(w, decoded, gram), cut
    print(lost)
    assert lost[0] < lost[1] < 1.5 * lost[0]
    assert lost[1] < 0.6 * lost[2]


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of the two"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "give one of the two"),
        ({"sparsity": 1.0}, r"outside \[0, 1\)"),
        ({"sparsity": -0.1}, r"outside \[0, 1\)"),
        ({"sparsity": float("nan")}, r"outside \[0, 1\)"),
        ({"pattern": (4, 4)}, "0 < n < m"),
        ({"pattern": (0, 4)}, "0 < n < m"),
        ({"pattern": (2, 5)}, "not a multiple of the pattern's 5"),
    ],
)
def test_targets_that_mean_nothing(name: str, options: dict[str, object], message: str) -> None:
    w, gram = problem()
    with pytest.raises(RecipeError, match=message):
        PRUNERS[name](w, gram, **options)


@pytest.mark.parametrize("name", PRUNERS)
def test_hostile_numbers(name: str) -> None:
    w, gram = problem()
    w[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="weights are not finite"):
        PRUNERS[name](w, gram, sparsity=0.5)
    if name == "magnitude":
        return
    w[0, 0], gram[3, 4] = 0, torch.inf
    with pytest.raises(NumericsError, match="Gram matrix of the inputs is not finite"):
        PRUNERS[name](w, gram, sparsity=0.5)
    with pytest.raises(RecipeError, match=f"{name} needs calibration"):
        PRUNERS[name](w, None, sparsity=0.5)
    with pytest.raises(RecipeError, match="not that of weights with K = 48"):
        PRUNERS[name](w, torch.eye(47), sparsity=0.5)


def test_obs_refuses_what_it_cannot_do() -> None:
    w, gram = problem()
    with pytest.raises(RecipeError, match="would take hours"):
        prune(torch.zeros(2, 2048), torch.eye(2048), sparsity=0.5)
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="not a number from 0 on"):
            prune(w, gram, sparsity=0.5, damping=damping)
    with pytest.raises(NumericsError, match="not positive definite"):
        prune(w, gram - 100 * torch.eye(48), sparsity=0.5)
    few = torch.randn(10, 48, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericsError, match="not positive definite"):  # ten tokens
        prune(w, few.T @ few / 10, sparsity=0.5, damping=0)
    assert prune(w, few.T @ few / 10, sparsity=0.5).weight.isfinite().all()
