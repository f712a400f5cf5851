"""Answers in OpenAI's JSON: whole, and as the chunks of a stream."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bitwright.inference.generation import UNFINISHED
from bitwright.serve.job import End, Likely, Piece
from bitwright.serve.tools import CallReader
from bitwright.version import __version__

Decode = Callable[[int], str]  # a token's own text


@dataclass
class Choice:
    """One answer as it has grown: its text, tokens, calls of tools and end."""

    reader: CallReader | None = None  # where the model may call tools
    text: str = ""
    tokens: list[Likely] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece) -> Piece:
        """Go on by a piece; what of it is text that the client sees."""
        text = piece.text if self.reader is None else self.reader.push(piece.text)
        self.text += text
        self.tokens += piece.tokens
        return Piece(text, piece.tokens)

    def finish(self, end: End) -> str:
        """End it; text that was held back as the beginning of a call, and is none."""
        self.end = end
        left, self.calls = ("", []) if self.reader is None else self.reader.rest()
        self.text += left
        return left

    @property
    def reason(self) -> str | None:
        """finish_reason."""
        return None if self.end is None else "tool_calls" if self.calls else self.end.reason


class Shape(ABC):
    """How an endpoint words its answers.

    with_logprobs  whether log probabilities were asked for
    usage          whether a stream ends with it
    each           answers to a prompt
    """

    objects: tuple[str, str]  # of a whole answer, and of a chunk
    prefix: str

    def __init__(self, model: str, decode: Decode, *, with_logprobs: bool, usage: bool, each: int) -> None:
        self.model, self.decode, self.with_logprobs, self.usage, self.each = model, decode, with_logprobs, usage, each
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer to a request without a stream."""
        shown = [
            self.choice(choice)
            | {"index": i, "finish_reason": choice.reason, "logprobs": self.likely(choice.tokens, "")}
            for i, choice in enumerate(choices)
        ]
        return self._around(self.objects[0], shown) | {"usage": usage(choices, self.each)}

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Chunks before a choice's text."""
        return []

    def chunk(self, index: int, piece: Piece, before: str) -> dict[str, Any]:
        """A piece of a choice's text. before: the text that it follows."""
        likely = self.likely(list(piece.tokens), before)
        return self._chunk(index, self.delta(piece.text), None, likely)

    def last(self, index: int, choice: Choice, left: str) -> list[dict[str, Any]]:
        """Chunks that end a choice. left: text that was held back until now."""
        chunks = [self._chunk(index, self.delta(left), None, None)] if left else []
        return [*chunks, self._chunk(index, self.closing(choice), choice.reason, None)]

    def final(self, choices: list[Choice]) -> list[dict[str, Any]]:
        """Chunks that end a stream."""
        return [self._around(self.objects[1], []) | {"usage": usage(choices, self.each)}] if self.usage else []

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole choice's own fields."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """A chunk's fields for some text."""

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The last chunk's fields."""

    @abstractmethod
    def likely(self, tokens: list[Likely], before: str) -> dict[str, Any] | None:
        """Log probabilities of some tokens. before: the text that they follow."""

    def _chunk(self, index: int, fields: dict[str, Any], reason: str | None, likely: Any) -> dict[str, Any]:
        choice = {"index": index, **fields, "finish_reason": reason, "logprobs": likely}
        return self._around(self.objects[1], [choice]) | ({"usage": None} if self.usage else {})

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"bitwright-{__version__}",
            "choices": choices,
        }


class ChatShape(Shape):
    """Answers of /v1/chat/completions."""

    objects = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def begin(self, index: int) -> list[dict[str, Any]]:
        """See `Shape`: who speaks."""
        return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)]

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {"message": message}

    def delta(self, text: str) -> dict[str, Any]:
        """See `Shape`."""
        return {"delta": {"content": text}}

    def closing(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`: the calls of tools."""
        calls = [{"index": i, **call} for i, call in enumerate(choice.calls)]
        return {"delta": {"tool_calls": calls} if calls else {}}

    def likely(self, tokens: list[Likely], before: str) -> dict[str, Any] | None:
        """See `Shape`."""
        if not self.with_logprobs:
            return None
        shown = [
            self._token(t.id, t.logprob) | {"top_logprobs": [self._token(*other) for other in t.others]} for t in tokens
        ]
        return {"content": shown, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": None if UNFINISHED in text else list(text.encode()),
        }


class CompletionShape(Shape):
    """Answers of /v1/completions."""

    objects = "text_completion", "text_completion"
    prefix = "cmpl"

    def choice(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return {"text": choice.text}

    def delta(self, text: str) -> dict[str, Any]:
        """See `Shape`."""
        return {"text": text}

    def closing(self, choice: Choice) -> dict[str, Any]:
        """See `Shape`."""
        return {"text": ""}

    def likely(self, tokens: list[Likely], before: str) -> dict[str, Any] | None:
        """See `Shape`."""
        if not self.with_logprobs:
            return None
        texts = [self.decode(t.id) for t in tokens]
        places = [len(before) + len("".join(texts[:i])) for i in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [max(t.logprob, -9999.0) for t in tokens],
            "top_logprobs": [{self.decode(i): max(p, -9999.0) for i, p in t.others} for t in tokens],
            "text_offset": places,
        }


def usage(choices: list[Choice], each: int) -> dict[str, Any]:
    """Tokens of prompts and answers; a prompt that `each` choices in turn share counts once."""
    ends = [choice.end for choice in choices if choice.end is not None]
    prompts = ends[::each]
    prompt, written = sum(end.prompt for end in prompts), sum(end.completion for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached for end in prompts)},
    }


def event(content: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
