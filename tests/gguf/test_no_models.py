"""GGUF files that are no models: refused in every command by what they are, and shown by `inspect` all the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

from bitwright.cli.app import app

BY_NAME = ("--scheme", "q4_0", "--method", "rtn", "--calib", "none")
KINDS = {
    "adapter": ("llama", "a LoRA adapter", "merge"), "imatrix": ("llama", "an importance matrix", "--calib"),
    "draft": ("eagle3", "a draft model", "proposes tokens"), "vocabulary": ("llama", "a vocabulary", "inspect shows"),
}  # fmt: skip


def written(file: Path, architecture: str, *, kind: str = "model", tensors: bool = True) -> Path:
    writer = GGUFWriter(file, architecture)
    writer.add_string("general.type", kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    if tensors:
        writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def commands(file: Path, out: Path) -> Iterator[tuple[object, ...]]:
    yield "quantize", file, out / "a.gguf", *BY_NAME
    yield "quantize", file, out / "a", "--scheme", "int4-g32"
    yield "convert", file, out / "a.gguf"
    yield "generate", file, "--prompt", "a"
    yield "eval", file
    yield "bench", file


def run(*arguments: object, code: int) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_refused_by_what_it_is(kind: str, tmp_path: Path) -> None:
    architecture, says, remedy = KINDS[kind]
    own = kind if kind in ("adapter", "imatrix") else "model"
    file = written(tmp_path / "x.gguf", architecture, kind=own, tensors=kind != "vocabulary")
    for command in commands(file, tmp_path):
        said = run(*command, code=2)
        assert says in said["error"] and remedy in said["remedy"], (command[0], said)
    found = run("inspect", file, code=0)
    assert found["architecture"] == architecture and found["tokenizer"]["tokens"] == 2
    assert len(found["tensors"]) == (kind != "vocabulary")
    assert sorted(tmp_path.iterdir()) == [file]


def test_an_importance_matrix_has_no_architecture(tmp_path: Path) -> None:
    file = written(tmp_path / "x.gguf", "", kind="imatrix")
    assert "an importance matrix" in run("quantize", file, tmp_path / "a.gguf", *BY_NAME, code=2)["error"]
    assert run("inspect", file, code=0)["architecture"] == ""
