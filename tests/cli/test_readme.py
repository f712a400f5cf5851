"""What the README tells a new user to type works: every command, in order, and its Python."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bitwright.cli.app import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("  #")[0] for _, block in BLOCKS for line in block.splitlines() if line.startswith("bitwright ")]
FEWER = {
    "quantize": "--samples 8 --seqlen 32",
    "compare": "--samples 8 --seqlen 32 --tokens 256 --eval-seqlen 32",
    "eval": "--tokens 256 --seqlen 32",
    "generate": "--max-tokens 4",
    "advise": "",
    "finetune": "--steps 2 --batch 1 --seqlen 32 --rank 2",
    "merge": "--samples 8 --seqlen 32 --tokens 256 --eval-seqlen 32",
}


def test_there_are_commands_and_python() -> None:
    assert len(COMMANDS) == 8 and [kind for kind, _ in BLOCKS if kind] == ["python"]


def test_every_command_runs(llama: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(llama)
    (tmp_path / "my-text.txt").write_text(Path(text).read_text())
    for command in COMMANDS:
        given = shlex.split(command)[1:]
        more = ["--calib", "my-text.txt"] if given[0] in ("quantize", "compare") else []
        done = CliRunner().invoke(app, [*given, *more, *FEWER[given[0]].split()], catch_exceptions=False)
        # A model this small may lack rows for a type's blocks: fallbacks, said and in the status.
        assert done.exit_code == 0 or "worse than asked" in done.output, (command, done.output)
    assert {"OUT", "OUT.gguf", "COMPARED", "ADAPTER", "MERGED"} <= {file.name for file in tmp_path.iterdir()}
    python = next(block for kind, block in BLOCKS if kind == "python")
    short = python.replace('scheme="int4-g64"', 'scheme="int4-g32", calib="my-text.txt", samples=8, seqlen=32')
    short = short.replace('"OUT"', '"OUT2"').replace('text="my-text.txt"', 'text="my-text.txt", tokens=256, seqlen=32')
    names: dict[str, object] = {"network": nn.Sequential(nn.Linear(8, 8), nn.ReLU())}
    exec(short, names)
    cost, integer = names["cost"], names["integer"]
    assert cost.kl_mean >= 0 and torch.isfinite(integer(torch.ones(2, 8))).all()  # type: ignore[attr-defined, operator]


def test_make_knows_what_the_readme_asks_of_it() -> None:
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE)) | set(re.findall(r"`make (\w+)`", README))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets >= {"demo", "test", "docs"} and targets - {"docs"} <= rules


def test_what_the_readme_links_to_is_there() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
