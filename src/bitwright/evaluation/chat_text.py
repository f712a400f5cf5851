"""Conversations in the tokenizer's chat template -> token windows [W, T]: the text that a chat model is used on.

What quantization costs such a model should be measured there.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

from bitwright.calibration.windows import check_ids, opening, read_text, too_short
from bitwright.errors import CalibrationError, InputError

Message = dict[str, str]  # role and content
LINE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


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


def conversations(source: str) -> list[list[Message]]:
    """The conversations in a text.

    Each line of a .jsonl file is one: {"messages": [{"role", "content"}, …]}; other keys of a line are ignored. Of any other
    text, paragraphs take turns: each two are a user's message and the assistant's answer. CalibrationError as of `read_text`,
    or for a line of another form.
    """
    text = read_text(source)
    if not source.endswith(".jsonl"):
        said = [paragraph.strip("\n") for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        return [_turns(said[i : i + 2]) for i in range(0, len(said), 2)]
    lines = enumerate(text.split("\n"), 1)
    return [_messages(line, f"{source}, line {number}") for number, line in lines if line.strip()]


def _turns(said: list[str]) -> list[Message]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=False)]


def _messages(line: str, where: str) -> list[Message]:
    """The messages of one line of a .jsonl file."""
    try:
        messages = json.loads(line)["messages"]
        roles = [(message["role"], message["content"]) for message in messages]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError("not a conversation", where=where, remedy=f"write each line as {LINE}") from error
    if not roles or not all(isinstance(value, str) for pair in roles for value in pair):
        message = "no messages" if not roles else "a role or content that is not text"
        raise CalibrationError(message, where=where, remedy=f"write each line as {LINE}")
    return messages


def rendered(tokenizer: Any, conversation: list[Message], where: str, *, asking: bool = False) -> str:
    """A conversation in the chat template, special tokens as text; asking: and what the template asks for an answer with."""
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asking))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "give conversations as the model knows them, or leave out --chat"
        raise InputError(f"the chat template refuses it: {reason}", where=where, remedy=remedy) from error


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
