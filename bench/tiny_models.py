"""Tiny random models of any family of transformers: its default config, the sizes that all configs name alike made small."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from bitwright.models.families import ENCODERS, POOLED

MAPPINGS = (  # which name a family's class, the first before the others
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim embedding_size encoder_hidden_size projection_dim text_hidden_size "
    "out_hidden_size word_embed_proj_dim output_size lru_width attention_hidden_size mm_hidden_size hidden_dim output_dim "
    "embedding_dim input_embedding_size output_embedding_size emb_dim image_token_embed_dim adapter_out_dim moe_hidden_size "
    "projection_hidden_size patch_embed_hidden_size vision_hidden_size hidden_size_global decoder_hidden_size",
    128: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_inner dim_ff dff mlp_dim "
    "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp "
    "dense_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size projector_hidden_size "
    "feed_forward_size share_expert_dim shared_experts_intermediate_size projection_intermediate_size mamba_d_ssm "
    "alignment_intermediate_size",
    32: "kv_lora_rank q_lora_rank laurel_rank adapter_rank hidden_size_per_layer_input o_lora_rank hc_lowrank",
    16: "head_dim attention_head_dim v_head_dim kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim "
    "mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank swa_head_dim d_kv d_head attention_head_size "
    "chunk_size mamba_chunk_size index_head_dim local_attention sliding_window attention_window_size d_rel "
    "global_head_dim sliding_window_size dim_head mamba_head_dim mamba_d_head",
    12: "qk_head_dim",
    8: "qk_nope_head_dim query_pre_attn_scalar rotary_dim mamba_num_heads mamba_n_heads",
    4: "qk_rope_head_dim num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "attention_heads linear_num_value_heads linear_num_heads num_encoder_attention_heads num_decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts swa_num_attention_heads conf_num_attention_heads "
    "index_n_heads "
    "num_sliding_attention_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_key_value_heads num_kv_heads "
    "n_head_kv multi_query_group_num num_encoder_layers num_decoder_layers linear_num_key_heads num_experts_per_tok "
    "num_experts_per_token moe_topk layers conf_num_hidden_layers swa_num_key_value_heads num_blocks num_query_groups "
    "mamba_expand expand",
    1: "mamba_n_groups mamba_ngroups n_groups",
    257: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_sequence_length max_target_positions "
    "context_length",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
LARGEST = 10_000_000  # parameters of a model that is tried
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_layers")
IDENTITY = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "per_layer_config")
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}}
SHARING = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2}
# What sizes alone do not make a model of.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"], "num_hidden_layers": 3},
    "zamba2": {
        "num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 8,
        "mamba_headdim": 16, "num_mem_blocks": 1, "attention_hidden_size": 128, "attention_head_dim": 32,
    },
    "gemma3n_text": {**SHARING, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": SHARING,
    "gemma4": {"text_config": SHARING},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "modernbert-decoder": {"pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_k": 2}, "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    **dict.fromkeys(
        ("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear",
         "minicpm3"),
        LATENT,
    ),
    "dots1": {**LATENT, "head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1},
    "mistral4": {**LATENT, "head_dim": 4},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text"), SECTIONS["text_config"]),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), SECTIONS),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "glm46v", "glmga", "glm_ocr", "paddleocr_vl", "qwen2_5_omni_thinker"),
        SECTIONS,
    ),
}  # fmt: skip


def families() -> list[str]:
    """Every type of model that predicts a next token, from text with or without images and sound; and encoders."""
    return sorted({kind for mapping in MAPPINGS for kind in mapping} | set(ENCODERS))


def model_class(kind: str) -> type[PreTrainedModel]:
    """The class that transformers has for it."""
    name = MODEL_MAPPING_NAMES[kind] if kind in ENCODERS else next(m[kind] for m in MAPPINGS if kind in m)
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def construction(kind: str) -> dict[str, bool]:
    """What its class is made with beside a config: encoders come without a pooling layer."""
    return {"add_pooling_layer": False} if kind in POOLED else {}


def tiny_config(kind: str) -> PretrainedConfig:
    """The default config of a family, shrunk: hidden 64, as many blocks as it has kinds of them, 257 tokens."""
    options = {key: value for key, value in AutoConfig.for_model(kind).to_dict().items() if key not in IDENTITY}
    small = _merged(_shrunk(options), CHANGES.get(kind, {}))
    if isinstance(small.get("vocab_size"), int):
        small = {"bos_token_id": 256, "eos_token_id": 256, **_without_tokens(small)}
    return AutoConfig.for_model(kind, **small)


def tiny_model(kind: str) -> PreTrainedModel:
    """A model of a family with random weights; vectors too, as norms of ones and biases of zeros would hide mistakes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(kind)(tiny_config(kind), **construction(kind)).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters, shrunk as it is")
    model = model_class(kind)(tiny_config(kind), **construction(kind)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _without_tokens(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("bos_token_id", "eos_token_id")}


def _merged(a: dict[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """a with b's values, dicts within dicts likewise."""
    both = {k: _merged(a[k], v) for k, v in b.items() if isinstance(v, dict) and isinstance(a.get(k), dict)}
    return {**a, **b, **both}


def _shrunk(options: Mapping[str, Any]) -> dict[str, Any]:
    """A config's options with small sizes, and with the first blocks only."""
    depth = next((options[key] for key in DEPTHS if isinstance(options.get(key), int)), None)
    few = _blocks(options, depth)
    rotated = options.get("qk_rope_head_dim")  # what head_dim is, where attention is latent
    if rotated and options.get("head_dim") == rotated:
        options = {**options, "head_dim": SIZE_OF["qk_rope_head_dim"]}
    return {str(key): _small(str(key), value, depth, few) for key, value in options.items() if key not in IDENTITY}


def _blocks(options: Mapping[str, Any], depth: int | None) -> int:
    """How many blocks have one of each kind: 2 to 8."""
    few = 2
    for kinds in (options[key] for key in KINDS if isinstance(options.get(key), list) and len(options[key]) == depth):
        while few < min(len(kinds), 8) and len(set(kinds[:few])) < len(set(kinds)):
            few += 1
    return few


def _small(key: str, value: Any, depth: int | None, few: int) -> Any:
    if isinstance(value, dict):
        return _shrunk(value)
    if isinstance(value, list):
        return value[:few] if depth is not None and len(value) == depth else value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if key in DEPTHS:
        return few
    if key.endswith(("_token_id", "_token_index", "_token")):
        return min(value, 250)
    return SIZE_OF[key] if key in SIZE_OF and (value > SIZE_OF[key] or SIZE_OF[key] == 257) else value
