"""Training data of a language model: windows of tokens, which of them count in the loss, and where each conversation begins.

Plain text is cut into windows as for calibration, and every token counts. Conversations go through the model's chat
template; only what the assistant says counts. Whole conversations are packed into a window; each sees itself alone, since
its positions begin at 0 (transformers masks such packed sequences apart; see packing.py).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.data_sets import Conversation, entries, is_data_set, rendered
from bitwright.calibration.windows import check_ids, draw
from bitwright.errors import CalibrationError, InputError
from bitwright.evaluation.chat_text import conversations_alone

IGNORED = -100  # label of a token that does not count
HELD_OUT = 16  # most windows that are judged on


@dataclass(frozen=True)
class Windows:
    """ids [W, T]; labels [W, T], the same ids or `IGNORED`; positions [W, T], or None where each window is one text."""

    ids: Tensor
    labels: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> "Windows":
        """Some of the windows, by index [n]."""
        return Windows(self.ids[index], self.labels[index], None if self.positions is None else self.positions[index])


@dataclass(frozen=True)
class Data:
    """Windows to train on, windows to judge on, and notes on the text."""

    seen: Windows
    held_out: Windows
    notes: tuple[str, ...] = ()


def training_data(
    tokenizer: Any, source: str, *, seqlen: int, vocabulary: int, windows: int, seed: int, where: str
) -> Data:
    """The data in a text (or mix of texts, see calibration/text_mix.py), or in a data set of conversations (see data_sets.py).

    windows: most to train on, of plain text. where: the model, for errors. Raises CalibrationError for data that are missing,
    too short or of another form, have no answers, or a conversation longer than a window; InputError where the model has no
    chat template.
    """
    found = entries(source) if is_data_set(source) else []
    if not all(isinstance(entry, str) for entry in found):
        return _of_conversations(tokenizer, found, source, seqlen=seqlen, vocabulary=vocabulary, where=where)
    drawn = draw(
        tokenizer,
        source,
        samples=windows,
        seqlen=seqlen,
        vocabulary=vocabulary,
        seed=seed,
        spare=min(HELD_OUT, windows),
    )
    if not len(drawn.held_out):
        message = f"{len(drawn.seen)} windows of {seqlen} tokens leave none to judge on"
        raise CalibrationError(message, where=source, remedy="give more text, or a smaller --seqlen")
    seen, held_out = (Windows(ids, ids) for ids in (drawn.seen, drawn.held_out))
    return Data(seen, held_out, drawn.notes)


def _of_conversations(
    tokenizer: Any, found: list[str | Conversation], source: str, *, seqlen: int, vocabulary: int, where: str
) -> Data:
    """The last tenth of the conversations is held out."""
    if not tokenizer.chat_template:
        remedy = "give plain text, or put the model's chat_template.jinja there"
        raise InputError("the model has no chat template", where=where, remedy=remedy)
    if not tokenizer.is_fast:
        message = "the tokenizer does not tell where in the text its tokens are"
        raise InputError(message, where=where, remedy="a tokenizer.json beside the model, or plain text")
    said = [
        _counted(tokenizer, one, f"{source}, conversation {number}", seqlen)
        for number, one in enumerate(conversations_alone(found, source), 1)
    ]
    first_held = len(said) - max(1, len(said) // 10)
    if first_held < 1:
        message = f"{len(said)} conversations leave none to judge on"
        raise CalibrationError(message, where=source, remedy="give at least two")
    parts = [_packed(part, seqlen) for part in (said[:first_held], said[first_held:])]
    check_ids(tokenizer, parts[0].ids, vocabulary)
    return Data(parts[0], parts[1].take(torch.arange(min(HELD_OUT, len(parts[1])))))


def _counted(tokenizer: Any, conversation: Conversation, where: str, seqlen: int) -> tuple[list[int], list[int]]:
    """A conversation's tokens, and their labels: the answers' own ids. CalibrationError if there is no answer, or no room.

    An answer of "weight" 0, as OpenAI has it, does not count.
    """
    messages = conversation.messages
    answers = [i for i, one in enumerate(messages) if one["role"] == "assistant" and one.get("weight") != 0]
    if not answers:
        remedy = 'give each conversation a message of the role "assistant"'
        raise CalibrationError("no answer to learn from", where=where, remedy=remedy)
    text = rendered(tokenizer, conversation, where)
    spans = [_span(tokenizer, conversation, i, text, where) for i in answers]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) > seqlen:
        message = f"{len(ids)} tokens are longer than a window of {seqlen}"
        raise CalibrationError(
            message, where=where, remedy=f"--seqlen {len(ids)}, if the model's context allows, or shorten it"
        )
    labels = [
        i if any(a <= begin and end <= b for a, b in spans) else IGNORED
        for i, (begin, end) in zip(ids, offsets, strict=True)
    ]
    if all(label == IGNORED for label in labels[1:]):
        raise CalibrationError("its answers are empty", where=where, remedy="leave this conversation out")
    return ids, labels


def _span(tokenizer: Any, conversation: Conversation, i: int, text: str, where: str) -> tuple[int, int]:
    """First and last character of message i in the conversation's text: what follows the template's prompt for an answer."""
    prompt = rendered(tokenizer, conversation.until(i), where, asking=True)
    whole = rendered(tokenizer, conversation.until(i + 1), where)
    if not (whole.startswith(prompt) and text.startswith(whole)):
        message = "the chat template writes an answer in another way than it asks for one"
        remedy = "give conversations of one question and one answer, or plain text"
        raise CalibrationError(message, where=where, remedy=remedy)
    return len(prompt), len(whole)


def _packed(said: list[tuple[list[int], list[int]]], seqlen: int) -> Windows:
    """Conversations in order, as many whole ones in a window as it has room for; its end is filled with what counts not."""
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for ids, labels in said:
        if not rows or len(rows[-1][0]) + len(ids) > seqlen:
            rows.append(([], [], []))
        rows[-1][0].extend(ids)
        rows[-1][1].extend([IGNORED, *labels[1:]])  # nothing before it in this window predicts its first token
        rows[-1][2].extend(range(len(ids)))
    whole = []
    for ids, labels, positions in rows:
        rest = seqlen - len(ids)
        whole.append((ids + [0] * rest, labels + [IGNORED] * rest, positions + list(range(rest))))
    return Windows(*(torch.tensor(column) for column in zip(*whole, strict=True)))
