"""A GGUF file's tokenizer is its checkpoint's, or there is no file: cuts found by comparing, end tokens, chat templates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bitwright.errors import FormatError
from bitwright.gguf.pretokenizers import PRE_TOKENIZERS, ROWS
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.special_tokens import ends_of
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.gguf.tokenizer_keys import keys_of
from bitwright.inference.generation import Generator
from bitwright.inference.sampling import Sampling
from bitwright.models.gguf_source import read_config, read_tokenizer
from bitwright.pipeline.conversion import convert
from conftest import make_checkpoint

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tokenizers") / "source")


def with_merges(folder: Path, pattern: str | None, *, whole: bool = False, **flags: Any) -> Any:
    """A tokenizer whose merges go across every cut that there is: any two neighbours of some strings, and longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, []
    for text in (
        "12345678",
        " 1",
        "a1",
        "1a",
        "'ll",
        "x'll",
        "  a",
        "\n\n",
        " \n",
        "aB",
        "!\n",
        "té",
        "नम",
        "स\u094d",
        "'s",
        "1'",
    ):
        word = byte_letters(text)
        for at in range(1, len(word)):
            if word[: at + 1] not in vocab:
                vocab[word[: at + 1]] = len(vocab)
                merges.append((word[:at], word[at]))
    vocab["whole"] = len(vocab)  # which no merges make
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    cut = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    )
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", **flags)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_letters(text: str) -> str:
    return "".join(
        p for p, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [
        (None, False, "gpt-2"),
        (LLAMA3, True, "llama-bpe"),
        (LLAMA3, False, "smaug-bpe"),
        (QWEN2, False, "qwen2"),
        (PRE_TOKENIZERS["qwen35"].cuts[0], False, "qwen35"),
        (r"\s+|\S+", False, None),
    ],
)
def test_names_are_found_by_comparing(pattern: str | None, whole: bool, name: str | None, tmp_path: Path) -> None:
    tokenizer = with_merges(tmp_path, pattern, whole=whole)
    if name is None:
        with pytest.raises(FormatError, match=r"unknown pre-tokenizer.* becomes"):
            keys_of(tmp_path, tokenizer, 400)
        return
    found = keys_of(tmp_path, tokenizer, 400)
    assert found.keys["tokenizer.ggml.pre"] == name and found.notes == ()
    text = "whole 12345 we'll 1a aB!\n\n  नम् té"
    assert tokenizer_of(found.keys, "x")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_where_llamacpp_only_comes_near_a_published_rule_it_is_said(tmp_path: Path) -> None:
    """GPT-4o's, whose words have marks of letters in them, which llama.cpp leaves out."""
    found = keys_of(tmp_path, with_merges(tmp_path, GPT4O), 400)
    assert found.keys["tokenizer.ggml.pre"] == "gpt-4o" and "only near" in found.notes[0]


def normalized(content: Any) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def prefixed(content: Any) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


def stripping(content: Any) -> None:
    content["added_tokens"].append({
        "id": len(content["model"]["vocab"]), "content": "<tool>", "special": True,
        "lstrip": True, "rstrip": False, "normalized": False,
        "single_word": False,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [(normalized, "'0x1F4' becomes"), (prefixed, "'0' becomes"), (stripping, "'x <tool> y' becomes")],
)
def test_what_no_name_expresses_is_refused(change: Callable[[Any], None], says: str, tmp_path: Path) -> None:
    with_merges(tmp_path, None)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(FormatError, match=says) as caught:
        keys_of(tmp_path, AutoTokenizer.from_pretrained(tmp_path), 400)
    assert "false in tokenizer.json" in caught.value.remedy or "compressed-tensors" in caught.value.remedy


@pytest.mark.parametrize(("mask", "name", "pre"), [("[MASK]", "modern-bert m", "gpt-2"), ("<mask>", "m", "jina-v2-es")])
def test_spaces_before_the_mask_token_are_stripped_as_in_the_checkpoint(
    mask: str, name: str, pre: str, tmp_path: Path
) -> None:
    """llama.cpp does so by the model's name, or by the pre-tokenizer's."""
    with_merges(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"mask_token": AddedToken(mask, lstrip=True, normalized=False)})
    tokenizer.save_pretrained(tmp_path)
    found = keys_of(tmp_path, AutoTokenizer.from_pretrained(tmp_path), 400, "m")
    assert (found.keys["general.name"], found.keys["tokenizer.ggml.pre"], found.notes) == (name, pre, ())
    text = f"a {mask} b \n{mask}{mask}  {mask}"
    assert tokenizer_of(found.keys, "x")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_spaces_beside_a_mask_token_that_no_file_strips_are_said(tmp_path: Path) -> None:
    with_merges(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"mask_token": AddedToken("<hole>", lstrip=True, normalized=False)})
    tokenizer.save_pretrained(tmp_path)
    found = keys_of(tmp_path, AutoTokenizer.from_pretrained(tmp_path), 400, "m")
    assert found.keys["tokenizer.ggml.pre"] == "gpt-2"
    assert found.notes == ("spaces beside '<hole>' become other tokens in llama.cpp",)


def test_a_name_by_which_llamacpp_would_strip_spaces_is_changed(tmp_path: Path) -> None:
    with_merges(tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"mask_token": AddedToken("[MASK]", lstrip=False, normalized=False)})
    tokenizer.save_pretrained(tmp_path)
    found = keys_of(tmp_path, AutoTokenizer.from_pretrained(tmp_path), 400, "Modern-BERT base")
    assert (found.keys["general.name"], found.notes) == ("modern_bert base", ())


def test_the_table_has_each_name_once() -> None:
    assert len(PRE_TOKENIZERS) == sum(len(row.names) for row in ROWS) >= 88


# ------------------------------------------------------------------------------------------- end tokens, chat templates


def test_every_token_that_ends_it_stops_it(source: Path, tmp_path: Path) -> None:
    """As on the directory: by a key of its own where llama.cpp does not know its text."""
    greedy = next(iter(_first_token(source)))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, greedy]}))
    convert(source, tmp_path / "a.gguf")
    assert GgufFile(tmp_path / "a.gguf").keys["tokenizer.ggml.eot_token_id"] == greedy
    assert read_config(tmp_path / "a.gguf").eos_token_id == [256, greedy]
    assert _first_token(tmp_path / "a.gguf") == []
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 1, 2, 3]}))
    with pytest.raises(FormatError, match="no key left for"):
        convert(source, tmp_path / "b.gguf")
    (source / "generation_config.json").unlink()


def _first_token(model: Path) -> list[int]:
    """What is written greedily behind a prompt, as ids."""
    generator = Generator.open(model)
    text = "".join(generator.complete("fox", most=1, sampling=Sampling(temperature=0)))
    return generator.tokenizer(text, add_special_tokens=False)["input_ids"][:1] if text else []


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({"model": "gpt2", "eos_token_id": 1}, [1, 3, 5, 6]),
        ({"model": "gpt2", "eos_token_id": 0, "eot_token_id": 2, "eom_token_id": 1}, [0, 2, 1, 3, 5, 6]),
        ({"model": "llama", "fim_rep_token_id": 7}, [2, 7, 3, 5]),
        ({"model": "llama", "eos_token_id": 10**6}, [2, 3, 5, 6]),
    ],
)
def test_end_tokens_are_llamacpp_s(keys: dict[str, Any], ends: list[int]) -> None:
    """By key, by text, by default; llama.cpp's log ("printing all EOG tokens") says the same of such files."""
    tokens = ["<unk>", "a", "b", "<|im_end|>", "c", "<end_of_turn>", "<|repo_name|>", "d"]
    assert ends_of({f"tokenizer.ggml.{key}": value for key, value in (keys | {"tokens": tokens}).items()}) == ends


def test_an_end_that_only_ends_a_channel() -> None:
    tokens = ["<|return|>", "<|call|>", "<|end|>"]
    assert ends_of({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}) == [0, 1]


def test_named_templates_there_and_back(source: Path, tmp_path: Path) -> None:
    before = AutoTokenizer.from_pretrained(source)
    named = {"default": "{{1}}", "tool_use": "{% generation %}{{2}}{% endgeneration %}"}
    plain, before.chat_template = before.chat_template, named
    before.save_pretrained(source)
    convert(source, tmp_path / "a.gguf")
    keys = GgufFile(tmp_path / "a.gguf").keys
    assert keys["tokenizer.chat_template"] == "{{1}}" and keys["tokenizer.chat_template.tool_use"] == named["tool_use"]
    assert read_tokenizer(tmp_path / "a.gguf").chat_template == named
    for odd in ("{% if %}", {"default": "{{1}}", "rag": "{{"}):
        before.chat_template = odd
        before.save_pretrained(source)
        with pytest.raises(FormatError, match="is no Jinja"):
            convert(source, tmp_path / "b.gguf")
    before.chat_template = plain
    before.save_pretrained(source)
