"""Keys of Gemma 3, 3n and 4, whose layers differ: with a window and without, in heads, in MLPs.

As in special_keys.py, WRITTEN gives what no row of architectures.py expresses for a config, READ config attributes for a file's
keys. Source: llama.cpp's converter (conversion/gemma.py) and its models (src/models/gemma*.cpp).
"""

import math
from collections.abc import Callable, Container, Mapping
from statistics import NormalDist
from typing import Any

from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.gguf.layer_values import of_layer
from bitwright.gguf.state_keys import FULL

Keys = dict[str, Any]

PER_LAYER = "per_layer_token_embd.weight"  # an embedding with a part for each layer
WINDOW = "sliding_attention"
PATTERN = "attention.sliding_window_pattern"


def _gemma3(config: PretrainedConfig) -> Keys:
    """With attention both ways llama.cpp counts both sides of a window; transformers one, and the token itself."""
    return {"attention.sliding_window": 2 * (config.sliding_window - 1)} if config.use_bidirectional_attention else {}


def _gemma3_read(own: Mapping[str, Any], tensors: Container[str]) -> Keys:
    """Without a window in the file no layer has one."""
    found: Keys = {"use_bidirectional_attention": own.get("attention.causal") is False}
    return found if own.get("attention.sliding_window") else found | {"layer_types": [FULL] * own["block_count"]}


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
    _check_gemma4(config)
    windows = [kind == WINDOW for kind in config.layer_types]
    full, windowed = (of_layer(config, "head_dim", config.layer_types.index(kind)) for kind in (FULL, WINDOW))
    width, first = config.intermediate_size, len(windows) - config.num_kv_shared_layers
    wide = [width * (1 + (i >= first)) for i in range(len(windows))]
    return {
        "attention.key_length": full, "attention.value_length": full,
        "attention.key_length_swa": windowed, "attention.value_length_swa": windowed,
        "attention.head_count_kv": [of_layer(config, "num_key_value_heads", i) for i in range(len(windows))],
        "feed_forward_length": wide if config.use_double_wide_mlp else width, PATTERN: windows,
    }  # fmt: skip


def _check_gemma4(config: PretrainedConfig) -> None:
    """FormatError for what llama.cpp's code has otherwise."""
    kinds, shared = config.layer_types, config.num_kv_shared_layers
    if set(kinds) != {FULL, WINDOW}:
        raise _otherwise("layers all with a window, or all without")
    if shared and kinds[:-shared][-2:] != [WINDOW, FULL]:
        first = len(kinds) - shared
        raise _otherwise(
            f"layers {first - 2} and {first - 1}, whose keys and values others share, not with a window and without"
        )
    if config.hidden_size_per_layer_input and config.vocab_size_per_layer_input > config.vocab_size:
        some = config.vocab_size_per_layer_input
        raise _otherwise(f"embeddings of layers for {some} tokens, of a vocabulary of {config.vocab_size}")
    if config.use_bidirectional_attention == "all":
        raise _otherwise("use_bidirectional_attention = 'all'")
    sizes = [of_layer(config, "head_dim", i) for i in range(len(kinds))]
    if sizes != [sizes[kinds.index(kind)] for kind in kinds]:
        raise _otherwise(f"heads of {sizes}, of several sizes in layers of one kind")


def _gemma4_read(own: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Keys:
    depth = own["block_count"] - own.get("nextn_predict_layers", 0)
    windows = [bool(window) for window in _each(own[PATTERN], depth)]
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
    """A value for each layer, of one for all or of a list. ValueError for a list of another length."""
    found = [int(one) for one in value] if isinstance(value, list) else [value] * depth
    if len(found) != depth:
        raise ValueError(f"{len(found)} values for {depth} layers")
    return found


def _otherwise(what: str) -> FormatError:
    return FormatError(
        f"{what}: llama.cpp has that otherwise",
        where="config.json",
        remedy="keep it in another format: it would run wrongly",
    )


WRITTEN: dict[str, Callable[[PretrainedConfig], Keys]] = {
    "gemma3_text": _gemma3,
    "gemma3n_text": _gemma3n,
    "gemma4_text": _gemma4,
}
READ: dict[str, Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], Keys]] = {
    "gemma3_text": _gemma3_read,
    "gemma3n_text": _gemma3n_read,
    "gemma4_text": _gemma4_read,
}
