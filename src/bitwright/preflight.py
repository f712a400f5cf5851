"""What a run will do, from config.json and tensor headers alone: nothing of a weight is read.

Decides for every tensor of the source whether it is quantized, kept on purpose or left out; lays out the files of the
result to the byte; estimates peak memory; refuses what the format cannot hold; and says what engines will not load.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from bitwright.checkpoint import Checkpoint, count, shard_bytes
from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.formats import FORMATS, Format, Layer
from bitwright.formats.compressed_tensors import arguments
from bitwright.formats.format import FLOAT_NAMES, Spec
from bitwright.kv import SCALES as KV_SCALES
from bitwright.ledger import KEPT, LEFT_OUT, QUANTIZED
from bitwright.methods import Outlier
from bitwright.methods.obq import LARGEST_K
from bitwright.models import COMPUTED, Skeleton, best_dtype, quantization_of, read_config
from bitwright.recipe import Recipe, Rule
from bitwright.rotation import EMBEDDING, HEAD, Rotation
from bitwright.scheme import Scheme

PROCESS_BYTES = 420 << 20  # Python, torch and transformers, before any weight


@dataclass(frozen=True)
class Planned:
    """One tensor of the source and what becomes of it. `block` is None outside the blocks."""

    source: str
    parameter: str
    block: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    action: str
    reason: str = ""
    layer: Layer | None = None
    rule: Rule | None = None
    made_of: str = ""  # the source's tensor, where that has another name: an untied head is made of the embedding

    @property
    def stem(self) -> str:
        """The tensor's name in the files, less ".weight"."""
        return self.source.removesuffix(".weight")


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read."""

    source: Path
    skeleton: Skeleton
    checkpoint: Checkpoint
    format: Format
    tensors: tuple[Planned, ...]
    recipe: Recipe
    seqlen: int
    samples: int
    notes: tuple[str, ...] = field(default=())
    rotation: Rotation | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the run needs calibration text."""
        return self.recipe.needs_calibration

    def shard(self, index: int) -> list[Planned]:
        """The tensors written in shard `index`: one a block, and a last one for all outside the blocks."""
        block = index if index < len(self.skeleton) else None
        return [t for t in self.tensors if t.block == block and t.action != LEFT_OUT]

    def shard_name(self, index: int) -> str:
        """File name of a shard."""
        return f"model-{index + 1:05d}-of-{len(self.skeleton) + 1:05d}.safetensors"

    def specs(self, tensors: list[Planned]) -> dict[str, Spec]:
        """Names, types and shapes in the files."""
        specs: dict[str, Spec] = {}
        for t in tensors:
            if t.layer is None:
                specs[t.source] = (t.dtype, t.shape)
            else:
                specs |= {f"{t.stem}.{suffix}": spec for suffix, spec in self.format.layout(t.layer, t.dtype).items()}
        return specs

    def kv_specs(self, index: int) -> dict[str, Spec]:
        """Names, types and shapes of the scales of block `index`'s keys and values; none if its cache is in float."""
        attention = self.skeleton.attention_name(index) if self.recipe.kv_cache and index < len(self.skeleton) else None
        inside = (t for t in self.shard(index) if attention and t.parameter.startswith(f"{attention}."))
        some = next(inside, None)
        if attention is None or some is None:
            return {}
        stem = some.source.removesuffix(some.parameter.removeprefix(attention))
        return {f"{stem}.{scale}": (some.dtype, (1,)) for scale in KV_SCALES}

    def shard_specs(self, index: int) -> dict[str, Spec]:
        """Names, types and shapes of all that a shard holds."""
        return self.specs(self.shard(index)) | self.kv_specs(index)

    @property
    def bytes(self) -> int:
        """Exact size of all weight files together."""
        return sum(shard_bytes(self.shard_specs(i)) for i in range(len(self.skeleton) + 1))

    @property
    def parameters(self) -> int:
        """Parameters of the source, tied ones once, computed buffers not."""
        tied = self.skeleton.tied_names()
        own = (t for t in self.tensors if t.action != LEFT_OUT and not t.made_of)
        return sum(count(t.shape) for t in own if t.parameter not in tied)

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes of all weight data / parameters."""
        shards = (self.shard_specs(i).values() for i in range(len(self.skeleton) + 1))
        return 8 * sum(dtype.itemsize * count(shape) for specs in shards for dtype, shape in specs) / self.parameters

    @property
    def statistics_bytes(self) -> int:
        """Size of the float model's statistics on disk, at most: a Gram for every matrix."""
        return sum(4 * t.layer.K * t.layer.K for t in self.tensors if t.layer is not None) if self.calibrated else 0

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json will say; FormatError if one file cannot hold these layers together."""
        layers = [t.layer for t in self.tensors if t.layer is not None]
        names = set(self.skeleton.linear_names())
        kept = [t.parameter.removesuffix(".weight") for t in self.tensors if t.layer is None]
        outside = [name for name in names if name in kept or name not in {layer.name for layer in layers}]
        config = self.format.config(layers, sorted(outside))
        return config if self.recipe.kv_cache is None else config | {"kv_cache_scheme": arguments(self.recipe.kv_cache)}

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run` prints."""
        counts = {action: sum(t.action == action for t in self.tensors) for action in (QUANTIZED, KEPT, LEFT_OUT)}
        schemes = sorted({str(t.layer.scheme) for t in self.tensors if t.layer})
        return {
            "model": str(self.source), "format": self.format.name, "schemes": schemes, "parameters": self.parameters,
            "bytes": self.bytes, "bits_per_weight": round(self.bits_per_weight, 4), "peak_memory_bytes": self.peak_memory,
            **counts, "notes": list(self.notes),
        }  # fmt: skip

    @property
    def headline(self) -> str:
        """The plan in a line, and its notes."""
        schemes = ", ".join(sorted({str(t.layer.scheme) for t in self.tensors if t.layer}))
        first = (
            f"{self.parameters:,} parameters to {self.format.name}, {schemes}: {self.bytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight, about {self.peak_memory >> 20:,} MiB of memory"
        )
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])

    @property
    def peak_memory(self) -> int:
        """Estimate of the largest resident set, in bytes: one block, its statistics, the calibration activations."""
        widths = [(t.layer.N, t.layer.K) for t in self.tensors if t.layer is not None and t.block == 0]
        block = sum(N * K for N, K in widths)
        outside = sum(t.dtype.itemsize * count(t.shape) for t in self.tensors if t.block is None)
        largest = max((N * K for N, K in widths), default=0)
        if not self.calibrated:
            return PROCESS_BYTES + max(outside, block * 4 + largest * 24)
        hidden = self.skeleton.config.get_text_config().hidden_size
        activations = 2 * self.samples * self.seqlen * hidden * self.skeleton.dtype.itemsize // 2
        grams = sum(4 * K * K for K in {K for _, K in widths}) + 2 * 4 * max((K * K for _, K in widths), default=0)
        return PROCESS_BYTES + max(outside + activations, activations + block * 5 + grams + largest * 30)


def preflight(source: Path, recipe: Recipe, format_name: str, *, samples: int = 128, seqlen: int = 2048) -> Plan:
    """Plan a run. Raises the InputError of whatever would stop it: see the list in the module's docstring."""
    if format_name not in FORMATS:
        raise FormatError(f"unknown format {format_name!r}", remedy=f"one of {', '.join(FORMATS)}")
    config = read_config(source)
    if quantization_of(source) is not None:
        remedy = "quantize the float original; rounding twice only loses"
        raise CheckpointError(
            "already quantized (config.json has a quantization_config)", where=str(source), remedy=remedy
        )
    checkpoint = Checkpoint(source)
    rotation = Rotation.of(recipe.rotation, config) if recipe.rotation else None
    untied = rotation is not None and bool(config.tie_word_embeddings)
    if untied:
        config.tie_word_embeddings = False  # the head takes in the last norm, the embedding does not
    skeleton = Skeleton(config, best_dtype() if recipe.needs_calibration else torch.float32)
    tensors, notes = _decide(skeleton, checkpoint, recipe, FORMATS[format_name], rotation, untied=untied)
    if untied:
        notes.append("a rotation unties the output head from the embedding: both are written")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or seqlen
    if any(t.rule is not None and _by_threshold(t.rule) for t in tensors):
        notes.append("how many channels stay in float depends on calibration: sizes are those of one in each matrix")
    widest = max((t.layer.K for t in tensors if t.layer), default=0)
    if recipe.needs_calibration and samples * min(seqlen, limit) < widest:
        few = f"{samples * min(seqlen, limit)} calibration tokens do not tell {widest} input channels apart"
        notes.append(f"{few}: give more --samples, or expect little of calibration")
    if recipe.needs_calibration and seqlen > limit:
        notes.append(f"calibration windows of {limit} tokens: the model knows no more positions than that")
    plan = Plan(
        source,
        skeleton,
        checkpoint,
        FORMATS[format_name],
        tuple(tensors),
        recipe,
        min(seqlen, limit),
        samples,
        tuple(notes),
        rotation,
    )
    if recipe.kv_cache is not None:
        _check_kv(plan)
    if not any(t.layer for t in tensors):
        raise RecipeError("the recipe keeps every matrix: there is nothing to quantize", where=str(source))
    _ = plan.quantization_config  # refuses schemes that cannot share a file
    return plan


def _check_kv(plan: Plan) -> None:
    """Refuse a quantized cache where the format or the model knows of none."""
    if not plan.format.kv_cache:
        remedy = "use compressed-tensors or bitwright"
        raise FormatError(f"{plan.format.name} files cannot say what keys and values are kept in", remedy=remedy)
    if not plan.kv_specs(0):
        kind = plan.skeleton.config.model_type
        raise RecipeError(
            f"models of type {kind!r} have no single attention module a block", remedy="leave out --kv-cache"
        )


def _decide(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    recipe: Recipe,
    format_: Format,
    rotation: Rotation | None,
    *,
    untied: bool,
) -> tuple[list[Planned], list[str]]:
    """An action for every tensor of the source; an error for one that no rule covers."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    if untied:
        shapes[HEAD] = shapes.get(EMBEDDING) or shapes[EMBEDDING.removeprefix("model.")]
    names = skeleton.source_names(shapes, str(checkpoint.folder))
    parameters = {source: parameter for parameter, source in names.items()}
    blocks = {p: i for i in range(len(skeleton)) for p in skeleton.state_names(i)}
    modules = {n: m for i in range(len(skeleton)) for n, m in skeleton.linears(i).items()}
    odd = [p for p in blocks if p in names and p.removesuffix(".weight") not in modules]
    odd = [p.removesuffix(".weight") for p in odd if len(checkpoint.tensors[names[p]].shape) > 1]
    rules = recipe.assign([*modules, *odd])
    planned = []
    for source, info in checkpoint.tensors.items():
        parameter = parameters.get(source)
        if parameter is None:
            if not source.endswith(COMPUTED):
                remedy = "config.json and weights must belong together"
                raise CheckpointError("the model has no such tensor", where=source, remedy=remedy)
            planned.append(Planned(source, source, None, info.dtype, info.shape, LEFT_OUT, "the model computes it"))
            continue
        base = Planned(source, parameter, blocks.get(parameter), info.dtype, info.shape, KEPT)
        planned.append(_decide_one(base, modules, rules, format_, rotation))
    if untied:
        of = checkpoint.tensors[names[EMBEDDING]]
        reason = "outside the blocks, untied"
        planned.append(Planned(HEAD, HEAD, None, of.dtype, of.shape, KEPT, reason, made_of=names[EMBEDDING]))
    return planned, _engine_notes([t.layer for t in planned if t.layer], format_)


def _decide_one(
    t: Planned, modules: dict[str, Any], rules: dict[str, Rule], format_: Format, rotation: Rotation | None
) -> Planned:
    """Quantize a block's matrices as the rules say; keep vectors and all that is outside the blocks."""
    name = t.parameter.removesuffix(".weight")
    if t.block is None:
        return replace(t, reason="outside the blocks")
    if len(t.shape) < 2:
        return replace(t, reason="a vector")
    rule = rules[name]
    if rule.scheme is None:
        return replace(t, reason=f"recipe: {rule.match}", rule=rule)
    if name not in modules:
        remedy = f'a recipe rule with match = "{name}" and scheme = "keep"'
        raise RecipeError(
            f"a parameter of shape {t.shape} that is not a Linear cannot be quantized", where=name, remedy=remedy
        )
    if t.dtype not in FLOAT_NAMES:
        raise CheckpointError(f"the weight's type is {t.dtype}", where=name, remedy="float32, float16 or bfloat16")
    transposed = isinstance(modules[name], Conv1D)
    N, K = (t.shape[1], t.shape[0]) if transposed else t.shape
    layer = Layer(name, N, K, rule.scheme, transposed, _inputs_as_stored(rule, t.dtype), _outliers(rule, K))
    if rotation is not None:
        layer = replace(layer, rotate=rotation.online_block(name, K))
    layer = replace(layer, scheme=format_.adapt(layer, t.dtype))
    if rule.method == "obq" and K > LARGEST_K:
        raise RecipeError(f"obq on K = {K} would take days", where=name, remedy=f"method gptq, or K up to {LARGEST_K}")
    return replace(t, action=QUANTIZED, layer=layer, rule=rule)


def _inputs_as_stored(rule: Rule, dtype: torch.dtype) -> Scheme | None:
    """The rule's scheme for inputs; a fixed scale is stored in the model's own float type."""
    if rule.activations is None or not rule.static:
        return rule.activations
    return rule.activations.with_scale(FLOAT_NAMES[dtype])


def _by_threshold(rule: Rule) -> bool:
    separate = rule.transform(Outlier)
    return isinstance(separate, Outlier) and separate.fraction is None


def _outliers(rule: Rule, K: int) -> int:
    """How many input channels stay in float, as far as that is known beforehand: one stands for a number unknown."""
    separate = rule.transform(Outlier)
    return (separate.expected(K) or 1) if isinstance(separate, Outlier) else 0


def _engine_notes(layers: list[Layer], format_: Format) -> list[str]:
    """What the usual engines will say to these files."""
    grids = {layer.scheme.grid for layer in layers}
    odd = sorted(grids & {"int2", "int3", "int5", "int6", "int7", "ternary"})
    if format_.name == "compressed-tensors" and odd:
        return [f"{', '.join(odd)}: transformers loads it; vLLM serves packed integers of 4 and 8 bits"]
    if format_.name == "gptq" and any(layer.scheme.zero != "sym" for layer in layers):
        return ["asymmetric GPTQ: GPTQModel loads it; vLLM's fast kernels want symmetric"]
    return []
