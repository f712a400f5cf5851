"""Pages in a real browser, where one is installed: headless Chromium, driven by its command line alone."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
LISTEN = """<script>
const troubles = []
const complain = console.error
console.error = (...said) => { troubles.push(said.join(" ")); complain(...said) }
addEventListener("error", (event) => troubles.push(event.message))
addEventListener("unhandledrejection", (event) => troubles.push(String(event.reason)))
addEventListener("securitypolicyviolation", (event) => troubles.push(event.violatedDirective + " " + event.blockedURI))
</script>"""
REPORT = """<script>
addEventListener("load", () => {
  const report = document.createElement("pre")
  report.id = "report"
  let found = null
  try { found = (() => { %s })() } catch (error) { troubles.push(String(error)) }
  report.textContent = JSON.stringify({ troubles, found })
  document.body.append(report)
})
</script>"""


def browser() -> str:
    """The browser's path. Without one the test is skipped, or failed where BITWRIGHT_REQUIRE_CHROMIUM is 1."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    if os.environ.get("BITWRIGHT_REQUIRE_CHROMIUM") == "1":
        pytest.fail("BITWRIGHT_REQUIRE_CHROMIUM is 1 and no chromium is in PATH")
    pytest.skip("no chromium is in PATH")


def probe(page: str, script: str, folder: Path, *, width: int = 800, dark: bool = False) -> dict[str, Any]:
    """Open a page, run the body of a function in it: {troubles: whatever went wrong, found: what it returned}."""
    path = browser()
    file = folder / "page.html"
    file.write_text(
        page.replace("<head>", "<head>" + LISTEN, 1).replace("</body>", REPORT % script + "</body>"), "utf-8"
    )
    looks = [f"--window-size={width},600", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [path, *OPTIONS, *looks, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, encoding="utf-8")
    report = re.search(r'<pre id="report">(.*?)</pre>', done.stdout, re.DOTALL)
    assert report, f"the page did not report:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(html.unescape(report[1]))
    return found
