"""What becomes of a tensor: float targets, rows that fill no block, rules by llama.cpp's names, importance of experts; and what
a file is, whatever its name."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.errors import CheckpointError
from bitwright.files.model_path import is_gguf
from bitwright.formats.ggml import TYPES
from bitwright.gguf import imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.methods.search import search
from bitwright.pipeline.conversion import convert
from bitwright.pipeline.ledger import from_jsonl
from conftest import make_checkpoint


def run(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("targets") / "source", hidden_size=256, intermediate_size=172, num_hidden_layers=2
    )


def types(file: Path) -> dict[str, str]:
    return {name: t.type.name for name, t in GgufFile(file).tensors.items() if len(t.shape) > 1}


@pytest.mark.parametrize("by_name", [False, True])
def test_rows_that_fill_no_block_are_kept_in_f16_and_announced(source: Path, tmp_path: Path, by_name: bool) -> None:
    model, out = source, tmp_path / "a.gguf"
    if by_name:
        convert(source, tmp_path / "float.gguf")
        model = tmp_path / "float.gguf"
    done = run("quantize", str(model), str(out), "--scheme", "q4_k_m", "--method", "search", "--calib", "none", code=1)
    assert {kind for name, kind in types(out).items() if "ffn_down" in name} == {"F16"}
    assert len([f for f in done["fallbacks"] if "F16: rows of 172" in f]) == 2
    weights, stored = GgufFile(out).read("blk.0.ffn_down.weight"), tmp_path / "float.gguf"
    if by_name:
        assert torch.equal(weights, GgufFile(stored).read("blk.0.ffn_down.weight").to(torch.float16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_targets(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a.gguf"
    run("quantize", str(source), str(out), "--scheme", kind, "--calib", "none")
    assert set(types(out).values()) == {kind.upper()}
    assert GgufFile(out).keys["general.file_type"] == {"f16": 1, "bf16": 32}[kind]
    refused = run("quantize", str(source), str(tmp_path / "dir"), "--scheme", kind, "--calib", "none", code=2)
    assert "GGUF" in refused["error"]


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_checkpoint(tmp_path / "source")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused = run("quantize", str(model), str(tmp_path / "a.gguf"), "--scheme", "f16", "--calib", "none", code=2)
    assert "float16 cannot hold" in refused["error"]


@pytest.mark.parametrize("match", ["blk.*.attn_v.weight", "blk.*.attn_v", "*self_attn.v_proj"])
def test_a_rule_by_either_name(source: Path, tmp_path: Path, match: str) -> None:
    recipe, out = tmp_path / "r.toml", tmp_path / "a.gguf"
    recipe.write_text(f'[[rule]]\nmatch = "{match}"\nscheme = "q8_0"\n')
    how = ["--scheme", "q4_0", "--method", "rtn", "--calib", "none", "--recipe", str(recipe)]
    run("quantize", str(source), str(out), *how, code=1)
    assert {kind for name, kind in types(out).items() if "attn_v" in name} == {"Q8_0"}
    assert {kind for name, kind in types(out).items() if "attn_q" in name} == {"Q4_0"}


def experts_file(path: Path) -> torch.Tensor:
    """A file of an architecture that is not known here, with a matrix of 3 experts, 4 rows of 64 each."""
    w = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    writer = gguf.GGUFWriter(path, "arctic")
    writer.add_uint32("arctic.block_count", 1)
    writer.add_tensor("blk.0.ffn_up_exps.weight", w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return w


@pytest.mark.parametrize("old", [False, True])
def test_an_expert_that_saw_no_token_counts_evenly(tmp_path: Path, old: bool) -> None:
    """Each expert by its own importance, as if it were a matrix by itself; said in the ledger and in the notes."""
    w, model = experts_file(tmp_path / "m.gguf"), tmp_path / "m.gguf"
    seen = torch.rand(3, 64, generator=torch.Generator().manual_seed(1)) ** 4
    seen[1] = 0
    file = tmp_path / ("i.dat" if old else "i.gguf")
    if old:
        name = b"blk.0.ffn_up_exps.weight"
        entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, seen.numel()) + seen.numpy().tobytes()
        file.write_bytes(struct.pack("<i", 1) + entry)
    else:
        writer = gguf.GGUFWriter(file, "")
        counts = np.array([[2.0], [0.0], [4.0]], np.float32)
        writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", seen.numpy() * counts)
        writer.add_tensor("blk.0.ffn_up_exps.weight.counts", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    out = tmp_path / "a.gguf"
    done = run("quantize", str(model), str(out), "--scheme", "q4_1", "--method", "search", "--calib", str(file))
    found = GgufFile(out).read("blk.0.ffn_up_exps.weight")
    for expert, importance in enumerate((seen[0], torch.ones(64), seen[2])):
        q = search(w[expert], importance, TYPES["Q4_1"].scheme).q
        from bitwright.formats.ggml import encode

        blocks = encode(q, TYPES["Q4_1"]).numpy()
        assert np.array_equal(found[expert].numpy(), dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)), expert
    entry = next(e for e in from_jsonl(tmp_path / "a.ledger.jsonl") if e.scheme)
    assert "1 of 3 experts saw no token" in entry.reason and done["bytes"] == out.stat().st_size
    assert imatrix.read(file)["blk.0.ffn_up_exps.weight"].numel() == 192


def test_methods_and_types_that_are_not_had_are_said_apart(tmp_path: Path) -> None:
    experts_file(tmp_path / "m.gguf")
    plan = run("quantize", str(tmp_path / "m.gguf"), str(tmp_path / "a.gguf"), "--scheme", "q4_k", "--dry-run")
    assert any("another method than asked for" in note and "search: inputs" in note for note in plan["notes"])
    assert any("another block type than asked for" in note and "Q5_0" in note for note in plan["notes"])


def test_a_file_is_known_by_its_first_bytes(source: Path, tmp_path: Path) -> None:
    """As Ollama keeps its blobs; and what is a file of something else is said by name."""
    convert(source, tmp_path / "a.gguf")
    blob, upper = tmp_path / "sha256-0123", tmp_path / "X.GGUF"
    blob.write_bytes((tmp_path / "a.gguf").read_bytes())
    upper.write_bytes(blob.read_bytes())
    assert (
        run("inspect", str(blob))["tensors"]
        == run("inspect", str(upper))["tensors"]
        == run("inspect", str(tmp_path / "a.gguf"))["tensors"]
    )
    text = tmp_path / "text"
    text.write_text("text")
    assert not is_gguf(text) and not is_gguf(tmp_path) and is_gguf(tmp_path / "none.gguf")
    assert "no GGUF file" in run("inspect", str(text), code=2)["error"]
    content = bytearray(blob.read_bytes())
    content[4:8] = content[4:8][::-1]
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match="big-endian"):
        GgufFile(blob)


@pytest.mark.parametrize(
    ("kind", "architecture", "says"),
    [
        ("adapter", "llama", "a LoRA adapter"),
        ("imatrix", "llama", "an importance matrix"),
        ("mmproj", "clip", "encoder of images"),
        ("model", "eagle3", "a draft model"),
        ("model", "mpt", "'mpt' is not read here"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, kind: str, architecture: str, says: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", architecture)
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    text = tmp_path / "text.txt"
    text.write_text("text")
    assert says in run("eval", str(tmp_path / "a.gguf"), "--text", str(text), code=2)["error"]
    if kind == "adapter":
        how = ["--scheme", "q8_0", "--method", "rtn", "--calib", "none"]
        assert says in run("quantize", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), *how, code=2)["error"]
