"""The calibration text `general`: prose, dialogues and source code in many languages, which comes with the package.

`data/general.jsonl.xz` holds its documents, one a line, as JSON; `data/SOURCES.md` says where they are from, and
`bench/make_general_text.py` makes both.
"""

import json
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.calibration.chat_template import templated
from bitwright.errors import InputError

FILE = Path(__file__).parents[1] / "data" / "general.jsonl.xz"
Turns = list[dict[str, str]]  # role ("user", then "assistant", in turn) and content
PROBE = [{"role": role, "content": f"{word}."} for role, word in zip(("user", "assistant") * 2, "abcd", strict=True)]
NO_TEMPLATE = (
    "the tokenizer's chat template renders no dialogue of text: those of `general` are read as plain paragraphs"
)


@dataclass(frozen=True)
class Document:
    """One document: kind, language and source as in the file; its text, or the turns of a dialogue."""

    kind: str
    language: str
    source: str
    text: str
    turns: tuple[tuple[str, str], ...] = ()

    def plain(self) -> str:
        """The text; a dialogue as paragraphs, each beginning with its speaker."""
        if not self.turns:
            return f"{self.text}\n\n"
        return "".join(f"{role.capitalize()}: {content}\n\n" for role, content in self.turns)

    def chat(self, tokenizer: Any) -> str:
        """The text; a dialogue in the tokenizer's chat template, without a leading BOS token."""
        if not self.turns:
            return self.plain()
        return _rendered(tokenizer, [{"role": role, "content": content} for role, content in self.turns])


def documents() -> tuple[Document, ...]:
    """All documents, source by source."""
    lines = lzma.decompress(FILE.read_bytes()).decode("utf-8").rstrip("\n").split("\n")
    return tuple(_document(json.loads(line)) for line in lines)


def _document(d: dict[str, Any]) -> Document:
    turns = tuple((turn["role"], turn["content"]) for turn in d.get("turns", ()))
    return Document(d["kind"], d["language"], d["source"], d.get("text", ""), turns)


def mixed_documents() -> list[Document]:
    """All documents, kinds and languages mixed."""
    found = documents()
    return [found[i] for i in spread([_keys(d) for d in found], seed=0)]


def plain_text() -> str:
    """The whole text, kinds and languages mixed."""
    return "".join(document.plain() for document in mixed_documents())


def general_pieces(tokenizer: Any, *, size: int, vocabulary: int, seed: int) -> tuple[list[str], tuple[str, ...]]:
    """The text in pieces of about `size` characters at most, in a seeded order, kinds and languages evenly mixed; and a note
    where the tokenizer's chat template cannot be used with the model's vocabulary."""
    chats = _chats(tokenizer, vocabulary)
    pieces, keys = list[str](), list[tuple[str, ...]]()
    for document in documents():
        cut = cut_at_lines(document.chat(tokenizer) if chats else document.plain(), size)
        pieces += cut
        keys += [_keys(document)] * len(cut)
    notes = (NO_TEMPLATE,) if tokenizer.chat_template and not chats else ()
    return [pieces[i] for i in spread(keys, seed=seed)], notes


def _keys(document: Document) -> tuple[str, ...]:
    return document.kind, document.language, document.source


def spread(keys: Sequence[tuple[str, ...]], *, seed: int) -> list[int]:
    """A random order in which any stretch of items holds each kind in about its overall share.

    keys: each item's kind, from the coarsest distinction to the finest. Within a kind the order is random; item i of n stands
    at (i + u) / n of the way, with one random u a kind (systematic sampling).
    """
    chance = random.Random(seed)

    def mixed(items: list[int], depth: int) -> list[int]:
        if depth == len(keys[items[0]]):
            chance.shuffle(items)
            return items
        kinds: dict[str, list[int]] = {}
        for i in items:
            kinds.setdefault(keys[i][depth], []).append(i)
        places = []
        for members in kinds.values():
            u = chance.random()
            places += [((i + u) / len(members), item) for i, item in enumerate(mixed(members, depth + 1))]
        return [item for _, item in sorted(places)]

    return mixed(list(range(len(keys))), 0) if keys else []


def cut_at_lines(text: str, size: int) -> list[str]:
    """The text in pieces of about `size` characters, cut after a line's end where there is one."""
    pieces, at = [], 0
    while at < len(text):
        end = min(at + size, len(text))
        if end < len(text):
            end = next((cut + 1 for mark in ("\n", " ") if (cut := text.rfind(mark, at, end)) >= at), end)
        pieces.append(text[at:end])
        at = end
    return pieces


def _chats(tokenizer: Any, vocabulary: int) -> bool:
    """Whether the tokenizer's chat template renders four turns completely, in tokens of the model's vocabulary."""
    if not tokenizer.chat_template:
        return False
    try:
        text = _rendered(tokenizer, PROBE)
    except InputError:  # refuses roles or plain strings, or is no Jinja; several templates, none the default
        return False
    known = max(tokenizer(text, add_special_tokens=False)["input_ids"], default=0) < vocabulary
    return known and all(turn["content"] in text for turn in PROBE)


def _rendered(tokenizer: Any, turns: Turns) -> str:
    text = templated(tokenizer, turns, where="general", remedy="--calib stdlib, or a text: they need no template")
    return text.removeprefix(tokenizer.bos_token or "")
