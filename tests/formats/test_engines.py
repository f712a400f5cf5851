"""Files of ours in the engines that they are made for: each test runs where its engine is installed.

bitsandbytes: `pip install bitsandbytes accelerate`. GPTQModel: what bench/peers/install.sh names for it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright import quantize
from bitwright.models.source import WeightSource
from conftest import make_checkpoint

IDS = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose rows GPTQModel takes: multiples of 128."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("models") / "wide", "llama", **shape)


def written(model: Path, out: Path, scheme: str, format_name: str, recipe: str = "") -> Path:
    (out.parent / "recipe.toml").write_text(recipe)
    given: dict[str, Any] = {"recipe": out.parent / "recipe.toml"} if recipe else {}
    quantize(model, out, scheme=scheme, method="rtn", format=format_name, calib="none", **given)
    return out


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def decoded(model: Path, out: Path) -> Tensor:
    """Logits of the float model with the weights that are in OUT's files."""
    source, dense = WeightSource(out), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {f"{m}.weight": source.read(f"{m}.weight").float() for m in source.modules}
    dense.load_state_dict({**weights, **{n: source.read(n).float() for n in source.plain}}, strict=False)
    return logits(dense)


@pytest.mark.parametrize("scheme", ["nf4-g64-dq", "nf4-g128"])
def test_bitsandbytes_own_dequantizer_gives_the_numbers_that_were_meant(
    scheme: str, wide: Path, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    kept = '[[rule]]\nmatch = "model.layers.1.mlp.down_proj"\nscheme = "keep"\n'
    out = written(wide, tmp_path / "out", scheme, "bitsandbytes", kept)
    model, source = AutoModelForCausalLM.from_pretrained(out), WeightSource(out)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert layers.keys() == source.modules.keys() and len(layers) == 2 * 7 - 1
    for name, m in layers.items():
        found = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        assert torch.equal(found, source.read(f"{name}.weight").to(torch.bfloat16))
        assert m.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("awq", "int4-g128-asym"),
        ("awq", "int4-g32"),
        ("gptq", "int4-g128"),
        ("gptq", "int4-g64-asym"),
        ("gptq", "int3-g128-asym"),
    ],
)
@pytest.mark.parametrize("by", ["transformers", "gptqmodel"])
def test_gptqmodel_loads_them(by: str, format_name: str, scheme: str, wide: Path, tmp_path: Path) -> None:
    gptqmodel = pytest.importorskip("gptqmodel")
    kept = '[[rule]]\nmatch = "model.layers.1.mlp.down_proj"\nscheme = "keep"\n'
    plain = by == "transformers" and format_name == "gptq"  # which does not know `dynamic`
    out = written(wide, tmp_path / "out", scheme, format_name, "" if plain else kept)
    if by == "transformers":
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float16)
    else:
        model = gptqmodel.GPTQModel.load(str(out), device="cpu", dtype=torch.float16).model
    meant = decoded(wide, out)
    assert float((logits(model) - meant).norm() / meant.norm()) < 5e-3
