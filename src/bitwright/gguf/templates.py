"""Chat templates (Jinja) as GGUF keys, and back: a default one, and others by name, such as `tool_use` and `rag`."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitwright.errors import FormatError

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


def read_templates(keys: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The tokenizer's chat_template for a file's keys: a text, texts by name, or None."""
    named = {
        name.removeprefix(f"{KEY}."): text
        for name, text in keys.items()
        if name.startswith(f"{KEY}.") and isinstance(text, str)
    }
    plain = keys.get(KEY)
    if not named:
        return plain if isinstance(plain, str) else None
    return ({DEFAULT: plain} if isinstance(plain, str) else {}) | named
