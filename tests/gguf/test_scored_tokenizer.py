"""sentencepiece's BPE of GGUF files: tokens are llama.cpp's where scores tie, and where tokens are of odd types."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

from bitwright.errors import CheckpointError, FormatError
from bitwright.formats.gguf_writer import GgufWriter
from bitwright.gguf.scored_tokenizer import ends_of_tokens, ranked_pairs
from bitwright.gguf.special_tokens import PREFIX, Kind
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.gguf_source import check_companions

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def keys_with(pieces: dict[str, float], kinds: dict[str, Kind] | None = None) -> dict[str, Any]:
    """The keys of a vocabulary of special tokens, bytes, and pieces with their scores."""
    kinds = kinds or {}
    own = {
        "model": "llama", "tokens": ["<unk>", "<s>", "</s>", *BYTES, *pieces],
        "scores": [0.0] * 259 + [float(score) for score in pieces.values()],
        "token_type": [2, 3, 3, *[6] * 256, *(int(kinds.get(piece, Kind.NORMAL)) for piece in pieces)],
        "add_bos_token": False,
    }  # fmt: skip
    return {PREFIX + name: value for name, value in own.items()}


def tokens_of(text: str, keys: dict[str, Any]) -> list[str]:
    tokenizer = tokenizer_of(keys, "here")
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def slowly(text: str, scores: dict[str, float]) -> list[str]:
    """The oracle: look at all neighbours again after each step."""
    parts = list(text)
    while True:
        pairs = [(-scores[joined], i) for i in range(len(parts) - 1) if (joined := parts[i] + parts[i + 1]) in scores]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def random_scores(random: Random, *, ties: bool) -> dict[str, float]:
    tokens = list("▁ab")
    for _ in range(random.randint(3, 25)):
        tokens.append(random.choice(tokens) + random.choice(tokens))
    tokens = list(dict.fromkeys(tokens))
    ranks = list(range(len(tokens)))
    random.shuffle(ranks)
    return {token: -float(rank % 3 if ties else rank) for token, rank in zip(tokens, ranks, strict=True)}


@pytest.mark.parametrize("seed", range(30))
def test_the_leftmost_of_the_best_is_joined(seed: int) -> None:
    random = Random(seed)
    scores = random_scores(random, ties=seed % 2 == 0)
    for _ in range(20):
        text = "".join(random.choice("▁ab") for _ in range(random.randint(0, 25)))
        ends = ends_of_tokens(text, scores)
        assert [text[a:b] for a, b in zip([0, *ends], ends, strict=False)] == slowly(text, scores)


@pytest.mark.parametrize("seed", range(20))
def test_without_ties_ranked_pairs_are_the_same(seed: int) -> None:
    random = Random(seed)
    scores = random_scores(random, ties=False)
    pairs = ranked_pairs(scores, frozenset(scores))
    assert pairs is not None
    ranked = Tokenizer(BPE(vocab={token: i for i, token in enumerate(scores)}, merges=pairs))
    for _ in range(20):
        text = "".join(random.choice("▁ab") for _ in range(random.randint(1, 25)))
        assert ranked.encode(text).tokens == slowly(text, scores)


@pytest.mark.parametrize(
    ("text", "pieces", "kinds", "expected"),
    [  # tokens by llama.cpp
        ("abc", {"▁": 0, "a": 0, "b": 0, "c": 0, "bc": -1, "ab": -1}, {}, ["▁", "ab", "c"]),
        ("bcab", {"▁": 0, "a": 0, "b": 0, "c": 0, "ca": -1, "bc": -1, "ab": -1}, {}, ["▁", "bc", "ab"]),
        ("ab", {"▁": 0, "a": 0, "b": 0, "ab": -1}, {"ab": Kind.UNUSED}, ["▁", "ab"]),
        ("a  b", {"▁": 0, "a": 0, "b": 0, "▁▁": -1}, {"▁▁": Kind.USER_DEFINED}, ["▁", "a", "▁▁", "b"]),
        ("ab", {"▁": 0, "b": 0, "ab": -1}, {}, ["▁", "ab"]),  # a alone is no token
        ("ba", {"▁": 0, "b": 0, "ab": -1}, {}, ["▁", "b", "<0x61>"]),
    ],
)
def test_tokens_are_those_of_llamacpp(
    text: str, pieces: dict[str, float], kinds: dict[str, Kind], expected: list[str]
) -> None:
    assert tokens_of(text, keys_with(pieces, kinds)) == expected


def test_tokens_that_are_split_off_before_tie_with_nothing() -> None:
    """As </s> and <s> of score 0, which neighbours in Llama 2's vocabulary would make."""
    keys = keys_with({"▁": 0, "<": 0, "</": -1, "s>": -2, "s": 0, ">": 0, "/": 0})
    assert tokenizer_of(keys, "here").backend_tokenizer.to_str()


def written(path: Path, keys: dict[str, Any]) -> Path:
    with GgufWriter(path, {"general.architecture": "llama", **keys}, []):
        return path


def test_no_directory_can_hold_ties(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", keys_with({"▁": 0, "a": 0, "b": 0, "ab": -1, "ba": -1}))
    with pytest.raises(FormatError, match="scores that are equal") as refused:
        check_companions(file)
    assert "OUT.gguf" in str(refused.value.remedy)


def test_two_tokens_of_one_text_are_refused() -> None:
    keys = keys_with({"▁": 0, "a": 0})
    keys[f"{PREFIX}tokens"][-1] = "▁"
    with pytest.raises(CheckpointError, match="'▁' has more than one id"):
        tokenizer_of(keys, "here")


def test_scores_must_be_numbers() -> None:
    with pytest.raises(CheckpointError, match="not a score for each token"):
        tokenizer_of(keys_with({"▁": 0, "a": float("nan")}), "here")
