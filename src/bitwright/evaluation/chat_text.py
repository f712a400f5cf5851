"""Conversations in the tokenizer's chat template -> token windows [W, T]: the text that a chat model is used on.

What quantization costs such a model should be measured there.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.data_sets import LINE, Conversation, entries, is_data_set, rendered
from bitwright.calibration.windows import check_ids, opening, read_text, too_short
from bitwright.errors import CalibrationError, InputError


def chat_windows(
    tokenizer: Any, source: str, *, seqlen: int, vocabulary: int, where: Path, most: int | None = None
) -> Tensor:
    """The whole, non-overlapping windows of a text's conversations in order, `most` of them at most: token ids [W, seqlen].

    As for plain text (see `windows`) every window begins with the tokenizer's BOS token; once only, where a conversation in the
    template begins with it too. where: the model, for errors. InputError if it has no chat template, or the template refuses a
    conversation; CalibrationError as of `windows` and `conversations`.
    """
    if not tokenizer.chat_template:
        remedy = "leave out --chat, or put the model's chat_template.jinja there"
        raise InputError("the model has no chat template", where=str(where), remedy=remedy)
    tokenizer.model_max_length = int(1e30)  # no warning for a text longer than the model's context: it is cut here
    ids: list[int] = []
    for number, conversation in enumerate(conversations(source), 1):
        if most is not None and len(ids) >= most * seqlen:
            break
        text = rendered(tokenizer, conversation, f"{source}, conversation {number}")
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = _rows(ids, opening(tokenizer), seqlen)[:most]
    if not rows:
        raise too_short(len(ids), seqlen, source)
    found = torch.tensor(rows)
    check_ids(tokenizer, found, vocabulary)
    return found


def conversations(source: str) -> list[Conversation]:
    """The conversations in a text.

    Those of a data set (see data_sets.py). Of any other text, paragraphs take turns: each two are a user's message and the
    assistant's answer. CalibrationError as of `read_text` and `entries`, and for a data set with texts in it.
    """
    if is_data_set(source):
        return conversations_alone(entries(source), source)
    said = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", read_text(source)) if paragraph.strip()]
    return [_turns(said[i : i + 2]) for i in range(0, len(said), 2)]


def conversations_alone(found: list[str | Conversation], source: str) -> list[Conversation]:
    """The entries of a data set. CalibrationError if one of them is a text."""
    number = next((i for i, entry in enumerate(found, 1) if isinstance(entry, str)), 0)
    if number:
        message = f"entry {number} is a text, not a conversation"
        raise CalibrationError(message, where=source, remedy=f"texts in a file of their own; here {LINE}")
    return [entry for entry in found if not isinstance(entry, str)]


def _turns(said: list[str]) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([{"role": role, "content": text} for role, text in zip(roles, said, strict=False)])


def _rows(ids: list[int], start: list[int], seqlen: int) -> list[list[int]]:
    """Whole windows of a stream of tokens, with `start` before each that does not already begin with it."""
    rows, at = list[list[int]](), 0
    while len(start) < seqlen:
        lead = [] if ids[at : at + len(start)] == start else start
        row = [*lead, *ids[at : at + seqlen - len(lead)]]
        if len(row) < seqlen:
            break
        rows.append(row)
        at += seqlen - len(lead)
    return rows
