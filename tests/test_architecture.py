"""The house stands as docs/ARCHITECTURE.md draws it: the import order, and no file without a line there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bitwright"


def reading_order() -> list[str]:
    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs/ARCHITECTURE.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+\.py)`", row)]


def module_file(module: str) -> str:
    path = Path(*module.split(".")[1:])
    return str(path / "__init__.py") if (PACKAGE / path).is_dir() else f"{path}.py"


def imports(file: Path) -> set[str]:
    """Files of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bitwright":
            for name in node.names:
                if name.name == "_native":  # the extension: not a file of the reading order
                    continue
                whole = f"{node.module}.{name.name}"
                found.add(module_file(whole if (PACKAGE / module_file(whole)).is_file() else node.module))
        elif isinstance(node, ast.Import):
            found |= {module_file(name.name) for name in node.names if name.name.startswith("bitwright.")}
    return found


def test_every_file_is_in_the_reading_order_once() -> None:
    files = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))
    assert sorted(reading_order()) == files


def test_files_import_only_from_those_above() -> None:
    order = reading_order()
    for at, name in enumerate(order):
        below = imports(PACKAGE / name) - set(order[:at])
        assert not below or name == "__init__.py", f"{name} imports {sorted(below)}, which do not stand above it"


def test_files_and_functions_are_small_enough_to_check_by_eye() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= 350, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.lineno < 50, f"{file.name}: {node.name}"


def test_numerics_know_no_models_files_or_logging() -> None:
    pure = ("numerics", "kernels", "methods", "sparsity")
    for name in [name for name in reading_order() if name.split("/")[0] in pure]:
        text = (PACKAGE / name).read_text()
        for word in ("transformers", "torch.nn import", "logging", "print(", "open("):
            assert word not in text, f"{name} mentions {word}"


def test_there_are_no_drawers_for_odds_and_ends() -> None:
    for name in ("utils", "helpers", "common", "base", "misc"):
        assert not list(PACKAGE.rglob(f"{name}*")), name
