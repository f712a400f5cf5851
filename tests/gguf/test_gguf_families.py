"""Architectures of GGUF without another test: the file's logits are its checkpoint's. bench.gguf_families asks llama.cpp."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.errors import FormatError
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.gguf.config_keys import keys_of
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert
from conftest import ENCODERS, FAMILIES, SIZES, save_tokenizer

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "norm_topk_prob": True, **EXPERTS},
    "seed_oss": {"head_dim": 16}, "glm4": {"head_dim": 16},
    "ernie4_5": {"head_dim": 16}, "cohere2": {"sliding_window": 8, "logit_scale": 0.25}, "olmo": {"clip_qkv": 1.0},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}  # fmt: skip
OTHERS = [kind for kind in ARCHITECTURES if kind not in FAMILIES | ENCODERS or kind == "gpt_neox"]


@torch.no_grad()
@pytest.mark.parametrize("kind", OTHERS)
def test_logits_are_transformers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {**SIZES, "num_hidden_layers": 4, "pad_token_id": 1, "initializer_range": 0.2, **CHANGES.get(kind, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "a.gguf")
    streamed, ids = StreamedModel(tmp_path / "a.gguf"), torch.arange(24)[None] * 7 % 256
    found, wanted = streamed.head(torch.cat(streamed.hidden(ids))), model(ids).logits
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act"),
    ],
)
def test_what_llamacpp_has_otherwise_is_refused(kind: str, change: dict[str, Any], says: str) -> None:
    config = AutoConfig.for_model(kind, **{**SIZES, "num_hidden_layers": 4, "pad_token_id": 1, **change})
    with pytest.raises(FormatError, match=says):
        keys_of(config)
