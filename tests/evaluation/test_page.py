"""The page of `compare`: who wins, which candidates are on the front, and what a reader and a browser make of it."""

import dataclasses
import itertools
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitwright.errors import InputError, NumericsError
from bitwright.evaluation.candidate import MIX, RECIPE, Candidate, Original
from bitwright.evaluation.heat import given, heat
from bitwright.evaluation.page import (
    Axis,
    axis,
    best,
    curves,
    front,
    headline,
    number,
    page,
    pareto,
    plot,
    schemes,
    ticks,
    winner,
)
from chromium import browser, probe

ORIGINAL = Original("bfloat16", 16.0, 2_000_000, 10.0, 0.1)
HOSTILE = '</script><script>window.hacked = 1</script>"\'><img src=x onerror="window.hacked = 1">&amp; {{ 7 * 7 }}'
LOSSES = {
    f"model.layers.{b}.{kind}": 0.01 * (b + 1) for b in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")
}


def candidate(scheme: str = "int4-g128", method: str = "gptq", kl: float = 0.1, **changes: Any) -> Candidate:
    """A candidate of which only a few things matter."""
    bits = float(re.sub(r"\D.*", "", scheme.removeprefix("int")) or 4) + 0.25
    values: dict[str, Any] = {
        "scheme": scheme,
        "method": method,
        "statistics": "sequential",
        "bits_per_weight": bits,
        "bytes": int(bits * 125_000),
        "perplexity": 10 * math.exp(min(kl, 9)),
        "perplexity_stderr": 0.1,
        "kl_mean": kl,
        "kl_stderr": 0.01 * kl,
        "kl_p999": 9 * kl,
        "top1": 0.9,
        "seconds": 3.0,
        "peak_rss_bytes": 10**9,
        "losses": LOSSES,
        "fallbacks": 0,
    }
    return Candidate(**(values | changes))


def table() -> list[Candidate]:
    """Three schemes by four methods, in an order of no meaning, with a KL and three perplexities that are not numbers."""
    kls = {"rtn": 1.0, "gptq": 0.3, "awq": 0.5, "autoround": 0.2}
    made = [
        candidate(
            s, m, kl * scale, losses={k: v * kl * scale for k, v in LOSSES.items()}, seconds=100 * kl, top1=1 - kl / 2
        )
        for (s, scale), (m, kl) in itertools.product({"int2": 2, "int10": 1e-3, "int3": 0.4}.items(), kls.items())
    ]
    made[2] = dataclasses.replace(made[2], kl_mean=math.nan, kl_stderr=math.nan)
    for i in (4, 7, 9):
        made[i] = dataclasses.replace(made[i], perplexity=math.nan)
    return random.Random(0).sample(made, len(made))


def render(candidates: list[Candidate], **changes: Any) -> str:
    options: dict[str, Any] = {"model": "M", "reference": ORIGINAL, "shared_seconds": 9.0, "notes": [], "command": "c"}
    return page(candidates=candidates, **(options | changes))


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.words += data


def words(text: str) -> str:
    return " ".join(Reader(text).words.split())


# Rules


def test_the_front_is_what_the_definition_says_it_is() -> None:
    dice = random.Random(1)
    for _ in range(300):
        values = [
            (dice.randint(1, 5), dice.choice([0, 1, 2, 3, math.nan, math.inf])) for _ in range(dice.randint(1, 9))
        ]
        expected = set()
        for i, (size, cost) in enumerate(values):
            better = [s <= size and c <= cost and (s < size or c < cost) for s, c in values]
            if math.isfinite(cost) and not any(better):
                expected.add(i)
        assert front(values) == expected, values


def test_pareto_weighs_bytes_against_kl() -> None:
    some = [candidate("int4", kl=0.1), candidate("int3", kl=0.5), candidate("int8", kl=0.2), candidate("int4", kl=0.1)]
    assert pareto(some) == {0, 1, 3}
    assert pareto([dataclasses.replace(c, bits_per_weight=1.0, perplexity=1.0) for c in some]) == {0, 1, 3}
    assert pareto([]) == set()


def test_schemes_go_from_the_fewest_bits_to_the_most() -> None:
    assert schemes(table()) == ["int2", "int3", "int10"]


def test_the_winner_has_the_lowest_kl_at_its_scheme() -> None:
    candidates = table()
    for scheme in schemes(candidates):
        verdict = winner(candidates, scheme)
        here = sorted(
            (c.kl_mean, i) for i, c in enumerate(candidates) if c.scheme == scheme and not math.isnan(c.kl_mean)
        )
        assert [verdict.best, verdict.runner_up] == [here[0][1], here[1][1]]
        assert verdict.rtn is not None and candidates[verdict.rtn].method == "rtn"
        assert candidates[verdict.best].method == "autoround"
        a, b = candidates[verdict.best], candidates[here[1][1]]
        assert verdict.sigmas == pytest.approx((b.kl_mean - a.kl_mean) / (a.kl_stderr**2 + b.kl_stderr**2) ** 0.5)
    with pytest.raises(InputError, match=r"int9.*no candidate"):
        winner(candidates, "int9")


@pytest.mark.parametrize(
    ("a", "b", "sigmas"),
    [
        ((1.0, 0.3), (2.0, 0.4), 2.0),  # 3, 4, 5
        ((1.0, 0.1), (1.0, 0.1), 0.0),
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((0.0, 0.0), (1.0, 0.0), math.inf),
        ((1.0, math.nan), (2.0, 0.1), math.nan),  # one window
        ((1.0, math.nan), (math.nan, math.nan), math.inf),
        ((math.nan, math.nan), (math.nan, math.nan), math.nan),
    ],
)
def test_standard_errors_between_winner_and_runner_up(
    a: tuple[float, float], b: tuple[float, float], sigmas: float
) -> None:
    pair = [candidate(method="x", kl=b[0], kl_stderr=b[1]), candidate(method="y", kl=a[0], kl_stderr=a[1])]
    verdict = winner(pair, "int4-g128")
    assert verdict.sigmas == pytest.approx(sigmas, nan_ok=True) and verdict.rtn is None
    if a != b and not math.isnan(a[0]):
        assert verdict.best == 1
    names = ["x", "y"]
    ((_, does, but),) = headline([verdict], pair, names)
    assert (does == "wins") == (sigmas > 2) and (but == "") == (sigmas > 2)


def test_ties_go_to_fewer_bytes_and_then_to_the_first() -> None:
    tied = [candidate(method=m, bytes=size) for m, size in (("a", 9), ("b", 8), ("c", 8))]
    assert winner(tied, "int4-g128").best == 1 and winner(tied, "int4-g128").runner_up == 2


def test_the_best_of_each_scheme() -> None:
    candidates = [
        candidate("int2", "a", 0.2, top1=0.5),
        candidate("int2", "b", math.nan, top1=0.6),
        candidate("int2", "c", 0.2, top1=0.4),
        candidate("int3", "a", 0.3, perplexity=math.nan, kl_p999=1.0),
    ]
    found = best([dataclasses.replace(c, perplexity=math.nan) for c in candidates])
    assert {i for i, field in found if field == "kl_mean"} == {0, 2, 3}
    assert {i for i, field in found if field == "top1"} == {1, 3}
    assert not {i for i, field in found if field == "perplexity"}


@pytest.mark.parametrize(
    "changes",
    [{"bytes": 0}, {"bits_per_weight": math.nan}, {"kl_mean": -1e-9}, {"perplexity": -1.0}, {"seconds": -1.0}],
)
def test_numbers_that_cannot_be(changes: dict[str, float]) -> None:
    with pytest.raises(NumericsError, match=f"int4-g128 gptq: {next(iter(changes))} is"):
        candidate(**changes)  # type: ignore[arg-type]


# Numbers and axes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1, "1.00"), (0.12, "0.120"), (0.123456, "0.123"), (12.34, "12.3"), (123.4, "123"), (999.9, "1000"),
        (12345, "12300"), (0.00012345, "1.23e-4"), (1.23e-12, "1.23e-12"), (math.nan, "–"), (math.inf, "∞"), (0.001, "0.00100"),
    ],
)  # fmt: skip
def test_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_an_axis_is_logarithmic_and_knows_where_to_put_the_rest() -> None:
    at = Axis(0.01, 100, 300, 0, 320).at
    assert [at(v) for v in (0.01, 0.1, 1, 10, 100)] == [300, 225, 150, 75, 0]
    assert [at(v) for v in (1e-9, 1e9, math.inf, math.nan, 0, -1)] == [300, 0, 0, 0, 320, 320]
    made = axis([1, 10, 0, math.nan, math.inf], (0.5, 1), 0, 9, -1)
    assert made.low == pytest.approx(10**-0.5) and made.high == pytest.approx(100)
    alone = axis([5, 5], (0, 0), 0, 9, -1)
    assert (alone.low, alone.high) == (2.5, 10)
    nothing = axis([0, math.nan], (0, 0), 0, 9, -1)
    assert 0 < nothing.low < nothing.high


def test_ticks_are_few_round_and_within() -> None:
    dice = random.Random(2)
    for _ in range(500):
        low = 10 ** dice.uniform(-9, 5)
        high = low * math.exp(10 ** dice.uniform(-2.5, 1.5))
        found = ticks(low, high)
        assert 3 <= len(found) <= 11 and found == sorted(set(found)), (low, high, found)
        assert low * (1 - 1e-9) <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert ticks(0.005, 5) == [0.01, 0.1, 1]
    assert ticks(9.9, 11.3) == pytest.approx([10, 10.2, 10.4, 10.6, 10.8, 11, 11.2])


def test_a_plot_places_every_candidate() -> None:
    candidates = [
        candidate("int2", "rtn", 0.5, kl_stderr=0.05),
        candidate("int2", "gptq", 0.1),
        candidate("int4", "gptq", 0.0),
        candidate("int8", "gptq", 0.2, kl_stderr=math.nan),
        candidate("int8", "rtn", math.nan),
        candidate("int3", "rtn", 0.01, kl_stderr=1.0),
    ]
    made = plot(candidates, ORIGINAL, "kl_mean", "kl_stderr", 0.0)
    y = [point.y for point in made.points]
    assert made.front == [1, 5, 2]
    assert y[4] < y[0] < y[3] < y[1] < y[5] < y[2] == made.original.y
    assert (
        made.points[0].x == made.points[1].x < made.points[5].x < made.points[2].x < made.points[3].x < made.original.x
    )
    assert [point.bar is not None for point in made.points] == [True, True, False, False, False, True]
    low, high = made.points[0].bar or (0, 0)
    assert (low - high) / (y[1] - y[0]) == pytest.approx(math.log(0.6 / 0.4) / math.log(0.5 / 0.1), rel=0.01)
    assert (low - y[0]) / (y[1] - y[0]) == pytest.approx(math.log(0.5 / 0.4) / math.log(0.5 / 0.1), rel=0.01)
    below = made.points[5].bar
    assert below is not None and below[0] < made.original.y  # not into the place of 0
    assert [bool(point.text) for point in made.points] == [False] * 4 + [True, False]


def test_perplexities_far_beyond_the_original_do_not_squeeze_the_rest() -> None:
    candidates = [
        candidate("int2", perplexity=1e9),
        candidate("int3", perplexity=12.0),
        candidate("int4", perplexity=10.1),
    ]
    made = plot(candidates, ORIGINAL, "perplexity", "perplexity_stderr", 10.0)
    assert [bool(point.text) for point in made.points] == [True, False, False] and made.front == [0, 1, 2]
    assert made.points[2].y - made.points[1].y > 100 and made.points[0].y < made.points[1].y


# The heat map


def test_losses_become_a_table_in_the_order_of_blocks() -> None:
    losses = {
        "lm_head": 0.5,
        "model.layers.10.mlp.up_proj": 0.1,
        "model.layers.2.mlp.up_proj": 0.2,
        "model.layers.2.self_attn.q": math.nan,
        "model.layers.2.experts.0.down": 0.3,
        "model.layers.2.experts.11.down": 0.5,
        "vision.layers.2.self_attn.q": 0.0,
    }
    made = heat([candidate(losses=losses), candidate(losses={})])
    assert made["rows"] == [["model.layers.2", 2], ["model.layers.10", 10], ["vision.layers.2", 2], ["", 0]]
    assert made["columns"] == ["lm_head", "mlp.up_proj", "self_attn.q", "experts.*.down"]
    worst = [pytest.approx(0.4), 2, 0.5, "model.layers.2.experts.11.down"]
    assert made["cells"] == [
        [None, 0.2, None, worst, None, 0.1, None, None, None, None, 0.0, None, 0.5, *[None] * 3],
        [None] * 16,
    ]


def test_odd_module_names() -> None:
    odd = ["", "7", "a.7", "7.a", "a..b", "a.²", "a.٣.b", "a." + "9" * 5000]
    made = heat([candidate(losses=dict.fromkeys(odd, 0.1))])
    assert sum(cell is not None for cell in made["cells"][0]) == len(odd)


def mixed() -> list[Candidate]:
    """Two uniform schemes, two mixes and two plans by one method."""
    got = dict.fromkeys(LOSSES, ("q4_k", 4.5)) | {"model.layers.2.mlp.down_proj": ("q6_k", 6.5625)}
    more = {"model.layers.1.self_attn.q_proj": ("q2_k", 2.625), "lm_head": ("q8_0", 8.5)}
    return [
        candidate("int3", kl=0.3, given=dict.fromkeys(LOSSES, ("int3-g64", 3.25))),
        candidate("int4", kl=0.1),
        candidate("q4_k_m", kl=0.08, kind=MIX, given=got, bits_per_weight=4.8, bytes=600_000),
        candidate("q3_k_m", kl=0.2, kind=MIX, given=got, bits_per_weight=3.9, bytes=500_000),
        candidate("plan-a", kl=0.05, kind=RECIPE, given=got | more, bits_per_weight=4.8, bytes=600_000),
        candidate("plan-b", kl=0.15, kind=RECIPE, given=got, bits_per_weight=3.9, bytes=500_000),
    ]


def test_a_curve_joins_what_one_method_does_in_one_way_from_small_to_large() -> None:
    made = [(c.kind, c.method, c.of) for c in curves(mixed(), "kl_mean")]
    assert sorted(made) == [("mix", "gptq", [3, 2]), ("recipe", "gptq", [5, 4]), ("scheme", "gptq", [0, 1])]
    one_left = [dataclasses.replace(c, kl_mean=math.nan) if c.scheme == "plan-a" else c for c in mixed()]
    assert "recipe" not in {c.kind for c in curves(one_left, "kl_mean")}


def test_what_mixes_and_plans_gave_each_matrix_becomes_a_table() -> None:
    made = given(mixed())
    assert list(made["cells"]) == [2, 3, 4, 5]  # uniform candidates have nothing to show
    assert made["rows"] == [["model.layers.0", 0], ["model.layers.1", 1], ["model.layers.2", 2], ["", 0]]
    at = 1 * 3 + made["columns"].index("self_attn.q_proj")
    assert made["cells"][4][at] == [2.62, "q2_k"] and made["cells"][2][at] == [4.5, "q4_k"]
    assert made["cells"][2][9:] == [None] * 3 and [8.5, "q8_0"] in made["cells"][4][9:]
    experts = {f"a.0.experts.{i}.up": ("q4_k", 4.5) if i else ("q6_k", 6.5) for i in range(4)}
    assert given([candidate(given=experts)])["cells"] == {0: [[5.0, "3 × q4_k, 1 × q6_k"]]}


# The page as text


def test_the_page_names_the_winner_first() -> None:
    text = words(render(table(), notes=["a note"], command="bitwright compare"))
    assert "autoround wins at every scheme." in text
    assert "20.0 % of round-to-nearest’s KL, 66.7 % of gptq’s, the runner-up: 27.7 standard errors ahead." in text
    assert text.endswith("a note bitwright compare")


def test_schemes_may_go_to_different_winners() -> None:
    candidates = [
        candidate("int2", "a", 0.1),
        candidate("int2", "b", 0.2),
        candidate("int3", "a", 0.1),
        candidate("int3", "b", 0.2),
        candidate("int4", "a", 0.2),
        candidate("int4", "b", 0.1),
        candidate("int8", "b", 0.1),
        candidate("int8", "rtn", 0.1005),
    ]
    text = words(render(candidates))
    assert "a wins at int2, int3; b wins at int4; it leads at int8, not distinguishable from rtn." in text
    assert "99.5 % of round-to-nearest’s KL: not distinguishable (0.353 standard errors)." in text


def test_equal_kls_are_not_distinguishable() -> None:
    text = words(render([candidate(method="rtn"), candidate(method="gptq")]))
    assert "rtn leads at int4-g128, not distinguishable from gptq." in text
    assert "100 % of gptq’s, the runner-up: not distinguishable (0 standard errors)." in text
    assert "gptq int4-g128 sequential 4.25 0.531 0.100 ± 0.00100 0.900 90.0 11.1 ± 0.100 3.00 1000 0" in text


def test_a_kl_of_zero_and_no_standard_error() -> None:
    zero = [candidate(method="rtn", kl=0.0), candidate(method="gptq", kl=0.0, kl_stderr=math.nan)]
    assert "100 % of gptq’s, the runner-up: not distinguishable (no standard error is known)." in words(render(zero))


def test_one_candidate_only() -> None:
    text = words(render([candidate(kl_stderr=math.nan, perplexity_stderr=math.nan)]))
    assert (
        "M: 1 way to make" in text
        and "gptq is alone at int4-g128." in text
        and "The only candidate at this scheme." in text
    )
    assert "nan" not in text.lower()


def test_no_kl_is_finite() -> None:
    broken = [candidate(method=m, kl=math.nan, perplexity=math.nan, losses={}) for m in ("rtn", "gptq")]
    text = words(render(broken))
    assert "rtn comes first at int4-g128, but no KL is finite." in text


def test_a_method_with_statistics_of_both_kinds_says_which() -> None:
    both = [candidate(statistics="one-shot"), candidate(kl=0.2), candidate(method="rtn", kl=1.0, statistics="none")]
    html = render(both)
    assert "gptq (one-shot) wins at int4-g128." in words(html) and "gptq (sequential)’s, the runner-up" in words(html)
    assert (
        len(re.findall(r'class="mark m\d hollow"', html)) == len(re.findall(r'class="mark m1"', html)) + 2
    )  # headline, card


def test_nothing_to_compare() -> None:
    with pytest.raises(InputError, match="M: nothing to compare"):
        render([])


def test_hostile_names_stay_text() -> None:
    names = {HOSTILE: 1.0, f"a.1.{HOSTILE}": 1.0}
    hostile = candidate(HOSTILE, HOSTILE, statistics=HOSTILE, losses=names, bits_per_weight=4.0)
    original = dataclasses.replace(ORIGINAL, scheme=HOSTILE)
    read = Reader(render([hostile], model=HOSTILE, notes=[HOSTILE], command=HOSTILE, reference=original))
    plain = Reader(render([candidate(bits_per_weight=4.0)], notes=["a note"]))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in plain.tags]
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert read.words.count(HOSTILE) >= 9


def test_the_page_loads_nothing() -> None:
    html = render(table())
    links = [a[name] or "" for _, a in Reader(html).tags for name in ("src", "href", "action", "data") if name in a]
    assert links == ["data:,"]
    assert not re.search(r"https?:|//\w|@import|url\(", html.split("<script")[0])


def test_colours_stand_out_from_both_grounds() -> None:
    html = render(table())
    light, dark = html.split("prefers-color-scheme: dark", 1)
    for part in (light, dark):
        named = dict(re.findall(r"--(\w+): (#\w{3,6});", part))
        assert {f"m{i}" for i in range(8)} <= set(named)
        for name in [f"m{i}" for i in range(8)]:
            assert contrast(named[name], named["panel"]) >= 3, name
        for name in ("ink", "soft", "good"):
            assert contrast(named[name], named["panel"]) >= 4.5, name


def contrast(a: str, b: str) -> float:
    """WCAG 2.2's contrast ratio."""
    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in bytes.fromhex(digits))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# The page in a browser

LOOK = """
const all = (selector) => [...document.querySelectorAll(selector)]
const column = (k) => all("tbody.candidates tr").map((row) => row.cells[k].dataset.v)
const buttons = all("thead button"), sorts = []
const first = all("tbody.candidates tr").map((row) => row.dataset.c)
buttons.forEach((button, k) => {
  for (const way of ["ascending", "descending"]) {
    button.click()
    sorts.push([k, way, all("[aria-sort]").length, button.parentNode.getAttribute("aria-sort"), column(k)])
  }
})
const cells = () => all("#heat tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent))
const colours = () => all("#heat td").map((cell) => getComputedStyle(cell).backgroundColor)
const select = document.getElementById("choose"), chosen = select.value, before = [cells(), colours()]
const shares = all("#heat td").map((cell) => +cell.dataset.p)
const other = first.at(-1)
select.value = other
select.dispatchEvent(new Event("change"))
const after = [cells(), colours()]
const tip = document.getElementById("tip"), over = (element) => {
  element.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }))
  return [tip.textContent, getComputedStyle(tip).visibility]
}
const legend = document.querySelector(".legend li")
over(legend)
const lit = all(".point[data-c]:not(.dim)").map((g) => g.dataset.c)
const point = document.querySelector('.point[data-c="0"] .mark')
return {
  points: all(".plot").map((plot) => plot.querySelectorAll(".point:not(.original)").length),
  hidden: all(".plot").map((plot) => {
    const at = [...plot.querySelectorAll(".point")].map((g) => g.transform.baseVal[0].matrix)
    return at.filter((a, i) => at.some((b, j) => j < i && Math.hypot(a.e - b.e, a.f - b.f) < 9)).length
  }),
  labels: all(".plot").map((plot) => plot.querySelectorAll(".label[data-of]").length),
  wide: document.documentElement.scrollWidth - innerWidth, hacked: window.hacked ?? 0,
  first, sorts, chosen, other, before, after, lit, shares,
  tips: [over(document.querySelector("#heat td")), over(point), over(document.body)],
}
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser made of the table's page."""
    report = probe(render(table()), LOOK, tmp_path_factory.mktemp("chromium"))
    assert report["troubles"] == []
    found: dict[str, Any] = report["found"]
    return found


def test_both_plots_show_every_candidate(seen: dict[str, Any]) -> None:
    assert seen["points"] == [12, 12]
    assert seen["hidden"] == [0, 0]
    assert all(2 <= count <= 3 for count in seen["labels"])
    assert seen["wide"] <= 0  # nothing sticks out to the right


def test_candidates_are_listed_by_scheme_and_kl(seen: dict[str, Any]) -> None:
    listed = [table()[int(c)] for c in seen["first"]]
    keys = [(c.bits_per_weight, math.inf if math.isnan(c.kl_mean) else c.kl_mean) for c in listed]
    assert keys == sorted(keys) and len(keys) == 12


def test_a_click_on_a_heading_sorts_and_another_turns_it_round(seen: dict[str, Any]) -> None:
    assert len(seen["sorts"]) == 2 * 12
    for column, way, sorted_columns, aria, values in seen["sorts"]:
        assert (sorted_columns, aria) == (1, way)
        keys: list[Any] = values
        if column == 1:
            keys = [int(value.removeprefix("int")) for value in values]
        elif column > 2:
            keys = [float(value) for value in values if value != "nan"]
            assert values[len(keys) :] == ["nan"] * (12 - len(keys))  # last, either way round
        assert keys == sorted(keys, reverse=way == "descending"), (column, way)
    assert any("nan" in values for *_, values in seen["sorts"])


def test_the_select_changes_the_heat_map(seen: dict[str, Any]) -> None:
    candidates = table()
    assert int(seen["chosen"]) == winner(candidates, "int2").best
    for which, (rows, colours) in ((seen["chosen"], seen["before"]), (seen["other"], seen["after"])):
        losses = candidates[int(which)].losses
        assert [row[0] for row in rows] == ["0", "1", "2"]
        for block, row in enumerate(rows):
            assert float(row[1]) == pytest.approx(losses[f"model.layers.{block}.self_attn.q_proj"], rel=5e-3)
        assert len(colours) == 6 and len(set(colours)) == 3  # a block's two losses are equal
    assert seen["before"][1] != seen["after"][1]


def test_colours_are_logarithmic_and_span_the_scheme(seen: dict[str, Any]) -> None:
    candidates = table()
    span = [loss for c in candidates if c.scheme == "int2" for loss in c.losses.values()]
    chosen = candidates[int(seen["chosen"])].losses
    expected = [100 * math.log(loss / min(span)) / math.log(max(span) / min(span)) for loss in chosen.values()]
    assert seen["shares"] == pytest.approx(expected, abs=0.1) and 0 <= min(expected) < max(expected) < 100


def test_tooltips(seen: dict[str, Any]) -> None:
    heat_tip, point_tip, none = seen["tips"]
    assert heat_tip[1] == point_tip[1] == "visible" and none[1] == "hidden"
    assert re.fullmatch(r"model\.layers\.0\.self_attn\.q_proj\nloss [\d.e-]+", heat_tip[0])
    c = table()[0]
    assert point_tip[0].startswith(f"{c.scheme}  {c.method}\n") and f"KL {number(c.kl_mean)} ± " in point_tip[0]


def test_pointing_at_the_legend_leaves_one_method(seen: dict[str, Any]) -> None:
    candidates = table()
    same = [str(i) for i, c in enumerate(candidates) if c.method == candidates[0].method]
    assert sorted(seen["lit"]) == sorted(same * 2) and len(same) == 3


GIVEN = """
const all = (selector) => [...document.querySelectorAll(selector)]
const cells = () => all("#given tbody tr").map((row) => [...row.cells].map((cell) => cell.textContent))
const colours = () => new Set(all("#given td:not(.none)").map((cell) => getComputedStyle(cell).backgroundColor)).size
const select = document.getElementById("choose-given"), before = [cells(), colours()]
select.value = "4"
select.dispatchEvent(new Event("change"))
return {
  before, after: [cells(), colours()], offered: [...select.options].map((option) => option.value),
  curves: all(".plot polyline.curve").map((line) => line.classList[1]),
  ends: ["fewest", "most"].map((id) => document.getElementById(id).textContent),
  tip: document.querySelector("#given td").dataset.tip,
  width: innerWidth, wide: document.documentElement.scrollWidth - innerWidth,
  ground: getComputedStyle(document.body).backgroundColor,
}
"""


@pytest.mark.parametrize(("dark", "ground"), [(False, "rgb(244, 245, 247)"), (True, "rgb(14, 17, 21)")])
def test_curves_and_what_a_plan_gave_in_light_and_dark_on_a_phone(dark: bool, ground: str, tmp_path: Path) -> None:
    report = probe(render(mixed()), GIVEN, tmp_path, width=400, dark=dark)
    found = report["found"]
    assert report["troubles"] == [] and found["ground"] == ground
    assert found["width"] <= 500 and found["wide"] <= 0  # 500 is the narrowest that some browsers open
    assert sorted(found["curves"]) == sorted(2 * ["mix", "recipe", "scheme"])
    assert found["offered"] == ["3", "5", "2", "4"] and found["ends"] == ["2.62 bits", "8.50 bits"]
    assert found["before"][0][2][1:3] == ["4.5", "6.6"] and found["before"][1] == 2
    assert found["after"][0][1][1:3] == ["2.6", "4.5"] and found["after"][1] == 4
    assert found["tip"] == "model.layers.0.self_attn.q_proj\nq4_k\n4.50 bits a weight"


def test_without_mixes_and_recipes_nothing_is_said_of_them() -> None:
    text = words(render(table()))
    assert "What each matrix got" not in text and "mixes" not in text


def test_hostile_names_in_a_browser(tmp_path: Path) -> None:
    hostile = candidate(HOSTILE, HOSTILE, losses={f"a.1.{HOSTILE}": 1.0}, bits_per_weight=4.0)
    report = probe(render([hostile], model=HOSTILE, notes=[HOSTILE], command=HOSTILE), LOOK, tmp_path)
    found = report["found"]
    assert report["troubles"] == [] and found["hacked"] == 0 and found["points"] == [1, 1]
    assert found["tips"][0][0] == f"a.1.{HOSTILE}\nloss 1.00" and HOSTILE in found["tips"][1][0]


def test_thousands_of_layers(tmp_path: Path) -> None:
    losses = {f"model.layers.{b}.{kind}": 1e-3 * (1 + b % 97) for b in range(2000) for kind in ("q", "k", "v", "o")}
    report = probe(render([candidate(losses=losses), candidate("int2", kl=math.inf, losses={})]), LOOK, tmp_path)
    assert report["troubles"] == [] and [len(report["found"][when][1]) for when in ("before", "after")] == [8000, 8000]
    assert len(set(report["found"]["after"][1])) > 80 and len(set(report["found"]["before"][1])) == 1  # none are known


def test_no_losses_and_one_candidate(tmp_path: Path) -> None:
    bare = candidate(losses={}, kl=0.0, kl_stderr=math.nan, perplexity=math.nan, perplexity_stderr=math.nan)
    script = "return [document.getElementById('low').textContent, document.querySelectorAll('.point').length]"
    assert probe(render([bare]), script, tmp_path) == {"troubles": [], "found": ["no losses recorded", 4]}


def test_the_probe_sees_trouble(tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\">"
    script = "<script>console.error('first'); nothing.here</script>"
    page = f"<html><head>{policy}</head><body>{script}<img src='data:image/png,x'></body></html>"
    report = probe(page, "throw new Error('last')", tmp_path)
    assert report["found"] is None
    troubles = " ".join(sorted(report["troubles"]))
    assert len(report["troubles"]) == 4
    assert all(word in troubles for word in ("first", "nothing is not defined", "last", "img-src data")), troubles


def test_a_missing_browser_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("BITWRIGHT_REQUIRE_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no chromium"):
        browser()
    monkeypatch.setenv("BITWRIGHT_REQUIRE_CHROMIUM", "1")
    with pytest.raises(pytest.fail.Exception, match="no chromium"):
        browser()
