"""Plan the quantization of a float GGUF file tensor by tensor, by names and shapes alone; no model is built or run.

For files of unknown architectures: nothing is known of inputs but what an importance matrix says, and methods that need more
are replaced by a search of scales, on record. And for all files where what is asked for needs no model. Keys are copied,
and rows keep their order. Which tensors stay in float is llama.cpp's published list (llama-quant.cpp,
`tensor_allows_quantization`).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import FormatError, RecipeError
from bitwright.files.checkpoint import Spec, spec_bytes
from bitwright.formats import FORMATS, Layer, gguf_writer
from bitwright.formats.ggml import TYPES
from bitwright.gguf import imatrix
from bitwright.gguf.architectures import EXPERT_COUNT, check_is_model, named
from bitwright.gguf.block_types import FLOATS, Kind, type_named
from bitwright.gguf.expert_counts import check_experts
from bitwright.gguf.file_types import MIXES, Place, part_of, type_in
from bitwright.gguf.reader import GgufFile, carried_keys
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED
from bitwright.plan.planned_tensor import (
    KEPT,
    QUANTIZED,
    SMALLEST,
    PlannedTensor,
    already_quantized,
    decoded_note,
    half_precision,
    in_float,
)
from bitwright.plan.recipe import Recipe
from bitwright.plan.rule import Rule

GGUF = FORMATS["gguf"]
KEPT_PARTS = (
    "_norm", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj", "position_embd", "token_types",
    "ssm_conv1d", "shortconv.conv", "indexer.", "time_mix_first", "time_mix_w", "time_mix_v", "time_mix_a", "time_mix_g",
    "time_mix_decay", "time_mix_lerp", "attn_rel_b", "pos_embd", "sam.neck",
)  # fmt: skip


@dataclass(frozen=True)
class GgufPlan:
    """A plan for a GGUF file: everything known before the first weight is read. See `preflight.Plan`."""

    source: Path
    file: GgufFile
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]
    unknown: bool  # whether the architecture is

    def importance(self, file: Path) -> dict[str, Tensor]:
        """The importance of each tensor's columns [K], by name, from an importance matrix. CalibrationError for a damaged file
        and, where the architecture is known, for one of another model."""
        found = imatrix.read(file)
        for t in self.tensors:
            known = found.get(t.source)
            if self.unknown or t.layer is None or (known is None and t.block is None):
                continue  # llama.cpp too uses it for the blocks' tensors only
            experts = t.shape[0] if len(t.shape) > 2 else 1
            if known is None and experts > 1:
                found[t.source] = torch.zeros(experts, t.layer.K)
                continue
            if known is None or known.numel() not in (t.layer.K, experts * t.layer.K):
                raise imatrix.of_another_model(file, t.source, known, t.layer.K)
        return found

    @property
    def shards(self) -> list[list[PlannedTensor]]:
        """Tensors that are written together: those of each block, and those outside the blocks."""
        blocks = sorted({t.block for t in self.tensors if t.block is not None})
        return [[t for t in self.tensors if t.block == block] for block in [*blocks, None]]

    def specs(self, members: list[PlannedTensor]) -> dict[str, Spec]:
        """Names, types and shapes of some tensors in a shard."""
        found: dict[str, Spec] = {}
        for t in members:
            own = {"": (t.dtype, t.shape)} if t.layer is None else GGUF.layout(t.layer, t.dtype)
            found |= {f"{t.stem}.{suffix}" if suffix else t.source: spec for suffix, spec in own.items()}
        return found

    @property
    def bytes(self) -> int:
        """Exact size of the file."""
        stored = [(t.source, len(t.shape), spec_bytes(self.specs([t]))) for t in self.tensors]
        return gguf_writer.file_bytes(self.keys, stored)

    @property
    def described(self) -> list[tuple[str, Kind, Tensor]]:
        """The file's tensors in order: name, types, and a tensor of that shape without data."""
        found = []
        for t in sorted(self.tensors, key=lambda t: gguf_writer.place(t.source)):
            dtype, shape = next(iter(self.specs([t]).values()))
            kind = gguf_writer.FLOAT_TYPES[dtype] if t.layer is None else type_named(t.layer.container)
            whole = torch.empty(shape, dtype=dtype, device="meta")
            found.append((t.source, kind, whole if t.layer is None else whole.view(*t.shape[:-1], -1)))
        return found

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The file's keys (metadata)."""
        return carried_keys(self.file, self.recipe.file_type)

    @property
    def parameters(self) -> int:
        """Parameters of the source."""
        return sum(prod(t.shape) for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        counts = {action: sum(t.action == action for t in self.tensors) for action in (QUANTIZED, KEPT)}
        schemes = sorted({str(t.layer.scheme) for t in self.tensors if t.layer})
        weights = spec_bytes(self.specs(list(self.tensors)))
        return {
            "model": str(self.source),
            "format": GGUF.name,
            "schemes": schemes,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": round(8 * weights / self.parameters, 4),
            **counts,
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """The plan in a line, and its notes."""
        first = f"{self.parameters:,} parameters to {GGUF.name}: {self.bytes:,} bytes"
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])


def plan_gguf(
    file: GgufFile, recipe: Recipe, format_name: str, *, weighted: bool, unknown: bool, requantize: bool | None
) -> GgufPlan:
    """Plan every tensor of a file. weighted: whether there will be an importance matrix; unknown: whether the architecture is;
    requantize: as of `preflight`.

    CheckpointError for a file that is no model, or whose keys and tensors differ, FormatError for another output format,
    RecipeError for what needs a model or for nothing to quantize.
    """
    source = file.path
    check_is_model(file.keys, file.tensors, str(source))
    file.check_vocabulary()
    architecture = file.key("general.architecture", str)
    if named(architecture) or f"{architecture}.{EXPERT_COUNT}" in file.keys:  # others may count by another key
        check_experts(file.keys, {name: t.shape for name, t in file.tensors.items()}, str(source))
    if format_name != GGUF.name:
        remedy = "name OUT.gguf"
        message = f"architecture {architecture!r} is not known here: it can stay GGUF, and become nothing else"
        raise FormatError(message, where=str(source), remedy=remedy)
    chooser = _Chooser(file, recipe.without_text(weighted=weighted), weighted=weighted, requantize=requantize)
    tensors = tuple(chooser.decide(name) for name in file.tensors)
    if (
        recipe.kv_cache is not None
        or recipe.temper is not None
        or any(rule.transforms or rule.prune for rule in recipe.active)
    ):
        message = f"transforms, pruning, caches and temper need a model that is run: architecture {architecture!r} is not known"
        raise RecipeError(message, where=str(source), remedy="leave them out")
    if not any(t.layer or (t.rule and t.rule.mix) for t in tensors):
        raise RecipeError("there is nothing to quantize", where=str(source), remedy="a file with matrices, and a rule")
    note = (
        f"architecture {architecture!r} is not known here, so none of it can be run: each matrix is rounded by itself"
    )
    known = "with the columns' importance" if weighted else "without importance"
    notes = [f"{note}, {known}"] if unknown else []
    notes += [decoded_note(tensors)] if any(t.stored_as for t in tensors) else []
    return GgufPlan(source, file, recipe, tensors, (*notes, *chooser.said), unknown)


class _Chooser:
    """Chooses the action for each tensor of a file."""

    def __init__(self, file: GgufFile, recipe: Recipe, *, weighted: bool, requantize: bool | None) -> None:
        self.file, self.recipe, self.weighted, self.requantize = file, recipe, weighted, requantize
        self.others: dict[str, list[str]] = {"another block type": [], "another method": []}
        self.rules = recipe.assign({name.removesuffix(".weight"): name for name in file.tensors if self._may(name)})

    def _may(self, name: str) -> bool:
        """Whether llama.cpp reads a quantized tensor of that name."""
        matrix = len(self.file.tensors[name].shape) in (2, 3) and name.endswith(".weight")
        return matrix and not any(part in name for part in KEPT_PARTS)

    def decide(self, name: str) -> PlannedTensor:
        """Quantize a matrix as its rule says; keep all other tensors as they are."""
        stored = self.file.tensors[name]
        parts = name.split(".")
        block = int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else None
        stored_as = "" if stored.type in FLOATS else stored.type.name.lower()
        if stored_as and not self.requantize:
            raise already_quantized(f"{name!r} is {stored.type.name}", self.file.path, self.requantize)
        dtype = FLOATS.get(stored.type, torch.float32)
        t = PlannedTensor(name, name, block, dtype, stored.shape, KEPT, stored_as=stored_as)
        if not self._may(name):
            return replace(t, reason="llama.cpp keeps it in float")
        rule = self.rules[t.stem]
        if rule.scheme is None:
            return in_float(t, rule)
        if t.shape[-1] % SMALLEST:
            return self._told(half_precision(replace(t, rule=rule), t.shape[-1]), "another block type")
        method, lost = rule.method, ""
        if method in (*CALIBRATED, *ASYMMETRIC, *BLOCKWISE):
            method, lost = "search", f"{method} -> search: inputs are not known"
        options = rule.options if not lost else {} if self.weighted else {"objective": "mse"}
        layer = self._layer(t, rule, block)
        done = replace(t, action=QUANTIZED, layer=layer, rule=replace(rule, method=method, options=options))
        for why, what in ((layer.fallback, "another block type"), (lost, "another method")):
            self._told(replace(done, fallback=why), what)
        return replace(done, layer=replace(layer, fallback="; ".join(filter(None, (layer.fallback, lost)))))

    def _told(self, t: PlannedTensor, what: str) -> PlannedTensor:
        """Remember that something else is done than was asked for, if it is."""
        if t.fallback:
            self.others[what].append(f"{t.source}: {t.fallback}")
        return t

    @property
    def said(self) -> list[str]:
        """What there is to say of tensors that are not done as asked."""
        return [
            f"{len(found)} matrices get {what} than asked for, such as {found[0]}"
            for what, found in self.others.items()
            if found
        ]

    def _layer(self, t: PlannedTensor, rule: Rule, block: int | None) -> Layer:
        """The matrix as the file will store it; experts' matrices are stacked along N."""
        assert rule.scheme is not None
        layer = Layer(t.stem, prod(t.shape[:-1]), t.shape[-1], rule.scheme, activations=rule.activations)
        exact = self.recipe.pure or rule.exact
        if rule.mix and not (exact and rule.mix not in TYPES):
            kind = TYPES[rule.mix if exact else type_in(rule.mix, self._place(t, rule, block))]
            layer = replace(layer, scheme=kind.scheme, container=kind.name)
        elif rule.mix:
            remedy = "leave out --pure, or name a block type such as q4_k"
            raise FormatError(f"{rule.mix.lower()} is a mix of llama.cpp's block types", where=t.source, remedy=remedy)
        return GGUF.adapt(layer, t.dtype)

    def _place(self, t: PlannedTensor, rule: Rule, block: int | None) -> Place:
        """What the choice of a block type in a mix depends on, as far as the keys tell."""
        part = part_of(t.stem, block)
        queries, keys = (self._number(key) for key in ("attention.head_count", "attention.head_count_kv"))
        fits = t.shape[-1] % TYPES[MIXES[rule.mix]].size == 0
        tied = "output.weight" not in self.file.tensors
        depth = max(self._number("block_count"), 1)
        heads, experts = max(queries // max(keys, 1), 1), self._number("expert_count")
        return Place(part, block or 0, depth, heads, tied, self.weighted, fits, experts, "_exps" in t.stem)

    def _number(self, key: str) -> int:
        """An integer key of the architecture; the largest, if it has one for each block; 0 if it is missing."""
        found = self.file.keys.get(f"{self.file.keys['general.architecture']}.{key}", 0)
        return int(np.max(found)) if isinstance(found, int | np.ndarray) and np.size(found) else 0
