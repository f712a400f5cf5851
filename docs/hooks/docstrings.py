"""griffe extension: docstrings of bitwright as Markdown, for the API page.

In a docstring, a name at the start of a line and two spaces (or a colon) open the description of an argument or a field, and
`>>>` an example. Markdown would run the first together and take the second for a quotation.
"""

import re
from typing import Any

import griffe

ENTRY = re.compile(r"^(\w+(?:, \w+)*(?: \[[^\]]*\])*)(?:\s{2,}|: )(?=\S)(.*)$")


class Layout(griffe.Extension):  # type: ignore[misc]
    """Rewrites every docstring as it is loaded."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """obj: a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring with lists for its entries and fences around its examples."""
    first, *others = docstring.split("\n\n")
    return "\n\n".join([first, *(_paragraph(p) for p in others)])


def _paragraph(text: str) -> str:
    if text.startswith(">>>"):
        return f"```pycon\n{text}\n```"
    if text.startswith("    "):
        return f"```text\n{text}\n```"
    lines, found = text.split("\n"), list[str]()
    listed = False
    for line in lines:
        entry = ENTRY.match(line)
        if entry:
            if found and not listed:
                found.append("")  # a list stands apart from what introduces it
            found.append(f"- `{entry[1]}` — {entry[2]}")
            listed = True
        elif listed and line.startswith("  "):
            found.append(f"    {line.strip()}")
        else:
            if listed:
                found.append("")
            found.append(line)
            listed = False
    return "\n".join(found)
