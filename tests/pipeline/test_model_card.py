"""The model card: what others need to know, and nothing that depends on the machine or the day."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from bitwright import quantize
from bitwright.calibration.windows import Drawn
from bitwright.cli.app import app
from bitwright.pipeline.ledger import Entry, block_errors
from bitwright.pipeline.model_card import Card, calibration
from conftest import make_checkpoint

PLAIN = {"scheme": "int4-g32-asym", "method": "rtn", "calib": "none"}


def front_matter(card: str) -> Any:
    _, between, _ = card.split("---\n", 2)
    return yaml.safe_load(between)


def table(card: str) -> dict[str, str]:
    """The rows of two cells."""
    return dict(re.findall(r"^\| ([a-z ]+) \| ([^|]+) \|$", card, re.MULTILINE))


def entry(name: str, loss: float | None = 0.1, **more: Any) -> Entry:
    known = {"action": "quantized", "scheme": "int4-g128-sym-bf16", "method": "gptq", "loss_rtn": 0.25}
    return Entry(name, (4, 128), "bfloat16", loss=loss, **{**known, **more})


def card(*entries: Entry, config: dict[str, Any] | None = None, **more: Any) -> str:
    known = {"format": "compressed-tensors", "bits_per_weight": 4.254, "predicts": True, "method": "gptq"}
    return str(Card(config or {"model_type": "llama"}, ledger=list(entries), **{**known, **more}))


def test_a_run_tells_what_it_did(llama: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = quantize(llama, out, scheme="int3-g32-asym", method="gptq", calib=text, samples=8, seqlen=32)
    told = (out / "README.md").read_text()
    assert front_matter(told) == {"library_name": "transformers", "tags": ["quantized", "bitwright"]}
    assert table(told) == {
        "scheme": "int3-g32-asym-bf16",
        "format": "compressed-tensors",
        "method": "gptq",
        "bits per weight": f"{done.bits_per_weight:.2f}, with scales and all that is kept",
        "calibration": "text.txt: 8 windows of 32 tokens",
        "tensors": f"21 quantized, {len(done.ledger) - 21} kept in float",
    }
    worst = sorted(block_errors(done.ledger), key=lambda block: -block.error)
    rows = [line for line in told.splitlines() if line.startswith("| model.")]
    assert rows == [f"| {block.name} | {block.error:.3g} | {block.plainer:.3g} |" for block in worst]
    assert len(rows) == 3 and rows[0].startswith("| model.layers.") and "## Replaced" not in told
    assert "bitwright eval OUT --reference MODEL" in told
    for place in (str(tmp_path), str(Path(text).parent), str(llama), "seconds"):
        assert place not in told
    again = tmp_path / "elsewhere" / "other name"
    again.parent.mkdir()
    quantize(llama, again, scheme="int3-g32-asym", method="gptq", calib=text, samples=8, seqlen=32)
    assert (again / "README.md").read_text() == told


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("meta/Llama-3.2_1B", "meta/Llama-3.2_1B"),
        ("/home/me/models/llama", None),
        ("./out/llama", None),
        ("", None),
        ("../x", None),
        ("a/b/c", None),
        ("a/b\ntags: []", None),
        (7, None),
    ],
)
def test_only_a_name_of_the_hub_is_a_base_model(name: Any, base: str | None) -> None:
    told = card(entry("a"), config={"model_type": "llama", "_name_or_path": name})
    assert front_matter(told).get("base_model") == base
    assert f"# {base or 'llama'}, quantized" in told
    assert f"bitwright eval OUT --reference {base or 'MODEL'}\n" in told
    assert base or not str(name) or str(name) not in told


def test_the_worst_and_the_replaced_are_named() -> None:
    entries = [entry(f"m{i}", i / 10, fallback="gptq -> rtn: why" if i < 12 else "") for i in range(13)]
    told = card(*entries, entry("k", None, action="kept", scheme=""))
    assert re.findall(r"^\| (m\d+) ", told, re.MULTILINE) == ["m12", "m11", "m10"]
    assert "| 1.2 | 0.25 |" in told
    assert "12 of 13 matrices were not quantized as asked:" in told
    assert told.count("gptq -> rtn: why") == 10 and "and 2 more: see `ledger.jsonl`" in told
    assert table(told)["tensors"] == "13 quantized, 1 kept in float"
    assert "Largest errors" not in card(entry("a", loss_rtn=None))
    assert "Largest errors" not in card(entry("a", None))
    blocks = [replace(entry(f"model.layers.{i}.mlp.up"), block_error=i / 10, block_error_search=0.5) for i in range(5)]
    assert re.findall(r"^\| (model\S+) \| (\S+) \| 0.5 \|$", card(*blocks), re.MULTILINE) == [
        ("model.layers.4", "0.4"),
        ("model.layers.3", "0.3"),
        ("model.layers.2", "0.2"),
    ]
    assert "error in a matrix's output," in card(entry("a"), calibration="general: 8 windows of 32 tokens")
    assert "error in a matrix, " in card(entry("a"), calibration="none")


def test_schemes_are_counted() -> None:
    mixed = [entry("a"), entry("b"), entry("c", scheme="int8-channel-sym-bf16", activations="int8-token")]
    told = table(card(*mixed, entry("d", None, action="left out", scheme="")))
    assert told["scheme"] == "int4-g128-sym-bf16 (2), int8-channel-sym-bf16 (1)"
    assert told["inputs"] == "int8-token" and told["tensors"] == "3 quantized, 1 left out"


@pytest.mark.parametrize(
    ("format_name", "scheme", "there", "absent"),
    [
        ("compressed-tensors", "int4-g128-sym-bf16", ["vllm serve OUT", "AutoModelForCausalLM"], ["gptqmodel"]),
        ("compressed-tensors", "int3-g128-sym-bf16", ["AutoModelForCausalLM"], ["vllm"]),
        ("gptq", "int4-g128-sym-f16", ["vllm serve OUT", "gptqmodel"], []),
        ("gptq", "int4-g128-asym1-f16", ["gptqmodel"], ["vllm"]),
        ("bitwright", "nf4-g64-dq", ["bitwright.load"], ["vllm", "AutoModel"]),
    ],
)
def test_it_is_loaded_by_what_can(format_name: str, scheme: str, there: list[str], absent: list[str]) -> None:
    told = card(entry("a", scheme=scheme), format=format_name)
    assert all(word in told for word in [*there, "bitwright generate OUT"])
    assert not [word for word in absent if word in told]


def test_an_encoder_predicts_nothing() -> None:
    told = card(entry("a"), predicts=False)
    assert "AutoModel.from_pretrained" in told
    assert not [word for word in ("vllm", "generate", "eval") if word in told]


def test_calibration_is_told_without_paths() -> None:
    tokens = Drawn(torch.zeros(1280, 2048, dtype=torch.long), torch.zeros(0, 2048, dtype=torch.long))
    assert calibration("general", tokens) == "general: 1,280 windows of 2,048 tokens"
    mixed = calibration("general:3,/home/me/code.txt:1", tokens)
    assert mixed == "general (75%), code.txt (25%): 1,280 windows of 2,048 tokens"
    assert calibration("/home/me/imatrix.gguf", None) == "importance matrix imatrix.gguf"
    assert calibration("general", None) == "none"


def test_the_sources_own_card_is_kept(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model")
    (source / "README.md").write_text("of the source\n")
    quantize(source, tmp_path / "a", **PLAIN)  # type: ignore[arg-type]
    assert (tmp_path / "a/README.original.md").read_text() == "of the source\n"
    assert (source / "README.md").read_text() == "of the source\n"
    how = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "bitwright", "--json"]
    done = CliRunner().invoke(app, how)
    assert done.exit_code in (0, 1), done.output
    assert (tmp_path / "b/README.original.md").read_text() == "of the source\n"
    told = (tmp_path / "b/README.md").read_text()
    assert {k: v for k, v in table(told).items() if k not in ("scheme", "bits per weight")} == {
        "format": "bitwright",
        "tensors": table((tmp_path / "a/README.md").read_text())["tensors"],
    }
    assert "bitwright.load" in told and "losses" not in told
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "b"), "--json"]).stdout)
    assert f"{found['bits_per_weight']:.2f}, with" in told
