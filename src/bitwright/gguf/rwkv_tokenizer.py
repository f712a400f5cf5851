"""RWKV's tokenizer, llama.cpp's family "rwkv": from left to right, the longest token that the bytes of a text begin with.

A GGUF file has the bytes of each token as Python prints them, with backslashes (\\n, \\xe4). RWKV publishes its vocabulary as
lines of an id, a literal of Python, and its number of bytes (rwkv_vocab_v20230424.txt).
Source: llama-vocab.cpp (llm_tokenizer_rwkv), RWKV's rwkv_tokenizer.py.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import NormalizedString, PreTokenizedString
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitwright.errors import CheckpointError
from bitwright.gguf.pretokenizers import BYTES
from bitwright.gguf.scored_tokenizer import CUT
from bitwright.gguf.special_tokens import FOUND, PREFIX, Kind
from bitwright.gguf.unigram_tokenizer import Keys

VOCABULARY = "rwkv_vocab_v20230424.txt"
FIRST = "<s>"  # id 0, which begins and ends texts, and has no line
PRINTED = re.compile(rb"(?:[^\\]|\\x[0-9a-f]{2}|\\[^x])*", re.DOTALL)
ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.))", re.DOTALL)
PLAIN = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
LETTERS = bytes_to_unicode()  # byte-level BPE's letter for each byte
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that do not occur in UTF-8


class Longest:
    """A pre-tokenizer of the tokenizers package that cuts a text into the longest tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(tokens)
        self.begun = frozenset(token[:end] for token in self.tokens for end in range(1, len(token) + 1))

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """Cut a text in place."""
        text.split(lambda _, part: self._cut(part))

    def _cut(self, part: NormalizedString) -> list[NormalizedString]:
        ends = self.ends(part.normalized)
        return [piece for begin, end in zip([0, *ends], ends, strict=False) if (piece := part[begin:end])]

    def ends(self, text: str) -> list[int]:
        """Where the tokens of a text end. Each of its letters is a token."""
        found, at = list[int](), 0
        while at < len(text):
            end, longest = at + 1, at + 1
            while end <= len(text) and text[at:end] in self.begun:
                longest = end if text[at:end] in self.tokens else longest
                end += 1
            found.append(longest)
            at = longest
        return found


def letters_of(token: str, where: str) -> str:
    """A token's bytes as letters. CheckpointError for one that is not as Python prints bytes."""
    raw = token.encode("utf-8", "surrogateescape")
    if not PRINTED.fullmatch(raw):
        raise CheckpointError(
            f"{token!r} is no token of RWKV's: a lone backslash", where=where, remedy="get a good copy"
        )
    plain = ESCAPE.sub(lambda m: bytes([int(m[1], 16)]) if m[1] else PLAIN.get(m[2], m[2]), raw)
    return "".join(LETTERS[byte] for byte in plain)


def content_of(own: Keys, tokens: list[str], where: str) -> Keys:
    """tokenizer.json's parts for a file's keys (without prefix).

    CheckpointError for tokens of the same bytes, special ones that are escaped, and bytes that no token is.
    """
    letters = [letters_of(token, where) for token in tokens]
    known = set(letters)
    missing = next((byte for byte, letter in LETTERS.items() if letter not in known and byte not in NEVER), None)
    odd = next(
        (t for t, kind in zip(tokens, own["token_type"], strict=True) if kind in FOUND and not _is_plain(t)), None
    )
    if len(known) < len(letters) or missing is not None or odd is not None:
        said = f"no token is the byte 0x{missing:02x}" if missing is not None else "two tokens are the same bytes"
        message = said if odd is None else f"the special token {odd!r} is no plain ASCII"
        raise CheckpointError(f"RWKV's tokenizer: {message}", where=where, remedy="get a good copy")
    return {
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(letters)}, "merges": [], "ignore_merges": True,
            CUT: Longest(letters),
        },
        "normalizer": None, "pre_tokenizer": BYTES,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }  # fmt: skip


def _is_plain(token: str) -> bool:
    """Whether a token's letters are its text."""
    return token.isascii() and token.isprintable() and "\\" not in token and " " not in token


def published_keys(folder: Path, vocabulary: int | None = None) -> dict[str, Any]:
    """The keys, with prefix, of the vocabulary in a checkpoint, as llama.cpp's converter writes them; padded to so many ids.

    CheckpointError for a damaged one, or more tokens than ids.
    """
    file = folder / VOCABULARY
    tokens = [FIRST]
    try:
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):
            tokens.append(repr(_bytes_of(line, len(tokens)))[2:-1])
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"not RWKV's vocabulary: {error}", where=str(file), remedy="get a good copy") from error
    size = vocabulary or len(tokens)
    if len(tokens) > size:
        message = f"the vocabulary has {len(tokens)} tokens, the model's embedding {size} rows"
        raise CheckpointError(message, where=str(file), remedy="tokenizer and weights must belong together")
    kinds = [Kind.CONTROL] + [Kind.NORMAL] * (len(tokens) - 1) + [Kind.UNUSED] * (size - len(tokens))
    own = {
        "model": "rwkv", "tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), size)],
        "token_type": [int(kind) for kind in kinds], "bos_token_id": 0, "eos_token_id": 0, "unknown_token_id": 0,
    }  # fmt: skip
    return {PREFIX + name: value for name, value in own.items()}


def _bytes_of(line: str, wanted: int) -> bytes:
    """The token in a line of a published vocabulary; ValueError, SyntaxError or TypeError if it is none, or another id's."""
    number, _, rest = line.partition(" ")
    literal, _, size = rest.rpartition(" ")
    token = ast.literal_eval(literal)
    raw = token.encode() if isinstance(token, str) else token
    if not isinstance(raw, bytes) or not raw or int(number) != wanted or int(size) != len(raw):
        raise ValueError(f"line {line[:40]!r} is not token {wanted}")
    return raw
