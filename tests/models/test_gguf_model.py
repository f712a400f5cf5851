"""The text model of a multimodal checkpoint as a GGUF file."""

from pathlib import Path

import pytest
import torch
from bench.gguf_families import CHANGES, SIZES
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.gguf.reader import GgufFile
from bitwright.models.streamed import StreamedModel
from conftest import save_tokenizer

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
}  # fmt: skip
TEXT = {**SIZES, "num_hidden_layers": 4, "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}


def multimodal(kind: str, folder: Path) -> torch.nn.Module:
    """A random multimodal model of a kind, saved with a tokenizer."""
    torch.manual_seed(0)
    text = {**TEXT, **CHANGES[f"{kind}_text"]}
    config = AutoConfig.for_model(kind, text_config=text, vision_config=VISION, image_token_index=255)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "how", "most"),
    [
        ("gemma3", ["quantize", "--scheme", "q8_0", "--method", "rtn", "--calib", "none"], 0.1),
        ("llama4", ["convert"], 1e-4),
    ],
)
def test_the_text_model_of_a_multimodal_one(kind: str, how: list[str], most: float, tmp_path: Path) -> None:
    model, file = multimodal(kind, tmp_path / "source"), tmp_path / "a.gguf"
    done = CliRunner().invoke(app, [how[0], str(tmp_path / "source"), str(file), *how[1:], "--json"])
    assert done.exit_code == 0, done.output
    streamed, ids = StreamedModel(file), torch.arange(24)[None] * 7 % 250
    found, wanted = streamed.head(torch.cat(streamed.hidden(ids))), model(input_ids=ids).logits
    assert GgufFile(file).keys["general.architecture"] == kind
    assert torch.allclose(found, wanted, atol=most * float(wanted.abs().max()))
    planned = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "source"), str(tmp_path / "b.gguf"), "--dry-run", "--json"]
    )
    assert "for images or sound, such as" in done.stdout + planned.stdout
