"""Evaluation texts: cut into windows by the model's own tokenizer, which must agree with the reference's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.calibration.windows import SEQLEN, load_tokenizer, windows
from bitwright.errors import InputError
from bitwright.evaluation.chat_text import chat_windows
from bitwright.models.families import positions_of
from bitwright.models.streamed import StreamedModel


@dataclass(frozen=True)
class JudgedText:
    """The texts to evaluate on, and how they are cut into windows.

    seqlen  tokens in a window, at least 2
    tokens  stop after so many of each text (whole windows); None: the whole text
    chat    the texts are conversations, in the model's chat template
    option  that the command has for seqlen, which refusals name
    """

    names: Sequence[str]
    seqlen: int
    tokens: int | None
    chat: bool
    option: str = SEQLEN

    def windows(self, streamed: StreamedModel) -> list[Tensor]:
        """Each text's windows [W, T]. InputError for a window longer than the model's context; other errors as of `windows` and
        `chat_windows`."""
        limit = positions_of(streamed.skeleton.config.get_text_config()) or self.seqlen
        if not 2 <= self.seqlen <= limit:
            message = f"windows of {self.seqlen} tokens, and the model knows 2 to {limit} positions"
            raise InputError(message, where=str(streamed.folder), remedy=f"{self.option} of 2 to {limit}")
        tokenizer = load_tokenizer(streamed.folder)
        return [self._cut(streamed, tokenizer, name) for name in self.names]

    def _cut(self, streamed: StreamedModel, tokenizer: Any, name: str) -> Tensor:
        """One text's windows."""
        most = max(1, self.tokens // self.seqlen) if self.tokens else None
        vocabulary = streamed.vocabulary
        if self.chat:
            where = streamed.folder
            return chat_windows(tokenizer, name, seqlen=self.seqlen, vocabulary=vocabulary, where=where, most=most)
        return windows(tokenizer, name, seqlen=self.seqlen, vocabulary=vocabulary, most=most, option=self.option)

    def check_reference(self, streamed: StreamedModel, ours: list[Tensor], other: StreamedModel) -> None:
        """InputError if the reference has another vocabulary, or a tokenizer that gives other tokens. ours: the model's windows
        of each text."""
        if other.vocabulary != streamed.vocabulary:
            message = f"the reference's vocabulary has {other.vocabulary} tokens, the model's {streamed.vocabulary}"
            raise InputError(message, where=str(other.folder), remedy=f"give what {streamed.folder} was made of")
        for name, a, b in zip(self.names, ours, self.windows(other), strict=True):
            difference = _difference(a.flatten().tolist(), b.flatten().tolist())
            if difference:
                message = f"the reference's tokenizer reads {name} as other tokens: {difference}"
                remedy = f"both need the tokenizer and chat template of one model: compare the files with {streamed.folder}'s"
                raise InputError(message, where=str(other.folder), remedy=remedy)


def check_text(model: Path, name: str, *, seqlen: int, tokens: int | None) -> None:
    """Raise as `JudgedText.windows`, before long work whose result will be judged; windows are --eval-seqlen long there."""
    JudgedText([name], seqlen, tokens, chat=False, option="--eval-seqlen").windows(StreamedModel(model))


def _difference(ours: list[int], theirs: list[int]) -> str:
    """Where two lists of tokens first differ, in words; "" if they do not."""
    if ours == theirs:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return f"{len(theirs)} in place of {len(ours)}"
    return f"number {at} is {theirs[at]} in place of {ours[at]}"
