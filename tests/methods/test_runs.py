"""GPTQ and coordinate descent on grids with a codebook: IQ1, IQ2, IQ3."""

import itertools

import pytest
import torch
from torch import Tensor

from bitwright.methods import runs
from bitwright.methods.coordinate_descent import coordinate_descent
from bitwright.methods.gptq import gptq
from bitwright.methods.rtn import rtn
from bitwright.methods.search import search
from bitwright.numerics.codec import code_dtype, decode, values
from bitwright.numerics.lattice import lattice, nearest
from bitwright.numerics.loss import energy, loss
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import SUPERBLOCK, Scheme
from quantized_weights import IN_RUNS, assert_representable, assert_same, one_thread, random_weight

__all__ = ["one_thread"]  # a fixture that every test here uses

K = 288  # a super-block and one group of the next


def correlated(columns: int, seed: int = 1) -> Tensor:
    """A Gram of inputs that share a few directions."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.diag(torch.rand(columns, generator=g) + 0.2)
    x = torch.randn(4 * columns, columns, generator=g) @ mix
    return x.T @ x / len(x)


def assert_in_the_codebook(q: QTensor) -> None:
    one = lattice(q.scheme.grid)
    assert q.codes.dtype == code_dtype(q.scheme)
    assert int(one.index(q.codes)[1].min()) >= 0
    if one.even:
        negative = (q.codes <= one.top // 2).unflatten(1, (-1, 8)).sum(-1)
        assert int((negative % 2).max()) == 0
    assert_representable(q.scales, q.scheme)


@pytest.mark.parametrize("start", ["rtn", "search", "gptq"])
@pytest.mark.parametrize("text", IN_RUNS)
def test_the_loss_falls_from_sweep_to_sweep(text: str, start: str) -> None:
    """From poor starts by much, and from GPTQ; codes stay in the codebook, arguments as they were."""
    scheme, w, gram = Scheme.parse(text), random_weight(12, K), correlated(K)
    q = (
        {"rtn": rtn, "search": search}[start](w, gram, scheme).q
        if start != "gptq"
        else gptq(w, gram, scheme, sweeps=0).q
    )
    kept, kept_codes = w.clone(), q.codes.clone()
    before = energy(w - decode(q), gram)
    better = coordinate_descent(w, gram, q)
    after = energy(w - decode(better), gram)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum() * (0.97 if start == "gptq" else 0.8)
    again = energy(w - decode(coordinate_descent(w, gram, better)), gram)
    assert (again <= after * (1 + 1e-5)).all()
    assert_in_the_codebook(better)
    assert torch.equal(w, kept)
    assert torch.equal(q.codes, kept_codes)


@pytest.mark.parametrize("text", IN_RUNS)
def test_gptq_loses_less_than_a_search_and_less_with_several_scales(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, w, gram = Scheme.parse(text), random_weight(24, K), correlated(K)
    by_search = loss(w, decode(search(w, gram, scheme).q), gram)
    several = gptq(w, gram, scheme, sweeps=0).q
    monkeypatch.setattr(runs, "FIRST_MOVES", (0,))
    one = gptq(w, gram, scheme, sweeps=0).q
    assert_in_the_codebook(several)
    assert loss(w, decode(several), gram) < 0.98 * loss(w, decode(one), gram) < 0.98 * 0.8 * by_search


@pytest.mark.parametrize("text", IN_RUNS)
def test_the_loss_of_a_group_is_exact(text: str) -> None:
    """What a group loses beside what earlier errors left there, by the whole matrices."""
    scheme = Scheme.parse(text)
    g = scheme.group_length(K)
    U = torch.linalg.cholesky(correlated(g).flip(0, 1)).flip(0, 1)
    true, moved = random_weight(40, g), 0.3 * random_weight(40, g, 1)
    scale = search(true, None, scheme).q.scales.scale
    level, lost = runs._compensated(true + moved, true, U, scale, scheme)
    expected = (moved * U.diagonal() + (true - level * scale) @ U).square().sum(1)
    torch.testing.assert_close(lost, expected, rtol=1e-3, atol=1e-5)


def all_entries(grid: str) -> Tensor:
    """Every combination of values that a run of IQ2_XXS, IQ2_XS or IQ2_S can have, [M, 8]."""
    one = lattice(grid)
    signs = torch.tensor(
        [s for s in itertools.product((1.0, -1.0), repeat=8) if not one.even or s.count(-1.0) % 2 == 0]
    )
    return (one.points[0][:, None] * signs).flatten(0, 1)


@pytest.mark.parametrize("columns", [8, 16])
def test_runs_end_at_the_best_of_all_entries(columns: int) -> None:
    """Hardly correlated inputs, a single group: under its final scale no other entry of a run loses less, or hardly less."""
    scheme, every = Scheme.parse("iq2_xxs"), all_entries("iq2_xxs")
    w, gram = random_weight(16, columns), torch.eye(columns) + 0.05 * correlated(columns)
    q = coordinate_descent(w, gram, rtn(w, None, scheme).q, sweeps=6)
    decoded, error = decode(q), w - decode(q)
    for at in range(0, columns, 8):
        run = slice(at, at + 8)
        moved = every * q.scales.scale[:, :1, None] - decoded[:, None, run]  # [N, M, 8]
        change = (moved @ gram[run, run] * moved).sum(-1) - 2 * torch.einsum("nmi,ni->nm", moved, error @ gram[:, run])
        lower = -change.min(1).values / energy(w, gram)
        assert (lower < 1e-4).float().mean() > 0.9
        assert lower.max() < 0.01


def slow_sweep(w: Tensor, H: Tensor, q: QTensor) -> Tensor:
    """One sweep in float64 with every loss computed anew from the whole matrices: decoded weights [N, K]."""
    scheme, g, width = q.scheme, q.scheme.group_length(K), lattice(q.scheme.grid).width
    level, now = values(q.codes, scheme).double(), decode(q).double()
    assert q.scales.outer is not None
    outer = q.scales.outer.double().clone()
    integer = (
        q.scales.scale.double() / outer.repeat_interleave(SUPERBLOCK // g, 1)[:, : q.scales.scale.shape[1]]
    ).round()

    def lost(decoded: Tensor) -> Tensor:
        return (((w - decoded) @ H) * (w - decoded)).sum(1)

    for group in range(scheme.groups(K)):
        here, block = range(K)[group * g : (group + 1) * g], group * g // SUPERBLOCK
        least, best = lost(now), (integer[:, group], level[:, here.start : here.stop], now)
        for by in runs.MOVES:
            tried = (integer[:, group] + by).clamp(1, scheme.levels.odd)
            scale, mine, decoded = (tried * outer[:, block])[:, None], level.clone(), now.clone()
            decoded[:, here.start : here.stop] = mine[:, here.start : here.stop] * scale
            for at in range(here.start, here.stop, width):
                run = slice(at, min(at + width, here.stop))
                own = H[run, run] + runs.SOFT * H.diagonal()[here.start : here.stop].mean() * torch.eye(run.stop - at)
                wanted = decoded[:, run] + torch.linalg.solve(own, ((w - decoded) @ H)[:, run].T).T
                entry = values(
                    nearest((wanted / scale).float(), scheme.grid, H[run, run].diagonal().float()[None]), scheme
                )
                other = decoded.clone()
                other[:, run] = entry.double() * scale
                better = (lost(other) < lost(decoded))[:, None]
                decoded = torch.where(better, other, decoded)
                mine[:, run] = torch.where(better, entry.double(), mine[:, run])
            fallen = lost(decoded) < least
            least = torch.where(fallen, lost(decoded), least)
            best = tuple(  # type: ignore[assignment]
                torch.where(fallen.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip((tried, mine[:, here.start : here.stop], decoded), best, strict=True)
            )
        integer[:, group], level[:, here.start : here.stop], now = best
        if here.stop % SUPERBLOCK == 0 or here.stop == K:
            whole = slice(block * SUPERBLOCK, here.stop)
            scale = integer.repeat_interleave(g, 1)[:, whole]
            one = level[:, whole] * scale
            step = (one * ((w - now) @ H)[:, whole]).sum(1) / ((one @ H[whole, whole]) * one).sum(1)
            other, new = now.clone(), (outer[:, block] + step).half().double()
            other[:, whole] = one * new[:, None]
            better = lost(other) < lost(now)
            outer[:, block] = torch.where(better, new, outer[:, block])
            now = torch.where(better[:, None], other, now)
    return now


@pytest.mark.parametrize("text", IN_RUNS)
def test_one_sweep_against_the_slow_oracle(text: str) -> None:
    scheme, w, gram = Scheme.parse(text), random_weight(6, K), correlated(K)
    q = search(w, gram, scheme).q
    expected, mine = slow_sweep(w.double(), gram.double(), q), decode(coordinate_descent(w, gram, q)).double()
    same = (mine - expected).abs() <= 1e-4 * w.abs().max()
    assert (
        same.float().mean() >= 0.97
    )  # where two entries are nearly equally good, either may be taken, and all later ones differ
    assert energy(w - mine.float(), gram).sum().item() == pytest.approx(
        energy(w - expected.float(), gram).sum().item(), rel=5e-3
    )


def test_few_tokens_and_inputs_that_are_never_active() -> None:
    scheme, w = Scheme.parse("iq2_xs"), random_weight(6, K)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(2))
    x[:, 40:60] = 0
    gram = x.T @ x / 5
    q = rtn(w, None, scheme).q
    better = coordinate_descent(w, gram, q, sweeps=2)
    assert_in_the_codebook(better)
    assert loss(w, decode(better), gram) < 0.5 * loss(w, decode(q), gram)


def test_a_zero_row_stays_and_rows_are_apart() -> None:
    scheme, w, gram = Scheme.parse("iq3_s"), random_weight(5, K), correlated(K)
    w[2] = 0
    q = gptq(w, gram, scheme).q
    alone = gptq(w[3:4], gram, scheme).q
    assert torch.equal(decode(q)[2], torch.zeros(K))
    assert (decode(q)[3] == decode(alone)[0]).float().mean() > 0.95
    assert_same(rtn(w, None, scheme).q.scales, rtn(w.clone(), None, scheme).q.scales)
