"""Text -> windows of tokens [S, T], seeded; without padding, so that statistics are of real tokens only."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bitwright.calibration.data_sets import documents, is_data_set, plain, read_file
from bitwright.calibration.general_text import cut_at_lines, general_pieces, plain_text
from bitwright.calibration.stdlib_text import CALIBRATION, HELD_OUT, module_text
from bitwright.calibration.text_mix import texts_of, windows_of
from bitwright.errors import CalibrationError, CheckpointError
from bitwright.files.model_path import is_gguf
from bitwright.gguf.rwkv_tokenizer import VOCABULARY, published_keys
from bitwright.gguf.templates import check_form
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.gguf_source import read_tokenizer

SEQLEN = "--seqlen"  # the option of most commands for the tokens in a window
BUILT_IN: dict[str, Callable[[], str]] = {  # texts that come with the package, or with Python
    "general": plain_text,
    "stdlib": lambda: module_text(CALIBRATION),
    "stdlib-heldout": lambda: module_text(HELD_OUT),
}


@dataclass(frozen=True)
class Drawn:
    """Windows of token ids: seen [S, T] for calibration, held_out [H, T] for judging its result; notes on their texts."""

    seen: Tensor
    held_out: Tensor
    notes: tuple[str, ...] = ()


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer; no code from the checkpoint is run. CheckpointError if there is none; FormatError as of
    `check_form`."""
    if is_gguf(folder):
        return read_tokenizer(folder)
    if (folder / VOCABULARY).is_file() and not (folder / "tokenizer.json").is_file():
        return tokenizer_of(published_keys(folder), str(folder))
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of the tokenizers package, which raises no other
        check_form(folder)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"no usable tokenizer: {reason}"
        raise CheckpointError(message, where=str(folder), remedy="copy the model's tokenizer files here") from error


def read_text(source: str) -> str:
    """A text file, a data set of texts, or a built-in text by name. CalibrationError as of `read_file` and `plain`."""
    if source in BUILT_IN:
        return BUILT_IN[source]()
    return plain(source) if is_data_set(source) else read_file(source)


def windows(
    tokenizer: Any, source: str, *, seqlen: int, vocabulary: int, most: int | None = None, option: str = SEQLEN
) -> Tensor:
    """The whole, non-overlapping windows of a text in order, `most` of them at most: token ids [W, seqlen].

    option: that the command has for seqlen, which a refusal names.
    If the tokenizer begins every text with a special token (BOS), every window begins with it, as texts did in training.
    CalibrationError if the text is shorter than one window, or the tokenizer's ids do not fit the model's vocabulary.
    """
    pieces = cut_at_lines(
        read_text(source), 1 << 18
    )  # tokenizing it all at once would take a hundred bytes of memory a token
    return cut_windows(tokenizer, pieces, most, source=source, seqlen=seqlen, vocabulary=vocabulary, option=option)


def draw(tokenizer: Any, calib: str, *, samples: int, seqlen: int, vocabulary: int, seed: int, spare: int = 0) -> Drawn:
    """Up to `samples` windows of a text, or of several by their shares, evenly mixed; with a note for each text too short.

    calib  one text or a mix: see text_mix.py
    spare  about so many more windows are held out; an eighth of all, of a text that is too short
    Windows begin at seeded random places; otherwise they are as in `windows`. Only about as much text is tokenized as is
    needed. CalibrationError as of `texts_of` and of `windows`.
    """
    texts, parts, notes = texts_of(calib), list[tuple[float, int, Tensor]](), tuple[str, ...]()
    held_out: list[Tensor] = []
    for i, (text, count) in enumerate(zip(texts, windows_of(texts, samples, calib), strict=True)):
        pieces, more = _shuffled(tokenizer, text.name, 4 * seqlen, vocabulary, seed)
        extra = ceil(text.share * spare)
        found = cut_windows(tokenizer, pieces, count + extra, source=text.name, seqlen=seqlen, vocabulary=vocabulary)
        if len(found) < count:
            which = f"text {text.name!r}" if len(texts) > 1 else "text"
            more += (f"the {which} gives {len(found)} calibration windows of {seqlen} tokens, not {count}",)
        seen = min(count, len(found) - min(extra, len(found) // 8))
        parts += [((k + 0.5) / seen, i, window) for k, window in enumerate(found[:seen])]
        held_out.append(found[seen : seen + extra])
        notes += more
    parts.sort(key=lambda part: part[:2])
    return Drawn(torch.stack([window for *_, window in parts]), torch.cat(held_out), notes)


def sample(tokenizer: Any, calib: str, *, samples: int, seqlen: int, vocabulary: int, seed: int) -> Tensor:
    """Calibration windows [S, T] alone: see `draw`."""
    return draw(tokenizer, calib, samples=samples, seqlen=seqlen, vocabulary=vocabulary, seed=seed).seen


def _shuffled(tokenizer: Any, source: str, size: int, vocabulary: int, seed: int) -> tuple[list[str], tuple[str, ...]]:
    """A text in pieces of about `size` characters in a seeded order, and notes."""
    if source == "general":
        return general_pieces(tokenizer, size=size, vocabulary=vocabulary, seed=seed)
    whole = documents(tokenizer, source) if is_data_set(source) else [read_text(source)]
    pieces = [piece for text in whole for piece in cut_at_lines(text, size)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pieces[i] for i in order], ()


def cut_windows(
    tokenizer: Any,
    pieces: list[str],
    most: int | None,
    *,
    source: str,
    seqlen: int,
    vocabulary: int,
    option: str = SEQLEN,
) -> Tensor:
    """Tokenize pieces of text until there are `most` windows, and cut them: [W, seqlen]. option: as of `windows`."""
    tokenizer.model_max_length = int(1e30)  # no warning for a text longer than the model's context: it is cut here
    start = opening(tokenizer)
    length = seqlen - len(start)
    ids: list[int] = []
    for piece in pieces:
        if most is not None and len(ids) >= most * length:
            break
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    count = min(len(ids) // length if length > 0 else 0, len(ids) if most is None else most)
    if count == 0:
        raise too_short(len(ids), seqlen, source, option)
    body = torch.tensor(ids[: count * length]).view(count, length)
    found = torch.cat([torch.tensor([start] * count, dtype=torch.long).view(count, -1), body], dim=1)
    check_ids(tokenizer, found, vocabulary)
    return found


def too_short(tokens: int, seqlen: int, source: str, option: str = SEQLEN) -> CalibrationError:
    """The error for a text whose tokens fill no window. option: as of `windows`."""
    message = f"{tokens} tokens are shorter than one window of {seqlen}"
    return CalibrationError(message, where=source, remedy=f"give more text, or a smaller {option}")


def check_ids(tokenizer: Any, ids: Tensor, vocabulary: int) -> None:
    """CalibrationError if a tokenizer's ids [W, T] do not fit the model's vocabulary."""
    if int(ids.max()) >= vocabulary:
        message = f"the tokenizer makes id {int(ids.max())}, the model's vocabulary ends at {vocabulary - 1}"
        remedy = "copy the tokenizer files that belong to these weights"
        raise CalibrationError(message, where=str(tokenizer.name_or_path or "tokenizer"), remedy=remedy)


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text (BOS)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: len(whole) - len(plain)] if plain and whole[-len(plain) :] == plain else []
