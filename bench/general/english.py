"""English prose: literature, speeches, encyclopaedias, technical books, mathematics."""

import gzip
import json
import re
import zlib
from functools import cache
from pathlib import Path

from bench.general import packages as p
from bench.general.cleaning import joined, markdown, plain_rst, tidy, unwrapped
from bench.general.documents import LONG, Document, is_clean, texts_of
from bench.general.packages import files, texts


def moby_dick(folder: Path) -> list[Document]:
    chapters = texts(p.MOBY_DICK, folder, "package/data/chapter_*.txt")
    return [d for _, text in chapters for d in texts_of("literature", unwrapped(text), most=LONG)]


def austen(folder: Path) -> list[Document]:
    """R's lazy-loaded data: zlib streams, each with a vector of strings, one a printed line."""
    (_, stored), found = next(files(p.AUSTEN, folder, "*/data/Rdata.rdb")), []
    at = 0
    while at < len(stored):
        stream = zlib.decompressobj()
        raw = stream.decompress(stored[at + 4 :])
        at = len(stored) - len(stream.unused_data)
        found += texts_of("literature", unwrapped("\n".join(_strings(raw))), most=LONG)
    return found


def _strings(raw: bytes) -> list[str]:
    """The strings of a serialized character vector: flags, length, bytes."""
    at, lines = raw.index(b"UTF-8") + 5 + 8, []
    while at + 8 <= len(raw):
        length = int.from_bytes(raw[at + 4 : at + 8], "big")
        lines.append(raw[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return lines


def alice(folder: Path) -> list[Document]:
    ((_, text),) = texts(p.WORDCLOUD, folder, "*/examples/alice.txt")
    story = text.split("THE MILLENNIUM FULCRUM EDITION 3.0", 1)[1].split("End of Project Gutenberg", 1)[0]
    return texts_of("literature", unwrapped(story), most=LONG)


def plays(folder: Path) -> list[Document]:
    """Shakespeare's, the speakers' names as they are printed."""
    names = (
        "hamlet",
        "tempest",
        "macbeth",
        "as_you_like_it",
        "twelfth_night",
        "julius_caesar",
        "much_ado_about_nothing",
    )
    found = []
    for name in names:
        for _, text in files(p.SHAKESPEARE, folder, f"*/texts/{name}_gut.txt"):
            play = text.decode("latin-1").replace("\r\n", "\n")
            start = re.search(r"^ACT I\b", play, re.MULTILINE)
            if start:
                found += texts_of("literature", tidy(play[start.start() :]), most=LONG)
    return found


def devils_dictionary(folder: Path) -> list[Document]:
    ((_, content),) = files(p.DEVIL, folder, "*/devil.dict.dz")
    text = gzip.decompress(content).decode("latin-1")
    return texts_of("literature", unwrapped(text[text.index("ABASEMENT, n.") :]), most=LONG)


def speeches(folder: Path) -> list[Document]:
    """Annual messages to Congress; those without paragraphs get one every five sentences."""
    found = []
    for path, text in texts(p.SPEECHES, folder, "package/data/*.txt"):
        year = int(Path(path).name[:4])
        if year >= 1900 or year % 5 == 0:
            sentences = re.split(r"(?<=[.?!\"]) +(?=[A-Z\"])", text.strip())
            lines = [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
            found += texts_of("speech", "\n\n".join(lines) if text.count("\n") < 8 else unwrapped(text), most=LONG)
    return found


def factbook(folder: Path) -> list[Document]:
    """The paragraphs on each country that are whole sentences."""
    found = []
    for path, text in texts(p.FACTBOOK, folder, "package/*/??.json"):
        if "/meta/" in path:
            continue
        country, lines = json.loads(text), []
        name = country_name(country)
        for topic, entry in _paragraphs(country):
            if len(entry) > 150 and entry.count(". ") >= 1:
                lines += [f"## {topic}", entry.replace(" ++ ", "; ")]
        if name and lines:
            found += texts_of("encyclopaedia", "\n\n".join([f"# {name}", *lines]), most=LONG)
    return [d for d in found if is_clean(d["text"])]


def country_name(country: dict[str, dict[str, dict[str, dict[str, str | None]]]]) -> str | None:
    """The short form of a country's name."""
    name = country.get("Government", {}).get("Country name", {}).get("conventional short form", {}).get("text")
    return name if name and name != "none" and "," not in name and "(" not in name else None


def _paragraphs(entry: object, topic: str = "") -> list[tuple[str, str]]:
    if not isinstance(entry, dict):
        return []
    own = entry.get("text")
    inner = [pair for key, value in entry.items() if key != "text" for pair in _paragraphs(value, key)]
    return [(topic, own), *inner] if isinstance(own, str) else inner


def jargon(folder: Path) -> list[Document]:
    """Entries of the Jargon File and the essays after them."""
    ((_, content),) = files(p.JARGON, folder, "*/jargon.txt.gz")
    text = gzip.decompress(content).decode("utf-8")
    body = re.sub(r"^   ", "", text[text.index("Glossary") :], flags=re.MULTILINE)
    kept = [
        b
        for b in re.split(r"\n\s*\n", body)
        if re.search(r"[.:)!?”]", b) and not re.search(r"[│┌└─]{3}|http|^\s*\[", b)
    ]
    entries = re.sub(r"\{([^{}]+)\}", r"\1", "\n\n".join(unwrapped(b) for b in kept))
    return texts_of("encyclopaedia", tidy(entries))


def handbook(folder: Path) -> list[Document]:
    return [d for page in handbook_pages(folder, "en-US").values() for d in texts_of("technical", joined(page))]


@cache
def handbook_pages(folder: Path, language: str) -> dict[str, list[str]]:
    """The Debian handbook's pages in a language, as blocks."""
    pages = {}
    for path, html in texts(p.HANDBOOK, folder, f"*/html/{language}/*.html"):
        start = re.search(r'<div class="(section|chapter)"', html)
        if start and not re.search(r"licen|acknowledg|preface|foreword|/ix|index\.html", path):
            blocks = markdown(html[start.start() : html.rindex('<ul class="docnav')])
            pages[Path(path).name] = [re.sub(r"^(#+) (?:[A-Z]\.)?[\d.]+ ", r"\1 ", b) for b in blocks]
    return pages


def python_doc(folder: Path) -> list[Document]:
    found = []
    for path, html in texts(
        p.PYTHON_DOC, folder, "*/html/tutorial/*.html", "*/html/howto/*.html", "*/html/reference/*.html"
    ):
        if not path.endswith(("index.html", "clinic.html", "grammar.html")):
            body = html[
                html.index('role="main">') + 12 : html.index('<div class="clearer">', html.index('role="main">'))
            ]
            blocks = [re.sub(r"^(#+) [\d.]+ ", r"\1 ", b).replace("¶", "") for b in markdown(body)]
            found += texts_of("technical", joined(blocks))
    return found


def rust_books(folder: Path) -> list[Document]:
    """The Rust Programming Language, the Embedded Rust Book, the Rustonomicon, the edition guide."""
    found = []
    for _, html in texts(
        p.RUST_DOC, folder, "*/html/book/ch*.html", "*/html/nomicon/*.html", "*/html/embedded-book/*/*.html"
    ):
        if "<main>" in html and "print.html" not in _:
            found += texts_of("technical", joined(markdown(html[html.index("<main>") : html.index("</main>")])))
    return [d for d in found if is_clean(d["text"])]


SQLITE_PAGES = """whentouse appfileformat atomiccommit isolation lockingv3 queryplanner queryplanner-ng optoverview testing
howtocorrupt wal malloc arch partialindex withoutrowid fts5 json1 lang_with windowfunctions datatype3 foreignkeys flextypegood
quirks fasterthanfs intern-v-extern-blob cintro different tempfiles vtab security floatingpoint sharedcache
unlock_notify whyc serverless expridx gencol stricttables rowvalue undoredo aff_short affcase1 backup threadsafe"""


def sqlite_doc(folder: Path) -> list[Document]:
    found = []
    for _, html in texts(p.SQLITE_DOC, folder, *(f"*/sqlite3/{page}.html" for page in SQLITE_PAGES.split())):
        start = re.search(r"<h1|<div class=fancy>|<div class=\"fancy\">", html)
        if start:
            blocks = [re.sub(r"^(#+) [\d.]+\s*", r"\1 ", b) for b in markdown(html[start.start() :])]
            found += texts_of("technical", joined(blocks))
    return [d for d in found if is_clean(d["text"])]


def sympy_doc(folder: Path) -> list[Document]:
    parts = ("tutorials", "explanation", "guides", "modules/polys", "modules/physics")
    patterns = [f"*/doc/src/{part}/*.{ending}" for part in parts for ending in ("rst", "md")]
    found = []
    for path, text in texts(p.SYMPY, folder, *patterns):
        if "deprecat" not in path:
            found += texts_of("mathematics", plain_rst(text))
    return [d for d in found if ".. " not in d["text"] and is_clean(d["text"])]
