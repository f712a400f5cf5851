"""What a terminal and a log show: lines, tables in 80 columns, suggestions, and how to go on after Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from bitwright.cli import console
from bitwright.cli.app import _print_result, app
from bitwright.cli.console import duration, log_lines
from bitwright.cli.summary import summary
from bitwright.errors import one_of
from bitwright.evaluation.report import ledger_table
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.result import Result
from bitwright.version import __version__

SMALL = ["--method", "gptq", "--samples", "8", "--seqlen", "64"]


def bitwright(*args: object, width: int = 80) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "COLUMNS": str(width)}
    command = [sys.executable, "-m", "bitwright", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_log_has_a_line_for_each_block_and_a_summary(llama: Path, text: str, tmp_path: Path) -> None:
    done = bitwright("quantize", llama, tmp_path / "out", "--scheme", "int4-g32", "--calib", text, *SMALL)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("block")]
    assert len(lines) >= 3 and "\r" not in done.stderr and "\x1b" not in done.stderr
    for i, line in enumerate(lines[:-1]):
        what = r"output error 0\.\d{5} \(search 0\.\d{5}\)"
        pattern = rf"block {i + 1} of {len(lines)}, [\d.]+ s, {what}, \d+ (s|min) left"
        assert re.fullmatch(pattern, line) and len(line) <= 80, line
    shown = done.stdout.splitlines()
    assert len(shown) <= 10 and "bits a weight" in shown[0]
    assert any("worse than asked: nothing" in line for line in shown)
    assert any(f"bitwright eval {tmp_path / 'out'} --reference {llama}" in line for line in shown)


def test_quiet_says_nothing(llama: Path, tmp_path: Path) -> None:
    done = bitwright("quantize", llama, tmp_path / "out", "--scheme", "int8-channel", "--method", "rtn", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    data = tmp_path / "data.txt"
    data.write_text("The fox and the hound met at the well. " * 99)
    how = ("--data", data, "--steps", "1", "--batch", "1", "--seqlen", "32", "--quiet")
    done = bitwright("finetune", llama, tmp_path / "adapter", *how)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_summary_names_the_worst_and_the_replaced() -> None:
    def entry(name: str, loss: float, fallback: str = "") -> Entry:
        return Entry(
            f"{name}.weight",
            (4, 4),
            "bfloat16",
            "quantized",
            scheme="int4-g32",
            method="gptq",
            loss=loss,
            loss_rtn=0.1,
            fallback=fallback,
        )

    ledger = [*(entry(f"model.layers.{i}.mlp", i / 1000) for i in range(9)), entry("model.x", 0.5, "search: gptq lost")]
    lines = summary(Result(Path("OUT"), 123_456_789, 4.5, 130.0, 2_000_000_000, ledger), Path("MODEL"))
    assert lines[0] == "OUT: 123.5 MB, 4.50 bits a weight, in 2 min and 2.00 GB of memory"
    assert [line.split()[-1] for line in lines if line.startswith("  ")] == [
        "model.x",
        "model.layers.8.mlp",
        "model.layers.7.mlp",
    ]
    assert "worse than asked: model.x.weight: search: gptq lost" in lines
    assert len(lines) <= 10


@pytest.mark.parametrize("found", [0, 1, 3])
def test_quiet_says_in_a_line_what_is_worse(found: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Small models have many fallbacks: one for every matrix would be no quiet run."""
    fallbacks = ["search: gptq lost"] * found + [""] * (3 - found)
    ledger = [Entry(f"m.{i}", (4, 4), "bfloat16", "quantized", fallback=why) for i, why in enumerate(fallbacks)]
    done = Result(Path("OUT"), 1, 4.5, 1.0, 1, ledger)
    _print_result(done, Path("MODEL"), as_json=False, quiet=True, verbose=False)
    lines = {
        0: "",
        1: "worse than asked: m.0: search: gptq lost\n",
        3: "worse than asked: 3 tensors, such as m.0: search: gptq lost\n",
    }
    assert capsys.readouterr().out == lines[found]


@pytest.mark.parametrize("width", [80, 60])
def test_no_word_is_broken_in_a_narrow_terminal(width: int) -> None:
    ledger = [
        Entry(
            "model.layers.0.self_attn.q_proj.weight", (4, 4), "bfloat16", "quantized", scheme="int4-g128-bf16", loss=0.1
        ),
        Entry("model.layers.0.post_attention_layernorm.weight", (4,), "bfloat16", "kept", reason="outside the blocks"),
    ]
    page = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    page.print(ledger_table(ledger))
    whole = {"self_attn.q_proj", "int4-g128-bf16", "post_attention_layernorm", "kept:", "outside", "the", "blocks"}
    words = [word for line in page.export_text().splitlines()[3:] for word in line.split() if re.search("[a-z]", word)]
    assert words and all(word in whole or word.endswith("…") for word in words), words


def test_log_lines_tell_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    update = log_lines(said.append)
    for at, done in ((0, 2), (10, 3), (40, 4), (50, 5)):  # resumed behind two blocks
        now[0] = at
        update("block, loss 0.1", done, 5)
    assert said == [
        "block 3 of 5, 10.0 s, loss 0.1, 20 s left",
        "block 4 of 5, 30.0 s, loss 0.1, 20 s left",
        "block 5 of 5, 10.0 s, loss 0.1",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.2, "4 s"), (89, "89 s"), (100, "2 min"), (5340, "89 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["quantise", "a", "b"], "quantize"),
        (["quantize", "MODEL", "OUT", "--shceme", "int4-g128"], "--scheme"),
        (["quantize", "MODEL", "OUT", "--scheme", "int4-g12"], "did you mean int4-g128?"),
        (["quantize", "MODEL", "OUT", "--scheme", "int4g128"], "did you mean int4-g128?"),
        (["quantize", "MODEL", "OUT.gguf", "--scheme", "q4_km"], "did you mean q4_k_m"),
        (["quantize", "MODEL", "OUT", "--method", "gtpq"], "did you mean gptq?"),
        (["quantize", "MODEL", "OUT", "--method", "awk+gptq"], "did you mean awq?"),
        (["quantize", "MODEL", "OUT", "--format", "compressed-tensor"], "did you mean compressed-tensors?"),
    ],
)
def test_the_nearest_right_name_is_suggested(llama: Path, tmp_path: Path, args: list[str], meant: str) -> None:
    given = [str(llama) if arg == "MODEL" else str(tmp_path / arg) if arg.startswith("OUT") else arg for arg in args]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 2 and meant in " ".join(done.output.split())


def test_a_name_that_is_near_to_none_gets_the_list() -> None:
    assert one_of("zzz", ("rtn", "gptq")) == "one of rtn, gptq"


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"bitwright {__version__}\n"


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(llama: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    how = ["--scheme", "int4-g32", "--calib", str(text), *SMALL]
    command = [sys.executable, "-m", "bitwright", "quantize", str(llama)]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may be deaf to it
    process = subprocess.Popen([*command, str(out), *how], stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stderr is not None
    said = ""
    while not said.startswith("block 1 of"):
        said = process.stderr.readline()
        assert said, "it ended before its first block"
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130 and not out.exists()
    kept = [line for line in rest.splitlines() if line.startswith("interrupted")]
    assert kept == [
        f"interrupted: finished blocks are kept in {out}.partial; the same command goes on with them, "
        "--restart discards them"
    ]
    subprocess.run([*command, str(out), *how], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole"), *how], check=True, capture_output=True)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_steps_without_a_result_do_not_fill_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[str]()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    update = log_lines(said.append)
    for done in range(61):
        now[0] = 0.25 * done
        update("gradients", done, 60)
    assert said == [
        "gradients 20 of 60, 5.0 s, 10 s left",
        "gradients 40 of 60, 5.0 s, 5 s left",
        "gradients 60 of 60, 5.0 s",
    ]


def test_what_the_user_gave_is_printed_as_it_is(llama: Path, tmp_path: Path) -> None:
    """Rich would read brackets as markup, and `:-1:` as an emoji; a log has each message on one line, to be searched."""
    calib = f"general:1,{tmp_path / '[bold]text.txt'}:-1"
    done = bitwright("quantize", llama, tmp_path / "out", "--calib", calib)
    assert done.returncode == 2 and done.stderr.startswith(f"error {calib}: the share '-1' of ")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("command", get_command(app).commands)  # type: ignore[attr-defined]
def test_help_is_whole_in_80_columns(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).output
    assert "Usage" in shown and "…" not in shown


def test_a_note_is_said_once(llama: Path, text: str, tmp_path: Path) -> None:
    done = bitwright("quantize", llama, tmp_path / "out", "--scheme", "int3-g32", "--calib", text, *SMALL)
    said = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("note:")]
    assert any("int3" in line for line in said) and len(said) == len(set(said)), said
