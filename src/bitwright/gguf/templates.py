"""Chat templates (Jinja) as GGUF keys, and back: a default one, and others by name, such as `tool_use` and `rag`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bitwright.errors import CheckpointError, FormatError

KEY = "tokenizer.chat_template"
NAMES = "tokenizer.chat_templates"
DEFAULT = "default"
FILE_NAME = re.compile(r"[\w.+@ -]{1,60}")
CONFIG = "tokenizer_config.json"
FOLDER = "additional_chat_templates"  # a checkpoint's templates of other names, one a file


class _Generation(Extension):
    """transformers' own tags {% generation %} … {% endgeneration %}, which mark the assistant's tokens for training."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_keys(found: object, where: str) -> dict[str, Any]:
    """The keys for a tokenizer's chat_template: a text, texts by name, or None. FormatError for one that is not valid Jinja."""
    named = dict(found) if isinstance(found, Mapping) else {} if found is None else {DEFAULT: found}
    for name, text in named.items():
        _check(name, text, where)
    keys: dict[str, Any] = {KEY: named[DEFAULT]} if DEFAULT in named else {}
    others = sorted(name for name in named if name != DEFAULT)
    return keys | ({NAMES: others} if others else {}) | {f"{KEY}.{name}": named[name] for name in others}


def _check(name: object, text: object, where: str) -> None:
    """FormatError for a template without a name, or one that transformers could not compile either."""
    remedy = "mend it, or take it out of chat_template.jinja or tokenizer_config.json"
    if not isinstance(name, str):
        raise FormatError(f"a chat template has the name {name!r}, which is no text", where=where, remedy=remedy)
    try:
        if not isinstance(text, str):
            raise TemplateSyntaxError("not a text", 1)
        text.encode()
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation]).compile(text)
    except TemplateSyntaxError as error:
        message = f"the chat template {name!r} is no Jinja: {error.message} (line {error.lineno})"
        raise FormatError(message, where=where, remedy=remedy) from error
    except (SyntaxError, RecursionError, UnicodeEncodeError) as error:
        deep = isinstance(error, RecursionError) or "too many" in str(error)
        reason = (
            "it is no UTF-8" if isinstance(error, UnicodeEncodeError) else "it is nested too deeply" if deep else error
        )
        raise FormatError(f"the chat template {name!r} is no Jinja: {reason}", where=where, remedy=remedy) from error


def check_files(found: str | Mapping[str, str] | None, where: str) -> None:
    """FormatError for chat templates of a GGUF file that a directory cannot hold: no Jinja, or a name that no file can have."""
    try:
        template_keys(found, where)
    except FormatError as error:
        remedy = "give another one: gguf-new-metadata --chat-template-file chat_template.jinja IN.gguf OUT.gguf; "
        remedy += f"or remove one with a name of its own: --remove-metadata {KEY}.NAME"
        raise FormatError(error.message, where=where, remedy=remedy) from error
    named = found if isinstance(found, Mapping) else {}
    odd = next((name for name in named if not FILE_NAME.fullmatch(name)), None)
    if odd is not None:
        remedy = f"remove it: gguf-new-metadata --remove-metadata '{KEY}.{odd}' IN.gguf OUT.gguf"
        raise FormatError(f"a chat template is named {odd!r}, and no file can be", where=where, remedy=remedy)


def check_form(source: Path) -> None:
    """FormatError for a list of chat templates in a directory whose entries are no {"name": TEXT, "template": TEXT}."""
    for entry in _listed(source):
        if not isinstance(entry, Mapping) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            message = f"{str(entry)[:80]!r} in chat_template is not a name and a template"
            remedy = 'write {"name": "default", "template": "..."} there, or a text in the place of the list'
            raise FormatError(message, where=str(source / CONFIG), remedy=remedy)


def check_names(source: Path) -> None:
    """FormatError for two chat templates of one name in a directory: which one is meant is not known."""
    names = [str(entry.get("name")) for entry in _listed(source)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        remedy = "take one of them out of chat_template, or give it another name"
        raise FormatError(f"two chat templates are named {twice!r}", where=str(source / CONFIG), remedy=remedy)
    second = source / FOLDER / f"{DEFAULT}.jinja"
    if second.is_file() and (source / "chat_template.jinja").is_file():
        message = f"two chat templates are named {DEFAULT!r}: chat_template.jinja, and this one"
        raise FormatError(message, where=str(second), remedy="remove one of them, or give this one another name")


def _listed(source: Path) -> list[Any]:
    """The entries of chat_template in tokenizer_config.json, if it is a list."""
    file = source / CONFIG
    said = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.is_file() else None
    return said if isinstance(said, list) else []


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
