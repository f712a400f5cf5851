"""Transforms through the whole pipeline: written, read back, evaluated, recorded; and refused where they contradict."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.cli.app import app
from bitwright.errors import CalibrationError, RecipeError
from bitwright.models.source import WeightSource
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from conftest import FAMILIES, make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}


def outlying(source: Path, text: str) -> Path:
    """The same model with two outlier channels in every norm that a block reads: times 64, and its readers' columns over 64."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[[3, 20]] *= 64
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, [3, 20]] /= 64
    save_file(tensors, file, metadata={"format": "pt"})
    return source


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory, text: str) -> Path:
    """A small Llama with outlier channels."""
    return outlying(make_checkpoint(tmp_path_factory.mktemp("models") / "spiked", initializer_range=0.1), text)


def kl(out: Path, source: Path, text: str) -> float:
    found = evaluate(out, reference=source, text=text, seqlen=32, tokens=1024).kl_mean
    assert found is not None
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_awq_and_gptq_on_every_family(family: str, text: str, tmp_path: Path) -> None:
    """What is written is the model that was meant: at 8 bits nothing but digits is lost, scales or no scales."""
    source = make_checkpoint(tmp_path / "model", family)
    done = quantize(source, tmp_path / "out", scheme="int8-g32", method="awq+gptq", format="gptq", calib=text, **SMALL)
    assert kl(tmp_path / "out", source, text) < 1e-3
    entries = {entry.name: entry for entry in done.ledger}
    folded = [entry for entry in entries.values() if entry.transforms]
    assert folded and all(entry.transforms.startswith("awq ") for entry in folded)
    moved = {entry.transforms for entry in folded} - {"awq 0"}
    changed = [entry for entry in entries.values() if entry.reason.endswith("transformed")]
    assert bool(changed) or not moved
    without = sum(entry.action == "quantized" and not entry.transforms for entry in entries.values())
    assert any(note.startswith(f"{without} of") for note in done.notes) == (without > 0)


def test_weights_with_outliers_recover(spiked: Path, text: str, tmp_path: Path) -> None:
    """Rounding to nearest collapses; AWQ's scales, or a rotation, bring it back."""
    found = {}
    for method in ("rtn", "awq", "awq+gptq", "rotate"):
        quantize(spiked, tmp_path / method, scheme="int4-g32", method=method, calib=text, **SMALL)
        found[method] = kl(tmp_path / method, spiked, text)
    assert found["awq"] < 0.5 * found["rtn"] and found["awq+gptq"] < found["awq"]
    assert found["rotate"] < 0.5 * found["rtn"]


def test_inputs_with_outliers_recover(spiked: Path, text: str, tmp_path: Path) -> None:
    found = {}
    for method in ("rtn", "smooth", "outlier"):
        quantize(
            spiked,
            tmp_path / method,
            scheme="int8-channel",
            method=method,
            activations="int8-token",
            format="bitwright",
            calib=text,
            **SMALL,
        )
        found[method] = kl(tmp_path / method, spiked, text)
    assert found["smooth"] < 0.1 * found["rtn"] and found["outlier"] < 0.1 * found["rtn"]


@pytest.mark.parametrize("activations", ["int8-tensor", "int8-tensor-asym", "fp8-tensor"])
def test_fixed_ranges_are_written_and_counted(activations: str, spiked: Path, text: str, tmp_path: Path) -> None:
    """transformers' own model, each matrix on inputs rounded under the scale in the file, has the perplexity that eval says."""
    scheme = "fp8-channel" if activations.startswith("fp8") else "int8-channel"
    out = tmp_path / "out"
    done = quantize(spiked, out, scheme=scheme, method="smooth", activations=activations, calib=text, **SMALL)
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    scales = {n.removesuffix(".input_scale"): float(t) for n, t in tensors.items() if n.endswith(".input_scale")}
    assert len(scales) == 21 and all(scale > 0 for scale in scales.values())
    zeros = {n: int(tensors[f"{n}.input_zero_point"]) for n in scales} if "asym" in activations else {}
    config = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert config["input_activations"]["dynamic"] is False and config["input_activations"]["strategy"] == "tensor"
    assert done.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    model, weight_source = AutoModelForCausalLM.from_pretrained(spiked, dtype=torch.float32).eval(), WeightSource(out)
    for name, module in model.named_modules():
        if name in scales:
            module.weight.data = weight_source.read(f"{name}.weight").float()

            def rounded(
                _: object, args: tuple[torch.Tensor, ...], s: float = scales[name], z: int = zeros.get(name, 0)
            ) -> object:
                if "fp8" in activations:
                    return ((args[0] / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s,)
                return (((torch.round(args[0] / s + z)).clamp(-128, 127) - z) * s,)

            module.register_forward_pre_hook(rounded)
        elif f"{name}.weight" in tensors:
            module.weight.data = tensors[f"{name}.weight"].float()
    ids = windows(load_tokenizer(spiked), text, seqlen=32, vocabulary=257)[:4]
    with torch.no_grad():
        by_hand = float(model(ids, labels=ids).loss.exp())
    cost = evaluate(out, text=text, seqlen=32, tokens=128)
    assert cost.perplexity == pytest.approx(by_hand, rel=1e-3)


def test_outliers_are_saved_loaded_and_computed(spiked: Path, text: str, tmp_path: Path) -> None:
    """The channels that stay are those of the largest inputs, to the bit; the ledger and the size count them."""
    recipe = tmp_path / "recipe.toml"
    keep = '[{ name = "outlier", fraction = 0.03 }]'
    recipe.write_text(f'[[rule]]\nmatch = "*"\nscheme = "int4-g32"\nmethod = "rtn"\ntransforms = {keep}\n')
    out = tmp_path / "out"
    done = quantize(spiked, out, scheme="int4-g32", recipe=recipe, format="bitwright", calib=text, **SMALL)
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    original = load_file(spiked / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    assert tensors[f"{name}.outlier_columns"].tolist() == [3, 20]
    assert torch.equal(tensors[f"{name}.outlier_weight"], original[f"{name}.weight"][:, [3, 20]])
    assert {e.outliers for e in done.ledger if e.action == "quantized"} == {2, 4}
    assert done.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    plan = preflight(spiked, Recipe.of(recipe, scheme="int4-g32", method="rtn"), "bitwright", **SMALL)
    assert plan.bytes == done.bytes
    quantize(spiked, tmp_path / "plain", scheme="int4-g32", method="rtn")
    assert kl(out, spiked, text) < 0.5 * kl(tmp_path / "plain", spiked, text)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_matrices_of_one_input_scaled_differently_are_refused(llama: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*q_proj"\nscheme = "int4-g32"\ntransforms = ["awq"]\n')
    with pytest.raises(RecipeError, match="scaled differently") as caught:
        quantize(llama, tmp_path / "out", scheme="int4-g32", recipe=recipe, calib=text, **SMALL)
    assert caught.value.where.endswith("input_layernorm") and not (tmp_path / "out").exists()


def test_a_matrix_kept_in_float_is_scaled_along(llama: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*k_proj"\nscheme = "keep"\n')
    quantize(llama, tmp_path / "out", scheme="int8-g32", method="awq+gptq", recipe=recipe, calib=text, **SMALL)
    assert kl(tmp_path / "out", llama, text) < 1e-3


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "gptq"],
        ["--method", "rtn", "--activations", "int8-tensor"],
        ["--method", "awq"],
        ["--method", "rtn", "--kv-cache", "fp8-tensor"],
    ],
)
def test_what_needs_calibration_says_so(more: list[str], llama: Path, tmp_path: Path) -> None:
    command = ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "int8-channel", "--calib", "none", "--json"]
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 2 and "no calibration" in json.loads(done.stdout)["error"]
    assert not list(tmp_path.iterdir())


def test_few_tokens_and_unknown_sizes_are_noted(llama: Path, text: str, tmp_path: Path) -> None:
    plan = preflight(llama, Recipe.uniform("int4-g32", "gptq"), "compressed-tensors", samples=2, seqlen=32)
    assert any("do not tell 128 input channels apart" in note for note in plan.notes)
    plan = preflight(llama, Recipe.uniform("int8-channel", "outlier"), "bitwright", **SMALL)
    assert any("depends on calibration" in note for note in plan.notes)
    empty = tmp_path / "short.txt"
    empty.write_text("hi")
    with pytest.raises(CalibrationError, match="shorter than one window"):
        quantize(llama, tmp_path / "out", scheme="int4-g32", calib=str(empty), **SMALL)
