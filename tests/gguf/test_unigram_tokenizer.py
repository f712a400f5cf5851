"""sentencepiece's Unigram of GGUF files: spaces and bytes are llama.cpp's."""

from typing import Any

import numpy as np
import pytest

from bitwright.errors import CheckpointError
from bitwright.gguf.special_tokens import PREFIX
from bitwright.gguf.tokenizer import tokenizer_of

PIECES = {
    "▁": -2.0,
    "a": -3.0,
    "b": -3.0,
    "▁a": -3.0,
    "▁b": -3.0,
    "<": -4.0,
    "0": -4.0,
    "x": -4.0,
    "A": -4.0,
    ">": -4.0,
}


def tokens_of(text: str, **more: Any) -> list[str]:
    """Tokens of a text; more: keys beside the vocabulary's."""
    own = {
        "model": "t5", "tokens": ["<pad>", "</s>", "<unk>", "<0x0A>", *PIECES], "token_type": [3, 3, 2, 6, *[1] * len(PIECES)],
        "scores": np.array([0.0, 0.0, 0.0, 0.0, *PIECES.values()], np.float32), "unknown_token_id": 2, "eos_token_id": 1,
        "add_eos_token": False, **more,
    }  # fmt: skip
    tokenizer = tokenizer_of({PREFIX + name: value for name, value in own.items()}, "here")
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


@pytest.mark.parametrize(
    ("text", "joined", "prefixed", "expected"),
    [  # tokens by llama.cpp
        ("a  b", True, True, ["▁a", "▁b"]),
        (
            "a  b",
            True,
            False,
            ["▁a", "▁b"],
        ),  # joined spaces bring one before the first word, whatever the other key says
        ("a\tb", True, True, ["▁a", "<unk>", "b"]),
        ("a  b", False, False, ["a", "▁", "▁b"]),
        ("  a", False, True, ["▁", "▁", "▁a"]),
        ("a", False, True, ["▁a"]),
        ("  ", False, True, ["▁", "▁"]),
        ("a<0x0A>b", True, True, ["▁a", "<", "0", "x", "0", "A", ">", "b"]),
    ],
)
def test_tokens_are_those_of_llamacpp(text: str, joined: bool, prefixed: bool, expected: list[str]) -> None:
    assert tokens_of(text, remove_extra_whitespaces=joined, add_space_prefix=prefixed) == expected


def test_an_added_token_that_stops_replacements_is_refused() -> None:
    table = np.zeros(9, np.uint8)
    table[0] = 4
    kinds = [3, 3, 2, 6, 4, *[1] * (len(PIECES) - 1)]
    with pytest.raises(CheckpointError, match=r"added token '▁' llama\.cpp does not replace"):
        tokens_of("a", precompiled_charsmap=table, token_type=kinds)
