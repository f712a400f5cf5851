"""Nothing left unread: a tensor that the model has no place for is an error wherever a file is read, or in the table."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from bitwright import load, quantize
from bitwright.cli.app import app
from bitwright.errors import CheckpointError
from bitwright.evaluation.inspection import inspect
from bitwright.models.source import names_in
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.conversion import convert

EYE = torch.ones(1, 1, 4, 4, dtype=torch.bool)
LEFT = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.layers.1.attn.bias": EYE,
    "model.layers.1.attn.masked_bias": torch.tensor(-1e4),
    "mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 4),
    "model.layers.3.mlp.up_proj.weight": torch.ones(4, 4),  # num_nextn_predict_layers says one such block
    "model.layers.0.self_attn.k_scale": torch.ones(1),
}
ODD = {
    "model.layers.0.self_attn.q_norm.weight": torch.ones(16),
    "model.layers.2.self_attn.bias": torch.ones(64),  # no triangle of ones
    "model.layers.4.mlp.up_proj.weight": torch.ones(4, 4),  # behind that one block
    "model.vision_tower.patch.weight": torch.ones(4, 4),
}


def holding(model: Path, folder: Path, more: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint with other tensors beside its own, and other words in its config."""
    shutil.copytree(model, folder)
    save_file(load_file(model / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((model / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q"
    quantize(llama, out, format="compressed-tensors", scheme="int4-g32", method="rtn", calib="none")
    return out


READ: dict[str, Callable[[Path, Path], object]] = {
    "load": lambda model, out: load(model),
    "eval": lambda model, out: StreamedModel(model),
    "inspect": lambda model, out: inspect(model),
    "convert": lambda model, out: convert(model, out / "c.gguf"),
    "quantize": lambda model, out: quantize(model, out / "q", scheme="int4-g32", method="rtn", calib="none"),
}


@pytest.mark.parametrize("how", READ)
def test_what_nothing_reads_is_named(how: str, llama: Path, tmp_path: Path) -> None:
    model = holding(llama, tmp_path / "one", {"model.vision_tower.patch.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"no tensor 'model.vision_tower.patch.weight'"):
        READ[how](model, tmp_path)
    with pytest.raises(CheckpointError, match=r"4 tensors.* such as 'model.layers.0.self_attn.q_norm.weight', '"):
        READ[how](holding(llama, tmp_path / "all", ODD, num_nextn_predict_layers=1), tmp_path)
    READ[how](holding(llama, tmp_path / "left", LEFT, num_nextn_predict_layers=1), tmp_path)


@pytest.mark.parametrize("how", ["load", "eval", "inspect", "repack"])
def test_in_quantized_files_too(how: str, packed: Path, tmp_path: Path) -> None:
    """Beside a module's own tensors, and where a weight has lost its scales."""
    read = READ.get(how, lambda model, out: convert(model, out / "r", "bitwright"))
    module = "model.layers.0.mlp.up_proj"
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_secret"):
        read(holding(packed, tmp_path / "more", {f"{module}.weight_secret": torch.ones(1)}), tmp_path)
    model = holding(packed, tmp_path / "codes", {"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is int8 without the scales"):
        read(model, tmp_path)


def test_codes_that_no_config_explains(packed: Path, tmp_path: Path) -> None:
    said = json.loads((packed / "config.json").read_text())
    del said["quantization_config"]
    shutil.copytree(packed, tmp_path / "q")
    (tmp_path / "q" / "config.json").write_text(json.dumps(said))
    for words in (["inspect"], ["convert", "c.gguf"], ["quantize", "o", "--calib", "none", "--method", "rtn"]):
        command, *more = words
        out = [str(tmp_path / word) if not i else word for i, word in enumerate(more)]
        done = CliRunner().invoke(app, [command, str(tmp_path / "q"), *out, "--json"])
        assert done.exit_code == 2 and "quantize_config.json" in json.loads(done.stdout)["remedy"], words


def test_scales_for_keys_and_values_that_no_config_asks_for_are_noted(packed: Path, text: str, tmp_path: Path) -> None:
    """They stay in float in `load` and `eval`, which say so; with a kv_cache_scheme only the others are noted."""
    scales = {f"model.layers.{i}.self_attn.{s}_scale": torch.ones(1) for i in range(3) for s in "kv"}
    model = holding(packed, tmp_path / "m", scales)
    with pytest.warns(UserWarning, match=r"6 scales .*layers\.0\.self_attn\.k_scale; .*kv_cache_scheme"):
        load(model)
    done = CliRunner().invoke(app, ["eval", str(model), "--text", text, "--tokens", "64", "--seqlen", "32"])
    assert done.exit_code == 0
    assert "note: " in done.output
    assert "6 scales" in done.output
    said = json.loads((model / "config.json").read_text())
    said["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    (model / "config.json").write_text(json.dumps(said))
    streamed = StreamedModel(model)
    names_in(streamed.weight_source, streamed.skeleton)
    assert streamed.weight_source.notes == ()
