"""What the command line imports before it has to: nothing that takes a second."""

import subprocess
import sys
from pathlib import Path

HEAVY = {"torch", "transformers", "numpy", "gguf", "starlette"}
COMMANDS = {
    "--help": 0, "eval --help": 0, "serve --help": 0, "inspect MISSING --json": 2, "quantize EMPTY OUT": 2,
    "eval EMPTY --reference MISSING": 2, "generate FILE --prompt x": 2, "serve MISSING": 2,
}  # fmt: skip
PROBE = f"""
import sys
from typer.testing import CliRunner
from bitwright.cli.app import app
for command, status in {COMMANDS}.items():
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == status, (command, done.output, done.exception)
print(*sys.modules)
"""


def test_help_and_refusals_import_nothing_large(tmp_path: Path) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("no model")
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


def test_the_package_lists_what_it_offers_and_imports_none_of_it() -> None:
    code = "import bitwright, sys; print(*dir(bitwright)); print(*sys.modules)"
    listed, imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()
    assert {"quantize", "load", "quantize_dynamic", "train", "__version__"} <= set(listed.split())
    assert not HEAVY & set(imported.split())
