"""Keys that no row of architectures.py expresses, because several config attributes make one, or one several.

WRITTEN gives them for a config; READ gives config attributes for the keys of a file and the names of its tensors. Keys are
without the architecture's prefix. Source: llama.cpp's converter (conversion/*.py).
"""

import math
from collections.abc import Callable, Container, Mapping
from statistics import NormalDist
from typing import Any

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf import state_keys
from bitwright.gguf.layer_values import of_layer
from bitwright.gguf.reader import ENTRIES
from bitwright.gguf.state_keys import FULL

Keys = dict[str, Any]

DISTILLED_EPSILON = 1e-12  # epsilon of DistilBERT's norms, fixed in its code
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
MAVERICK = 128  # experts of the one Llama 4 without norms of queries and keys
CONV = "conv"  # the type of Lfm2's layers without attention
PER_LAYER = "per_layer_token_embd.weight"  # Gemma 3n's embedding for each layer
WINDOW = "sliding_attention"
PATTERN = "attention.sliding_window_pattern"


def _gpt2(config: PretrainedConfig) -> Keys:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd}


def _inner_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    width = own.get("feed_forward_length")
    return {} if width == 4 * own["embedding_length"] else {"n_inner": width}


def _starcoder(config: PretrainedConfig) -> Keys:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd, "attention.head_count_kv": 1}


def _falcon(config: PretrainedConfig) -> Keys:
    return {"feed_forward_length": config.ffn_hidden_size, "attention.head_count_kv": falcon_kv_heads(config)}


def falcon_kv_heads(config: PretrainedConfig) -> int:
    """Key-value heads of a Falcon: those of the newer architecture, or one, or as many as there are heads."""
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _falcon_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    heads = own["attention.head_count_kv"]
    norms = 2 if "blk.0.attn_norm_2.weight" in tensors else 1
    newer = heads > 1
    return {
        "num_kv_heads": heads, "new_decoder_architecture": newer, "multi_query": not newer,
        "num_ln_in_parallel_attn": norms if newer else None,
    }  # fmt: skip


def _lfm2_heads(config: PretrainedConfig) -> Keys:
    return {
        "attention.head_count_kv": [0 if kind == CONV else config.num_key_value_heads for kind in config.layer_types]
    }


def _lfm2(config: PretrainedConfig) -> Keys:
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:  # as in transformers' Lfm2MLP
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = config.block_multiple_of * -(-width // config.block_multiple_of)
    return _lfm2_heads(config) | {"feed_forward_length": width}


def _lfm2_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    heads = [int(n) for n in own["attention.head_count_kv"]]
    kinds = [FULL if n else CONV for n in heads]
    return {"num_key_value_heads": max(heads), "layer_types": kinds, "block_auto_adjust_ff_dim": False}


def _latent(config: PretrainedConfig) -> Keys:
    """Heads of DeepSeek's latent attention, as in files whose kv_b is one matrix."""
    sizes = {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
    }
    return sizes | {"expert_gating_func": SIGMOID if config.model_type == "deepseek_v3" else SOFTMAX}


def _latent_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    if "attention.key_length_mla" in own:
        raise ValueError("latent attention with kv_b split into attn_k_b and attn_v_b, which is not read here yet")
    turned = own["rope.dimension_count"]
    return {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": own["attention.key_length"] - turned,
        "v_head_dim": own["attention.value_length"],
        "head_dim": turned,
        "q_lora_rank": own.get("attention.q_lora_rank"),
    }


def _ernie(config: PretrainedConfig) -> Keys:
    return {"expert_shared_feed_forward_length": config.moe_num_shared_experts * config.moe_intermediate_size}


def _lfm2_mixture_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    found = _lfm2_read(own, tensors)
    first = own["leading_dense_block_count"]
    return {
        "num_key_value_heads": found["num_key_value_heads"], "layer_types": found["layer_types"],
        "use_expert_bias": f"blk.{first}.exp_probs_b.bias" in tensors,
    }  # fmt: skip


def _gemma3(config: PretrainedConfig) -> Keys:
    """With attention both ways llama.cpp counts both sides of a window; transformers one, and the token itself."""
    return {"attention.sliding_window": 2 * (config.sliding_window - 1)} if config.use_bidirectional_attention else {}


def _gemma3_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    return {"use_bidirectional_attention": own.get("attention.causal") is False}


def _gemma3n(config: PretrainedConfig) -> Keys:
    """Which layers have a window; and the inner size of the MLPs, which must be one."""
    widths = config.intermediate_size
    several = set(widths) if isinstance(widths, list) else {widths}
    if len(several) > 1:
        message = f"MLPs of several inner sizes, {sorted(several)}, where llama.cpp's gemma3n has one"
        raise FormatError(message, where="config.json", remedy="keep it in another format")
    scales = [
        float(NormalDist().inv_cdf(share)) if share else -math.inf for share in config.activation_sparsity_pattern
    ]
    windows = [kind != FULL for kind in config.layer_types]
    return {"feed_forward_length": max(several), "activation_sparsity_scale": scales, PATTERN: windows}


def _gemma3n_read(own: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Keys:
    depth, pattern = own["block_count"], own.get(PATTERN, 5)
    windows = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(depth)]
    return {
        "intermediate_size": own["feed_forward_length"], "layer_types": [WINDOW if w else FULL for w in windows],
        "vocab_size_per_layer_input": tensors[PER_LAYER][0],
    }  # fmt: skip


def _gemma4(config: PretrainedConfig) -> Keys:
    """Heads of two sizes, with a window and without; and which layers have one, or a wider MLP."""
    windows, first = [kind == WINDOW for kind in config.layer_types], _first_shared(config)
    shared = config.num_kv_shared_layers
    if shared and windows[:first][-2:] != [True, False]:
        raise _otherwise(
            f"layers {first - 2} and {first - 1}, whose keys and values others share, do not have a window and none"
        )
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input > config.vocab_size:
        raise _otherwise(
            f"embeddings of layers for {config.vocab_size_per_layer_input} tokens, of a vocabulary of {config.vocab_size}"
        )
    if config.use_bidirectional_attention == "all":
        raise _otherwise("use_bidirectional_attention = 'all'")
    sizes = [of_layer(config, "head_dim", i) for i in range(len(windows))]
    full, windowed = (sizes[config.layer_types.index(kind)] for kind in (FULL, WINDOW))
    if sizes != [windowed if window else full for window in windows]:
        raise _otherwise(f"heads of {sizes}, of several sizes in layers of one kind")
    width = config.intermediate_size
    wide = [width * (1 + (config.use_double_wide_mlp and i >= first)) for i in range(len(windows))]
    return {
        "attention.key_length": full, "attention.value_length": full, "attention.key_length_swa": windowed,
        "attention.value_length_swa": windowed, 
        "attention.head_count_kv": [of_layer(config, "num_key_value_heads", i) for i in range(len(windows))],
        "feed_forward_length": wide if config.use_double_wide_mlp else width, PATTERN: windows,
    }  # fmt: skip


def _first_shared(config: PretrainedConfig) -> int:
    """The first of the last layers, which have the keys and values of earlier ones."""
    return int(config.num_hidden_layers - config.num_kv_shared_layers)


def _gemma4_read(own: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Keys:
    depth, windows = own["block_count"], own[PATTERN]
    heads, widths = _each(own["attention.head_count_kv"], depth), _each(own["feed_forward_length"], depth)
    full = {"head_dim": own["attention.key_length"]}
    others = [i for i, window in enumerate(windows) if not window]
    first = depth - own.get("attention.shared_kv_layers", 0)
    double = widths[0] * 2
    wide = len(set(widths)) > 1
    if widths != [double if wide and i >= first else widths[0] for i in range(depth)]:
        raise ValueError(f"MLPs of {widths}, where layers with keys and values of earlier ones may have twice the size")
    return {
        "layer_types": [WINDOW if window else FULL for window in windows], "head_dim": own["attention.key_length_swa"],
        "num_key_value_heads": next((n for n, window in zip(heads, windows, strict=True) if window), heads[0]),
        "per_layer_config": {i: full | {"num_key_value_heads": heads[i]} for i in others},
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in tensors for i in others if i < first),
        "intermediate_size": widths[0], "use_double_wide_mlp": wide,
        "enable_moe_block": "blk.0.ffn_gate_inp.weight" in tensors,
        "vocab_size_per_layer_input": tensors.get(PER_LAYER, (1,))[0],
    }  # fmt: skip


def _each(value: Any, depth: int) -> list[int]:
    """A value for each layer, of one for all or of a list."""
    return [int(one) for one in value] if isinstance(value, list) else [value] * depth


def _otherwise(what: str) -> FormatError:
    return FormatError(
        f"{what}: llama.cpp has that otherwise",
        where="config.json",
        remedy="keep it in another format: it would run wrongly",
    )


def _llama4(config: PretrainedConfig) -> Keys:
    """Nothing: queries and keys have norms but in the model of 128 experts, and experts come at regular intervals."""
    regular = list(
        range(config.interleave_moe_layer_step - 1, config.num_hidden_layers, config.interleave_moe_layer_step)
    )
    meant = {"use_qk_norm": config.num_local_experts != MAVERICK, "moe_layers": regular}
    for attribute, value in meant.items():
        found = getattr(config, attribute)
        if found != value:
            message = f"{attribute} = {found!r}, and llama.cpp's llama4 has {value!r} for such a model"
            raise FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")
    return {}


def _llama4_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    if own.get("attention.sliding_window") == 0:
        raise ValueError("attention to the whole text in all layers, which is not read here yet")
    return {"use_qk_norm": own["expert_count"] != MAVERICK}


WRITTEN: dict[str, Callable[[PretrainedConfig], Keys]] = {
    "gpt2": _gpt2,
    "gpt_bigcode": _starcoder,
    "distilbert": lambda config: {"attention.layer_norm_epsilon": DISTILLED_EPSILON},
    "falcon": _falcon,
    "lfm2": _lfm2,
    "deepseek_v2": _latent,
    "deepseek_v3": _latent,
    "ernie4_5_moe": _ernie,
    "hunyuan_v1_moe": lambda config: {
        "expert_shared_feed_forward_length": config.intermediate_size,
        "expert_shared_count": 1,
    },
    "lfm2_moe": _lfm2_heads,
    "gemma3_text": _gemma3,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
    "llama4_text": _llama4,
    "apertus": lambda config: dict.fromkeys(ENTRIES, [0.0] * config.num_hidden_layers),  # filled with the weights
    **state_keys.WRITTEN,
}
READ: dict[str, Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Keys]] = {
    "gpt2": _inner_read,
    "gpt_bigcode": _inner_read,
    "falcon": _falcon_read,
    "lfm2": _lfm2_read,
    "deepseek_v2": _latent_read,
    "deepseek_v3": _latent_read,
    "lfm2_moe": _lfm2_mixture_read,
    "gemma3_text": _gemma3_read,
    "gemma3n_text": _gemma3n_read,
    "gemma4_text": _gemma4_read,
    "llama4_text": _llama4_read,
    # one that it must have; it counts as an embedding's alone
    "nomic_bert": lambda own, tensors: {"pad_token_id": int(own.get("tokenizer.ggml.padding_token_id", 0))},
    **state_keys.READ,
}
