"""Bad input: a clear error that names the thing and the remedy, exit status 2, nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bitwright.cli.app import app
from conftest import make_checkpoint

Spoil = Callable[[Path], None]
ARGUMENTS = ["--scheme", "int4-g32", "--samples", "4", "--seqlen", "32", "--json"]


def refused(model: Path | str, out: Path, text: str, *more: str) -> dict[str, str]:
    """Run `bitwright quantize`; it must exit with 2, print one JSON object, and leave nothing behind."""
    before = sorted(out.parent.iterdir())
    done = CliRunner().invoke(app, ["quantize", str(model), str(out), "--calib", text, *ARGUMENTS, *more])
    assert done.exit_code == 2, (done.output, done.exception)
    error: dict[str, str] = json.loads(done.stdout)
    assert set(error) == {"error", "where", "remedy"}
    assert sorted(out.parent.iterdir()) == before, "something was written"
    return error


def rewrite(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file, metadata={"format": "pt"})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        t.view(-1)[7] = value
        return t

    return change


def truncate(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def garble_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20:40] = b"\xff" * 20
    (folder / "model.safetensors").write_bytes(data)


def grow_shape(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 1 << 40
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NAN = "model.layers.1.mlp.up_proj.weight"
SPOILT: dict[str, tuple[Spoil, str]] = {
    "empty directory": (lambda f: [x.unlink() for x in f.iterdir()] and None, "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{") and None, "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]") and None, "config.json"),
    "config without a type": (lambda f: (f / "config.json").write_text("{}") and None, "model_type"),
    "unknown architecture": (edit_config(model_type="no-such-model"), "no-such-model"),
    "not a causal model": (edit_config(model_type="clip_vision_model"), "clip_vision_model"),
    "config of another model": (edit_config(intermediate_size=96), "config.json means"),
    "config deeper than the weights": (edit_config(num_hidden_layers=5), "model.layers.3"),
    "config shallower than the weights": (edit_config(num_hidden_layers=2), "model.layers.2"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "truncated in its data": (lambda f: truncate(f, 0.7), "header needs"),
    "truncated in its header": (lambda f: truncate(f, 0.001), "header"),
    "empty file": (lambda f: truncate(f, 0.0), "header"),
    "garbled header": (garble_header, "header"),
    "offsets beyond the file": (grow_shape, "model.norm.weight"),
    "NaN": (lambda f: rewrite(f, NAN, poke(float("nan"))), NAN),
    "Inf": (lambda f: rewrite(f, NAN, poke(float("inf"))), NAN),
    "NaN outside the blocks": (lambda f: rewrite(f, "model.norm.weight", poke(float("nan"))), "model.norm.weight"),
    "integer weights": (lambda f: rewrite(f, NAN, lambda t: t.to(torch.int32)), "up_proj"),
    "already quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "already quantized"),
    "only pickled weights": (only_pickle, "pickle"),
    "no tokenizer": (lambda f: [x.unlink() for x in f.glob("*token*")] and None, "tokenizer"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_source(name: str, llama: Path, text: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    spoil, names = SPOILT[name]
    spoil(model)
    error = refused(model, tmp_path / "out", text)
    assert names in error["error"] + error["where"]
    assert error["remedy"] or error["where"]


@pytest.mark.parametrize(("method", "helps"), [("gptq", True), ("hqq", False)])
def test_requantizing_is_advised_where_it_can_be(
    method: str, helps: bool, llama: Path, text: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    edit_config(quantization_config={"quant_method": method})(model)
    assert ("--requantize" in refused(model, tmp_path / "out", text)["remedy"]) is helps


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_weight_that_is_not_finite_is_named_by_every_method(
    method: str, llama: Path, text: str, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    rewrite(tmp_path / "model", NAN, poke(float("-inf")))
    assert NAN in refused(tmp_path / "model", tmp_path / "out", text, "--method", method)["error"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "corrupt", "stray", "outside"])
def test_spoilt_shards(damage: str, text: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", shard="60KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    index = model / "model.safetensors.index.json"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "corrupt":
        shard.write_bytes(b"\0" * shard.stat().st_size)
    elif damage == "stray":
        content = json.loads(index.read_text())
        content["weight_map"]["model.layers.0.nothing.weight"] = shard.name
        index.write_text(json.dumps(content))
    else:
        content = json.loads(index.read_text())
        content["weight_map"] = {name: f"../{file}" for name, file in content["weight_map"].items()}
        index.write_text(json.dumps(content))
    error = refused(model, tmp_path / "out", text)
    assert shard.name in error["where"] or damage in ("outside", "stray")


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--scheme", "int9-g128"), "int9"),
        (("--scheme", "nonsense"), "nonsense"),
        (("--method", "magic"), "magic"),
        (("--format", "zip"), "zip"),
        (("--scheme", "q4_k"), "q4_k"),
        (("--scheme", "nf4-g64"), "nf4-g64"),
        (("--scheme", "mxfp4", "--format", "gptq"), "mxfp4"),
        (("--scheme", "int5-g32", "--format", "gptq"), "int5"),
        (("--scheme", "int4-g128"), "not a multiple"),
        (("--seqlen", "64", "--samples", "1", "--calib", "/no/such/file"), "cannot read"),
        (("--recipe", "/no/such/recipe.toml"), "no such recipe"),
        (("--device", "cuda"), "CUDA GPU"),
        (("--device", "gpu"), "unknown device"),
    ],
)
def test_what_does_not_exist_or_does_not_fit(
    more: tuple[str, ...], names: str, llama: Path, text: str, tmp_path: Path
) -> None:
    error = refused(llama, tmp_path / "out", text, *more)
    assert names in error["where"] + error["error"] and error["remedy"]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ('[[rule]]\nmatch = "*"\nscheme = "int4-g32"\ncolour = 3\n', "colour"),
        ('colour = "red"\n', "colour"),
        ('[[rule]]\nmatch = "*"\n', "scheme"),
        ('[[rule]]\nmatch = "no.such.layer"\nscheme = "keep"\n', "matches nothing"),
        ('[[rule]]\nmatch = "*"\nscheme = "int4-g32"\nmethod = "alchemy"\n', "alchemy"),
        ('[[rule]]\nmatch = "*"\nscheme = "int4-g32"\noptions = { colour = 1 }\n', "colour"),
        ('[[rule]]\nmatch = "*"\nscheme = "keep"\n', "nothing to quantize"),
        ("[[rule\n", "TOML"),
        ("rule = 3\n", "rule"),
        ('[[rule]]\nmatch = 3\nscheme = "keep"\n', "match"),
    ],
)
def test_bad_recipes(content: str, names: str, llama: Path, text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    error = refused(llama, tmp_path / "out", text, "--recipe", str(recipe))
    assert names in error["error"]


@pytest.mark.parametrize("content", ["", " \n\n", "too short"])
def test_calibration_text_that_is_too_short(content: str, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(content)
    error = refused(llama, tmp_path / "out", str(file))
    assert str(file) in error["where"] and error["remedy"]


def test_calibration_text_that_is_not_text(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "binary.txt"
    file.write_bytes(bytes(range(256)))
    assert "UTF-8" in refused(llama, tmp_path / "out", str(file))["error"]


@pytest.mark.parametrize("model", ["/no/such/directory", "somebody/some-model"])
def test_a_model_that_is_not_here(model: str, text: str, tmp_path: Path) -> None:
    error = refused(model, tmp_path / "out", text)
    assert model in error["where"] and "no such file or directory" in error["error"] and error["remedy"]


@pytest.mark.parametrize("left_out", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_has_not_fetched(left_out: str, llama: Path, text: str, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "clone")
    file = tmp_path / "clone" / left_out
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 123456789\n")
    error = refused(tmp_path / "clone", tmp_path / "out", text)
    assert error["where"] == str(file) and "git lfs pull" in error["remedy"]


def test_out_exists(llama: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists" in refused(llama, tmp_path / "out", text)["error"]
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_is_too_small_is_seen_beforehand(
    llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    error = refused(llama, tmp_path / "out", text)
    assert "1,000 free" in error["error"] and error["remedy"]


def test_a_disk_that_fills_up_leaves_no_out_and_resumes(llama: Path, text: str, tmp_path: Path) -> None:
    start = [
        sys.executable,
        "-m",
        "bitwright",
        "quantize",
        str(llama),
        str(tmp_path / "out"),
        "--calib",
        text,
        *ARGUMENTS,
    ]

    def limit() -> None:  # a write beyond this size fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    full = subprocess.run(start, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert full.returncode == 2, full.stderr
    error = json.loads(full.stdout)
    assert "disk is full" in error["error"] and "run the same command again" in error["remedy"]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.tmp"))
    again = subprocess.run(start, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and (tmp_path / "out").is_dir()


def test_human_errors_name_the_remedy_on_stderr(llama: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(llama), str(tmp_path / "out"), "--scheme", "int4-g128[x]"])
    assert done.exit_code == 2 and not done.stdout
    assert "int4-g128[x]" in done.stderr and "remedy" in done.stderr


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_other_commands_refuse_as_clearly(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, str(tmp_path), "--json"])
    assert done.exit_code == 2 and "config.json" in json.loads(done.stdout)["error"]


def test_usage_errors_exit_with_2(llama: Path) -> None:
    assert CliRunner().invoke(app, ["quantize", str(llama)]).exit_code == 2
    assert CliRunner().invoke(app, ["quantize", str(llama), "x", "--samples", "0"]).exit_code == 2


def test_a_text_that_cannot_be_read_stops_a_dry_run_too(llama: Path, tmp_path: Path) -> None:
    error = refused(llama, tmp_path / "out", str(tmp_path / "nothere.txt"), "--dry-run")
    assert "cannot read the text" in error["error"] and error["where"].endswith("nothere.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert refused(llama, tmp_path / "out", f"general:0.5,{tmp_path / 'latin.txt'}:0.5", "--dry-run")[
        "error"
    ] == "not UTF-8 text"  # fmt: skip
    cut = tmp_path / "cut.txt"
    cut.write_text("ü" * 40_000)
    cut.write_bytes(b"." + cut.read_bytes())  # a character lies across the end of what is looked at
    done = CliRunner().invoke(
        app, ["quantize", str(llama), str(tmp_path / "out"), "--calib", str(cut), *ARGUMENTS, "--dry-run"]
    )
    assert done.exit_code == 0, done.output
