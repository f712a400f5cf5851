"""Generate text with a loaded model, piece by piece as it can be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import InputError
from bitwright.files.hub import local
from bitwright.inference.decoding import Decoder, Sampling, decoder_of, tokens
from bitwright.inference.loading import load

UNFINISHED = "\ufffd"  # what a tokenizer decodes half a character to

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Generator:
    """A model with its tokenizer, decoder and context length (`room`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    room: int

    @classmethod
    def open(cls, path: Path, *, scheme: str | None = None, activations: int = 16, room: int = 4096) -> "Generator":
        """Load a checkpoint. room: context length, prompt and answer together; at most what the model was trained for.

        Raises what `load` does, and CheckpointError for an encoder.
        """
        path = local(path)
        model = load(path, scheme=scheme, activations=activations)
        room = min(room, getattr(model.config.get_text_config(), "max_position_embeddings", None) or room)
        return cls(model, load_tokenizer(path), decoder_of(model, room), room)

    def complete(self, prompt: str, *, most: int, sampling: Sampling) -> Iterator[str]:
        """The model's continuation of a text: up to `most` tokens, in pieces. InputError for a text that is too long."""
        return self._stream(self.tokenizer.encode(prompt), most, sampling)

    def answer(self, messages: list[Message], *, most: int, sampling: Sampling) -> Iterator[str]:
        """The model's answer to a conversation, in its chat template. InputError if it has none."""
        if not self.tokenizer.chat_template:
            raise InputError("the model has no chat template", remedy="use `bitwright generate` without --chat")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._stream(self.tokenizer.encode(text, add_special_tokens=False), most, sampling)

    def _stream(self, ids: list[int], most: int, sampling: Sampling) -> Iterator[str]:
        if len(ids) >= self.room:
            remedy = f"give a shorter prompt, or --room {len(ids) + most} if the model reaches that far"
            raise InputError(f"a prompt of {len(ids)} tokens in a context of {self.room}", remedy=remedy)
        most = min(most, self.room - len(ids))
        found = tokens(
            self.decoder, torch.tensor(ids, dtype=torch.long), most=most, stop=self._stop(), sampling=sampling
        )
        return pieces(found, lambda part: str(self.tokenizer.decode(part)))

    def _stop(self) -> frozenset[int]:
        """The tokens that end an answer."""
        found: set[int] = set()
        for end in (
            self.model.generation_config.eos_token_id,
            getattr(self.model.config.get_text_config(), "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            found |= set(end) if isinstance(end, list) else set() if end is None else {end}
        return frozenset(found)


def pieces(found: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Tokens as text, each piece as soon as none of its characters can change any more."""
    ids: list[int] = []
    before = ""  # text already yielded of the tokens since the last line's end
    for token in found:
        ids.append(token)
        text = decode(ids)
        if text.endswith(UNFINISHED):
            continue
        yield text[len(before) :]
        before = text
        if text.endswith("\n"):
            ids, before = [], ""
    if ids and len(text := decode(ids)) > len(before):
        yield text[len(before) :]
