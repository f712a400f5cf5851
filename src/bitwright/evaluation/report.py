"""Tables of ledgers, comparisons and evaluations, for a terminal or for Markdown."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bitwright.evaluation.candidate import Candidate, Original
from bitwright.evaluation.page import pareto, winner
from bitwright.evaluation.verdict import short_name, with_error
from bitwright.pipeline.ledger import Entry
from bitwright.plan.planned_tensor import QUANTIZED

if TYPE_CHECKING:
    from bitwright.evaluation.evaluate import Evaluation


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table, text aligned to the left, numbers to the right."""
    made = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True
    )
    for i, name in enumerate(header):
        numeric = all(row[i][:1].isdigit() or row[i][:1] in ("", "-", "–") for row in rows)
        made.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="ellipsis")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ledger_table(ledger: Sequence[Entry]) -> Table:
    """A row for each kind of tensor and what was done with it: count, megabytes, mean loss beside RTN's."""
    kinds: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in ledger:
        kind = ".".join(part for part in entry.name.split(".")[-3:-1] if not part.isdigit()) or entry.name
        inputs = f", inputs {entry.activations}" if entry.activations else ""
        what = entry.scheme + inputs if entry.action == QUANTIZED else f"{entry.action}: {entry.reason}"
        kinds[(kind, what)].append(entry)
    rows = [
        (
            kind,
            str(len(entries)),
            what,
            f"{sum(e.bytes for e in entries) / 1e6:.2f}",
            _mean([e.loss for e in entries]),
            _mean([e.loss_rtn for e in entries]),
            str(sum(bool(e.fallback) for e in entries) or ""),
        )
        for (kind, what), entries in kinds.items()
    ]
    return table("What happened to every tensor", ("tensors", "count", "scheme", "MB", "loss", "RTN's", "worse"), rows)


def comparison_table(original: Original, candidates: Sequence[Candidate]) -> Table:
    """A row for each method and scheme; the best of each scheme and the Pareto front of size and KL are marked.

    A star: sequential statistics, taken behind the quantized blocks before.
    """
    header = ("scheme", "method", "bits", "perplexity", "KL", "top-1", "seconds", "")
    perplexity = f"{original.perplexity:.2f} ± {original.perplexity_stderr:.2f}"
    rows = [(original.scheme, "original", f"{original.bits_per_weight:.2f}", perplexity, "", "", "", "")]
    best = {winner(candidates, scheme).best for scheme in {c.scheme for c in candidates}}
    unbeaten = pareto(candidates)
    for i, c in enumerate(candidates):
        mark = "best" if i in best else "front" if i in unbeaten else ""
        rows.append(
            (
                c.scheme,
                c.method + (" *" if c.statistics == "sequential" else ""),
                f"{c.bits_per_weight:.2f}",
                f"{c.perplexity:.2f} ± {c.perplexity_stderr:.2f}",
                f"{c.kl_mean:.5f}",
                f"{100 * c.top1:.1f} %",
                f"{c.seconds:.1f}",
                mark,
            )
        )
    return table("KL to the original in nats a token; * statistics block by block", header, rows)


def evaluation_table(found: "Sequence[Evaluation]") -> Table:
    """A row for each text: perplexity, and beside a reference its ratio to that one's, KL's mean and quantiles, top-1."""
    names = [short_name(one.text, 16) for one in found]
    if any(one.kl_mean is None for one in found):
        rows = [
            (name, f"{one.tokens:,}", with_error(one.perplexity, one.perplexity_stderr, 2))
            for name, one in zip(names, found, strict=True)
        ]
        return table("Evaluation", ("text", "tokens", "perplexity"), rows)
    beside = [
        (
            name,
            with_error(one.perplexity, None, 2),
            with_error(one.perplexity_ratio, None, 4),
            with_error(one.kl_mean, None, 5),
            with_error(one.kl_p99, None, 4),
            with_error(one.kl_p999, None, 4),
            f"{100 * (one.top1 or 0):.1f} %",
        )
        for name, one in zip(names, found, strict=True)
    ]
    header = ("text", "perplexity", "ratio", "KL", "99 %", "99.9 %", "top-1")
    return table("Beside the reference: KL's mean and quantiles in nats a token", header, beside)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.5f}" if known else ""
