"""Generate text with a loaded model, piece by piece as it can be read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitwright.calibration.chat_template import templated
from bitwright.calibration.windows import check_ids, load_tokenizer
from bitwright.errors import InputError
from bitwright.files.hub import local
from bitwright.inference.decoder import Decoder
from bitwright.inference.decoding import decoder_of, tokens
from bitwright.inference.loading import load
from bitwright.inference.sampling import Sampling
from bitwright.models.families import positions_of
from bitwright.numerics.key_value_codes import key_value_codes

UNFINISHED = "\ufffd"  # what a tokenizer decodes half a character to
LONG, ENOUGH = 64, 8  # tokens of a line that are decoded again for each new one at most; of which so many go on

Message = dict[str, str]  # role and content


class Written(Iterator[str]):
    """Text in pieces as it is generated, and how much of it there is.

    prompt_tokens      tokens of the prompt
    completion_tokens  written so far, without the one that ends an answer
    finish_reason      "stop" behind such a token, "length" where `most` tokens are written; None: not at its end yet
    """

    def __init__(
        self, found: Iterator[int], decode: Callable[[list[int]], str], *, prompt_tokens: int, most: int
    ) -> None:
        self.prompt_tokens, self.completion_tokens, self.most = prompt_tokens, 0, most
        self.finish_reason: str | None = None
        self._pieces = pieces(self._counted(found), decode)

    def _counted(self, found: Iterator[int]) -> Iterator[int]:
        for token in found:
            self.completion_tokens += 1
            yield token
        self.finish_reason = "length" if self.completion_tokens == self.most else "stop"

    def __next__(self) -> str:
        return next(self._pieces)


@dataclass(frozen=True)
class Generator:
    """A model with its tokenizer, decoder and context length; `lookahead`: see `decoding.tokens`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    context: int
    lookahead: int = 0

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        scheme: str | None = None,
        activations: int = 16,
        context: int = 4096,
        kv: str | None = None,
        lookahead: int = 0,
        slots: int = 1,
    ) -> "Generator":
        """Load a checkpoint.

        context  tokens of prompt and answer together; at most what the model was trained for
        kv       keys and values in q8 or q4; None: in float16, or in float where the model's modules run
        slots    sequences that the decoder holds
        Raises what `load` does, CheckpointError for an encoder, InputError for an unknown kv.
        """
        codes, path = key_value_codes(kv), local(path)
        model = load(path, scheme=scheme, activations=activations)
        context = min(context, positions_of(model.config.get_text_config()) or context)
        decoder = decoder_of(model, context, slots=slots, kv=codes)
        return cls(model, load_tokenizer(path), decoder, context, lookahead)

    def complete(self, prompt: str, *, most: int, sampling: Sampling) -> Written:
        """The model's continuation of a text: up to `most` tokens, in pieces. InputError for a text that is too long."""
        return self._stream(self.tokenizer.encode(prompt), most, sampling)

    def answer(self, messages: list[Message], *, most: int, sampling: Sampling) -> Written:
        """The model's answer to a conversation, in its chat template. InputError if it has none."""
        return self._stream(conversation(self.tokenizer, messages), most, sampling)

    def recent(self, messages: list[Message], room: int) -> list[Message]:
        """The conversation, less its oldest exchanges where they leave an answer fewer than `room` tokens, or half the context.

        What the system was told and the last message stay. InputError if the model has no chat template.
        """
        told, said = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
        most = self.context - min(room, self.context // 2)
        while len(said) > 2 and len(conversation(self.tokenizer, [*told, *said])) > most:
            said = said[2:]
        return [*told, *said]

    def _stream(self, ids: list[int], most: int, sampling: Sampling) -> Written:
        if len(ids) >= self.context:
            remedy = f"give a shorter prompt, or --context {len(ids) + most} if the model reaches that far"
            raise InputError(f"a prompt of {len(ids)} tokens in a context of {self.context}", remedy=remedy)
        prompt, most = torch.tensor(ids, dtype=torch.long), min(most, self.context - len(ids))
        if ids:
            check_ids(self.tokenizer, prompt, self.model.config.get_text_config().vocab_size)
        found = tokens(self.decoder, prompt, most=most, stop=self.stop(), sampling=sampling, lookahead=self.lookahead)
        return Written(found, lambda part: str(self.tokenizer.decode(part)), prompt_tokens=len(ids), most=most)

    def stop(self) -> frozenset[int]:
        """The tokens that end an answer."""
        found: set[int] = set()
        for end in (
            self.model.generation_config.eos_token_id,
            getattr(self.model.config.get_text_config(), "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            found |= set(end) if isinstance(end, list) else set() if end is None else {end}
        return frozenset(found)


def conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """A conversation as tokens, in the model's chat template, up to where its answer begins. InputError as of `templated`."""
    remedy = "use `bitwright generate` without --chat"
    if tokenizer.chat_template:
        remedy += (
            ", or mend the template: chat_template.jinja, or gguf-new-metadata --chat-template-file of a GGUF file"
        )
    text = templated(tokenizer, messages, tools, asking=True, remedy=remedy)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


class Detokenizer:
    """Tokens as text, each piece as soon as none of its characters can change any more."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.ids = decode, list[int]()
        self.before = ""  # text already given of these tokens: of the last line, if it is not long

    def push(self, token: int) -> str:
        """The text that one more token completes: none, as long as a character is unfinished."""
        self.ids.append(token)
        text = self.decode(self.ids)
        if text.endswith(UNFINISHED):
            return ""
        new, self.before = text[len(self.before) :], text
        if text.endswith("\n"):
            self.ids, self.before = [], ""
        elif len(self.ids) >= LONG:
            self.ids = self.ids[-ENOUGH:]
            self.before = self.decode(self.ids)
        return new

    def rest(self) -> str:
        """What is left at the end: an unfinished character."""
        return self.decode(self.ids)[len(self.before) :] if self.ids else ""


def pieces(found: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Tokens as text, each piece as soon as none of its characters can change any more."""
    text = Detokenizer(decode)
    for token in found:
        if new := text.push(token):
            yield new
    if rest := text.rest():
        yield rest
