"""Text -> token windows [S, T], seeded, no padding: every token that a statistic sees is a real one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bitwright.errors import CalibrationError, CheckpointError
from bitwright.llamacpp.artefact import read_tokenizer
from bitwright.llamacpp.container import is_gguf
from bitwright.stdlib_text import CALIBRATION, HELD_OUT, module_text

BUILT_IN = {"stdlib": CALIBRATION, "stdlib-heldout": HELD_OUT}  # text that every machine with Python has


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer; no code from the checkpoint is run."""
    if is_gguf(folder):
        return read_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"no usable tokenizer: {str(error).splitlines()[0]}"
        raise CheckpointError(message, where=str(folder), remedy="copy the model's tokenizer files here") from error


def read_text(source: str) -> str:
    """A text file, or a built-in text by name. CalibrationError if it is missing, not text, or empty."""
    if source in BUILT_IN:
        return module_text(BUILT_IN[source])
    file = Path(source)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        remedy = f"give a UTF-8 text file, or one of {', '.join(BUILT_IN)}"
        raise CalibrationError(f"cannot read the text: {error.strerror}", where=source, remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise CalibrationError("not UTF-8 text", where=source, remedy="convert it to UTF-8") from error
    if not text.strip():
        raise CalibrationError("the text is empty", where=source, remedy="give some thousand words of real text")
    return text


def windows(tokenizer: Any, source: str, *, seqlen: int, vocabulary: int, most: int | None = None) -> Tensor:
    """All whole, non-overlapping windows of a text, or the first so many, in order: token ids [W, seqlen].

    A tokenizer that begins every text with a token of its own (BOS) has it at the start of every window, since the
    model never saw a text without. CalibrationError if the text is shorter than one window, or the tokenizer's ids
    do not fit the model's vocabulary.
    """
    pieces = _pieces(read_text(source), 1 << 18)
    return _cut(tokenizer, pieces, most, source=source, seqlen=seqlen, vocabulary=vocabulary)


def sample(tokenizer: Any, source: str, *, samples: int, seqlen: int, vocabulary: int, seed: int) -> Tensor:
    """Up to `samples` windows from places of the text that a seed of their own picks [S, seqlen]; else as `windows`.

    Only about as much text is tokenized as is needed, whatever its length.
    """
    pieces = _pieces(read_text(source), 4 * seqlen)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [pieces[i] for i in order]
    return _cut(tokenizer, shuffled, samples, source=source, seqlen=seqlen, vocabulary=vocabulary)


def _cut(tokenizer: Any, pieces: list[str], most: int | None, *, source: str, seqlen: int, vocabulary: int) -> Tensor:
    """Tokenize pieces of text until there are enough windows, and cut them."""
    tokenizer.model_max_length = int(1e30)  # a long text is cut here, not an error
    start = opening(tokenizer)
    length = seqlen - len(start)
    ids: list[int] = []
    for piece in pieces:
        if most is not None and len(ids) >= most * length:
            break
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    count = min(len(ids) // length if length > 0 else 0, len(ids) if most is None else most)
    if count == 0:
        raise too_short(len(ids), seqlen, source)
    body = torch.tensor(ids[: count * length]).view(count, length)
    found = torch.cat([torch.tensor([start] * count, dtype=torch.long).view(count, -1), body], dim=1)
    check_ids(tokenizer, found, vocabulary)
    return found


def too_short(tokens: int, seqlen: int, source: str) -> CalibrationError:
    """What to say of a text of so many tokens, which fill no window."""
    message = f"{tokens} tokens are shorter than one window of {seqlen}"
    return CalibrationError(message, where=source, remedy="give more text, or a smaller --seqlen")


def check_ids(tokenizer: Any, ids: Tensor, vocabulary: int) -> None:
    """CalibrationError if a tokenizer's ids [W, T] do not fit the model's vocabulary."""
    if int(ids.max()) >= vocabulary:
        message = f"the tokenizer makes id {int(ids.max())}, the model's vocabulary ends at {vocabulary - 1}"
        remedy = "copy the tokenizer files that belong to these weights"
        raise CalibrationError(message, where=str(tokenizer.name_or_path or "tokenizer"), remedy=remedy)


def _pieces(text: str, size: int) -> list[str]:
    """The text in pieces of about so many characters, cut behind a line's end where there is one.

    Tokenizing a long text at once would take a hundred bytes of memory a token.
    """
    pieces, at = [], 0
    while at < len(text):
        end = min(at + size, len(text))
        if end < len(text):
            end = next((cut + 1 for mark in ("\n", " ") if (cut := text.rfind(mark, at, end)) >= at), end)
        pieces.append(text[at:end])
        at = end
    return pieces


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: len(whole) - len(plain)] if plain and whole[-len(plain) :] == plain else []


def batches(ids: Tensor, tokens: int) -> list[Tensor]:
    """Split [S, T] into batches of about so many tokens."""
    return list(ids.split(max(1, tokens // ids.shape[1])))
