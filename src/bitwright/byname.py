"""A float GGUF file of an architecture that is not known here, quantized tensor by tensor, as names and shapes say.

Nothing of it can be run, so nothing is known of inputs but what an importance matrix says; methods that need more give way to
a search of scales, on record. Keys are carried over, rows stay where they are. Which tensors llama.cpp keeps in float
is its published list (llama-quant.cpp, `tensor_allows_quantization`).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.block import fitted, rtn_loss
from bitwright.checkpoint import spec_bytes
from bitwright.decisions import Planned
from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.formats import FORMATS, Layer
from bitwright.formats.format import Spec
from bitwright.formats.ggml import TYPES
from bitwright.inputs import Inputs
from bitwright.ledger import KEPT, QUANTIZED, Entry
from bitwright.llamacpp import export, imatrix
from bitwright.llamacpp.architecture import named
from bitwright.llamacpp.artefact import carried_keys, float_dtype, is_gguf
from bitwright.llamacpp.container import GgufFile, type_named
from bitwright.llamacpp.mixes import FILE_TYPES, MIXES, Place, type_in
from bitwright.loss import ratio
from bitwright.memory import peak_rss_bytes
from bitwright.methods import ASYMMETRIC, BLOCKWISE, CALIBRATED
from bitwright.pipeline import Result
from bitwright.qtensor import QTensor
from bitwright.recipe import Recipe, Rule
from bitwright.streams import Progress
from bitwright.version import __version__
from bitwright.workplace import Verification, Workplace

GGUF = FORMATS["gguf"]
KEPT_PARTS = (
    "_norm", "ffn_gate_inp", "ffn_gate_tid2eid", "altup", "laurel", "per_layer_model_proj", "position_embd", "token_types",
    "ssm_conv1d", "shortconv.conv", "indexer.", "time_mix_first", "time_mix_w", "time_mix_v", "time_mix_a", "time_mix_g",
    "time_mix_decay", "time_mix_lerp", "attn_rel_b", "pos_embd", "sam.neck",
)  # fmt: skip
EXPERTS = ("_exps", "_shexp", "_chexps")


def is_unknown(model: Path) -> bool:
    """Whether MODEL is a GGUF file of an architecture that cannot be run here. CheckpointError for a damaged file."""
    return is_gguf(model) and named(GgufFile(model).key("general.architecture", str)) is None


@dataclass(frozen=True)
class NamePlan:
    """Everything that is known before the first weight is read; see `Plan`."""

    source: Path
    file: GgufFile
    recipe: Recipe
    tensors: tuple[Planned, ...]
    notes: tuple[str, ...]

    @property
    def shards(self) -> list[list[Planned]]:
        """Tensors that are written together: of each block, and of what is outside of them."""
        blocks = sorted({t.block for t in self.tensors if t.block is not None})
        return [[t for t in self.tensors if t.block == block] for block in [*blocks, None]]

    def specs(self, members: list[Planned]) -> dict[str, Spec]:
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
        return export.file_bytes(self.keys, stored)

    @property
    def keys(self) -> dict[str, Any]:
        """What the file will say beside its tensors."""
        mixes = {rule.mix for rule in self.recipe.active}
        return carried_keys(self.source, FILE_TYPES.get(next(iter(mixes))) if len(mixes) == 1 else None)

    @property
    def parameters(self) -> int:
        """All of the source."""
        return sum(prod(t.shape) for t in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        counts = {action: sum(t.action == action for t in self.tensors) for action in (QUANTIZED, KEPT)}
        schemes = sorted({str(t.layer.scheme) for t in self.tensors if t.layer})
        weights = spec_bytes(self.specs(list(self.tensors)))
        return {
            "model": str(self.source), "format": GGUF.name, "schemes": schemes, "parameters": self.parameters,
            "bytes": self.bytes, "bits_per_weight": round(8 * weights / self.parameters, 4), **counts,
            "notes": list(self.notes),
        }  # fmt: skip

    @property
    def headline(self) -> str:
        """The plan in a line, and its notes."""
        first = f"{self.parameters:,} parameters to {GGUF.name}: {self.bytes:,} bytes"
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])


def plan_by_name(source: Path, recipe: Recipe, format_name: str, *, weighted: bool) -> NamePlan:
    """Decide about every tensor of such a file. weighted: whether there will be an importance matrix.

    FormatError, RecipeError or CheckpointError for what cannot be.
    """
    file = GgufFile(source)
    architecture = file.key("general.architecture", str)
    if format_name != GGUF.name:
        remedy = "name OUT.gguf"
        message = f"architecture {architecture!r} is not known here: it can stay GGUF, and become nothing else"
        raise FormatError(message, where=str(source), remedy=remedy)
    if recipe.kv_cache is not None or any(rule.transforms for rule in recipe.active):
        message = (
            f"transforms and caches need a model that can be run, and architecture {architecture!r} is not known here"
        )
        raise RecipeError(message, where=str(source), remedy="leave them out")
    chooser = _Chooser(file, recipe if weighted else recipe.without_text(), weighted=weighted)
    tensors = tuple(chooser.decide(name) for name in file.tensors)
    if not any(t.layer for t in tensors):
        raise RecipeError("there is nothing to quantize", where=str(source), remedy="a file with matrices, and a rule")
    note = (
        f"architecture {architecture!r} is not known here, so none of it can be run: each matrix is rounded by itself"
    )
    known = "with the columns' importance" if weighted else "without importance"
    fallbacks = [f"{t.source}: {t.layer.fallback}" for t in tensors if t.layer and t.layer.fallback]
    more = (
        [f"{len(fallbacks)} matrices get another block type than asked for, such as {fallbacks[0]}"]
        if fallbacks
        else []
    )
    return NamePlan(source, file, recipe, tensors, (f"{note}, {known}", *more))


class _Chooser:
    """What a decision about one tensor depends on."""

    def __init__(self, file: GgufFile, recipe: Recipe, *, weighted: bool) -> None:
        self.file, self.recipe, self.weighted = file, recipe, weighted
        self.rules = recipe.assign([name.removesuffix(".weight") for name in file.tensors if self._may(name)])

    def _may(self, name: str) -> bool:
        """Whether llama.cpp can do with a quantized tensor of that name."""
        matrix = len(self.file.tensors[name].shape) in (2, 3) and name.endswith(".weight")
        return matrix and not any(part in name for part in KEPT_PARTS)

    def decide(self, name: str) -> Planned:
        """Quantize a matrix as its rule says; keep all else as it is."""
        stored = self.file.tensors[name]
        dtype = float_dtype(stored, name, str(self.file.path))
        parts = name.split(".")
        block = int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else None
        t = Planned(name, name, block, dtype, stored.shape, KEPT)
        if not self._may(name):
            return replace(t, reason="llama.cpp keeps it in float")
        rule = self.rules[t.stem]
        if rule.scheme is None:
            return replace(t, reason=f"recipe: {rule.match}", rule=rule)
        method, lost = rule.method, ""
        if method in (*CALIBRATED, *ASYMMETRIC, *BLOCKWISE):
            method, lost = "search", f"{method} -> search: inputs are not known"
        options = rule.options if not lost else {} if self.weighted else {"objective": "mse"}
        layer = self._layer(t, rule, block)
        layer = replace(layer, fallback="; ".join(filter(None, (layer.fallback, lost))))
        return replace(t, action=QUANTIZED, layer=layer, rule=replace(rule, method=method, options=options))

    def _layer(self, t: Planned, rule: Rule, block: int | None) -> Layer:
        """The matrix (of experts: all of them, one above the other) as the file will store it."""
        assert rule.scheme is not None
        layer = Layer(t.stem, prod(t.shape[:-1]), t.shape[-1], rule.scheme, activations=rule.activations)
        if rule.mix and not (self.recipe.pure and rule.mix not in TYPES):
            kind = TYPES[rule.mix if self.recipe.pure else type_in(rule.mix, self._place(t, rule, block))]
            layer = replace(layer, scheme=kind.scheme, container=kind.name)
        elif rule.mix:
            remedy = "leave out --pure, or name a block type such as q4_k"
            raise FormatError(f"{rule.mix.lower()} is a mix of llama.cpp's block types", where=t.source, remedy=remedy)
        return GGUF.adapt(layer, t.dtype)

    def _place(self, t: Planned, rule: Rule, block: int | None) -> Place:
        """Where it stands, as far as the keys say."""
        part = t.stem.split(".")[0 if block is None else 2]
        for suffix in EXPERTS:
            part = part.removesuffix(suffix)
        queries, keys = (self._number(key) for key in ("attention.head_count", "attention.head_count_kv"))
        fits = t.shape[-1] % TYPES[MIXES[rule.mix]].size == 0
        tied = "output.weight" not in self.file.tensors
        depth = max(self._number("block_count"), 1)
        return Place(part, block or 0, depth, max(queries // max(keys, 1), 1), tied, self.weighted, fits)

    def _number(self, key: str) -> int:
        """A count among the architecture's keys; of one for each block the largest; 0 where there is none."""
        found = self.file.keys.get(f"{self.file.keys['general.architecture']}.{key}", 0)
        return int(np.max(found)) if isinstance(found, int | np.ndarray) and np.size(found) else 0


class _AsTheyAre:
    """Names and tensors of a file for one made of it: nothing changes."""

    def of(self, parameter: str) -> str:
        return parameter

    def rows(self, parameter: str, N: int) -> Tensor | None:
        return None

    def written(self, parameter: str, tensor: Tensor) -> Tensor:
        return tensor


def run_by_name(
    plan: NamePlan, out: Path, *, calib: str, resume: bool = True, progress: Progress = lambda *_: None
) -> Result:
    """Carry out a plan; see `pipeline.run`. calib: an importance matrix's file, or anything else."""
    begun = time.monotonic()
    importance = imatrix.read(Path(calib)) if imatrix.is_imatrix(calib) else {}
    shards = plan.shards
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    manifest = {
        "version": __version__, "torch": torch.__version__, "recipe": [rule.describe() for rule in plan.recipe.rules],
        "source": [[str(f.name), f.stat().st_size, f.stat().st_mtime_ns] for f in plan.file.files], "calib": calib,
    }  # fmt: skip
    place = Workplace(out, manifest, needed=2 * plan.bytes, resume=resume)
    first = place.committed(names)
    ledger = [entry for i in range(first) for entry in place.ledger(i)]
    for index in range(first, len(shards)):
        progress("block", index, len(shards))
        entries = _quantize_shard(plan, place, index, names[index], importance)
        ledger += entries
    progress("block", len(shards), len(shards))
    pieces = [_piece(t) for t in plan.tensors]
    made = place.path / "model.gguf"
    export.write(made, plan.keys, pieces, [place.path / name for name in names], _AsTheyAre(), {})
    written = made.stat().st_size
    place.finish_file(made, ledger)
    bits = 8 * sum(entry.bytes for entry in ledger) / plan.parameters
    return Result(out, written, bits, time.monotonic() - begun, peak_rss_bytes(), ledger, plan.notes)


def _piece(t: Planned) -> export.Piece:
    """A tensor of the file to be."""
    kind = None if t.layer is None else type_named(t.layer.container)
    return export.Piece(t.source, t.source, kind, t.shape[0] if len(t.shape) == 3 and kind is not None else 0)


def _quantize_shard(
    plan: NamePlan, place: Workplace, index: int, name: str, importance: Mapping[str, Tensor]
) -> list[Entry]:
    """Round, write, verify and commit some tensors."""
    kept: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    meant: dict[str, QTensor] = {}
    entries, types = [], {}
    for t in plan.shards[index]:
        weight = plan.file.read(t.source)
        if t.layer is None:
            kept[t.source] = weight
            entries.append(Entry(t.source, t.shape, _name(t.dtype), KEPT, t.reason, bytes=weight.nbytes))
            continue
        q, entry = _rounded(t, weight.reshape(t.layer.N, t.layer.K), importance.get(t.source))
        meant[t.stem], types[t.stem] = q, t.layer.container
        tensors |= {f"{t.stem}.{suffix}": part for suffix, part in GGUF.encode(q, t.layer, t.dtype).items()}
        entries.append(entry)
    verify = Verification(GGUF, {"types": types}, meant, kept)
    place.commit(index, name, tensors | kept, entries, None, verify)
    return entries


def _rounded(t: Planned, w: Tensor, importance: Tensor | None) -> tuple[QTensor, Entry]:
    """One matrix, and what the ledger says of it. CheckpointError for a weight that is not finite."""
    assert t.layer is not None and t.rule is not None
    begun = time.monotonic()
    if not bool(torch.isfinite(w).all()):
        raise CheckpointError("it has values that are NaN or Inf", where=t.source, remedy="get a good copy")
    if importance is not None and len(importance) != t.layer.K:
        importance = None  # of another shape: experts have one each
    fit = fitted(torch.float32, t, w, Inputs() if importance is None else Inputs((t.stem,), gram=importance))
    losses = ratio(fit.lost, fit.whole), rtn_loss(w, t.layer.scheme, fit.whole, importance)
    nbytes = prod(GGUF.layout(t.layer, t.dtype)["weight"][1])
    return fit.outcome.q, Entry(
        t.source, t.shape, _name(t.dtype), QUANTIZED, t.reason, str(t.layer.scheme), t.rule.method, *losses,
        seconds=round(time.monotonic() - begun, 4), fallback=t.layer.fallback, bytes=nbytes,
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
