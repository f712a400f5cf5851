"""Quantized checkpoints in other formats: the same numbers, or the reason why not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from bitwright.cli.app import app
from bitwright.errors import FormatError
from bitwright.formats import FORMATS
from bitwright.formats.ggml import TYPES
from bitwright.formats.ggml_scales import READ_ONLY
from bitwright.methods.search import search
from bitwright.models.config import read_config
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import WeightSource, open_weights
from bitwright.models.streamed import StreamedModel
from bitwright.numerics.codec import decode, encode, fit
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.repacking import expressed, packed
from conftest import in_blocks, make_checkpoint

# What each of llama.cpp's types becomes, by format; what is not listed is refused.
HELD = {
    "compressed-tensors": {
        "Q8_0": "int8-g32-sym-f32", "Q4_0": "int4-g32-asym-f32", "Q5_0": "int5-g32-asym-f32", "Q6_K": "int6-g16-asym-f32",
        "Q3_K": "int3-g16-asym-f32", "MXFP4": "fp4-g32-sym-e8m0", "TQ1_0": "ternary-g256-sym-f32",
        "TQ2_0": "ternary-g256-sym-f32", "NVFP4": "nvfp4", "IQ4_NL": "int8-g32-asym-f32", "IQ4_XS": "int8-g32-asym-f32",
        "IQ1_S": "int5-g32-f32", "IQ1_M": "int5-g16-f32", "IQ2_XXS": "int7-g32-f32", "IQ2_XS": "int7-g16-f32",
        "IQ2_S": "int7-g16-f32", "IQ3_XXS": "int6-g32-f32", "IQ3_S": "int5-g32-f32", "Q1_0": "int2-g128-f32",
        "Q2_0": "int2-g64-asym-f32",
    },
    "gptq": {  # scales of other types are no f16s by themselves
        "Q8_0": "int8-g32-sym-f16", "Q4_0": "int4-g32-asym-f16", "Q5_0": "int8-g32-asym-f16", "IQ4_NL": "int8-g32-asym-f16",
        "TQ1_0": "int2-g256", "TQ2_0": "int2-g256", "Q1_0": "int2-g128", "Q2_0": "int2-g64-asym", "MXFP4": "int8-g32",
        "NVFP4": "int8-g16",
    },
    "bitwright": {name: str(kind.scheme) for name, kind in TYPES.items()} | READ_ONLY,
}  # fmt: skip

ALL = [*TYPES, *READ_ONLY]


def run(*arguments: str, fine: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code in fine, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose rows fill blocks of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("models") / "wide", "llama", **shape)


@pytest.fixture(scope="module")
def files(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every block type."""
    folder = tmp_path_factory.mktemp("files")
    run("convert", str(wide), str(folder / "float.gguf"))
    quick = [*READ_ONLY, *(name for name, kind in TYPES.items() if kind.scheme.levels.run > 1)]
    for name in quick:
        in_blocks(folder / "float.gguf", folder / f"{name}.gguf", name)
    for name in [name for name in TYPES if name not in quick]:
        how = ["--scheme", name.lower(), "--pure", "--method", "search", "--calib", "none"]
        run("quantize", str(wide), str(folder / f"{name}.gguf"), *how)
    return {name: folder / f"{name}.gguf" for name in ALL}


def weights(path: Path) -> dict[str, torch.Tensor]:
    """By the model's names, decoded."""
    weight_source = open_weights(path)
    names = Skeleton(read_config(path), torch.float32).source_names(weight_source.shapes, str(path))
    return {parameter: weight_source.read(source).float() for parameter, source in names.items()}


@pytest.mark.parametrize("format_name", HELD)
@pytest.mark.parametrize("name", ALL)
def test_every_block_type_becomes_the_same_numbers_or_is_refused(
    name: str, format_name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["convert", str(files[name]), str(out), "--format", format_name]
    if name not in HELD[format_name]:
        refused = run(*arguments, fine=(2,))
        assert "cannot hold these numbers" in refused["error"] and "bitwright" in refused["remedy"]
        assert list(tmp_path.iterdir()) == []
        return
    done = run(*arguments)
    before, after = weights(files[name]), weights(out)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    ledger = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    schemes = {entry["scheme"] for entry in ledger if entry["action"] == "quantized"}
    assert {str(Scheme.parse(scheme)) for scheme in schemes} == {str(Scheme.parse(HELD[format_name][name]))}
    assert any("model.embed_tokens.weight is" in note for note in done["notes"])
    widened = name.startswith("IQ") and format_name != "bitwright"
    assert not widened or f"14 matrices are {name.lower()}" in done["notes"][-1]
    assert open_weights(out).quantized("model.layers.0.mlp.up_proj.weight") is not None


def test_transformers_loads_what_was_a_gguf_file(files: dict[str, Path], wide: Path, tmp_path: Path) -> None:
    """Tokenizer, config and weights: the logits of the file's own reader."""
    out = tmp_path / "out"
    run("convert", str(files["Q4_0"]), str(out))
    streamed, ids = StreamedModel(files["Q4_0"]), torch.arange(40)[None] * 3 % 257
    streamed.load(streamed.skeleton.outer_names())
    mine = torch.cat([streamed.skeleton.head(hidden) for hidden in streamed.hidden(ids)])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, mine, atol=2e-4)
    text = "a fox, 12 dogs\n"
    assert (
        AutoTokenizer.from_pretrained(out)(text)["input_ids"] == AutoTokenizer.from_pretrained(wide)(text)["input_ids"]
    )


def test_directories_become_other_directories(wide: Path, tmp_path: Path) -> None:
    run("quantize", str(wide), str(tmp_path / "a"), "--scheme", "int4-g32-asym", "--method", "rtn", "--calib", "none")
    run("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "bitwright")
    run("convert", str(tmp_path / "b"), str(tmp_path / "c"), "--format", "compressed-tensors")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(
        torch.equal(a[key], b[key].to(torch.bfloat16).float()) for key in a
    )  # a's reader rounds to its model's type
    assert all(torch.equal(b[key], c[key]) for key in b)
    assert (tmp_path / "c/tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("name", "scheme", "others"),
    [("bitsandbytes", "nf4-g64-dq", ("gptq", "awq")), ("awq", "int4-g32-asym", ("bitsandbytes",))],
)
def test_awq_s_and_bitsandbytes_files_become_others_and_come_back(
    name: str, scheme: str, others: tuple[str, ...], wide: Path, tmp_path: Path
) -> None:
    how = ["--scheme", scheme, "--method", "rtn", "--calib", "none"]
    run("quantize", str(wide), str(tmp_path / "a"), "--format", name, *how)
    run("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "bitwright")
    run("convert", str(tmp_path / "b"), str(tmp_path / "c"), "--format", name)
    a, b, c = (weights(tmp_path / folder) for folder in "abc")
    assert all(torch.equal(a[key], b[key]) and torch.equal(b[key], c[key]) for key in a)
    for other in others:
        refused = run("convert", str(tmp_path / "a"), str(tmp_path / "d"), "--format", other, fine=(2,))
        assert "cannot hold" in refused["error"]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("compressed-tensors", "nvfp4"),
        *(("bitwright", one) for one in ("nvfp4", "nf4-g64-dq", "q4_k", "q6_k", "int4-g32-sym-k6")),
    ],
)
def test_scales_of_two_levels_stay_bit_for_bit(name: str, scheme: str, wide: Path, tmp_path: Path) -> None:
    how = ["--scheme", scheme, "--method", "rtn", "--calib", "none"]
    run("quantize", str(wide), str(tmp_path / "a"), "--format", name, *how)
    run("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--format", "bitwright")
    run("convert", str(tmp_path / "b"), str(tmp_path / "c"), "--format", name)
    a, c = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    packed = {key for key in a if ".weight_" in key}
    assert packed and packed <= c.keys()
    assert all(torch.equal(a[key].view(torch.uint8), c[key].view(torch.uint8)) for key in packed)


@pytest.mark.parametrize(
    ("text", "zero"), [("q4_0", "asym"), ("q5_0", "asym"), ("int3-g16-signed-k6", "asym1"), ("int4-g32-asym", "asym1")]
)
def test_numbers_stay_as_they_are(text: str, zero: Any) -> None:
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse(text)
    q = search(w, None, scheme).q
    other = expressed(q, zero, "f32")
    if other is None:
        assert q.scales.zero is not None and bool((q.scales.zero == scheme.levels.lo).any())
        return
    assert other.scheme.zero == zero and torch.equal(decode(other), decode(q))
    if q.scales.zero is None:
        assert bool((q.scales.scale < 0).any()) and bool((other.scales.scale >= 0).all())


def test_columns_in_an_order_of_their_own_are_refused() -> None:
    q = search(torch.randn(32, 64), None, Scheme.parse("int4-g32-asym")).q
    with pytest.raises(FormatError, match="desc_act"):
        packed(replace(q, order=torch.arange(64).flip(0)), "m", FORMATS["bitwright"], transposed=False)


def test_what_cannot_be_converted_is_said(wide: Path, files: dict[str, Path], tmp_path: Path) -> None:
    run(
        "quantize",
        str(wide),
        str(tmp_path / "w8a8"),
        "--scheme",
        "int8-channel",
        "--activations",
        "int8-token",
        "--method",
        "rtn",
    )
    for model, out, says in [
        (wide, "x", "nothing quantized"),
        (tmp_path / "w8a8", "x", "changes the inputs too"),
        (files["Q8_0"], "x.gguf", "a GGUF file already"),
        (tmp_path / "w8a8", "x.gguf", "converted to directories alone"),
    ]:
        assert says in run("convert", str(model), str(tmp_path / out), fine=(2,))["error"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("x")]
    remedy = run("convert", str(tmp_path / "w8a8"), str(tmp_path / "x"), fine=(2,))["remedy"]
    command = remedy.split(": bitwright ")[1].replace("OUT", str(tmp_path / "alone"))  # what it names keeps the weights
    run(*command.split())
    before, after = WeightSource(tmp_path / "w8a8"), WeightSource(tmp_path / "alone")
    assert all(torch.equal(before.read(f"{m}.weight"), after.read(f"{m}.weight")) for m in before.modules)
    assert after.input_quantization(next(iter(after.modules))) is None
    w = torch.randn(4, 256)
    q = encode(w, fit(w, Scheme.parse("q4_k")), Scheme.parse("q4_k"))
    with pytest.raises(FormatError, match="has no container for"):
        packed(q, "a.b", FORMATS["compressed-tensors"], transposed=False)
