"""Ranges of activations: the histogram against the whole tensor, and each observer against exact or brute-force answers."""

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from bitwright.calibration import ranges
from bitwright.calibration.ranges import BINS, RANGES, Histogram, bin_of, bin_values, quantiles, static_scales
from bitwright.errors import CalibrationError, CheckpointError, NumericsError, RecipeError, SchemeError
from bitwright.numerics.codec import decode, encode, fit
from bitwright.numerics.scheme import Scheme

BIN = 2**-9  # a bin's width, relative to the values in it
INT8, ASYM, FP8 = (Scheme.parse(text) for text in ("int8-tensor-f32", "int8-tensor-asym-f32", "fp8-tensor"))
INT4, ASYM4 = Scheme.parse("int4-tensor-f32"), Scheme.parse("int4-tensor-asym-f32")


def random(n: int = 1 << 15, seed: int = 0) -> Tensor:
    """Normal values [T, 64]."""
    return torch.randn(n // 64, 64, generator=torch.Generator().manual_seed(seed))


def heavy(n: int = 1 << 15) -> Tensor:
    """Laplace-distributed values [T, 64]: tails that are long, and thin enough for a clip to pay."""
    u = torch.rand(n // 64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs() + 1e-12)).float()


def seen(*batches: Tensor, momentum: float = 0.9) -> Histogram:
    histogram = Histogram("layer.in", momentum)
    for batch in batches:
        histogram.update(batch)
    return histogram


def lost(x: Tensor, scheme: Scheme, observer: str, histogram: Histogram | None = None) -> float:
    """The mean squared error that static scales really leave."""
    scales = static_scales(histogram or seen(x), scheme, observer=observer)
    return float((decode(encode(x, scales, scheme)).double() - x.double()).square().mean())


# ----------------------------------------------------------------------------------------------------------- histogram


def test_every_bfloat16_number_is_a_bin_of_its_own() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = x[x.isfinite()]
    bins = bin_of(x).long()
    assert bins.min() >= 0 and bins.max() < 2 * BINS
    assert len(bins.unique()) == len(x)
    magnitude = bin_values()[bins % BINS]
    assert torch.equal(torch.where(bins < BINS, -magnitude, magnitude), x.float())


def test_a_bin_lies_within_half_its_width_of_its_values() -> None:
    x = random() * torch.logspace(-30, 30, 64)
    bins = bin_of(x.reshape(-1)).long()
    found = bin_values()[bins % BINS] * torch.where(bins < BINS, -1.0, 1.0)
    error = (found.double() / x.reshape(-1).double() - 1).abs()
    assert 0.4 * BIN < error.max() <= BIN / 2


def test_points_are_the_values_of_a_bfloat16_input() -> None:
    x = torch.cat([random().relu(), -random(seed=1)]).bfloat16()
    values, counts = x.float().unique(return_counts=True)
    found, n = seen(*x.split(100)).points()
    nonzero = found != 0  # zeros with either sign have a bin each
    assert torch.equal(found[nonzero], values[values != 0])
    assert torch.equal(n[nonzero], counts[values != 0])
    assert n[~nonzero].sum() == (x == 0).sum() > 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_whole_is_counted_whatever_its_type_and_layout(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 1000)
    x = random().to(dtype).view(8, -1, 64).transpose(0, 1)
    before = x.clone()
    histogram = seen(x)
    assert torch.equal(x, before)
    assert histogram.counts.sum() == x.numel() and histogram.tokens == x.numel() // 64 and histogram.batches == 1
    assert histogram.counts[0].sum() == (x < 0).sum()
    assert (histogram.low, histogram.high) == (float(x.float().min()), float(x.float().max()))
    values, n = histogram.points()
    mean = (values.double() * n).sum() / n.sum()
    assert mean == pytest.approx(float(x.double().mean()), abs=BIN / 100)


def same(a: Histogram, b: Histogram) -> bool:
    """Equal but for the moving averages."""
    return torch.equal(a.counts, b.counts) and (a.low, a.high, a.tokens) == (b.low, b.high, b.tokens)


def test_order_and_merging_do_not_matter() -> None:
    parts = [random(1 << 12, seed) * 10.0 ** (seed - 3) for seed in range(7)]
    whole, backwards = seen(*parts), seen(*reversed(parts))
    assert same(whole, backwards) and same(whole, seen(torch.cat(parts)))
    for cut in range(8):
        left, right = seen(*parts[:cut]), seen(*parts[cut:])
        kept = right.counts.clone()
        left.merge(right)
        assert same(left, whole) and left.batches == 7
        assert left.average_low == pytest.approx(whole.average_low, rel=1e-12)
        assert left.average_high == pytest.approx(whole.average_high, rel=1e-12)
        assert torch.equal(right.counts, kept)
    assert backwards.average_high < 0.6 * whole.average_high  # the last batches weigh most


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_moving_averages_weigh_batches_by_age(momentum: float) -> None:
    parts = [random(1 << 10, seed) * (seed + 1) for seed in range(5)]
    weights = torch.tensor([momentum**age for age in range(4, -1, -1)], dtype=torch.float64)
    for side, found in ((torch.amin, "average_low"), (torch.amax, "average_high")):
        expected = (torch.stack([side(p) for p in parts]).double() @ weights) / weights.sum()
        assert getattr(seen(*parts, momentum=momentum), found) == pytest.approx(float(expected), rel=1e-12)
    one = seen(parts[0], momentum=momentum)
    assert (one.average_low, one.average_high) == pytest.approx((one.low, one.high), rel=1e-12)


def test_a_growing_range_takes_no_resolution_from_what_was_seen() -> None:
    small, large = random() * 1e-6, random(seed=1) * 1e6
    before, after = seen(small).points(), seen(small, large).points()
    inside = after[0].abs() < 1e-4
    assert inside.sum() > 1000
    middle = slice(1, -1)  # the ends of the first are exact extremes
    low = int((after[0] < before[0][1]).sum())
    assert torch.equal(after[0][low : low + len(before[0]) - 2], before[0][middle])
    assert same(seen(small, large), seen(large, small))


def test_an_empty_batch_is_nothing() -> None:
    histogram = seen(random())
    counts = histogram.counts.clone()
    histogram.update(torch.zeros(0, 64))
    histogram.merge(Histogram())
    assert torch.equal(histogram.counts, counts) and histogram.batches == 1
    histogram.update(torch.tensor(2.0))
    assert histogram.batches == 2 and histogram.counts.sum() == counts.sum() + 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_and_nothing_is_counted(
    bad: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", 1000)
    histogram = seen(random())
    state = histogram.state()
    x = random(seed=1).to(dtype)
    x[-1, 5] = bad
    with pytest.raises(NumericsError, match="not finite") as caught:
        histogram.update(x)
    assert caught.value.where == "layer.in" and caught.value.remedy
    assert all(torch.equal(state[name], tensor) for name, tensor in histogram.state().items())


def test_the_largest_finite_numbers_are_finite() -> None:
    top = torch.finfo(torch.float32).max
    histogram = seen(torch.tensor([[top, -top, 0.99 * top, 1.0]]))
    values, n = histogram.points()
    assert values.isfinite().all() and n.sum() == 4
    assert (values[0], values[-1]) == (-top, top)
    edge, below = ranges._distribution(histogram)
    assert edge[-1] == -edge[0] == top and (edge.diff() > 0).all()
    assert below[-1] == 4 and below[1] == 1


def test_state_survives_safetensors() -> None:
    histogram = seen(*random().split(100), momentum=0.7)
    data = save(histogram.state())
    assert len(data) < histogram.counts.numel() * 8 / 5
    found = Histogram.from_state(load(data), where="layer.in")
    assert torch.equal(found.counts, histogram.counts)
    for name in ("where", "momentum", "low", "high", "average_low", "average_high", "tokens", "batches"):
        assert getattr(found, name) == getattr(histogram, name), name
    empty = Histogram.from_state(load(save(Histogram().state())))
    empty.merge(Histogram())
    empty.update(random())
    assert same(empty, seen(random()))


def damage(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {},
        lambda state: {k: t for k, t in state.items() if k != "seen"},
        damage("more", torch.zeros(1)),
        damage("reals", torch.zeros(4)),
        damage("seen", torch.zeros(3)),
        lambda state: {**state, "counts": state["counts"][1:]},
        lambda state: {**state, "bins": state["bins"] - 2 * BINS},
        lambda state: {**state, "bins": state["bins"] + BINS},
        lambda state: {**state, "counts": -state["counts"]},
    ],
)
def test_a_damaged_state_is_refused(spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    with pytest.raises(CheckpointError, match="not a histogram") as caught:
        Histogram.from_state(spoil(seen(random()).state()), where="a.b")
    assert caught.value.where == "a.b" and caught.value.remedy


def test_momenta_must_be_possible_and_agree() -> None:
    for momentum in (1.0, -0.1, math.nan):
        with pytest.raises(RecipeError, match="outside"):
            Histogram(momentum=momentum)
    with pytest.raises(RecipeError, match="cannot be merged"):
        seen(random()).merge(seen(random(), momentum=0.5))


# ----------------------------------------------------------------------------------------------------------- quantiles


def nearest_rank(x: Tensor, percent: int, of: int = 100) -> float:
    """The exact percentile of the whole tensor: the least value that reaches the share, in integers throughout."""
    flat = x.reshape(-1).double()
    return float(flat.kthvalue(max(1, -(-percent * len(flat) // of))).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("percentile", "ten_thousandths"), [(99.9, 999_000), (99.99, 999_900), (50, 500_000)])
@pytest.mark.parametrize("make", [random, heavy, lambda: random().relu(), lambda: heavy() - 3])
def test_percentiles_are_those_of_the_whole_tensor(
    make: Callable[[], Tensor], percentile: float, ten_thousandths: int, dtype: torch.dtype
) -> None:
    x = make().to(dtype).float()
    histogram, near = seen(*x.to(dtype).split(100)), {"rel": 0 if dtype == torch.bfloat16 else BIN, "abs": 0}
    limit = nearest_rank(x.abs(), ten_thousandths, 1_000_000)
    low, high = quantiles(histogram, INT8, percentile=percentile)
    assert (low, high) == pytest.approx((max(float(x.min()), -limit), min(float(x.max()), limit)), **near)
    each = (1_000_000 + ten_thousandths) // 2
    expected = (-nearest_rank(-x, each, 1_000_000), nearest_rank(x, each, 1_000_000))
    assert quantiles(histogram, ASYM, percentile=percentile) == pytest.approx(expected, **near)
    if percentile == 99.9:
        assert RANGES["percentile"](histogram, ASYM) == quantiles(histogram, ASYM, percentile=99.9)


def test_the_percentile_is_the_decimal_that_was_written() -> None:
    """In binary, 99.9 / 100 · 1000 is a little more than 999: its ceiling would clip nothing."""
    histogram = seen(torch.arange(1.0, 1001)[:, None])
    assert quantiles(histogram, INT8)[1] == 999
    assert quantiles(histogram, INT8, percentile=100) == (1, 1000)
    assert quantiles(histogram, ASYM, percentile=99) == pytest.approx((6, 995))


def test_minmax_and_average_read_what_was_seen() -> None:
    parts = [random(1 << 10, seed) * (seed + 1) for seed in range(3)]
    histogram = seen(*parts)
    assert RANGES["minmax"](histogram, ASYM) == (float(torch.cat(parts).min()), float(torch.cat(parts).max()))
    assert RANGES["average"](histogram, ASYM) == (histogram.average_low, histogram.average_high)


# ----------------------------------------------------------------------------------------------------------------- mse


def uniform_error(x: Tensor, t: Tensor, bits: int, reach: float) -> Tensor:
    """Brute force: the squared error of symmetric rounding of the whole tensor, clipped at each t, float64."""
    half = 1 << (bits - 1)
    flat = x.double().reshape(-1)
    return torch.stack([(flat - (flat / s).round().clamp(-half, half - 1) * s).square().mean() for s in t / reach])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "reach"), [(INT4, 7.5), (INT8, 127.0)])
@pytest.mark.parametrize("make", [heavy, random, lambda: heavy().relu()])
def test_mse_finds_what_brute_force_finds(
    make: Callable[[], Tensor], scheme: Scheme, reach: float, dtype: torch.dtype
) -> None:
    x = make().to(dtype)
    t = x.abs().max().double() * torch.exp2(-torch.arange(3 * 512, dtype=torch.float64) / 512)
    errors = uniform_error(x, t, scheme.levels.bits, reach)
    low, high = RANGES["mse"](seen(x), scheme)
    assert min(float(x.min()), 0) <= low <= 0 <= high <= float(x.max())
    found = max(-low, high)
    at = float(t[errors.argmin()])
    assert errors.min() < 0.97 * errors[0], "clipping does not pay: the test proves little"
    assert float(
        uniform_error(x, torch.tensor([found], dtype=torch.float64), scheme.levels.bits, reach)
    ) == pytest.approx(float(errors.min()), rel=2e-3)
    flat = t[errors <= errors.min() * 1.002]  # more than a bin away only along a valley as good
    assert float(flat.min()) * (1 - BIN) <= found <= float(flat.max()) * (1 + BIN)
    if dtype == torch.bfloat16 and scheme == INT4:
        assert found == pytest.approx(at, rel=BIN)


def test_mse_finds_two_unlike_sides() -> None:
    x = torch.cat([heavy(), 0.2 * random() - 1])
    low = torch.exp2(-torch.arange(24, dtype=torch.float64) / 8) * float(x.min())
    high = torch.exp2(-torch.arange(24, dtype=torch.float64) / 8) * float(x.max())
    flat, best = x.double().reshape(-1), math.inf
    for a in low.tolist():
        for b in high.tolist():
            s = (b - a) / 15
            z = round(-8 - a / s)
            best = min(best, float((flat - ((flat / s + z).round().clamp(-8, 7) - z) * s).square().mean()))
    found = lost(x, ASYM4, "mse")
    assert found < 1.01 * best < 0.5 * lost(x, ASYM4, "minmax")
    first, last = RANGES["mse"](seen(x), ASYM4)
    assert float(x.min()) < first < 0 < last < float(x.max())


def test_mse_clips_the_smaller_side_alone_where_that_pays() -> None:
    x = random().abs().clamp(max=4)
    x[::25, 0] = -3.0
    low, high = RANGES["mse"](seen(torch.cat([x, 4 - x.clamp(min=0)])), ASYM4)
    assert low > -1.5 and high > 3.5


def test_a_cut_that_costs_more_is_not_made() -> None:
    limit, coarse = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1.0, 0.5]).double()
    best = 0.5, torch.tensor([-0.3, 0.7]).double()
    assert ranges._cut(lambda low, high: torch.ones_like(low), limit, best, ranges.HIGH, coarse) == best
    cost, found = ranges._cut(lambda low, high: (high - 1.05).abs(), limit, best, ranges.HIGH, coarse)
    assert cost < 2e-3 and found.tolist() == pytest.approx([-0.3, 1.05], rel=2e-3)


def test_mse_of_inputs_all_below_zero() -> None:
    """Seven and a half steps to the extreme fit a constant badly; eight steps below zero, clipped a little, exactly."""
    x = torch.full((4, 64), -3.0)
    assert lost(x, INT4, "mse") < 1e-3 * lost(x, INT4, "minmax")


def test_a_bfloat16_input_is_searched_without_loss() -> None:
    """The histogram's expected error is the tensor's own, since every value is a bin."""
    x = heavy().bfloat16()
    values, n = seen(x).points()
    low, high = torch.tensor([-3.0, -9.0]), torch.tensor([2.0, 9.0])
    for scheme in (INT8, ASYM, FP8):
        found = ranges._squared_error(values, n, scheme, low, high)
        for i in range(2):
            scales = ranges._scales(low[i : i + 1], high[i : i + 1], scheme)
            expected = (decode(encode(x.float(), scales, scheme)) - x.float()).double().square().sum()
            assert float(found[i]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("scheme", [INT8, ASYM, INT4, ASYM4, FP8, Scheme.parse("int8-tensor-asym")])
@pytest.mark.parametrize("make", [random, heavy, lambda: random().relu(), lambda: -heavy().abs() - 1])
def test_mse_is_never_worse_than_another_observer(make: Callable[[], Tensor], scheme: Scheme) -> None:
    x = make()[:128].bfloat16().float()
    histogram = seen(x)
    for observer in RANGES:
        if observer != "kl" or scheme != FP8:
            assert lost(x, scheme, "mse", histogram) <= 1.001 * lost(x, scheme, observer, histogram)


def test_asym_beats_sym_on_one_sided_inputs() -> None:
    x = random().relu()
    for observer in RANGES:
        low, high = RANGES[observer](seen(x), ASYM)
        assert low == 0 < high
        if observer not in ("percentile", "kl"):  # which, having finer steps to lose, clip less or more
            assert lost(x, ASYM, observer) < 0.35 * lost(x, INT8, observer)


# ------------------------------------------------------------------------------------------------------------------ kl


def slow_divergence(x: Tensor, scheme: Scheme, low: float, high: float) -> float:
    """KL(P‖Q) from counts of the tensor itself, one value, one bin and one code at a time."""
    flat = x[x != 0].double().tolist()
    bins = 4 << scheme.levels.bits
    start, stop = max(low, min(min(flat), 0)), min(high, max(max(flat), 0))
    width = (stop - start) / bins
    p, inside = [0.0] * bins, [0.0] * bins
    for value in flat:
        at = math.floor((value - start) / width)
        p[min(max(at, 0), bins - 1)] += 1
        if start <= value <= stop:
            inside[min(at, bins - 1)] += 1
    middles = torch.tensor([[start + (at + 0.5) * width for at in range(bins)]], dtype=torch.float64).float()
    scales = fit(torch.tensor([[low, high]]), scheme)
    codes = encode(middles, scales, scheme).codes[0].tolist()
    members = {code: [at for at in range(bins) if codes[at] == code] for code in set(codes)}
    q = [0.0] * bins
    for where in members.values():
        for at in where:
            q[at] = sum(inside[i] for i in where) / len(where)
    n, m = len(flat), sum(inside) + 1
    diverged = sum(a / n * math.log((a / n) / ((b + 1 / bins) / m)) for a, b in zip(p, q, strict=True) if a)
    used = sum(min(1, a) for a in inside), sum(any(inside[at] for at in where) for where in members.values())
    return diverged - (used[0] - used[1]) / 2 / n


@pytest.mark.parametrize("scheme", [INT4, ASYM4, Scheme.parse("int3-tensor-f32"), Scheme.parse("int4-tensor-min-f32")])
@pytest.mark.parametrize(
    "make", [random, heavy, lambda: random().relu(), lambda: random().clamp(-1, 1), lambda: random().abs() + 1]
)
def test_the_divergence_is_that_of_the_whole_tensor(make: Callable[[], Tensor], scheme: Scheme) -> None:
    x = make()
    histogram = seen(x)
    for share in (1.0, 0.7, 0.4):
        low, high = share * min(0.0, float(x.min())), share * float(x.max())
        if scheme.zero == "sym":
            low, high = -max(-low, high), max(-low, high)
        ends = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
        found = float(ranges._divergence(histogram, *ranges._distribution(histogram), scheme, *ends))
        assert found == pytest.approx(slow_divergence(x, scheme, low, high), rel=0.05, abs=4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_clips_heavy_tails_and_keeps_a_uniform_distribution(dtype: torch.dtype) -> None:
    tails, even = (heavy(1 << 17) * heavy(1 << 17).abs()).to(dtype), (torch.rand(1 << 13, 64) * 5 - 1).to(dtype)
    for scheme in (INT8, ASYM, INT4, ASYM4):
        low, high = RANGES["kl"](seen(tails), scheme)
        assert 0.7 * float(tails.min()) < low < 0 < high < 0.7 * float(tails.max())
        share = float(((tails < low) | (tails > high)).float().mean())
        assert share < 0.03
        low, high = RANGES["kl"](seen(even), scheme)
        assert high > 0.99 * 4 and low < -0.98
    assert RANGES["kl"](seen(tails), INT4)[1] < 0.7 * RANGES["kl"](seen(tails), INT8)[1]  # coarser steps clip harder


def test_kl_does_not_see_zeros_nor_the_unit() -> None:
    x = heavy()
    low, high = RANGES["kl"](seen(x), INT8)
    assert RANGES["kl"](seen(x, torch.zeros(5000, 64)), INT8) == (low, high)
    assert RANGES["kl"](seen(x * 2.0**-40), INT8) == (low * 2.0**-40, high * 2.0**-40)
    first, last = RANGES["kl"](seen(-x), INT8)
    assert (first, last) == pytest.approx((-high, -low), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("scheme", [INT8, ASYM, INT4, ASYM4])
def test_one_value_of_a_million(scheme: Scheme) -> None:
    """What it does to each observer: percentile and kl do not see it, minmax and mse keep it, as the error demands."""
    x = random(1 << 17)
    hostile = x.clone()
    hostile[7, 7] = 1e6
    calm, found = seen(x), seen(hostile)
    assert RANGES["minmax"](found, scheme)[1] == 1e6
    assert RANGES["percentile"](found, scheme) == pytest.approx(RANGES["percentile"](calm, scheme), rel=2 * BIN)
    assert RANGES["kl"](found, scheme) == pytest.approx(RANGES["kl"](calm, scheme), rel=0.2)
    assert lost(hostile, scheme, "mse") <= 1.001 * min(lost(hostile, scheme, name) for name in RANGES)
    assert seen(hostile, *[x] * 60).average_high < 2000  # forgotten at 0.9 a batch


@pytest.mark.parametrize("observer", list(RANGES))
@pytest.mark.parametrize(
    "scheme", [INT8, ASYM, ASYM4, FP8, Scheme.parse("int8-tensor"), Scheme.parse("int8-tensor-bf16")]
)
@pytest.mark.parametrize("value", [0.0, 3.0, -7e4, 1e-20])
def test_constants_come_back(observer: str, scheme: Scheme, value: float) -> None:
    if observer == "kl" and scheme == FP8:
        return
    x = torch.full((4, 64), value)
    scales = static_scales(seen(x), scheme, observer=observer)
    found = decode(encode(x, scales, scheme))
    assert found.isfinite().all() and scales.scale.isfinite().all()
    if value == 0:
        assert not found.any() and not scales.scale.any()
    elif abs(value) > 1e-6:
        assert (found / value - 1).abs().max() < 0.005
    else:  # float16 cannot hold the scale: the smallest that it can hold rounds to 0
        assert (found - x).abs().max() <= 1e-20


# -------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    "text",
    [
        "int8-tensor",
        "int8-tensor-asym",
        "int8-tensor-f32",
        "fp8-tensor",
        "fp8-tensor-bf16",
        "int4-tensor-asym",
        "int8-tensor-asym1",
        "int5-tensor-min",
        "nf4-tensor",
    ],
)
def test_minmax_scales_are_those_of_the_tensor_itself(text: str) -> None:
    x, scheme = heavy() + 1, Scheme.parse(text)
    found, expected = static_scales(seen(*x.split(64)), scheme, observer="minmax"), fit(x, scheme)
    assert found.scale.shape == (1, 1)
    assert torch.equal(found.scale, expected.scale)
    assert (found.zero is None) == (expected.zero is None) == scheme.symmetric
    if found.zero is not None and expected.zero is not None:
        assert torch.equal(found.zero, expected.zero)


def test_scales_by_hand() -> None:
    x = torch.tensor([[-2.54, 0.0, 12.7]])
    assert float(static_scales(seen(x), INT8, observer="minmax").scale) == pytest.approx(0.1)
    assert float(static_scales(seen(x), FP8, observer="minmax").scale) == pytest.approx(12.7 / 448)
    asym = static_scales(seen(x), ASYM, observer="minmax")
    assert float(asym.scale) == pytest.approx(15.24 / 255) and asym.zero is not None
    assert float(asym.zero) == round(-128 + 2.54 / (15.24 / 255))


def test_the_default_is_mse_and_percentile_is_an_option() -> None:
    histogram = seen(heavy())
    assert torch.equal(static_scales(histogram, INT8).scale, static_scales(histogram, INT8, observer="mse").scale)
    narrow, wide = (static_scales(histogram, INT8, observer="percentile", percentile=p) for p in (99, 99.99))
    middle = static_scales(histogram, INT8, observer="percentile")
    assert narrow.scale < middle.scale < wide.scale
    assert float(wide.scale) * 127 == pytest.approx(quantiles(histogram, INT8, percentile=99.99)[1])


@pytest.mark.parametrize("observer", list(RANGES))
def test_nothing_seen_has_no_range(observer: str) -> None:
    with pytest.raises(CalibrationError, match="no activations") as caught:
        static_scales(Histogram("a.b"), INT8, observer=observer)
    assert caught.value.where == "a.b" and caught.value.remedy
    with pytest.raises(CalibrationError):
        RANGES[observer](Histogram(), ASYM)


def test_refusals() -> None:
    histogram = seen(random())
    with pytest.raises(RecipeError, match="unknown observer 'max'") as caught:
        static_scales(histogram, INT8, observer="max")
    assert all(name in caught.value.remedy for name in RANGES)
    for scheme in (FP8, Scheme.parse("nf4-tensor")):
        with pytest.raises(RecipeError, match="equal steps"):
            static_scales(histogram, scheme, observer="kl")
    for percentile in (0, -1, 100.1, math.nan):
        with pytest.raises(RecipeError, match="outside"):
            static_scales(histogram, INT8, observer="percentile", percentile=percentile)
    with pytest.raises(RecipeError, match="observer mse has no percentile"):
        static_scales(histogram, INT8, percentile=99.9)


@pytest.mark.parametrize(
    "text",
    [
        "int8-token",
        "int8-channel",
        "int8-g128",
        "ternary-tensor",
        "int8-tensor-e4m3",
        "int8-tensor-dq",
        "int8-tensor-e8m0",
    ],
)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_schemes_without_one_scale_are_refused(text: str, observer: str) -> None:
    with pytest.raises(SchemeError, match="not one scale") as caught:
        static_scales(seen(random()), Scheme.parse(text), observer=observer)
    assert caught.value.remedy
