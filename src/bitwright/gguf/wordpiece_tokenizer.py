"""BERT's WordPiece tokenizers, llama.cpp's family "bert": convert tokenizer.json to GGUF keys, and back.

llama.cpp marks the first piece of a word (▁), BERT the others (##). It also normalizes texts a little otherwise, which the
normalizer of a file read here repeats: without accents, of a Hangul syllable only the first letter is left, and marks of all
kinds are removed, not only nonspacing ones; İ becomes i; line tabulation, form feed and next line are spaces; no word is too
long. Source: llama-vocab.cpp (llm_tokenizer_wpm_session), unicode-data.cpp.
"""

import json
import unicodedata

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf.special_tokens import Kind, id_of
from bitwright.gguf.unigram_tokenizer import SPACE, Keys

GOES_ON = "##"  # BERT's prefix of a piece that continues a word
ENDLESS = (1 << 31) - 1  # characters of the longest word
BERT: Keys = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}  # as llama.cpp implements it
SYLLABLES = 588  # of Hangul that begin with the same letter
HANGUL = [(chr(0xAC00 + SYLLABLES * i), chr(0xAC00 + SYLLABLES * (i + 1) - 1), chr(0x1100 + i)) for i in range(19)]
LONG_WORD = "a" * 101  # BERT takes none of more than 100 characters


def _replaced(pattern: str, content: str) -> Keys:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _normalizer(*, lowercase: bool, accents: bool) -> Keys:
    """llama.cpp's normalizer. accents: whether they are removed."""
    plain = BERT | {"strip_accents": False, "lowercase": False}
    steps = [_replaced("[\x0b\x0c\x85]", " "), plain]
    if accents:
        steps += [_replaced(f"[{first}-{last}]", letter) for first, last, letter in HANGUL]
        steps += [{"type": "NFD"}, _replaced(r"\p{M}", "")]
    if lowercase:
        steps += [_replaced("İ", "i"), {"type": "Lowercase"}]
    return {"type": "Sequence", "normalizers": steps}


def is_otherwise(text: str, normalizer: Keys) -> bool:
    """Whether llama.cpp is known to normalize a text otherwise than a BertNormalizer."""
    if normalizer.get("type") != "BertNormalizer":
        return False
    accents = normalizer.get("strip_accents")
    if accents or (accents is None and normalizer.get("lowercase")):
        parts = unicodedata.normalize("NFD", text)
        return any("\u1100" <= c <= "\u11ff" or unicodedata.category(c) in ("Mc", "Me") for c in parts)
    return "İ" in text and bool(normalizer.get("lowercase"))


def keys_of(content: Keys, tokens: list[str], kinds: list[int], where: str) -> Keys:
    """The keys that are particular to WordPiece, tokens with llama.cpp's marks. FormatError for a normalizer unlike BERT's."""
    start, cut = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    lowercase, accents = _options(start)
    like_bert = start == _normalizer(lowercase=lowercase, accents=accents) or BERT.items() <= start.items()
    if not like_bert or cut.get("type") != "BertPreTokenizer":
        message = f"an unknown pre-tokenizer for WordPiece: {json.dumps([start, cut])[:200]}"
        raise FormatError(message, where=where, remedy="llama.cpp cuts for WordPiece as BERT does, and not otherwise")
    marked = [_marked(token) if kind == Kind.NORMAL else token for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "model": "bert", "pre": "default", "tokens": marked, "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": accents,
    }  # fmt: skip


def _options(normalizer: Keys) -> tuple[bool, bool]:
    """Whether letters become small, and accents are removed; of BERT's normalizer, or of one as made here."""
    kinds = [step.get("type") for step in normalizer.get("normalizers", [])]
    lowercase = bool(normalizer.get("lowercase", "Lowercase" in kinds))
    accents = normalizer.get("strip_accents", "NFD" in kinds if kinds else None)
    return lowercase, lowercase if accents is None else bool(accents)


def _marked(token: str) -> str:
    """A WordPiece token with llama.cpp's mark (▁ before first pieces) instead of BERT's (## before continuing pieces)."""
    return token.removeprefix(GOES_ON) if token.startswith(GOES_ON) else SPACE + token


def content_of(own: Keys, tokens: list[str], where: str) -> Keys:
    """tokenizer.json's parts for a file's keys (without prefix). CheckpointError for no, or a wrong, token for the unknown."""
    unknown = id_of(own, "unknown_token_id")
    if unknown is None:
        raise CheckpointError("WordPiece without a token for what is unknown", where=where, remedy="get a good copy")
    if own["token_type"][unknown] == Kind.NORMAL:
        message = f"the token for what is unknown, {tokens[unknown]!r}, is marked as a piece of words"
        raise CheckpointError(message, where=where, remedy="get a good copy")
    plain = [
        _unmarked(token) if kind == Kind.NORMAL else token
        for token, kind in zip(tokens, own["token_type"], strict=True)
    ]
    lowercase = bool(own.get("normalizer.lowercase", True))
    accents = bool(own.get("normalizer.strip_accents", lowercase))
    return {
        "model": {
            "type": "WordPiece", "vocab": {token: i for i, token in enumerate(plain)}, "unk_token": tokens[unknown],
            "continuing_subword_prefix": GOES_ON, "max_input_chars_per_word": ENDLESS,
        },
        "normalizer": _normalizer(lowercase=lowercase, accents=accents),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": GOES_ON, "cleanup": True},
    }  # fmt: skip


def _unmarked(token: str) -> str:
    """A WordPiece token with BERT's mark (## before continuing pieces) instead of llama.cpp's (▁ before first pieces)."""
    return token.removeprefix(SPACE) if token.startswith(SPACE) else GOES_ON + token
