"""Sources that are quantized: releases in small floats are taken as they are, others on demand; decoded block by block."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitwright import evaluate, quantize
from bitwright.errors import CheckpointError
from bitwright.models.source import WeightSource
from bitwright.pipeline.ledger import from_jsonl

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
