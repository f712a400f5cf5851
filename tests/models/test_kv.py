"""Keys and values in 8 bits: what eval computes is what transformers computes on a cache that rounds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.models.kv_cache import KvCache, read_rounding
from bitwright.models.source import WeightSource
from bitwright.plan.recipe import Recipe
from conftest import make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}


class RoundingCache(DynamicCache):  # type: ignore[misc]
    """transformers' own cache, with every key and value rounded under fixed scales, by the definition."""

    def __init__(self, scales: list[tuple[float, float]], grid: str) -> None:
        super().__init__()
        self.scales, self.grid = scales, grid

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *more: Any, **named: Any) -> Any:
        pair = [self.rounded(x, s) for x, s in zip((keys, values), self.scales[layer], strict=True)]
        return super().update(*pair, layer, *more, **named)

    def rounded(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if self.grid == "int8":
            return torch.round(x / scale).clamp(-128, 127) * scale
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("format_name", ["compressed-tensors", "bitwright"])
@pytest.mark.parametrize("grid", ["int8", "fp8"])
@torch.no_grad()
def test_eval_counts_what_a_rounding_cache_costs(
    grid: str, format_name: str, llama: Path, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = quantize(
        llama,
        out,
        scheme="int8-channel",
        method="rtn",
        kv_cache=f"{grid}-tensor",
        format=format_name,
        calib=text,
        **SMALL,
    )
    tensors = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    names = [f"model.layers.{i}.self_attn" for i in range(3)]
    scales = [(float(tensors[f"{n}.k_scale"]), float(tensors[f"{n}.v_scale"])) for n in names]
    assert all(0 < scale < 1 for pair in scales for scale in pair)
    added = {e.name: e.reason for e in done.ledger if e.action == "added"}
    assert set(added) == {f"{n}.{s}" for n in names for s in ("k_scale", "v_scale")}
    assert done.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    config = json.loads((out / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (config["num_bits"], config["type"], config["strategy"]) == (
        8,
        "int" if grid == "int8" else "float",
        "tensor",
    )
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    weight_source = WeightSource(out)
    weights = {f"{m}.weight": weight_source.read(f"{m}.weight").float() for m in weight_source.modules}
    model.load_state_dict(weights, strict=False)
    window = windows(load_tokenizer(llama), text, seqlen=32, vocabulary=257)[:1]
    cache = RoundingCache(scales, grid)
    by_hand = model(window, labels=window, past_key_values=cache, use_cache=True).loss.exp()
    plain = model(window, labels=window).loss.exp()
    cost = evaluate(out, text=text, seqlen=32, tokens=32).perplexity
    assert cost == pytest.approx(float(by_hand), rel=1e-5)
    assert abs(cost - float(plain)) > 5 * abs(cost - float(by_hand))


def test_what_follows_sees_rounded_keys_and_values(llama: Path, text: str, tmp_path: Path) -> None:
    losses = []
    for name, kv in (("float", None), ("rounded", "fp8-tensor")):
        done = quantize(llama, tmp_path / name, scheme="int4-g32", kv_cache=kv, calib=text, **SMALL)
        losses.append({e.name: e.loss for e in done.ledger if e.loss is not None})
    first = [f".layers.0.self_attn.{name}_proj" for name in "qkv"]  # what is quantized before any key is kept
    assert all((losses[0][n] == losses[1][n]) == any(name in n for name in first) for n in losses[0])


def test_a_cache_listens_or_rounds() -> None:
    cache = KvCache()
    x = torch.randn(1, 2, 3, 4)
    keys, values = cache.update(x, 2 * x, 0, {"cos": None})
    assert cache.used and torch.equal(keys, x) and torch.equal(values, 2 * x)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("int8-token", "no engine keeps"), ("int4-tensor", "no engine keeps"), ("int8-tensor-asym", "no engine keeps")],
)
def test_schemes_that_no_engine_keeps(scheme: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.uniform("int8-channel", "rtn", kv_cache=scheme)


def test_what_cannot_be(llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no place for a quantized KV cache"):
        quantize(
            llama, tmp_path / "a", scheme="int8-channel", format="gptq", kv_cache="fp8-tensor", calib=text, **SMALL
        )
    gpt2 = make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(RecipeError, match="do not hand their keys"):
        quantize(
            gpt2, tmp_path / "b", scheme="int8-channel", format="bitwright", kv_cache="fp8-tensor", calib=text, **SMALL
        )
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('kv_cache = "fp8-token"\n')
    done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / "c"), "--recipe", str(recipe), "--json"])
    assert done.exit_code == 2 and "no engine keeps" in json.loads(done.stdout)["error"]


def test_files_that_contradict_themselves() -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    with pytest.raises(CheckpointError, match="missing"):
        read_rounding({"kv_cache_scheme": scheme}, lambda _: None, "x")
    with pytest.raises(CheckpointError, match="not computed here"):
        read_rounding({"kv_cache_scheme": {**scheme, "dynamic": True}}, lambda _: torch.ones(1), "x")
    assert read_rounding({}, lambda _: None, "x") is None
