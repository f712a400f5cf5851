"""Tokenizers as llama.cpp keeps them: tokens, kinds, merges or scores, and the name of the rule that cuts text first.

Both ways: `keys_of` makes the keys of a checkpoint's tokenizer.json, `tokenizer_of` makes a tokenizer of a file's keys.
Four families are known: byte-level BPE ("gpt2"), whose first cut is a regular expression that llama.cpp knows by a name;
BPE over characters with bytes to fall back on, as sentencepiece makes it ("llama"); Unigram ("t5", in unigram_tokenizer.py);
and WordPiece of BERT ("bert"). llama.cpp gives the second no merges but scores: of all neighbours, it joins the pair that makes
the token of the highest score. In the last it marks where words begin, not where they go on.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import unigram_tokenizer
from bitwright.gguf.unigram_tokenizer import SPACE, Keys, single_steps

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
    "roberta-bpe": [_GPT2],  # and a token between two texts
}
ESSENTIAL = ("type", "use_regex", "pattern", "behavior", "invert", "individual_digits")
SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "cls_token_id": "cls_token",
    "seperator_token_id": "sep_token",
    "mask_token_id": "mask_token",
}
GOES_ON = "##"  # before a piece that is not a word's first
WORDS: Keys = {"clean_text": True, "handle_chinese_chars": True}  # as llama.cpp cuts for WordPiece
PREFIX = "tokenizer.ggml."


def keys_of(folder: Path, tokenizer: Any, vocabulary: int) -> Keys:
    """The keys of a checkpoint's tokenizer, of so many tokens. FormatError for a kind that llama.cpp is not known to cut
    alike; CheckpointError for a vocabulary that the model has no room for."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError("no tokenizer.json", where=str(folder), remedy="save the tokenizer with its fast form")
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") not in ("BPE", "WordPiece", "Unigram"):
        remedy = "byte-level BPE, BPE with bytes to fall back on, Unigram, or BERT's WordPiece"
        raise FormatError(
            f"a tokenizer of type {model.get('type')!r} cannot be written as GGUF here", where=str(file), remedy=remedy
        )
    tokens, kinds = _tokens(content, vocabulary, str(file))
    keys: Keys = {"tokens": tokens, "token_type": kinds}
    if model["type"] == "WordPiece":
        keys |= _pieces(content, tokens, kinds, str(file))
    elif model["type"] == "Unigram":
        keys |= unigram_tokenizer.keys_of(content, vocabulary, str(file))
    else:
        keys |= _pairs(content, tokens, file)
    keys |= _special(folder, tokenizer, vocabulary)
    return {PREFIX + name: value for name, value in keys.items()} | _template(tokenizer)


def _pairs(content: Keys, tokens: list[str], file: Path) -> Keys:
    """What is particular to BPE of either family."""
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
    if content["model"].get("byte_fallback"):
        prefixed = _prefixed(content)
        return {"model": "llama", "pre": "default", "scores": _scores(tokens, merges), "add_space_prefix": prefixed}
    joined = [" ".join(_joined(part) for part in pair) for pair in merges]
    cut = _cut_of(content, str(file))
    like_roberta = cut == "gpt-2" and (content.get("post_processor") or {}).get("type") == "RobertaProcessing"
    return {"model": "gpt2", "pre": "roberta-bpe" if like_roberta else cut, "merges": joined}


def _pieces(content: Keys, tokens: list[str], kinds: list[int], where: str) -> Keys:
    """What is particular to WordPiece; tokens with their marks as llama.cpp has them."""
    start, cut = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    like_bert = start.get("type") == "BertNormalizer" and cut.get("type") == "BertPreTokenizer"
    if not like_bert or any(start.get(key) != value for key, value in WORDS.items()):
        message = f"an unknown pre-tokenizer for WordPiece: {json.dumps([start, cut])[:200]}"
        raise FormatError(message, where=where, remedy="llama.cpp cuts for WordPiece as BERT does, and not otherwise")
    lowercase, accents = bool(start.get("lowercase")), start.get("strip_accents")
    marked = [_marked(token) if kind == Kind.NORMAL else token for token, kind in zip(tokens, kinds, strict=True)]
    return {
        "model": "bert", "pre": "default", "tokens": marked, "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
    }  # fmt: skip


def _marked(token: str) -> str:
    """A piece of WordPiece with llama.cpp's mark."""
    return token.removeprefix(GOES_ON) if token.startswith(GOES_ON) else SPACE + token


def _tokens(content: Keys, vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """All tokens by id, and their kinds; ids that the tokenizer does not use are padding."""
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
    steps = [
        *single_steps(content.get("normalizer"), "normalizers"),
        *single_steps(content.get("pre_tokenizer"), "pretokenizers"),
    ]
    meta = next((s for s in steps if s["type"] == "Metaspace"), None)
    return any(s["type"] == "Prepend" for s in steps) or (
        meta is not None and meta.get("prepend_scheme", "always") != "never"
    )


def _cut_of(content: Keys, where: str) -> str:
    """llama.cpp's name of the tokenizer's first cut."""
    found = [_essence(step) for step in single_steps(content.get("pre_tokenizer"), "pretokenizers")]
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
    if "cls_token_id" in found:  # what begins a text
        found["bos_token_id"] = found["cls_token_id"]
    ids = tokenizer("a")["input_ids"]
    found["add_bos_token"] = len(ids) > 1 and ids[0] == found.get("bos_token_id", -1)
    found["add_eos_token"] = len(ids) > 1 and ids[-1] == found.get("eos_token_id", -1)
    if found.get("seperator_token_id") in tokenizer("a", "b")["input_ids"][1:-1]:
        found["add_sep_token"] = True  # between two texts
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
    makers = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": unigram_tokenizer.content_of, "bert": _wordpiece}
    if family not in makers:
        remedy = f"known: {', '.join(makers)}; another needs a function in gguf/tokenizer.py"
        raise CheckpointError(f"a tokenizer of family {family!r} is not read here", where=where, remedy=remedy)
    content = makers[family](own, tokens, where)
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
        remedy = f"known: {', '.join(CUTS)}; another needs the steps it stands for in gguf/tokenizer.py"
        raise CheckpointError(message, where=where, remedy=remedy)
    whole = {"add_prefix_space": bool(own.get("add_space_prefix", False)), "trim_offsets": True}
    cuts = [step | (whole if step["type"] == "ByteLevel" else {}) for step in steps]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": own.get("merges", []),
            "ignore_merges": cut == "llama-bpe",  # a whole word that is a token is that token
        },
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }  # fmt: skip


def _wordpiece(own: Keys, tokens: list[str], where: str) -> Keys:
    kinds, unknown = own["token_type"], own.get("unknown_token_id", -1)
    if not 0 <= unknown < len(tokens):
        raise CheckpointError("WordPiece without a token for what is unknown", where=where, remedy="get a good copy")
    plain = [_unmarked(token) if kind == Kind.NORMAL else token for token, kind in zip(tokens, kinds, strict=True)]
    lowercase = bool(own.get("normalizer.lowercase", True))
    accents = bool(own.get("normalizer.strip_accents", lowercase))
    return {
        "model": {
            "type": "WordPiece", "vocab": {token: i for i, token in enumerate(plain)}, "unk_token": tokens[unknown],
            "continuing_subword_prefix": GOES_ON, "max_input_chars_per_word": 100,
        },
        "normalizer": {"type": "BertNormalizer", "strip_accents": accents, "lowercase": lowercase, **WORDS},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": GOES_ON, "cleanup": True},
    }  # fmt: skip


def _unmarked(token: str) -> str:
    """Undoes `_marked`."""
    return token.removeprefix(SPACE) if token.startswith(SPACE) else GOES_ON + token


def _sentencepiece(own: Keys, tokens: list[str], where: str) -> Keys:
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
    begun, ended = own["model"] in ("llama", "bert"), own["model"] == "t5"  # where no key says
    begin = [own["bos_token_id"]] if own.get("add_bos_token", begun) and "bos_token_id" in own else []
    end = [own["eos_token_id"]] if own.get("add_eos_token", ended) and "eos_token_id" in own else []
    if own["model"] == "bert" and "seperator_token_id" in own:
        end = [own["seperator_token_id"]]
    if not begin and not end:
        return None
    around = {i: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in {*begin, *end}}
    single = [*(around[i] for i in begin), {"Sequence": {"id": "A", "type_id": 0}}, *(around[i] for i in end)]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    table = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in around}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": table}
