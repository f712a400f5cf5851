"""Keys that no row of architectures.py expresses, because several config attributes make one, or one several.

WRITTEN gives them for a config; READ gives config attributes for the keys of a file and the names of its tensors. Keys are
without the architecture's prefix. Source: llama.cpp's converter (conversion/*.py).
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf import gemma_keys, state_keys
from bitwright.gguf.reader import ENTRIES
from bitwright.gguf.state_keys import FULL

Keys = dict[str, Any]

DISTILLED_EPSILON = 1e-12  # epsilon of DistilBERT's norms, fixed in its code
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
MAVERICK = 128  # experts of the one Llama 4 without norms of queries and keys
CONV = "conv"  # the type of Lfm2's layers without attention


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
    "llama4_text": _llama4,
    "apertus": lambda config: dict.fromkeys(ENTRIES, [0.0] * config.num_hidden_layers),  # filled with the weights
    **gemma_keys.WRITTEN,
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
    "llama4_text": _llama4_read,
    # one that it must have; it counts as an embedding's alone
    "nomic_bert": lambda own, tensors: {"pad_token_id": int(own.get("tokenizer.ggml.padding_token_id", 0))},
    **gemma_keys.READ,
    **state_keys.READ,
}
