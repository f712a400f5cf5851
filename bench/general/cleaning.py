"""Markup turned into text as people write it, and long texts cut where they allow it."""

import re
import unicodedata
from html.parser import HTMLParser

SKIPPED_TAGS = {"script", "style", "nav", "head", "header", "footer", "button", "svg", "form", "table"}
SKIPPED_CLASSES = {
    "docnav",
    "headerlink",
    "toc",
    "indexterm",
    "boring",
    "figure",
    "fancy_toc",
    "caption",
    "versionmodified",
}
VOID = {"br", "img", "hr", "input", "meta", "link", "col", "source", "area", "wbr"}
PARAGRAPHS = {"p", "div", "blockquote", "dt", "dd", "section", "article", "ul", "ol", "dl", "tr"}


def tidy(text: str) -> str:
    """One spelling of characters, no control characters, no blanks at the ends of lines, one blank line at most."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00ad", "")
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Co", "Cs", "Cn"))
    text = text.replace("\ufeff", "").replace("\u200b", "")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def unwrapped(text: str) -> str:
    """Paragraphs whose lines were broken at a width, each on one line; verse and lists (indented lines) stay."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    flowing = (p if re.search(r"^\s", p, re.MULTILINE) else " ".join(p.split("\n")) for p in paragraphs)
    return "\n\n".join(flowing)


def sections(text: str, most: int) -> list[str]:
    """Consecutive parts of at most about so many characters, cut between paragraphs, where a heading follows if it can."""
    parts: list[str] = []
    now: list[str] = []
    size = 0
    for block in _blocks(text):
        heading = block.startswith("#") and size > most // 3
        if now and (size + len(block) > most or heading):
            parts.append("\n\n".join(now))
            now, size = [], 0
        now.append(block)
        size += len(block) + 2
    return [*parts, "\n\n".join(now)] if now else parts


def _blocks(text: str) -> list[str]:
    """Paragraphs; what stands between fences is one."""
    blocks: list[str] = []
    fenced = False
    for paragraph in text.split("\n\n"):
        if fenced:
            blocks[-1] += f"\n\n{paragraph}"
        else:
            blocks.append(paragraph)
        fenced ^= len(re.findall(r"^\s*```", paragraph, re.MULTILINE)) % 2 == 1
    return [block for block in blocks if block.strip()]


class _Markdown(HTMLParser):
    """Blocks of Markdown, one after the other, in `blocks`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.lists: list[int | None] = []  # the last number of each list that is open, or None without numbers
        self._now, self._prefix, self._fence = "", "", 0
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if self._skipped:
            self._skipped += [tag] if tag == self._skipped[0] else []
        elif tag not in VOID and (tag in SKIPPED_TAGS or classes & SKIPPED_CLASSES):
            self._skipped.append(tag)
        elif tag == "pre":
            self._fence += 1
            if self._fence == 1:
                self._flush()
        elif self._fence:
            self._now += "\n" if tag == "br" else ""
        else:
            self._open(tag)

    def _open(self, tag: str) -> None:
        if tag in PARAGRAPHS or tag == "li" or re.fullmatch("h[1-6]", tag):
            self._flush()
        if tag in ("ul", "ol"):
            self.lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            number = self.lists[-1] if self.lists else None
            self._prefix = "- " if number is None else f"{number + 1}. "
            if number is not None:
                self.lists[-1] = number + 1
        elif re.fullmatch("h[1-6]", tag):
            self._prefix = "#" * int(tag[1]) + " "
        elif tag in ("code", "tt"):
            self._now += "`"
        elif tag == "br":
            self._now += " "

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            if tag == self._skipped[0]:
                self._skipped.pop()
        elif tag == "pre":
            self._fence -= 1
            if self._fence == 0:
                self._close_fence()
        elif self._fence:
            return
        elif tag in PARAGRAPHS or tag == "li" or re.fullmatch("h[1-6]", tag):
            self._flush()
            if tag in ("ul", "ol") and self.lists:
                self.lists.pop()
        elif tag in ("code", "tt"):
            self._now += "`"

    def _close_fence(self) -> None:
        code, self._now = self._now.strip("\n"), ""
        if code.strip():
            self.blocks.append(f"```\n{code}\n```")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._now += data

    def _flush(self) -> None:
        text = re.sub(r"\s+", " ", self._now).strip()
        if text:
            self.blocks.append(self._prefix + text)
            self._prefix = ""
        self._now = ""


def markdown(html: str) -> list[str]:
    """The blocks of a page: headings, paragraphs, list items, code between fences."""
    parser = _Markdown()
    parser.feed(html)
    parser.close()
    parser._flush()
    return [block.replace("``", "") if not block.startswith("```") else block for block in parser.blocks]


def joined(blocks: list[str]) -> str:
    """Blocks as one text: items of a list on consecutive lines, a blank line between others."""
    text = ""
    for before, block in zip(["", *blocks], blocks, strict=False):
        item = re.compile(r"(- |\d+\. )")
        text += ("\n" if item.match(before) and item.match(block) else "\n\n") + block
    return tidy(text)


ROLE = re.compile(r"(?::[\w.+-]+)*:`~?!?\.?([^`]+?)(?: ?<[^`>]+>)?`")
MYST = re.compile(r"\{[\w:.+-]+\}`~?!?\.?([^`]+?)(?: ?<[^`>]+>)?`")
DIRECTIVE = re.compile(r"^\.\. (?!math|note|warning|code|tip)[^\n]*(?:\n(?:[ \t]+[^\n]*|(?=\n)))*", re.MULTILINE)


def plain_rst(text: str) -> str:
    """reStructuredText (or MyST) with plain words for roles, $…$ for formulas, # before headings, no labels or indexes."""
    text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
    text = re.sub(r"^([^\n]+)\n([=\-~^\"*#+])\2{2,}[ \t]*$", _heading, text, flags=re.MULTILINE)
    text = re.sub(r"^([=\-~^\"*#+])\1{2,}[ \t]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. math::[ \t]*\n+((?:[ \t]+[^\n]*\n|[ \t]*\n)+)", _formula, text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. code(?:-block)?:: *\w*[ \t]*$", "::", text, flags=re.MULTILINE)
    text = re.sub(r"^\.\. (note|warning|tip)::[ \t]*", lambda m: f"{m[1].capitalize()}: ", text, flags=re.MULTILINE)
    text = re.sub(r"^\(?[\w-]+\)=$|^```\{[\w-]+\}.*?^```$|^:::.*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = MYST.sub(r"`\1`", ROLE.sub(r"`\1`", DIRECTIVE.sub("", text)))
    text = re.sub(r"`([^`<\n]+?)\s*<[^>`]+>`_+", r"\1", text)
    return tidy(re.sub(r"\s?\[[^\]\s]+\]_", "", text.replace("``", "`")))


def _heading(found: re.Match[str]) -> str:
    return found[0] if found[1].startswith((" ", "..")) else f"{'#' if found[2] in '=*' else '##'} {found[1].strip()}"


def _formula(found: re.Match[str]) -> str:
    lines = [line.strip() for line in found[1].splitlines() if line.strip() and not line.strip().startswith(":")]
    return "$$\n" + "\n".join(lines) + "\n$$\n\n"


def without_header(code: str) -> str:
    """Source code without the comment that says whose it is and who may use it."""
    start = re.match(r"(#!.*\n|<\?php\s*\n(?:declare\(.*\n)?)?\s*", code)
    assert start is not None
    rest = code[start.end() :]
    block = re.match(r"/\*.*?\*/|<!--.*?-->|--\[\[.*?\]\]", rest, re.DOTALL)
    comment = block or re.match(r"(?:[ \t]*(?://|#|--|;).*\n)+", rest)
    if comment and re.search(r"copyright|licen[cs]e|spdx|author", comment[0], re.IGNORECASE):
        rest = rest[comment.end() :]
    return tidy(start[0].strip() + "\n" + rest)


def code_pieces(code: str, most: int) -> list[str]:
    """A file whole, or cut where a line that is not indented follows a blank one; else at a blank line, or any."""
    pieces: list[str] = []
    for part in [p for whole in re.split(r"\n\n(?=\S)", code) for p in _halves(whole, most)]:
        if pieces and len(pieces[-1]) + len(part) + 2 <= most:
            pieces[-1] += f"\n\n{part}"
        else:
            pieces.append(part)
    return pieces


def _halves(code: str, most: int) -> list[str]:
    """Code that is too long, cut near its middle until it is not."""
    if len(code) <= most:
        return [code]
    middle = len(code) // 2
    at = next((at for mark in ("\n\n", "\n") if (at := code.rfind(mark, middle // 2, middle)) > 0), middle)
    return [*_halves(code[:at], most), *_halves(code[at:].lstrip("\n"), most)]
