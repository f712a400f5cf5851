"""A run's plan: what becomes of every tensor, and the sizes that follow from it.

Made by preflight.py, read by everything that carries a run out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bitwright.files.checkpoint import Spec, count, file_bytes, spec_bytes
from bitwright.files.joined import joined
from bitwright.formats import Format, gguf_writer
from bitwright.formats.compressed_tensors import arguments
from bitwright.formats.gguf_members import Member, described
from bitwright.gguf.tensor_names import is_unused
from bitwright.models.adapter import Adapter
from bitwright.models.decoded_source import FloatCheckpoint
from bitwright.models.families import DECOMPRESSED
from bitwright.models.kv_cache import SCALES as KV_SCALES
from bitwright.models.skeleton import Skeleton
from bitwright.plan.planned_tensor import KEPT, LEFT_OUT, QUANTIZED, PlannedTensor
from bitwright.plan.recipe import Recipe
from bitwright.transforms.rotation import Rotation


@dataclass(frozen=True)
class Plan:
    """A run's plan: everything known before the first weight is read."""

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
    file_keys: Mapping[str, Any] = field(default_factory=dict, repr=False)  # keys of a format that is one file (GGUF)
    adapter: Adapter | None = None  # added to the source's weights as they are read
    peak_memory: int = 0  # estimate of the largest resident set, in bytes (see peak_memory.py)

    @property
    def calibrates_embeddings(self) -> bool:
        """Whether the embedding or the output head is rounded by a method that needs statistics of them."""
        rules = [t.rule for t in self.tensors if t.block is None and t.layer is not None]
        return any(rule is not None and rule.needs_calibration for rule in rules)

    @property
    def calibrated(self) -> bool:
        """Whether the run needs calibration text."""
        return self.recipe.needs_calibration

    def shard(self, index: int) -> list[PlannedTensor]:
        """The tensors of shard `index`: there is one shard a block, and a last one for all tensors outside the blocks."""
        block = index if index < len(self.skeleton) else None
        return [t for t in self.tensors if t.block == block and t.action != LEFT_OUT]

    def specs(self, tensors: list[PlannedTensor]) -> dict[str, Spec]:
        """What the files will hold for these tensors: types and shapes by name."""
        specs: dict[str, Spec] = {}
        for t in tensors:
            if t.layer is None:
                specs[t.source] = (t.dtype, t.shape)
            else:
                specs |= {f"{t.stem}.{suffix}": spec for suffix, spec in self.format.layout(t.layer, t.dtype).items()}
        return specs

    def kv_specs(self, index: int) -> dict[str, Spec]:
        """Types and shapes of the scales of block `index`'s KV cache, by name; none if the cache stays in float."""
        attention = self.skeleton.attention_name(index) if self.recipe.kv_cache and index < len(self.skeleton) else None
        inside = (t for t in self.shard(index) if attention and t.parameter.startswith(f"{attention}."))
        some = next(inside, None)
        if attention is None or some is None:
            return {}
        stem = some.source.removesuffix(some.parameter.removeprefix(attention))
        return {f"{stem}.{scale}": (some.dtype, (1,)) for scale in KV_SCALES}

    def shard_specs(self, index: int) -> dict[str, Spec]:
        """Types and shapes of all that a shard will hold, by name."""
        return self.specs(self.shard(index)) | self.kv_specs(index)

    @property
    def bytes(self) -> int:
        """Exact size in bytes of all weight files together, or of the one file with its keys."""
        if self.format.one_file:
            stored = described(self.skeleton.config, self.members)
            return gguf_writer.file_bytes(self.file_keys, [(name, t.ndim, t.nbytes) for name, _, t in stored])
        return sum(file_bytes(specs) for specs in joined(self._shards()).values())

    @property
    def disk_bytes(self) -> int:
        """Bytes that the disk must hold at most: all weight files, and one shard a second time while it is joined to them."""
        return self.bytes if self.format.one_file else self.bytes + max(map(file_bytes, self._shards()))

    def _shards(self) -> list[dict[str, Spec]]:
        return [self.shard_specs(i) for i in range(len(self.skeleton) + 1)]

    @property
    def members(self) -> list[Member]:
        """The parameters that a GGUF file will hold."""
        return [Member(t.parameter, t.dtype, t.shape, t.layer) for t in self._written()]

    def _written(self) -> list[PlannedTensor]:
        return [t for t in self.tensors if t.action != LEFT_OUT]

    @property
    def parameters(self) -> int:
        """Parameters of the source; tied ones count once, computed buffers do not."""
        tied = self.skeleton.tied_names()
        own = (t for t in self._written() if not t.made_of)
        return sum(count(t.shape) for t in own if t.parameter not in tied)

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes of all weight data / parameters."""
        return 8 * sum(map(spec_bytes, self._shards())) / self.parameters

    @property
    def statistics_bytes(self) -> int:
        """Most bytes that the float model's statistics take on disk: a Gram for every matrix."""
        return sum(4 * t.layer.K * t.layer.K for t in self.tensors if t.layer is not None) if self.calibrated else 0

    @property
    def quantization_config(self) -> dict[str, Any]:
        """config.json's quantization_config; FormatError if one checkpoint cannot hold these layers together."""
        named = self.format.one_file  # there is no config.json: entries are looked up by the names in the file
        layers = [replace(t.layer, name=t.stem) if named else t.layer for t in self.tensors if t.layer is not None]
        unused = {t.stem for t in self.tensors if is_unused(t.source) and len(t.shape) == 2}
        names = set(self.skeleton.linear_names()) | unused
        kept = [t.parameter.removesuffix(".weight") for t in self.tensors if t.layer is None]
        outside = [name for name in names if name in kept or name not in {layer.name for layer in layers}]
        config = self.format.config(layers, sorted(outside))
        if self.format.name == "compressed-tensors" and self.skeleton.config.model_type in DECOMPRESSED:
            config |= {"dequantize": True}
        return config if self.recipe.kv_cache is None else config | {"kv_cache_scheme": arguments(self.recipe.kv_cache)}

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `--dry-run`."""
        counts = {action: sum(t.action == action for t in self.tensors) for action in (QUANTIZED, KEPT, LEFT_OUT)}
        schemes = sorted({str(t.layer.scheme) for t in self.tensors if t.layer})
        return {
            "model": str(self.source),
            "format": self.format.name,
            "schemes": schemes,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "peak_memory_bytes": self.peak_memory,
            **counts,
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """The plan in one line, then its notes."""
        schemes = ", ".join(sorted({str(t.layer.scheme) for t in self.tensors if t.layer}))
        first = (
            f"{self.parameters:,} parameters to {self.format.name}, {schemes}: {self.bytes / 1e6:,.1f} MB, "
            f"{self.bits_per_weight:.2f} bits a weight, about {self.peak_memory / 1e6:,.0f} MB of memory"
        )
        return "\n".join([first, *(f"note: {note}" for note in self.notes)])
