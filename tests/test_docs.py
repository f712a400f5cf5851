"""The code on the concept pages runs, and prints what stands under it."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "concepts").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e-?\d+)?")
FIGURE = re.compile(r"\((?:\.\./)?figures/([a-z-]+\.svg)\)")


def blocks(page: str) -> list[tuple[str, str]]:
    """Each block of Python on a page, and the output that stands under it ("" where none does)."""
    return [(code, meant or "") for code, meant in BLOCK.findall(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_prints_what_the_page_says(page: Path) -> None:
    """All blocks of a page in one namespace, in order."""
    text = page.read_text("utf-8")
    found = blocks(text)
    assert found
    assert len(found) == text.count("```python")
    namespace: dict[str, Any] = {}
    torch.manual_seed(0)
    for code, meant in found:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        assert alike(printed.getvalue(), meant), f"{code}\nprints\n{printed.getvalue()}"


def alike(printed: str, meant: str) -> bool:
    """Whether two outputs are the same but for the last digits of numbers, which are another processor's to choose."""
    words, wanted = (NUMBER.sub("0", text).split() for text in (printed, meant))
    numbers, expected = ([float(n) for n in NUMBER.findall(text)] for text in (printed, meant))
    return words == wanted and numbers == pytest.approx(expected, rel=0.1, abs=1e-4)


@pytest.mark.parametrize("name", ["README", "docs/quickstart"])
def test_the_chinese_page_has_the_english_one_s_commands_and_numbers(name: str) -> None:
    """Words are translated; commands, without their comments, and the numbers in tables are the same on both, in order."""

    def figures(page: str) -> tuple[list[str], list[str]]:
        text = (DOCS.parent / page).read_text("utf-8")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        commands = [line.split("#")[0].strip() for word, block in blocks if not word for line in block.splitlines()]
        rows = "\n".join(re.findall(r"^\|.*", text, re.MULTILINE))
        return commands, re.findall(r"\d+\.\d+|`[^`]+`", rows)

    assert figures(f"{name}.zh.md") == figures(f"{name}.md")


def test_every_figure_is_shown() -> None:
    """None is missing, and none lies about unused."""
    shown = {name for page in DOCS.rglob("*.md") for name in FIGURE.findall(page.read_text("utf-8"))}
    assert shown == {file.name for file in (DOCS / "figures").glob("*.svg")}


def test_a_wrong_output_is_found() -> None:
    """The patterns above see what they are there to see."""
    assert alike("loss 0.0043, ok\n", "loss 0.0042, ok\n")
    for wrong in ("loss 0.0052, ok", "loss 0.0043, no", "loss 0.0043", "loss 0.0043, ok 7"):
        assert not alike(wrong, "loss 0.0043, ok")
    assert blocks("```python\nprint(1)\n```\n\n```text\n2\n```\n") == [("print(1)\n", "2\n")]
    assert blocks("```python\nx = 1\n```\n\nprose\n\n```text\n2\n```\n") == [("x = 1\n", "")]
