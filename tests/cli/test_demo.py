"""The demo on the built-in model: every row is really quantized, and GPTQ costs less than RTN in each pair."""

from pathlib import Path

import pytest

from bitwright.calibration.stdlib_text import HELD_OUT, is_held_out, module_text, training_text
from bitwright.cli import demo as module


def test_the_demo_shows_gptq_ahead_of_rtn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCHEMES", ("int3-g128",))
    monkeypatch.setattr(module, "TOKENS", 4096)
    said: list[str] = []
    rows = module.demo(said.append, lambda *_: None)
    assert [row[1] for row in rows] == ["original", "rtn", "gptq"] and len(said) == 2
    assert all(len(row) == len(module.HEADER) for row in rows)
    rtn, gptq = float(rows[1][5]), float(rows[2][5])
    assert 0 < gptq < 0.3 * rtn
    assert rows[1][2] == rows[2][2] and float(rows[1][2]) < 5


def test_what_is_held_out_was_never_trained_on() -> None:
    assert is_held_out(Path("argparse.py")) and is_held_out(Path("test/test_argparse.py"))
    assert not is_held_out(Path("ast.py"))
    held_out = module_text(HELD_OUT)
    assert len(held_out) > 100_000
    assert held_out[:2000] not in "".join(training_text())
