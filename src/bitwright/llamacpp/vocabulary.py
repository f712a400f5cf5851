"""Tokenizers as llama.cpp keeps them: tokens, kinds, merges or scores, and the name of the rule that cuts text first.

Both ways: `keys_of` makes the keys of a checkpoint's tokenizer.json, `tokenizer_of` makes a tokenizer of a file's keys.
Two families are known: byte-level BPE ("gpt2"), whose first cut is a regular expression that llama.cpp knows by a name,
and BPE over characters with bytes to fall back on, as sentencepiece makes it ("llama"). llama.cpp gives the latter no
merges but scores: of all neighbours, it joins the pair that makes the token of the highest score.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError

Keys = dict[str, Any]
Kind = gguf.TokenType
NUMBERS = r"\p{N}{1,3}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "use_regex": False}
_GPT2 = {"type": "ByteLevel", "use_regex": True}


def _split(pattern: str) -> Keys:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name -> the steps of tokenizer.json that it stands for (llama-vocab.cpp).
CUTS: dict[str, list[Keys]] = {
    "gpt-2": [_GPT2],
    "llama-bpe": [_split(_WORDS.replace("NUMBERS", NUMBERS)), _BYTES],
    "qwen2": [_split(_WORDS.replace("NUMBERS", r"\p{N}")), _BYTES],
    "starcoder": [{"type": "Digits", "individual_digits": True}, _GPT2],
}
ESSENTIAL = ("type", "use_regex", "pattern", "behavior", "invert", "individual_digits")
SPACE = "▁"
SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
PREFIX = "tokenizer.ggml."


def keys_of(folder: Path, tokenizer: Any, vocabulary: int) -> Keys:
    """The keys of a checkpoint's tokenizer, of so many tokens. FormatError for a kind that llama.cpp is not known to cut
    alike; CheckpointError for a vocabulary that the model has no room for."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError("no tokenizer.json", where=str(folder), remedy="save the tokenizer with its fast form")
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        remedy = "byte-level BPE, or BPE with bytes to fall back on"
        raise FormatError(
            f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF here", where=str(file), remedy=remedy
        )
    tokens, kinds = _tokens(content, vocabulary, str(file))
    keys: Keys = {"model": "llama" if model.get("byte_fallback") else "gpt2", "tokens": tokens, "token_type": kinds}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model.get("byte_fallback"):
        keys |= {"pre": "default", "scores": _scores(tokens, merges), "add_space_prefix": _prefixed(content)}
    else:
        keys |= {
            "pre": _cut_of(content, str(file)),
            "merges": [" ".join(_joined(part) for part in pair) for pair in merges],
        }
    keys |= _special(folder, tokenizer, vocabulary)
    return {PREFIX + name: value for name, value in keys.items()} | _template(tokenizer)


def _tokens(content: Keys, vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """All tokens by id, and their kinds; ids that the tokenizer does not use are padding."""
    tokens, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [int(Kind.UNUSED)] * vocabulary
    fallback = bool(content["model"].get("byte_fallback"))
    known = {
        **content["model"]["vocab"],
        **{added["content"]: added["id"] for added in content.get("added_tokens", [])},
    }
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    if max(known.values()) >= vocabulary:
        message = f"the tokenizer has an id {max(known.values())}, the model's embedding ends at {vocabulary - 1}"
        raise CheckpointError(message, where=where, remedy="tokenizer and weights must belong together")
    for token, i in known.items():
        tokens[i] = token
        if i in added:
            kinds[i] = int(Kind.CONTROL if added[i].get("special") else Kind.USER_DEFINED)
            kinds[i] = int(Kind.UNKNOWN) if token == content["model"].get("unk_token") and fallback else kinds[i]
        else:
            kinds[i] = int(Kind.BYTE) if fallback and _is_byte(token) else int(Kind.NORMAL)
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Of the tokens that merges make, the earlier the higher; of all others 0."""
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i + 1)
    return [-float(rank.get(token, 0)) for token in tokens]


def _joined(part: str) -> str:
    """Half of a merge, without the space that divides the halves: byte-level BPE writes it as another letter."""
    return part.replace(" ", "Ġ")


def _prefixed(content: Keys) -> bool:
    """Whether a text is begun with a space of its own."""
    steps = [*_steps(content.get("normalizer"), "normalizers"), *_steps(content.get("pre_tokenizer"), "pretokenizers")]
    meta = next((s for s in steps if s["type"] == "Metaspace"), None)
    return any(s["type"] == "Prepend" for s in steps) or (
        meta is not None and meta.get("prepend_scheme", "always") != "never"
    )


def _steps(part: Keys | None, inner: str) -> list[Keys]:
    """A normalizer or pre-tokenizer as a list of single steps."""
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _cut_of(content: Keys, where: str) -> str:
    """llama.cpp's name of the tokenizer's first cut."""
    found = [_essence(step) for step in _steps(content.get("pre_tokenizer"), "pretokenizers")]
    for name, steps in CUTS.items():
        if [_essence(step) for step in steps] == found:
            return name
    remedy = f"llama.cpp must know this cut by a name; known here: {', '.join(CUTS)}"
    raise FormatError(f"an unknown pre-tokenizer: {json.dumps(found)[:200]}", where=where, remedy=remedy)


def _essence(step: Keys) -> Keys:
    """Without what does not change where a text is cut."""
    found = {key: value for key, value in step.items() if key in ESSENTIAL}
    return found | ({"behavior": "Isolated"} if found.get("behavior") == "isolated" else {})


def _special(folder: Path, tokenizer: Any, vocabulary: int) -> Keys:
    """Ids of special tokens, and whether the tokenizer puts them around a text by itself."""
    found: Keys = {}
    for key, attribute in SPECIAL.items():
        i = getattr(tokenizer, f"{attribute}_id", None)
        if isinstance(i, int) and 0 <= i < vocabulary:
            found[key] = i
    ids = tokenizer("a")["input_ids"]
    found["add_bos_token"] = len(ids) > 1 and ids[0] == found.get("bos_token_id", -1)
    found["add_eos_token"] = len(ids) > 1 and ids[-1] == found.get("eos_token_id", -1)
    return found | _end_of_turn(folder, found, vocabulary)


def _end_of_turn(folder: Path, found: Keys, vocabulary: int) -> Keys:
    """A second token that ends what a model says, where its generation_config.json names several."""
    file = folder / "generation_config.json"
    ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    others = [i for i in ends if i != found.get("eos_token_id") and i < vocabulary] if isinstance(ends, list) else []
    return {"eot_token_id": others[0]} if others else {}


def _template(tokenizer: Any) -> Keys:
    template = getattr(tokenizer, "chat_template", None)
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}


# ---------------------------------------------------------------------------------------------------------- and back


def tokenizer_of(keys: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts as llama.cpp does with these keys. CheckpointError for what is missing or not known."""
    own = {name.removeprefix(PREFIX): value for name, value in keys.items() if name.startswith(PREFIX)}
    tokens, kinds = own.get("tokens"), own.get("token_type")
    if not isinstance(tokens, list) or kinds is None or len(kinds) != len(tokens):
        raise CheckpointError(
            "no tokens, or not a kind for each", where=where, remedy="give a file with its vocabulary"
        )
    family = own.get("model")
    if family not in ("gpt2", "llama"):
        raise CheckpointError(f"a tokenizer of family {family!r} is not read here", where=where, remedy="gpt2 or llama")
    content = _byte_level(own, tokens, where) if family == "gpt2" else _sentencepiece(own, tokens)
    content |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(_added(tokens, kinds))}
    content["post_processor"] = _around(own, tokens)
    try:
        inner = Tokenizer.from_str(json.dumps(content))
    except Exception as error:
        raise CheckpointError(f"its tokenizer cannot be built: {error}", where=where) from error
    special = {a: tokens[own[key]] for key, a in SPECIAL.items() if 0 <= own.get(key, -1) < len(tokens)}
    found = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    found.chat_template = keys.get("tokenizer.chat_template")
    return found


def _byte_level(own: Keys, tokens: list[str], where: str) -> Keys:
    cut = own.get("pre", "gpt-2")
    steps = CUTS.get("gpt-2" if cut == "default" else cut)
    if steps is None:
        message = f"the pre-tokenizer {cut!r} is not known here"
        raise CheckpointError(message, where=where, remedy=f"known: {', '.join(CUTS)}")
    whole = {"add_prefix_space": bool(own.get("add_space_prefix", False)), "trim_offsets": True}
    cuts = [step | (whole if step["type"] == "ByteLevel" else {}) for step in steps]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": own.get("merges", [])},
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _sentencepiece(own: Keys, tokens: list[str]) -> Keys:
    prefix = bool(own.get("add_space_prefix", True))
    spaces: Keys = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    start: list[Keys] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back: Keys = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip: list[Keys] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = own.get("unknown_token_id")
    return {
        "model": {
            "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": _merges(own, tokens),
            "byte_fallback": True, "fuse_unk": True, "unk_token": None if unknown is None else tokens[unknown],
        },
        "normalizer": {"type": "Sequence", "normalizers": [*start, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    }  # fmt: skip


def _merges(own: Keys, tokens: list[str]) -> list[list[str]]:
    """Every way to make a token of two others, best score first: what joining by scores comes down to."""
    scores, known = own.get("scores"), set(tokens)
    ranked = sorted(range(len(tokens)), key=lambda i: -float(scores[i])) if scores is not None else range(len(tokens))
    pairs = []
    for i in ranked:
        token = tokens[i]
        if own["token_type"][i] == Kind.NORMAL:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [[left, right] for left, right in cuts if left in known and right in known]
    return pairs


def _added(tokens: list[str], kinds: Any) -> Iterator[Keys]:
    """Tokens that are found in a text before anything is cut."""
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind in (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN):
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            yield {"id": i, "content": token, "special": bool(kind != Kind.USER_DEFINED), **plain}


def _around(own: Keys, tokens: list[str]) -> Keys | None:
    """The special tokens that are put around a text."""
    begin = [own["bos_token_id"]] if own.get("add_bos_token", own["model"] == "llama") and "bos_token_id" in own else []
    end = [own["eos_token_id"]] if own.get("add_eos_token", False) and "eos_token_id" in own else []
    if not begin and not end:
        return None
    around = {i: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in {*begin, *end}}
    single = [*(around[i] for i in begin), {"Sequence": {"id": "A", "type_id": 0}}, *(around[i] for i in end)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    table = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in around}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": table}
