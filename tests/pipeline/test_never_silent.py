"""What goes wrong shows: in the ledger, in the exit status, and OUT does not appear when it is not what was meant."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import bitwright
from bitwright.cli.app import app
from bitwright.errors import BitwrightError, RecipeError
from bitwright.formats import Layer
from bitwright.formats.compressed_tensors import CompressedTensors
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.pipeline.ledger import Entry, check_complete, from_jsonl

ARGUMENTS = ["--scheme", "int4-g32", "--samples", "4", "--seqlen", "32", "--json"]


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_a_wrong_bit_on_disk_is_seen(
    suffix: str, llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = CompressedTensors.encode

    def faulty(
        self: CompressedTensors, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None
    ) -> dict[str, torch.Tensor]:
        tensors = honest(self, q, layer, dtype, inputs)
        tensors[suffix].view(torch.uint8).view(-1)[5] ^= 1
        return tensors

    monkeypatch.setattr(CompressedTensors, "encode", faulty)
    done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / "out"), "--calib", text, *ARGUMENTS])
    assert done.exit_code == 1
    assert "not those that were meant" in json.loads(done.stdout)["error"]
    assert json.loads(done.stdout)["where"].startswith("model.layers.0.")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial/unverified.safetensors").is_file()
    assert not list((tmp_path / "out.partial").glob("shard-*")), "a bad shard was committed"


def test_a_fallback_is_recorded_and_exits_with_1(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(sys.modules["bitwright.methods.gptq"], "factorize", lambda *_: None)
    done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / "out"), "--calib", text, *ARGUMENTS])
    assert done.exit_code == 1
    result: dict[str, Any] = json.loads(done.stdout)
    assert len(result["fallbacks"]) == 21 and "gptq -> search" in result["fallbacks"][0]
    ledger = from_jsonl(tmp_path / "out" / "ledger.jsonl")
    assert sum(bool(entry.fallback) for entry in ledger) == 21


def test_a_tensor_without_an_entry_or_with_two_is_an_error() -> None:
    one = Entry("a", (1,), "float32", "kept")
    check_complete([one], ["a"])
    with pytest.raises(BitwrightError, match="neither quantized nor kept"):
        check_complete([one], ["a", "b"])
    with pytest.raises(BitwrightError, match="twice"):
        check_complete([one, one], ["a"])


def test_dry_run_tells_the_exact_size_and_writes_nothing(llama: Path, text: str, tmp_path: Path) -> None:
    arguments = ["quantize", str(llama), str(tmp_path / "out"), "--calib", text, *ARGUMENTS]
    planned = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run"]).stdout)
    assert not list(tmp_path.iterdir())
    done = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert planned["bytes"] == done["bytes"] and planned["bits_per_weight"] == done["bits_per_weight"]
    assert set(done) == {"out", "bytes", "bits_per_weight", "seconds", "peak_rss_bytes", "tensors", "fallbacks"}
    observe_block = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert observe_block["bits_per_weight"] == pytest.approx(done["bits_per_weight"], abs=1e-3)
    assert {tuple(t) for t in observe_block["tensors"]} == {("name", "shape", "scheme", "bytes", "loss")}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--calib", "none"], "gptaq cannot do without"), (["--calib", "/no/such.txt"], "cannot read the text"),
        (["--calib", "none", "--method", "rtn", "--activations", "int8-tensor"], "inputs in int8-tensor"),
        (["--calib", "none", "--method", "rtn", "--kv-cache", "fp8-tensor"], "keys and values in fp8-tensor"),
    ],
)  # fmt: skip
def test_dry_run_refuses_what_the_run_would(options: list[str], word: str, llama: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "int4-g32", "--json", *options]
    dry, done = (CliRunner().invoke(app, [*arguments, *more]) for more in (["--dry-run"], []))
    assert dry.exit_code == done.exit_code == 2
    assert json.loads(dry.stdout) == json.loads(done.stdout) and word in dry.stdout


def test_eval_has_its_promised_keys(llama: Path, text: str) -> None:
    done = CliRunner().invoke(
        app, ["eval", str(llama), "--reference", str(llama), "--text", text, "--seqlen", "32", "--json"]
    )
    found = json.loads(done.stdout)
    promised = {
        "tokens",
        "perplexity",
        "perplexity_stderr",
        "kl_mean",
        "kl_stderr",
        "kl_p999",
        "top1",
        "bits_per_weight",
        "seconds",
    }
    assert promised <= set(found)
    assert found["kl_mean"] == 0 and found["top1"] == 1 and found["bits_per_weight"] == 16


def test_quantize_tensor_takes_any_scheme() -> None:
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    for text in ("q4_k", "nf4-g64-dq", "mxfp4", "int3-g64-asym", "binary-channel"):
        assert bitwright.quantize_tensor(w, text).codes.shape == (8, 256)
    with pytest.raises(RecipeError):
        bitwright.quantize_tensor(w, "q4_k", method="gptq")
