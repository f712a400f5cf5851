"""What llama.cpp's code fixes of a model, so that no key says it.

A config that disagrees is refused when a file is written; when one is read, these values are put into the config. Source:
llama.cpp's converter (conversion/*.py) and its models (src/models/*.cpp).
"""

import math
from typing import Any

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf import rope
from bitwright.gguf.architectures import Architecture
from bitwright.gguf.rope import head_dim_of

Keys = dict[str, Any]

# Config attributes that llama.cpp's code fixes for each model_type.
GELU = "gelu_pytorch_tanh"
ALIKE = {"gelu_new": GELU}  # two names of the same function
ANY_STEP = {"time_step_limit": (0.0, math.inf)}  # steps of a state are not clamped
SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}  # every layer has experts
FIXED: dict[str, Keys] = {
    **{kind: {"hidden_act": "silu"} for kind in ("llama", "mistral", "ministral3", "mixtral", "qwen2", "phi3")},
    "qwen2_moe": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        **SPARSE,
    },
    "qwen3": {"hidden_act": "silu", "attention_bias": False},
    "qwen3_moe": {"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True, **SPARSE},
    "olmoe": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "attention_bias": False,
        "clip_qkv": None,
        "tie_word_embeddings": False,
    },
    "granitemoe": {"hidden_act": "silu", "attention_bias": False},
    "glm4_moe": {"hidden_act": "silu"},
    "ernie4_5_moe": {"hidden_act": "silu", "use_bias": False},
    "deepseek_v2": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "topk_method": "greedy",
        "norm_topk_prob": False,
    },
    "deepseek_v3": {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True},
    "gpt_oss": {"hidden_act": "silu", "attention_bias": True, "tie_word_embeddings": False},
    "hunyuan_v1_dense": {"hidden_act": "silu", "attention_bias": False},
    "hunyuan_v1_moe": {"hidden_act": "silu", "attention_bias": False},
    "exaone4": {"hidden_act": "silu"},
    "falcon": {"activation": "gelu", "alibi": False, "parallel_attn": True, "bias": False},
    "gpt_bigcode": {"activation_function": GELU, "multi_query": True, "scale_attn_weights": True},
    "lfm2": {"conv_bias": False, "tie_word_embeddings": True},
    "gemma": {"hidden_activation": GELU},
    "gemma2": {"hidden_activation": GELU},
    "gemma3_text": {"hidden_activation": GELU},
    "gpt2": {"activation_function": GELU, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "starcoder2": {"hidden_act": GELU, "use_bias": True},
    "smollm3": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    "apertus": {"hidden_act": "xielu", "attention_bias": False},
    "arcee": {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    "granite": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "olmo": {"hidden_act": "silu", "attention_bias": False},
    **{kind: {"hidden_act": "silu", "attention_bias": False} for kind in ("olmo2", "olmo3")},
    "seed_oss": {"hidden_act": "silu", "attention_out_bias": False, "mlp_bias": False},
    "glm4": {"hidden_act": "silu"},
    "ernie4_5": {"hidden_act": "silu", "use_bias": False},
    "cohere": {"hidden_act": "silu", "use_qk_norm": False, "attention_bias": False},
    "cohere2": {"hidden_act": "silu", "attention_bias": False},
    "stablelm": {"hidden_act": "silu", "qk_layernorm": False},
    "phi": {"hidden_act": GELU, "qk_layernorm": False},
    "nemotron": {"hidden_act": "relu2", "attention_bias": False, "mlp_bias": False},
    "gpt_neox": {"hidden_act": "gelu", "attention_bias": True},
    **{kind: {"hidden_act": "gelu", "is_decoder": False} for kind in ("bert", "roberta", "xlm-roberta")},
    "nomic_bert": {"hidden_act": "silu"},
    "distilbert": {"activation": "gelu"},
    "llama4_text": {
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    **{kind: {"hidden_act": "silu", "attention_bias": False} for kind in ("qwen3_5_text", "qwen3_5_moe_text")},
    "qwen3_next": {"hidden_act": "silu", "attention_bias": False, "norm_topk_prob": True, **SPARSE},
    **{
        kind: {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "expand": 2}
        for kind in ("mamba", "falcon_mamba")
    },
    "mamba2": {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, **ANY_STEP},
    "granitemoeshared": {"hidden_act": "silu", "attention_bias": False},
    "granitemoehybrid": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        **ANY_STEP,
    },
    "nemotron_h": {
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        **ANY_STEP,
    },
    "lfm2_moe": {"conv_bias": False, "tie_word_embeddings": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0},
    "gemma3n_text": {
        "hidden_activation": GELU,
        "altup_active_idx": 0,
        "altup_num_inputs": 4,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
    },
    "gemma4_text": {"hidden_activation": GELU, "attention_bias": False},
    "modernbert": {
        "hidden_activation": "gelu",
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "eurobert": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "falcon_h1": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "projectors_bias": False,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "mamba_rms_norm": False,
        **ANY_STEP,
    },
    "jamba": {"hidden_act": "silu", "mamba_conv_bias": True, "mamba_proj_bias": False},
}
EVERY = {
    "gemma2": 2,
    "gemma3_text": 6,
    "cohere2": 4,
    "gpt_oss": 2,
    "olmo3": 4,
}  # every how many layers one has full attention; the others have a sliding window
# Of Gemma 3n: layers with keys and values of their own, layers whose MLP is sparse, and how sparse.
GEMMA3N_OWN, GEMMA3N_SPARSE, SPARSITY = 20, 10, 0.95
EXAONE_WINDOWED = 64  # layers of the EXAONE 4 in which all but every fourth have a window
CAPPED = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping")
}  # scores and logits that llama.cpp caps by a number of its own if a file gives none
WIDE = {"gemma2": 46, "gemma3_text": 62}  # depth of the model that divides scores by √(width / heads), not √head_dim


def fixed_of(kind: str, depth: int, width: int, heads: int, head_dim: int) -> Keys:
    """The config attributes that llama.cpp fixes for a model of this model_type and shape."""
    found = dict(FIXED[kind])
    if kind in WIDE:
        found["query_pre_attn_scalar"] = width // heads if depth == WIDE[kind] else head_dim
    if kind == "smollm3":  # every fourth layer has no position embedding (NoPE)
        found["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(depth)]
    if kind == "llama4_text":
        found["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(depth)]
        found["layer_types"] = ["chunked_attention" if rotary else rope.GLOBAL for rotary in found["no_rope_layers"]]
    if kind == "gemma3n_text":
        found["num_kv_shared_layers"] = max(0, depth - GEMMA3N_OWN)
        found["activation_sparsity_pattern"] = [SPARSITY if i < GEMMA3N_SPARSE else 0.0 for i in range(depth)]
    if kind == "modernbert":
        found["layer_types"] = [rope.LOCAL if i % 3 else rope.GLOBAL for i in range(depth)]
    if kind == "olmoe":
        found["num_key_value_heads"] = heads  # the norm of keys is as wide as that of queries
    if kind == "exaone4":
        found |= {"layer_types": [rope.GLOBAL] * depth, "sliding_window": None} if depth != EXAONE_WINDOWED else {}
    if kind in EVERY or (kind == "exaone4" and depth == EXAONE_WINDOWED):
        found["layer_types"] = [rope.LOCAL if (i + 1) % EVERY.get(kind, 4) else rope.GLOBAL for i in range(depth)]
    return found


def check_fixed(row: Architecture, config: PretrainedConfig) -> None:
    """FormatError for a config that disagrees with what llama.cpp fixes, so that it would compute another model."""
    heads = getattr(config, "num_attention_heads", 0)
    shape = config.num_hidden_layers, config.hidden_size, heads, head_dim_of(config) if heads else 0
    for attribute, meant in fixed_of(row.kind, *shape).items():
        value = getattr(config, attribute, None)
        value = tuple(value) if isinstance(meant, tuple) and value is not None else value
        if value is not None and ALIKE.get(str(value), value) != meant:
            raise _otherwise(f"{attribute} = {value!r}, and llama.cpp's {row.name} always has {meant!r}")
    if row.name == "deepseek2" and config.q_lora_rank is None and not _is_lite(config):
        raise _otherwise(
            f"q_lora_rank = None, and llama.cpp's {row.name} knows no such model of {config.num_hidden_layers} layers"
        )
    for attribute in CAPPED.get(row.kind, ()):
        if getattr(config, attribute) is None:
            raise _otherwise(f"{attribute} = None, and llama.cpp's {row.name} always has one")


def _is_lite(config: PretrainedConfig) -> bool:
    """Whether llama.cpp takes a DeepSeek for one whose queries are not compressed: it knows them by these sizes."""
    depth, vocabulary = config.num_hidden_layers, config.vocab_size
    return depth in (26, 27) or (depth, vocabulary) == (48, 128256)


def _otherwise(message: str) -> FormatError:
    return FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")


def check_heads(row: Architecture, config: PretrainedConfig, found: Keys) -> None:
    """FormatError for heads of another size than hidden_size / heads, where llama.cpp's architecture has no others."""
    heads = getattr(config, "num_attention_heads", 0)
    if not heads or f"{row.name}.attention.key_length" in found:
        return
    size, meant = head_dim_of(config), config.hidden_size // heads
    if size != meant:
        message = f"head_dim = {size}, and llama.cpp's {row.name} always has hidden_size / num_attention_heads, {meant}"
        raise FormatError(message, where="config.json", remedy="keep it in another format: llama.cpp would not load it")
