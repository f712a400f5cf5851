"""Linear attention in which several heads of values share one of keys (Qwen 3.5): llama.cpp has them in another order, so that
the columns of a matrix differ from the model's, in floats, blocks, importance and adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gguf_families import random_model, small_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from bitwright import load
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError
from bitwright.gguf import imatrix
from bitwright.gguf.block_types import Types
from bitwright.gguf.config_keys import keys_of
from bitwright.gguf.input_rounding import inputs_of
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tensor_names import Names
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.streamed import StreamedModel
from conftest import save_tokenizer

KIND, OUT, STORED = "qwen3_5_text", "model.layers.0.linear_attn.out_proj", "blk.0.ssm_out.weight"
SMALL: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
WIDE: dict[str, Any] = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}  # 4 heads: one block of 256
IDS = torch.arange(24)[None] * 7 % 256


def run(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code in (0, 1) and done.stdout, done.output + repr(done.exception)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values") / "source"
    model = random_model(KIND, **SMALL, **WIDE)
    with torch.no_grad():
        model.get_submodule(OUT.replace("out_proj", "in_proj_z")).weight[128:192] *= 10
    model.save_pretrained(folder)
    save_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weight(source: Path) -> torch.Tensor:
    return load(source).get_submodule(OUT).weight.detach()


def heads(w: torch.Tensor) -> torch.Tensor:
    """Columns of heads 0, 1, 2, 3, of which 0 and 1 share a head of keys, as llama.cpp has them."""
    first, second, third, fourth = w.split(64, -1)
    return torch.cat([first, third, second, fourth], -1)


@pytest.mark.parametrize("method", ["rtn", "gptq", "autoround"])
def test_blocks_are_of_llama_cpp_s_columns(
    method: str, source: Path, weight: torch.Tensor, tmp_path: Path, text: str
) -> None:
    drawn = ["--calib", text, "--samples", "4", "--seqlen", "32", "--method", method]
    options = ["--scheme", "q4_k", "--pure"]
    run("quantize", source, tmp_path / "a.gguf", *options, *drawn)
    file = GgufFile(tmp_path / "a.gguf")
    assert file.tensors[STORED].type == Types.Q4_K
    error, other = ((file.read(STORED) - w).norm() / weight.norm() for w in (heads(weight), weight))
    assert error < 0.25 and other > 0.8
    streamed, model = StreamedModel(tmp_path / "a.gguf"), load(tmp_path / "a.gguf")
    with torch.no_grad():
        found = streamed.head(torch.cat(streamed.hidden(IDS)))
        logits = model(IDS).logits
    assert torch.allclose(logits, found, atol=1e-2 * float(found.abs().max()))
    ledger = [json.loads(line) for line in (tmp_path / "a.ledger.jsonl").read_text().splitlines()]
    entry = next(entry for entry in ledger if entry["name"] == f"{OUT}.weight")
    assert entry["loss"] <= entry["loss_rtn"] * 1.2


def test_importance_is_of_llama_cpp_s_columns(source: Path, weight: torch.Tensor, tmp_path: Path, text: str) -> None:
    """Written: that of an input in the place of its column. Read: where one column alone counts, it is kept best."""
    run("imatrix", source, tmp_path / "m.gguf", "--calib", text, "--samples", "4", "--seqlen", "32")
    values = imatrix.read(tmp_path / "m.gguf")
    strongest = values[STORED].view(4, 64).mean(1).argmax()
    assert strongest == 1  # the model's third head, which is gated by more, is the second there
    only = torch.full((256,), 1e-6)
    only[64] = 1.0
    told = {name: [imatrix.Seen(only if name == STORED else value, 9)] for name, value in values.items()}
    imatrix.write(tmp_path / "n.gguf", told, chunks=1, seqlen=9, text="t")
    how = ["--scheme", "q2_k", "--calib", tmp_path / "n.gguf", "--method", "search"]
    run("quantize", source, tmp_path / "a.gguf", *how)
    error = (GgufFile(tmp_path / "a.gguf").read(STORED) - heads(weight)).square().mean(0)
    assert error[64] < 0.2 * error.mean()


def test_an_adapter_is_of_llama_cpp_s_columns(source: Path, tmp_path: Path) -> None:
    names = Names(Skeleton(read_config(source), torch.float32).config)
    peft = {
        f"base_model.model.{OUT}.lora_{half}.weight": torch.randn(*shape)
        for half, shape in (("A", (2, 256)), ("B", (64, 2)))
    }
    (tmp_path / "a").mkdir()
    save_file(peft, tmp_path / "a/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [OUT], "bias": "none"}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    run("convert", tmp_path / "a", tmp_path / "a.gguf", "--base", source)
    file = GgufFile(tmp_path / "a.gguf")
    A = next(iter(peft.values()))
    assert torch.equal(file.read(f"{names.of(f'{OUT}.weight')}.lora_a"), heads(A))
    run("convert", tmp_path / "a.gguf", tmp_path / "b", "--base", source)
    assert torch.equal(load_file(tmp_path / "b/adapter_model.safetensors")[next(iter(peft))], A)


def test_inputs_are_rounded_in_llama_cpp_s_blocks() -> None:
    x = torch.cat([torch.full((16,), value) + torch.linspace(0, 1, 16) for value in (0.0, 0.0, 100.0, 100.0)])
    rounding = inputs_of(Types.Q8_0, (2, 2))
    assert rounding is not None
    wrong = (rounding(x) - x).view(4, 16).abs().amax(1)
    assert bool((wrong > 0.1).all())  # a large head stands beside a small one in each block of 32
    plain = inputs_of(Types.Q8_0)
    assert plain is not None and float((plain(x) - x)[:32].abs().max()) < 0.01


def test_heads_that_llama_cpp_does_not_have_are_refused() -> None:
    with pytest.raises(FormatError, match="heads of 64 and 32"):
        keys_of(small_config(KIND, **SMALL, **WIDE | {"linear_value_head_dim": 32}))
    names = Names(small_config(KIND, **SMALL, **WIDE | {"linear_num_value_heads": 3}))
    with pytest.raises(CheckpointError, match="3 heads of values for 2"):
        names.heads(f"{OUT}.weight")


def test_sizes_of_a_damaged_file_take_no_memory() -> None:
    """Rows and columns of tensors on meta are put in order on meta."""
    names = Names(small_config(KIND, **SMALL, **WIDE))
    assert names.own_shape(f"{OUT}.weight", (64, 1 << 40)) == (64, 1 << 40)
    assert Names(small_config("llama")).own_shape("model.layers.0.self_attn.q_proj.weight", (1 << 40, 64)) == (
        1 << 40,
        64,
    )
