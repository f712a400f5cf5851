"""The texts of licences that ask to be passed on with what they cover, taken from packages that are under them."""

import re
from pathlib import Path

from bench.general import packages as p
from bench.general.cleaning import tidy
from bench.general.packages import Package, texts

HOLDERS = "The holders of the copyright are named in the table above."


def _between(folder: Path, package: Package, pattern: str, start: str, end: str) -> str:
    """Part of a file in a package, lines unindented."""
    _, text = next(texts(package, folder, pattern))
    found = re.search(f"{start}.*?{end}", text, re.DOTALL)
    assert found is not None, package.label
    return tidy(re.sub(r"^[ .]+", "", found[0], flags=re.MULTILINE))


def licences(folder: Path) -> dict[str, str]:
    """Text by the licence's name."""
    shared = {
        "MIT": (p.EXPRESS, "package/LICENSE", "Permission is hereby", r"OR OTHER DEALINGS IN THE SOFTWARE\."),
        "BSD-3-Clause": (p.SYMPY, "*/LICENSE", "Redistribution and use", r"OF\s+SUCH\s+DAMAGE\."),
        "PostgreSQL": (p.PGTAP, "*/copyright", "Permission to use", r"MODIFICATIONS\."),
    }
    start = r"1\. This LICENSE AGREEMENT is between the Python Software Foundation"
    python = _between(folder, p.PYTHON_DOC, "*/copyright", start, r"conditions of this License\s+Agreement\.")
    found = {name: f"{HOLDERS}\n\n{_between(folder, *where)}" for name, where in shared.items()}
    return {**found, "PSF-2.0": python, "Apache-2.0": "As the file LICENSE of this package."}
