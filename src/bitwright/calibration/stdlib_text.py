"""The texts `stdlib` and `stdlib-heldout`: source code of Python's standard library, which every machine with Python has.

The built-in model was trained on it, so the demo needs no download: it calibrates on modules from the training text and
evaluates on modules held out of it, together with their tests.
"""

import sysconfig
from pathlib import Path

HELD_OUT = (
    "argparse", "calendar", "csv", "difflib", "fractions", "heapq",
    "sched", "shelve", "statistics", "tarfile", "textwrap", "zipapp",
)  # fmt: skip
CALIBRATION = (
    "ast", "asyncio/base_events", "collections/__init__", "configparser", "dataclasses", "decimal", "email/message",
    "enum", "functools", "http/client", "inspect", "json/decoder", "logging/__init__", "pathlib", "pickle", "random",
    "shutil", "socket", "subprocess", "threading", "typing", "unittest/case", "urllib/parse", "zipfile",
)  # fmt: skip


def stdlib() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(path: Path) -> bool:
    """Whether a file is a held-out module, its test, or part of a package of that name."""
    return any(part.removesuffix(".py").removeprefix("test_") in HELD_OUT for part in path.parts)


def module_text(names: tuple[str, ...]) -> str:
    """The sources of the named modules, joined; names that this version of Python lacks are skipped."""
    files = [stdlib() / f"{name}.py" for name in names]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())


def training_text() -> list[str]:
    """Every source file of the standard library but the held-out ones and tables of data, in a fixed order."""
    root = stdlib()
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    left_out = ("site-packages", "encodings", "pydoc_data")
    keep = [p for p in paths if p.parts[0] not in left_out and not is_held_out(p)]
    return [text for path in keep if (text := _read(root / path))]


def _read(path: Path) -> str:
    """The file's text; "" for the few test files that are deliberately not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
