"""eval: its numbers by definition from transformers' own logits, several texts at once, conversations, refusals, words."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from bitwright.api import evaluate
from bitwright.calibration.data_sets import Conversation
from bitwright.calibration.windows import load_tokenizer, windows
from bitwright.cli.app import app
from bitwright.cli.console import console
from bitwright.errors import CalibrationError, InputError
from bitwright.evaluation.chat_text import chat_windows, conversations
from bitwright.evaluation.evaluate import Evaluation
from bitwright.evaluation.evaluate import evaluate as judge
from bitwright.evaluation.judged_text import check_text
from bitwright.evaluation.report import evaluation_table
from bitwright.evaluation.verdict import ALONE, BANDS, band, short_name, verdict
from bitwright.models.streamed import StreamedModel, float_perplexities
from conftest import make_checkpoint, save_tokenizer

SPECIAL = ["<bos>", "<turn>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<turn>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}"
)
SAID = "Who are you?\n\nA model\nof words.\n\nAnd now?\n\nNothing yet.\n\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one tokenizer that predict quite different things."""
    folder = tmp_path_factory.mktemp("pair")
    changes: dict[str, Any] = {"dtype": torch.float32, "num_hidden_layers": 2}
    return make_checkpoint(folder / "a", initializer_range=0.2, **changes), make_checkpoint(folder / "b", **changes)


def log_probabilities(folder: Path, ids: Tensor) -> Tensor:
    """By transformers, float64 [W, T − 1, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids).logits[:, :-1].double().log_softmax(-1)


def with_error(nll: NDArray[np.float64]) -> tuple[float, float]:
    """e to the mean of [W, T − 1], and its standard error over the windows."""
    means = nll.mean(1)
    return float(np.exp(means.mean())), float(np.exp(means.mean()) * means.std(ddof=1) / np.sqrt(len(means)))


def run(*arguments: str, fine: int = 0) -> str:
    done = CliRunner().invoke(app, ["eval", *arguments])
    assert done.exit_code == fine, (done.output, done.exception)
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- numbers


def test_every_number_by_its_definition(pair: tuple[Path, Path], text: str) -> None:
    model, reference = pair
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(Path(text).read_text()[:1600])["input_ids"]).view(-1, 32)
    log_q, log_p = (log_probabilities(folder, ids) for folder in pair)
    q, p = (-t.gather(-1, ids[:, 1:, None])[..., 0].numpy() for t in (log_q, log_p))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    found = evaluate(model, reference=reference, text=text, seqlen=32, tokens=1600)
    assert found.text == text and found.tokens == kl.size == 50 * 31
    close = {
        "perplexity": with_error(q),
        "reference_perplexity": with_error(p),
        "perplexity_ratio": with_error(q - p),
        "kl": (kl.mean(), kl.mean(1).std(ddof=1) / np.sqrt(50)),
    }
    content = found.as_dict()
    for name, (mean, stderr) in close.items():
        mean_key = "kl_mean" if name == "kl" else name
        assert content[mean_key] == pytest.approx(mean, rel=1e-4), name
        assert content[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-3), name
    assert found.perplexity_ratio == pytest.approx(found.perplexity / (found.reference_perplexity or 0), rel=1e-6)
    for key, q_ in (("kl_median", 0.5), ("kl_p99", 0.99), ("kl_p999", 0.999)):
        assert content[key] == pytest.approx(np.quantile(kl, q_, method="nearest"), rel=1e-4), key
    assert content["kl_median"] < content["kl_p99"] < content["kl_p999"]
    same = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert found.top1 == pytest.approx(same, abs=2e-3) and 0 < same < 1


def test_the_reference_s_perplexity_is_its_own(
    pair: tuple[Path, Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored predictions know it, too, and the reference is not walked again for them."""
    model, reference = pair
    how: dict[str, Any] = {"text": text, "seqlen": 32, "tokens": 640}
    alone = evaluate(reference, **how)
    assert alone.reference_perplexity is None and alone.perplexity_ratio is None and alone.kl_p99 is None
    walked = watch(monkeypatch)
    for folders in ([model, reference], [model, reference], [model]):
        kept = tmp_path / "kept" if len(walked) >= 2 else None
        found = evaluate(model, reference=reference, predictions=kept, **how)
        assert (found.reference_perplexity, found.reference_perplexity_stderr) == pytest.approx(
            (alone.perplexity, alone.perplexity_stderr), rel=1e-6
        )
        assert walked[-len(folders) :] == folders
    assert len(walked) == 5


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A list of the models that are walked from now on."""
    walked, honest = list[Path](), StreamedModel.carried

    def carried(self: StreamedModel, parts: list[Tensor], *told: Any) -> list[Tensor]:
        walked.append(self.folder)
        return honest(self, parts, *told)

    monkeypatch.setattr(StreamedModel, "carried", carried)
    return walked


def test_float_perplexity(pair: tuple[Path, Path], text: str) -> None:
    ids = windows(load_tokenizer(pair[0]), text, seqlen=32, vocabulary=257)
    nll = -log_probabilities(pair[0], ids).gather(-1, ids[:, 1:, None])
    found, alone = float_perplexities(pair[0], [ids, ids[:2]])
    assert found == pytest.approx(float(nll.mean().exp()), rel=1e-5)
    assert found == pytest.approx(evaluate(pair[0], text=text, seqlen=32).perplexity, rel=1e-12)
    assert alone == pytest.approx(float(nll[:2].mean().exp()), rel=1e-5) != found


def test_windows_of_another_length_have_predictions_of_their_own(
    pair: tuple[Path, Path], text: str, tmp_path: Path
) -> None:
    """The very same tokens, cut otherwise."""
    for seqlen in (32, 64):
        how: dict[str, Any] = {"reference": pair[1], "text": text, "seqlen": seqlen, "tokens": 256}
        kept, exact = evaluate(pair[0], predictions=tmp_path, **how), evaluate(pair[0], **how)
        assert kept.tokens == exact.tokens and kept.kl_mean == pytest.approx(exact.kl_mean, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- several texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three texts of different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    for i, times in enumerate((30, 11, 23)):
        (folder / f"{i}.txt").write_text("".join(f"{k * (i + 7)} foxes, {k} dogs.\n" for k in range(times)))
    return [str(folder / f"{i}.txt") for i in range(3)]


def without_seconds(found: Sequence[Evaluation]) -> list[dict[str, Any]]:
    return [{**one.as_dict(), "seconds": 0} for one in found]


def test_every_block_of_both_models_is_told_of(pair: tuple[Path, Path], text: str) -> None:
    (float_model, quantized), told = pair, list[tuple[str, int, int]]()
    judge(
        quantized, reference=float_model, texts=[text], seqlen=32, tokens=64,
        progress=lambda what, done, total: told.append((what, done, total)),
    )  # fmt: skip
    depth = told[0][2]
    assert told == [(what, done, depth) for what in ("block", "the reference: block") for done in range(depth + 1)]
    apart: tuple[list[str], list[str]] = ([], [])
    judge(
        quantized, reference=float_model, texts=[text], seqlen=32, tokens=64,
        progress=lambda what, *_: apart[0].append(what), reference_progress=lambda what, *_: apart[1].append(what),
    )  # fmt: skip
    assert apart[0] == apart[1] == ["block"] * (depth + 1)


def test_a_text_looked_at_beforehand_is_refused_by_the_option_for_its_windows(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for seqlen in (32, 4096):
        with pytest.raises(InputError) as caught:
            check_text(pair[0], str(short), seqlen=seqlen, tokens=None)
        assert "--eval-seqlen" in caught.value.remedy


@pytest.mark.parametrize("stored", [False, True])
def test_several_texts_are_judged_as_each_alone(
    stored: bool, pair: tuple[Path, Path], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly; and each model is walked once, or the reference not at all where all is stored."""
    how: dict[str, Any] = {"reference": pair[1], "seqlen": 32, "predictions": tmp_path / "p" if stored else None}
    first = evaluate(pair[0], text=texts[0], **how)
    walked = watch(monkeypatch)
    together = evaluate(pair[0], text=texts, **how)
    assert walked == list(pair)
    alone = [first, *(evaluate(pair[0], text=one, **how) for one in texts[1:])]
    assert without_seconds(together) == without_seconds(alone)
    assert [one.text for one in together] == texts and len({one.tokens for one in together}) == 3
    walked.clear()
    assert without_seconds(evaluate(pair[0], text=tuple(texts), **how)) == without_seconds(alone)
    assert walked == [pair[0]] if stored else walked == list(pair)


def test_one_text_is_an_object_and_several_are_a_list(pair: tuple[Path, Path], texts: list[str]) -> None:
    how = ["--reference", str(pair[1]), "--seqlen", "32", "--json"]
    one = json.loads(run(str(pair[0]), "--text", texts[0], *how))
    assert one["text"] == texts[0] and {"kl_p99", "kl_p999", "reference_perplexity", "perplexity_ratio"} <= set(one)
    several = json.loads(run(str(pair[0]), "--text", texts[0], "--text", texts[2], *how))
    assert set(several) == {"texts"} and [t["text"] for t in several["texts"]] == [texts[0], texts[2]]
    assert {**several["texts"][0], "seconds": 0} == {**one, "seconds": 0}


# ------------------------------------------------------------------------------------------------------- conversations


def make_chat_model(folder: Path, *, begin: bool = True, template: str = "{{ bos_token }}" + TEMPLATE) -> Path:
    """A model of bytes and of three special tokens: 256 to 258. begin: its tokenizer begins each text with the first."""
    make_checkpoint(folder, vocab_size=259, num_hidden_layers=2)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *SPECIAL])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if begin:
        bpe.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 256)])
    names: dict[str, Any] = {"bos_token": "<bos>", "additional_special_tokens": SPECIAL[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat") / "model")


def cut(model: Path, source: str, seqlen: int = 16) -> Tensor:
    return chat_windows(load_tokenizer(model), source, seqlen=seqlen, vocabulary=259, where=model)


def test_paragraphs_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n\n" + SAID + " \n\n  indented\nGood.\n")
    said = [[(m["role"], m["content"]) for m in one.messages] for one in conversations(str(file))]
    assert said == [
        [("user", "Who are you?"), ("assistant", "A model\nof words.")],
        [("user", "And now?"), ("assistant", "Nothing yet.")],
        [("user", "  indented\nGood.")],
    ]


def test_conversations_are_cut_in_the_template(chat_model: Path, tmp_path: Path) -> None:
    """The windows hold the whole rendered stream, special tokens as single ids; each begins with one BOS."""
    file = tmp_path / "a.txt"
    file.write_text(4 * SAID)
    ids = cut(chat_model, str(file))
    assert ids.shape[1] == 16 and (ids[:, 0] == 256).all()
    assert not ((ids[:, :-1] == 256) & (ids[:, 1:] == 256)).any()
    rendered = 4 * [
        "<bos><turn>user\nWho are you?<end><turn>assistant\nA model\nof words.<end>",
        "<bos><turn>user\nAnd now?<end><turn>assistant\nNothing yet.<end>",
    ]
    read = load_tokenizer(chat_model).decode(ids.flatten().tolist())
    plain = "".join(rendered).replace("<bos>", "")
    assert plain.startswith(read.replace("<bos>", "")) and len(plain) - len(read.replace("<bos>", "")) < 40
    for token in (257, 258):
        assert abs(int((ids == token).sum()) - 16) <= 1
    inside = int((ids[:, 1:] == 256).sum())  # documents that do not happen to begin a window
    assert 5 <= inside <= 7


@pytest.mark.parametrize(
    ("begin", "template"), [(True, TEMPLATE), (False, TEMPLATE), (False, "{{ bos_token }}" + TEMPLATE)]
)
def test_what_begins_a_text_is_the_tokenizer_s(begin: bool, template: str, tmp_path: Path) -> None:
    model = make_chat_model(tmp_path / "model", begin=begin, template=template)
    file = tmp_path / "a.txt"
    file.write_text(SAID)
    ids = cut(model, str(file))
    assert bool((ids[:, 0] == 256).all()) == begin
    assert int((ids[:, 1:] == 256).sum()) == ("bos" in template) and len(ids) >= 5


def test_lines_of_messages_are_judged(chat_model: Path, tmp_path: Path) -> None:
    """The same conversations, written either way, cost the same; without the template the text is another."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": "Who are you?"},
                {"role": "assistant", "content": "A model\nof words."},
            ]
        },
        {
            "id": 7,
            "messages": [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Nothing yet."}],
        },
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    (tmp_path / "a.txt").write_text(SAID)
    how: dict[str, Any] = {"reference": chat_model, "seqlen": 16}
    found = [evaluate(chat_model, text=str(tmp_path / f"a.{kind}"), chat=True, **how) for kind in ("jsonl", "txt")]
    assert found[0].perplexity == found[1].perplexity and found[0].kl_mean == 0
    plain = evaluate(chat_model, text=str(tmp_path / "a.txt"), **how)
    assert plain.tokens < found[1].tokens and plain.perplexity != found[1].perplexity
    few = evaluate(chat_model, text=str(tmp_path / "a.txt"), chat=True, tokens=32, **how)
    assert few.tokens == 2 * 15
    shown = json.loads(run(str(chat_model), "--chat", "--text", str(tmp_path / "a.txt"), "--seqlen", "16", "--json"))
    assert shown["perplexity"] == found[1].perplexity


def test_a_line_s_end_inside_a_message_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a\u2028b\u0085c"}]}\n')
    assert conversations(str(tmp_path / "a.jsonl")) == [Conversation([{"role": "user", "content": "a\u2028b\u0085c"}])]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[]", "neither a text nor a conversation"),
        ('"messages"', "neither a text nor a conversation"),
        ('{"text": 7}', "neither a text nor a conversation"),
        ('{"messages": "a"}', "not a conversation"),
        ('{"messages": ["a"]}', "not a conversation"),
        ('{"messages": [{"content": "a"}]}', "not a conversation"),
        ('{"messages": [{"role": "user"}]}', "a role or content that is not text"),
        ('{"messages": []}', "no messages"),
        ('{"messages": [{"role": "user", "content": null}]}', "a role or content that is not text"),
    ],
)
def test_lines_that_are_no_conversations(line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}\n\n' + line + "\n")
    with pytest.raises(CalibrationError) as caught:
        conversations(str(file))
    assert caught.value.message == says and caught.value.where == f"{file}, line 3"
    assert '"role": "user"' in caught.value.remedy


def refused(model: Path, *arguments: str) -> dict[str, str]:
    """eval must exit with 2 and print one JSON object that names place and remedy."""
    error: dict[str, str] = json.loads(run(str(model), "--json", "--seqlen", "32", *arguments, fine=2))
    assert error["where"] and error["remedy"]
    return error


def test_conversations_that_cannot_be_had(chat_model: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    file, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    file.write_text("Too short.")
    error = refused(chat_model, "--chat", "--text", str(file))
    assert "shorter than one window of 32" in error["error"] and error["where"] == str(file)
    lines.write_text('{"messages": [{"role": "tool", "content": "a"}]}\n')
    error = refused(chat_model, "--chat", "--text", str(lines))
    assert "no tools here" in error["error"] and error["where"] == f"{lines}, conversation 1"
    bare = tmp_path / "bare"
    shutil.copytree(pair[0], bare)
    (bare / "chat_template.jinja").unlink()
    error = refused(bare, "--chat", "--text", str(file))
    assert "no chat template" in error["error"] and error["where"] == str(bare) and "--chat" in error["remedy"]


def test_windows_that_do_not_fit(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    model = str(pair[0])
    error = refused(pair[0], "--text", text, "--seqlen", "65")
    assert "65" in error["error"] and error["where"] == model and "64" in error["remedy"]
    short = make_checkpoint(tmp_path / "short", num_hidden_layers=1, max_position_embeddings=16)
    error = refused(pair[0], "--text", text, "--reference", str(short))
    assert error["where"] == str(short) and "16" in error["remedy"]
    (tmp_path / "a.txt").write_text("Too short.")
    error = refused(pair[0], "--text", text, "--text", str(tmp_path / "a.txt"))
    assert "shorter than one window" in error["error"] and error["where"] == str(tmp_path / "a.txt")
    with pytest.raises(InputError, match="no text to judge on"):
        evaluate(pair[0], text=[])


def test_a_reference_of_other_tokens(pair: tuple[Path, Path], text: str, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", num_hidden_layers=1, vocab_size=300)
    error = refused(pair[0], "--text", text, "--reference", str(other))
    assert "has 300 tokens, the model's 257" in error["error"] and error["where"] == str(other)
    assert str(pair[0]) in error["remedy"]
    turned = tmp_path / "turned"
    shutil.copytree(pair[1], turned)
    content = json.loads((turned / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["f"], vocabulary["x"] = vocabulary["x"], vocabulary["f"]
    (turned / "tokenizer.json").write_text(json.dumps(content))
    error = refused(pair[0], "--text", text, "--reference", str(turned))
    at = Path(text).read_text().index("f")  # "fox"
    assert error["where"] == str(turned) and text in error["error"]
    assert f"number {at} is {vocabulary['f']} in place of {vocabulary['x']}" in error["error"]


def test_a_reference_whose_template_is_another(chat_model: Path, tmp_path: Path) -> None:
    """More tokens behind the same ones."""
    other = make_chat_model(tmp_path / "other", template="{{ bos_token }}" + TEMPLATE + "<end>" * 40)
    (tmp_path / "a.txt").write_text("Who are you?\n\nA model of words.\n")
    error = refused(chat_model, "--chat", "--text", str(tmp_path / "a.txt"), "--reference", str(other))
    assert "64 in place of 32" in error["error"] and "chat template" in error["remedy"]


@pytest.mark.parametrize("opening", [False, True])
def test_a_tokenizer_whose_ids_do_not_fit(opening: bool, text: str, tmp_path: Path) -> None:
    """In the text, or before each window."""
    size = 256 if opening else 200
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=1, vocab_size=size, bos_token_id=0, eos_token_id=0)
    if opening:
        save_tokenizer(model)
        content = json.loads((model / "tokenizer.json").read_text())
        begin = processors.TemplateProcessing("<eos> $A", "<eos> $A $B", [("<eos>", 256)])
        content["post_processor"] = json.loads(begin.__getstate__())
        (model / "tokenizer.json").write_text(json.dumps(content))
    error = refused(model, "--text", text)
    assert f"the model's vocabulary ends at {size - 1}" in error["error"]
    assert error["where"] == str(model) and "tokenizer" in error["remedy"]


# --------------------------------------------------------------------------------------------------------------- words


def test_bands() -> None:
    assert [words for _, words in BANDS] == ["practically lossless", "very good", "good", "a noticeable loss", "poor"]
    found = [band(kl) for kl in (0, 0.0099, 0.01, 0.049, 0.05, 0.149, 0.15, 0.49, 0.5, 3, float("inf"), float("nan"))]
    assert [found[i] for i in range(0, 10, 2)] == [words for _, words in BANDS]
    assert [found[i] for i in range(1, 10, 2)] == [words for _, words in BANDS]
    assert found[10:] == ["poor", "poor"]


def test_names_are_short() -> None:
    assert short_name("/a/b/wiki.txt") == "wiki.txt"
    assert short_name("a-very-long-name-of-a-text-file.txt", 16) == "a-very-…file.txt"


def numbers(**changes: Any) -> Evaluation:
    known: dict[str, Any] = {
        "text": "/some/where/wiki.txt",
        "tokens": 12240,
        "perplexity": 10.912,
        "perplexity_stderr": 0.61,
        "reference_perplexity": 10.801,
        "reference_perplexity_stderr": 0.6,
        "perplexity_ratio": 1.0103,
        "perplexity_ratio_stderr": 0.0009,
        "kl_mean": 0.0123,
        "kl_stderr": 0.0002,
        "kl_median": 0.01,
        "kl_p99": 0.2,
        "kl_p999": 0.5,
        "top1": 0.93,
        "bits_per_weight": 4.4,
        "seconds": 3.0,
    }
    return Evaluation(**known | changes)


def test_what_is_said() -> None:
    line, scale = verdict([numbers()])
    assert line == (
        "wiki.txt, 12,240 tokens: very good. Mean KL 0.01230 ± 0.00020 nats a token; perplexity 10.91 ± 0.61, "
        "the reference's 10.80 ± 0.60 (ratio 1.0103 ± 0.0009)."
    )
    assert all(f"below {below:g} {words}" in scale for below, words in BANDS[:-1]) and "poor" in scale
    one_window = numbers(kl_stderr=float("nan"), perplexity_stderr=float("nan"))
    assert "Mean KL 0.01230 nats" in verdict([one_window])[0] and "perplexity 10.91, the" in verdict([one_window])[0]
    assert len(verdict([numbers(), numbers(kl_mean=0.6)])) == 3 and ": poor." in verdict([numbers(kl_mean=0.6)])[0]


def test_a_broken_model_breaks_no_words_either() -> None:
    broken = numbers(
        perplexity=3.2e23, perplexity_stderr=float("nan"), perplexity_ratio=3.1e22, kl_mean=41.5, kl_p999=99.5
    )
    with console.capture() as shown:
        console.print(evaluation_table([broken, numbers(perplexity=float("inf"), perplexity_ratio=float("inf"))]))
    row = next(line.split() for line in shown.get().splitlines() if "e+23" in line)
    assert row == ["wiki.txt", "3.20e+23", "3.10e+22", "41.50000", "0.2000", "99.5000", "93.0", "%"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_eighty_columns_break_no_words(
    several: bool, beside: bool, pair: tuple[Path, Path], texts: list[str], tmp_path: Path
) -> None:
    long = tmp_path / "a-name-of-a-text-that-is-longer-than-any-column-of-the-table.txt"
    shutil.copy(texts[0], long)
    names = [str(long), *(texts[1:] if several else [])]
    how = [*(["--reference", str(pair[1])] if beside else []), "--seqlen", "32"]
    found = evaluate(pair[0], text=names, reference=pair[1] if beside else None, seqlen=32)
    shown = run(str(pair[0]), *(part for name in names for part in ("--text", name)), *how)
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.split()
    wanted = [*" ".join(verdict(found)).split(), "perplexity", *(short_name(name, 16) for name in names)]
    assert [word for word in wanted if word not in words] == []
    assert (ALONE in " ".join(words)) == (not beside)
