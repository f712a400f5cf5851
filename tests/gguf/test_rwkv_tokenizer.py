"""RWKV's tokenizer in GGUF files: the longest token of the bytes, from left to right, as llama.cpp takes it."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import CheckpointError, FormatError
from bitwright.formats.gguf_writer import GgufWriter
from bitwright.gguf.rwkv_tokenizer import VOCABULARY, Longest, letters_of, published_keys
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.gguf.tokenizer_keys import keys_of
from bitwright.models.gguf_source import check_companions

WORDS = [
    b"the",
    b" the",
    b" th",
    b"\n\n",
    b"\t\t",
    "é".encode(),
    "你好".encode(),
    "你".encode()[:2],
    b"'s",
    b"\\n",
    b"abcde",
]
TEXT = "the the thx\n\n\n\t\t\t é你好你 it's \\n \\ abcd abcde \r\n ☃"


def published(folder: Path, words: list[bytes] = WORDS, *, skipped: int | None = None) -> Path:
    """A vocabulary as RWKV publishes it: each byte, then words; text that is UTF-8 as str, other bytes as bytes."""
    each = [bytes([b]) for b in range(256) if b != skipped] + words
    lines = []
    for i, raw in enumerate(each, 1):
        try:
            lines.append(f"{i} {raw.decode()!r} {len(raw)}")
        except UnicodeDecodeError:
            lines.append(f"{i} {raw!r} {len(raw)}")
    (folder / VOCABULARY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def slowly(text: str, words: list[bytes]) -> list[bytes]:
    """The oracle: of all tokens that the rest begins with, the longest."""
    rest, found = text.encode(), list[bytes]()
    while rest:
        found.append(max((w for w in [*words, rest[:1]] if rest.startswith(w)), key=len))
        rest = rest[len(found[-1]) :]
    return found


def test_there_and_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(published(tmp_path))
    bytes_of = [b"<s>", *(bytes([b]) for b in range(256)), *WORDS]
    ids = tokenizer(TEXT)["input_ids"]
    assert [bytes_of[i] for i in ids] == slowly(TEXT, WORDS)
    assert tokenizer.decode(ids) == TEXT and tokenizer("<s>a")["input_ids"] == [0, 98]
    found = keys_of(tmp_path, tokenizer, 300, "m")
    assert found.keys["tokenizer.ggml.tokens"][257:260] == ["the", " the", " th"]
    assert found.keys["tokenizer.ggml.tokens"][11] == "\\n" and found.keys["tokenizer.ggml.tokens"][299] == "[PAD299]"
    again = tokenizer_of(found.keys, "x")
    assert again(TEXT)["input_ids"] == ids and again.decode(ids) == TEXT and again.eos_token == "<s>"


@pytest.mark.parametrize("seed", range(10))
def test_random_vocabularies(seed: int) -> None:
    random = Random(seed)
    words = list({"".join(random.choices("ab ", k=random.randint(2, 6))) for _ in range(20)})
    text = "".join(random.choices("ab ", k=200))
    ends = Longest([*"ab ", *words]).ends(text)
    parts = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    assert parts == [part.decode() for part in slowly(text, [w.encode() for w in words])]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": ["a\\"]}, "a lone backslash"),
        ({"tokens": ["\\xG0"]}, "a lone backslash"),
        ({"tokens": ["\\x61"]}, "two tokens are the same bytes"),
        ({"tokens": ["zz"], "drop": 65}, "no token is the byte 0x40"),
        ({"tokens": ["a b"], "kind": 3}, "special token 'a b'"),
    ],
)
def test_a_vocabulary_that_llamacpp_would_loop_or_err_on(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    keys = published_keys(published(tmp_path))
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    if "drop" in change:
        del tokens[change["drop"]], kinds[change["drop"]]
    tokens += change["tokens"]
    kinds.append(change.get("kind", 1))
    with pytest.raises(CheckpointError, match=says):
        tokenizer_of(keys, "x")


def test_damaged_or_too_long_vocabularies(tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(CheckpointError, match="268 tokens, the model's embedding 100 rows"):
        published_keys(tmp_path, 100)
    for line in ("1 open('x') 1", "7 'a' 1", "1 'a' 2", "x", "1 [] 0", "1 {[]: 1} 3"):
        (tmp_path / VOCABULARY).write_text(line)
        with pytest.raises(CheckpointError, match="not RWKV's vocabulary"):
            published_keys(tmp_path)


def test_no_directory_can_hold_it(tmp_path: Path) -> None:
    keys = {"general.architecture": "llama", **published_keys(published(tmp_path))}
    with GgufWriter(tmp_path / "a.gguf", keys, []):
        pass
    with pytest.raises(FormatError, match="longest token"):
        check_companions(tmp_path / "a.gguf")


def test_letters() -> None:
    assert letters_of("\\t\\x00\\\\\\' é", "x") == "ĉĀ\\'ĠÃ©"
