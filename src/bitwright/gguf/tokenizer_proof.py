"""Verify that a GGUF file's tokenizer is its checkpoint's: both tokenize the strings of probes.py, with equal token ids."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitwright.errors import FormatError
from bitwright.gguf.pretokenizers import GPT2, ROWS, PreTokenizer
from bitwright.gguf.probes import ORDINARY, RARE, beside
from bitwright.gguf.special_tokens import END_TEXTS, PREFIX
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.gguf.unigram_tokenizer import SPACE, Keys, single_steps
from bitwright.gguf.wordpiece_tokenizer import LONG_WORD, is_otherwise

SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions in published expressions; SHORT_HERE: in pretokenizers.py
SHORT_HERE = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
STRIPPING = ("lstrip", "rstrip", "single_word", "normalized")
MOST_WORDS = 300
UNFINISHED = "\ufffd"
Ids = list[list[int]]


class Differing(NamedTuple):
    """at: index of the first string that two tokenizers cut otherwise, or how many there are; masked: whether spaces beside the
    mask token are cut otherwise, which `at` leaves out."""

    at: int
    masked: bool

    @property
    def rank(self) -> tuple[int, bool]:
        """The higher, the more alike."""
        return self.at, not self.masked


@dataclass(frozen=True)
class Proof:
    """Test strings, and the token ids that a checkpoint's own tokenizer gives.

    texts, wanted  strings and their ids
    ordinary       number of strings, from the first, that must agree
    mask           the mask token; strings that have it with spaces around may differ where no file can say that it strips them
    near           whether llama.cpp only approximates this pre-tokenizer, so that the strings after those may differ
    odd            added tokens with lstrip, rstrip, single_word or normalized set
    where          for errors
    """

    texts: list[str]
    wanted: Ids
    ordinary: int
    mask: str
    near: bool
    odd: tuple[str, ...]
    where: str

    @classmethod
    def of(cls, content: Keys, tokenizer: Any, where: str) -> "Proof":
        """The test strings for a checkpoint. content: its tokenizer.json; tokenizer: as transformers loads it."""
        added = content.get("added_tokens", [])
        vocabulary = content["model"]["vocab"]
        found = [token["content"] for token in added]
        found += [text for text in sorted(END_TEXTS) if text in vocabulary and text not in found]
        texts = [*ORDINARY, *beside([token for token in found if token])]
        words = _own_words(content)
        texts += [word for word in words if word.isascii()]
        rare = [*RARE, *(word for word in words if not word.isascii())]
        pieces = content["model"]["type"] == "WordPiece"
        if pieces:
            apart = [text for text in texts if is_otherwise(text, content.get("normalizer") or {})]
            texts, rare = [text for text in texts if text not in apart], [*rare, *apart, LONG_WORD]
        odd = tuple(token["content"] for token in added if any(token.get(flag) for flag in STRIPPING))
        composed = (content.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
        near = pieces or (composed and nearest(content) is not None)
        wanted = tokenizer([*texts, *rare])["input_ids"]
        mask = str(getattr(tokenizer, "mask_token", None) or "")
        return cls([*texts, *rare], wanted, len(texts), mask, near, odd, where)

    def differing(self, tokenizer: Any) -> Differing:
        """What another tokenizer gives other ids for."""
        found = tokenizer(self.texts)["input_ids"]
        each = [i for i, (a, b) in enumerate(zip(self.wanted, found, strict=True)) if a != b]
        spaced = [i for i in each if self.mask and self.mask in self.texts[i] and self._has_spaces(self.texts[i])]
        return Differing(next((i for i in each if i not in spaced), len(self.texts)), bool(spaced))

    def _has_spaces(self, text: str) -> bool:
        """Whether a text has white space beside the mask token."""
        return any(part != part.strip() for part in text.split(self.mask))

    def first_alike(self, ready: list[Keys]) -> tuple[Keys, tuple[str, ...]]:
        """Of several candidate sets of keys, the first whose tokenizer agrees, and notes for the user.

        If none agrees, the candidate that agrees longest is taken, with a note, if it differs only in rare strings that
        llama.cpp is known to approximate; otherwise FormatError with the first string that differs.
        """
        likely: tuple[Differing, Keys, Any] | None = None
        for keys in ready:
            tokenizer = tokenizer_of(keys, self.where)
            found = self.differing(tokenizer)
            if likely is None or found.rank > likely[0].rank:
                likely = found, keys, tokenizer
            if found == Differing(len(self.texts), False):
                break
        assert likely is not None
        found, keys, tokenizer = likely
        said = [f"spaces beside {self.mask!r} become other tokens in llama.cpp"] if found.masked else []
        if found.at == len(self.texts):
            return keys, tuple(said)
        text, ids = self.texts[found.at], tokenizer(self.texts[found.at])["input_ids"]
        if self.near and found.at >= self.ordinary:
            name = keys.get(f"{PREFIX}pre")
            near = f"llama.cpp's rule {name!r} is only near this tokenizer's: text such as {text!r} becomes other tokens there"
            return keys, (near, *said)
        becomes = f"{text!r} becomes {self.wanted[found.at]}, in llama.cpp at best {ids}"
        message = f"an unknown pre-tokenizer or normalizer: {becomes}"
        raise FormatError(message, where=self.where, remedy=self._remedy(text))

    def _remedy(self, text: str) -> str:
        token = next((token for token in self.odd if token in text), None)
        if token is not None:
            flags = ", ".join(STRIPPING)
            return f"set {flags} of {token!r} to false in tokenizer.json's added_tokens, if the model can do with that"
        return "keep this model in a format that carries tokenizer.json, such as --format compressed-tensors"


def _own_words(content: Keys) -> list[str]:
    """Some of a BPE tokenizer's tokens as test strings, first those that no merge makes (they show `ignore_merges`)."""
    vocabulary, merges = content["model"]["vocab"], content["model"].get("merges")
    if merges is None or not isinstance(vocabulary, dict):
        return []
    made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in merges}
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    plain = bool(content["model"].get("byte_fallback"))
    apart = [token for token in vocabulary if len(token) > 1 and token not in made][:MOST_WORDS]
    some = [*apart, *list(vocabulary)[:: max(1, len(vocabulary) // MOST_WORDS)]]
    texts = [token.replace(SPACE, " ") if plain else _unlettered(token, letters) for token in some]
    return [text for text in dict.fromkeys(texts) if text and UNFINISHED not in text]


def _unlettered(token: str, letters: dict[str, int]) -> str:
    """The text of a byte-level BPE token."""
    return bytes(letters.get(letter, 255) for letter in token).decode("utf-8", errors="replace")


def fitting_row(keys: Keys, content: Keys, proof: Proof, where: str) -> Iterator[str]:
    """The name of the pre-tokenizer for byte-level BPE: the first with which all test strings agree, then the most similar.

    Faster than trying whole sets of keys: one tokenizer is built, and only its pre-tokenizer is exchanged.
    """
    ranked = sorted(ROWS, key=lambda row: likeness(content, row)[0])
    inner = tokenizer_of(keys | {f"{PREFIX}pre": ranked[0].names[0]}, where)
    backend: Tokenizer = inner.backend_tokenizer
    for row in (row for row in ranked if row.bytes and not row.lstrip):
        backend.pre_tokenizer = built(row)
        backend.model.ignore_merges = row.whole
        found = proof.differing(inner)
        if found.at == len(proof.texts):
            alike = [other for other in ROWS if other.lstrip and replace(other, names=row.names, lstrip=False) == row]
            yield row.names[0]
            yield from (other.names[0] for other in alike if found.masked and proof.mask == "<mask>")
            return
    yield ranked[0].names[0]


def built(row: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """A row of pretokenizers.py as a pre-tokenizer of the tokenizers package."""
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in row.cuts]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def likeness(content: Keys, row: PreTokenizer) -> tuple[int, list[str]]:
    """How a tokenizer.json's pre-tokenizer compares with a row, and its own expressions in this table's spelling.

    0: the same; 1: the published expression that the row approximates; 2: as 0 or 1, but another `ignore_merges`; 3: as 0 or 1,
    but another post-processor; 4: different.
    """
    own = [cut for step in single_steps(content.get("pre_tokenizer"), "pretokenizers") for cut in _cuts(step)]
    whole = bool(content["model"].get("ignore_merges")) == row.whole
    pair = (content.get("post_processor") or {}).get("type") == "RobertaProcessing"
    same, near = own == list(row.cuts), own == [cut.replace(SHORT, SHORT_HERE) for cut in row.published]
    if (same or near) and pair == row.pair_end:
        return (2 if not whole else 0 if same else 1), own
    return (3 if same or near else 4), own


def nearest(content: Keys) -> PreTokenizer | None:
    """The row that a tokenizer.json's pre-tokenizer is, exactly or as published; None if there is none."""
    return next((row for row in ROWS if likeness(content, row)[0] < 2), None)


def _cuts(step: Keys) -> list[str]:
    """The regular expression by which one pre-tokenizer step splits, [] if it does not; repr where no expression equals it."""
    kind = step["type"]
    if kind == "Split":
        pattern = step["pattern"].get("Regex", step["pattern"].get("String", ""))
        plain = step.get("behavior", "").lower() == "isolated" and not step.get("invert")
        return [pattern.replace(SHORT, SHORT_HERE) if plain else repr(step)]
    if kind == "ByteLevel":
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits":
        return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
    return [repr(step)]
