"""Every architecture of GGUF: what llama.cpp's code has fixed, scaled positions, encoders; and llama.cpp itself, where it is
installed (`bench/peers/install.sh llamacpp`), on small random models."""

import json
import math
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from typer.testing import CliRunner

import bitwright
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import rope
from bitwright.gguf.architectures import ARCHITECTURES
from bitwright.gguf.config_keys import config_of, keys_of, not_kept
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.gguf_source import read_config, read_tokenizer
from conftest import ENCODERS, FAMILIES, TEXT, make_checkpoint, save_unigram

TOOLS = Path(__file__).parents[2] / "bench/peers/envs/llamacpp/build/bin"
SHARP = {"initializer_range": 0.2}  # or every token would be as likely as any other, whatever is wrong
LONGROPE = {
    "max_position_embeddings": 128, "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + 0.5 * i for i in range(8)],
    },
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ARCHITECTURES if kind in (*FAMILIES, *ENCODERS) and kind != "gpt_neox"},
    "gemma2": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3_text": ("gemma3_text", {
        "num_hidden_layers": 6, "layer_types": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    }),
    "phi3 longrope": ("phi3", LONGROPE),
    "phi3 longrope, short": ("phi3", {**LONGROPE, "max_position_embeddings": 2048, "original_max_position_embeddings": 1024}),
    "llama3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }}),
    "llama yarn": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    }}),
}  # fmt: skip


def convert(model: Path, out: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(model), str(out), "--json"])
    assert done.exit_code == 0, done.output


def said(pattern: str, name: str, *arguments: str) -> str:
    """What one of llama.cpp's tools prints where the pattern is; now and then one ends before its log is written."""
    if not (TOOLS / name).is_file():
        pytest.skip("llama.cpp's tools are not here")
    for _ in range(20):
        done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found = re.search(pattern, done.stdout + done.stderr, re.DOTALL)
        if found is not None:
            return found[1]
    raise AssertionError(f"{name} does not say {pattern}")


def give_a_merge(file: Path) -> None:
    """llama.cpp wants one at least: "th", in the place of a byte that no text in UTF-8 has."""
    content = json.loads(file.read_text())
    content["model"]["vocab"]["th"] = content["model"]["vocab"].pop("ÿ")
    content["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("variant", [name for name, (kind, _) in VARIANTS.items() if ARCHITECTURES[kind].causal])
def test_llamacpp_predicts_as_transformers_does(variant: str, tmp_path: Path) -> None:
    """Perplexity of a sharp random model, which a wrong rotation, norm or scale changes by tens of percent."""
    kind, changes = VARIANTS[variant]
    source = make_checkpoint(tmp_path / "source", kind, dtype=torch.float32, **SHARP, **changes)
    give_a_merge(source / "tokenizer.json")
    convert(source, tmp_path / "a.gguf")
    (tmp_path / "text.txt").write_text(TEXT[:2000])
    window = 128 if variant == "phi3 longrope" else 64  # beyond what it was first trained on
    how = ["-f", str(tmp_path / "text.txt"), "-c", str(window), "-b", str(window), "-t", "2"]
    found = float(said(r"PPL = ([\d.]+)", "llama-perplexity", "-m", str(tmp_path / "a.gguf"), *how))
    ids = torch.tensor(AutoTokenizer.from_pretrained(source)(TEXT[:2000])["input_ids"])
    ids = ids[: len(ids) // window * window].view(-1, window)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids).logits[:, window // 2 : -1].log_softmax(-1)
    mine = float(-logits.gather(-1, ids[:, window // 2 + 1 :, None]).double().mean())
    assert math.log(found) == pytest.approx(mine, rel=2e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_llamacpp_embeds_as_transformers_does(kind: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kind, dtype=torch.float32, **SHARP)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    convert(source, tmp_path / "a.gguf")
    sentence = "The brown fox, 12 dogs (again)!"
    how = ["-m", str(tmp_path / "a.gguf"), "-p", sentence, "--embd-output-format", "array"]
    found = torch.tensor(json.loads(said(r"\[(\[.*?\])\]", "llama-embedding", *how)))
    ids = AutoTokenizer.from_pretrained(source)(sentence, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mine = AutoModel.from_pretrained(source, dtype=torch.float32).eval()(ids).last_hidden_state.mean(1)[0]
    assert torch.allclose(found, mine / mine.norm(), atol=2e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_s_file_gives_the_hidden_states_of_its_source(kind: str, tmp_path: Path) -> None:
    """RoBERTa's is a BERT's without the rows of positions that no text reaches, DistilBERT's one without types of tokens."""
    source = make_checkpoint(tmp_path / "source", kind, dtype=torch.float32, **SHARP)
    convert(source, tmp_path / "a.gguf")
    ids = torch.arange(64)[None] + 5  # as many as there are positions
    with torch.no_grad():
        a, b = AutoModel.from_pretrained(source).eval()(ids), bitwright.load(tmp_path / "a.gguf")(ids)
    assert torch.allclose(a.last_hidden_state, b.last_hidden_state, atol=1e-5)
    keys = GgufFile(tmp_path / "a.gguf").keys
    assert keys["bert.context_length"] == 64 and keys["general.architecture"] == "bert"
    assert read_config(tmp_path / "a.gguf").model_type == ("distilbert" if kind == "distilbert" else "bert")


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_survive_the_way_there_and_back(variant: str, tmp_path: Path) -> None:
    kind, changes = VARIANTS[variant]
    source = make_checkpoint(tmp_path / "source", kind, **changes)
    convert(source, tmp_path / "a.gguf")
    before, after = AutoConfig.from_pretrained(source), read_config(tmp_path / "a.gguf")
    if not ARCHITECTURES[kind].rotary:
        return
    rope = {**after.rope_parameters}
    wanted = before.rope_parameters
    if variant.startswith("phi3 longrope"):
        original = before.original_max_position_embeddings
        assert rope.pop("attention_factor") == pytest.approx(math.sqrt(1 + math.log(2) / math.log(original)))
        for key in ("short_factor", "long_factor"):
            assert rope.pop(key) == pytest.approx(wanted.pop(key))
    assert {k: v for k, v in rope.items() if k in wanted} == {k: v for k, v in wanted.items() if k in rope}
    assert rope.get("rope_type") == wanted.get("rope_type")


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256"),
        ("gemma3_text", {
            "query_pre_attn_scalar": 16, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2,
        }, "layer_types"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0,
        }}, "'yarn' with beta_fast"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("opt", {}, "models of type 'opt' cannot be written"),
    ],
)  # fmt: skip
def test_what_llamacpp_would_run_otherwise_is_refused(kind: str, changes: dict[str, Any], says: str) -> None:
    config = AutoConfig.for_model(kind, **{"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, **changes})
    with pytest.raises(FormatError, match=re.escape(says)):
        keys_of(config)


def test_factors_must_fit_the_heads() -> None:
    config = AutoConfig.for_model("phi3", hidden_size=64, num_attention_heads=4, pad_token_id=0, **LONGROPE)
    config.hidden_size = 128
    with pytest.raises(FormatError, match="8 factors for 16 frequencies"):
        rope.tensors_of(config)


def test_large_gemmas_scale_their_scores_by_width() -> None:
    """Gemma 2 27B: 4608 / 32 = 144, heads of 128."""
    shape = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    config = AutoConfig.for_model("gemma2", **shape, query_pre_attn_scalar=144)
    keys = keys_of(config) | {"general.architecture": "gemma2"}
    blocks = {f"blk.{i}.attn_norm.weight": (4608,) for i in range(46)}
    back = config_of(keys, {"token_embd.weight": (256, 4608)} | blocks, "x")
    assert back.query_pre_attn_scalar == 144


def test_windows_that_are_not_kept_are_announced(tmp_path: Path, text: str) -> None:
    source = make_checkpoint(tmp_path / "source", "mistral", sliding_window=8)
    assert not_kept(AutoConfig.from_pretrained(source)) != []
    assert not_kept(AutoConfig.for_model("qwen2", sliding_window=8, use_sliding_window=False)) == []
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "a.gguf"), "--dry-run", "--json"])
    assert "not to the last 8 alone" in json.dumps(json.loads(done.stdout)["notes"])


# ------------------------------------------------------------------------------------------------------------ encoders


def test_an_encoder_s_pooler_is_left_out_on_record(tmp_path: Path, text: str) -> None:
    source = make_checkpoint(tmp_path / "source", "bert")
    how = ["--calib", text, "--seqlen", "32", "--samples", "4", "--scheme", "q4_0", "--json"]
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "a.gguf"), *how])
    assert done.exit_code == 1, done.output  # rows of 64 do not fill Q6_K's blocks
    ledger = [json.loads(line) for line in (tmp_path / "a.ledger.jsonl").read_text().splitlines()]
    left_out = {entry["name"]: entry["reason"] for entry in ledger if entry["action"] == "left out"}
    assert set(left_out) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all("does without" in reason for reason in left_out.values())
    file = GgufFile(tmp_path / "a.gguf")
    floats = {name for name, t in file.tensors.items() if t.type == gguf.GGMLQuantizationType.F32}
    assert {"position_embd.weight", "token_types.weight"} <= floats
    assert file.tensors["blk.0.attn_q.weight"].type.name == "Q4_0" and file.keys["bert.attention.causal"] is False
    judged = CliRunner().invoke(
        app, ["eval", str(tmp_path / "a.gguf"), "--text", text, "--seqlen", "32", "--tokens", "64", "--json"]
    )
    assert judged.exit_code == 2 and "predict no next token" in judged.stdout
    for command in (["generate", "--prompt", "fox"], ["bench", "--prompt", "8", "--decode", "2"]):
        written = CliRunner().invoke(app, [*command, str(tmp_path / "a.gguf"), "--json"])
        assert written.exit_code == 2 and "predict no next token" in written.stdout
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        packed = bitwright.load(tmp_path / "a.gguf")(ids).last_hidden_state
        original = AutoModel.from_pretrained(source, dtype=torch.float32).eval()(ids).last_hidden_state
    assert torch.cosine_similarity(packed, original, dim=-1).min() > 0.95


def test_a_kept_pooler_in_other_formats(tmp_path: Path, text: str) -> None:
    source = make_checkpoint(tmp_path / "source", "bert")
    how = ["--calib", text, "--seqlen", "32", "--samples", "4", "--scheme", "int4-g32", "--json"]
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "out"), *how])
    assert done.exit_code == 0, done.output
    ids = torch.arange(40)[None] % 90 + 5
    with torch.no_grad():
        a, b = (AutoModel.from_pretrained(p, dtype=torch.float32).eval()(ids) for p in (source, tmp_path / "out"))
    cosine = torch.cosine_similarity(a.last_hidden_state, b.last_hidden_state, dim=-1)
    assert cosine.min() > 0.9
    assert torch.cosine_similarity(a.pooler_output, b.pooler_output, dim=-1).min() > 0.9


@pytest.mark.parametrize("kind", [*ENCODERS, "xlm-roberta, spaces joined"])
def test_an_encoder_s_tokenizer_there_and_back(kind: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", kind.partition(",")[0])
    if "," in kind:
        save_unigram(source, words=False)
    convert(source, tmp_path / "a.gguf")
    a, b = AutoTokenizer.from_pretrained(source), read_tokenizer(tmp_path / "a.gguf")
    text = "The quick Brown  fox's größer\n \tthe fox 12 (ﬁshes Ａgain)… 木  "
    assert a(text)["input_ids"] == b(text)["input_ids"]
    assert a(text)["input_ids"][0] == a.cls_token_id and a(text)["input_ids"][-1] == a.sep_token_id
    cut = {"bert": "default", "roberta": "roberta-bpe", "xlm-roberta": "default", "distilbert": "default"}
    keys = GgufFile(tmp_path / "a.gguf").keys
    assert keys["tokenizer.ggml.pre"] == cut[kind.partition(",")[0]] and keys["tokenizer.ggml.add_sep_token"] is True
    whole = {"bert": "##own", "roberta": "th", "xlm-roberta": "▁the", "distilbert": "##own"}[kind.partition(",")[0]]
    assert a.convert_tokens_to_ids(whole) in a("brown the")["input_ids"]
    assert a.decode(a(text)["input_ids"]) == b.decode(b(text)["input_ids"])
    if (TOOLS / "llama-tokenize").is_file():
        (tmp_path / "text.txt").write_text(text)
        how = ["-m", str(tmp_path / "a.gguf"), "-f", str(tmp_path / "text.txt"), "--ids", "--log-disable"]
        assert json.loads(said(r"(\[[\d, ]+\])", "llama-tokenize", *how)) == a(text)["input_ids"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(normalizer=None), "unknown pre-tokenizer for Unigram"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "unknown pre-tokenizer for Unigram"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(prepend_scheme="never"), "unknown pre-tokenizer for Unigram"),
        (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0), "unknown pre-tokenizer for Unigram"),
        (lambda c: c["model"].update(byte_fallback=True), "unknown pre-tokenizer for Unigram"),
    ],
)  # fmt: skip
def test_unigram_that_cuts_otherwise_is_refused(change: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "xlm-roberta")
    content = json.loads((source / "tokenizer.json").read_text())
    change(content)
    (source / "tokenizer.json").write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 2 and says in done.stdout
    assert not (tmp_path / "a.gguf").exists()


def test_unigram_without_scores_is_refused(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source", "xlm-roberta"), tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    for key in (b"tokenizer.ggml.scores", b"tokenizer.ggml.unknown_token_id"):
        (tmp_path / "b.gguf").write_bytes(content.replace(key, key[:-1] + b"x"))
        with pytest.raises(CheckpointError, match="Unigram without a score"):
            read_tokenizer(tmp_path / "b.gguf")


def test_a_damaged_table_of_replacements_is_refused(tmp_path: Path) -> None:
    """Or else the reader that trusts it breaks off in the middle of a text."""
    convert(make_checkpoint(tmp_path / "source", "xlm-roberta"), tmp_path / "a.gguf")
    keys, rng, refused = GgufFile(tmp_path / "a.gguf").keys, random.Random(0), 0
    table = keys["tokenizer.ggml.precompiled_charsmap"]
    for _ in range(200):
        changed = table.copy()
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(rng.choice([4, 3000, len(table)]))] = rng.randrange(256)
        changed = changed[: rng.choice([len(table), rng.randrange(len(table))])]
        try:
            tokenizer_of(keys | {"tokenizer.ggml.precompiled_charsmap": changed}, "x")("a\tＡ ﬁ … fox\n b")
        except CheckpointError:
            refused += 1
    assert 50 < refused < 200
    with pytest.raises(CheckpointError, match="table of replacements is damaged"):
        tokenizer_of(keys | {"tokenizer.ggml.precompiled_charsmap": table[:9]}, "x")


def test_an_encoder_without_types_of_tokens_is_distilbert_or_nothing(tmp_path: Path) -> None:
    convert(make_checkpoint(tmp_path / "source", "distilbert"), tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    key = b"bert.attention.layer_norm_epsilon" + struct.pack("<If", 6, 1e-12)
    assert key in content
    (tmp_path / "b.gguf").write_bytes(content.replace(key, key[:-4] + struct.pack("<f", 1e-5)))
    with pytest.raises(CheckpointError, match="no types of tokens"):
        read_config(tmp_path / "b.gguf")


def test_an_encoder_s_other_heads_are_refused(tmp_path: Path, text: str) -> None:
    """A classifier is more than hidden states: it is not dropped without a word."""
    source = make_checkpoint(tmp_path / "source", "roberta")
    AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source)).save_pretrained(source)
    for command in (["convert"], ["quantize", "--calib", text, "--scheme", "q8_0"]):
        done = CliRunner().invoke(app, [command[0], str(source), str(tmp_path / "a.gguf"), *command[1:], "--json"])
        assert done.exit_code == 2 and "classifier." in done.stdout and "without its head" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_what_an_encoder_was_trained_with_is_left_out_on_record(kind: str, tmp_path: Path, text: str) -> None:
    """A checkpoint with the head that guesses masked tokens, as hubs have it: planned, written, sized exactly."""
    source = make_checkpoint(tmp_path / "source", kind)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.bfloat16).save_pretrained(source)
    said = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "float.gguf"), "--json"])
    assert any("is left out" in note for note in json.loads(said.stdout)["notes"])
    how = ["--scheme", "q8_0", "--json", "--calib", text, "--samples", "4"]
    planned = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "a.gguf"), *how, "--dry-run"])
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "a.gguf"), *how])
    assert done.exit_code == 0, done.output
    assert json.loads(planned.stdout)["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert "windows of 64 tokens" in planned.stdout
    ledger = [json.loads(line) for line in (tmp_path / "a.ledger.jsonl").read_text().splitlines()]
    left_out = {entry["name"] for entry in ledger if entry["action"] == "left out"}
    assert left_out and all(name.startswith(("lm_head.", "vocab_")) for name in left_out)
    ids = torch.arange(20)[None] + 5
    with torch.no_grad():
        a, b = (
            m(ids).last_hidden_state for m in (AutoModel.from_pretrained(source), bitwright.load(tmp_path / "a.gguf"))
        )
    assert torch.cosine_similarity(a.float(), b, dim=-1).min() > 0.99


def test_wordpiece_that_cuts_otherwise_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(make_checkpoint(tmp_path / "source", "bert"), tmp_path / "copy")
    file = source / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 2 and "unknown pre-tokenizer for WordPiece" in done.stdout
    assert not (tmp_path / "a.gguf").exists()


def test_pooling_that_llamacpp_does_not_have_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "bert")
    (source / "pool").mkdir()
    (source / "pool/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    (source / "modules.json").write_text(json.dumps([{"type": "x.Pooling", "path": "pool"}]))
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 2 and "pooling that llama.cpp does not have" in done.stdout


def test_matrices_behind_the_pooling_are_left_out_on_record(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "bert")
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Dense", "path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 0 and any("2_Dense" in note for note in json.loads(done.stdout)["notes"])
