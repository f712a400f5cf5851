"""Float GGUF files of architectures that are not known here: rounded tensor by tensor, and said so."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from typer.testing import CliRunner

from bitwright import quantize
from bitwright.cli.app import app
from bitwright.errors import VerificationError
from bitwright.formats import gguf_writer
from bitwright.gguf import imatrix
from bitwright.gguf.reader import GgufFile
from bitwright.pipeline import gguf_rows as byrows
from bitwright.system.threads import ahead
from conftest import make_checkpoint

PLAIN = ["--method", "search", "--calib", "none"]


def run(*arguments: str, fine: tuple[int, ...] = (0,)) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code in fine, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float file of a known architecture, and the same under a name that nobody knows."""
    folder = tmp_path_factory.mktemp("files")
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "tie_word_embeddings": False}
    model = make_checkpoint(folder / "model", "llama", dtype=torch.float16, **shape)
    run("convert", str(model), str(folder / "known.gguf"))
    content = (folder / "known.gguf").read_bytes()
    (folder / "unknown.gguf").write_bytes(content.replace(b"llama", b"lemma"))
    return folder / "known.gguf", folder / "unknown.gguf"


@pytest.mark.parametrize("scheme", ["q4_k_m", "q2_k", "iq4_xs", "q4_0"])
def test_the_same_blocks_as_if_it_were_known(scheme: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    """Without calibration nothing depends on what a model computes: types by the mix's rule, and bytes, are the same."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[rule]]\nmatch = "*"\nscheme = "{scheme}"\n')  # names of modules: it is planned as a model
    for name, file in zip(("a", "b", "c"), (files[0], files[1], files[0]), strict=True):
        how = ["--recipe", str(recipe)] if name == "a" else []
        run("quantize", str(file), str(tmp_path / f"{name}.gguf"), "--scheme", scheme, *how, *PLAIN)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    assert [t["loss"] for t in run("inspect", str(tmp_path / "c.gguf"))["tensors"]] == pytest.approx(
        [t["loss"] for t in run("inspect", str(tmp_path / "a.gguf"))["tensors"]]
    )
    a, b, before = (GgufFile(path) for path in (tmp_path / "a.gguf", tmp_path / "b.gguf", files[1]))
    assert set(a.tensors) == set(b.tensors) and b.keys["general.architecture"] == "lemma"
    assert all(a.tensors[name].type == b.tensors[name].type for name in a.tensors)
    assert all(a.raw(name).tobytes() == b.raw(name).tobytes() for name in a.tensors)
    assert all(str(b.keys[key]) == str(value) for key, value in before.keys.items() if key != "general.file_type")
    ledger = [json.loads(line) for line in (tmp_path / "b.ledger.jsonl").read_text().splitlines()]
    assert {entry["name"] for entry in ledger} == set(before.tensors)
    losses = [entry for entry in ledger if entry["action"] == "quantized"]
    assert all(0 < entry["loss"] <= entry["loss_rtn"] * 1.01 for entry in losses)


def test_it_is_announced_and_methods_give_way_on_record(files: tuple[Path, Path], tmp_path: Path) -> None:
    plan = run("quantize", str(files[1]), str(tmp_path / "x.gguf"), "--scheme", "q4_k", "--pure", "--dry-run")
    assert "'lemma' is not known here" in plan["notes"][0] and "without importance" in plan["notes"][0]
    done = run("quantize", str(files[1]), str(tmp_path / "x.gguf"), "--scheme", "q4_k", "--pure", fine=(1,))
    assert len(done["fallbacks"]) == 8 * 7 + 2 and all("gptaq -> search" in text for text in done["fallbacks"])
    assert quantize(files[1], tmp_path / "y.gguf", scheme="q4_k", pure=True).fallbacks == done["fallbacks"]
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert plan["bytes"] == (tmp_path / "x.gguf").stat().st_size


def test_an_importance_matrix_counts_the_same(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Whether a model is planned or not; and one of another model is refused where the model is known."""
    tensors = GgufFile(files[0]).tensors
    values = {
        n: [imatrix.Seen(torch.rand(t.shape[-1]) + 0.1, 10)]
        for n, t in tensors.items()
        if n.startswith("blk") and len(t.shape) == 2
    }
    imatrix.write(tmp_path / "m.gguf", values, chunks=1, seqlen=10, text="t")
    (tmp_path / "recipe.toml").write_text('[[rule]]\nmatch = "*"\nscheme = "q3_k_m"\n')
    how = ["--scheme", "q3_k_m", "--method", "search", "--calib", str(tmp_path / "m.gguf")]
    for name, more in (("a", ["--recipe", str(tmp_path / "recipe.toml")]), ("b", [])):
        run("quantize", str(files[0]), str(tmp_path / f"{name}.gguf"), *how, *more)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    values.pop("blk.3.attn_q.weight")
    imatrix.write(tmp_path / "m.gguf", values, chunks=1, seqlen=10, text="t")
    for more in (["--recipe", str(tmp_path / "recipe.toml")], []):
        refused = run("quantize", str(files[0]), str(tmp_path / "c.gguf"), *how, *more, fine=(2,))
        assert "it has nothing for blk.3.attn_q.weight" in refused["error"] and not (tmp_path / "c.gguf").exists()


def test_an_importance_matrix_counts(files: tuple[Path, Path], tmp_path: Path) -> None:
    weight = torch.arange(256.0) % 7 * 10 + 0.1
    importance = {"blk.0.ffn_up.weight": [imatrix.Seen(weight, 10)]}
    imatrix.write(tmp_path / "m.gguf", importance, chunks=1, seqlen=10, text="t")
    for name, calib in (("a", "none"), ("b", str(tmp_path / "m.gguf"))):
        how = ["--scheme", "q3_k", "--pure", "--method", "search", "--calib", calib]
        run("quantize", str(files[1]), str(tmp_path / f"{name}.gguf"), *how)
    a, b, w = (GgufFile(path) for path in (tmp_path / "a.gguf", tmp_path / "b.gguf", files[1]))
    differ = {name for name in a.tensors if a.raw(name).tobytes() != b.raw(name).tobytes()}
    assert differ == {"blk.0.ffn_up.weight"}
    errors = [(file.read("blk.0.ffn_up.weight") - w.read("blk.0.ffn_up.weight").float()).square() for file in (a, b)]
    lost = [float((error * weight).sum()) for error in errors]
    assert lost[1] < 0.99 * lost[0]


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "manyheads")
    writer.add_block_count(1)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (64, 256),
        "blk.0.ffn_up_exps.weight": (3, 32, 256),
        "blk.0.ffn_gate_inp.weight": (3, 256),
        "blk.0.attn_norm.weight": (256,),
        "blk.0.ssm_conv1d.weight": (256, 4),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    run("quantize", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--scheme", "q4_k_m", *PLAIN)
    types = {name: t.type.name for name, t in GgufFile(tmp_path / "b.gguf").tensors.items()}
    assert types["blk.0.ffn_up_exps.weight"] == "Q4_K" and types["token_embd.weight"] == "Q6_K"
    assert {types[name] for name in shapes if "_inp" in name or "norm" in name or "conv" in name} == {"F32"}
    for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors:
        mine = GgufFile(tmp_path / "b.gguf").read(t.name).numpy()
        assert mine.shape == shapes[t.name] and np.array_equal(mine, dequantize(t.data, t.tensor_type))


def test_what_needs_a_model_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, says in [
        (["x.gguf", "--method", "awq"], "need a model that is run"),
        (["x"], "can stay GGUF"),
        (["x.gguf", "--activations", "int8-token"], "inputs are rounded"),
        (["x.gguf", "--scheme", "q4_k_m", "--pure"], "is a mix"),
    ]:
        where = [str(files[1]), str(tmp_path / arguments[0]), *arguments[1:]]
        assert says in run("quantize", *where, fine=(2,))["error"]
    run("quantize", str(files[1]), str(tmp_path / "a.gguf"), "--scheme", "q4_0", *PLAIN)
    again = run("quantize", str(tmp_path / "a.gguf"), str(tmp_path / "x.gguf"), fine=(2,))
    assert "already quantized" in again["error"]
    judged = run("eval", str(files[1]), "--text", "stdlib-heldout", fine=(2,))
    assert "architecture 'lemma' is not read here" in judged["error"] and "gguf/architectures.py" in judged["remedy"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith("x")] == []


def test_a_weight_that_is_not_finite_is_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    file = GgufFile(files[1])
    content = bytearray(files[1].read_bytes())
    at = file.tensors["blk.1.ffn_up.weight"].offset
    content[at : at + 2] = np.array([np.nan], np.float16).tobytes()
    (tmp_path / "bad.gguf").write_bytes(content)
    found = run("quantize", str(tmp_path / "bad.gguf"), str(tmp_path / "x.gguf"), "--scheme", "q4_0", *PLAIN, fine=(2,))
    assert found["where"] == "blk.1.ffn_up.weight" and "NaN" in found["error"]


def test_a_run_that_was_cut_off_goes_on(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written and noted is not made again; what was written and not noted is."""
    out, made = tmp_path / "a.gguf", byrows._make_rows
    quantize(files[1], tmp_path / "whole.gguf", scheme="q4_0", method="search", calib="none")

    def cut(file: Any, writer: gguf_writer.GgufWriter, job: byrows.Rows) -> Any:
        if job.tensor.block == 5:
            writer.put(job.tensor.source, torch.zeros(1, dtype=torch.uint8))
            raise KeyboardInterrupt
        return made(file, writer, job)

    monkeypatch.setattr(byrows, "_make_rows", cut)
    with pytest.raises(KeyboardInterrupt):
        quantize(files[1], out, scheme="q4_0", method="search", calib="none")
    assert not out.exists()
    again = set()
    monkeypatch.setattr(byrows, "_make_rows", lambda *args: again.add(args[2].tensor.block) or made(*args))
    quantize(files[1], out, scheme="q4_0", method="search", calib="none")
    assert again == {5, 6, 7, None}
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "a.gguf.partial").exists()


def test_nothing_more_is_begun_when_a_loop_is_left() -> None:
    seen: list[int] = []
    with ahead(lambda i: seen.append(i) or time.sleep(0.01) or i, range(200)) as found:
        assert [next(found), next(found)] == [0, 1]
    assert len(seen) < 50
    with ahead(str, range(50)) as found:
        assert list(found) == [str(i) for i in range(50)]


def test_a_disk_that_gives_back_something_else(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gguf_writer.GgufWriter.put

    def flipped(self: gguf_writer.GgufWriter, name: str, tensor: torch.Tensor, first: int = 0) -> None:
        tensor = tensor.clone()
        tensor.view(torch.uint8).view(-1)[0] ^= name == "blk.3.ffn_up.weight"
        whole(self, name, tensor, first)

    monkeypatch.setattr(gguf_writer.GgufWriter, "put", flipped)
    with pytest.raises(VerificationError) as found:
        quantize(files[0], tmp_path / "a.gguf", scheme="q4_0", method="search", calib="none")
    assert found.value.where == "blk.3.ffn_up.weight" and not (tmp_path / "a.gguf").exists()


def test_nothing_that_knows_models_is_loaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A second and more: as long as a small model takes."""
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bitwright.cli.app import app\n"
        f"done = CliRunner().invoke(app, {['quantize', str(files[0]), str(tmp_path / 'a.gguf'), *PLAIN]!r})\n"
        "assert done.exit_code == 0 and 'transformers' not in sys.modules, done.output"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
