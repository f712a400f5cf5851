"""llama.cpp's rules for special tokens: which end generation, which have a fixed token type, which strip spaces, and the
default ids where no key gives one. Source: llama-vocab.cpp (`llama_vocab::impl::load`).
"""

from collections.abc import Mapping
from typing import Any

import gguf

Kind = gguf.TokenType
PREFIX = "tokenizer.ggml."
FOUND = (Kind.CONTROL, Kind.USER_DEFINED, Kind.UNKNOWN)  # token types that are split off before pre-tokenization
# Keys (without their prefix) of tokens that end generation.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id", "fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")
# Texts of tokens that end generation without a key.
END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>",
    "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
# Texts of fill-in-the-middle tokens, by which they are recognized where their key is missing. All become control tokens; those
# of padding, repositories and files also end generation.
FILL_TEXTS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
    "fim_pre_token_id": ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>",
                         "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
                         "<|prefix|>"),
    "fim_suf_token_id": ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>",
                         "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
                         "<|suffix|>"),
    "fim_mid_token_id": ("<|fim_middle|>", "<fim-middle>", "<fim_middle>",
                         "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
                         "<|middle|>"),
}  # fmt: skip
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# Default ids by tokenizer family, where no key gives one.
DEFAULT_IDS: dict[str, dict[str, int]] = {
    "gpt2": {"bos_token_id": 11, "eos_token_id": 11},
    "llama": {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    "t5": {"eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0},
    "bert": {
        "bos_token_id": 101, "unknown_token_id": 100, "seperator_token_id": 102, "padding_token_id": 0, "mask_token_id": 103,
    },
}  # fmt: skip
WITHOUT_BOS = ("chatglm-bpe", "glm4", "glm5")  # pre-tokenizers of BPE without a default BOS
PHI3 = ("phi-3", "phi3")  # if these are in general.name, special tokens strip the spaces after them
MODERN, MODERN_MASK = (
    "modern-bert",
    "[MASK]",
)  # if the former is in general.name, the latter strips the spaces before it
PHI3_NEEDS, PHI3_PLAIN = ("</s>", "<unk>", "<s>", "<|endoftext|>"), ("<unk>", "<s>", "<|endoftext|>")


def id_of(own: Mapping[str, Any], key: str) -> int | None:
    """The id of a special token: of the file's key, or llama.cpp's default; None if there is none. own: keys without prefix."""
    size = len(own["tokens"])
    given = own.get(key)
    if isinstance(given, int) and 0 <= given < size:
        return given
    if key == "bos_token_id" and own.get("pre") in WITHOUT_BOS:
        return None
    usual = DEFAULT_IDS.get(own.get("model", ""), {}).get(key)
    return usual if usual is not None and usual < size else None


def kinds_of(own: Mapping[str, Any]) -> list[int]:
    """Each token's type: as in the file, except for texts whose type llama.cpp overrides. own: keys without prefix."""
    tokens, given = own["tokens"], own.get("token_type")
    kinds = [int(Kind.NORMAL)] * len(tokens) if given is None else [int(kind) for kind in given]
    known = {text for key, texts in FILL_TEXTS.items() if key not in own for text in texts} | END_TEXTS
    for i, token in enumerate(tokens):
        if token in known:
            kinds[i] = int(Kind.CONTROL)
        if token in ALWAYS_SHOWN:
            kinds[i] = int(Kind.USER_DEFINED)
    if "<|tool_response>" in tokens and "</s>" in tokens:
        kinds[tokens.index("</s>")] = int(Kind.NORMAL)
    return kinds


def ends_of(keys: Mapping[str, Any]) -> list[int]:
    """Ids of all tokens that end generation, EOS first. keys: a file's, with their prefixes."""
    own = {name.removeprefix(PREFIX): value for name, value in keys.items() if name.startswith(PREFIX)}
    tokens = own.get("tokens")
    if not isinstance(tokens, list):
        return []
    found = [i for key in END_KEYS if (i := id_of(own, key)) is not None]
    texts = set(END_TEXTS) | {text for key in END_KEYS[3:] if key not in own for text in FILL_TEXTS[key]}
    found += [i for i, token in enumerate(tokens) if token in texts]
    there = {tokens[i] for i in found}
    if ("<|return|>" in there and there & {"<|call|>", "<|calls|>"}) or (
        "<|flush|>" in there and there & {"<|call|>", "<|calls|>"}
    ):
        found = [i for i in found if tokens[i] != "<|end|>"]
    if "<|tool_response>" in there:
        found = [i for i in found if tokens[i] != "</s>"]
    return list(dict.fromkeys(found))


def takes_spaces_before(name: str, mask: bool) -> frozenset[str]:
    """Tokens that strip the spaces before them: <mask> by the pre-tokenizer (mask), or else [MASK] by the model's name."""
    if mask:
        return frozenset({"<mask>"})
    return frozenset({MODERN_MASK}) if MODERN in name.lower() and not is_phi3(name) else frozenset()


def takes_spaces_behind(name: str, tokens: list[str]) -> frozenset[str]:
    """Tokens that strip the spaces after them: those of Phi-3, recognized by the model's name; none for other models, or if
    the vocabulary lacks the tokens without which llama.cpp does not load a Phi-3."""
    if not is_phi3(name) or not phi3_loads(tokens):
        return frozenset()
    return frozenset(tokens) - {*PHI3_PLAIN}


def is_phi3(name: str) -> bool:
    """Whether llama.cpp treats a model of this name as Phi-3."""
    return any(part in name.lower() for part in PHI3)


def phi3_loads(tokens: list[str]) -> bool:
    """Whether a vocabulary has all tokens that llama.cpp requires of a Phi-3."""
    return all(token in tokens for token in PHI3_NEEDS)
