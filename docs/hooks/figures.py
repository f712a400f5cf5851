"""mkdocs hook: put the figures of docs/figures into the pages themselves, so that they take the colours of the page.

Markdown says ![what it shows](../figures/NAME.svg), which any viewer of the repository shows as well.
"""

import re
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[1] / "figures"
IMAGE = re.compile(r'<p>\s*<img alt="([^"]*)" src="[^"]*figures/([a-z-]+)\.svg"\s*/?>\s*</p>')


def on_page_content(html: str, **_: Any) -> str:
    """A page's HTML with the SVG files that it shows in place of the references to them."""
    return IMAGE.sub(lambda found: _figure(found[1], found[2]), html)


def _figure(caption: str, name: str) -> str:
    svg = (FIGURES / f"{name}.svg").read_text(encoding="utf-8").strip()
    return f'<figure class="drawn">{svg}<figcaption>{caption}</figcaption></figure>'
