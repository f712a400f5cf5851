"""LoRA adapters as GGUF files and back: what llama.cpp adds to a model's file is what peft merges into the model."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bench.gguf_families import random_model
from safetensors.torch import load_file
from tests.conftest import make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.errors import BitwrightError, CheckpointError, FormatError, InputError
from bitwright.pipeline.conversion import convert

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"


def adapted(base: Path, folder: Path, **options: Any) -> Any:
    """A random adapter on all linear layers of a model, which is saved; its model in float32."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    made = peft.get_peft_model(model, config).eval()
    made.peft_config["default"].base_model_name_or_path = str(base)
    made.save_pretrained(folder)
    return made


def tensors(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A float file's tensors, by the gguf package."""
    return {t.name: t.data.astype(np.float32) for t in gguf.GGUFReader(file).tensors}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, rows of q and k permuted": ("llama", {"use_rslora": True, "rank_pattern": {"k_proj": 2, "up_proj": 3}}),
    "gpt2, transposed": ("gpt2", {"fan_in_fan_out": True, "alpha_pattern": {"c_fc": 20}}),
    "gpt_neox, rows of heads": ("gpt_neox", {"lora_alpha": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_adds_what_peft_merges_and_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    family, options = CASES[name]
    base = make_checkpoint(tmp_path / "base", family, torch.float32, num_hidden_layers=2)
    made = adapted(base, tmp_path / "adapter", **options)
    for source in (base, tmp_path / "adapter"):
        convert(source, tmp_path / f"{source.name}.gguf")
    lora, before = tensors(tmp_path / "adapter.gguf"), tensors(tmp_path / "base.gguf")
    keys = gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert [keys[k].contents() for k in ("general.type", "adapter.type")] == ["adapter", "lora"]
    alpha = keys["adapter.lora.alpha"].contents()

    back = tmp_path / "back"
    convert(tmp_path / "adapter.gguf", back, base=tmp_path / "base.gguf" if family == "llama" else base)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), back)
    ids = torch.tensor([[10, 200, 3, 77, 5, 5, 130, 64]])
    torch.testing.assert_close(again.eval()(ids).logits, made(ids).logits, rtol=1e-5, atol=1e-5)
    assert load_file(back / WEIGHTS).keys() == load_file(tmp_path / "adapter" / WEIGHTS).keys()

    for file in base.glob("*token*"):
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged" / file.name).write_bytes(file.read_bytes())
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "merged.gguf")
    changed = 0
    for tensor, meant in tensors(tmp_path / "merged.gguf").items():
        A, B = lora.get(f"{tensor}.lora_a"), lora.get(f"{tensor}.lora_b")
        found = before[tensor] if A is None or B is None else before[tensor] + alpha / len(A) * B @ A
        changed += A is not None
        np.testing.assert_allclose(found, meant, rtol=1e-5, atol=1e-6, err_msg=tensor)
    assert 2 * changed == len(lora) == 2 * len([k for k in load_file(back / WEIGHTS) if "lora_A" in k])


def written(path: Path, change: dict[str, Any], **parts: Tensor) -> Path:
    """A GGUF file of an adapter for the first block of the small Llama."""
    writer = gguf.GGUFWriter(path, change.get("arch", "llama"))
    writer.add_type("adapter")
    writer.add_string("adapter.type", change.get("kind", "lora"))
    for name, tensor in parts.items():
        writer.add_tensor(name.replace("__", "."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = torch.ones(2, 64), torch.ones(128, 2)
PAIR = {"blk__0__ffn_up__weight__lora_a": A, "blk__0__ffn_up__weight__lora_b": B}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "kind": ({"kind": "ia3"}, PAIR, "the kind 'ia3'"),
    "architecture": ({"arch": "qwen2"}, PAIR, "architecture qwen2"),
    "half": ({}, {"blk__0__ffn_up__weight__lora_a": A}, "no lora_B"),
    "shape": ({}, {**PAIR, "blk__0__ffn_up__weight__lora_a": torch.ones(2, 32)}, r"matrix \[128, 32\]"),
    "tensor": ({}, {"blk__9__ffn_up__weight__lora_a": A}, "belongs to no linear layer"),
    "other": ({}, {"blk__0__ffn_up__weight": A}, "no half of a LoRA pair"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused(name: str, llama: Path, tmp_path: Path) -> None:
    change, parts, said = WRONG[name]
    with pytest.raises(CheckpointError, match=said) as caught:
        convert(written(tmp_path / "lora.gguf", change, **parts), tmp_path / "out", base=llama)
    assert caught.value.remedy and [p.name for p in tmp_path.iterdir()] == ["lora.gguf"]


def test_an_alpha_of_0_adds_the_product_as_it_is(llama: Path, tmp_path: Path) -> None:
    convert(written(tmp_path / "lora.gguf", {}, **PAIR), tmp_path / "out", base=llama)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2
    assert config["target_modules"] == ["model.layers.0.mlp.up_proj"]


def test_experts_that_are_parameters_are_not_missed(tmp_path: Path) -> None:
    """Llama 4's down_proj: of the shared expert and the dense MLP it is a module, of the other experts a parameter."""
    base = tmp_path / "base"
    random_model("llama4_text", num_hidden_layers=2).save_pretrained(base)
    adapted(base, tmp_path / "adapter", target_modules=["down_proj"])
    convert(tmp_path / "adapter", tmp_path / "a.gguf", base=base)
    names = {"blk.0.ffn_down", "blk.1.ffn_down_shexp"}
    assert tensors(tmp_path / "a.gguf").keys() == {f"{n}.weight.lora_{half}" for n in names for half in "ab"}


def test_what_a_file_cannot_say_is_refused(llama: Path, tmp_path: Path) -> None:
    adapted(llama, tmp_path / "dora", use_dora=True)
    nameless = tmp_path / "nameless"
    adapted(llama, nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    lora = written(tmp_path / "lora.gguf", {}, **PAIR)
    cases: list[tuple[Path, str, Path | None, type[BitwrightError], str]] = [
        (tmp_path / "dora", "out.gguf", None, FormatError, "DoRA"),
        (nameless, "out.gguf", None, InputError, "does not say which model"),
        (lora, "out", None, InputError, "does not say which model"),
        (llama, "out.gguf", llama, InputError, "no adapter"),
    ]
    for source, out, base, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            convert(source, tmp_path / out, base=base)
        assert "bitwright" in caught.value.remedy or "--base" in caught.value.remedy
        assert not (tmp_path / out).exists() and not list(tmp_path.glob("*.partial"))
