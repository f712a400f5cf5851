"""The summary at the end of `quantize`: about ten lines on size, worst losses, fallbacks, and what to do next."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean as mean

from bitwright.cli.console import duration, size
from bitwright.pipeline.ledger import Entry, judged, largest
from bitwright.pipeline.result import Result
from bitwright.plan.planned_tensor import QUANTIZED

WORST = 3  # blocks or matrices that are named


def summary(done: Result, model: Path) -> list[str]:
    """The lines of the summary. Errors are relative energies, beside those of a plainer method."""
    matrices = [entry for entry in done.ledger if entry.action == QUANTIZED]
    return [
        f"{done.out}: {size(done.bytes)}, {done.bits_per_weight:.2f} bits a weight, "
        f"in {duration(done.seconds)} and {size(done.peak_rss_bytes)} of memory",
        f"quantized: {len(matrices)} of {len(done.ledger)} tensors, {_schemes(matrices)}",
        *_pruned(matrices),
        *_losses(matrices),
        *replaced(done),
        *_experts(matrices),
        f"judge it: bitwright eval {done.out} --reference {model} --text FILE",
        f"try it:   bitwright generate {done.out} --prompt TEXT",
    ]


def _schemes(matrices: list[Entry]) -> str:
    """The most frequent schemes, and the methods."""
    schemes, methods = Counter(entry.scheme for entry in matrices), Counter(entry.method for entry in matrices)
    shown = ", ".join(f"{count} {name}" for name, count in schemes.most_common(4))
    more = f" and {len(schemes) - 4} other schemes" if len(schemes) > 4 else ""
    return f"{shown}{more}; by {', '.join(name for name, _ in methods.most_common(3))}"


def _pruned(matrices: list[Entry]) -> Iterator[str]:
    """How many weights were set to zero, by which methods."""
    pruned = [entry for entry in matrices if entry.pruning]
    if pruned:
        share = mean(entry.sparsity for entry in pruned)
        how = ", ".join(sorted({entry.pruning for entry in pruned}))
        yield f"pruned: {share:.0%} of the weights of {len(pruned)} matrices, by {how}; losses count from before that"


def _losses(matrices: list[Entry]) -> Iterator[str]:
    """Errors of the blocks' outputs, where measured on held-out windows, else losses of matrices: the mean, and the largest."""
    known, of_blocks = judged(matrices)
    if not known:
        return
    what, beside = (
        ("error of block outputs on held-out windows", "search") if of_blocks else ("loss of a matrix", "RTN")
    )
    yield f"{what}: {mean(k.error for k in known):.4f} ({beside} {mean(k.plainer for k in known):.4f}); largest:"
    for k in largest(known, WORST):
        yield f"  {k.error:.4f} ({beside} {k.plainer:.4f})  {k.name.removesuffix('.weight')}"


def _experts(matrices: list[Entry]) -> Iterator[str]:
    """How many experts were judged by other tokens than their own alone."""
    few = [entry for entry in matrices if entry.borrowed]
    none = sum(not entry.tokens for entry in few)
    if few:
        yield (
            f"experts: {len(few)} matrices saw few tokens ({min(entry.tokens for entry in few)} at least, {none} none): "
            "they are judged by all tokens of their layer too; more --samples would help"
        )


def replaced(done: Result) -> Iterator[str]:
    """The tensors that were quantized worse than asked, in a line."""
    worse = [entry for entry in done.ledger if entry.fallback]
    if len(worse) == 1:
        yield f"worse than asked: {worse[0].name}: {worse[0].fallback}"
    elif worse:
        yield f"worse than asked: {len(worse)} tensors, such as {worse[0].name}: {worse[0].fallback}"
    else:
        yield "worse than asked: nothing"
