"""Chat templates (Jinja) as GGUF keys, and back: a default one, and others by name, such as `tool_use` and `rag`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitwright.errors import CheckpointError, FormatError

KEY = "tokenizer.chat_template"
NAMES = "tokenizer.chat_templates"
DEFAULT = "default"


def template_keys(found: object, where: str) -> dict[str, Any]:
    """The keys for a tokenizer's chat_template: a text, texts by name, or None. FormatError for one that is not valid Jinja."""
    named = {DEFAULT: found} if isinstance(found, str) else dict(found) if isinstance(found, Mapping) else {}
    for name, text in named.items():
        _check(str(name), text, where)
    keys: dict[str, Any] = {KEY: named[DEFAULT]} if DEFAULT in named else {}
    others = sorted(name for name in named if name != DEFAULT)
    return keys | ({NAMES: others} if others else {}) | {f"{KEY}.{name}": named[name] for name in others}


def _check(name: str, text: object, where: str) -> None:
    """FormatError for a template that transformers could not parse either."""
    try:
        if not isinstance(text, str):
            raise TemplateSyntaxError("not a text", 1)
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(_without_generation(text))
    except TemplateSyntaxError as error:
        remedy = "mend it, or take it out of chat_template.jinja or tokenizer_config.json"
        message = f"the chat template {name!r} is no Jinja: {error.message} (line {error.lineno})"
        raise FormatError(message, where=where, remedy=remedy) from error


def _without_generation(text: str) -> str:
    """Remove transformers' own tags {% generation %}, which mark the assistant's tokens for training."""
    for tag in ("generation", "endgeneration"):
        for open_, close in (("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")):
            text = text.replace(f"{open_} {tag} {close}", "")
    return text


def check_names(source: Path) -> None:
    """FormatError for two chat templates of one name in a directory: which one is meant is not known."""
    file = source / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    names = [str(one.get("name")) for one in said if isinstance(one, Mapping)] if isinstance(said, list) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        remedy = "take one of them out of chat_template, or give it another name"
        raise FormatError(f"two chat templates are named {twice!r}", where=str(file), remedy=remedy)


def read_templates(keys: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The tokenizer's chat_template for a file's keys: a text, texts by name, or None. CheckpointError for two default ones."""
    named = {
        name.removeprefix(f"{KEY}."): text
        for name, text in keys.items()
        if name.startswith(f"{KEY}.") and isinstance(text, str)
    }
    plain = keys.get(KEY)
    if isinstance(plain, str) and named.get(DEFAULT, plain) != plain:
        remedy = f"remove one of the two keys: gguf-new-metadata --remove-metadata {KEY}.{DEFAULT} IN.gguf OUT.gguf"
        message = f"two chat templates are the default one: {KEY} and {KEY}.{DEFAULT} differ"
        raise CheckpointError(message, where=KEY, remedy=remedy)
    if not named:
        return plain if isinstance(plain, str) else None
    return ({DEFAULT: plain} if isinstance(plain, str) else {}) | named
