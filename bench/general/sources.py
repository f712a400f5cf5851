"""The sources of the text `general`: what each is, who wrote it, under which licence, and how many bytes are taken."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.general import code, dialogues, english, languages
from bench.general import packages as p
from bench.general.documents import Document
from bench.general.packages import Package

Make = Callable[[Path], list[Document]]
CC0, BY_SA_3, BY_SA_4 = "CC0 1.0", "CC BY-SA 3.0", "CC BY-SA 4.0"
OLD = "public domain (its term has run out)"


@dataclass(frozen=True)
class Source:
    """name: as documents give it. parts: by name of language, or "", bytes to take and what makes the documents."""

    name: str
    title: str
    author: str
    licence: str
    package: Package
    parts: dict[str, tuple[int, Make]]


def _one(budget: int, make: Make) -> dict[str, tuple[int, Make]]:
    return {"": (budget, make)}


def _program(name: str, author: str, licence: str, package: Package, *parts: tuple[str, int, str, str]) -> Source:
    """Source code: language, bytes, pattern of paths, paths that are passed over."""
    made = {
        f"{language} {pattern}": (
            budget,
            partial(code.code, package=package, language=language, pattern=pattern, without=without),
        )
        for language, budget, pattern, without in parts
    }
    return Source(name, f"{name} (source code)", author, licence, package, made)


HANDBOOK = {
    "zh-CN": 110, "de-DE": 45, "fr-FR": 50, "es-ES": 45, "ru-RU": 60, "ja-JP": 70, "ar-MA": 50, "pt-BR": 35, "it-IT": 25, "fa-IR": 20,
    "id-ID": 15, "nb-NO": 8, "vi-VN": 8, "pl-PL": 8, "nl-NL": 8, "tr-TR": 8, "cs-CZ": 8, "sv-SE": 8,
}  # fmt: skip
HELP = {
    "C": 100, "de": 22, "es": 22, "fr": 22, "ru": 30, "pt_BR": 18, "ko": 30, "uk": 20, "pl": 15, "zh_CN": 25, "ta": 15, "mr": 12, "gu": 12,
    "el": 12, "ja": 15, "nl": 10, "sv": 10, "hu": 10, "it": 12, "id": 8,
}  # fmt: skip
TESTS = r"tests?/|\.test\.|_test\."

# fmt: off
# ruff: noqa: E501
SOURCES = (
    Source("moby-dick", "Moby-Dick", "Herman Melville", f"{OLD}; the package: {CC0}", p.MOBY_DICK, _one(140_000, english.moby_dick)),
    Source("austen", "Six novels", "Jane Austen", f"{OLD}; the package: MIT, Julia Silge", p.AUSTEN, _one(180_000, english.austen)),
    Source("alice", "Alice's Adventures in Wonderland", "Lewis Carroll", f"{OLD}; the package: MIT", p.WORDCLOUD, _one(60_000, english.alice)),
    Source("shakespeare", "Seven plays", "William Shakespeare", OLD, p.SHAKESPEARE, _one(60_000, english.plays)),
    Source("devils-dictionary", "The Devil's Dictionary", "Ambrose Bierce", OLD, p.DEVIL, _one(40_000, english.devils_dictionary)),
    Source("state-of-the-union", "State of the Union addresses", "Presidents of the United States", f"public domain (works of the United States government); the package: {CC0}", p.SPEECHES, _one(200_000, english.speeches)),
    Source("factbook", "The World Factbook", "Central Intelligence Agency of the United States", "public domain (works of the United States government)", p.FACTBOOK, {
        "prose": (250_000, english.factbook), "json": (40_000, code.facts_as_json), "facts": (75_000, dialogues.facts)}),
    Source("jargon", "The Jargon File 4.4.7", "Eric S. Raymond and others", "public domain", p.JARGON, _one(160_000, english.jargon)),
    Source("debian-handbook", "The Debian Administrator's Handbook", "Raphaël Hertzog, Roland Mas, Freexian SARL, and its translators", BY_SA_3, p.HANDBOOK, {
        "en": (120_000, english.handbook), **{k: (1000 * v, partial(languages.handbook_in, language=k)) for k, v in HANDBOOK.items()}}),
    Source("python-doc", "Python's documentation", "Python Software Foundation", "PSF-2.0", p.PYTHON_DOC, {
        "prose": (180_000, english.python_doc), "faq": (110_000, dialogues.questions_on_python)}),
    Source("rust-books", "The Rust Programming Language, The Rustonomicon, The Embedded Rust Book", "The Rust Project Developers", "MIT or Apache-2.0", p.RUST_DOC, _one(170_000, english.rust_books)),
    Source("sqlite-doc", "SQLite's documentation", "D. Richard Hipp and others", "public domain", p.SQLITE_DOC, _one(140_000, english.sqlite_doc)),
    Source("sympy-doc", "SymPy's documentation", "SymPy Development Team", "BSD-3-Clause, © 2006-2023", p.SYMPY, _one(160_000, english.sympy_doc)),
    Source("readmes", "Read-me files and settings of programs below", "their authors", "MIT, BSD-3-Clause or Apache-2.0, as below", p.ATTRS, {"markdown": (60_000, code.readmes), "settings": (20_000, code.settings)}),
    Source("recipes", "Wikibooks Cookbook, Wikibooks Kochbuch", "contributors to Wikibooks", BY_SA_4, p.RECIPES, _one(200_000, dialogues.recipes)),
    Source("gnome-help", "GNOME Help", "GNOME Documentation Project, Shaun McCance and others, and its translators", BY_SA_3, p.GNOME, {
        **{k: (1000 * v, partial(dialogues.help_pages, language=k)) for k, v in HELP.items()}, "pairs": (70_000, dialogues.translations)}),
    Source("programs", "ChatterBot Language Training Corpus: coding", "Gunther Cox", "BSD-3-Clause, © 2017", p.CHATS, _one(25_000, dialogues.programs)),
    Source("call-to-arms", "呐喊 (Call to Arms)", "鲁迅 (Lu Xun)", f"{OLD}; the package: MIT, © 2012 Andreas Christian Mueller", p.WORDCLOUD, _one(160_000, languages.call_to_arms)),
    Source("chinese-classics", "古文觀止, 论语, 唐詩三百首", "several", f"{OLD}; the package: MIT, © 2016 JackeyGao", p.CHINESE_POETRY, _one(60_000, languages.classics)),
    _program("attrs", "Hynek Schlawack and others", "MIT, © 2015", p.ATTRS, ("python", 40_000, "*/src/attr/*.py", TESTS)),
    _program("flask", "Pallets", "BSD-3-Clause, © 2010", p.FLASK, ("python", 40_000, "*/src/flask/*.py", TESTS), ("html", 8_000, "*/examples/*.html", r"^$"), ("sql", 2_000, "*/examples/*.sql", r"^$")),
    _program("networkx", "NetworkX Developers", "BSD-3-Clause, © 2004-2024", p.NETWORKX, ("python", 60_000, "*/networkx/algorithms/*.py", TESTS)),
    _program("sqlite", "D. Richard Hipp", "public domain", p.BETTER_SQLITE, ("c", 90_000, "package/deps/sqlite3/sqlite3.c", r"^$")),
    _program("better-sqlite3", "Joshua Wise", "MIT, © 2017", p.BETTER_SQLITE, ("javascript", 10_000, "package/lib/*.js", r"^$")),
    _program("json", "Niels Lohmann", "MIT, © 2013-2022", p.JSON_CPP, ("cpp", 60_000, "*/nlohmann/*.hpp", r"^$")),
    _program("express", "TJ Holowaychuk, Roman Shtylman, Douglas Christopher Wilson", "MIT, © 2009-2015", p.EXPRESS, ("javascript", 25_000, "package/lib/*.js", r"^$")),
    _program("preact", "Jason Miller", "MIT, © 2015", p.PREACT, ("javascript", 30_000, "package/*/src/*.js", r"^$")),
    _program("rxjs", "Google, Netflix, Microsoft and others", "Apache-2.0, © 2015-2018", p.RXJS, ("typescript", 45_000, "package/src/internal/*.ts", TESTS)),
    _program("zod", "Colin McDonnell", "MIT, © 2025", p.ZOD, ("typescript", 35_000, "package/src/v4/*.ts", r"locales/")),
    _program("reveal.js", "Hakim El Hattab and others", "MIT, © 2011-2024", p.REVEAL, ("html", 22_000, "package/*.html", r"^$"), ("javascript", 15_000, "package/js/controllers/*.js", r"^$"), ("css", 8_000, "package/css/*.scss", r"^$")),
    _program("bootstrap", "The Bootstrap Authors", "MIT, © 2011-2025", p.BOOTSTRAP, ("css", 20_000, "package/scss/*.scss", r"^$")),
    _program("regex", "The Rust Project Developers", "MIT or Apache-2.0, © 2014-2023", p.REGEX, ("rust", 40_000, "*/src/*.rs", r"unicode")),
    _program("rayon", "Niko Matsakis, Josh Stone", "MIT or Apache-2.0, © 2014-2020", p.RAYON, ("rust", 35_000, "*/src/*.rs", r"^$")),
    _program("cobra", "Steve Francia and others", "Apache-2.0, © 2013-2016", p.COBRA, ("go", 50_000, "*/cobra/*.go", r"^$")),
    _program("react-native-device-info", "Rebecca Hughes", "MIT, © 2015", p.PHONE, ("java", 25_000, "package/android/*.java", r"^$"), ("objective-c", 8_000, "package/ios/*.m", r"^$")),
    _program("thor", "Yehuda Katz", "MIT, © 2008", p.THOR, ("ruby", 30_000, "*/lib/*.rb", r"^$")),
    _program("monolog", "Jordi Boggiano", "MIT, © 2011-2020", p.MONOLOG, ("php", 30_000, "*/Monolog/*.php", r"^$")),
    _program("penlight", "Steve Donovan, David Manura", "MIT, © 2009", p.PENLIGHT, ("lua", 20_000, "*/pl/*.lua", r"^$")),
    _program("bats", "Sam Stephenson and others", "MIT, © 2011-2016", p.BATS, ("shell", 18_000, "*/bats-core/*", r"^$")),
    _program("git-extras", "TJ Holowaychuk and others", "MIT, © 2010-2011", p.GIT_EXTRAS, ("shell", 20_000, "*/bin/git-*", r"^$")),
    _program("pgtap", "David E. Wheeler", "PostgreSQL, © 2008-2015", p.PGTAP, ("sql", 25_000, "*/extension/pgtap--1.2.0.sql", r"^$")),
)
# fmt: on
INTRODUCTION = """# Sources of the calibration text `general`

`general.jsonl.xz` was put together by `bench/make_general_text.py` from the works below: parts of them, with markup, line breaks and
notes of ownership taken out, and otherwise unchanged; the dialogues put questions before recipes, help pages and facts. Parts of works
under a Creative Commons licence stay under that licence: by-sa/3.0 and by-sa/4.0 at https://creativecommons.org/licenses/.

| source | title | by | licence | package |
| --- | --- | --- | --- | --- |
"""


def listed(texts: dict[str, str]) -> str:
    """SOURCES.md. texts: of licences that ask to be passed on, by name."""
    rows = (f"| {s.name} | {s.title} | {s.author} | {s.licence} | {s.package.label} |\n" for s in SOURCES)
    return INTRODUCTION + "".join(rows) + "".join(f"\n## {name}\n\n{text}\n" for name, text in texts.items())
