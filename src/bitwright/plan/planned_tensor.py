"""One tensor of a plan: where it comes from, and what becomes of it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bitwright.errors import CheckpointError, FormatError
from bitwright.formats import Layer
from bitwright.plan.rule import Rule

SMALLEST = 32  # weights in GGUF's smallest blocks
FLOAT_TARGETS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Types of a source that no format here has -> what its numbers are taken as: float8 (without scales) exactly, float64 rounded.
TAKEN_AS = {
    torch.float64: torch.float32, torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16,
}  # fmt: skip
TAKEN_NAMES = {str(a).removeprefix("torch."): str(b).removeprefix("torch.") for a, b in TAKEN_AS.items()}
QUANTIZED, KEPT, LEFT_OUT, ADDED = "quantized", "kept", "left out", "added"  # actions


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and its action.

    source     its name in the source's files; parameter: its name in the model
    block      index of its block; None outside the blocks
    dtype      the type that it is kept in
    reason     why it is kept or left out
    layer      how the format will store it, if it is quantized
    rule       the recipe's rule for it
    """

    source: str
    parameter: str
    block: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: str
    reason: str = ""
    layer: Layer | None = None
    rule: Rule | None = None
    stored_as: str = ""  # how the source has it quantized; "": it is float there
    fallback: str = ""  # why it is in float where it was to be quantized
    made_of: str = ""  # another tensor of the source that it is copied from: an untied head from the embedding

    @property
    def stem(self) -> str:
        """The tensor's name in the files, less ".weight"."""
        return self.source.removesuffix(".weight")


def in_float(t: PlannedTensor, rule: Rule, *, one_file: bool = True) -> PlannedTensor:
    """A tensor that its rule keeps: as it is, or in the float type that the rule names. FormatError for such a type in another
    format than GGUF."""
    if not rule.mix:
        return replace(t, reason=f"recipe: {rule.match}", rule=rule)
    if not one_file:
        remedy = "name OUT.gguf, or scheme = 'keep'"
        raise FormatError(f"{rule.mix.lower()} is a type of GGUF files", where=t.source, remedy=remedy)
    return replace(t, reason=f"in {rule.mix}", rule=rule, dtype=FLOAT_TARGETS[rule.mix])


def half_precision(t: PlannedTensor, K: int) -> PlannedTensor:
    """A matrix of GGUF whose rows of K fill no block: in float16, as llama-quantize has it."""
    asked = t.rule.mix if t.rule is not None and t.rule.mix else "blocks"
    why = f"{asked} -> F16: rows of {K} do not fill blocks of {SMALLEST}"
    return replace(t, dtype=torch.float16, reason="in F16: no block holds its rows", fallback=why)


def already_quantized(found: str, source: Path, requantize: bool | None, *, readable: bool = True) -> CheckpointError:
    """The refusal of a source that is quantized already.

    found: what shows it. requantize: False where it could be asked for, None where there is no such option; readable: whether
    its format can be read here.
    """
    remedy = "quantize the float original, since rounding twice only loses"
    if not readable:
        remedy += ": this format is not read here"
    elif requantize is not None:
        remedy += "; or add --requantize"
    return CheckpointError(f"already quantized: {found}", where=str(source), remedy=remedy)


def taken_notes(dtypes: Iterable[torch.dtype]) -> list[str]:
    """What is said of a source with types of `TAKEN_AS`."""
    found = Counter(str(dtype).removeprefix("torch.") for dtype in dtypes if dtype in TAKEN_AS)
    return [f"{count} tensors of {name} are taken as {TAKEN_NAMES[name]}" for name, count in found.items()]


def said_as_taken(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json, also of a model within it, whose type of the weights is what they are taken as."""
    within = {key: said_as_taken(v) for key, v in config.items() if isinstance(v, dict)}
    said = {key: TAKEN_NAMES.get(str(config[key]), config[key]) for key in ("dtype", "torch_dtype") if key in config}
    return config | within | said


def decoded_note(tensors: Iterable[PlannedTensor]) -> str:
    """What is said of a source that is quantized."""
    stored = [t.stored_as for t in tensors if t.stored_as]
    what = f"the source is quantized itself ({', '.join(sorted(set(stored)))}): {len(stored)} matrices are decoded"
    return f"{what}; losses are counted from there"
