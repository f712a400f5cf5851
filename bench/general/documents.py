"""Documents as the text holds them, and which of them are taken."""

import random
import re
from typing import Any

from bench.general.cleaning import sections, tidy

Document = dict[str, Any]  # kind, language, and text or turns
LONG, MIDDLE = 8000, 5500  # characters


def texts_of(kind: str, text: str, *, language: str = "en", most: int = MIDDLE, least: int = 600) -> list[Document]:
    """A long text as documents of at most about so many characters; what is too short to say anything is left out."""
    parts = [tidy(part) for part in sections(text, most)]
    return [{"kind": kind, "language": language, "text": part} for part in parts if len(part) >= least]


def dialogue(turns: list[str], *, language: str = "en") -> Document:
    """Turns that begin with the user's."""
    roles = ("user", "assistant")
    return {
        "kind": "dialogue",
        "language": language,
        "turns": [{"role": roles[i % 2], "content": tidy(turn)} for i, turn in enumerate(turns)],
    }


def size(document: Document) -> int:
    """Bytes of a document's words."""
    words = document.get("text") or "".join(turn["content"] for turn in document["turns"])
    return len(words.encode())


def chosen(documents: list[Document], budget: int, seed: str) -> list[Document]:
    """Documents that come to about so many bytes, picked evenly at random, in their own order."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    taken: list[int] = []
    for i in order:
        if budget > 0 and size(documents[i]) < 1.5 * budget + 2000:
            taken.append(i)
            budget -= size(documents[i])
    return [documents[i] for i in sorted(taken)]


def is_clean(text: str) -> bool:
    """Whether a text bears no traces of markup, of addresses, or of the notes on who may copy it."""
    traces = r"</?[a-z]+[^>\n]*>|\{\{|\[\[|copyright|all rights reserved|project gutenberg|licen[cs]ed under|�"
    return not re.search(traces, text, re.IGNORECASE)


def is_english(text: str) -> bool:
    """Whether a paragraph reads as English, by its small words."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    small = sum(
        word in {"the", "and", "you", "your", "of", "is", "this", "to", "that", "are", "with", "for"} for word in words
    )
    return small >= 3 and small > 0.12 * len(words)
