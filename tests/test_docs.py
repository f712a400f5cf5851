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
FIGURE = re.compile(r"\(\.\./figures/([a-z-]+\.svg)\)")


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
        assert printed.getvalue() == meant, code


def test_every_figure_is_shown() -> None:
    """None is missing, and none lies about unused."""
    shown = {name for page in PAGES for name in FIGURE.findall(page.read_text("utf-8"))}
    assert shown == {file.name for file in (DOCS / "figures").glob("*.svg")}


def test_a_wrong_output_is_found() -> None:
    """The pattern above sees what it is there to see."""
    assert blocks("```python\nprint(1)\n```\n\n```text\n2\n```\n") == [("print(1)\n", "2\n")]
    assert blocks("```python\nx = 1\n```\n\nprose\n\n```text\n2\n```\n") == [("x = 1\n", "")]
