"""Score every matrix in every candidate scheme: the KL that it is predicted to add. Kept in a directory, block by block.

scores.json                what the scores depend on: model, text, format, method, schemes, code
curvature.safetensors      ½ Fₙₙ of each output, and how much each token counts: see curvature.py
block-00003.json           {module: {scheme: KL}} of block 3; the last is of the embedding and the head. What rounding the
                           module's inputs costs stands under "inputs"
hidden-00004.safetensors   inputs of block 4, until its scores are written

One pass through the float model. Each input is observed once, and the matrices that read it are rounded on its Gram by the
method that will be used, on a sample of their rows, in every scheme. Each row's loss, with tokens weighted by their gradients,
times the row's curvature, summed up, is the KL. So it is where inputs are rounded, with the Gram of what rounding takes from
them in place of the matrix's error.
Scores of another model, text, method or code are never used: they are computed again, and `notes` says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.calibration.embedding_statistics import observe_head
from bitwright.calibration.input_statistics import Inputs
from bitwright.calibration.windows import Drawn
from bitwright.errors import CheckpointError, OutputError
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file, write_shard
from bitwright.methods import ASYMMETRIC
from bitwright.models.layers import matrix_of
from bitwright.numerics.codec import decode
from bitwright.numerics.loss import energy
from bitwright.numerics.scheme import Scheme
from bitwright.pipeline.calibration_pass import (
    HiddenStates,
    digest,
    first_hidden_states,
    inputs_in_order,
    key_of,
    read_block,
    read_lent,
)
from bitwright.pipeline.curvature import Curvature, WeightedInputs, curvature, embedded, weighted_inputs
from bitwright.pipeline.quantize_embeddings import observe_ends
from bitwright.pipeline.quantize_matrix import metric_of, quantize_matrix
from bitwright.pipeline.statistics_store import differing_keys
from bitwright.plan.planned_tensor import PlannedTensor
from bitwright.plan.rule import Rule
from bitwright.plan.run_plan import Plan
from bitwright.plan.units import Unit
from bitwright.system.memory import return_memory
from bitwright.system.progress import Progress

ROWS = 128  # of a matrix that are rounded in each scheme
ENDS_ROWS = 1024  # of the embedding and the head
AT_ONCE = 1 << 14  # rows of theirs that are multiplied at a time
STAND_IN = "gptq"  # scores methods that need the quantized model's inputs, which are not known yet
INPUTS = "inputs"  # beside the schemes of a module: rounding of its inputs
NOTE = "scores.json"  # in a directory of scores: what they belong to
REMOVE = "remove this directory, or name another, and the scores are computed anew"

Scores = dict[str, dict[str, float]]  # module -> scheme -> KL in nats a token


@dataclass(frozen=True)
class Scored:
    """All scores, and notes."""

    scores: Scores
    notes: tuple[str, ...]


def check_scores(folder: Path) -> None:
    """OutputError for a directory with other files in it than scores."""
    if folder.exists() and (not folder.is_dir() or (not (folder / NOTE).is_file() and any(folder.iterdir()))):
        remedy = "give --scores an empty or new directory"
        raise OutputError("not a directory of scores", where=str(folder), remedy=remedy)


class ScoreStore:
    """A directory of scores that belong to one key."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        """Open or make it. Scores with another key are discarded, and `notes` says so.

        OutputError for a directory with other files in it; CheckpointError for a damaged one.
        """
        self.folder, self.notes = folder, tuple[str, ...]()
        check_scores(folder)
        note = folder / NOTE
        differing = differing_keys(note, key) if note.is_file() else ""
        if differing:
            self.notes = (f"the scores in {folder} were of another {differing}: computed anew",)
            for pattern in ("block-*.json", "hidden-*.safetensors", "curvature.safetensors"):
                for file in folder.glob(pattern):
                    file.unlink()
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_file(note, json.dumps(key, indent=1).encode())

    def first_missing(self, count: int) -> int:
        """The first of `count` shards that has no scores yet."""
        return next((i for i in range(count) if not self._file(i).is_file()), count)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"

    def write(self, index: int, scores: Scores) -> None:
        """Write the scores of a shard, and remove its saved inputs."""
        write_file(self._file(index), json.dumps(scores, indent=1).encode())
        self._hidden(index).unlink(missing_ok=True)

    def read(self, count: int) -> Scores:
        """The scores of all shards. CheckpointError for a damaged file."""
        found: Scores = {}
        for index in range(count):
            file = self._file(index)
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                found |= {name: {s: float(kl) for s, kl in of.items()} for name, of in content.items()}
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise CheckpointError(f"damaged scores: {error}", where=str(file), remedy=REMOVE) from error
        return found

    def hidden(self, index: int) -> tuple[Tensor, Tensor]:
        """The saved inputs of block `index`, [S, T, H]: for the calibration windows, and for those that losses are taken on."""
        saved = Checkpoint(self.folder, only=self._hidden(index))
        return saved.read("seen"), saved.read("measured")

    def keep_hidden(self, index: int, seen: list[Tensor], measured: list[Tensor]) -> None:
        """Save the inputs of block `index`, until its scores are written."""
        write_shard(self._hidden(index), {"seen": torch.cat(seen), "measured": torch.cat(measured)})

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:05d}.safetensors"

    def curvature(self) -> Curvature | None:
        """The curvature, if it has been measured."""
        file = self.folder / "curvature.safetensors"
        if not file.is_file():
            return None
        stored = Checkpoint(self.folder, only=file)
        whole = {name: stored.read(name) for name in stored.tensors}
        tokens = {n.removeprefix(TOKENS): t for n, t in whole.items() if n.startswith(TOKENS)}
        modules = {n: t for n, t in whole.items() if n not in ENDS and not n.startswith(TOKENS)}
        return Curvature(modules, tokens, whole["head"], whole["embedding"])

    def keep_curvature(self, found: Curvature) -> None:
        """Keep the curvature."""
        tokens = {f"{TOKENS}{name}": of for name, of in found.tokens.items()}
        tensors = {**found.modules, **tokens, "head": found.head, "embedding": found.embedding}
        write_shard(self.folder / "curvature.safetensors", {n: t.contiguous() for n, t in tensors.items()})


ENDS, TOKENS = ("head", "embedding"), "tokens of "  # names in the file of the curvature


def scored(
    plan: Plan,
    units: Sequence[Unit],
    tokens: Drawn,
    folder: Path,
    progress: Progress,
    activations: Scheme | None = None,
) -> Scored:
    """The scores of every matrix of a base plan in every choice that its unit has; those in `folder` are not computed again.

    activations: what inputs may be rounded to
    Errors as of `ScoreStore`; CheckpointError for a weight that is not finite.
    """
    key = _key(plan, units, torch.cat([tokens.seen, tokens.held_out]), activations)
    store, depth = ScoreStore(folder, key), len(plan.skeleton)
    count = depth + plan.format.embeddings
    first = store.first_missing(count)
    if first < count:
        of = store.curvature()
        if of is None:
            store.keep_curvature(of := curvature(plan, tokens.held_out, progress))
        _score_blocks(plan, _Tried(layers_of(units), activations), tokens, store, of, first, progress)
    return Scored(store.read(count), store.notes)


def _key(plan: Plan, units: Sequence[Unit], tokens: Tensor, activations: Scheme | None) -> dict[str, Any]:
    tried = [[list(unit.patterns), [choice.scheme for choice in unit.choices]] for unit in units]
    rules = [rule.describe() for rule in plan.recipe.rules]
    known = key_of(plan, tokens)
    return {
        "model": known["model"],
        "calibration": [known["text"], known["tokenizer"]],
        "code or precision": known["code or precision"],
        "format": plan.format.name,
        "method": [[rule["method"], rule["options"], rule["transforms"]] for rule in rules],
        "choice of schemes": digest(json.dumps(tried).encode()),
        "rounding of inputs": str(activations or ""),
    }


Layers = dict[str, dict[str, PlannedTensor]]  # module -> scheme -> the matrix as stored in it


@dataclass(frozen=True)
class _Tried:
    """What is scored: every matrix in every scheme that it may have, and what inputs may be rounded to."""

    layers: Layers
    activations: Scheme | None


def layers_of(units: Sequence[Unit]) -> Layers:
    """Every matrix in every scheme that it may have, but for float."""
    found: Layers = {}
    for unit in units:
        for choice in unit.choices:
            for t, layer in zip(unit.members, choice.layers, strict=True):
                if layer is not None:
                    found.setdefault(layer.name, {})[choice.scheme] = replace(t, layer=layer, rule=_rule(t))
    return found


def _rule(t: PlannedTensor) -> Rule:
    assert t.rule is not None
    stands_in = t.rule.method in ASYMMETRIC
    return replace(t.rule, method=STAND_IN, options={}) if stands_in else t.rule


def _score_blocks(
    plan: Plan, tried: _Tried, tokens: Drawn, store: ScoreStore, of: Curvature, first: int, progress: Progress
) -> None:
    """Let the tokens through the float model, and score each block as they reach it: rounded on the Grams of those seen, with
    losses on those held out."""
    skeleton, depth = plan.skeleton, len(plan.skeleton)
    saved, measured = None, embedded(plan, tokens.held_out)
    if first:
        seen, later = store.hidden(first)
        saved, measured = {"given": seen}, list(later.to(skeleton.device).split(1))
    states = first_hidden_states(plan, Drawn(tokens.seen, tokens.seen[:0]), saved, first)
    states.original = None  # the method may want the float model's: here there is no other
    for index in range(first, depth):
        progress("scores", index, depth)
        weights = read_block(plan, index)
        skeleton.load(weights | read_lent(plan, index))
        members = {t.layer.name: t for t in plan.shard(index) if t.layer is not None}
        found: Scores = {}
        weighted = weighted_inputs(skeleton, index, measured, of.tokens)
        for inputs in inputs_in_order(plan, index, members, states.given):
            some = {name: weights[members[name].parameter] for name in inputs.names if name in members}
            found |= _score_together(plan, tried, some, inputs, of.modules, weighted)
        states.given = [skeleton.run(index, batch) for batch in states.given]
        if index + 1 < depth or plan.format.embeddings:
            store.keep_hidden(index + 1, states.given, measured)
        store.write(index, found)
        skeleton.unload(index)
        return_memory()
    if plan.format.embeddings:
        store.write(depth, _score_ends(plan, tried.layers, read_block(plan, depth), states, tokens.seen, of))
    progress("scores", depth, depth)


@dataclass(frozen=True)
class _Matrix:
    """A matrix [N, K] float32, the metric of its errors, ½ Fₙₙ, and that times the energy of each row's outputs: the KL of
    losing it whole, [N] float64."""

    w: Tensor
    metric: Tensor | None
    curved: Tensor
    whole: Tensor

    @classmethod
    def of(cls, w: Tensor, curved: Tensor | None, metric: Tensor | None) -> "_Matrix":
        """curved: ½ Fₙₙ [N]; None: no gradient ever reached it."""
        half = torch.zeros(len(w), dtype=torch.float64) if curved is None else curved.double()
        return cls(w, metric, half, half * energy(w if metric is None else w.to(metric.dtype), metric))

    def kl(self, rounded: Tensor, step: int) -> float:
        """KL for what every `step`-th row was rounded to."""
        error = rounded - self.w[::step]
        lost = energy(error if self.metric is None else error.to(self.metric.dtype), self.metric)
        share = _share((self.curved[::step] * lost).sum(), self.whole[::step].sum())
        return share * float(self.whole.sum())


def _score_together(
    plan: Plan,
    tried: _Tried,
    weights: Mapping[str, Tensor],
    inputs: Inputs,
    curved: Mapping[str, Tensor],
    weighted: Mapping[str, WeightedInputs],
) -> Scores:
    """Score matrices that read the same input; those that may have the same scheme are rounded as one."""
    observed, of = metric_of(plan.skeleton.dtype, inputs), plan.skeleton.model.get_submodule
    metrics = {name: weighted[name].gram() if name in weighted else observed for name in weights}
    matrices = {n: _Matrix.of(matrix_of(of(n), w).float(), curved.get(n), metrics[n]) for n, w in weights.items()}
    found: Scores = {name: {} for name in weights}
    for name in weights:
        if name in weighted and tried.activations is not None:
            lost = energy(matrices[name].w, weighted[name].of_rounding(tried.activations))
            found[name][INPUTS] = float((matrices[name].curved * lost).sum())
    layers = {name: tried.layers.get(name, {}) for name in weights}  # none where a matrix can only be kept
    for scheme in dict.fromkeys(scheme for of_one in layers.values() for scheme in of_one):
        stored = {name: of_one[scheme] for name, of_one in layers.items() if scheme in of_one}
        rowwise = all(t.layer is not None and t.layer.scheme.rowwise for t in stored.values())
        for pile in [list(stored)] if rowwise else [[name] for name in stored]:
            steps = {name: max(1, len(matrices[name].w) // ROWS) if rowwise else 1 for name in pile}
            parts = [matrices[name].w[:: steps[name]] for name in pile]
            fit = quantize_matrix(plan.skeleton.dtype, stored[pile[0]], torch.cat(parts), inputs)
            rounded = decode(fit.outcome.q).split([len(part) for part in parts])
            for name, part in zip(pile, rounded, strict=True):
                found[name][scheme] = matrices[name].kl(part, steps[name])
    return found


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0


def _score_ends(
    plan: Plan, layers: Layers, weights: dict[str, Tensor], states: HiddenStates, tokens: Tensor, of: Curvature
) -> Scores:
    """Score the embedding and the head, by what their errors do where rows are looked up, and where they are multiplied."""
    skeleton = plan.skeleton
    known = observe_ends(plan, weights, states, tokens)
    skeleton.load(weights)
    head_gram = observe_head(skeleton, states.given).gram
    scale = _embedding_scale(plan, weights, tokens)
    skeleton.unload_outside()
    seen = torch.bincount(tokens.flatten(), minlength=len(of.head)).double() / tokens.numel()
    found: Scores = {}
    for t in plan.shard(len(skeleton)):
        if t.layer is None:
            continue
        name, w = t.layer.name, weights[t.parameter]
        uses = []
        if name == skeleton.head_name:
            uses.append(_Use.of(w, of.head.double(), head_gram))
        if name == skeleton.embedding_name:
            uses.append(_Use.of(w, seen, of.embedding * scale**2))
        rows = _rows(w, uses)
        some = w[torch.cat(rows)].float()
        found[name] = {}
        for scheme, planned in layers.get(name, {}).items():
            q = quantize_matrix(skeleton.dtype, planned, some, known.get(name, Inputs())).outcome.q
            found[name][scheme] = sum(use.kl(decode(q) - some, rows) for use in uses)
    return found


@dataclass(frozen=True)
class _Use:
    """One use of a matrix's rows: how much each counts [V], the metric of errors, and the KL of losing each row whole [V]."""

    counted: Tensor
    metric: Tensor | None
    whole: Tensor

    @classmethod
    def of(cls, w: Tensor, counted: Tensor, metric: Tensor | None) -> "_Use":
        """counted: without rows of w beyond the vocabulary, which count nothing."""
        padded = torch.zeros(len(w), dtype=torch.float64)
        padded[: len(counted)] = counted[: len(w)]
        each = torch.cat([energy(slab.float(), metric) for slab in w.split(AT_ONCE)])
        return cls(padded, metric, padded * each)

    def kl(self, error: Tensor, rows: tuple[Tensor, Tensor]) -> float:
        """KL for the errors of some rows: those that matter most, and a sample of the others, which stands for all of them."""
        lost = self.counted[torch.cat(rows)] * energy(error, self.metric)
        most, others = rows
        share = _share(lost[len(most) :].sum(), self.whole[others].sum())
        return float(lost[: len(most)].sum()) + share * float(self.whole.sum() - self.whole[most].sum())


def _rows(w: Tensor, uses: Sequence[_Use]) -> tuple[Tensor, Tensor]:
    """The rows that matter most, and a sample of the others: few tokens make most of a text, and their rows differ."""
    order = sum((use.whole for use in uses), torch.zeros(len(w))).argsort(descending=True)
    most, others = order[: ENDS_ROWS // 2], order[ENDS_ROWS // 2 :]
    return most, others[:: max(1, len(others) // (ENDS_ROWS // 2))]


def _embedding_scale(plan: Plan, weights: dict[str, Tensor], tokens: Tensor) -> float:
    """What the first block's input is to the rows of the embedding: 1, or the factor that models such as Gemma put there."""
    skeleton = plan.skeleton
    some = tokens[:1]
    rows = weights[f"{skeleton.embedding_name}.weight"][some[0]].float()
    read = skeleton.stream(skeleton.embed(some)).float()
    return float(read.norm() / rows.norm().clamp(min=torch.finfo(torch.float32).tiny))
