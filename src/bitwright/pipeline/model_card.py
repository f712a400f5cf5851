"""The model card, README.md of a result: what was done to the model, how good it is, how to use it.

Nothing in it depends on the machine or the day, so the same work gives the same bytes. KL is not known yet: the card says how
to measure it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

from bitwright.calibration.text_mix import texts_of
from bitwright.calibration.windows import Drawn
from bitwright.gguf.imatrix import is_imatrix
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.ledger import Entry, judged, largest
from bitwright.plan.planned_tensor import KEPT, LEFT_OUT, QUANTIZED
from bitwright.plan.tensor_actions import not_served

# OWNER/NAME on the hub; anything else is a path on somebody's machine.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WORST, REPLACED = 3, 10  # most matrices that are named
NEEDED = {  # beside transformers, to load a format
    "compressed-tensors": "compressed-tensors", "gptq": "gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes",
}  # fmt: skip


@dataclass(frozen=True)
class Card:
    """The content of a model card; `str` gives its text.

    config       config.json of the model
    predicts     whether the model predicts tokens; else it is an encoder
    method       what was asked for, such as awq+gptq; "": unknown
    calibration  see the function `calibration`; "": unknown
    loader       the class of transformers that loads it; "": the usual one
    """

    config: Mapping[str, Any]
    format: str
    bits_per_weight: float
    ledger: list[Entry]
    predicts: bool
    method: str = ""
    calibration: str = ""
    loader: str = ""

    def __str__(self) -> str:
        parts = (
            _front_matter(self),
            _title(self),
            _table(self),
            _losses(self),
            _replaced(self),
            _use(self),
            _judge(self),
        )
        return "\n\n".join(part for part in parts if part) + "\n"

    @property
    def base(self) -> str | None:
        """The original model's name on the hub, if config.json has it."""
        name = self.config.get("_name_or_path")
        return name if isinstance(name, str) and HUB_NAME.fullmatch(name) else None

    @property
    def quantized(self) -> list[Entry]:
        """Entries of the quantized matrices."""
        return [entry for entry in self.ledger if entry.action == QUANTIZED]


def calibration(calib: str, tokens: Drawn | None) -> str:
    """What was calibrated on, in words: texts by name, with windows and their length; an importance matrix; or nothing."""
    if tokens is None:
        return f"importance matrix {Path(calib).name}" if is_imatrix(calib) else "none"
    texts = texts_of(calib)
    names = [Path(text.name).name + (f" ({text.share:.0%})" if len(texts) > 1 else "") for text in texts]
    windows, length = tokens.seen.shape
    return f"{', '.join(names)}: {windows:,} windows of {length:,} tokens"


def _front_matter(card: Card) -> str:
    base = [] if card.base is None else [f"base_model: {card.base}"]
    return "\n".join(["---", *base, "library_name: transformers", "tags:", "- quantized", "- bitwright", "---"])


def _title(card: Card) -> str:
    name = card.base or card.config.get("model_type", "model")
    return f"# {name}, quantized\n\nMade with bitwright. `ledger.jsonl` has a line for every tensor."


def _table(card: Card) -> str:
    counts = Counter(entry.action for entry in card.ledger)
    said = [(QUANTIZED, "quantized"), (KEPT, "kept in float"), (LEFT_OUT, "left out")]
    rows = {
        "scheme": _counted(entry.scheme for entry in card.quantized),
        "inputs": _counted(entry.activations for entry in card.quantized if entry.activations),
        "format": card.format,
        "bits per weight": f"{card.bits_per_weight:.2f}, with scales and all that is kept",
        "method": card.method,
        "calibration": card.calibration,
        "tensors": ", ".join(f"{counts[action]} {what}" for action, what in said if counts[action]),
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)])


def _counted(values: Iterable[str]) -> str:
    """The only value, or each with its count, the most frequent first."""
    counts = sorted(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} ({count})" for value, count in counts)


def _losses(card: Card) -> str:
    """The largest errors: of blocks, where measured on held-out windows, else of matrices."""
    known, of_blocks = judged(card.quantized)
    if not known:
        return ""
    part, plainer, what = "block", "by a search of scales", "a block's output, on windows that no method saw"
    if not of_blocks:
        part, plainer = "matrix", "rounded to nearest"
        what = "a matrix" if card.calibration == "none" else "a matrix's output"
    average = mean(k.error for k in known)
    said = f"The energy of the error in {what}, relative to its own; the mean over all is {average:.3g}."
    head = [f"| {part} | error | {plainer} |", "| --- | --- | --- |"]
    rows = [f"| {k.name} | {k.error:.3g} | {k.plainer:.3g} |" for k in largest(known, WORST)]
    return "\n".join(["## Largest errors", "", said, "", *head, *rows])


def _replaced(card: Card) -> str:
    """What was quantized otherwise than asked (fallbacks)."""
    found = [f"- {entry.name}: {entry.fallback}" for entry in card.ledger if entry.fallback]
    if not found:
        return ""
    more = [f"- and {len(found) - REPLACED} more: see `ledger.jsonl`"] if len(found) > REPLACED else []
    head = f"{len(found)} of {len(card.quantized)} matrices were not quantized as asked:"
    return "\n".join(["## Replaced", "", head, "", *found[:REPLACED], *more])


def _use(card: Card) -> str:
    """How to load it in each engine that can."""
    kind = card.loader or ("AutoModelForCausalLM" if card.predicts else "AutoModel")
    load = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("OUT")'
    if card.format == "bitwright":
        load = 'import bitwright\n\nmodel = bitwright.load("OUT")  # a model of transformers'
    needed = NEEDED.get(card.format, "bitwright")
    lines = ["## Use", "", f"OUT is this directory. Python, with `{needed}` installed:", "", "```python", load, "```"]
    if card.predicts:
        served = not not_served(card.format, (Scheme.parse(entry.scheme) for entry in card.quantized))
        commands = [*(["vllm serve OUT"] if served else []), 'bitwright generate OUT --prompt "Once upon a time"']
        lines += ["", "The command line:", "", "```", *commands, "```"]
    return "\n".join(lines)


def _judge(card: Card) -> str:
    """How to measure KL and perplexity; nothing for an encoder, which predicts no tokens."""
    if not card.predicts:
        return ""
    command = f"bitwright eval OUT --reference {'MODEL' if card.base is None else card.base}"
    original = "MODEL is the original. " if card.base is None else ""
    said = f"{original}This measures the KL divergence from the original, top-1 agreement and perplexity."
    return "\n".join(["## Measure", "", "```", command, "```", "", said])
