"""Several processes that quantize one model together: the same result as one alone, in float32."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import pytest
import torch
from bench.tiny_models import tiny_model
from safetensors.torch import load_file

from bitwright.gguf.reader import GgufFile
from conftest import make_checkpoint, save_tokenizer

WORKER = Path(__file__).with_name("several_processes.py")
SMALL = {"samples": 24, "seqlen": 64, "seed": 1}
JOBS: dict[str, dict[str, Any]] = {
    "gptq": {"scheme": "int4-g32", "method": "gptq"},
    "default": {"scheme": "int3-g32-asym"},
    "autoround": {"scheme": "int3-g32-asym", "method": "autoround"},
    "awq": {"scheme": "int4-g32", "method": "awq+gptq"},
    "fixed ranges": {"scheme": "int8-channel", "activations": "int8-tensor"},
    "whole tensors": {"scheme": "int8-tensor", "method": "search"},
    "pruned": {"scheme": "int4-g32", "prune": "sparsegpt:2:4", "method": "gptq"},
    "desc_act": {"scheme": "int4-g32", "format": "gptq", "method": "gptq"},
    "one file": {"scheme": "q4_0"},
    "no text": {"scheme": "int4-g32", "method": "search", "calib": "none"},
    "experts": {"scheme": "int4-g32", "method": "gptq"},
    "rotated": {"scheme": "int4-g32", "method": "rotate+gptq", "format": "bitwright"},
    "keys and values": {"scheme": "int4-g32", "method": "gptq", "kv_cache": "int8-tensor"},
}
EXACT = ("no text", "whole tensors")


def start(arguments: list[str], processes: int) -> list[tuple[str, int]]:
    """What each of several processes prints, and its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_all = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    of_all |= {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}  # float32
    started = [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **of_all, "RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        return [(process.communicate(timeout=240)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def run(jobs: list[dict[str, Any]], folder: Path, processes: int) -> list[list[dict[str, Any]]]:
    """What each process says of each job, and its exit status at the end."""
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(jobs))
    return [
        [*(json.loads(line) for line in lines.splitlines() if line.startswith("{")), {"status": status}]
        for lines, status in start([str(WORKER), str(file)], processes)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    mixture = folder / "mixture"
    tiny_model("mixtral").save_pretrained(mixture)
    save_tokenizer(mixture)
    return {"llama": make_checkpoint(folder / "llama"), "mixture": mixture}


def job(name: str, models: dict[str, Path], text: str, out: Path) -> dict[str, Any]:
    """The arguments of `quantize`."""
    model = models["mixture" if name == "experts" else "llama"]
    return {"model": str(model), "out": str(made(name, out)), "calib": text, **SMALL, **JOBS[name]}


def made(name: str, out: Path) -> Path:
    """Where a job's result lies."""
    return out.with_suffix(".gguf") if JOBS[name]["scheme"].startswith("q") else out


@pytest.fixture(scope="module")
def found(
    models: dict[str, Path], text: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder, and for each job what one process alone says, and each of three together."""
    folder = tmp_path_factory.mktemp("out")
    alone = run([job(name, models, text, folder / f"alone {name}") for name in JOBS], folder, 1)
    together = run([job(name, models, text, folder / f"together {name}") for name in JOBS], folder, 3)
    return folder, {name: [said[i] for said in (*alone, *together)] for i, name in enumerate(JOBS)}


def tensors(out: Path) -> dict[str, torch.Tensor]:
    """Bytes of all tensors."""
    if out.is_file():
        file = GgufFile(out)
        return {name: torch.frombuffer(bytearray(file.raw(name)), dtype=torch.uint8) for name in file.tensors}
    known = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    return {name: t.contiguous().view(torch.uint8) if t.ndim else t for name, t in known.items()}


@pytest.mark.parametrize("name", JOBS)
def test_together_as_alone(name: str, found: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, said = found
    alone, *together = said[name]
    assert "error" not in alone and all(one == together[0] for one in together), said[name]
    assert together[0]["losses"].keys() == alone["losses"].keys()
    pairs = [(together[0]["losses"][matrix], loss) for matrix, loss in alone["losses"].items()]
    for ours, loss in pairs[:2]:  # the same statistics; later ones are of blocks in which some codes differ
        assert ours == pytest.approx(loss, rel=1e-3)
    if JOBS[name].get("method") != "autoround":  # whose steps are of more windows
        assert geometric_mean(ours / loss for ours, loss in pairs) == pytest.approx(1, abs=0.03)
    assert len(together[0]["blocks"]) == len(alone["blocks"])
    if alone["blocks"]:
        assert mean(together[0]["blocks"]) < 1.3 * mean(alone["blocks"])
    one, three = (tensors(made(name, folder / f"{who} {name}")) for who in ("alone", "together"))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in three.items()}
    if name in EXACT:
        assert all(torch.equal(t, three[tensor]) for tensor, t in one.items())


def test_a_process_that_ends_is_named_and_the_work_goes_on_from_there(
    models: dict[str, Path], text: str, found: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, _ = found
    asked = job("default", models, text, tmp_path / "out")
    killed = run([{**asked, "of_rank": {"1": {"dies": True}}}], tmp_path, 3)
    assert [said[-1]["status"] for said in killed] == [0, 9, 0]
    for said in (killed[0], killed[2]):
        assert "another process of this run has ended" in said[0]["error"]
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    shutil.copytree(tmp_path / "out.partial", tmp_path / "kept")
    again = run([asked], tmp_path, 3)
    assert "error" not in again[0][0], again
    whole, resumed = tensors(folder / "together default"), tensors(tmp_path / "out")
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items())
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "kept").rename(tmp_path / "out.partial")
    fewer = run([asked], tmp_path, 2)
    assert "error" not in fewer[0][0], fewer
    losses = json.loads(json.dumps(again[0][0]["losses"]))
    assert geometric_mean(fewer[0][0]["losses"][n] / loss for n, loss in losses.items()) == pytest.approx(1, abs=0.03)


def test_an_error_of_one_ends_the_others_work_and_the_next_goes_on(
    models: dict[str, Path], text: str, tmp_path: Path
) -> None:
    asked = job("gptq", models, text, tmp_path / "out")
    again = {**asked, "out": str(tmp_path / "again")}
    first, second = run([{**asked, "of_rank": {"1": {"fails": True}}}, again], tmp_path, 2)
    assert "another process of this run has ended" in first[0]["error"] and "on purpose" in second[0]["error"]
    assert "error" not in first[1] and "error" not in second[1]


def test_a_copy_of_the_model_on_another_machine(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["llama"], copy, copy_function=shutil.copy)  # of another time
    asked = job("gptq", models, text, tmp_path / "out")
    first, second = run([{**asked, "of_rank": {"1": {"model": str(copy)}}}], tmp_path, 2)
    assert "error" not in first[0] and "error" not in second[0], (first, second)


def test_what_cannot_be_done_together_is_refused_by_all(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    asked = job("gptq", models, text, tmp_path / "out")
    (tmp_path / "there").mkdir()
    refused = [
        ({"out": str(tmp_path / "there")}, "OUT exists"),
        ({"store": str(tmp_path / "store")}, "not stored by several processes"),
        ({"scheme": None, "size": "1MB"}, "several processes"),
        ({"calib": str(tmp_path / "no such text")}, "no such text"),
        ({"samples": 1}, "2 processes, and 1 windows"),
        ({"of_rank": {"1": {"scheme": "int3-g32"}}}, "process 1 has scheme 'int3-g32', process 0 'int4-g32'"),
        ({"of_rank": {"1": {"method": "rtn", "calib": "none"}}}, "process 1 has method 'rtn'"),
    ]
    for said in run([{**asked, **change} for change, _ in refused], tmp_path, 2):
        assert said.pop()["status"] == 0
        for (_, message), one in zip(refused, said, strict=True):
            assert message in one["error"], one
    assert sorted(file.name for file in tmp_path.iterdir()) == ["jobs-2.json", "there"]


def test_on_the_command_line_the_first_process_speaks(models: dict[str, Path], text: str, tmp_path: Path) -> None:
    sizes = ["--calib", text, "--samples", "6", "--seqlen", "32", "--scheme", "int4-g32", "--json"]
    first, other = start(
        ["-m", "bitwright", "quantize", str(models["llama"]), str(tmp_path / "out"), *sizes], processes=2
    )
    assert json.loads(first[0])["bytes"] > 0 and first[1] == other[1] == 0
    assert other[0] == ""
