"""What a GGUF file says of itself: its architecture, tokenizer, chat templates, every key, and each tensor's block type."""

from collections import Counter
from math import isfinite
from typing import Any

import numpy as np

from bitwright.gguf.reader import GgufFile
from bitwright.gguf.templates import DEFAULT, KEY, read_templates

SHOWN = 4  # entries of an array
LONGEST = 160  # characters of a text
FAMILIES = {
    "gpt2": "byte-level BPE", "gemma4": "BPE over characters with byte fallback", "llama": "SentencePiece (BPE)",
    "t5": "SentencePiece (Unigram)", "bert": "WordPiece", "rwkv": "RWKV", "plamo2": "PLaMo-2", "none": "none",
    "no_vocab": "none",
}  # fmt: skip


def described(file: GgufFile) -> dict[str, Any]:
    """{architecture, tokenizer, templates, types, keys}: `tokenizer` is {family, kind, pre, tokens} or None; `types` counts
    tensors by block type; long texts and arrays in `keys` are abbreviated."""
    return {
        "architecture": str(file.keys.get("general.architecture", "")),
        "tokenizer": _tokenizer(file.keys),
        "templates": _templates(file.keys),
        "types": dict(Counter(t.type.name.lower() for t in file.tensors.values()).most_common()),
        "keys": {_readable(name): abbreviated(value) for name, value in file.keys.items()},
    }


def _tokenizer(keys: dict[str, Any]) -> dict[str, Any] | None:
    family, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens")
    if family is None:
        return None
    count = len(tokens) if isinstance(tokens, list | np.ndarray) else 0
    pre = keys.get("tokenizer.ggml.pre")
    kind = FAMILIES.get(str(family), "unknown")
    return {"family": str(family), "kind": kind, "pre": None if pre is None else str(pre), "tokens": count}


def _templates(keys: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name."""
    found = read_templates(keys)
    named = {} if found is None else {DEFAULT: found} if isinstance(found, str) else found
    return {_readable(name): _readable(text) for name, text in named.items()}


def _readable(text: str) -> str:
    """A text with question marks for bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


def abbreviated(value: Any) -> Any:
    """A key's value as plain data; of a long array the first entries and the number of all, of a long text its beginning."""
    if isinstance(value, str):
        text = _readable(value)
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # JSON has no such number
    if not isinstance(value, list | np.ndarray):
        return value
    some = [abbreviated(entry) for entry in value[:SHOWN]]
    return some if len(value) <= SHOWN else [*some, f"… {len(value):,} in all"]


def lines(found: dict[str, Any]) -> list[str]:
    """What `described` gives, for people: first what matters, then key by key."""
    tokenizer = found["tokenizer"]
    said = [f"architecture: {found['architecture']}"]
    if tokenizer is None:
        said.append("tokenizer: none in the file")
    else:
        pre = "" if tokenizer["pre"] is None else f", pre-tokenizer {tokenizer['pre']}"
        said.append(f"tokenizer: {tokenizer['kind']} ({tokenizer['family']}{pre}), {tokenizer['tokens']:,} tokens")
    named = [f"{name} ({len(text):,} characters)" for name, text in found["templates"].items()]
    said.append(f"chat templates: {', '.join(named) or 'none'}")
    said.append("types: " + ", ".join(f"{count} {kind}" for kind, count in found["types"].items()))
    return [*said, *(f"{name} = {_text(value)}" for name, value in found["keys"].items() if not name.startswith(KEY))]


def _text(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, list):
        return f"[{', '.join(_text(entry) for entry in value)}]"
    return repr(value)[1:-1] if isinstance(value, str) else str(value)
