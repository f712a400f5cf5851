"""Rounded inputs: the arithmetic, the files, what transformers makes of them, and that evaluation counts their cost."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.cli.app import app
from bitwright.errors import FormatError, RecipeError, SchemeError
from bitwright.formats import FORMATS, Layer
from bitwright.formats.config_groups import scheme_of_inputs
from bitwright.models.source import WeightSource
from bitwright.numerics.codec import decode, encode, fit, rounded
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.ledger import from_jsonl
from bitwright.pipeline.options import QuantizeOptions
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule

CT, GPTQ = FORMATS["compressed-tensors"], FORMATS["gptq"]
INT8, FP8 = Scheme.parse("int8-token"), Scheme.parse("fp8-token")
SMALL = {"samples": 8, "seqlen": 32}


def nothing(suffix: str) -> Tensor | None:
    """A module without any tensor."""
    return None


def activations() -> Tensor:
    """Tokens of all sizes, one of zeros, one with an outlier."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None]
    x[0, 0], x[1, 1, 3] = 0, 1e3
    return x


def test_int8_by_token_is_absmax_over_127() -> None:
    x = activations()
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    expected = torch.round(x.double() / scale.clamp(min=1e-30)).clamp(-128, 127) * scale
    before = x.clone()
    found = rounded(x, INT8)
    assert found.shape == x.shape
    assert (found - expected).abs().le(1e-5 * scale).all()
    assert not found[0, 0].any()
    assert torch.equal(x, before)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 5, 6, 7, 8])
def test_inputs_by_token_are_rounded_as_compressed_tensors_rounds_them(bits: int, symmetric: bool) -> None:
    """Bit for bit; symmetric int8 is not among them: engines divide by 127, as the test above, and the library by 127.5."""
    args = QuantizationArgs(num_bits=bits, strategy="token", dynamic=True, symmetric=symmetric)
    scheme = scheme_of_inputs(args.model_dump(mode="python"), "a.b")
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(1))
    x[0, 0] = 0
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, nn.Linear(1, 1)), args)
    assert torch.equal(InputQuantization(scheme)(x), theirs) == ((bits, symmetric) != (8, True))


@pytest.mark.parametrize("text", ["int8-token", "fp8-token", "int8-token-asym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_see_one_another(text: str, dtype: torch.dtype) -> None:
    x, scheme = activations().to(dtype), Scheme.parse(text)
    found = rounded(x, scheme)
    assert found.dtype == dtype
    assert torch.equal(found[1, 2], rounded(x[1, 2], scheme))
    assert (found.float() - x.float()).abs().max(-1).values.le(0.04 * x.float().abs().amax(-1)).all()
    assert not torch.equal(found, x)


def test_fp8_by_token_sends_the_largest_to_448() -> None:
    x = activations()
    scale = x.abs().amax(-1, keepdim=True) / 448
    expected = (x / torch.where(scale == 0, 1, scale)).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(rounded(x, FP8), expected)


@pytest.mark.parametrize("text", ["int8-token", "fp8-token", "int8-token-asym", "int8-token-bf16"])
def test_text_round_trips(text: str) -> None:
    assert str(Scheme.parse(text)) == text
    assert Scheme.parse("int8-token").scale == "f32"


# ---------------------------------------------------------------------------------------------------------------- files


def layer(weights: str, inputs: Scheme | None, dtype: torch.dtype = torch.bfloat16) -> Layer:
    raw = Layer("a.b", 64, 256, Scheme.parse(weights), activations=inputs)
    return Layer("a.b", 64, 256, CT.adapt(raw, dtype).scheme, activations=inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("weights", "inputs", "container"),
    [
        ("int8-channel", "int8-token", "int-quantized"),
        ("int8-tensor", "int8-token", "int-quantized"),
        ("int8-channel", "int8-token-asym", "int-quantized"),
        ("fp8-channel", "fp8-token", "float-quantized"),
        ("int4-g128", "int8-token", "pack-quantized"),
        ("int8-g128", "int8-token", "pack-quantized"),
        ("int8-channel", None, "pack-quantized"),
    ],
)
def test_container_and_config(weights: str, inputs: str | None, container: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(inputs) if inputs else None
    one = layer(weights, scheme, dtype)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    q = encode(w, fit(w, one.scheme), one.scheme)
    tensors = CT.encode(q, one, dtype)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == CT.layout(one, dtype)
    config = CT.config([one], ["lm_head"])
    assert config["format"] == config["config_groups"]["group_0"]["format"] == container
    assert CT.input_quantization(config, "a.b", nothing) == (None if scheme is None else InputQuantization(scheme))
    found = CT.decode(config, "a.b", tensors)
    assert torch.equal(found, decode(q).to(found.dtype))
    library = QuantizationScheme(**config["config_groups"]["group_0"])
    if inputs is None:
        assert library.input_activations is None
    else:
        assert library.input_activations is not None and library.input_activations.dynamic is True
        assert library.input_activations.strategy == "token" and library.input_activations.num_bits == 8
        assert library.input_activations.symmetric == (not inputs.endswith("asym"))


def test_the_librarys_own_compressor_writes_the_same_int8() -> None:
    one = layer("int8-channel", INT8, torch.float32)
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    q = encode(w, fit(w, one.scheme), one.scheme)
    group = CT.config([one], [])["config_groups"]["group_0"]
    state = {"weight": decode(q), "weight_scale": q.scales.scale.clone()}
    theirs = BaseCompressor.get_value_from_registry("int-quantized").compress(state, QuantizationScheme(**group))
    assert torch.equal(CT.encode(q, one, torch.float32)["weight"], theirs["weight"])


def test_layers_with_and_without_rounded_inputs_share_a_file() -> None:
    layers = [layer("int8-channel", INT8), Layer("c", 64, 256, Scheme.parse("int8-channel-bf16"))]
    config = CT.config(layers, [])
    assert config["format"] == "mixed-precision"
    assert CT.input_quantization(config, "a.b", nothing) == InputQuantization(INT8)
    assert CT.input_quantization(config, "c", nothing) is None


def test_a_way_of_rounding_that_is_not_computed_here_is_refused() -> None:
    config = CT.config([layer("int8-channel", INT8)], [])
    inputs = config["config_groups"]["group_0"]["input_activations"]
    inputs |= {"strategy": "group", "group_size": 7}
    with pytest.raises(FormatError, match="not computed here"):
        CT.input_quantization(config, "a.b", nothing)
    inputs |= {"strategy": "tensor", "group_size": None, "dynamic": False}
    with pytest.raises(FormatError, match="a range that the file lacks"):
        CT.input_quantization(config, "a.b", nothing)


@pytest.mark.parametrize(
    ("weights", "inputs"), [("mxfp4", "int8-token"), ("nvfp4", "fp8-token"), ("int8-channel", "int4-token")]
)
def test_refusals(weights: str, inputs: str) -> None:
    with pytest.raises(FormatError, match="no engine rounds inputs") as caught:
        layer(weights, Scheme.parse(inputs))
    assert caught.value.where == "a.b" and caught.value.remedy
    with pytest.raises(FormatError, match="cannot say that inputs are rounded"):
        GPTQ.adapt(Layer("x", 64, 256, Scheme.parse("int8-channel"), activations=INT8), torch.float16)


def test_rules_keep_the_two_kinds_of_scheme_apart() -> None:
    with pytest.raises(RecipeError, match="weights have no tokens"):
        Rule("*", INT8)
    with pytest.raises(RecipeError, match="token by token"):
        Rule("*", Scheme.parse("int8-channel"), activations=Scheme.parse("int8-channel"))
    with pytest.raises(SchemeError):
        Recipe.uniform("int8-channel", "rtn", "int8-tokens")


# --------------------------------------------------------------------------------------------------------- end to end


def listening(model: nn.Module, scheme: Scheme) -> nn.Module:
    """A model whose block matrices see rounded inputs."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args: (InputQuantization(scheme)(args[0]),))
    return model


def dense(source: Path, quantized: Path) -> nn.Module:
    """The float model with the decoded weights of the quantized one."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    weight_source = WeightSource(quantized)
    weights = {f"{m}.weight": weight_source.read(f"{m}.weight").float() for m in weight_source.modules}
    model.load_state_dict(weights, strict=False)
    assert len(weights) == 3 * 7
    return model


@pytest.mark.parametrize(("weights", "inputs"), [("int8-channel", INT8), ("fp8-channel", FP8), ("int4-g32", INT8)])
@torch.no_grad()
def test_transformers_and_eval_see_rounded_inputs(
    llama: Path, text: str, tmp_path: Path, weights: str, inputs: Scheme
) -> None:
    out = tmp_path / "out"
    quantize(llama, out, scheme=weights, method="gptaq", activations=str(inputs), calib=text, **SMALL)
    ids = torch.arange(30)[None]
    plain = dense(llama, out)(ids).logits
    expected = listening(dense(llama, out), inputs)(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()(ids).logits
    effect = float((expected - plain).abs().mean())
    # compressed-tensors divides by 127.5 where the field divides by 127: as much noise, not the same
    assert 0.5 * effect < (loaded - plain).abs().mean() < 2 * effect
    assert (loaded - expected).abs().mean() < 2 * effect
    cost = evaluate(out, text=text, seqlen=32, tokens=32)
    window = windows(load_tokenizer(out), text, seqlen=32, vocabulary=expected.shape[-1])[:1]
    by_hand = listening(dense(llama, out), inputs)(window, labels=window).loss.exp()
    assert cost.perplexity == pytest.approx(float(by_hand), rel=1e-4)


def test_what_follows_is_calibrated_on_rounded_inputs(llama: Path, text: str, tmp_path: Path) -> None:
    losses = []
    for name, inputs in (("float", None), ("rounded", "fp8-token")):
        ledger = quantize(
            llama, tmp_path / name, scheme="int4-g32", method="gptaq", activations=inputs, calib=text, **SMALL
        ).ledger
        losses.append({e.name: e.loss for e in ledger if e.loss is not None})
        assert {e.activations for e in ledger if e.action == "quantized"} == {inputs or ""}
        assert from_jsonl(tmp_path / name / "ledger.jsonl") == ledger
    first = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]  # behind which nothing is rounded yet
    assert all((losses[0][n] == losses[1][n]) == (n in first) for n in losses[0])


def test_a_recipe_rounds_some_inputs(llama: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*down_proj"\nscheme = "int8-channel"\nactivations = "keep"\n')
    out = tmp_path / "out"
    arguments = ["quantize", str(llama), str(out), "--scheme", "int8-channel", "--method", "rtn", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--activations", "int8-token", "--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    ledger = from_jsonl(out / "ledger.jsonl")
    assert {e.activations for e in ledger if "down_proj" in e.name} == {""}
    assert {e.activations for e in ledger if "up_proj" in e.name} == {"int8-token"}
    tensors = load_file(next(iter(sorted(out.glob("*.safetensors")))))
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.down_proj.weight_packed"].dtype == torch.int32
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(g["format"] for g in config["config_groups"].values()) == ["int-quantized", "pack-quantized"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--activations", "int8-channel"], "token by token"),
        (["--activations", "int9-token"], "unknown grid"),
        (["--activations", "int8-token", "--format", "gptq"], "cannot say"),
        (["--scheme", "int8-token"], "no tokens"),
    ],
)
def test_bad_activations_exit_with_2(llama: Path, tmp_path: Path, more: list[str], message: str) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["quantize", str(llama), str(out), "--method", "rtn", "--json", *more])
    assert done.exit_code == 2
    assert message in json.loads(done.stdout)["error"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activations": "int8-token"}, ["smooth+gptaq", "smooth+gptaq"]),
        ({"activations": "int8-token", "method": "gptaq"}, ["gptaq", "gptaq"]),
        ({"activations": "keep"}, ["gptaq", "gptaq"]),
        ({}, ["gptaq", "gptaq"]),
    ],
)
def test_rounded_inputs_are_smoothed_unless_a_method_is_named(
    tmp_path: Path, options: dict[str, str], expected: list[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nmatch = "*.down_proj"\nscheme = "int8-channel"\n')
    rules = QuantizeOptions(recipe=recipe, **options).rules("int4-g32", options.get("method", "gptaq")).rules  # type: ignore[arg-type]
    assert [rule.name for rule in rules] == expected


@pytest.mark.parametrize("key", ['activations = "keep"', 'method = "rtn"', 'transforms = ["smooth"]'])
def test_a_recipe_that_says_how_matrices_are_treated_is_not_smoothed_besides(tmp_path: Path, key: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[rule]]\nmatch = "*.q_proj"\nscheme = "int8-channel"\n{key}\n')
    rules = QuantizeOptions(recipe=recipe, activations="int8-token").rules("int4-g32", "gptaq").rules
    assert rules[0].name == "gptaq"


@pytest.mark.parametrize("method", [None, "gptaq"])
def test_the_ledger_says_whether_inputs_were_smoothed(
    llama: Path, text: str, tmp_path: Path, method: str | None
) -> None:
    asked = {"scheme": "int8-channel", "method": method, "activations": "int8-token"}
    ledger = quantize(llama, tmp_path / "out", **asked, calib=text, **SMALL).ledger  # type: ignore[arg-type]
    assert {e.transforms.split()[:1] == ["smooth"] for e in ledger if e.name.endswith("q_proj.weight")} == {
        method is None
    }
