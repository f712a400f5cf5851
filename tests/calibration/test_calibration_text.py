"""The calibration text `general`, and mixes of texts: what is in them, how dialogues are rendered, how windows are drawn."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from bitwright.calibration.general_text import (
    FILE,
    NO_TEMPLATE,
    Document,
    cut_at_lines,
    documents,
    general_pieces,
    spread,
)
from bitwright.calibration.text_mix import texts_of, windows_of
from bitwright.calibration.windows import Drawn, draw, load_tokenizer, read_text, sample, windows
from bitwright.cli.app import app
from bitwright.cli.demo import MODEL
from bitwright.errors import CalibrationError
from bitwright.pipeline.familiarity import unfamiliar
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe
from conftest import SHARED, make_checkpoint

CHATML = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LIMIT = {"vocabulary": 1 << 20, "seed": 0}


def chat_tokenizer(template: str | dict[str, str] | None = CHATML) -> Any:
    """Single bytes, a token before every text, two tokens of a chat's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    more = ["<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", additional_special_tokens=more)
    tokenizer.chat_template = template
    return tokenizer


def test_every_document_has_words_and_a_source_that_is_listed() -> None:
    listed = set(
        re.findall(r"^\| ([\w.-]+) \|", (FILE.parent / "SOURCES.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    found = documents()
    assert len(found) > 1000
    assert {d.source for d in found} == listed - {"source", "---"}
    for d in found:
        assert d.plain().strip() and d.kind and d.language
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffd]", d.plain()), d.source
        assert bool(d.turns) == (d.kind == "dialogue")
        assert all(role == ("user", "assistant")[i % 2] and words for i, (role, words) in enumerate(d.turns))
        assert len(d.turns) % 2 == 0


def test_the_mix_is_as_meant() -> None:
    kinds, languages, dialogues = Counter[str](), Counter[str](), set()
    for d in documents():
        size = len(d.plain().encode())
        kinds[d.kind] += size
        languages[d.language] += size
        if d.turns:
            dialogues.add(d.language)
    total = sum(kinds.values())
    assert 4_000_000 < total < 5_000_000 and FILE.stat().st_size < 1_350_000
    assert 0.12 < kinds["dialogue"] / total < 0.22 and 0.12 < kinds["code"] / total < 0.22
    assert {"literature", "encyclopaedia", "technical", "speech", "mathematics", "markup"} < set(kinds)
    others = ("zh", "ru", "de", "fr", "es", "ja", "ar", "pt", "ko", "it", "uk", "pl")
    assert all(languages[code] > 20_000 for code in others)
    assert languages["zh"] == max(languages[code] for code in others)
    assert {"python", "c", "cpp", "javascript", "rust", "go", "java", "shell", "sql", "html"} < set(languages)
    assert {"en", "de", "zh", "ru"} < dialogues


@pytest.mark.skipif(not (SHARED / "text/wikitext2_raw_test.txt").exists(), reason="no evaluation text here")
def test_no_sentence_of_the_evaluation_text_is_in_it() -> None:
    def sentences(text: str) -> set[str]:
        plain = re.sub(r" @(\S)@ ", r"\1", text)
        return {re.sub(r"\W+", "", s).lower() for s in re.split(r"(?<=[.!?])\s|\n", plain) if len(s) > 50}

    ours = set().union(*(sentences(d.plain()) for d in documents()))
    assert len(ours) > 10_000
    assert not ours & sentences((SHARED / "text/wikitext2_raw_test.txt").read_text(encoding="utf-8"))


def test_dialogues_are_rendered_in_the_chat_template_with_special_tokens_whole() -> None:
    tokenizer = chat_tokenizer()
    dialogue = next(d for d in documents() if len(d.turns) == 4)
    text = dialogue.chat(tokenizer)
    assert text.startswith("<|im_start|>user\n")  # the template's own <s> is left to the window's start
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids.count(start) == ids.count(end) == 4 and 256 not in ids
    assert ids[0] == start and tokenizer.decode(ids) == text


def test_every_window_begins_with_the_one_opening_token() -> None:
    tokens = sample(chat_tokenizer(), "general", samples=24, seqlen=512, **LIMIT)
    assert tokens.shape == (24, 512)
    assert bool((tokens[:, 0] == 256).all()) and not bool((tokens[:, 1:] == 256).any())
    assert bool((tokens == 257).any())


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('tools only') }}",
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        {"tools": CHATML},
    ],
)
def test_without_a_template_that_serves_dialogues_are_paragraphs(template: str | None) -> None:
    tokenizer = chat_tokenizer(template)
    pieces, notes = general_pieces(tokenizer, size=1 << 20, vocabulary=1 << 20, seed=0)
    assert notes == ((NO_TEMPLATE,) if template else ())
    dialogue = next(d for d in documents() if d.turns)
    (_, question), (_, answer), *_ = dialogue.turns
    assert any(piece.startswith(f"User: {question}\n\nAssistant: {answer}\n\n") for piece in pieces)


def test_a_template_of_tokens_that_the_model_lacks_is_passed_over() -> None:
    drawn = draw(chat_tokenizer(), "general", samples=24, seqlen=512, vocabulary=257, seed=0)
    assert drawn.notes == (NO_TEMPLATE,) and int(drawn.seen.max()) == 256
    assert draw(chat_tokenizer(), "general", samples=24, seqlen=512, vocabulary=259, seed=0).notes == ()


def test_few_windows_span_kinds_and_languages() -> None:
    """Eight windows of 2048 tokens: some 1.5 % of the text."""
    everything = documents()
    order = spread([(d.kind, d.language, d.source) for d in everything], seed=0)
    assert sorted(order) == list(range(len(everything)))
    taken, size = list[Document](), 0
    for i in order:
        if size < 8 * 2048 * 4:
            taken.append(everything[i])
            size += len(everything[i].plain())
    assert {"dialogue", "code", "technical", "literature"} <= {d.kind for d in taken}
    assert len({d.language for d in taken}) > 6 and "zh" in {d.language for d in taken}
    assert len({d.source for d in taken}) > 10


def test_any_stretch_holds_each_kind_as_often_as_the_whole() -> None:
    keys = [("a", "x")] * 60 + [("a", "y")] * 20 + [("b", "x")] * 20
    for seed in range(5):
        order = spread(keys, seed=seed)
        assert sorted(order) == list(range(100))
        for at in range(0, 100, 10):
            found = Counter(keys[i] for i in order[at : at + 10])
            assert abs(found["a", "x"] - 6) <= 2 and abs(found["a", "y"] - 2) <= 2 and abs(found["b", "x"] - 2) <= 1
    assert spread(keys, seed=1) == spread(keys, seed=1) != spread(keys, seed=2)
    assert spread([], seed=0) == []


def test_general_is_a_text_like_any_other() -> None:
    text = read_text("general")
    assert len(text) > 4_000_000 and "Assistant: " in text and "阿Ｑ" in text
    assert cut_at_lines("ab\ncd ef", 4) == ["ab\n", "cd ", "ef"]


def test_the_sample_is_the_seeds() -> None:
    tokenizer = load_tokenizer(MODEL)
    draws = [sample(tokenizer, "general", samples=8, seqlen=256, vocabulary=1 << 20, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two texts that are told apart by their letters."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(name * 63 for _ in range(400)))
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def test_windows_come_by_shares_and_take_turns(two: tuple[str, str]) -> None:
    a, b = two
    tokenizer = load_tokenizer(MODEL)
    known = {name: set(windows(tokenizer, name, seqlen=16, vocabulary=1 << 20).unique().tolist()) for name in two}
    only_b = known[b] - known[a]
    tokens = sample(tokenizer, f"{a}:3,{b}:1", samples=16, seqlen=16, **LIMIT)
    from_b = [bool(set(window.tolist()) & only_b) for window in tokens]
    assert sum(from_b) == 4
    assert all(sum(from_b[at : at + 4]) == 1 for at in range(0, 16, 4))
    halves = sample(tokenizer, f"{a},{b}", samples=16, seqlen=16, **LIMIT)
    assert sum(bool(set(window.tolist()) & only_b) for window in halves) == 8
    again = sample(tokenizer, f"{a}:0.75,{b}:0.25", samples=16, seqlen=16, **LIMIT)
    assert torch.equal(tokens, again)


def test_shares_are_normalised_and_counts_add_up() -> None:
    assert [text.share for text in texts_of("general:3,stdlib:1")] == [0.75, 0.25]
    thirds = texts_of("general,stdlib,stdlib-heldout")
    assert [text.share for text in thirds] == [1 / 3] * 3
    assert sorted(windows_of(thirds, 128, "")) == [42, 43, 43]
    assert windows_of(texts_of("general:0.7,stdlib:0.3"), 10, "") == [7, 3]
    assert [text.name for text in texts_of("general")] == ["general"]
    assert texts_of("general:5")[0].share == 1.0


def test_a_file_is_itself_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one,two.txt", "x:0.5", "general:0.7,y.txt:0.3"):
        Path(name).write_text("some text")
        assert [text.name for text in texts_of(name)] == [name]
    assert [(t.name, t.share) for t in texts_of("one,two.txt:1,x:0.5:3")] == [("one,two.txt", 0.25), ("x:0.5", 0.75)]
    assert [text.name for text in texts_of("no:such:file.txt")] == ["no:such:file.txt"]


@pytest.mark.parametrize(
    ("calib", "names"),
    [
        ("general:0,stdlib:1", "'0'"),
        ("general:-1,stdlib:2", "'-1'"),
        ("general:nan", "'nan'"),
        ("general:inf,stdlib:1", "'inf'"),
        ("general:much,stdlib:1", "'much'"),
        ("general:0.5,stdlib", "some texts have a share"),
        ("general,", "without a name"),
        (":0.5,general:1", "without a name"),
        ("general,general", "named twice"),
        ("none,general", "none is no text"),
        ("none:1", "none is no text"),
        ("general,some.gguf", "importance matrix 'some.gguf'"),
        ("general:1,stdlib:1000", "'general' would give none"),
        ("general:0.5,/no/such/file.txt:0.5", "cannot read the text"),
    ],
)
def test_what_a_mix_cannot_say(calib: str, names: str, llama: Path, tmp_path: Path) -> None:
    arguments = ["--scheme", "int4-g32", "--samples", "4", "--seqlen", "32", "--json", "--calib", calib]
    done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / "out"), *arguments])
    error = json.loads(done.stdout)
    assert done.exit_code == 2 and names in error["error"] and error["where"] and error["remedy"]
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_too_short_for_its_share_is_noted(two: tuple[str, str], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too few words here for that\n" * 3)
    tokenizer = load_tokenizer(MODEL)
    drawn = draw(tokenizer, f"{two[0]},{short}", samples=40, seqlen=16, **LIMIT)
    (note,) = drawn.notes
    assert str(short) in note and "not 20" in note and 20 < len(drawn.seen) < 40
    (note,) = draw(tokenizer, str(short), samples=40, seqlen=16, **LIMIT).notes
    assert note.startswith("the text gives") and "not 40" in note
    with pytest.raises(CalibrationError, match="shorter than one window"):
        draw(tokenizer, f"general,{short}", samples=8, seqlen=4096, **LIMIT)


def test_general_is_the_default(llama: Path, tmp_path: Path) -> None:
    how = ["--scheme", "int4-g32", "--method", "gptq", "--samples", "4", "--seqlen", "32", "--json"]
    results = []
    for name, more in (("a", []), ("b", ["--calib", "general"]), ("c", ["--calib", "stdlib"])):
        done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / name), *how, *more])
        assert done.exit_code in (0, 1), done.output
        results.append([file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))])
    assert results[0] and results[0] == results[1] != results[2]


def test_very_long_windows_are_compared_with_the_general_text_all_the_same(tmp_path: Path) -> None:
    """Longer than the documents that are taken of it, all together."""
    seqlen = 150_000
    folder = make_checkpoint(tmp_path / "model", max_position_embeddings=seqlen)
    plan = preflight(folder, Recipe.uniform("int4-g32", "gptq"), "compressed-tensors", samples=1, seqlen=seqlen)
    ids = torch.randint(0, 257, (1, seqlen), generator=torch.Generator().manual_seed(0))
    assert unfamiliar(plan, Drawn(ids, ids[:0])) == ()  # a random model knows no text better than another
