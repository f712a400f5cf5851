"""BERT's WordPiece in GGUF files: normalized as llama.cpp does, and written with a note on what it does otherwise."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitwright.gguf.special_tokens import PREFIX
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.gguf.tokenizer_keys import keys_of

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZé", "ᄀ", "ᅡ", "가", "ा", "न", "i̇"]


def keys_with(**options: bool) -> dict[str, Any]:
    """The keys of a vocabulary of letters, first of a word and not. options: of the normalizer."""
    tokens = [*SPECIAL, *(f"▁{letter}" for letter in LETTERS), *LETTERS]
    own = {
        "model": "bert", "tokens": tokens, "token_type": [3] * 5 + [1] * (len(tokens) - 5), "unknown_token_id": 1,
        "cls_token_id": 2, "bos_token_id": 2, "seperator_token_id": 3, "padding_token_id": 0, "mask_token_id": 4,
        **{f"normalizer.{name}": value for name, value in options.items()},
    }  # fmt: skip
    return {PREFIX + name: value for name, value in own.items()}


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [  # tokens by llama.cpp
        ("a가b", {}, ["a", "##ᄀ", "##b"]),
        ("나नाx", {}, ["[UNK]"]),
        ("नाx", {}, ["न", "##x"]),
        ("1\ufe0f\u20e3a", {}, ["[UNK]"]),
        ("É", {}, ["e"]),
        ("É", {"strip_accents": False}, ["é"]),
        ("A가É", {"lowercase": False}, ["A", "##가", "[UNK]"]),
        ("İa", {"strip_accents": False}, ["i", "##a"]),
        ("a\x0bb\x0cc\x85d", {}, ["a", "b", "c", "d"]),
        ("x" * 120, {}, ["x", *["##x"] * 119]),
    ],
)
def test_tokens_are_those_of_llamacpp(text: str, options: dict[str, bool], expected: list[str]) -> None:
    tokenizer = tokenizer_of(keys_with(**options), "here")
    found = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found == (expected if expected[-1] != "[UNK]" else ["[UNK]"])


def checkpoint(folder: Path, **options: Any) -> Any:
    """A BERT tokenizer of letters."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)])}
    made = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(**options)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
    }
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("lowercase", [True, False])
def test_what_is_normalized_otherwise_is_said(lowercase: bool, tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, lowercase=lowercase)
    found = keys_of(tmp_path, tokenizer, len(tokenizer))
    assert len(found.notes) == 1
    assert "becomes other tokens there" in found.notes[0]


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_directory_made_of_a_file_becomes_the_same_file(lowercase: bool, tmp_path: Path) -> None:
    first = keys_with(lowercase=lowercase)
    tokenizer_of(first, "here").save_pretrained(tmp_path)
    again = keys_of(tmp_path, AutoTokenizer.from_pretrained(tmp_path), len(first[f"{PREFIX}tokens"]))
    assert again.notes == ()
    assert again.keys[f"{PREFIX}tokens"] == first[f"{PREFIX}tokens"]
    assert again.keys[f"{PREFIX}normalizer.lowercase"] is lowercase
