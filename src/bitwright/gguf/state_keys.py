"""Keys of models with states (Mamba, Mamba 2, gated delta rule), and of those in which only some layers have attention.

As in special_keys.py, WRITTEN gives what no row of architectures.py expresses for a config, READ config attributes for a file's
keys. llama.cpp knows a layer without attention by its 0 heads of keys and values, and Nemotron-H's other layers by their 0
inputs of down. Source: llama.cpp's converter (conversion/mamba.py, granite.py, nemotron.py, jamba.py, qwen.py).
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

from transformers import PretrainedConfig

from bitwright.errors import FormatError

Keys = dict[str, Any]

FULL, STATE = "full_attention", "linear_attention"
INNER, HEADS, KV_HEADS, WIDTH = (
    "ssm.inner_size",
    "ssm.time_step_rank",
    "attention.head_count_kv",
    "feed_forward_length",
)
SHARED = "expert_shared_feed_forward_length"
INTERVAL = "full_attention_interval"
RECURRENT = "attention.recurrent_layers"


def _mamba(config: PretrainedConfig) -> Keys:
    return {INNER: config.intermediate_size}


def _mamba2(config: PretrainedConfig) -> Keys:
    return {INNER: config.num_heads * config.head_dim}


def _heads_read(own: Mapping[str, Any], head_dim: str, expand: str) -> Keys:
    """The size of a head, and how much wider the states' input is than the hidden state."""
    inner, heads, width = own[INNER], own[HEADS], own["embedding_length"]
    if inner % heads or inner % width:
        raise ValueError(f"{INNER} = {inner} is no multiple of {heads} heads and of a width of {width}")
    return {head_dim: inner // heads, expand: inner // width}


def _kv_heads(config: PretrainedConfig) -> list[int]:
    """Heads of keys and values of each layer; 0: it has no attention."""
    return [config.num_key_value_heads if kind == FULL else 0 for kind in config.layer_types]


def _kinds(own: Mapping[str, Any]) -> tuple[Keys, list[str]]:
    """num_key_value_heads, if any layer has attention, and the kind of each layer."""
    heads = [int(n) for n in own[KV_HEADS]]
    some = set(heads) - {0}
    if len(some) > 1:
        raise ValueError(f"{KV_HEADS} = {heads}, and all layers with attention have as many here")
    return {"num_key_value_heads": max(some)} if some else {}, [FULL if n else STATE for n in heads]


def _granite(config: PretrainedConfig) -> Keys:
    """A hybrid has no rotary positions; if all layers have attention, it is an ordinary Granite with them."""
    rotary = config.position_embedding_type == "rope"
    if rotary is (STATE in config.layer_types):
        message = (
            f"position_embedding_type = {config.position_embedding_type!r}, and llama.cpp has rotary positions in "
        )
        message += "models of attention alone, none beside states"
        raise FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")
    experts = config.num_local_experts > 0
    found = {WIDTH: config.intermediate_size if experts else config.shared_intermediate_size}
    found |= {SHARED: config.shared_intermediate_size} if experts else {}
    if STATE not in config.layer_types:
        return found | {KV_HEADS: config.num_key_value_heads}
    inner = config.mamba_n_heads * config.mamba_d_head
    return found | {KV_HEADS: _kv_heads(config), INNER: inner, "rope.scaling.finetuned": False}


def _granite_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    if own.get("rope.scaling.finetuned", True):  # as llama.cpp takes it where it is missing
        raise ValueError("states beside rotary positions (Bamba), which are not read here yet")
    heads, kinds = _kinds(own)
    widths = {"intermediate_size": own[WIDTH], "shared_intermediate_size": own.get(SHARED) or own[WIDTH]}
    found = _heads_read(own, "mamba_d_head", "mamba_expand") | widths
    return found | heads | {"layer_types": kinds, "position_embedding_type": None}


def _nemotron(config: PretrainedConfig) -> Keys:
    kinds = config.layer_types
    experts = "moe" in kinds
    width, which = (config.moe_intermediate_size, "moe") if experts else (config.intermediate_size, "mlp")
    inner = config.mamba_num_heads * config.mamba_head_dim
    return {KV_HEADS: _kv_heads(config), WIDTH: [width if kind == which else 0 for kind in kinds], INNER: inner}


def _nemotron_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    experts = bool(own.get("expert_count"))
    heads, kinds = _kinds(own)
    widths = [int(n) for n in own[WIDTH]]
    kinds = [("moe" if experts else "mlp") if n else kind for n, kind in zip(widths, kinds, strict=True)]
    width = {"moe_intermediate_size" if experts else "intermediate_size": max(widths)}
    found = _heads_read({**own, "embedding_length": 1}, "mamba_head_dim", "expand")
    del found["expand"]  # which this model does not go by
    return found | width | heads | {"layers_block_type": kinds}


def _falcon_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    return {"mamba_d_ssm": own[INNER], "mamba_d_head": own[INNER] // own[HEADS]}


def _jamba(config: PretrainedConfig) -> Keys:
    kinds = config.layers_block_type
    heads = [config.num_key_value_heads if kind in (FULL, "attention") else 0 for kind in kinds]
    return {KV_HEADS: heads, INNER: config.mamba_expand * config.hidden_size}


def _jamba_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    heads, kinds = _kinds(own)
    attention = _regular([i for i, kind in enumerate(kinds) if kind == FULL], len(kinds))
    experts = _regular([i for i in range(len(kinds)) if f"blk.{i}.ffn_gate_inp.weight" in tensors], len(kinds))
    expand = own[INNER] // own["embedding_length"]
    return heads | {
        "mamba_expand": expand, "attn_layer_offset": attention[0], "attn_layer_period": attention[1],
        "expert_layer_offset": experts[0], "expert_layer_period": experts[1],
    }  # fmt: skip


def _regular(layers: list[int], depth: int) -> tuple[int, int]:
    """Offset and period of layers, of which there is one in each period. ValueError if they are not so."""
    offset = layers[0] if layers else depth
    period = layers[1] - layers[0] if len(layers) > 1 else depth + 1
    if layers != list(range(offset, depth, period)) or offset >= period:
        raise ValueError(f"layers {layers} of {depth} do not come again after a period")
    return offset, period


def _delta(config: PretrainedConfig) -> Keys:
    """Qwen3-Next: one layer in an interval has full attention."""
    return {
        INNER: config.linear_value_head_dim * config.linear_num_value_heads,
        INTERVAL: config.layer_types.index(FULL) + 1 if FULL in config.layer_types else config.num_hidden_layers + 1,
    }


def _delta_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    depth, every = own["block_count"] - own.get("nextn_predict_layers", 0), own.get(INTERVAL, 4)
    states = own.get(RECURRENT) or [(i + 1) % every != 0 for i in range(depth)]
    return {
        "linear_value_head_dim": own[INNER] // own[HEADS],
        "layer_types": [STATE if state else FULL for state in states[:depth]],
    }


def _tiled_delta(config: PretrainedConfig) -> Keys:
    """Qwen 3.5: heads of values are as wide as those of keys."""
    sizes = config.linear_key_head_dim, config.linear_value_head_dim
    if sizes[0] != sizes[1]:
        message = f"linear attention with heads of {sizes[0]} and {sizes[1]}, and llama.cpp has one size for both"
        raise FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")
    return _delta(config)


WRITTEN: dict[str, Callable[[PretrainedConfig], Keys]] = {
    "mamba": _mamba,
    "falcon_mamba": _mamba,
    "mamba2": _mamba2,
    "granitemoehybrid": _granite,
    "nemotron_h": _nemotron,
    "falcon_h1": lambda config: {INNER: config.mamba_d_ssm},
    "jamba": _jamba,
    "qwen3_next": _delta,
    "qwen3_5_text": _tiled_delta,
    "qwen3_5_moe_text": _tiled_delta,
}
READ: dict[str, Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Keys]] = {
    "mamba2": lambda own, tensors: _heads_read(own, "head_dim", "expand"),
    "granitemoehybrid": _granite_read,
    "nemotron_h": _nemotron_read,
    "falcon_h1": _falcon_read,
    "jamba": _jamba_read,
    "qwen3_next": _delta_read,
    "qwen3_5_text": _delta_read,
    "qwen3_5_moe_text": _delta_read,
}
