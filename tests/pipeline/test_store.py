"""The statistics store: what it gives is what a fresh pass gives; stale ones are taken again, damaged ones refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitwright.api import evaluate, quantize
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, OutputError, RecipeError
from bitwright.evaluation.reference import TOP, Predictions
from bitwright.files.checkpoint import Checkpoint
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline import statistics_store as store_module
from conftest import make_checkpoint

SMALL = {"samples": 8, "seqlen": 32}


def files(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def losses(folder: Path) -> dict[str, float]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return {entry["name"]: entry["loss"] for entry in map(json.loads, lines) if entry["loss"] is not None}


def test_one_pass_serves_many_methods_and_is_labelled(llama: Path, text: str, tmp_path: Path) -> None:
    kept = tmp_path / "statistics"
    first = quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, store=kept, **SMALL)
    taken = files(kept)
    second = quantize(llama, tmp_path / "b", scheme="int3-g32", method="awq+gptq", calib=text, store=kept, **SMALL)
    assert files(kept) == taken, "the statistics were taken again"
    assert {e.statistics for r in (first, second) for e in r.ledger if e.action == "quantized"} == {"one-shot"}
    sequential = quantize(llama, tmp_path / "c", scheme="int4-g32", method="gptq", calib=text, **SMALL)
    assert {e.statistics for e in sequential.ledger if e.action == "quantized"} == {"sequential"}
    assert {e.transforms.split()[0] for e in second.ledger if e.transforms} == {"awq"}
    one, each = losses(tmp_path / "a"), losses(tmp_path / "c")
    first = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]  # behind which nothing is quantized yet
    assert all((one[n] == each[n]) == (n in first) for n in one)
    for out in "abc":
        kl = evaluate(tmp_path / out, reference=llama, text=text, seqlen=32, tokens=512).kl_mean
        assert kl is not None and kl < 2e-3


@pytest.mark.parametrize("change", ["text", "model", "tokenizer", "code"])
def test_a_changed_key_is_recomputed_and_said(
    change: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept, calib = make_checkpoint(tmp_path / "model"), tmp_path / "statistics", text
    quantize(model, tmp_path / "a", scheme="int4-g32", calib=text, store=kept, **SMALL)
    taken = files(kept)
    if change == "text":
        other = tmp_path / "other.txt"
        other.write_text(Path(text).read_text()[500:])
        calib = str(other)
    elif change == "model":
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes())  # a new time of change is enough
    elif change == "tokenizer":
        file = model / "tokenizer_config.json"
        file.write_text(file.read_text() + "\n")
    else:
        monkeypatch.setattr("bitwright.pipeline.calibration_pass.code_version", lambda: "other")
    done = quantize(model, tmp_path / "b", scheme="int4-g32", calib=calib, store=kept, **SMALL)
    assert any("taken again" in note and change in note for note in done.notes)
    assert all(files(kept)[name] != at for name, at in taken.items() if name.startswith("block"))
    fresh = quantize(model, tmp_path / "c", scheme="int4-g32", calib=calib, store=tmp_path / "fresh", **SMALL)
    assert not any("taken again" in note for note in fresh.notes)
    assert losses(tmp_path / "b") == losses(tmp_path / "c")


@pytest.mark.parametrize("damage", ["short", "garbage", "json", "note", "nan", "missing"])
def test_a_damaged_store_is_refused_before_any_work(damage: str, llama: Path, text: str, tmp_path: Path) -> None:
    kept = tmp_path / "statistics"
    quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, store=kept, **SMALL)
    block = kept / "block-00001.safetensors"
    if damage == "short":
        block.write_bytes(block.read_bytes()[:-100])
    elif damage == "garbage":
        block.write_bytes(b"\xff" * 64)
    elif damage == "json":
        (kept / "block-00001.json").write_text('{"inputs": 3')
    elif damage == "note":
        (kept / "store.json").write_text("[1")
    elif damage == "nan":
        info = Checkpoint(kept, only=block).tensors["0.gram"]
        content = bytearray(block.read_bytes())
        content[info.offset : info.offset + 4] = b"\x00\x00\xc0\x7f"
        block.write_bytes(content)
    else:
        block.unlink()
    arguments = [
        "quantize",
        str(llama),
        str(tmp_path / "b"),
        "--scheme",
        "int4-g32",
        "--calib",
        text,
        "--store",
        str(kept),
    ]
    done = CliRunner().invoke(app, [*arguments, "--samples", "8", "--seqlen", "32", "--json"])
    assert done.exit_code == 2, done.output
    assert "statistics" in json.loads(done.stdout)["remedy"]
    assert not (tmp_path / "b").exists()


def test_other_peoples_directories_are_left_alone(llama: Path, text: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="other files"):
        quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, store=mine, **SMALL)
    with pytest.raises(OutputError, match="not a directory"):
        quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, store=mine / "thesis.txt", **SMALL)
    assert (mine / "thesis.txt").read_text() == "all of it"


def test_interrupted_statistics_go_on(llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole"
    quantize(llama, tmp_path / "a", scheme="int4-g32", calib=text, store=whole, **SMALL)
    kept, honest, count = tmp_path / "statistics", store_module.Store.write, [0]

    def dies(self: store_module.Store, *more: object) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        honest(self, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module.Store, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, tmp_path / "b", scheme="int4-g32", calib=text, store=kept, **SMALL)
    monkeypatch.undo()
    first = files(kept)["block-00000.safetensors"]
    quantize(llama, tmp_path / "b", scheme="int4-g32", calib=text, store=kept, **SMALL)
    assert files(kept)["block-00000.safetensors"] == first
    assert not list(kept.glob("hidden-*"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("method", ["gptaq", "autoround", "awq+gptaq"])
def test_methods_that_need_both_streams_are_refused(method: str, llama: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="which no store knows"):
        quantize(llama, tmp_path / "a", method=method, scheme="int4-g32", calib=text, store=tmp_path / "s", **SMALL)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- predictions


def test_stored_predictions_give_nearly_the_exact_kl(llama: Path, text: str, tmp_path: Path) -> None:
    """257 tokens fit in TOP: nothing is left out, so both agree."""
    quantize(llama, tmp_path / "out", scheme="int3-g32", method="rtn", calib=text)
    exact = evaluate(tmp_path / "out", reference=llama, text=text, seqlen=32, tokens=512)
    for _ in range(2):
        kept = evaluate(tmp_path / "out", reference=llama, text=text, seqlen=32, tokens=512, predictions=tmp_path / "p")
        assert kept.kl_mean == pytest.approx(exact.kl_mean, rel=1e-4) and kept.top1 == exact.top1


def test_the_rest_of_the_vocabulary_counts_as_one_event(tmp_path: Path) -> None:
    """By the definition, in float64; and a lower bound of the exact divergence."""
    g = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(20, 2 * TOP, generator=g)).log_softmax(-1)
    log_q = (log_p + 0.3 * torch.randn(20, 2 * TOP, generator=g)).log_softmax(-1)
    kept = Predictions(tmp_path, "ab" * 32)
    nll = torch.rand(20, generator=g)
    kept.write(0, log_p, nll)
    kept.finish(20)
    compared = kept.against(0, log_q)
    found, same = compared.kl, compared.same
    p, q = log_p.double().exp(), log_q.double().exp()
    order = p.argsort(descending=True)[:, :TOP]
    top_p, top_q = p.gather(1, order), q.gather(1, order)
    rest_p, rest_q = 1 - top_p.sum(1), 1 - top_q.sum(1)
    expected = (top_p * (top_p / top_q).log()).sum(1) + rest_p * (rest_p / rest_q).log()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    exact = (p * (p / q).log()).sum(1)
    assert (found <= exact + 1e-5).all() and found.mean() > 0.8 * exact.mean()
    assert torch.equal(same, log_p.argmax(1) == log_q.argmax(1)) and torch.equal(compared.nll, nll)
    with pytest.raises(CheckpointError, match="20 predictions for 19 tokens"):
        kept.against(0, log_q[:19])


def test_predictions_of_another_model_are_not_used(llama: Path, text: str, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", initializer_range=0.2)
    folder = tmp_path / "p"
    same = evaluate(llama, reference=llama, text=text, seqlen=32, tokens=256, predictions=folder)
    different = evaluate(llama, reference=other, text=text, seqlen=32, tokens=256, predictions=folder)
    assert same.kl_mean is not None and same.kl_mean < 1e-6
    assert different.kl_mean is not None and different.kl_mean > 1e-4
    assert StreamedModel(llama).bits_per_weight == 16
