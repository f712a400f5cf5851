"""What a run will do, from config.json and tensor headers alone: nothing of a weight is read.

Decides for every tensor of the source whether it is quantized, kept on purpose or left out; lays out the files of the
result to the byte; estimates peak memory; refuses what the format cannot hold; and says what engines will not load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bitwright.calibration.observe import KEPT_BYTES
from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import CheckpointError, FormatError, RecipeError
from bitwright.files.checkpoint import Checkpoint, Spec, count, file_bytes, spec_bytes
from bitwright.files.joined import joined
from bitwright.formats import FORMATS, Format, format_named, gguf_writer
from bitwright.formats.compressed_tensors import arguments
from bitwright.gguf.metadata import metadata
from bitwright.gguf.reader import carried_keys, is_gguf
from bitwright.gguf.rope import tensors_of
from bitwright.gguf.tensor_names import Names, is_unused
from bitwright.models.decoded_source import DecodedCheckpoint, FloatCheckpoint, has_no_original
from bitwright.models.families import positions_of
from bitwright.models.gguf_source import FloatGgufCheckpoint
from bitwright.models.kv_cache import SCALES as KV_SCALES
from bitwright.models.skeleton import TOKENS_PER_BATCH, Skeleton, best_dtype, quantization_of, read_config
from bitwright.plan.planned_tensor import KEPT, LEFT_OUT, QUANTIZED, PlannedTensor
from bitwright.plan.recipe import Recipe
from bitwright.plan.tensor_actions import by_threshold, decide
from bitwright.transforms.rotation import Rotation

PROCESS_BYTES = 420 << 20  # Python, torch and transformers, before any weight


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first weight is read."""

    source: Path
    skeleton: Skeleton
    checkpoint: FloatCheckpoint
    format: Format
    tensors: tuple[PlannedTensor, ...]
    recipe: Recipe
    seqlen: int
    samples: int
    notes: tuple[str, ...] = field(default=())
    rotation: Rotation | None = None
    file_keys: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of a format that is one file

    @property
    def calibrates_embeddings(self) -> bool:
        """Whether the embedding or the output head is rounded by a method that looks at their inputs."""
        rules = [t.rule for t in self.tensors if t.block is None and t.layer is not None]
        return any(rule is not None and rule.needs_calibration for rule in rules)

    @property
    def calibrated(self) -> bool:
        """Whether the run needs calibration text."""
        return self.recipe.needs_calibration

    def shard(self, index: int) -> list[PlannedTensor]:
        """The tensors written in shard `index`: one a block, and a last one for all outside the blocks."""
        block = index if index < len(self.skeleton) else None
        return [t for t in self.tensors if t.block == block and t.action != LEFT_OUT]

    def specs(self, tensors: list[PlannedTensor]) -> dict[str, Spec]:
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
        """Exact size of all weight files together, or of the one file with its keys."""
        if self.format.one_file:
            names, config = Names(self.skeleton.config), self.skeleton.config
            stored = [(names.of(t.parameter), len(t.shape), self._stored_bytes(t, names)) for t in self._written()]
            computed = [(name, t.ndim, t.nbytes) for name, t in tensors_of(config).items()]
            return gguf_writer.file_bytes(self.file_keys, [*stored, *computed])
        return sum(file_bytes(specs) for specs in joined(self._shards()).values())

    @property
    def disk_bytes(self) -> int:
        """What the disk must hold at most: all weight files, and one shard a second time while it is joined to them."""
        return self.bytes if self.format.one_file else self.bytes + max(map(file_bytes, self._shards()))

    def _shards(self) -> list[dict[str, Spec]]:
        return [self.shard_specs(i) for i in range(len(self.skeleton) + 1)]

    def _stored_bytes(self, t: PlannedTensor, names: Names) -> int:
        """Of a tensor in a GGUF file, which need not have all its rows."""
        return spec_bytes(self.specs([t])) * names.height(t.parameter, t.shape[0]) // t.shape[0]

    def _written(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.action != LEFT_OUT]

    @property
    def parameters(self) -> int:
        """Parameters of the source, tied ones once, computed buffers not."""
        tied = self.skeleton.tied_names()
        own = (t for t in self._written() if not t.made_of)
        return sum(count(t.shape) for t in own if t.parameter not in tied)

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes of all weight data / parameters."""
        return 8 * sum(map(spec_bytes, self._shards())) / self.parameters

    @property
    def statistics_bytes(self) -> int:
        """Size of the float model's statistics on disk, at most: a Gram for every matrix."""
        return sum(4 * t.layer.K * t.layer.K for t in self.tensors if t.layer is not None) if self.calibrated else 0

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json will say; FormatError if one file cannot hold these layers together."""
        named = self.format.one_file  # no config.json follows: what it says is looked up by the shards' names
        layers = [replace(t.layer, name=t.stem) if named else t.layer for t in self.tensors if t.layer is not None]
        unused = {t.stem for t in self.tensors if is_unused(t.source) and len(t.shape) == 2}
        names = set(self.skeleton.linear_names()) | unused
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
            f"{self.parameters:,} parameters to {self.format.name}, {schemes}: {self.bytes / 1e6:,.1f} MB, "
            f"{self.bits_per_weight:.2f} bits a weight, about {self.peak_memory / 1e6:,.0f} MB of memory"
        )
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])

    @property
    def peak_memory(self) -> int:
        """Estimate of the largest resident set, in bytes: one block, its statistics, the calibration activations; and the
        block before, whose codes and bytes are written and read back meanwhile."""
        widths = [(t.layer.N, t.layer.K) for t in self.tensors if t.layer is not None and t.block == 0]
        block = sum(N * K for N, K in widths)
        outside = [t for t in self.tensors if t.block is None]
        largest = max((t.layer.N * t.layer.K for t in self.tensors if t.layer is not None), default=0)
        written = max(self._in_writing(self.shard(i)) for i in (0, len(self.skeleton)))
        if not self.calibrated:
            by_rows = all(t.layer.scheme.rowwise for t in self.tensors if t.layer is not None)
            read = max(
                spec_bytes({t.source: (t.dtype, t.shape) for t in self.shard(i)}) for i in (0, len(self.skeleton))
            )
            return PROCESS_BYTES + read + written + (max(block, largest) if by_rows else block * 4 + largest * 24)
        tokens, size = self.samples * self.seqlen, self.skeleton.dtype.itemsize
        hidden = self.skeleton.config.get_text_config().hidden_size
        states = 2 if self.recipe.needs_original else 1
        inputs = 2 * hidden + sum({K for _, K in widths})  # attention's and the MLP's, and what each ends with
        kept = min(KEPT_BYTES, tokens * size * inputs) if states == 2 else 0
        activations = 3 * states * tokens * hidden * size + kept  # and as they are saved, twice, for a resumption
        widest = max((K for _, K in widths), default=0)
        batch = min(tokens, TOKENS_PER_BATCH) * size * (10 * hidden + 5 * widest)  # of a block's forward, as measured
        square = 4 * max((K * K for _, K in widths), default=0)
        statistics = square * (5 if states == 2 else 4)  # a Gram, a drift; H and its factor, a copy
        if self.recipe.needs_folds or self.recipe.kv_cache is not None:
            statistics = max(statistics, sum(4 * K * K for K in {K for _, K in widths}) + 2 * square)
        floats = sum(size * count(t.shape) for t in outside)
        weights = block * (2 * size + 2)  # in float, as quantized; codes, and those of the search beside them
        at_work = max(
            floats + activations, activations + batch + weights + statistics, activations - kept + largest * 30
        )
        return PROCESS_BYTES + at_work + self._in_writing(self.shard(0))

    def _in_writing(self, members: list[PlannedTensor]) -> int:
        """Codes of a shard, its bytes, and its bytes read back."""
        codes = sum(t.layer.N * t.layer.K for t in members if t.layer is not None)
        return codes + 2 * spec_bytes(self.specs(members))


def preflight(
    source: Path,
    recipe: Recipe,
    format_name: str,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    requantize: bool = False,
) -> Plan:
    """Plan a run. Raises the InputError of whatever would stop it: see the list in the module's docstring.

    requantize: whether a source that is rounded to integers may be rounded once more.
    """
    format_ = format_named(format_name)
    config = read_config(source)
    if not requantize:
        _refuse_integers(source)
    rotation = Rotation.of(recipe.rotation, config) if recipe.rotation else None
    untied = rotation is not None and bool(config.tie_word_embeddings)
    if untied:
        config.tie_word_embeddings = False  # the head takes in the last norm, the embedding does not
    skeleton = Skeleton(config, best_dtype() if recipe.needs_calibration else torch.float32)
    checkpoint = _open(source, format_name, skeleton)
    tensors, said = decide(skeleton, checkpoint, recipe, format_, rotation, untied=untied)
    limit = positions_of(config.get_text_config()) or seqlen
    notes = [*said, *_notes(checkpoint, recipe, tensors, samples=samples, seqlen=seqlen, limit=limit, untied=untied)]
    plan = Plan(
        source,
        skeleton,
        checkpoint,
        format_,
        tuple(tensors),
        recipe,
        min(seqlen, limit),
        samples,
        tuple(notes),
        rotation,
        _file_keys(checkpoint, skeleton, recipe) if format_.one_file else {},
    )
    if recipe.kv_cache is not None:
        _check_kv(plan)
    if recipe.temper is not None and not (format_.one_file and skeleton.predicts):
        remedy = "give OUT.gguf, or leave out temper"
        raise FormatError(f"{format_name} keeps the last norm as it was", where="temper", remedy=remedy)
    if not any(t.layer for t in tensors):
        raise RecipeError("the recipe keeps every matrix: there is nothing to quantize", where=str(source))
    _ = plan.quantization_config  # refuses schemes that cannot share a file
    return plan


def _notes(
    checkpoint: FloatCheckpoint,
    recipe: Recipe,
    tensors: list[PlannedTensor],
    *,
    samples: int,
    seqlen: int,
    limit: int,
    untied: bool,
) -> list[str]:
    """What is said of the source, and of calibration on so many windows in a model that knows `limit` positions."""
    notes = []
    if isinstance(checkpoint, DecodedCheckpoint):
        notes.append(_decoded_note(tensors))
    if untied:
        notes.append("a rotation unties the output head from the embedding: both are written")
    if any(t.rule is not None and by_threshold(t.rule) for t in tensors):
        notes.append("how many channels stay in float depends on calibration: sizes are those of one in each matrix")
    widest = max((t.layer.K for t in tensors if t.layer), default=0)
    if recipe.needs_calibration and samples * min(seqlen, limit) < widest:
        few = f"{samples * min(seqlen, limit)} calibration tokens do not tell {widest} input channels apart"
        notes.append(f"{few}: give more --samples, or expect little of calibration")
    if recipe.needs_calibration and seqlen > limit:
        notes.append(f"calibration windows of {limit} tokens: the model knows no more positions than that")
    return notes


def _refuse_integers(source: Path) -> None:
    """CheckpointError for a source that is quantized, and has a float original."""
    quantization = quantization_of(source)
    if quantization is not None and not has_no_original(quantization):
        message = f"already quantized ({quantization.get('quant_method')}: config.json has a quantization_config)"
        remedy = "quantize the float original, since rounding twice only loses; or add --requantize"
        raise CheckpointError(message, where=str(source), remedy=remedy)


def _decoded_note(tensors: list[PlannedTensor]) -> str:
    """What is said of a source that is quantized."""
    kinds = sorted({t.stored_as for t in tensors if t.stored_as})
    many = sum(bool(t.stored_as) for t in tensors)
    what = f"the source is quantized itself ({', '.join(kinds)}): {many} matrices are decoded"
    return f"{what}; losses are counted from there"


def _open(source: Path, format_name: str, skeleton: Skeleton) -> FloatCheckpoint:
    """The source's tensors, fused experts apart. FormatError where a GGUF file is to become something else."""
    if not is_gguf(source):
        if quantization_of(source) is not None:
            return DecodedCheckpoint(source, skeleton)
        checkpoint = Checkpoint(source)
        skeleton.split_experts(checkpoint)
        return checkpoint
    if not FORMATS[format_name].one_file:
        remedy = "give the checkpoint's directory, or name OUT.gguf"
        raise FormatError(
            f"a GGUF file has no config.json and tokenizer files, which {format_name} needs", remedy=remedy
        )
    return FloatGgufCheckpoint(source)


def _file_keys(checkpoint: FloatCheckpoint, skeleton: Skeleton, recipe: Recipe) -> dict[str, Any]:
    """What a GGUF file will say beside its tensors; errors as of `metadata`."""
    if isinstance(checkpoint, FloatGgufCheckpoint):
        return carried_keys(checkpoint.weight_source.file, recipe.file_type)
    source = checkpoint.folder
    return metadata(source, skeleton.config, load_tokenizer(source), recipe.file_type)


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
