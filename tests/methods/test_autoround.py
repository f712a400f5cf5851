"""AutoRound: its start is GPTQ's result exactly, its gradient is the straight-through one, and a block only gets better."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright.api import evaluate, quantize
from bitwright.errors import RecipeError, SchemeError
from bitwright.kernels import rounding
from bitwright.kernels.rounding import RoundingVariables
from bitwright.methods import gptq, rtn
from bitwright.methods.autoround import MEMORY, Options, _slopes, autoround, move, result, tune, variables_of
from bitwright.numerics.codec import code_range, decode, encode, group_view, is_signed
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline import tune_block
from bitwright.pipeline.ledger import from_jsonl
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule
from conftest import make_checkpoint

SCHEMES = ["int4-g32", "int3-g64-asym", "int2-g32-asym1", "int4-g32-min", "int8-channel", "q4_k", "ternary-channel"]
SMALL = {"samples": 8, "seqlen": 32}


def problem(N: int = 24, K: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs [S, T, K] and their Gram."""
    g = torch.Generator().manual_seed(K)
    x = torch.randn(12, 20, K, generator=g) @ (torch.eye(K) + 0.2 * torch.randn(K, K, generator=g))
    flat = x.reshape(-1, K)
    return torch.randn(N, K, generator=g) * 0.05, x, flat.T @ flat / len(flat)


def linear(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
    return x @ matrices["a"].T


def error(w: Tensor, decoded: Tensor, x: Tensor) -> float:
    return float((x @ (w - decoded).T).square().mean())


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("K", [96, 80])
def test_untouched_knobs_are_the_start(text: str, K: int) -> None:
    w, _, gram = problem(K=K)
    scheme = Scheme.parse(text)
    for start in (gptq(w, gram, scheme).q, rtn(w, None, scheme).q):
        variables = variables_of(w, start, torch.float32)
        assert torch.equal(result(variables, start).codes, start.codes)
        assert torch.equal(result(variables, start).scales.scale, start.scales.scale)
        torch.testing.assert_close(variables.decoded.detach(), decode(start), rtol=0, atol=1e-6)
        half = variables_of(w, start, torch.bfloat16)
        assert torch.equal(half.decoded, variables.decoded.bfloat16())


def placed_at_random(w: Tensor, scheme: Scheme) -> RoundingVariables:
    """RoundingVariables whose weights lie anywhere among the codes, some of them beyond the last."""
    generator = torch.Generator().manual_seed(3)
    k = variables_of(w, rtn(w, None, scheme).q, torch.float32)
    k.base.add_(0.8 * torch.randn(w.shape, generator=generator))
    k.offset.add_(0.4 * (torch.rand(w.shape, generator=generator) - 0.5))
    return k


def by_autograd(k: RoundingVariables, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What variables decode to, and the gradients of offset and stretch, with rounding that passes gradients on."""
    offset, stretch = k.offset.clone().requires_grad_(), torch.zeros_like(k.start).requires_grad_()
    scale = (k.start * (1 + stretch))[..., None]
    zero = torch.zeros(()) if k.zero is None else k.zero[..., None]
    v, lo, hi = group_view(k.w, k.scheme), *code_range(k.scheme)
    place = ((v - zero) / scale if k.scheme.zero == "min" else v / scale + zero) + group_view(k.base + offset, k.scheme)
    codes = (place + (torch.round(place) - place).detach()).clamp(lo, hi)
    decoded = (codes * scale + zero if k.scheme.zero == "min" else (codes - zero) * scale).flatten(1)[:, : k.w.shape[1]]
    return decoded.detach(), torch.autograd.grad(decoded, (offset, stretch), upstream)


@pytest.mark.parametrize("text", ["int4-g32", "int3-g32-asym", "int2-g32-min", "int2-g32", "int3-channel"])
@pytest.mark.parametrize("K", [96, 80])
def test_the_gradient_is_that_of_a_straight_through_estimator(text: str, K: int) -> None:
    w, _, _ = problem(K=K)
    k = placed_at_random(w, Scheme.parse(text))
    move(k, None)
    upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(5))
    decoded, expected = by_autograd(k, upstream)
    torch.testing.assert_close(k.decoded.detach(), decoded, rtol=1e-4, atol=1e-6)
    to_offset, to_stretch = _slopes(k, group_view(upstream, k.scheme))
    torch.testing.assert_close(to_offset.flatten(1)[:, :K], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(to_stretch, expected[1], rtol=1e-4, atol=1e-5)
    assert 0.01 < (to_offset == 0).float().mean() < 0.9  # some are clamped, some are not


@pytest.mark.parametrize("torch_only", [False, True])
def test_a_step_is_the_gradient_over_its_root_mean_square(torch_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch_only:
        monkeypatch.setattr(rounding, "handles", lambda *_: False)
    w, _, _ = problem()
    k = placed_at_random(w, Scheme.parse("int3-g32-asym-f32"))
    squares = [torch.zeros(w.shape, dtype=torch.float64), torch.zeros(k.scale.shape, dtype=torch.float64)]
    for step in range(3):
        before = k.offset.clone(), k.stretch.clone()
        upstream = torch.randn(w.shape, generator=torch.Generator().manual_seed(step))
        slopes = _slopes(k, group_view(upstream, k.scheme))
        expected = (slopes[0].flatten(1).double(), slopes[1].double())
        move(k, upstream, rate=0.003, scale_rate=0.0002)
        for i, (now, rate) in enumerate(((k.offset, 0.003), (k.stretch, 0.0002))):
            squares[i] = MEMORY * squares[i] + (1 - MEMORY) * expected[i].square()
            moved = -rate * expected[i] / squares[i].sqrt().clamp(min=1e-30)
            moved = (before[i] + moved).clamp(-0.5, 0.5) - before[i] if i == 0 else moved
            torch.testing.assert_close((now - before[i]).double(), moved, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(k.scale, k.start * (1 + k.stretch), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["int4-g32", "int3-g32-asym", "int2-g32", "q4_k"])
def test_tuning_helps_nearest_codes(text: str) -> None:
    w, x, gram = problem()
    start = rtn(w, None, Scheme.parse(text)).q
    found = tune(linear, x, x @ w.T, {"a": w}, {"a": start}, Options(iterations=100))["a"]
    assert error(w, decode(found), x) < 0.9 * error(w, decode(start), x)
    good = gptq(w, gram, Scheme.parse(text)).q
    found = tune(linear, x, x @ w.T, {"a": w}, {"a": good}, Options(iterations=100))["a"]
    assert error(w, decode(found), x) <= error(w, decode(good), x)
    assert found.codes.dtype == start.codes.dtype
    assert found.codes.min() >= code_range(found.scheme)[0] and found.codes.max() <= code_range(found.scheme)[1]
    again = encode(decode(found), found.scales, found.scheme)  # the scales are such as a file can hold
    assert torch.equal(again.codes, found.codes) or not is_signed(found.scheme)


def test_what_tuning_would_make_worse_stays() -> None:
    w, x, gram = problem()
    start = gptq(w, gram, Scheme.parse("int4-g32")).q
    found = tune(linear, x, x @ w.T, {"a": w}, {"a": start}, Options(iterations=3, lr=10.0, scale_lr=0.3))["a"]
    assert found is start


def test_it_makes_up_for_inputs_that_differ() -> None:
    """The target is what the float inputs give; the block gets others, and learns to come nearer all the same."""
    w, x, gram = problem()
    other = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    start = gptq(w, gram, Scheme.parse("int4-g32")).q
    found = tune(linear, other, x @ w.T, {"a": w}, {"a": start}, Options(iterations=60))["a"]
    before, after = ((other @ decode(q).T - x @ w.T).square().mean() for q in (start, found))
    assert after < 0.99 * before


def test_seeded_and_pure() -> None:
    w, x, _ = problem()
    start = rtn(w, None, Scheme.parse("int3-g32")).q
    kept, state = (w.clone(), x.clone(), start.codes.clone()), torch.get_rng_state()
    runs = [tune(linear, x, x @ w.T, {"a": w}, {"a": start}, Options(20, 3, seed=seed))["a"] for seed in (0, 0, 1)]
    assert torch.equal(runs[0].codes, runs[1].codes)
    assert not torch.equal(runs[0].codes, runs[2].codes)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(kept, (w, x, start.codes), strict=True))
    assert tune(linear, x, x @ w.T, {"a": w}, {"a": start}, Options(iterations=0))["a"] is start


def test_in_bfloat16_as_in_float32() -> None:
    w, x, _ = problem()
    start = rtn(w, None, Scheme.parse("int3-g32")).q
    short, targets = x.bfloat16(), (x @ w.T).bfloat16()
    found = tune(linear, short, targets, {"a": w}, {"a": start}, Options(iterations=60))["a"]
    assert error(w, decode(found), x) < 0.9 * error(w, decode(start), x)


def test_gradients_that_are_not_finite_are_an_error() -> None:
    w, x, _ = problem()
    start = rtn(w, None, Scheme.parse("int4-g32")).q
    with pytest.raises(SchemeError, match="not finite"):
        tune(linear, x, torch.full_like(x @ w.T, torch.nan), {"a": w}, {"a": start}, Options(iterations=2))


@pytest.mark.parametrize("torch_only", [False, True])
def test_a_matrix_that_lies_the_other_way_round(torch_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient comes transposed in memory."""
    if torch_only:
        monkeypatch.setattr(rounding, "handles", lambda *_: False)
    w, x, _ = problem()
    start = rtn(w, None, Scheme.parse("int3-g32")).q

    def other(matrices: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.addmm(torch.zeros(len(w)), x.reshape(-1, x.shape[-1]), matrices["a"].T).view(*x.shape[:-1], -1)

    found = [tune(f, x, x @ w.T, {"a": w}, {"a": start}, Options(20))["a"] for f in (linear, other)]
    assert (found[0].codes != found[1].codes).float().mean() < 0.01
    assert (found[0].codes != start.codes).float().mean() > 0.01


def test_refusals() -> None:
    w, _, gram = problem()
    with pytest.raises(RecipeError, match="integer codes"):
        autoround(w, gram, Scheme.parse("nf4-g32"))
    with pytest.raises(RecipeError, match="needs calibration"):
        autoround(w, None, Scheme.parse("int4-g32"))
    for bad in ({"iterations": -1}, {"windows": 0}, {"lr": 0.0}, {"scale_lr": -1.0}):
        with pytest.raises(RecipeError, match="must be above 0"):
            Options(**bad)  # type: ignore[arg-type]
    rules = (
        Rule("*", Scheme.parse("int4-g32"), "autoround"),
        Rule("*q*", Scheme.parse("int4-g32"), "autoround", {"seed": 1}),
    )
    with pytest.raises(RecipeError, match="different options"):
        _ = Recipe(rules).windows_at_once
    assert Recipe.uniform("int4-g32", "gptq").windows_at_once is None
    assert Recipe.uniform("int4-g32", "autoround").windows_at_once == 1


def write_recipe(folder: Path, *rules: tuple[str, str, str]) -> Path:
    file = folder / "recipe.toml"
    file.write_text(
        "".join(
            f'[[rule]]\nmatch = "{m}"\nscheme = "int2-g32-asym"\nmethod = "{method}"\n{o}\n' for m, method, o in rules
        )
    )
    return file


def test_a_model_comes_nearer_to_the_original(llama: Path, text: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, ("*", "autoround", "options = { iterations = 30, windows = 3 }"))
    kl = {}
    for method, options in (("gptq", {"scheme": "int2-g32-asym"}), ("autoround", {"recipe": recipe})):
        done = quantize(llama, tmp_path / method, calib=text, method="gptq", **options, **SMALL)  # type: ignore[arg-type]
        cost = evaluate(tmp_path / method, reference=llama, text=text, seqlen=32, tokens=512)
        assert cost.kl_mean is not None
        kl[method] = cost.kl_mean
        assert {e.method for e in done.ledger if e.action == "quantized"} == {method}
        assert all(e.loss is not None and 0 < e.loss < 1 for e in done.ledger if e.action == "quantized")
    assert kl["autoround"] < 0.95 * kl["gptq"]


def test_some_matrices_are_tuned_and_others_stay(llama: Path, text: str, tmp_path: Path) -> None:
    options = "options = { iterations = 10 }"
    recipe = write_recipe(tmp_path, ("*", "gptq", ""), ("*.0.mlp.*", "autoround", options))
    plain = write_recipe(tmp_path / "..", ("*", "gptq", ""))
    quantize(llama, tmp_path / "a", calib=text, recipe=recipe, **SMALL)  # type: ignore[arg-type]
    quantize(llama, tmp_path / "b", calib=text, recipe=plain, **SMALL)  # type: ignore[arg-type]
    a, b = (load_file(next(iter(sorted((tmp_path / x).glob("*.safetensors"))))) for x in "ab")
    changed = {name for name in a if ".layers.0." in name and not torch.equal(a[name], b[name])}  # later blocks see it
    assert changed and all(".mlp." in name for name in changed)
    assert {e.method for e in from_jsonl(tmp_path / "a" / "ledger.jsonl") if ".0.mlp." in e.name} == {"autoround"}


@pytest.mark.parametrize("samples", [1, 3, 11])
def test_few_windows_or_an_odd_number(llama: Path, text: str, tmp_path: Path, samples: int) -> None:
    recipe = write_recipe(tmp_path, ("*", "autoround", "options = { iterations = 4, fast = false }"))
    done = quantize(llama, tmp_path / "out", calib=text, recipe=recipe, samples=samples, seqlen=32)
    assert bool(done.fallbacks) == (samples == 1)  # 32 tokens are too few to beat a search of scales, and it is said


def test_gpt2_whose_matrices_lie_the_other_way_round(text: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model", "gpt2")
    recipe = write_recipe(tmp_path, ("*", "autoround", "options = { iterations = 40, windows = 2 }"))
    for method, options in (("gptq", {"scheme": "int2-g32-asym"}), ("autoround", {"recipe": recipe})):
        quantize(source, tmp_path / method, calib=text, format="gptq", **options, **SMALL)  # type: ignore[arg-type]
    files = [[load_file(f) for f in sorted((tmp_path / m).glob("*.safetensors"))] for m in ("gptq", "autoround")]
    changed = {n for a, b in zip(*files, strict=True) for n in a if not torch.equal(a[n], b[n])}
    assert {n.rpartition(".")[2] for n in changed} >= {"qweight"}
    cost = evaluate(tmp_path / "autoround", reference=source, text=text, seqlen=32, tokens=512)
    assert cost.kl_mean is not None and cost.kl_mean < 1e-4


def test_a_crash_costs_one_block_and_no_byte(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, ("*", "autoround", "options = { iterations = 5 }"))
    quantize(llama, tmp_path / "whole", calib=text, recipe=recipe, **SMALL)  # type: ignore[arg-type]
    real = tune_block.tune

    def crash(*args: object) -> object:
        crash.calls += 1  # type: ignore[attr-defined]
        if crash.calls == 2:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    crash.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(tune_block, "tune", crash)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "out", calib=text, recipe=recipe, **SMALL)  # type: ignore[arg-type]
    assert len(list((tmp_path / "out.partial").glob("shard-*"))) == 1
    monkeypatch.setattr(tune_block, "tune", real)
    quantize(llama, tmp_path / "out", calib=text, recipe=recipe, **SMALL)  # type: ignore[arg-type]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
