"""Experts in GGUF: those of a layer are one tensor, and each is calibrated, rounded and read back by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bench.gguf_families import random_model
from gguf.quants import dequantize
from typer.testing import CliRunner

from bitwright import load
from bitwright.cli.app import app
from bitwright.gguf import imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.pipeline.ledger import from_jsonl
from bitwright.pipeline.work_in_progress import ledger_beside
from conftest import save_tokenizer

SMALL: dict[str, Any] = {"vocab_size": 257, "num_hidden_layers": 2, "bos_token_id": 256, "eos_token_id": 256}
DRAWN = ["--samples", "4", "--seqlen", "32"]
UP, UNSEEN = "blk.1.ffn_up_exps.weight", "model.layers.1.block_sparse_moe.experts.3.w3.weight"


def run(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 8 experts, saved as its publishers do: experts one by one."""
    folder = tmp_path_factory.mktemp("experts") / "source"
    random_model("mixtral", **SMALL, num_local_experts=8).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def fused(file: Path) -> dict[str, torch.Tensor]:
    """A file's tensors as the gguf package decodes them, under the names of transformers' fused Mixtral, rows of q and k
    in its order."""
    found = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(file).tensors}
    state = {"model.embed_tokens.weight": found["token_embd.weight"], "model.norm.weight": found["output_norm.weight"]}
    state["lm_head.weight"] = found["output.weight"]
    for i in range(2):
        own = {name.removeprefix(f"blk.{i}."): t for name, t in found.items() if name.startswith(f"blk.{i}.")}
        turned = {"q": own["attn_q.weight"], "k": own["attn_k.weight"]}
        turned = {n: t.view(-1, 8, 2, 64).transpose(1, 2).reshape(t.shape) for n, t in turned.items()}
        state |= {
            f"model.layers.{i}.{name}": t
            for name, t in {
                "self_attn.q_proj.weight": turned["q"], "self_attn.k_proj.weight": turned["k"],
                "self_attn.v_proj.weight": own["attn_v.weight"], "self_attn.o_proj.weight": own["attn_output.weight"],
                "input_layernorm.weight": own["attn_norm.weight"], "post_attention_layernorm.weight": own["ffn_norm.weight"],
                "mlp.gate.weight": own["ffn_gate_inp.weight"], "mlp.experts.down_proj": own["ffn_down_exps.weight"],
                "mlp.experts.gate_up_proj": torch.cat([own["ffn_gate_exps.weight"], own["ffn_up_exps.weight"]], 1),
            }.items()
        }  # fmt: skip
    return state


@torch.no_grad()
def test_a_mixture_by_the_default_method(source: Path, tmp_path: Path, text: str) -> None:
    """Its logits are those that transformers computes of what the gguf package decodes; types are llama.cpp's."""
    out = tmp_path / "a.gguf"
    done = run("quantize", source, out, "--scheme", "q4_k_m", "--calib", text, *DRAWN, code=1)
    assert done["bytes"] == out.stat().st_size
    model = random_model("mixtral", **SMALL, num_local_experts=8)
    model.load_state_dict(fused(out))
    ids = torch.arange(24)[None] * 7 % 256
    wanted, found = model(ids).logits, load(out)(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3
    types = {name: t.type.name for name, t in GgufFile(out).tensors.items()}
    assert {types[f"blk.0.attn_{name}.weight"] for name in ("k", "v")} == {"Q8_0"}  # beside eight experts
    assert (types["blk.0.attn_output.weight"], types["blk.0.ffn_gate_inp.weight"]) == ("Q5_1", "F32")
    ledger = {entry.name: entry for entry in from_jsonl(ledger_beside(out))}
    rounded = [entry for name, entry in ledger.items() if ".experts." in name]
    assert len(rounded) == 2 * 8 * 3 and all(entry.tokens + entry.borrowed for entry in rounded)


def test_an_importance_matrix_of_experts(source: Path, tmp_path: Path, text: str) -> None:
    """Written with each expert's own count of tokens; read with one that saw none, which counts evenly and is named."""
    file = tmp_path / "i.gguf"
    run("imatrix", source, file, "--calib", text, *DRAWN)
    found = GgufFile(file)
    counts = found.read(f"{UP}.counts")
    assert (
        counts.shape == (8, 1) and 2 * 4 * 32 <= int(counts.sum()) < 2 * 4 * 32 + 8
    )  # two experts a token; 1 for none
    values = imatrix.read(file)
    assert values[UP].shape == (8, 64) and not torch.equal(values[UP][0], values[UP][1])
    seen = {name: [imatrix.Seen(row, 5) for row in t.reshape(-1, t.shape[-1])] for name, t in values.items()}
    seen[UP][3] = imatrix.Seen(torch.zeros(64), 0)
    imatrix.write(file, seen, chunks=1, seqlen=32, text="")
    how = ["--scheme", "q4_1", "--method", "search", "--calib"]
    run("quantize", source, tmp_path / "a.gguf", *how, file, code=1)  # the head's rows do not fill blocks
    ledger = from_jsonl(ledger_beside(tmp_path / "a.gguf"))
    assert [entry.name for entry in ledger if "saw no token" in entry.reason] == [UNSEEN]
    seen[UP][3] = imatrix.Seen(torch.ones(64), 1)
    imatrix.write(file, seen, chunks=1, seqlen=32, text="")
    run("quantize", source, tmp_path / "b.gguf", *how, file, code=1)
    a, b = (GgufFile(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert all(np.array_equal(a.raw(name), b.raw(name)) for name in a.tensors)

    seen.pop(UP)  # as llama-imatrix does it if an expert saw no token
    imatrix.write(file, seen, chunks=1, seqlen=32, text="")
    run("quantize", source, tmp_path / "c.gguf", *how, file, code=1)
    ledger = from_jsonl(ledger_beside(tmp_path / "c.gguf"))
    left = [entry.name for entry in ledger if entry.reason == imatrix.LEFT_OUT]
    assert len(left) == 8 and UNSEEN in left


def test_experts_that_one_tensor_cannot_hold_are_refused(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'rule = [{match = "*", scheme = "q8_0", method = "rtn"}, {match = "*.experts.3.*", scheme = "q4_0", method = "rtn"}]'
    )
    said = run("quantize", source, tmp_path / "a.gguf", "--recipe", recipe, "--calib", "none", code=2)
    assert "all of a layer are one tensor" in said["error"]


def test_another_number_of_experts_than_the_tensors_have(source: Path, tmp_path: Path) -> None:
    run("convert", source, tmp_path / "a.gguf")
    content = (tmp_path / "a.gguf").read_bytes()
    key = b"llama.expert_count"
    at = content.index(key) + len(key) + 4
    (tmp_path / "a.gguf").write_bytes(content[:at] + (4).to_bytes(4, "little") + content[at + 4 :])
    said = run("inspect", tmp_path / "a.gguf", code=2)
    assert "expert_count = 4, and tensor 'blk.0.ffn_" in said["error"] and said["error"].endswith("holds 8")
    by_name = ("--scheme", "q4_0", "--method", "rtn", "--calib", "none")
    said = run("quantize", tmp_path / "a.gguf", tmp_path / "b.gguf", *by_name, code=2)
    assert "expert_count = 4" in said["error"] and "gguf-set-metadata" in said["remedy"]


@pytest.mark.parametrize("wanted", [0, 9])
def test_more_experts_for_a_token_than_there_are(wanted: int, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_experts_per_tok": wanted}))
    for command in (("convert", tmp_path / "m", tmp_path / "a.gguf"), ("generate", tmp_path / "m", "--prompt", "a")):
        said = run(*command, code=2)
        assert "1 to 8 experts" in said["error"] and "num_experts_per_tok" in said["remedy"]


def test_unfinished_work_is_not_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf.partial").mkdir()
    assert "unfinished work" in run("convert", source, tmp_path / "a.gguf", code=2)["error"]
