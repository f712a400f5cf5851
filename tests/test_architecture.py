"""The house stands as docs/architecture.md draws it: packages in one reading order, imports one way, no circles."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "bitwright"
FILES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
FACES = ("__init__.py", "__main__.py")  # the API's names, loaded at first use; the command line


def reading_order() -> list[str]:
    """Packages and single files, as the table lists them."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \|", text[: text.index("\n## ")], re.MULTILINE)
    return [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)]


def package_of(file: str) -> str:
    return file.split("/")[0]


def module_file(module: str) -> str:
    path = Path(*module.split(".")[1:])
    return str(path / "__init__.py") if (PACKAGE / path).is_dir() else f"{path}.py"


def imports(file: Path) -> set[str]:
    """Files of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bitwright":
            for name in node.names:
                if name.name == "_native":  # the extension
                    continue
                whole = f"{node.module}.{name.name}"
                found.add(module_file(whole if (PACKAGE / module_file(whole)).is_file() else node.module))
        elif isinstance(node, ast.Import):
            found |= {module_file(name.name) for name in node.names if name.name.startswith("bitwright.")}
    return found


IMPORTS = {name: imports(file) for name, file in FILES.items()}


def test_every_package_is_in_the_reading_order_once() -> None:
    assert sorted(reading_order()) == sorted({package_of(name) for name in FILES})


def test_packages_import_only_from_those_above() -> None:
    order = reading_order()
    for name, found in IMPORTS.items():
        above = order[: order.index(package_of(name)) + 1]
        below = {other for other in found if package_of(other) not in above}
        assert not below or name in FACES, f"{name} imports {sorted(below)}, which do not stand above it"


def test_files_import_one_another_without_circles() -> None:
    tuple(TopologicalSorter(IMPORTS).static_order())  # CycleError names the circle


def test_a_package_says_what_it_is_for() -> None:
    for name in FILES:
        if name.endswith("/__init__.py"):
            assert len(ast.get_docstring(ast.parse(FILES[name].read_text())) or "") > 60, name


def test_functions_are_small_enough_to_check_by_eye() -> None:
    """Signatures are not counted: a command has a line for each option."""
    for file in FILES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None and node.end_lineno - node.body[0].lineno < 48, (
                    f"{file.name}: {node.name}"
                )


def test_numerics_know_no_models_files_or_logging() -> None:
    pure = ("numerics", "kernels", "methods", "sparsity")
    for name in [name for name in FILES if package_of(name) in pure]:
        text = FILES[name].read_text()
        for word in ("transformers", "torch.nn import", "logging", "print(", "open("):
            assert word not in text, f"{name} mentions {word}"


def test_there_are_no_drawers_for_odds_and_ends() -> None:
    for name in ("utils", "helpers", "common", "base", "misc"):
        assert not list(PACKAGE.rglob(f"{name}*")), name
