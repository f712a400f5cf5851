"""Sources that are quantized: releases in small floats are taken as they are, others on demand; decoded block by block."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitwright import evaluate, quantize, quantize_tensor
from bitwright.errors import CheckpointError
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource, open_weights
from bitwright.numerics.codec import decode
from bitwright.pipeline.ledger import from_jsonl
from conftest import save_tokenizer

ROUNDED = {"method": "rtn", "calib": "none"}
OWN = {**ROUNDED, "format": "bitwright"}  # whose scales are in float16, whatever the source is in


def decoded(quantized: Path, original: Path, out: Path) -> Path:
    """A float checkpoint of what a quantized one decodes to."""
    source, model = WeightSource(quantized), AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    model.load_state_dict({f"{m}.weight": source.read(f"{m}.weight").float() for m in source.modules}, strict=False)
    model.save_pretrained(out)
    for file in original.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", "fp8-channel"), ("compressed-tensors", "mxfp4"), ("gptq", "int8-g64-asym"),
        ("awq", "int4-g32"), ("bitsandbytes", "nf4-g64-dq"),
    ],
)  # fmt: skip
def test_a_quantized_source_gives_what_its_decoded_model_gives(
    format_name: str, scheme: str, llama: Path, text: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    quantize(llama, source, scheme=scheme, format=format_name, **ROUNDED)
    (source / "quantize_config.json").write_text("{}")  # of other tools: it must not be taken along
    small_floats = scheme in ("fp8-channel", "mxfp4")
    if not small_floats:
        with pytest.raises(CheckpointError, match="already quantized") as caught:
            quantize(source, tmp_path / "a", scheme="int4-g64", **OWN)
        assert "--requantize" in caught.value.remedy and not (tmp_path / "a").exists()
    done = quantize(source, tmp_path / "a", scheme="int4-g64", requantize=not small_floats, **OWN)
    quantize(decoded(source, llama, tmp_path / "float"), tmp_path / "b", scheme="int4-g64", **OWN)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    codes = [name for name in a if name.endswith("weight_codes")]
    assert len(codes) == 3 * 7 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in codes)
    assert a["model.norm.weight"].dtype == torch.bfloat16 and b["model.norm.weight"].dtype == torch.float32
    assert {e.source for e in from_jsonl(tmp_path / "a/ledger.jsonl") if e.action == "quantized"} == {format_name}
    assert any("quantized itself" in note for note in done.notes)
    said = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitwright" and not (tmp_path / "a/quantize_config.json").exists()
    found = evaluate(tmp_path / "a", reference=source, text=text, seqlen=32, tokens=128)
    assert found.kl_mean is not None and 0 < found.kl_mean < 0.1


def test_fp8_in_blocks_is_taken_as_it_is(llama: Path, tmp_path: Path) -> None:
    """DeepSeek V3's layout: a scale for each block of rows and columns, by which codes are multiplied."""
    source, tensors = tmp_path / "source", dict[str, torch.Tensor]()
    shutil.copytree(llama, source)
    for name, w in load_file(llama / "model.safetensors").items():
        tensors[name] = w
        if name.endswith("_proj.weight"):
            scale = torch.rand(-(-w.shape[0] // 48), -(-w.shape[1] // 32)) * 1e-3 + 1e-4
            each = scale.repeat_interleave(48, 0)[: len(w)].repeat_interleave(32, 1)[:, : w.shape[1]]
            tensors |= {name: (w.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((source / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [48, 32]}
    (source / "config.json").write_text(json.dumps(said | {"quantization_config": how}))
    quantize(source, tmp_path / "a", scheme="int4-g64", **OWN)
    name = "model.layers.2.mlp.down_proj"
    scale = tensors[f"{name}.weight_scale_inv"].repeat_interleave(48, 0)[:64].repeat_interleave(32, 1)
    meant = quantize_tensor(tensors[f"{name}.weight"].float() * scale, "int4-g64", method="rtn")
    q = WeightSource(tmp_path / "a").quantized(f"{name}.weight")
    assert q is not None and torch.equal(decode(q), decode(meant))


def test_gpt_oss_is_read_as_transformers_decodes_it(text: str, tmp_path: Path) -> None:
    """Experts in MXFP4, rows of gate and up taking turns; against transformers' own decoder."""
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=257, max_position_embeddings=64,
        layer_types=["full_attention"] * 2, rope_scaling=None, pad_token_id=None, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "q")
    tensors, meant = load_file(tmp_path / "q/model.safetensors"), dict[str, torch.Tensor]()
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, K, N = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 123, (E, N, K // 32), dtype=torch.uint8)
        meant[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])  # [E, K, N]
    save_file(tensors, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    said = json.loads((tmp_path / "q/config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "q/config.json").write_text(json.dumps(said))
    save_tokenizer(tmp_path / "q")
    source = open_weights(tmp_path / "q", Skeleton(read_config(tmp_path / "q"), torch.float32))
    fused = meant["model.layers.1.mlp.experts.gate_up_proj"][2].float()
    for leaf, expected in (("gate_proj", fused[:, ::2].T), ("up_proj", fused[:, 1::2].T)):
        assert torch.equal(source.read(f"model.layers.1.mlp.experts.2.{leaf}.weight"), expected)
    down = meant["model.layers.0.mlp.experts.down_proj"][3].float().T
    assert torch.equal(source.read("model.layers.0.mlp.experts.3.down_proj.weight"), down)
    quantize(tmp_path / "q", tmp_path / "out", scheme="int8-channel", **OWN)
    entries = {e.name: e for e in from_jsonl(tmp_path / "out/ledger.jsonl")}
    assert entries["model.layers.0.mlp.experts.3.down_proj.weight"].source == "mxfp4"
    found = evaluate(tmp_path / "out", reference=tmp_path / "q", text=text, seqlen=32, tokens=64)
    assert found.kl_mean is not None and 0 <= found.kl_mean < 0.01


@pytest.mark.parametrize(
    ("dtype", "taken"), [(torch.float64, "float32"), (torch.float8_e4m3fn, "bfloat16"), (torch.float8_e5m2, "bfloat16")]
)
def test_types_that_no_format_has(dtype: torch.dtype, taken: str, llama: Path, tmp_path: Path) -> None:
    """float64, and float8 without scales: as the same numbers in a type that formats have, which is said."""
    source, same = tmp_path / "given" / "model", tmp_path / "usual" / "model"
    for folder in (source, same):
        shutil.copytree(llama, folder)
    name = str(dtype).removeprefix("torch.")
    said = json.loads((llama / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(said | {"dtype": name}))
    (same / "config.json").write_text(json.dumps(said | {"dtype": taken}))
    tensors = {n: t.to(dtype) for n, t in load_file(llama / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    usual = {n: t.to(getattr(torch, taken)) for n, t in tensors.items()}
    save_file(usual, same / "model.safetensors", metadata={"format": "pt"})
    for out in ("a", "b.gguf"):
        done = quantize(source, tmp_path / out, scheme="int4-g64" if out == "a" else "q8_0", **ROUNDED)
        assert any(f"of {name} are taken as {taken}" in note for note in done.notes)
        quantize(same, tmp_path / f"of_{out}", scheme="int4-g64" if out == "a" else "q8_0", **ROUNDED)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "of_b.gguf").read_bytes()
    found, meant = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "of_a"))
    assert found.keys() == meant.keys() and all(torch.equal(found[n], meant[n]) for n in found)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == taken
