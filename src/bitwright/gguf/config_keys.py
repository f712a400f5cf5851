"""Configs of transformers as keys of llama.cpp, and back, by the rows of architectures.py.

What llama.cpp has fixed in its code, and no key can change, stands in tables of its own: written only if the config
agrees, and put into the config that is read. Source: llama.cpp's converter (conversion/*.py) and its models
(src/models/*.cpp).
"""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import rope
from bitwright.gguf.architectures import ARCHITECTURES, VISION, Architecture, check_is_model, named
from bitwright.gguf.rope import head_dim_of
from bitwright.gguf.special_tokens import ends_of

Keys = dict[str, Any]

DISTILLED_EPSILON = 1e-12  # of DistilBERT's norms, in its code
TOKEN_TYPES = "tokenizer.ggml.token_type_count"
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# What a model's code has, whatever its file says.
GELU = "gelu_pytorch_tanh"
ALIKE = {"gelu_new": GELU}  # two names of one function
FIXED: dict[str, Keys] = {
    **{kind: {"hidden_act": "silu"} for kind in ("llama", "mistral", "qwen2", "qwen3", "phi3")},
    "gemma": {"hidden_activation": GELU},
    "gemma2": {"hidden_activation": GELU},
    "gemma3_text": {"hidden_activation": GELU, "use_bidirectional_attention": False},
    "gpt2": {"activation_function": GELU, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "starcoder2": {"hidden_act": GELU, "use_bias": True},
    **{kind: {"hidden_act": "gelu", "is_decoder": False} for kind in ("bert", "roberta", "xlm-roberta")},
    "distilbert": {"activation": "gelu"},
}
EVERY = {"gemma2": 2, "gemma3_text": 6}  # layer of so many attends to all positions, the others to a window
WIDE = {"gemma2": 46, "gemma3_text": 62}  # depth of those whose scores are divided by √(width / heads), not √head_dim
WINDOWLESS = ("mistral", "qwen2", "qwen3", "phi3", "starcoder2")  # llama.cpp attends to all positions


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row for a model. FormatError for one that is not in the table."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        message = f"models of type {config.model_type!r} cannot be written as GGUF here"
        remedy = (
            f"known: {known}; another needs its keys and tensor names in gguf/architectures.py; or convert it by "
            "llama.cpp's own converter, and give that file"
        )
        raise FormatError(message, remedy=remedy)
    return row


def first_position(config: PretrainedConfig) -> int:
    """The row of the table of positions that a text's first token takes; those before it are never used."""
    row = ARCHITECTURES.get(config.model_type)
    return config.pad_token_id + 1 if row is not None and row.padded else 0


def keys_of(config: PretrainedConfig) -> Keys:
    """The model's keys and values but those of the tokenizer. FormatError for what the architecture cannot express."""
    row = architecture_of(config)
    _check_fixed(row, config)
    found: Keys = {"general.architecture": row.name}
    for attribute, key in row.keys:
        value = head_dim_of(config) if attribute == "head_dim" else getattr(config, attribute, None)
        if value is not None:
            found[f"{row.name}.{key}"] = value - first_position(config) if key == "context_length" else value
    if row.kind == "gpt2":
        found["gpt2.feed_forward_length"] = config.n_inner or 4 * config.n_embd
    if row.kind == "distilbert":
        found["bert.attention.layer_norm_epsilon"] = DISTILLED_EPSILON
    if not row.causal:
        found |= {f"{row.name}.attention.causal": False, TOKEN_TYPES: getattr(config, "type_vocab_size", 1)}
    return found | (rope.keys_of(row.name, config) if row.rotary else {})


def _fixed(kind: str, depth: int, width: int, heads: int, head_dim: int) -> Keys:
    """Config attributes that llama.cpp leaves no choice about, for a model of this shape."""
    found = dict(FIXED[kind])
    if kind in EVERY:
        found["query_pre_attn_scalar"] = width // heads if depth == WIDE[kind] else head_dim
        found["layer_types"] = [rope.LOCAL if (i + 1) % EVERY[kind] else rope.GLOBAL for i in range(depth)]
    return found


def _check_fixed(row: Architecture, config: PretrainedConfig) -> None:
    """FormatError for a model that llama.cpp would take for another."""
    shape = config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head_dim_of(config)
    for attribute, meant in _fixed(row.kind, *shape).items():
        value = getattr(config, attribute, None)
        if value is not None and ALIKE.get(str(value), value) != meant:
            message = f"{attribute} = {value!r}, and llama.cpp's {row.name} always has {meant!r}"
            raise FormatError(message, where="config.json", remedy="keep it in another format: it would run wrongly")


def not_kept(config: PretrainedConfig) -> list[str]:
    """What llama.cpp will do otherwise than the config says, and does with its own converter's files too."""
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
    """transformers' config for a file with these keys, shapes of tensors, and tensors of factors (see rope.py).

    CheckpointError for an architecture that is not in the table, or a key that is missing or makes no sense.
    """
    check_is_model(keys, where)
    if keys.get("general.architecture") == VISION:
        message = "the encoder of images (mmproj) of a model, not the model itself"
        remedy = "give the model's own file; `bitwright quantize` makes a smaller mmproj of this one, with --calib none"
        raise CheckpointError(message, where=where, remedy=remedy)
    row = named(keys.get("general.architecture"))
    if row is not None and row.name == "bert" and "token_types.weight" not in tensors:
        row = _distilled(keys, where)
    if row is None:
        known = ", ".join(sorted({row.name for row in ARCHITECTURES.values()}))
        remedy = f"known: {known}; another needs its keys and tensor names in gguf/architectures.py"
        message = f"architecture {keys.get('general.architecture')!r} is not read here"
        raise CheckpointError(message, where=where, remedy=remedy)
    values = {a: _plain(keys[f"{row.name}.{key}"]) for a, key in row.keys if f"{row.name}.{key}" in keys}
    needed = {"block_count", "embedding_length", "attention.head_count"}
    missing = [key for _, key in row.keys if key in needed and f"{row.name}.{key}" not in keys]
    if missing or "token_embd.weight" not in tensors:
        what = f"key {row.name}.{missing[0]}" if missing else "tensor token_embd.weight"
        raise CheckpointError(f"{what} is missing", where=where, remedy="get a good copy")
    depth = values[next(a for a, key in row.keys if key == "block_count")]
    if not isinstance(depth, int) or not 0 < depth <= len(tensors):
        message = f"{depth} blocks are announced, and there are {len(tensors)} tensors"
        raise CheckpointError(message, where=where, remedy="get a good copy")
    values["vocab_size"] = tensors["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    biased = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    values |= biased if row.name in ("llama", "qwen3") else {}
    values |= {"type_vocab_size": keys.get(TOKEN_TYPES, 1)} if row.kind == "bert" else {}
    values |= {attribute: keys.get(f"tokenizer.ggml.{key}") for attribute, key in SPECIAL.items()}
    values |= _ends(keys)
    try:
        return AutoConfig.for_model(row.kind, **values, **_implied(row, values, keys, factors or {}, where))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"its keys make no config of type {row.kind}: {error}", where=where) from error


def _ends(keys: Mapping[str, Any]) -> Keys:
    """What ends what the model says: a token, or several."""
    found = ends_of(keys)
    return {} if not found else {"eos_token_id": found[0] if len(found) == 1 else found}


def _distilled(keys: Mapping[str, Any], where: str) -> Architecture:
    """DistilBERT's row, whose norms have no other epsilon than one. CheckpointError for another."""
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
    """Attributes that follow from several keys, or from none."""
    names = dict(row.keys)
    a = {key: attribute for attribute, key in names.items()}
    depth, width, heads = (values[a[key]] for key in ("block_count", "embedding_length", "attention.head_count"))
    head_dim = values.get("head_dim") or width // heads
    found = _fixed(row.kind, depth, width, heads, head_dim)
    if row.rotary:
        found["rope_parameters"] = rope.parameters_of(row.name, keys, factors, head_dim, where)
    if row.kind == "phi3" and found["rope_parameters"]["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = found["rope_parameters"]["original_max_position_embeddings"]
    return found


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
