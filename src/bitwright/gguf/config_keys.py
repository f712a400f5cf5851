"""Convert transformers' configs to GGUF keys, and back, by the rows of architectures.py.

Hyperparameters that llama.cpp fixes in its code are in `FIXED` and the tables after it. A config that disagrees with them is
refused when a file is written; when one is read, they are put into the config. Source: llama.cpp's converter
(conversion/*.py) and its models (src/models/*.cpp).
"""

import math
from collections.abc import Container, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import rope
from bitwright.gguf.architectures import (
    ARCHITECTURES,
    EXPERT_COUNT,
    FORMS,
    VISION,
    Architecture,
    check_is_model,
    named,
    needed_for,
)
from bitwright.gguf.reader import ENTRIES
from bitwright.gguf.rope import head_dim_of
from bitwright.gguf.special_keys import DISTILLED_EPSILON, READ, SIGMOID, WRITTEN
from bitwright.gguf.special_tokens import ends_of

Keys = dict[str, Any]

TOKEN_TYPES = "tokenizer.ggml.token_type_count"
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Config attributes that llama.cpp's code fixes for each model_type.
GELU = "gelu_pytorch_tanh"
ALIKE = {"gelu_new": GELU}  # two names of the same function
ANY_STEP = {"time_step_limit": (0.0, math.inf)}  # steps of a state are not clamped
SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}  # every layer has experts
FIXED: dict[str, Keys] = {
    **{
        kind: {"hidden_act": "silu"} for kind in ("llama", "mistral", "ministral3", "mixtral", "qwen2", "qwen3", "phi3")
    },
    "qwen2_moe": {
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        **SPARSE,
    },
    "qwen3_moe": {"hidden_act": "silu", "norm_topk_prob": True, **SPARSE},
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
    "smollm3": {"hidden_act": "silu", "use_sliding_window": False},
    "apertus": {"hidden_act": "xielu", "attention_bias": False},
    "arcee": {"hidden_act": "relu2"},
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
WIDE = {"gemma2": 46, "gemma3_text": 62}  # depth of the model that divides scores by √(width / heads), not √head_dim
# llama.cpp ignores their sliding window.
WINDOWLESS = ("mistral", "ministral3", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "starcoder2")


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row for a model's config. FormatError if the table has none."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        message = f"models of type {config.model_type!r} cannot be written as GGUF here"
        remedy = (
            f"{needed_for(config.model_type, None)}; known: {known}; or convert it by llama.cpp's own converter, and give "
            "that file, which is quantized tensor by tensor"
        )
        raise FormatError(message, remedy=remedy)
    return next((form for fits, form in FORMS.get(row.kind, ()) if fits(config)), row)


def experts_in(config: PretrainedConfig) -> int:
    """The number of experts of a layer that has any; 0: the model is dense."""
    keys = {key: attribute for attribute, key in architecture_of(config).keys}
    return int(getattr(config, keys[EXPERT_COUNT]) or 0) if EXPERT_COUNT in keys else 0


def first_position(config: PretrainedConfig) -> int:
    """The position id of the first token of a text: pad_token_id + 1 in RoBERTa, else 0. Embeddings before it are unused."""
    row = ARCHITECTURES.get(config.model_type)
    return config.pad_token_id + 1 if row is not None and row.padded else 0


def keys_of(config: PretrainedConfig) -> Keys:
    """The keys of a model, without those of its tokenizer. FormatError for a config that llama.cpp cannot express."""
    row = architecture_of(config)
    _check_fixed(row, config)
    found: Keys = {"general.architecture": row.name}
    for attribute, key in row.keys:
        value = head_dim_of(config) if attribute == "head_dim" else getattr(config, attribute, None)
        if value is not None:
            found[f"{row.name}.{key}"] = value - first_position(config) if key == "context_length" else value
    found |= {f"{row.name}.{key}": value for key, value in row.constant}
    if row.kind in WRITTEN:
        more = {key: value for key, value in WRITTEN[row.kind](config).items() if value is not None}
        found |= {key if key in ENTRIES else f"{row.name}.{key}": value for key, value in more.items()}
    if not row.causal:
        found |= {f"{row.name}.attention.causal": False, TOKEN_TYPES: getattr(config, "type_vocab_size", 1)}
    return found | (rope.keys_of(row.name, config) if row.rotary else {})


def _fixed(kind: str, depth: int, width: int, heads: int, head_dim: int) -> Keys:
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


def _check_fixed(row: Architecture, config: PretrainedConfig) -> None:
    """FormatError for a config that disagrees with what llama.cpp fixes, so that it would compute another model."""
    heads = getattr(config, "num_attention_heads", 0)
    shape = config.num_hidden_layers, config.hidden_size, heads, head_dim_of(config) if heads else 0
    for attribute, meant in _fixed(row.kind, *shape).items():
        value = getattr(config, attribute, None)
        value = tuple(value) if isinstance(meant, tuple) and value is not None else value
        if value is not None and ALIKE.get(str(value), value) != meant:
            message = f"{attribute} = {value!r}, and llama.cpp's {row.name} always has {meant!r}"
            raise FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")


def not_kept(config: PretrainedConfig) -> list[str]:
    """Notes on what llama.cpp ignores of the config, as in files of its own converter: sliding windows, YaRN's exact ramp."""
    if config.model_type == "gpt_oss" and config.rope_parameters.get("rope_type") == "yarn":
        return [
            "llama.cpp begins and ends YaRN's ramp at whole frequencies, and gpt-oss between them: logits differ a little"
        ]
    window = getattr(config, "sliding_window", None)
    sliding = window and getattr(config, "use_sliding_window", True) and config.model_type in WINDOWLESS
    if not sliding or window >= config.max_position_embeddings:
        return []
    return [
        f"llama.cpp lets models of type {config.model_type} attend to all positions, not to the last {window} alone"
    ]


def config_of(
    keys: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    where: str,
    factors: Mapping[str, Tensor] | None = None,
) -> PretrainedConfig:
    """transformers' config for a GGUF file. tensors: name -> shape; factors: the tensors of RoPE factors (rope.py).

    CheckpointError for an architecture that is not in the table, or keys that are missing or inconsistent.
    """
    check_is_model(keys, where)
    if keys.get("general.architecture") == VISION:
        message = "the encoder of images (mmproj) of a model, not the model itself"
        remedy = "give the model's own file; `bitwright quantize` makes a smaller mmproj of this one, with --calib none"
        raise CheckpointError(message, where=where, remedy=remedy)
    row = _row_of(keys, tensors, where)
    if row is None:
        known = ", ".join(sorted({row.name for row in ARCHITECTURES.values()}))
        name = keys.get("general.architecture")
        remedy = (
            f"{needed_for(None, name)}; `bitwright quantize` makes a smaller file of it all the same; known: {known}"
        )
        message = f"architecture {name!r} is not read here"
        raise CheckpointError(message, where=where, remedy=remedy)
    values = {a: _plain(keys[f"{row.name}.{key}"]) for a, key in row.keys if f"{row.name}.{key}" in keys}
    _check_depth(row, values, keys, tensors, where)
    values["vocab_size"] = tensors["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values |= {attribute: name in tensors for attribute, name in row.biases}
    values |= {"use_parallel_residual": "blk.0.ffn_norm.weight" not in tensors} if row.kind == "stablelm" else {}
    values |= {"type_vocab_size": keys.get(TOKEN_TYPES, 1)} if row.kind in ("bert", "nomic_bert") else {}
    values |= _special(keys, values["vocab_size"])
    values |= _ends(keys)
    own = {key.removeprefix(f"{row.name}."): _plain(value) for key, value in keys.items()}
    try:
        values |= READ[row.kind](own, tensors) if row.kind in READ else {}
        return AutoConfig.for_model(row.kind, **_implied(row, values, keys, factors or {}, where) | values)
    except (ValueError, TypeError, AttributeError, ArithmeticError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"its keys make no config of type {row.kind}: {error}", where=where) from error


def _check_depth(
    row: Architecture, values: Keys, keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """CheckpointError for a file without its most important keys, or with more blocks than tensors.

    Blocks of multi-token prediction, which block_count includes, are taken off in `values`.
    """
    needed = {"block_count", "embedding_length", "attention.head_count"}
    missing = [key for _, key in row.keys if key in needed and f"{row.name}.{key}" not in keys]
    if missing or "token_embd.weight" not in tensors:
        what = f"key {row.name}.{missing[0]}" if missing else "tensor token_embd.weight"
        raise CheckpointError(f"{what} is missing", where=where, remedy="get a good copy")
    attribute = next(a for a, key in row.keys if key == "block_count")
    depth = values[attribute]
    if isinstance(depth, int):
        depth = values[attribute] = depth - further_blocks(keys)
    if not isinstance(depth, int) or not 0 < depth <= len(tensors):
        message = f"{depth} blocks are announced, and there are {len(tensors)} tensors"
        raise CheckpointError(message, where=where, remedy="get a good copy")


def further_blocks(keys: Mapping[str, Any]) -> int:
    """The number of a file's last blocks that are for multi-token prediction (GLM-4.5), which no other prediction needs."""
    found = keys.get(f"{keys.get('general.architecture')}.nextn_predict_layers", 0)
    return found if isinstance(found, int) else 0


def _row_of(keys: Mapping[str, Any], tensors: Container[str], where: str) -> Architecture | None:
    """The row for a file's architecture; where several transformers models share one, what else there is decides."""
    row = named(keys.get("general.architecture"))
    if row is None:
        return None
    if row.name == "bert" and "token_types.weight" not in tensors:
        return _distilled(keys, where)
    others = {
        "llama": ("mixtral", bool(keys.get(f"llama.{EXPERT_COUNT}"))),
        "deepseek2": ("deepseek_v3", keys.get("deepseek2.expert_gating_func") == SIGMOID),
        "olmo2": ("olmo3", bool(keys.get("olmo2.attention.sliding_window"))),
        "mamba": ("falcon_mamba", bool(keys.get("mamba.ssm.dt_b_c_rms"))),
        "granitemoe": ("granitemoeshared", bool(keys.get("granitemoe.expert_shared_feed_forward_length"))),
    }
    kind, is_other = others.get(row.name, ("", False))
    return ARCHITECTURES[kind] if is_other else row


def _special(keys: Mapping[str, Any], vocabulary: int) -> Keys:
    """The ids of special tokens; one outside the vocabulary counts as missing, as in llama.cpp."""
    ids = {attribute: keys.get(f"tokenizer.ggml.{key}") for attribute, key in SPECIAL.items()}
    return {a: n if isinstance(n, int) and 0 <= n < vocabulary else None for a, n in ids.items()}


def _ends(keys: Mapping[str, Any]) -> Keys:
    """eos_token_id: one id, or a list of all ids that end generation."""
    found = ends_of(keys)
    return {} if not found else {"eos_token_id": found[0] if len(found) == 1 else found}


def _distilled(keys: Mapping[str, Any], where: str) -> Architecture:
    """The row of DistilBERT. CheckpointError if the epsilon of the norms is not the one that its code fixes."""
    epsilon = keys.get("bert.attention.layer_norm_epsilon", DISTILLED_EPSILON)
    if not isinstance(epsilon, float) or not math.isclose(epsilon, DISTILLED_EPSILON, rel_tol=1e-5):
        message = f"no types of tokens, as DistilBERT, and {epsilon!r} in its norms, where that has {DISTILLED_EPSILON}"
        raise CheckpointError(
            message, where=where, remedy="such a model needs a class of transformers that computes it"
        )
    return ARCHITECTURES["distilbert"]


def _implied(
    row: Architecture, values: Keys, keys: Mapping[str, Any], factors: Mapping[str, Tensor], where: str
) -> Keys:
    """Config attributes without a key of their own: those that llama.cpp fixes, and RoPE's."""
    names = dict(row.keys)
    a = {key: attribute for attribute, key in names.items()}
    depth, width = values[a["block_count"]], values[a["embedding_length"]]
    heads = values[a["attention.head_count"]] if "attention.head_count" in a else 0
    head_dim = values.get("head_dim") or (width // heads if heads else 0)
    found = _fixed(row.kind, depth, width, heads, head_dim)
    if row.rotary:
        found["rope_parameters"] = rope.parameters_of(row.name, keys, factors, head_dim, where)
    if row.kind == "phi3" and found["rope_parameters"]["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = found["rope_parameters"]["original_max_position_embeddings"]
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
