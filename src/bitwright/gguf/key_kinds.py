"""What kind of value each GGUF key has: a text, a number, a table. A file with a key of another kind is refused as read."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool | int)


def _are_texts(value: Any) -> bool:
    return (isinstance(value, list) and all(isinstance(item, str) for item in value)) or _is_empty(value)


def _are_integers(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu") or _is_empty(value)


def _are_numbers(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf") or _is_empty(value)


def _is_empty(value: Any) -> bool:
    return isinstance(value, list | np.ndarray) and len(value) == 0


# Patterns of keys -> what they have; of several that match, the first. ARCHITECTURE stands for the file's own.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "general.architecture": ("a text", _is_text), "general.name": ("a text", _is_text), "general.type": ("a text", _is_text),
    "split.*": ("an integer", _is_integer),
    "tokenizer.chat_templates": ("texts", _are_texts), "tokenizer.chat_template*": ("a text", _is_text),
    "tokenizer.ggml.model": ("a text", _is_text), "tokenizer.ggml.pre": ("a text", _is_text),
    "tokenizer.ggml.tokens": ("texts", _are_texts), "tokenizer.ggml.merges": ("texts", _are_texts),
    "tokenizer.ggml.token_type": ("integers", _are_integers), "tokenizer.ggml.scores": ("numbers", _are_numbers),
    "tokenizer.ggml.precompiled_charsmap": ("integers", _are_integers),
    "tokenizer.ggml.token_type_count": ("an integer", _is_integer), "tokenizer.ggml.*_token_id": ("an integer", _is_integer),
    "tokenizer.ggml.add_*": ("true or false", _is_switch),
    "tokenizer.ggml.remove_extra_whitespaces": ("true or false", _is_switch),
    "tokenizer.ggml.normalizer.*": ("true or false", _is_switch),
    "ARCHITECTURE.expert_count": ("an integer", _is_integer), "ARCHITECTURE.block_count": ("an integer", _is_integer),
    "ARCHITECTURE.embedding_length": ("an integer", _is_integer), "ARCHITECTURE.context_length": ("an integer", _is_integer),
    "ARCHITECTURE.ssm.dt_b_c_rms": ("true or false", _is_switch), "ARCHITECTURE.ssm.*": ("an integer", _is_integer),
    "ARCHITECTURE.expert_gating_func": ("an integer", _is_integer),
    "ARCHITECTURE.expert_shared_feed_forward_length": ("an integer", _is_integer),
    "ARCHITECTURE.attention.sliding_window": ("an integer", _is_integer),
    "ARCHITECTURE.nextn_predict_layers": ("an integer", _is_integer),
    "ARCHITECTURE.rope.scaling.type": ("a text", _is_text),
    "ARCHITECTURE.rope.scaling.finetuned": ("true or false", _is_switch),
    "ARCHITECTURE.rope.*sections": ("integers", _are_integers), "ARCHITECTURE.rope.*": ("a number", _is_number),
}  # fmt: skip


def of_wrong_kind(keys: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first key of another kind than llama.cpp takes it for, and that kind; None if there is none."""
    own = f"{keys.get('general.architecture')}."
    for name, value in keys.items():
        called = f"ARCHITECTURE.{name.removeprefix(own)}" if name.startswith(own) else name
        for pattern, (kind, fits) in KINDS.items():
            if called == pattern or fnmatchcase(called, pattern):
                if not fits(value):
                    return name, kind
                break
    return None
