"""Families of every build, tiny: what transformers computes of the quantized files, `load` and the evaluation compute too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.families import IDS, Outcome, save_tokenizer, tried
from bench.tiny_models import model_class, tiny_model
from typer.testing import CliRunner

from bitwright import quantize
from bitwright.cli.app import app
from bitwright.errors import CheckpointError, FormatError
from bitwright.models.block_calls import Part
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.streamed import StreamedModel
from bitwright.pipeline.ledger import from_jsonl
from bitwright.plan.preflight import preflight
from bitwright.plan.recipe import Recipe

FEW = (
    "gemma3",  # a vision tower, files with older names, an embedding that scales
    "gptj",  # blocks that return tuples
    "xlnet",  # positions without limit, which its config calls -1
    "mamba2",  # a state space; its config says Infinity
    "eurobert",  # an encoder with a norm behind its blocks
    "falcon",  # a subclass of Linear with a forward of its own
    "gemma3n_text",  # four streams, inputs of each layer, keys and values of earlier blocks
)


def save(kind: str, folder: Path) -> Path:
    model = folder / "model"
    tiny_model(kind).save_pretrained(model)
    save_tokenizer(model)
    return model


@pytest.mark.parametrize("kind", FEW)
def test_a_family_works_from_end_to_end(kind: str) -> None:
    found = tried(kind)
    assert replace(found, gguf="") == Outcome(kind, *["yes"] * 5, gguf="", broken=[])


def test_the_text_model_alone_is_quantized_and_the_rest_copied(tmp_path: Path) -> None:
    source, out = save("llava", tmp_path), tmp_path / "out"
    result = quantize(source, out, scheme="int4-g32", method="rtn", calib="none")
    ledger = {entry.name: entry for entry in from_jsonl(out / "ledger.jsonl")}
    quantized = [name for name, entry in ledger.items() if entry.action == "quantized"]
    assert quantized
    assert all(name.startswith("language_model.model.layers.") for name in quantized)
    vision = [entry for name, entry in ledger.items() if name.startswith("vision_tower.")]
    assert vision
    assert all(entry.action == "kept" and "vision_tower" in entry.reason for entry in vision)
    assert any("preprocessor_config.json" in note for note in result.notes)
    assert "AutoModelForImageTextToText" in (out / "README.md").read_text()
    wrote = CliRunner().invoke(app, ["generate", str(out), "--prompt", "a", "--max-tokens", "2", "--json"])
    assert wrote.exit_code == 0, wrote.exception


def test_a_state_space_keeps_what_steers_it_and_quantizes_its_projections(tmp_path: Path) -> None:
    plan = preflight(save("mamba", tmp_path), Recipe.uniform("int4-g32", "rtn"), "compressed-tensors")
    kept = {t.parameter: t.reason for t in plan.tensors if t.layer is None and t.block == 0}
    mixer = {name.rpartition("mixer.")[2] for name in kept}
    assert {"A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"} <= mixer
    assert kept["backbone.layers.0.mixer.conv1d.weight"] == "weight of a Conv1d"
    done = {t.parameter.rpartition("mixer.")[2] for t in plan.tensors if t.layer is not None and t.block == 0}
    assert done == {"in_proj.weight", "x_proj.weight", "out_proj.weight"}


@torch.no_grad()
def test_what_depends_on_the_tokens_goes_with_each_batch(tmp_path: Path) -> None:
    source = save("gemma3n_text", tmp_path)
    model = model_class("gemma3n_text").from_pretrained(source)
    streamed = StreamedModel(source)
    other = (IDS * 7 + 11) % 200
    streamed.load(streamed.skeleton.outer_names())
    hidden = [streamed.skeleton.embed(ids) for ids in (IDS, other)]  # the second must not lend the first its own
    for index in range(len(streamed.skeleton)):
        streamed.load(streamed.skeleton.state_names(index))
        hidden = [streamed.skeleton.run(index, batch) for batch in hidden]
    for ids, batch in zip((IDS, other), hidden, strict=True):
        torch.testing.assert_close(streamed.head(batch), model(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_model_that_computes_between_its_blocks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="changes between its blocks"):
        StreamedModel(save("xlm", tmp_path)).hidden(IDS)


def test_a_part_is_packed_and_unpacked() -> None:
    x = torch.randn(4, 3, 11, 5)  # Gemma 3n's streams [4, B, T, H]
    part = Part.of(x, 3, 11)
    assert part.packed(x).shape == (3, 11, 20)
    assert torch.equal(part.unpacked(part.packed(x)), x)
    with pytest.raises(CheckpointError, match="made of the tokens"):
        Part.of(torch.randn(4, 5), 3, 11)


def test_a_scheme_that_fits_is_named(tmp_path: Path) -> None:
    source = save("llama", tmp_path)
    with pytest.raises(FormatError, match="multiple of the group") as raised:
        preflight(source, Recipe.uniform("int4-g128", "rtn"), "compressed-tensors")
    assert "--scheme int4-g64" in raised.value.remedy
    with pytest.raises(FormatError, match="no container for nf4") as raised:
        preflight(source, Recipe.uniform("nf4-g64", "rtn"), "compressed-tensors")
    assert raised.value.remedy.startswith("--format bitwright")


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(CheckpointError, match="an adapter, not a whole model") as raised:
        read_config(tmp_path)
    assert "merge_and_unload" in raised.value.remedy
    assert "some/base" in raised.value.remedy
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as some trainers leave it there
    with pytest.raises(CheckpointError, match="an adapter, not a whole model"):
        read_config(tmp_path)


def test_an_encoder_and_decoder_is_refused_by_what_it_is(tmp_path: Path) -> None:
    from transformers import BartConfig

    BartConfig(d_model=64).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is an encoder and a decoder"):
        Skeleton(read_config(tmp_path), torch.float32)
