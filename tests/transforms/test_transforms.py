"""AWQ, SmoothQuant and outlier separation: against slow oracles, and what they are for, on inputs with outliers."""

import pytest
import torch
from torch import Tensor

from bitwright.calibration.input_statistics import Gathering, Inputs
from bitwright.errors import CalibrationError, RecipeError
from bitwright.methods.awq import Awq
from bitwright.methods.outlier import Outlier
from bitwright.methods.scaling import Reader
from bitwright.methods.smooth import Smooth, reach_of
from bitwright.numerics.codec import decode, encode, fit, rounded
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.loss import loss
from bitwright.numerics.qtensor import Outliers, QTensor, rows
from bitwright.numerics.scheme import Scheme
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule
from bitwright.transforms import split_method

INT3, INT8, TOKEN = Scheme.parse("int3-g32-asym"), Scheme.parse("int8-channel"), Scheme.parse("int8-token")
K = 96


def inputs_with_outliers(seed: int = 0, T: int = 700) -> Tensor:
    """Correlated tokens; three channels are thirty times the others."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, K, generator=g) @ (torch.eye(K) + 0.3 * torch.randn(K, K, generator=g) / K**0.5)
    x[:, [5, 40, 77]] *= 30
    return x


def weight(seed: int = 1, N: int = 48) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.05


def gathered(x: Tensor) -> Inputs:
    """All statistics of x."""
    gathering = Gathering.of(x, detailed=True, expected=len(x))
    gathering.update(x, None)
    return gathering.value()


# ----------------------------------------------------------------------------------------------------------------- awq


@pytest.mark.parametrize("searched", [False, True])
def test_awq_minimises_the_layers_output_error(searched: bool) -> None:
    """The exponent is that of the least ‖x wᵀ − (x / s) Q(w s)ᵀ‖², computed on the tokens themselves in float64."""
    x, w = inputs_with_outliers(), weight()
    known = gathered(x)
    assert known.gram is not None and known.mean is not None
    reader = Reader(w, INT3, searched=searched)
    found = Awq().candidates([reader], known.gram, known.mean).best()
    errors = {}
    for i in range(20):
        s = known.mean ** (i / 20)
        s = s / (s.max() * s.min()).sqrt()
        decoded = reader.rounded(s, known.gram.diagonal())
        errors[i / 20] = float((x.double() @ (w - decoded).double().T).square().sum())
    best = min(errors, key=lambda exponent: errors[exponent])
    assert errors[found.exponent] <= errors[best] * (1 + 1e-4)
    assert 0 < found.exponent < 1 and errors[found.exponent] < 0.6 * errors[0.0]


def test_awq_of_even_inputs_is_nearly_nothing() -> None:
    """Where no channel stands out, identity is in the grid, and nothing in it is much better."""
    x = torch.randn(700, K, generator=torch.Generator().manual_seed(3))
    known, w = gathered(x), weight()
    assert known.gram is not None and known.mean is not None
    found = Awq().candidates([Reader(w, INT3)], known.gram, known.mean).best()
    before = loss(w, decode(encode(w, fit(w, INT3), INT3)), known.gram)
    after = loss(w, Reader(w, INT3).rounded(found.s, None), known.gram)
    assert 0.9 * before < after <= before


def test_awq_survives_dead_channels() -> None:
    x = inputs_with_outliers()
    x[:, 7] = 0
    known = gathered(x)
    assert known.gram is not None and known.mean is not None
    s = Awq().candidates([Reader(weight(), INT3)], known.gram, known.mean).best().s
    assert s.isfinite().all() and (s > 0).all()
    assert (Awq().candidates([Reader(weight(), INT3)], known.gram * 0, known.mean * 0).best().s == 1).all()


def test_matrices_that_stay_in_float_do_not_count() -> None:
    known, w = gathered(inputs_with_outliers()), weight()
    assert known.gram is not None and known.mean is not None
    alone = Awq().candidates([Reader(w, INT3)], known.gram, known.mean).best()
    both = Awq().candidates([Reader(w, INT3), Reader(weight(9) * 100, None)], known.gram, known.mean).best()
    assert alone.exponent == both.exponent


# -------------------------------------------------------------------------------------------------------------- smooth


def smoothed(x: Tensor, w: Tensor, activations: Scheme) -> tuple[float, float, float]:
    """The exponent, and the relative output error without and with smoothing, on other tokens."""
    known = gathered(x)
    reader = Reader(w, INT8, activations)
    assert known.sample is not None and known.low is not None and known.high is not None
    extremes = torch.stack([known.low, known.high])
    found = Smooth().candidates([reader], known.sample, extremes, reach_of([reader]), known.peak).best()
    fresh = inputs_with_outliers(seed=8)
    meant, errors = fresh @ w.T, []
    for s in (torch.ones(K), found.s):
        scales = fit(extremes / s, activations) if activations.group == "tensor" else None
        ws = w * s
        out = rounded(fresh / s, activations, scales) @ decode(encode(ws, fit(ws, INT8), INT8)).T
        errors.append(float((out - meant).square().sum() / meant.square().sum()))
    return found.exponent, errors[0], errors[1]


@pytest.mark.parametrize("activations", ["int8-token", "int8-tensor", "int8-tensor-asym"])
def test_smooth_moves_outliers_into_the_weights(activations: str) -> None:
    """An outlier channel costs all others their digits; its own output is small here, so that shows."""
    w = weight()
    w[:, [5, 40, 77]] /= 30
    exponent, before, after = smoothed(inputs_with_outliers(), w, Scheme.parse(activations))
    assert 0.2 < exponent <= 1
    assert after < 0.2 * before


def test_smooth_is_equation_4() -> None:
    x, w = inputs_with_outliers(), weight()
    known, reader = gathered(x), Reader(w, INT8, TOKEN)
    assert known.sample is not None and known.low is not None and known.high is not None
    extremes = torch.stack([known.low, known.high])
    found = Smooth(points=1).candidates([reader], known.sample, extremes, reach_of([reader]), known.peak).best()
    if found.exponent:
        expected = x.abs().amax(0)
        torch.testing.assert_close(found.s / found.s[0], expected / expected[0])
    half = x.abs().amax(0).sqrt() / w.abs().amax(0).sqrt()
    grid = Smooth(points=2).candidates([reader], known.sample, extremes, reach_of([reader]), known.peak).best()
    if grid.exponent == 0.5:
        torch.testing.assert_close(grid.s / grid.s[0], half / half[0])
    assert {found.exponent, grid.exponent} & {1.0, 0.5}


# ------------------------------------------------------------------------------------------------------------ outliers


def test_columns_by_threshold_activation_weight_and_chance() -> None:
    x, w = inputs_with_outliers(), weight()
    w[:, 11] *= 20
    peak, mean = x.abs().amax(0), x.abs().mean(0)
    assert Outlier(threshold=20.0).columns(w, peak, mean).tolist() == [5, 40, 77]
    assert Outlier(threshold=1e6).columns(w, peak, mean).tolist() == []
    assert Outlier(fraction=0.03).columns(w, peak, mean).tolist() == [5, 40, 77]
    assert Outlier(fraction=0.001, by="weight").columns(w, peak, mean).tolist() == [11]
    drawn = [Outlier(fraction=0.1, by="random", seed=seed).columns(w, peak, mean).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10 == Outlier(fraction=0.1).expected(K)
    assert Outlier().expected(K) is None


def test_a_decomposed_layer_computes_what_llm_int8_says() -> None:
    """Outlier channels in float, the rest absmax by token and by row in int8, in plain float64."""
    x, w = inputs_with_outliers(), weight()
    columns = torch.tensor([5, 40, 77])
    rest = w.index_fill(1, columns, 0)
    q = encode(rest, fit(rest, Scheme.parse("int8-channel-f32")), Scheme.parse("int8-channel-f32"))
    q = QTensor(q.codes, q.scales, q.scheme, q.shape, Outliers(columns, w[:, columns]))
    found = InputQuantization(TOKEN, outliers=columns)(x) @ decode(q).T
    inside = torch.ones(K, dtype=torch.bool).index_fill_(0, columns, False)
    xi, wi = x[:, inside].double(), w[:, inside].double()
    sx, sw = xi.abs().amax(1, keepdim=True) / 127, wi.abs().amax(1, keepdim=True) / 127
    integer = torch.round(xi / sx) @ torch.round(wi / sw).T
    expected = integer * sx * sw.T + x[:, columns].double() @ w[:, columns].double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    plain = rounded(x, TOKEN) @ decode(encode(w, fit(w, INT8), INT8)).T
    meant = x @ w.T
    assert (found - meant).norm() < 0.2 * (plain - meant).norm()


def test_rows_of_a_decomposed_matrix_keep_their_outliers() -> None:
    w, columns = weight(), torch.tensor([1, 2])
    q = encode(w, fit(w, INT8), INT8)
    q = QTensor(q.codes, q.scales, q.scheme, q.shape, Outliers(columns, w[:, columns]))
    part = rows(q, 10, 20)
    assert torch.equal(decode(part), decode(q)[10:20])
    assert torch.equal(decode(part)[:, columns], w[10:20, columns])


# ------------------------------------------------------------------------------------------------- statistics in motion


def test_divided_statistics_are_those_of_divided_inputs() -> None:
    x, s = inputs_with_outliers(), torch.rand(K, generator=torch.Generator().manual_seed(2)) + 0.1
    moved, fresh = gathered(x).divided(s), gathered(x / s)
    for name in ("gram", "mean", "low", "high", "sample"):
        torch.testing.assert_close(getattr(moved, name), getattr(fresh, name), rtol=1e-4, atol=1e-5)
    assert moved.histogram is not None and fresh.histogram is not None
    assert moved.histogram.low == pytest.approx(fresh.histogram.low)
    assert moved.histogram.high == pytest.approx(fresh.histogram.high)


def test_statistics_without_some_channels() -> None:
    x, columns = inputs_with_outliers(), torch.tensor([5, 40, 77])
    known = gathered(x)
    left, fresh = known.without(columns), gathered(x.index_fill(1, columns, 0))
    for name in ("gram", "mean", "low", "high", "sample"):
        torch.testing.assert_close(getattr(left, name), getattr(fresh, name), rtol=1e-4, atol=1e-5)
    assert left.histogram is not None and left.histogram.high == pytest.approx(float(fresh.peak.max()), rel=0.5)
    assert known.gram is not None and known.gram[5, 5] > 100, "the statistics were changed"


def test_ranges_that_were_not_gathered_are_missed() -> None:
    with pytest.raises(CalibrationError, match="not gathered"):
        _ = Inputs(("a",)).peak


# -------------------------------------------------------------------------------------------------------------- recipes


def test_methods_by_name() -> None:
    assert split_method("awq+gptq") == (["awq"], "gptq")
    assert split_method("awq") == (["awq"], "search")
    assert split_method("rotate+smooth") == (["rotate", "smooth"], "rtn")
    for text, message in (("awk+gptq", "unknown transform"), ("awq+gptk", "unknown method"), ("gptq+awq", "unknown")):
        with pytest.raises(RecipeError, match=message) as caught:
            split_method(text)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ('["awq", "awq"]', "awq twice"), ('["outlier", "awq"]', "outlier behind"), ('["awq", "rotate"]', "rotate comes"),
        ('["smooth"]', "does not round them"), ('["spin"]', "unknown transform"), ("[3]", "unknown transform"),
        ('[{ name = "awq", grid = 3 }]', "no option 'grid'"), ('[{ name = "awq", points = 0 }]', "grid of 0"),
        ('[{ name = "outlier", fraction = 2.0 }]', "fraction"), ('[{ name = "outlier", by = "luck" }]', "chosen by"),
        ('[{ name = "outlier", threshold = 0.0 }]', "threshold"), ('[{ name = "outlier", by = "weight" }]', "need a fraction"),
        ('[{ name = "rotate", online = 3 }]', "online"), ('[{ name = "smooth", points = -1 }]', "grid of -1"),
    ],
)  # fmt: skip
def test_contradictory_transforms_are_refused(transforms: str, message: str, tmp_path: pytest.TempPathFactory) -> None:
    file = tmp_path / "recipe.toml"  # type: ignore[operator]
    file.write_text(f'[[rule]]\nmatch = "*"\nscheme = "int4-g32"\nmethod = "gptq"\ntransforms = {transforms}\n')
    with pytest.raises(RecipeError, match=message):
        Recipe.of(file, scheme="int4-g32", method="rtn")


def test_methods_on_schemes_that_they_do_not_serve() -> None:
    with pytest.raises(RecipeError, match="integer codes"):
        Rule("*", Scheme.parse("nf4-g64"), "autoround")
    with pytest.raises(RecipeError, match="float minima"):
        Rule("*", Scheme.parse("int4-g32"), "hqq")
    with pytest.raises(RecipeError, match="unknown observer"):
        Rule("*", Scheme.parse("int4-g32"), observer="guess")
    with pytest.raises(RecipeError, match="whole model"):
        Recipe((Rule("*", INT8), Rule("a", INT8, transforms=(split_rotate(),))))


def split_rotate() -> "object":
    from bitwright.transforms import Rotate

    return Rotate()


def test_what_a_rule_needs_and_is_called() -> None:
    rule = Rule("*", INT8, "gptq", transforms=(Awq(), Outlier()))
    assert rule.name == "awq+outlier+gptq" and rule.needs_details and rule.scales_channels
    assert not Rule("*", INT8, "rtn").needs_calibration
    assert Rule("*", INT8, "rtn", activations=Scheme.parse("int8-tensor")).needs_calibration
