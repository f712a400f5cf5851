"""sentencepiece's Unigram tokenizers (XLM-RoBERTa), llama.cpp's family "t5": convert tokenizer.json to GGUF keys, and back.

The keys hold pieces, their scores and the normalizer's table of replacements (precompiled_charsmap). Both libraries choose
the segmentation with the highest sum of scores. tokenizer.json splits at whitespace first, and llama.cpp only joins spaces; the
result is the same, because a piece has a space only at its beginning.
"""

import base64
import json
from typing import Any

import numpy as np

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf.header import ARRAY, Typed
from bitwright.gguf.special_tokens import Kind

Keys = dict[str, Any]
SPACE = "▁"
BYTE = 0  # GGUF's value type uint8
UNUSED_SCORE = -10000.0  # score of ids without a piece, so low that they are never chosen
SPACES: Keys = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
STRIP: Keys = {"type": "Strip", "strip_left": False, "strip_right": True}
METASPACE: Keys = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
SPLIT: Keys = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
# One more space before the first other character, whatever is before it.
PREFIXED: list[Keys] = [
    {"type": "Prepend", "prepend": " "},
    {"type": "Replace", "pattern": {"Regex": r"\A (?= *\z)"}, "content": ""},
]


def single_steps(part: Keys | None, inner: str) -> list[Keys]:
    """A normalizer or pre-tokenizer of tokenizer.json as a list of single steps."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def keys_of(content: Keys, vocabulary: int, where: str) -> Keys:
    """The keys that are particular to Unigram (without prefix), for a vocabulary of so many ids.

    FormatError for a tokenizer that llama.cpp would segment otherwise.
    """
    start = single_steps(content.get("normalizer"), "normalizers")
    cut = single_steps(content.get("pre_tokenizer"), "pretokenizers")
    tables = [step["precompiled_charsmap"] for step in start if step["type"] == "Precompiled"]
    rest = [{key: step[key] for key in step if key != "content"} for step in start if step["type"] != "Precompiled"]
    if len(tables) != 1 or not tables[0] or not _joins_spaces(rest, cut) or content["model"].get("byte_fallback"):
        message = f"an unknown pre-tokenizer for Unigram: {json.dumps([rest, cut])[:200]}"
        remedy = "llama.cpp needs a table of replacements, then joined spaces and one before each word, as XLM-RoBERTa has it"
        raise FormatError(message, where=where, remedy=remedy)
    scores = [score for _, score in content["model"]["vocab"]]
    return {
        "model": "t5", "pre": "default", "scores": scores + [UNUSED_SCORE] * (vocabulary - len(scores)),
        "add_space_prefix": True, "remove_extra_whitespaces": True,
        "precompiled_charsmap": Typed(list(base64.b64decode(tables[0])), ARRAY, BYTE),
    }  # fmt: skip


def _joins_spaces(start: list[Keys], cut: list[Keys]) -> bool:
    """Whether the steps join repeated spaces, strip those at the end, and put one before each word, as llama.cpp does."""
    kinds = [step["type"] for step in cut]
    words = kinds == ["WhitespaceSplit", "Metaspace"] or (kinds == ["Split", "Metaspace"] and cut[0] == SPLIT)
    joined = words or (kinds == ["Metaspace"] and start == [STRIP, SPACES])
    return joined and cut[-1].get("prepend_scheme", "always") == "always" and all(s in (STRIP, SPACES) for s in start)


def content_of(own: Keys, tokens: list[str], where: str) -> Keys:
    """tokenizer.json's parts for a file's keys (without prefix). CheckpointError for keys that are missing or damaged."""
    scores, unknown = np.asarray(own.get("scores", [])), own.get("unknown_token_id")
    known = isinstance(unknown, int) and 0 <= unknown < len(tokens)
    if not known or scores.dtype.kind not in "fiu" or len(scores) != len(tokens):
        message = "Unigram without a score for each token, or without one for what is unknown"
        raise CheckpointError(message, where=where, remedy="get a good copy")
    table = own.get("precompiled_charsmap")
    start: list[Keys] = []
    if isinstance(table, np.ndarray):
        _check_user_defined(own, tokens, where)
        blob = base64.b64encode(_checked(table.astype(np.uint8).tobytes(), where)).decode()
        start = [{"type": "Precompiled", "precompiled_charsmap": blob}]
    joined, prefixed = bool(own.get("remove_extra_whitespaces", False)), bool(own.get("add_space_prefix", False))
    metaspace = METASPACE | {"prepend_scheme": "always" if joined else "never"}
    return {
        "model": {"type": "Unigram", "unk_id": unknown, "byte_fallback": False, "vocab": _scored(own, tokens, scores)},
        "normalizer": {"type": "Sequence", "normalizers": start + (PREFIXED if prefixed and not joined else [])},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, metaspace] if joined else [metaspace]},
        "decoder": METASPACE | {"prepend_scheme": "always" if joined or prefixed else "never"},
    }


def _scored(own: Keys, tokens: list[str], scores: np.ndarray[Any, Any]) -> list[list[str | float]]:
    """Each token with its score. Of bytes it is so low that none is chosen: llama.cpp does not fall back on them here."""
    each = zip(tokens, scores.tolist(), own["token_type"], strict=True)
    return [[token, UNUSED_SCORE if kind == Kind.BYTE else float(score)] for token, score, kind in each]


def _check_user_defined(own: Keys, tokens: list[str], where: str) -> None:
    """CheckpointError for a token by whose first byte llama.cpp would leave other characters as they are, unreplaced."""
    defined = (token for token, kind in zip(tokens, own["token_type"], strict=True) if kind == Kind.USER_DEFINED)
    odd = next((token for token in defined if not token[0].isascii()), None)
    if odd is not None:
        message = f"beside the added token {odd!r} llama.cpp does not replace characters that begin with the same byte"
        raise CheckpointError(
            message, where=where, remedy="make it a special (control) token, if the model can do with that"
        )


def _checked(table: bytes, where: str) -> bytes:
    """Check a precompiled_charsmap, and return it: no lookup may lead outside of it, as a reader that trusts it would crash.

    The table is: size in bytes (uint32), a double-array trie of uint32 units (the children of a node are at
    index ^ offset ^ byte; the child of byte 0 gives the position of its replacement), and the replacements, each ending in a
    zero byte. CheckpointError for a damaged one. Source: darts-clone, sentencepiece.
    """
    damaged = CheckpointError("the table of replacements is damaged", where=where, remedy="get a good copy")
    size = int.from_bytes(table[:4], "little")
    if 4 + size >= len(table) or size % 4 or not size or table[-1]:
        raise damaged
    units, strings = np.frombuffer(table[4 : 4 + size], "<u4"), table[4 + size :]
    begins = np.frombuffer(b"\0" + strings[:-1], np.uint8) == 0
    seen, labels = np.zeros(len(units), bool), np.arange(1, 256, dtype=np.uint32)
    nodes = np.zeros(1, np.uint32)
    try:
        strings.decode()
        while len(nodes):
            own = units[nodes]
            base = nodes ^ own >> 10 << ((own & 512) >> 6)
            if not begins[units[base[own & 256 != 0]] & 0x7FFFFFFF].all():
                raise damaged
            places = base[:, None] ^ labels
            places = places[units[places] & 0x800000FF == labels]
            nodes = np.unique(places[~seen[places]])
            seen[nodes] = True
    except (IndexError, UnicodeDecodeError) as error:
        raise damaged from error
    return table
