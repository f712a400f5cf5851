"""The architectures that transformers and llama.cpp both know: how the keys, names and tensors of one become the other's.

A table row says which config attribute is which key; it is read in both directions. Three things differ in the tensors:
llama.cpp turns Llama's q and k rows so that a rotary pair lies side by side, stores Gemma's norms as 1 + w, and has no
transposed matrices. Tensor names are the gguf package's. Source: llama.cpp's converter (conversion/*.py).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from bitwright.errors import CheckpointError, FormatError

Keys = dict[str, Any]

SHAPE = (
    ("max_position_embeddings", "context_length"), ("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count"),
    ("intermediate_size", "feed_forward_length"), ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
)  # fmt: skip
RMS = (("rms_norm_eps", "attention.layer_norm_rms_epsilon"),)
HEADS = (("head_dim", "attention.key_length"), ("head_dim", "attention.value_length"))
LLAMA = (*SHAPE, *RMS, *HEADS, ("vocab_size", "vocab_size"))
SOFT_CAPS = (
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
GPT2 = (
    ("n_positions", "context_length"), ("n_embd", "embedding_length"), ("n_layer", "block_count"),
    ("n_head", "attention.head_count"), ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A row of the table. `kind`: transformers' model_type; `name`: llama.cpp's architecture.

    keys     (config attribute, key without the architecture's prefix), both ways
    rotary   whether positions are rotary; pairs: whether q's and k's rows are turned, so that pairs are neighbours
    shifted  whether norms are stored as 1 + w
    """

    kind: str
    name: str
    keys: tuple[tuple[str, str], ...]
    rotary: bool = True
    pairs: bool = False
    shifted: bool = False


ARCHITECTURES = {
    row.kind: row
    for row in (
        Architecture("llama", "llama", LLAMA, pairs=True),
        Architecture("mistral", "llama", LLAMA, pairs=True),
        Architecture("qwen2", "qwen2", (*SHAPE, *RMS)),
        Architecture("qwen3", "qwen3", (*SHAPE, *RMS, *HEADS)),
        Architecture("phi3", "phi3", (*SHAPE, *RMS, ("sliding_window", "attention.sliding_window"))),
        Architecture("gemma", "gemma", (*SHAPE, *RMS, *HEADS), shifted=True),
        Architecture(
            "gemma2", "gemma2", (*SHAPE, *RMS, *HEADS, *SOFT_CAPS, ("sliding_window", "attention.sliding_window")),
            shifted=True,
        ),
        Architecture("gpt2", "gpt2", GPT2, rotary=False),
        Architecture("starcoder2", "starcoder2", (*SHAPE, ("norm_epsilon", "attention.layer_norm_epsilon"))),
    )
}  # fmt: skip
ROPES = {"linear": "linear", "yarn": "yarn"}  # as transformers and llama.cpp call them; "llama3" is a tensor of factors
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D
SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
FACTORS = "rope_freqs.weight"
# As the code of the model has them, whatever its config says: nothing to store.
FIXED: dict[str, dict[str, Any]] = {"gemma": {"hidden_activation": "gelu_pytorch_tanh"}}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row for a model. FormatError for one that is not in the table."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(ARCHITECTURES)
        message = f"models of type {config.model_type!r} cannot be written as GGUF here"
        remedy = f"known: {known}; or convert it by llama.cpp's own converter, and give that file"
        raise FormatError(message, remedy=remedy)
    return row


def keys_of(config: PretrainedConfig) -> Keys:
    """The model's keys and values but those of the tokenizer. FormatError for what the architecture cannot express."""
    row = architecture_of(config)
    found: Keys = {"general.architecture": row.name}
    for attribute, key in row.keys:
        value = getattr(config, attribute, None)
        if attribute == "head_dim" and value is None:
            value = config.hidden_size // config.num_attention_heads
        if value is not None:
            found[f"{row.name}.{key}"] = value
    if row.kind == "gpt2":
        found["gpt2.feed_forward_length"] = config.n_inner or 4 * config.n_embd
    return found | (_rope_keys(row.name, config) if row.rotary else {})


def head_dim_of(config: PretrainedConfig) -> int:
    """Channels of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope_keys(name: str, config: PretrainedConfig) -> Keys:
    """How positions are rotated."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    keys: Keys = {
        f"{name}.rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        f"{name}.rope.dimension_count": int(head_dim_of(config) * share),
    }
    if kind in ROPES:
        keys |= {f"{name}.rope.scaling.type": ROPES[kind], f"{name}.rope.scaling.factor": float(rope["factor"])}
        if "original_max_position_embeddings" in rope:
            keys[f"{name}.rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    elif kind not in ("default", "llama3"):
        raise FormatError(
            f"positions of rope type {kind!r} cannot be written as GGUF here", remedy="default, linear, yarn, llama3"
        )
    return keys


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What Llama 3 divides each frequency by, [head_dim / 2] float32; None for models that scale otherwise, or not."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim, factor = head_dim_of(config), rope["factor"]
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)  # 0: divided by the factor; 1: as it was
    return (1 / ((1 - smooth) / factor + smooth)).float()


def config_of(keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str) -> PretrainedConfig:
    """transformers' config for a file with these keys and shapes of tensors.

    CheckpointError for an architecture that is not in the table, or a key that is missing or makes no sense.
    """
    name = keys.get("general.architecture")
    row = next((row for row in ARCHITECTURES.values() if row.name == name), None)
    if row is None:
        known = ", ".join(sorted({row.name for row in ARCHITECTURES.values()}))
        raise CheckpointError(f"architecture {name!r} is not read here", where=where, remedy=f"known: {known}")
    values = {a: _plain(keys[f"{row.name}.{key}"]) for a, key in row.keys if f"{row.name}.{key}" in keys}
    needed = {"block_count", "embedding_length", "attention.head_count"}
    missing = [key for _, key in row.keys if key in needed and f"{row.name}.{key}" not in keys]
    if missing or "token_embd.weight" not in tensors:
        what = f"key {row.name}.{missing[0]}" if missing else "tensor token_embd.weight"
        raise CheckpointError(f"{what} is missing", where=where, remedy="get a good copy")
    values["vocab_size"] = tensors["token_embd.weight"][0]
    values["tie_word_embeddings"] = "output.weight" not in tensors
    if row.rotary:
        values["rope_parameters"] = _rope_of(row.name, keys, values, tensors)
    biased = {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    values |= biased if row.name in ("llama", "qwen3") else {}
    values |= {attribute: keys.get(f"tokenizer.ggml.{key}") for attribute, key in SPECIAL.items()}
    try:
        return AutoConfig.for_model(row.kind, **values, **FIXED.get(row.kind, {}))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"its keys make no config of type {row.kind}: {error}", where=where) from error


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _rope_of(name: str, keys: Mapping[str, Any], values: Keys, tensors: Mapping[str, tuple[int, ...]]) -> Keys:
    """transformers' rope_parameters. Factors of frequencies (Llama 3) are read from their tensor, see `Skeleton`."""
    rope: Keys = {"rope_type": "default", "rope_theta": keys.get(f"{name}.rope.freq_base", 10000.0)}
    kind = keys.get(f"{name}.rope.scaling.type", "none")
    if kind in ROPES:
        rope |= {"rope_type": kind, "factor": keys.get(f"{name}.rope.scaling.factor", 1.0)}
        original = keys.get(f"{name}.rope.scaling.original_context_length")
        rope |= {} if original is None else {"original_max_position_embeddings": original}
    return rope


# ------------------------------------------------------------------------------------------------------------- tensors


class Names:
    """Parameter names of transformers and llama.cpp, one to one, for one model."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.row, self.config = architecture_of(config), config
        kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == self.row.name)
        self._map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def of(self, parameter: str) -> str:
        """llama.cpp's name. FormatError for a tensor that its architecture does not have."""
        found = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            remedy = "keep to the architecture's own tensors"
            raise FormatError(
                f"architecture {self.row.name} of llama.cpp has no such tensor", where=parameter, remedy=remedy
            )
        return str(found)

    def rows(self, parameter: str, N: int) -> Tensor | None:
        """Where each of N output rows is taken from when it is written; None: they stay."""
        leaf = parameter.rpartition(".")[0].rpartition(".")[2]
        if not self.row.pairs or leaf not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if leaf == "q_proj" else self.config.num_key_value_heads
        return torch.arange(N).view(heads, 2, N // heads // 2).transpose(1, 2).reshape(N)

    def written(self, parameter: str, tensor: Tensor) -> Tensor:
        """A float tensor as llama.cpp has it: turned, shifted; vectors in float32."""
        tensor = tensor.T if self._is_transposed(parameter) else tensor
        order = self.rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order]
        tensor = tensor.float() if tensor.ndim == 1 else tensor
        return tensor + 1 if self._is_shifted(parameter) else tensor

    def read(self, parameter: str, tensor: Tensor) -> Tensor:
        """Undoes `written`."""
        tensor = tensor - 1 if self._is_shifted(parameter) else tensor
        order = self.rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order.argsort()]
        return tensor.T if self._is_transposed(parameter) else tensor

    def shape(self, parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that transformers gives to a tensor of that shape in the file."""
        return shape[::-1] if self._is_transposed(parameter) else shape

    def _is_transposed(self, parameter: str) -> bool:
        return self.row.kind == "gpt2" and parameter.endswith(TRANSPOSED)

    def _is_shifted(self, parameter: str) -> bool:
        return self.row.shifted and parameter.endswith("norm.weight")
