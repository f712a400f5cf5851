"""`quantize --prune`: zeros that every method and format keeps, files that are smaller by them, refusals."""

from pathlib import Path

import pytest
import torch

from bitwright import load, quantize
from bitwright.errors import FormatError, InputError, RecipeError, SchemeError, VerificationError
from bitwright.formats import FORMATS, Layer
from bitwright.kernels import rounding
from bitwright.methods import CALIBRATED, METHODS
from bitwright.models.source import WeightSource
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import loss
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline import quantize_together
from bitwright.sparsity import PRUNERS, sparsegpt, wanda
from bitwright.sparsity.pruning import Pruning
from conftest import make_checkpoint

SMALL = {"samples": 4, "seqlen": 32}


def problem(N: int = 32, K: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram of correlated inputs of unlike size."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(600, K, generator=g) @ (torch.eye(K) + 0.1 * torch.randn(K, K, generator=g))
    x *= torch.randn(K, generator=g).exp()
    return torch.randn(N, K, generator=g) * 0.05, x.T @ x / 600


def zeros_by_fours(out: Path) -> list[float]:
    """The least number of zeros among four neighbours, over all neighbours of each matrix."""
    source = WeightSource(out)
    weights = (source.read(f"{module}.weight") for module in source.modules)
    return [int((w.view(len(w), -1, 4) == 0).sum(-1).min()) for w in weights]


@pytest.mark.parametrize("method", ["rtn", "search", *CALIBRATED])
@pytest.mark.parametrize("text", ["int4-g64-asym", "nf4-g64", "q6_k"])
def test_every_method_keeps_the_zeros_and_those_with_feedback_make_up_for_them(method: str, text: str) -> None:
    if method == "autoround" and text == "nf4-g64":
        pytest.skip("autoround has no codebooks")
    w, gram = problem(8, 64)
    pruned, scheme = wanda(w, gram, pattern=(2, 4)), Scheme.parse(text)
    given, options = (w, {"pruned": pruned.mask}) if method in CALIBRATED else (pruned.weight, {})
    found = decode(METHODS[method](given, gram, scheme, **options).q)
    assert not found[pruned.mask].any()
    if method in CALIBRATED:
        assert loss(w, found, gram) < loss(w, pruned.weight, gram)


def test_zeros_in_native_code_are_its_twin_s(monkeypatch: pytest.MonkeyPatch) -> None:
    w, gram = problem()
    mask, scheme = wanda(w, gram, sparsity=0.5).mask, Scheme.parse("int4-g64-asym")
    found = METHODS["gptq"](w, gram, scheme, pruned=mask).q
    monkeypatch.setattr(rounding, "handles", lambda *_: False)
    assert torch.equal(found.codes, METHODS["gptq"](w, gram, scheme, pruned=mask).q.codes)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
def test_sparsegpt_loses_least(options: dict[str, object]) -> None:
    w, gram = problem()
    lost = [loss(w, PRUNERS[name](w, gram, **options).weight, gram) for name in ("sparsegpt", "wanda", "magnitude")]
    assert lost[0] < 0.9 * lost[1] < 0.8 * lost[2]
    found = sparsegpt(w, gram, **options)
    assert int(found.mask.sum()) == w.numel() // 2
    assert int((found.weight == 0).sum()) == w.numel() // 2


def test_a_pruned_model_by_autoround_keeps_its_zeros_in_a_file_that_they_make_smaller(
    llama: Path, tmp_path: Path
) -> None:
    plain, pruned = tmp_path / "plain", tmp_path / "pruned"
    quantize(llama, plain, scheme="int4-g32", method="rtn", calib="none", format="bitwright")
    recipe = tmp_path / "recipe.toml"
    rule = '[[rule]]\nmatch = "*"\nscheme = "int4-g32"\nmethod = "autoround"\noptions = { iterations = 4 }\n'
    recipe.write_text(rule + 'prune = "sparsegpt:2:4"\n')
    done = quantize(llama, pruned, recipe=recipe, format="bitwright", **SMALL)
    assert min(zeros_by_fours(pruned)) >= 2
    entries = [entry for entry in done.ledger if entry.pruning]
    assert len(entries) == 21 and {(e.pruning, e.sparsity) for e in entries} == {("sparsegpt:2:4", 0.5)}
    weights = sum(entry.shape[0] * entry.shape[1] for entry in entries)
    assert (pruned / "model.safetensors").stat().st_size < (
        plain / "model.safetensors"
    ).stat().st_size - 0.8 * weights / 8
    ids = torch.arange(12)[None]
    source, model = WeightSource(pruned), load(pruned)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(model.get_submodule(name).weight.as_subclass(torch.Tensor), source.read(f"{name}.weight"))
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.parametrize("scheme", ["int3-g64-asym", "nf4-g64-dq"])
def test_zeros_of_rows_that_end_within_a_group(scheme: str, tmp_path: Path) -> None:
    model, out = make_checkpoint(tmp_path / "model", intermediate_size=96), tmp_path / "out"
    quantize(model, out, scheme=scheme, method="rtn", calib="none", format="bitwright", prune="magnitude:2:4")
    assert min(zeros_by_fours(out)) >= 2


@pytest.mark.parametrize("out", ["gptq", "compressed-tensors", "out.gguf"])
def test_other_formats_hold_the_zeros(out: str, llama: Path, tmp_path: Path) -> None:
    if out == "out.gguf":
        done = quantize(llama, tmp_path / out, scheme="q4_0", prune="magnitude:2:4", method="search", calib="none")
        assert [e.name for e in done.ledger if e.pruning and "embed" in e.name] == []
        assert sum(e.sparsity == 0.5 for e in done.ledger) == 21
        return
    quantize(llama, tmp_path / out, scheme="int4-g32", format=out, prune="magnitude:2:4", method="rtn", calib="none")
    assert min(zeros_by_fours(tmp_path / out)) >= 2


def test_a_recipe_prunes_single_layers(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.down_proj"\nscheme = "int8-channel"\nprune = "none"\n')
    done = quantize(
        llama, tmp_path / "out", scheme="int4-g32", method="rtn", calib="none", prune="magnitude:0.3", recipe=recipe
    )
    shares = {entry.name.split(".")[-2]: entry.sparsity for entry in done.ledger if entry.scheme}
    assert shares.pop("down_proj") == 0 and all(abs(share - 0.3) < 0.001 for share in shares.values())


@pytest.mark.parametrize(("bits", "smaller"), [(8, True), (2, False)])
def test_a_mask_is_written_only_where_it_saves(bits: int, smaller: bool) -> None:
    form, scheme, w = FORMATS["bitwright"], Scheme.parse(f"int{bits}-g32"), torch.randn(5, 96)
    w[:, ::2] = 0
    layer = Layer("m", 5, 96, scheme, pruned=5 * 48)
    tensors = form.encode(METHODS["rtn"](w, None, scheme).q, layer, torch.float32)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == form.layout(layer, torch.float32)
    assert ("weight_mask" in tensors) == smaller
    config = form.config([layer], [])
    assert config["modules"][0].get("sparse", False) == smaller
    assert form.wrong(config, "m", tensors, METHODS["rtn"](w, None, scheme).q) == 0
    if smaller:
        tensors["weight_codes"] = tensors["weight_codes"][:-1]
        with pytest.raises(FormatError, match="weight_codes"):
            form.decode(config, "m", tensors)


REFUSED = [
    ({"prune": "wnada:0.5"}, RecipeError, "did you mean wanda"),
    ({"prune": "wanda:half"}, RecipeError, "no share and no pattern"),
    ({"prune": "wanda:1.5"}, RecipeError, "outside"),
    ({"prune": "magnitude:2:5"}, RecipeError, "not a multiple"),
    ({"prune": "wanda:0.5", "calib": "none"}, InputError, "calibration"),
    ({"prune": "magnitude:0.5", "scheme": "int4-g32-min"}, FormatError, "q4_1 has no code"),
    ({"prune": "magnitude:0.5", "scheme": "q4_k", "format": "bitwright"}, FormatError, "q4_k has no code"),
    ({"prune": "magnitude:0.5", "method": "outlier+rtn"}, RecipeError, "outlier channels"),
]


@pytest.mark.parametrize(("change", "kind", "said"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_pruned_is_refused(
    change: dict[str, str], kind: type[Exception], said: str, llama: Path, tmp_path: Path
) -> None:
    options = {"scheme": "int4-g32", "method": "rtn", "format": "bitwright"} | change
    with pytest.raises(kind, match=said):
        quantize(llama, tmp_path / "out", **options, **SMALL)
    assert not (tmp_path / "out").exists()


def test_zeros_that_a_method_loses_are_no_result(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpruned(*given: object) -> object:
        return by_shares(*given[:4])

    by_shares = quantize_together.quantize_by_shares
    monkeypatch.setattr(quantize_together, "quantize_by_shares", unpruned)
    monkeypatch.setattr(quantize_together, "_better", lambda *a: (a[4], "rtn", {"rtn": 0.0}))
    with pytest.raises(VerificationError, match="not zero"):
        quantize(llama, tmp_path / "out", scheme="int4-g32", method="rtn", calib="none", prune="magnitude:0.5")


def test_a_mask_needs_a_scheme_with_zero() -> None:
    w, gram = problem(8, 64)
    with pytest.raises(SchemeError, match="no code for zero"):
        METHODS["gptq"](w, gram, Scheme.parse("binary-channel"), pruned=torch.zeros(8, 64, dtype=torch.bool))
    assert str(Pruning.parse("sparsegpt:2:4")) == "sparsegpt:2:4" and str(Pruning.parse("wanda:0.50")) == "wanda:0.5"


def test_gguf_blocks_without_zero_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="q4_1 blocks have no code") as caught:
        quantize(llama, tmp_path / "out.gguf", scheme="q4_1", prune="magnitude:0.5", method="rtn", calib="none")
    assert "q4_0" in caught.value.remedy
