"""Table of architectures that transformers and llama.cpp both have: which config attribute is which GGUF key.

config_keys.py uses the rows in both directions. This file imports neither library.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.errors import CheckpointError

SHAPE = (
    ("max_position_embeddings", "context_length"), ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"), ("num_attention_heads", "attention.head_count"),
)  # fmt: skip
GROUPED = (*SHAPE, ("num_key_value_heads", "attention.head_count_kv"))
RMS = (("rms_norm_eps", "attention.layer_norm_rms_epsilon"),)
HEADS = (("head_dim", "attention.key_length"), ("head_dim", "attention.value_length"))
LLAMA = (*GROUPED, *RMS, *HEADS, ("vocab_size", "vocab_size"))
SLIDING = (("sliding_window", "attention.sliding_window"),)
GEMMA = (*GROUPED, *RMS, *HEADS)
SOFT_CAPS = (
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
EXPERT_COUNT, EXPERTS_USED = "expert_count", "expert_used_count"
MIXTRAL = (("num_local_experts", EXPERT_COUNT), ("num_experts_per_tok", EXPERTS_USED))
MIXTURE = (
    ("num_experts", EXPERT_COUNT), ("num_experts_per_tok", EXPERTS_USED),
    ("moe_intermediate_size", "expert_feed_forward_length"),
)  # fmt: skip
GLM_MIXTURE = (
    ("n_routed_experts", EXPERT_COUNT), ("num_experts_per_tok", EXPERTS_USED),
    ("moe_intermediate_size", "expert_feed_forward_length"), ("n_shared_experts", "expert_shared_count"),
    ("first_k_dense_replace", "leading_dense_block_count"), ("routed_scaling_factor", "expert_weights_scale"),
    ("norm_topk_prob", "expert_weights_norm"), ("n_group", "expert_group_count"), ("topk_group", "expert_group_used_count"),
)  # fmt: skip
ERNIE_MIXTURE = (
    ("moe_num_experts", EXPERT_COUNT), ("moe_k", EXPERTS_USED), ("moe_intermediate_size", "expert_feed_forward_length"),
    ("moe_num_shared_experts", "expert_shared_count"), ("moe_layer_start_index", "leading_dense_block_count"),
    ("moe_layer_interval", "interleave_moe_layer_step"),
)  # fmt: skip
LATENT = (("q_lora_rank", "attention.q_lora_rank"), ("kv_lora_rank", "attention.kv_lora_rank"))
DEEPSEEK = (*GROUPED, *RMS, *LATENT, *GLM_MIXTURE, ("vocab_size", "vocab_size"))
GATED_BY_SIGMOID = (("expert_gating_func", 2),)
FALCON = (
    ("max_position_embeddings", "context_length"), ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("num_attention_heads", "attention.head_count"), ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
)  # fmt: skip
LFM2 = (
    ("max_position_embeddings", "context_length"), ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"), ("num_attention_heads", "attention.head_count"),
    ("norm_eps", RMS[0][1]), ("conv_L_cache", "shortconv.l_cache"), ("vocab_size", "vocab_size"),
)  # fmt: skip
GPT2 = (
    ("n_positions", "context_length"), ("n_embd", "embedding_length"), ("n_layer", "block_count"),
    ("n_head", "attention.head_count"), ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
)  # fmt: skip
NORM = (("layer_norm_eps", "attention.layer_norm_epsilon"),)
EPSILON = NORM[0][1]
SCALED_LOGITS = ("logit_scale", "logit_scale")
MULTIPLIERS = (
    ("attention_multiplier", "attention.scale"), ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"), ("logits_scaling", "logit_scale"),
)  # fmt: skip
VOCABULARY = ("vocab_size", "vocab_size")
SHARED_WIDTH = ("shared_intermediate_size", "expert_shared_feed_forward_length")
SHARED_MIXTURE = (*MIXTURE, ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"))
WITHOUT_POSITIONS = (("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"))
# What llama.cpp asks for of models without attention or MLP; their context has no limit.
NO_ATTENTION = (("context_length", 1 << 20), ("feed_forward_length", 0), ("attention.head_count", 0))
MAMBA = (
    *WITHOUT_POSITIONS, ("layer_norm_epsilon", RMS[0][1]), ("conv_kernel", "ssm.conv_kernel"),
    ("state_size", "ssm.state_size"), ("time_step_rank", "ssm.time_step_rank"), VOCABULARY,
)  # fmt: skip
MAMBA2 = (
    *WITHOUT_POSITIONS, ("layer_norm_epsilon", RMS[0][1]), ("conv_kernel", "ssm.conv_kernel"),
    ("state_size", "ssm.state_size"), ("num_heads", "ssm.time_step_rank"), ("n_groups", "ssm.group_count"),
    VOCABULARY,
)  # fmt: skip
HYBRID = (
    ("mamba_n_heads", "ssm.time_step_rank"), ("mamba_d_state", "ssm.state_size"), ("mamba_n_groups", "ssm.group_count"),
    ("mamba_d_conv", "ssm.conv_kernel"),
)  # fmt: skip
GRANITE = (*SHAPE[:3], SHAPE[4], *RMS, *HEADS, *MULTIPLIERS, VOCABULARY)
NEMOTRON_H = (
    *SHAPE[:3], SHAPE[4], ("layer_norm_epsilon", RMS[0][1]), ("layer_norm_epsilon", "attention.layer_norm_epsilon"), *HEADS,
    ("mamba_num_heads", "ssm.time_step_rank"),
    ("ssm_state_size", "ssm.state_size"), ("n_groups", "ssm.group_count"), ("conv_kernel", "ssm.conv_kernel"),
    VOCABULARY,
)  # fmt: skip
NEMOTRON_MIXTURE = (
    *GLM_MIXTURE[:4], *GLM_MIXTURE[5:], ("moe_shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ("moe_latent_size", "moe_latent_size"),
)  # fmt: skip
JAMBA = (
    *SHAPE, *RMS, ("mamba_d_conv", "ssm.conv_kernel"), ("mamba_d_state", "ssm.state_size"),
    ("mamba_dt_rank", "ssm.time_step_rank"), *MIXTURE[:2], VOCABULARY,
)  # fmt: skip
DELTA = (
    ("linear_conv_kernel_dim", "ssm.conv_kernel"), ("linear_key_head_dim", "ssm.state_size"),
    ("linear_num_key_heads", "ssm.group_count"), ("linear_num_value_heads", "ssm.time_step_rank"),
)  # fmt: skip
LFM2_MIXTURE = (*MIXTURE, ("num_dense_layers", "leading_dense_block_count"))
GEMMA3N = (
    *SHAPE[:3], SHAPE[4], ("num_key_value_heads", "attention.head_count_kv"), *RMS, *HEADS, SOFT_CAPS[1], *SLIDING,
    ("altup_active_idx", "altup.active_idx"), ("altup_num_inputs", "altup.num_inputs"),
    ("hidden_size_per_layer_input", "embedding_length_per_layer_input"),
    ("num_kv_shared_layers", "attention.shared_kv_layers"),
)  # fmt: skip
GEMMA4 = (
    *SHAPE[:3], SHAPE[4], *RMS, SOFT_CAPS[1], *SLIDING,
    ("hidden_size_per_layer_input", "embedding_length_per_layer_input"),
    ("num_kv_shared_layers", "attention.shared_kv_layers"),
    ("num_experts", EXPERT_COUNT), ("top_k_experts", EXPERTS_USED), MIXTURE[2],
)  # fmt: skip
MODERN = (*SHAPE, ("norm_eps", "attention.layer_norm_epsilon"), ("local_attention", SLIDING[0][1]), VOCABULARY)
LLAMA4 = (
    *SHAPE[:3], SHAPE[4], ("num_key_value_heads", "attention.head_count_kv"), *RMS, *HEADS, *MIXTRAL,
    ("intermediate_size_mlp", "feed_forward_length"), ("intermediate_size", "expert_feed_forward_length"),
    ("interleave_moe_layer_step", "interleave_moe_layer_step"), VOCABULARY,
)  # fmt: skip
BIASES = (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_up.bias"))
DISTILLED = (
    ("max_position_embeddings", "context_length"), ("dim", "embedding_length"), ("n_layers", "block_count"),
    ("hidden_dim", "feed_forward_length"), ("n_heads", "attention.head_count"),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One architecture. kind: transformers' model_type; name: llama.cpp's architecture.

    keys     (config attribute, GGUF key without the architecture's prefix), used in both directions
    rotary   whether it has rotary position embeddings
    pairs    whether rows of q and k are permuted, so that the two channels of a rotary pair are adjacent
    shifted  whether norm weights w are stored as 1 + w
    causal   whether it is a causal language model; otherwise an encoder, of which llama.cpp gives the last hidden state
    padded   whether position ids begin at pad_token_id + 1 (RoBERTa)
    tiled    whether heads of values that share one of keys lie apart: the first of each, then the second (linear attention)
    fused    whether the QKV matrix is ordered head by head, where llama.cpp wants all of Q, then K, then V
    constant (key, value): keys whose values are fixed in the model's code, not in its config
    biases   (config attribute, tensor whose presence means True when a file is read)
    groups   the config attribute with the number of groups of Mamba 2's states; "": there are none of that kind
    """

    kind: str
    name: str
    keys: tuple[tuple[str, str], ...]
    rotary: bool = True
    pairs: bool = False
    shifted: bool = False
    causal: bool = True
    padded: bool = False
    tiled: bool = False
    fused: bool = False
    constant: tuple[tuple[str, float], ...] = ()
    biases: tuple[tuple[str, str], ...] = ()
    groups: str = ""


OTHERS = {  # general.type of files that are no models: what they are, and the remedy
    "adapter": (
        "a LoRA adapter",
        "bitwright convert LORA.gguf ADAPTER --base MODEL, then bitwright merge MODEL ADAPTER OUT",
    ),
    "imatrix": ("an importance matrix", "give it as --calib, and a model's file"),
}
VISION = "clip"  # general.architecture of mmproj files: a vision encoder without its language model
DRAFTS = (
    "eagle3",
    "dflash",
    "gemma4-assistant",
)  # models that propose tokens for another one, and cannot run without it

ARCHITECTURES = {
    row.kind: row
    for row in (
        Architecture("llama", "llama", LLAMA, pairs=True, biases=BIASES),
        Architecture("mistral", "llama", LLAMA, pairs=True),
        Architecture("mixtral", "llama", (*LLAMA, *MIXTRAL), pairs=True),
        Architecture("ministral3", "mistral3", LLAMA, pairs=True),
        Architecture("qwen2", "qwen2", (*GROUPED, *RMS)),
        Architecture("qwen3", "qwen3", (*GROUPED, *RMS, *HEADS)),
        Architecture("qwen2_moe", "qwen2moe", (*GROUPED, *RMS, *SHARED_MIXTURE)),
        Architecture("qwen3_moe", "qwen3moe", (*GROUPED, *RMS, *HEADS, *MIXTURE)),
        Architecture("phi3", "phi3", (*GROUPED, *RMS, *SLIDING)),
        Architecture("gemma", "gemma", GEMMA, shifted=True),
        Architecture("gemma2", "gemma2", (*GEMMA, *SOFT_CAPS, *SLIDING), shifted=True),
        Architecture("gemma3_text", "gemma3", (*GEMMA, SOFT_CAPS[1], *SLIDING), shifted=True),
        Architecture("smollm3", "smollm3", (*GROUPED, *RMS, *HEADS, VOCABULARY), pairs=True),
        Architecture("arcee", "arcee", LLAMA, pairs=True),
        Architecture("granite", "granite", (*GROUPED, *RMS, *HEADS, *MULTIPLIERS, VOCABULARY), pairs=True),
        Architecture(
            "olmo", "olmo", (*GROUPED, ("clip_qkv", "attention.clamp_kqv")), pairs=True, constant=((EPSILON, 1e-5),)
        ),
        Architecture("apertus", "apertus", (*GROUPED, *RMS, *HEADS, VOCABULARY)),
        Architecture("olmo2", "olmo2", (*GROUPED, *RMS)),
        Architecture("olmo3", "olmo2", (*GROUPED, *RMS, *SLIDING)),
        Architecture("seed_oss", "seed_oss", (*GROUPED, *RMS, *HEADS), biases=BIASES[:1]),
        Architecture("glm4", "glm4", (*GROUPED, *RMS, *HEADS), biases=BIASES[:1]),
        Architecture("ernie4_5", "ernie4_5", (*GROUPED, *RMS, *HEADS)),
        Architecture("cohere", "command-r", (*GROUPED, *NORM, SCALED_LOGITS)),
        Architecture("cohere2", "cohere2", (*GROUPED, *NORM, *SLIDING, SCALED_LOGITS, VOCABULARY)),
        Architecture("stablelm", "stablelm", (*GROUPED, *NORM), biases=(("use_qkv_bias", "blk.0.attn_q.bias"),)),
        Architecture("phi", "phi2", (*GROUPED, *NORM)),
        Architecture("nemotron", "nemotron", (*GROUPED, ("norm_eps", EPSILON)), shifted=True),
        Architecture(
            "gpt_neox", "gptneox", (*SHAPE, *NORM, ("use_parallel_residual", "use_parallel_residual")), fused=True
        ),
        Architecture("olmoe", "olmoe", (*GROUPED, *RMS, *MIXTRAL)),
        Architecture(
            "granitemoe",
            "granitemoe",
            (*GROUPED, *RMS, *HEADS, *MIXTRAL, *MULTIPLIERS, VOCABULARY),
            pairs=True,
        ),
        Architecture(
            "glm4_moe",
            "glm4moe",
            (*GROUPED, *RMS, *HEADS, *GLM_MIXTURE),
            constant=GATED_BY_SIGMOID,
            biases=(*BIASES[:1], ("use_qk_norm", "blk.0.attn_q_norm.weight")),
        ),
        Architecture("ernie4_5_moe", "ernie4_5-moe", (*GROUPED, *RMS, *HEADS, *ERNIE_MIXTURE)),
        Architecture("deepseek_v2", "deepseek2", DEEPSEEK),
        Architecture("deepseek_v3", "deepseek2", DEEPSEEK),
        Architecture(
            "gpt_oss",
            "gpt-oss",
            (*GROUPED, *RMS, *HEADS, *MIXTRAL, *SLIDING, ("intermediate_size", "expert_feed_forward_length")),
        ),
        Architecture("hunyuan_v1_dense", "hunyuan-dense", (*GROUPED, *RMS, *HEADS)),
        Architecture(
            "hunyuan_v1_moe",
            "hunyuan-moe",
            (
                *GROUPED,
                *RMS,
                *HEADS,
                ("num_experts", EXPERT_COUNT),
                ("moe_topk", EXPERTS_USED),
                ("intermediate_size", "expert_feed_forward_length"),
            ),
        ),
        Architecture("exaone4", "exaone4", (*GROUPED, *RMS, *HEADS, *SLIDING, VOCABULARY)),
        Architecture("falcon", "falcon", FALCON),
        Architecture("lfm2", "lfm2", LFM2),
        Architecture("llama4_text", "llama4", LLAMA4),
        Architecture("qwen3_next", "qwen3next", (*GROUPED, *RMS, *HEADS, *SHARED_MIXTURE, *DELTA), shifted=True),
        Architecture("qwen3_5_text", "qwen35", (*GROUPED, *RMS, *HEADS, *DELTA), shifted=True, tiled=True),
        Architecture(
            "qwen3_5_moe_text",
            "qwen35moe",
            (*SHAPE[:3], SHAPE[4], GROUPED[5], *RMS, *HEADS, *SHARED_MIXTURE, *DELTA),
            shifted=True,
            tiled=True,
        ),
        Architecture("mamba", "mamba", MAMBA, rotary=False, constant=(*NO_ATTENTION, ("ssm.dt_b_c_rms", False))),
        Architecture("falcon_mamba", "mamba", MAMBA, rotary=False, constant=(*NO_ATTENTION, ("ssm.dt_b_c_rms", True))),
        Architecture("mamba2", "mamba2", MAMBA2, rotary=False, constant=NO_ATTENTION, groups="n_groups"),
        Architecture(
            "granitemoeshared",
            "granitemoe",
            (*GROUPED, *RMS, *HEADS, *MIXTRAL, *MULTIPLIERS, SHARED_WIDTH, VOCABULARY),
            pairs=True,
        ),
        Architecture(
            "granitemoehybrid",
            "granitehybrid",
            (*GRANITE, *MIXTRAL, *HYBRID),
            rotary=False,
            pairs=True,
            groups="mamba_n_groups",
        ),
        Architecture("nemotron_h", "nemotron_h", NEMOTRON_H, rotary=False, groups="n_groups"),
        Architecture("falcon_h1", "falcon-h1", (*GROUPED, *RMS, *HEADS, *HYBRID, VOCABULARY), groups="mamba_n_groups"),
        Architecture("jamba", "jamba", JAMBA, rotary=False),
        Architecture("lfm2_moe", "lfm2moe", (*LFM2, *LFM2_MIXTURE), constant=GATED_BY_SIGMOID),
        Architecture("gemma3n_text", "gemma3n", GEMMA3N),
        Architecture("gemma4_text", "gemma4", GEMMA4),
        Architecture(
            "modernbert", "modern-bert", MODERN, causal=False, constant=(("attention.sliding_window_pattern", 3),)
        ),
        Architecture("eurobert", "eurobert", (*GROUPED, *RMS), causal=False),
        Architecture("gpt2", "gpt2", GPT2, rotary=False),
        Architecture("gpt_bigcode", "starcoder", GPT2, rotary=False),
        Architecture("starcoder2", "starcoder2", (*GROUPED, ("norm_epsilon", "attention.layer_norm_epsilon"))),
        *(
            Architecture(kind, "bert", (*SHAPE, *NORM), rotary=False, causal=False, padded=kind != "bert")
            for kind in ("bert", "roberta", "xlm-roberta")
        ),
        Architecture("nomic_bert", "nomic-bert", (*SHAPE, *NORM), causal=False),
        Architecture("distilbert", "bert", DISTILLED, rotary=False, causal=False),
    )
}

# Rows that are taken in the place of a kind's own: kind -> (whether a config is of this form, the row), the first that is.
FORMS: dict[str, tuple[tuple[Callable[[Any], bool], Architecture], ...]] = {
    "gemma3_text": (
        (
            lambda config: bool(config.use_bidirectional_attention),
            Architecture("gemma3_text", "gemma-embedding", (*GEMMA, *SLIDING), shifted=True, causal=False),
        ),
    ),
    "nemotron_h": (
        (
            lambda config: "moe" in config.layer_types,
            Architecture(
                "nemotron_h", "nemotron_h_moe", (*NEMOTRON_H, *NEMOTRON_MIXTURE), rotary=False, groups="n_groups"
            ),
        ),
    ),
    "granitemoehybrid": (
        (
            lambda config: "linear_attention" not in config.layer_types and config.num_local_experts > 0,
            Architecture("granitemoehybrid", "granitemoe", (*GRANITE, *MIXTRAL), pairs=True),
        ),
        (
            lambda config: "linear_attention" not in config.layer_types,
            Architecture("granitemoehybrid", "granite", GRANITE, pairs=True),
        ),
    ),
}


# Architectures of llama.cpp without a row: transformers' model_type -> (llama.cpp's name, what a row would need).
MISSING = {
    # LayerNorm is RMSNorm of centred matrices; but SparseMixer's two weights add up to 2, or to less where scores are near one
    # another, and llama.cpp's to the same for every token: no weights of a file make them equal.
    "phimoe": (
        "phimoe",
        "SparseMixer's weights of experts, whose sum differs from token to token, as llama.cpp's never does",
    ),
    "t5": ("t5", "an encoder beside the decoder"),
    "mpt": ("mpt", "positions as biases (ALiBi)"),
    "bloom": ("bloom", "positions as biases (ALiBi)"),
}


def needed_for(kind: object, name: object) -> str:
    """What a row would need for transformers' model_type `kind`, or llama.cpp's architecture `name`."""
    known = {**{kind: why for kind, (_, why) in MISSING.items()}, **dict(MISSING.values())}
    why = known.get(str(kind if name is None else name), "its keys and tensor names in gguf/architectures.py")
    return f"it would need {why}"


def instead_of_model(keys: Mapping[str, Any], tensors: Collection[str]) -> tuple[str, str] | None:
    """What a file is that is no model of its own, and the remedy: a LoRA adapter, an importance matrix, a draft model, a
    vocabulary; None for a model."""
    kind = keys.get("general.type", "model")
    if kind in OTHERS:
        what, remedy = OTHERS[kind]
        return f"a file of {what}, not a model", remedy
    if keys.get("general.architecture") in DRAFTS:
        remedy = "give the file of the model that it proposes tokens for"
        return "a draft model, which runs beside another one alone", remedy
    if not tensors:
        return "a file of a vocabulary, without a single tensor", "give the file of a model; inspect shows this one"
    return None


def check_is_model(keys: Mapping[str, Any], tensors: Collection[str], where: str) -> None:
    """CheckpointError for a file that is no model: see `instead_of_model`."""
    found = instead_of_model(keys, tensors)
    if found is not None:
        raise CheckpointError(found[0], where=where, remedy=found[1])


def named(name: object) -> Architecture | None:
    """The first row with this llama.cpp architecture; None if there is none."""
    forms = [form[-1] for others in FORMS.values() for form in others]
    return next((row for row in (*ARCHITECTURES.values(), *forms) if row.name == name), None)
