"""Source code in many languages, and the small markup around it."""

import json
import re
from html import unescape
from pathlib import Path

from bench.general import packages as p
from bench.general.cleaning import code_pieces, tidy, without_header
from bench.general.documents import MIDDLE, Document, texts_of
from bench.general.english import country_name
from bench.general.packages import Package, texts


def code(folder: Path, package: Package, language: str, pattern: str, without: str) -> list[Document]:
    """Files of a package as documents, without what their headers say of owners; those that go on about it are left out."""
    found = []
    for path, text in texts(package, folder, pattern):
        if re.search(without, path):
            continue
        for piece in code_pieces(without_header(text), MIDDLE):
            longest = max(map(len, piece.splitlines()), default=0)
            if (
                len(piece) >= 400
                and longest < 300
                and not re.search(r"copyright|spdx|licensed under", piece, re.IGNORECASE)
            ):
                found.append({"kind": "code", "language": language, "text": piece})
    return found


def readmes(folder: Path) -> list[Document]:
    """Markdown as it stands in packages."""
    found = []
    for package, pattern in (
        (p.EXPRESS, "package/Readme.md"),
        (p.ZOD, "package/README.md"),
        (p.RXJS, "package/README.md"),
        (p.MARKED, "package/README.md"),
        (p.PREACT, "package/README.md"),
        (p.REVEAL, "package/README.md"),
        (p.PHONE, "package/README.md"),
        (p.ATTRS, "*/docs/*.md"),
        (p.ATTRS, "*/.github/CONTRIBUTING.md"),
        (p.BETTER_SQLITE, "package/README.md"),
    ):
        for _, text in texts(package, folder, pattern):
            lines = [
                line for line in unescape(tidy(text)).splitlines() if not re.search(r"<|!\[|^\[[^]]+\]:|:::", line)
            ]
            found += texts_of("markup", tidy("\n".join(lines)))
    return [d for d in found if not re.search(r"copyright|licensed under|\{\w+\}`", d["text"], re.IGNORECASE)]


def facts_as_json(folder: Path) -> list[Document]:
    """What the World Factbook says of countries, one topic each."""
    found = []
    for path, text in texts(p.FACTBOOK, folder, "package/*/??.json"):
        country = json.loads(text)
        name = country_name(country)
        for topic in ("People and Society", "Geography", "Economy", "Energy", "Transportation", "Communications"):
            if "/meta/" not in path and name and topic in country:
                entry = json.dumps({"country": name, topic: country[topic]}, indent=2, ensure_ascii=False)
                found += [{"kind": "markup", "language": "json", "text": entry}] * (400 < len(entry) < MIDDLE)
    return found


def settings(folder: Path) -> list[Document]:
    """Workflows and settings in YAML and TOML."""
    found = []
    for package in (p.ATTRS, p.FLASK, p.NETWORKX, p.SYMPY):
        for path, text in texts(
            package, folder, "*/pyproject.toml", "*/.github/workflows/*.yml", "*/.pre-commit-config.yaml"
        ):
            language = "toml" if path.endswith("toml") else "yaml"
            parts = [part for part in code_pieces(tidy(text), MIDDLE) if len(part) > 400]
            found += [{"kind": "markup", "language": language, "text": part} for part in parts]
    return found
