"""The GGUF keys of a checkpoint's tokenizer, found by trial.

Each candidate set of keys is read back into a tokenizer (tokenizer.py), which must give the same token ids as the checkpoint's
own for several hundred strings (tokenizer_proof.py). If no keys do, the tokenizer is refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import unigram_tokenizer, wordpiece_tokenizer
from bitwright.gguf.rwkv_tokenizer import VOCABULARY, published_keys
from bitwright.gguf.special_tokens import END_TEXTS, MODERN, MODERN_MASK, PREFIX, Kind, ends_of, is_phi3, phi3_loads
from bitwright.gguf.templates import check_names, template_keys
from bitwright.gguf.tokenizer import NO_MERGE, SPECIAL
from bitwright.gguf.tokenizer_proof import Proof, fitting_row
from bitwright.gguf.unigram_tokenizer import Keys, single_steps

NAME = "general.name"


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's keys, with prefix, and notes for the user."""

    keys: Keys
    notes: tuple[str, ...] = ()


def keys_of(folder: Path, tokenizer: Any, vocabulary: int, name: str = "") -> Vocabulary:
    """The keys of a checkpoint's tokenizer. vocabulary: rows of the model's embedding; name: for general.name, which may be
    changed, because llama.cpp treats special tokens by it (`_names`).

    FormatError for a tokenizer that llama.cpp cannot reproduce, with the first string that differs; CheckpointError if the
    tokenizer has ids beyond the embedding.
    """
    file = folder / "tokenizer.json"
    if not file.is_file() and (folder / VOCABULARY).is_file():
        found = published_keys(folder, vocabulary)
        own = {name.removeprefix(PREFIX): value for name, value in found.items()}
        ends = {PREFIX + key: value for key, value in _ends(folder, own, own["tokens"]).items()}
        return Vocabulary(found | ends | {NAME: name})
    if not file.is_file():
        raise FormatError("no tokenizer.json", where=str(folder), remedy="save the tokenizer with its fast form")
    content = json.loads(file.read_text(encoding="utf-8"))
    kind = content["model"].get("type")
    if kind not in ("BPE", "WordPiece", "Unigram"):
        remedy = "byte-level BPE, BPE with bytes to fall back on, Unigram, or BERT's WordPiece"
        raise FormatError(
            f"a tokenizer of type {kind!r} cannot be written as GGUF here", where=str(file), remedy=remedy
        )
    tokens, kinds = _tokens(content, vocabulary, str(file))
    ways = list(_ways(content, tokens, kinds, file))
    keys: Keys = {"tokens": tokens, "token_type": kinds} | _special(folder, tokenizer, tokens)
    proof = Proof.of(content, tokenizer, str(file))
    ready = [{PREFIX + key: value for key, value in (keys | more).items()} for more in ways]
    if len(ready) == 1 and ready[0].get(f"{PREFIX}model") == "gpt2":
        ready = [one | {f"{PREFIX}pre": row} for one in ready for row in fitting_row(one, content, proof, str(file))]
    check_names(folder)
    found, notes = proof.first_alike([one | {NAME: title} for title in _names(name, tokens) for one in ready])
    return Vocabulary(found | template_keys(getattr(tokenizer, "chat_template", None), str(folder)), notes)


def _names(name: str, tokens: list[str]) -> list[str]:
    """Candidates for general.name, the likeliest first.

    llama.cpp strips spaces after special tokens if the name has "phi-3" or "phi3", and those before [MASK] if it has
    "modern-bert", so names with and without them are tried; never one with which llama.cpp would fail to load the file.
    """
    plain = name.lower() if is_phi3(name) or MODERN in name.lower() else name
    for mark, other in (("phi-3", "phi_3"), ("phi3", "phi_3"), (MODERN, "modern_bert")):
        plain = plain.replace(mark, other)
    found = [plain if is_phi3(name) and not phi3_loads(tokens) else name, plain]
    found += [f"Phi-3 {plain}".strip()] if phi3_loads(tokens) else []
    found += [f"{MODERN} {plain}".strip()] if MODERN_MASK in tokens else []
    return list(dict.fromkeys(found))


def _ways(content: Keys, tokens: list[str], kinds: list[int], file: Path) -> Iterator[Keys]:
    """Candidate keys that are particular to a tokenizer family, the likeliest first."""
    model = content["model"]
    if model["type"] == "WordPiece":
        yield wordpiece_tokenizer.keys_of(content, tokens, kinds, str(file))
    elif model["type"] == "Unigram":
        yield unigram_tokenizer.keys_of(content, len(tokens), str(file))
    else:
        merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        joined = [" ".join(_joined(part) for part in pair) for pair in merges] or [NO_MERGE]
        if not model.get("byte_fallback"):
            yield {"model": "gpt2", "merges": joined}
            return
        scores, prefixed = _scores(tokens, merges), _prefixed(content)
        for prefix in (prefixed, not prefixed):
            yield {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
        yield {"model": "gemma4", "pre": "gemma4", "merges": joined}


def _tokens(content: Keys, vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """All tokens by id, and their types; ids that the tokenizer does not use are unused padding tokens."""
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [int(Kind.UNUSED)] * vocabulary
    fallback = bool(content["model"].get("byte_fallback"))
    vocab, unknown = content["model"]["vocab"], content["model"].get("unk_id", -1)
    vocab = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    known = vocab | {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    if max(known.values()) >= vocabulary:
        message = f"the tokenizer has an id {max(known.values())}, the model's embedding ends at {vocabulary - 1}"
        raise CheckpointError(message, where=where, remedy="tokenizer and weights must belong together")
    for token, i in known.items():
        tokens[i] = token
        if i == unknown or (i in added and fallback and token == content["model"].get("unk_token")):
            kinds[i] = int(Kind.UNKNOWN)
        elif i in added:
            kinds[i] = int(Kind.CONTROL if added[i].get("special") else Kind.USER_DEFINED)
        else:
            kinds[i] = int(Kind.BYTE) if fallback and _is_byte(token) else int(Kind.NORMAL)
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """sentencepiece scores for merges: a token that merge i (from 1) makes has −i, all others 0."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i + 1)
    return [-float(rank.get(token, 0)) for token in tokens]


def _joined(part: str) -> str:
    """Half of a merge with Ġ, byte-level BPE's letter for the space, so that a space only separates the halves."""
    return part.replace(" ", "Ġ")


def _prefixed(content: Keys) -> bool:
    """Whether the tokenizer adds a space before a text."""
    steps = [
        *single_steps(content.get("normalizer"), "normalizers"),
        *single_steps(content.get("pre_tokenizer"), "pretokenizers"),
    ]
    meta = next((s for s in steps if s["type"] == "Metaspace"), None)
    return any(s["type"] == "Prepend" for s in steps) or (
        meta is not None and meta.get("prepend_scheme", "always") != "never"
    )


def _special(folder: Path, tokenizer: Any, tokens: list[str]) -> Keys:
    """The keys of special tokens' ids, and whether the tokenizer adds BOS, EOS and SEP to a text."""
    found: Keys = {}
    for key, attribute in SPECIAL.items():
        i = getattr(tokenizer, f"{attribute}_id", None)
        if isinstance(i, int) and 0 <= i < len(tokens):
            found[key] = i
    if "cls_token_id" in found:  # BERT's CLS takes the place of BOS
        found["bos_token_id"] = found["cls_token_id"]
    ids = tokenizer("a")["input_ids"]
    found["add_bos_token"] = len(ids) > 1 and ids[0] == found.get("bos_token_id", -1)
    found["add_eos_token"] = len(ids) > 1 and ids[-1] == found.get("eos_token_id", -1)
    if found.get("seperator_token_id") in tokenizer("a", "b")["input_ids"][1:-1]:
        found["add_sep_token"] = True  # between two texts
    return found | _ends(folder, found, tokens)


def _ends(folder: Path, found: Keys, tokens: list[str]) -> Keys:
    """The keys of all tokens that end generation: eos_token_id of generation_config.json, or else of config.json.

    FormatError for more of them than llama.cpp has keys for, or recognizes by their text.
    """
    given: Any = None
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if given is None and file.is_file():
            given = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    listed = given if isinstance(given, list) else [given]
    ends = [i for i in listed if isinstance(i, int) and 0 <= i < len(tokens)]
    first = found.get("eos_token_id", ends[0] if ends else None)
    others = [i for i in dict.fromkeys(ends) if i != first]
    unknown = sorted(
        others, key=lambda i: tokens[i] in END_TEXTS
    )  # those that llama.cpp does not know by text come first
    keys = {} if first is None else {"eos_token_id": first}
    keys |= dict(zip(("eot_token_id", "eom_token_id"), unknown, strict=False))
    known = ends_of({PREFIX + key: value for key, value in (found | keys | {"tokens": tokens}).items()})
    missing = [tokens[i] for i in others if i not in known]
    if missing:
        message = f"{len(ends)} tokens end what this model says, and llama.cpp has no key left for {', '.join(missing)}"
        remedy = (
            "leave in eos_token_id of generation_config.json no more than three, and those that it knows by their text"
        )
        raise FormatError(message, where=str(folder), remedy=remedy)
    return keys
