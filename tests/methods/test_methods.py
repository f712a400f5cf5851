"""Rounding methods but GPTQ: round to nearest, scale search, coordinate descent."""

import importlib
import inspect
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import RecipeError, SchemeError
from bitwright.methods import CALIBRATED, METHODS
from bitwright.methods.coordinate_descent import coordinate_descent
from bitwright.methods.gptq import gptq
from bitwright.methods.outcome import Outcome
from bitwright.methods.rtn import rtn
from bitwright.methods.search import best_scales, search
from bitwright.numerics.codec import (
    code_dtype,
    code_range,
    decode,
    encode,
    fit,
    group_view,
    per_column,
    scale_range,
    snap,
    values,
)
from bitwright.numerics.loss import loss
from bitwright.numerics.qtensor import QTensor, Scales, rows
from bitwright.numerics.scheme import SCALE_BITS, ZEROS, Scheme
from quantized_weights import FAMILIES, assert_representable, assert_same, one_thread, random_weight

__all__ = ["one_thread"]  # a fixture that every test here uses

K = 272  # one super-block and a short one


def width(scheme: Scheme) -> int:
    """Columns enough for two units, the last one short; few, because columns are visited one by one."""
    if scheme.unit is None:
        return 72
    return {256: K, 128: 144}.get(scheme.unit, 72)


@lru_cache(maxsize=4)
def correlated(columns: int = K) -> Tensor:
    """The Gram of inputs that are mixtures: a few strong directions, T = 4 K tokens."""
    g = torch.Generator().manual_seed(3)
    strength = torch.linspace(0, 3, columns).neg().exp()
    mixing = torch.randn(columns, columns, generator=g) * strength[:, None] @ torch.randn(columns, columns, generator=g)
    x = torch.randn(4 * columns, columns, generator=g) @ (mixing / columns**0.5)
    return x.T @ x / len(x)


@lru_cache(maxsize=4)
def uneven(columns: int = K) -> Tensor:
    """A diagonal Gram: some inputs are much larger than others."""
    return torch.diag(torch.rand(columns, generator=torch.Generator().manual_seed(4)) ** 3)


def copy_of(q: QTensor) -> QTensor:
    s = q.scales
    copies = [None if t is None else t.clone() for t in (s.scale, s.zero, s.outer, s.outer_zero)]
    return QTensor(q.codes.clone(), Scales(*copies), q.scheme, q.shape)  # type: ignore[arg-type]


def assert_valid(q: QTensor) -> None:
    """Codes in range and of their type, scales as stored."""
    low, high = code_range(q.scheme)
    assert q.codes.dtype == code_dtype(q.scheme)
    assert low <= int(q.codes.min()) <= int(q.codes.max()) <= high
    assert_representable(q.scales, q.scheme)


# --------------------------------------------------------------------------------------------------------------- all


def test_the_registry_is_a_plain_table() -> None:
    assert METHODS["rtn"] is rtn
    assert all(inspect.unwrap(METHODS[name]) is method for name, method in (("search", search), ("gptq", gptq)))
    assert set(CALIBRATED) <= set(METHODS)
    for method in METHODS.values():
        first, *options = inspect.signature(method).parameters.values()
        assert [first.name, *(p.name for p in options[:2])] == ["w", "gram", "scheme"]
        assert all(p.kind is p.KEYWORD_ONLY for p in options[2:])


@pytest.mark.parametrize("method", [rtn, search])
@pytest.mark.parametrize("text", FAMILIES)
def test_every_scheme_gets_a_valid_rounding(method: object, text: str) -> None:
    """Valid codes and scales, arguments unchanged, loss below that of dropping the weight."""
    w, gram = random_weight(6, K), correlated()
    before, gram_before = w.clone(), gram.clone()
    outcome = METHODS[method.__name__](w, gram, Scheme.parse(text))  # type: ignore[attr-defined]
    assert outcome == Outcome(outcome.q, damping=0.0, fallback="")
    assert_valid(outcome.q)
    assert loss(w, decode(outcome.q), gram) < 0.7
    assert torch.equal(w, before)
    assert torch.equal(gram, gram_before)


@pytest.mark.parametrize("method", [rtn, search])
def test_a_convolution_is_a_matrix(method: object) -> None:
    w, scheme, call = random_weight(4, 72), Scheme.parse("int4-g16-asym"), METHODS[method.__name__]  # type: ignore[attr-defined]
    q, flat = call(w.reshape(4, 8, 3, 3), correlated(72), scheme).q, call(w, correlated(72), scheme).q
    assert q.shape == (4, 8, 3, 3)
    assert torch.equal(q.codes, flat.codes)
    assert_same(q.scales, flat.scales)


def test_rtn_is_fit_then_encode_and_does_not_look_at_the_gram() -> None:
    w, scheme = random_weight(4, K), Scheme.parse("q4_k")
    expected = encode(w, fit(w, scheme), scheme)
    for gram in (None, correlated()):
        q = rtn(w, gram, scheme).q
        assert torch.equal(q.codes, expected.codes)
        assert_same(q.scales, expected.scales)


# ------------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("objective", ["weighted", "mse"])
@pytest.mark.parametrize("text", FAMILIES)
def test_search_never_loses_more_than_rtn_by_its_own_measure(text: str, objective: str) -> None:
    scheme, gram = Scheme.parse(text), uneven()
    measure = gram if objective == "weighted" else None
    for seed in range(2):
        w = random_weight(6, K, seed)
        found = search(w, gram, scheme, objective=objective).q  # type: ignore[arg-type]
        assert loss(w, decode(found), measure) <= loss(w, decode(rtn(w, None, scheme).q), measure) * (1 + 1e-6)


ONE_LEVEL = [
    Scheme(grid, group, zero, scale)  # type: ignore[arg-type]
    for grid in ("int2", "int4", "int8", "nf4", "fp4", "fp8", "iq4nl", "ternary", "binary")
    for group in (16, 64, "channel")
    for zero in (ZEROS if grid.startswith("int") else ("sym",))
    for scale in ("f32", "f16", "bf16", "e8m0")
    if not (zero in ("min", "signed") and scale == "e8m0")
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ONE_LEVEL), st.integers(1, 4), st.integers(1, 100), st.integers(0, 10**6))
def test_search_beats_rtn_group_by_group_where_scales_have_one_level(
    scheme: Scheme, N: int, columns: int, seed: int
) -> None:
    w, weight = random_weight(N, columns, seed), torch.rand(columns, generator=torch.Generator().manual_seed(seed))

    def by_group(q: QTensor) -> Tensor:
        return group_view((w - decode(q)).square() * weight, scheme).sum(-1)

    found, nearest = search(w, torch.diag(weight), scheme).q, rtn(w, None, scheme).q
    assert (by_group(found) <= by_group(nearest) * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("text", ["int6-g32-min-k4", "int6-g32-k4", "int6-g64-asym-e4m3"])
def test_search_never_loses_more_than_rtn_in_odd_two_level_schemes(text: str) -> None:
    scheme, d = Scheme.parse(text), torch.diag(uneven())
    for seed in range(8):
        w = random_weight(8, K, seed)
        found, nearest = search(w, torch.diag(d), scheme).q, rtn(w, None, scheme).q
        assert loss(w, decode(found), torch.diag(d)) <= loss(w, decode(nearest), torch.diag(d)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("text", "narrowest"),
    [
        ("int4-g16-f32", 0.65),
        ("int3-g32-asym-f32", 0.5),
        ("int2-g16-min-f32", 0.35),
        ("nf4-g64", 0.65),
        ("ternary-g16-f32", 0.35),
    ],
)
def test_search_beats_every_narrowing_and_then_solves(text: str, narrowest: float) -> None:
    """Each group loses no more than under any of the 16 ranges tried; least squares then wins something on top."""
    scheme, w = Scheme.parse(text), random_weight(6, 96)

    def by_group(scales: Scales) -> Tensor:
        return group_view((w - decode(encode(w, scales, scheme))).square(), scheme).sum(-1)

    tried = torch.stack([by_group(fit(w, scheme, shrink=s)) for s in torch.linspace(1, narrowest, 16).tolist()]).amin(0)
    found = by_group(best_scales(w, scheme, None, steps=16))
    assert (found <= tried * (1 + 1e-5)).all()
    assert found.sum() < 0.998 * tried.sum()


@pytest.mark.parametrize("shift", [-2.0, 0.0, 0.5])
def test_scale_and_minimum_solve_least_squares(shift: float) -> None:
    """Against float64 lstsq; where the free minimum would be above zero, it is zero and the scale is solved alone."""
    scheme, v = Scheme.parse("int4-g16-min-f32"), random_weight(3, 32, 5).reshape(3, 2, 16) + shift
    weight = torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(6)) + 0.1
    start = fit(v.flatten(1), scheme)
    codes = encode(v.flatten(1), start, scheme).codes.reshape(v.shape).float()
    module = importlib.import_module("bitwright.methods.search")
    moments, totals = module._moments(v, codes, weight, start, scheme), module._totals(v, weight)
    scale, low = module._least_squares(moments, totals, start, scheme)
    lost = module._lost_by(moments, totals, Scales(scale, low), scheme)
    again = (weight * (v - codes * scale[..., None] - low[..., None]).square()).sum(-1)
    assert ((lost - again).abs() < 1e-6 * totals.vv).all()
    assert (low <= 0).all()
    for n in range(3):
        for g in range(2):
            root, c, x = weight[0, g].double().sqrt(), codes[n, g].double(), v[n, g].double()
            solution = torch.linalg.lstsq(
                torch.stack([c, torch.ones(16)], 1) * root[:, None], (x * root)[:, None]
            ).solution
            expected = solution[:, 0].tolist()
            if expected[1] > 0:
                expected = [((root**2 * c * x).sum() / (root**2 * c * c).sum()).item(), 0.0]
            assert [scale[n, g].item(), low[n, g].item()] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("text", ["nvfp4", "int4-g16-asym-e4m3"])
def test_the_divisor_of_a_tensor_comes_from_its_extremes(text: str) -> None:
    w, scheme = random_weight(4, K), Scheme.parse(text)
    found, nearest = search(w, uneven(), scheme).q.scales, fit(w, scheme)
    assert torch.equal(found.outer, nearest.outer)  # type: ignore[arg-type]
    assert not torch.equal(found.scale, nearest.scale)


def test_search_weighs_by_the_gram_diagonal() -> None:
    w, gram, scheme = random_weight(8, K), uneven(), Scheme.parse("int3-g64")
    weighted, plain = search(w, gram, scheme).q, search(w, gram, scheme, objective="mse").q
    assert loss(w, decode(weighted), gram) < 0.95 * loss(w, decode(plain), gram)
    assert loss(w, decode(plain)) < 0.95 * loss(w, decode(weighted))
    for same in (search(w, None, scheme).q, search(w, torch.eye(K), scheme).q):
        assert torch.equal(same.codes, plain.codes)


def test_only_the_diagonal_counts() -> None:
    w, gram, scheme = random_weight(4, K), correlated(), Scheme.parse("int4-g64-asym")
    assert torch.equal(search(w, gram, scheme).q.codes, search(w, torch.diag(gram.diagonal()), scheme).q.codes)


@pytest.mark.parametrize("text", ["int4-g64", "int4-g32-asym", "q4_k", "mxfp4", "ternary-channel"])
def test_rows_are_searched_apart_and_chunks_do_not_show(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, w, importance = Scheme.parse(text), random_weight(7, K), uneven().diagonal()
    whole = best_scales(w, scheme, importance)
    monkeypatch.setattr(importlib.import_module("bitwright.methods.search"), "CHUNK", 2 * K)
    assert_same(best_scales(w, scheme, importance), whole)
    alone = encode(w[2:5], best_scales(w[2:5], scheme, importance), scheme)
    assert_same(rows(encode(w, whole, scheme), 2, 5).scales, alone.scales)


@pytest.mark.parametrize(("percentile", "largest"), [(100, 100), (99, 99), (90, 90), (50, 50), (1, 1), (0.01, 1)])
def test_percentile_clips_at_the_order_statistic(percentile: float, largest: int) -> None:
    """|w| is 1 … 100 in some order: the p-th percentile is p itself."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randperm(100, generator=g) + 1.0) * torch.where(torch.rand(100, generator=g) < 0.5, -1, 1)
    scheme = Scheme.parse("int8-channel-f32")
    q = search(w[None], None, scheme, objective="percentile", percentile=percentile).q
    assert q.scales.scale.item() == pytest.approx(largest / 127, rel=1e-6)
    assert (q.codes[0].int().abs()[w.abs() >= largest] >= 127).all()


def test_percentile_of_each_group_and_of_the_whole_tensor() -> None:
    w = torch.arange(1.0, 65.0).reshape(2, 32)
    in_groups = search(w, None, Scheme.parse("int8-g16-f32"), objective="percentile", percentile=50).q
    assert (in_groups.scales.scale * 127).flatten().tolist() == pytest.approx([8, 24, 40, 56])
    in_all = search(w, None, Scheme.parse("int8-tensor-f32"), objective="percentile", percentile=75).q
    assert (in_all.scales.scale * 127).item() == pytest.approx(48)


@pytest.mark.parametrize("text", FAMILIES)
def test_the_hundredth_percentile_is_rtn(text: str) -> None:
    w, scheme = random_weight(4, K), Scheme.parse(text)
    q, nearest = search(w, None, scheme, objective="percentile", percentile=100).q, rtn(w, None, scheme).q
    assert torch.equal(q.codes, nearest.codes)
    assert_same(q.scales, nearest.scales)


def test_percentile_of_a_short_last_group() -> None:
    w = torch.arange(1.0, 41.0)[None]
    q = search(w, None, Scheme.parse("int8-g32-f32"), objective="percentile", percentile=50).q
    assert (q.scales.scale * 127).flatten().tolist() == pytest.approx([16, 36])


@pytest.mark.parametrize("percentile", [0, -1, 100.1])
def test_a_percentile_outside_its_range_is_refused(percentile: float) -> None:
    with pytest.raises(RecipeError, match=r"outside \(0, 100\]"):
        search(random_weight(2, 32), None, Scheme.parse("int8-channel"), objective="percentile", percentile=percentile)


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown objective 'kl'") as caught:
        search(random_weight(2, 32), None, Scheme.parse("int8-channel"), objective="kl")  # type: ignore[arg-type]
    assert 'objective = "weighted"' in caught.value.remedy


@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_search_of_huge_and_tiny_weights_stays_finite(text: str, size: float) -> None:
    q = search(random_weight(3, K) * size, uneven() * 100, Scheme.parse(text)).q
    assert torch.isfinite(decode(q)).all()
    assert_valid(q)


@pytest.mark.parametrize("text", ["q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_integers_of_the_second_level_are_chosen_again(text: str) -> None:
    """Better than rounding the searched scales to the second level, and no group could take a neighbouring integer."""
    scheme, w, weight = Scheme.parse(text), random_weight(6, 512), torch.linspace(0.1, 1, 512)
    found = best_scales(w, scheme, weight)
    raw = best_scales(w, replace(scheme, scale="f32"), weight)
    lost = [lost_under(w, s, scheme, weight) for s in (found, snap(raw.scale, raw.zero, scheme))]
    assert lost[0].sum() < 0.999 * lost[1].sum()
    low, high = scale_range(scheme)
    assert found.outer is not None
    each = found.outer.repeat_interleave(256 // int(scheme.group), dim=1)
    integers = (found.scale / each).round()
    for move in (-1, 1):
        moved = replace(found, scale=(integers + move).clamp(low, high) * each)
        assert (lost_under(w, moved, scheme, weight) >= lost[0]).all()


def lost_under(w: Tensor, scales: Scales, scheme: Scheme, weight: Tensor) -> Tensor:
    """The weighted squared error of each group."""
    return group_view((w - decode(encode(w, scales, scheme))).square() * weight, scheme).sum(-1)


def test_signed_scales_give_the_longer_side_to_either_sign() -> None:
    """int2 has −2, −1, 0, 1: a row of 0, 1, 2 is exact under −1 and cannot be under any scale above 0."""
    w = torch.tensor([[0.0, 1, 2, 2, 1, 0, 0, 2] * 2, [0.0, -1, -2, -2, 1, 0, 0, -2] * 2])
    exact = search(w, None, Scheme.parse("int2-g16-signed")).q
    assert torch.equal(decode(exact), w)
    assert exact.scales.scale.flatten().tolist() == [-1, 1]
    assert not torch.equal(decode(search(w, None, Scheme.parse("int2-g16")).q), w)


@pytest.mark.parametrize("objective", ["weighted", "mse", "percentile"])
@pytest.mark.parametrize(
    "text", ["int4-g32", "int4-g32-asym", "q4_k", "nf4-g64-dq", "nvfp4", "ternary-channel", "fp8-tensor"]
)
def test_search_refuses_nan(text: str, objective: str) -> None:
    w = random_weight(3, K)
    w[2, 7] = float("nan")
    with pytest.raises(SchemeError, match="not finite"):
        search(w, None, Scheme.parse(text), objective=objective)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- descend


@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("text", FAMILIES)
def test_descent_never_raises_the_loss(text: str, start: str) -> None:
    """From a poor start and from a good one; the better one too is improved, in every format."""
    scheme = Scheme.parse(text)
    w, gram = random_weight(6, width(scheme)), correlated(width(scheme))
    q = rtn(w, None, scheme).q if start == "rtn" else gptq(w, gram, scheme, sweeps=0, compensated_scales=False).q
    before, kept = loss(w, decode(q), gram), (w.clone(), gram.clone(), copy_of(q))
    better = coordinate_descent(w, gram, q)
    after = loss(w, decode(better), gram)
    assert after < before * 0.7 if start == "rtn" else after <= before * (1 + 1e-6)
    again = loss(w, decode(coordinate_descent(w, gram, better)), gram)
    assert again <= after * (1 + 1e-5)
    assert_valid(better)
    assert torch.equal(w, kept[0])
    assert torch.equal(gram, kept[1])
    assert torch.equal(q.codes, kept[2].codes)
    assert_same(q.scales, kept[2].scales)


@pytest.mark.parametrize("sweeps", [0, -1])
def test_no_sweeps_no_change(sweeps: int) -> None:
    w = random_weight(3, 64)
    q = rtn(w, None, Scheme.parse("int4-g32")).q
    assert coordinate_descent(w, correlated(64), q, sweeps=sweeps) is q


def slow_sweep(W: Tensor, H: Tensor, q: QTensor) -> Tensor:
    """One sweep in float64, E H computed anew at every step: each group's least-squares scale where scales can change
    alone, then its columns one after another, every code tried. Returns decoded weights [N, K]."""
    scheme, columns = q.scheme, W.shape[1]
    low, high = code_range(scheme)
    table = values(torch.arange(low, high + 1), scheme).double()
    scale = per_column(q.scales.scale, scheme, columns).double().expand(W.shape).clone()
    zeros = torch.zeros_like(q.scales.scale) if q.scales.zero is None else q.scales.zero
    zero = per_column(zeros, scheme, columns).double().expand(W.shape)
    shift, minimum = (torch.zeros_like(zero), zero) if scheme.zero == "min" else (zero, torch.zeros_like(zero))
    c, length = values(q.codes, scheme).double() - shift, scheme.group_length(columns)
    for start in range(0, columns, length):
        own = slice(start, start + length)
        if isinstance(scheme.group, int) and scheme.scale == "f32":
            pull = (W - c * scale - minimum) @ H[:, own]
            step = (pull * c[:, own]).sum(1) / ((c[:, own] @ H[own, own]) * c[:, own]).sum(1)
            scale[:, own] += step[:, None]
        for j in range(columns)[own]:
            now = c * scale + minimum
            target = now[:, j] + ((W - now) @ H[:, j]) / H[j, j]
            possible = (table[None, :] - shift[:, j, None]) * scale[:, j, None] + minimum[:, j, None]
            c[:, j] = table[(possible - target[:, None]).abs().argmin(1)] - shift[:, j]
    return c * scale + minimum


@pytest.mark.parametrize(
    "text",
    [
        "int4-channel",
        "int3-channel-asym",
        "fp8-channel",
        "int4-g32-dq",
        "q4_k",
        "ternary-tensor",
        "int4-g32-f32",
        "int3-g16-asym-f32",
        "int4-g16-min-f32",
        "nf4-g32",
    ],
)
def test_one_sweep_against_the_slow_oracle(text: str) -> None:
    scheme, w, gram = Scheme.parse(text), random_weight(5, 80), correlated(80)
    q = encode(w, fit(w, scheme, shrink=0.9), scheme)
    W, H = w.double(), gram.double()
    expected, mine = slow_sweep(W, H, q), decode(coordinate_descent(w, gram, q)).double()
    same = (mine - expected).abs() <= 1e-4 * w.abs().max()
    assert same.float().mean() >= 0.995
    assert torch.einsum("nj,jk,nk->", W - mine, H, W - mine).item() == pytest.approx(
        torch.einsum("nj,jk,nk->", W - expected, H, W - expected).item(), rel=1e-2
    )


@pytest.mark.parametrize("text", ["int4-g32-asym", "int4-channel", "q4_k", "nvfp4"])
def test_the_block_length_does_not_show(text: str) -> None:
    scheme, w, gram = Scheme.parse(text), random_weight(6, 144), correlated(144)
    q = rtn(w, None, scheme).q
    small, middle, whole = (coordinate_descent(w, gram, q, block=block).codes for block in (32, 128, 144))
    assert (small == whole).float().mean() >= 0.99
    assert (middle == whole).float().mean() >= 0.99


@pytest.mark.parametrize(
    "text", ["int4-g32-f32", "int3-g32-asym-f32", "int3-g32-min-f32", "nf4-g64", "ternary-g32-f32"]
)
def test_descent_ends_where_no_scale_and_no_code_would_move(text: str) -> None:
    """At the end, each group's least-squares scale is the one it has, and each code is nearest to its target."""
    scheme, w, gram = Scheme.parse(text), random_weight(4, 96), correlated(96)
    start = encode(w, fit(w, scheme, shrink=0.7), scheme)  # scales that must travel
    q = coordinate_descent(w, gram, start, sweeps=30)
    error = w.double() - decode(q).double()
    pull = error @ gram.double()  # [N, K]
    c = values(q.codes, scheme).double()
    if q.scales.zero is not None and scheme.zero != "min":
        c = c - per_column(q.scales.zero, scheme, 96).double()
    for group in range(scheme.groups(96)):
        own = slice(group * scheme.group_length(96), (group + 1) * scheme.group_length(96))
        slope = (pull[:, own] * c[:, own]).sum(1)
        curvature = ((c[:, own] @ gram.double()[own, own]) * c[:, own]).sum(1)
        assert (slope / curvature).abs().max() < 1e-3 * q.scales.scale.max()
    target = decode(q).double() + pull / gram.double().diagonal()
    best = encode(target.float(), q.scales, scheme).codes
    assert (best == q.codes).float().mean() >= 0.99
    assert not torch.equal(q.scales.scale, start.scales.scale)


@pytest.mark.parametrize(("N", "columns"), [(1, 64), (3, 32)])
def test_descent_of_one_row_or_one_group_changes_no_argument(N: int, columns: int) -> None:
    w, gram = random_weight(N, columns), correlated(columns)
    q = rtn(w, None, Scheme.parse("int4-g32")).q
    kept = copy_of(q)
    coordinate_descent(w, gram, q)
    assert torch.equal(q.codes, kept.codes)
    assert_same(q.scales, kept.scales)


def test_scales_that_hang_together_stay() -> None:
    """Two-level, whole-row and whole-tensor scales are not solved for; codes alone are."""
    w, gram = random_weight(4, K), correlated()
    for text in ("q4_k", "nvfp4", "mxfp4", "nf4-g64-dq", "int4-channel-f32", "int8-tensor"):
        q = rtn(w, None, Scheme.parse(text)).q
        better = coordinate_descent(w, gram, q)
        assert_same(better.scales, q.scales)
        assert not torch.equal(better.codes, q.codes)


def test_descent_leaves_columns_without_input_at_their_weight() -> None:
    """A column that meets no input has no curvature: it is rounded to nearest, not divided by zero."""
    gram, w, scheme = correlated(64).clone(), random_weight(4, 64), Scheme.parse("int4-channel-f32")
    gram[5], gram[:, 5] = 0, 0
    q, before = rtn(w, None, scheme).q, gram.clone()
    better = coordinate_descent(w, gram, q)
    assert torch.equal(gram, before)
    assert torch.equal(better.codes[:, 5], q.codes[:, 5])
    assert torch.isfinite(decode(better)).all()


@pytest.mark.parametrize("scale", [s for s in SCALE_BITS if s not in ("k8", "k6", "k4")])
def test_a_good_rounding_is_left_alone(scale: str) -> None:
    """Weights that are exactly representable have loss 0, and no sweep moves them."""
    scheme = Scheme("int4", 16, "sym", scale)
    start = rtn(random_weight(4, 64), None, scheme).q
    exact = decode(start)
    assert torch.equal(coordinate_descent(exact, correlated(64), start, sweeps=2).codes, start.codes)
