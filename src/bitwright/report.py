"""Tables of what was done and what it cost, for a terminal or for Markdown."""

from collections import defaultdict
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitwright.ledger import QUANTIZED, Entry


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table: text to the left, numbers to the right."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, name in enumerate(header):
        numeric = all(row[i][:1].isdigit() or row[i][:1] in ("", "-", "–") for row in rows)
        made.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ledger_table(ledger: Sequence[Entry]) -> Table:
    """One line for each kind of tensor and what was done with it: count, megabytes, mean loss beside RTN's."""
    kinds: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for entry in ledger:
        kind = ".".join(part for part in entry.name.split(".")[-3:-1] if not part.isdigit()) or entry.name
        inputs = f", inputs {entry.activations}" if entry.activations else ""
        kinds[(kind, entry.action, (entry.scheme or entry.reason) + inputs)].append(entry)
    rows = []
    for (kind, action, what), entries in kinds.items():
        size = sum(entry.bytes for entry in entries) / 1e6
        row = [kind, str(len(entries)), action, what, f"{size:.2f}"]
        if action == QUANTIZED:
            row += [_mean([e.loss for e in entries]), _mean([e.loss_rtn for e in entries])]
            row += [str(sum(bool(e.fallback) for e in entries) or "")]
        else:
            row += ["", "", ""]
        rows.append(row)
    header = ("tensors", "count", "done", "scheme or reason", "MB", "mean loss", "RTN's", "fallbacks")
    return table("What happened to every tensor", header, rows)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.5f}" if known else ""
