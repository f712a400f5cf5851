"""Convert transformers' configs to GGUF keys, and back, by the rows of architectures.py.

What llama.cpp fixes in its code: fixed_keys.py. Source: llama.cpp's converter (conversion/*.py) and its models
(src/models/*.cpp).
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
    EXPERTS_USED,
    FORMS,
    VISION,
    Architecture,
    check_is_model,
    named,
    needed_for,
)
from bitwright.gguf.expert_counts import check_experts
from bitwright.gguf.fixed_keys import check_fixed, check_heads, fixed_of
from bitwright.gguf.reader import ENTRIES
from bitwright.gguf.rope import head_dim_of
from bitwright.gguf.special_keys import DISTILLED_EPSILON, READ, SIGMOID, WRITTEN
from bitwright.gguf.special_tokens import ends_of

Keys = dict[str, Any]

BY_NAME = "bitwright quantize --calib none --method search makes a smaller file of it all the same"
TOKEN_TYPES = "tokenizer.ggml.token_type_count"
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
# Keys without which llama.cpp loads no model that has them.
NEEDED = (
    "block_count", "embedding_length", "attention.head_count", "context_length", EXPERTS_USED,
    "ssm.conv_kernel", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
)  # fmt: skip
WINDOW = ("attention.sliding_window",)
# The same of some models alone.
NEEDED_BY = {"gemma3n_text": WINDOW, "gemma4_text": WINDOW, "gpt_oss": WINDOW, "cohere2": (*WINDOW, "logit_scale")}
# What llama.cpp takes for keys that are missing, where transformers takes something else.
ABSENT: Keys = {
    "expert_weights_norm": False, "expert_weights_scale": 1.0, "expert_group_count": 1, "expert_group_used_count": 1,
    "logit_scale": 1.0,
}  # fmt: skip
UNSET = (
    "attention.scale",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "expert_weights_scale",
)  # 0 is as no key
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
    check_fixed(row, config)
    found: Keys = {"general.architecture": row.name}
    for attribute, key in row.keys:
        value = head_dim_of(config) if attribute == "head_dim" else getattr(config, attribute, None)
        if value is not None:
            found[f"{row.name}.{key}"] = value - first_position(config) if key == "context_length" else value
    found |= {f"{row.name}.{key}": value for key, value in row.constant}
    if row.kind in WRITTEN:
        more = {key: value for key, value in WRITTEN[row.kind](config).items() if value is not None}
        found |= {key if key in ENTRIES else f"{row.name}.{key}": value for key, value in more.items()}
    check_heads(row, config, found)
    if not row.causal:
        found |= {f"{row.name}.attention.causal": False, TOKEN_TYPES: getattr(config, "type_vocab_size", 1)}
    return found | (rope.keys_of(row.name, config) if row.rotary else {})


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
    check_is_model(keys, tensors, where)
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
    if row.causal and keys.get(f"{row.name}.attention.causal") is False:
        message = "each token attends to later ones too (attention.causal), which its architecture does not do here"
        raise CheckpointError(message, where=where, remedy=BY_NAME)
    values = {a: _one(keys, f"{row.name}.{key}", where) for a, key in row.keys if _given(keys, row, key)}
    _check_depth(row, values, keys, tensors, where)
    check_experts(keys, tensors, where)
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


def _given(keys: Mapping[str, Any], row: Architecture, key: str) -> bool:
    """Whether a file has a key of its architecture, with a value that counts."""
    value = keys.get(f"{row.name}.{key}")
    return value is not None and not (key in UNSET and _plain(value) == 0)


def _check_depth(
    row: Architecture, values: Keys, keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """CheckpointError for a file without its most important keys, or with more blocks than tensors.

    Blocks of multi-token prediction, which block_count includes, are taken off in `values`.
    """
    spared = () if keys.get(f"{row.name}.{EXPERT_COUNT}") else (EXPERTS_USED,)
    needed = {*NEEDED, *NEEDED_BY.get(row.kind, ())} - {*spared}
    missing = [key for attribute, key in row.keys if key in needed and attribute not in values]
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
    found = fixed_of(row.kind, depth, width, heads, head_dim)
    found |= {attribute: ABSENT[key] for attribute, key in row.keys if key in ABSENT}
    if "attention.head_count_kv" in a and heads:
        found[a["attention.head_count_kv"]] = heads
    if "head_dim" in names and head_dim:
        found["head_dim"] = head_dim
    if "attention_multiplier" in names and head_dim:
        found["attention_multiplier"] = head_dim**-0.5
    if row.rotary:
        found["rope_parameters"] = rope.parameters_of(row.name, keys, factors, head_dim, where)
    if row.kind == "phi3" and found["rope_parameters"]["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = found["rope_parameters"]["original_max_position_embeddings"]
    return found


def _one(keys: Mapping[str, Any], key: str, where: str) -> Any:
    """A key's value, or that of all its entries. CheckpointError where they differ from layer to layer."""
    found = _plain(keys[key])
    if not isinstance(found, list) or not found:
        return found
    if len({str(value) for value in found}) > 1:  # arrays, in a damaged file
        raise CheckpointError(f"{key} differs from layer to layer: {found}", where=where, remedy=BY_NAME)
    return found[0]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
