"""Build a transformers tokenizer from the keys of a GGUF file, so that it gives llama.cpp's tokens. Inverse: tokenizer_keys.py.

Six families (tokenizer.ggml.model) are read:
gpt2    byte-level BPE; a key names its pre-tokenizer (pretokenizers.py)
gemma4  BPE over characters with byte fallback
llama   sentencepiece's BPE: tokens with scores instead of merges (scored_tokenizer.py)
t5      sentencepiece's Unigram (unigram_tokenizer.py)
bert    BERT's WordPiece (wordpiece_tokenizer.py)
rwkv    the longest tokens, from left to right (rwkv_tokenizer.py)
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from bitwright.errors import CheckpointError
from bitwright.gguf import rwkv_tokenizer, scored_tokenizer, unigram_tokenizer, wordpiece_tokenizer
from bitwright.gguf.header import Typed
from bitwright.gguf.pretokenizers import ESCAPED, PRE_TOKENIZERS, PreTokenizer
from bitwright.gguf.scored_tokenizer import CUT
from bitwright.gguf.special_tokens import FOUND, PREFIX, Kind, id_of, kinds_of, takes_spaces_before, takes_spaces_behind
from bitwright.gguf.templates import read_templates
from bitwright.gguf.unigram_tokenizer import SPACE, Keys

SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "cls_token_id": "cls_token",
    "seperator_token_id": "sep_token",
    "mask_token_id": "mask_token",
}
NEVER = frozenset("ÀÁõö÷øùúûüýþÿ")  # byte-level BPE's letters for bytes that never occur in UTF-8
NO_MERGE = "ÿ ÿ"  # written for a tokenizer without merges: llama.cpp requires at least one, and this never applies


def tokenizer_of(keys: Mapping[str, Any], where: str) -> PreTrainedTokenizerFast:
    """The tokenizer for a GGUF file's keys. CheckpointError for keys that are missing, or a family that is not known."""
    own = _own(keys, where)
    family = own.get("model")
    makers = {
        "gpt2": _bpe, "gemma4": _bpe, "llama": scored_tokenizer.content_of, "t5": unigram_tokenizer.content_of,
        "bert": wordpiece_tokenizer.content_of, "rwkv": rwkv_tokenizer.content_of,
    }  # fmt: skip
    if family not in makers:
        remedy = f"known: {', '.join(makers)}; another needs a function in gguf/tokenizer.py"
        raise CheckpointError(f"a tokenizer of family {family!r} is not read here", where=where, remedy=remedy)
    content = makers[family](own, own["tokens"], where)
    content |= {"version": "1.0", "truncation": None, "padding": None}
    content["added_tokens"] = list(_added(own, str(keys.get("general.name", ""))))
    content["post_processor"] = _around(own)
    special = {a: own["tokens"][i] for key, a in SPECIAL.items() if (i := _special(own, key)) is not None}
    try:
        found = _built(content, special)
    except Exception as error:
        raise CheckpointError(f"its tokenizer cannot be built: {error}", where=where) from error
    found.chat_template = read_templates(keys)
    return found


def _built(content: Keys, special: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of tokenizer.json's content.

    A BPE of many merges takes seconds to be written as JSON and read again, which transformers does once more to copy it.
    So that is done with the added tokens alone, and the whole model put in its place.
    """
    model = content["model"]
    if model["type"] == "BPE":
        added = {token["content"] for token in content["added_tokens"]}
        few = {token: i for token, i in model["vocab"].items() if token in added}
        content = {**content, "model": {"type": "BPE", "vocab": few, "merges": []}}
    inner = Tokenizer.from_str(json.dumps(content))
    found = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    if model["type"] == "BPE":
        found.backend_tokenizer.model = BPE(**{name: model[name] for name in model if name not in ("type", CUT)})
        if CUT in model:
            before, cut = found.backend_tokenizer.pre_tokenizer, pre_tokenizers.PreTokenizer.custom(model[CUT])
            found.backend_tokenizer.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([before, cut])
    return found


def _own(keys: Mapping[str, Any], where: str) -> Keys:
    """The tokenizer's keys without their prefix. Each token has a text (empty ones are replaced) and a type.

    CheckpointError if there are no tokens, or not a type for each, or two with one text.
    """
    plain = {name: np.asarray(value.value) if isinstance(value, Typed) else value for name, value in keys.items()}
    own = {name.removeprefix(PREFIX): value for name, value in plain.items() if name.startswith(PREFIX)}
    tokens, kinds = own.get("tokens"), own.get("token_type")
    known = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    numbers = np.zeros(len(tokens), int) if known and tokens and kinds is None else np.asarray(kinds)
    if not known or not tokens or numbers.dtype.kind not in "iu" or len(numbers) != len(tokens):
        raise CheckpointError(
            "no tokens, or not a kind for each", where=where, remedy="give a file with its vocabulary"
        )
    own["tokens"] = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(own["tokens"])) < len(tokens):
        twice = Counter(own["tokens"]).most_common(1)[0][0]
        message = f"token {twice!r} has more than one id, and llama.cpp takes no such vocabulary"
        raise CheckpointError(message, where=where, remedy="give each token a text of its own")
    if kinds is not None:
        own["token_type"] = numbers.tolist()
    own["token_type"] = kinds_of(own)
    return own


def _special(own: Keys, key: str) -> int | None:
    """The id of a special token; None if its type is one that llama.cpp does not split off from a text.

    transformers would split it off if it were set as a special token.
    """
    i = id_of(own, key)
    return i if i is not None and own["token_type"][i] in FOUND else None


def pre_tokenizer_of(own: Mapping[str, Any], where: str) -> PreTokenizer:
    """The pre-tokenizer for a file's keys (without prefix). CheckpointError for a name that is not in the table."""
    name = "gemma4" if own.get("model") == "gemma4" else own.get("pre", "default") or "default"
    row = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if row is None:
        remedy = f"known: {', '.join(PRE_TOKENIZERS)}; another needs a row in gguf/pretokenizers.py"
        raise CheckpointError(f"the pre-tokenizer {name!r} is not known here", where=where, remedy=remedy)
    return row


def _bpe(own: Keys, tokens: list[str], where: str) -> Keys:
    """tokenizer.json's parts for BPE: byte-level, or over characters where the pre-tokenizer says so."""
    row = pre_tokenizer_of(own, where)
    own["begins"], own["pre"] = row.begins, row.names[0]
    merges = [_pair(merge, where) for merge in own.get("merges", [])]
    model: Keys = {
        "type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "ignore_merges": row.whole,
        "merges": [pair for pair in merges if not {*pair[0], *pair[1]} <= NEVER],
    }  # fmt: skip
    steps: Keys = {"type": "Sequence", "pretokenizers": row.steps}
    if row.bytes:
        decoder: Keys = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        return {"model": model, "normalizer": None, "pre_tokenizer": steps, "decoder": decoder}
    spaces: Keys = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back: Keys = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    escaped = row.names[0] in ESCAPED
    model |= {"byte_fallback": True, "fuse_unk": False, "unk_token": None}
    decoders = [*([back] if escaped else []), {"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "model": model, "normalizer": spaces if escaped else None, "pre_tokenizer": steps,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }  # fmt: skip


def _pair(merge: Any, where: str) -> tuple[str, str]:
    """The two halves of a merge "left right", split at the first space after the first character."""
    at = merge.find(" ", 1) if isinstance(merge, str) else -1
    if at < 0:
        raise CheckpointError(f"{merge!r} is no merge", where=where, remedy="get a good copy")
    return merge[:at], merge[at + 1 :]


def _added(own: Keys, name: str) -> Iterator[Keys]:
    """tokenizer.json's added_tokens, split off before pre-tokenization. name: the model's, by which some strip spaces."""
    row = PRE_TOKENIZERS.get(own.get("pre", "")) if own["model"] in ("gpt2", "gemma4") else None
    before = takes_spaces_before(name, row is not None and row.lstrip)
    behind = takes_spaces_behind(name, own["tokens"])
    lines = row is not None and row.names[0] == "gemma4"  # each token that is only newlines is split off too
    for i, (token, kind) in enumerate(zip(own["tokens"], own["token_type"], strict=True)):
        if kind in FOUND or (lines and not token.strip("\n")):
            how = {"single_word": False, "lstrip": token in before, "rstrip": token in behind, "normalized": False}
            special = kind in (Kind.CONTROL, Kind.UNKNOWN)
            yield {"id": i, "content": token, "special": special, **how}


def _around(own: Keys) -> Keys | None:
    """tokenizer.json's post_processor: the special tokens that are added before and after a text; None if there are none."""
    tokens, family = own["tokens"], own["model"]
    begun = own.get("begins", family in ("llama", "bert"))  # where no key says
    begins = family == "bert" or own.get("pre") == "gemma4" or own.get("add_bos_token", begun)
    begin = [id_of(own, "bos_token_id")] if begins else []
    end = [id_of(own, "eos_token_id")] if own.get("add_eos_token", family == "t5") else []
    if family == "bert":
        end = [id_of(own, "seperator_token_id")]
    known = [i for i in (*begin, *end) if i is not None]
    if not known or family == "rwkv":
        return None
    around = {i: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in known}
    single = [
        *(around[i] for i in begin if i is not None),
        {"Sequence": {"id": "A", "type_id": 0}},
        *(around[i] for i in end if i is not None),
    ]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    table = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in around}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": table}
