"""Convert a quantized checkpoint to another format with exactly the same numbers, or refuse with the reason.

Formats express the same numbers in different ways: a negative scale as a positive one with a zero point of −1, two-level
scales of the k-quants as scales in float32. Everything is written for a model in float32, where all of it is exact; the
embedding and the output head, which directories hold in float, are decoded.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from bitwright.errors import BitwrightError, FormatError
from bitwright.files.checkpoint import count
from bitwright.files.model_path import is_gguf
from bitwright.formats import FORMATS, Format, Layer
from bitwright.kernels.matmul import FACTORS
from bitwright.models.config import read_config
from bitwright.models.families import auto_class
from bitwright.models.gguf_source import check_companions
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import names_in, open_weights
from bitwright.numerics.codec import decode, per_column, values
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import GRIDS, Zero
from bitwright.pipeline.from_gguf import config_of_file, write_companions
from bitwright.pipeline.joining import join
from bitwright.pipeline.ledger import Entry
from bitwright.pipeline.model_card import Card
from bitwright.pipeline.work_in_progress import CARD, Verification, WorkInProgress
from bitwright.plan.planned_tensor import KEPT, QUANTIZED

FLOATS = ("f32", "f16", "bf16")
EXACT = torch.float32  # holds every decoded weight and every scale exactly


@dataclass(frozen=True)
class Packed:
    """A matrix as the format will store it."""

    layer: Layer
    q: QTensor


def expressed(q: QTensor, zero: Zero, scale: str) -> QTensor | None:
    """The same numbers with another kind of zero and encoding of scales; None where that cannot hold them."""
    s, grid = q.scales, q.scheme.levels
    scales = s if scale == q.scheme.scale else Scales(s.scale, s.zero)
    same = {
        "sym": q.scheme.zero == "signed" and bool((s.scale >= 0).all()),
        "asym": q.scheme.zero == "asym1",
        "asym1": q.scheme.zero == "asym" and s.zero is not None and bool((s.zero > grid.lo).all()),
        q.scheme.zero: True,
    }
    if same.get(zero, False):
        return replace(q, scheme=replace(q.scheme, zero=zero, scale=scale), scales=scales)
    if zero not in ("asym", "asym1") or q.scheme.zero != "signed" or grid.levels is not None:
        return None
    turned = s.scale < 0  # s·c = |s|·(−c − 1 + 1)
    codes = torch.where(per_column(turned, q.scheme, q.codes.shape[1]), -1 - q.codes, q.codes)
    scheme = replace(q.scheme, zero=zero, scale=scale)
    return replace(q, codes=codes, scheme=scheme, scales=Scales(s.scale.abs(), -turned.float()))


def in_integers(q: QTensor, bits: int) -> QTensor | None:
    """The same numbers as integer codes of `bits` bits with float scales; None where they are not integers or do not fit."""
    grid, wide = q.scheme.levels, GRIDS[f"int{bits}"]
    if q.scheme.zero == "min" or q.scheme.grid in ("nf4", "fp8"):
        return None
    factor = FACTORS.get(q.scheme.grid, 1.0)
    numbers = (grid.lo, grid.hi) if grid.levels is None else [level * factor for level in grid.levels]
    if min(numbers) < wide.lo or max(numbers) > wide.hi:
        return None
    codes = (values(q.codes, q.scheme) * factor).to(torch.int8)
    scale = q.scheme.scale if q.scheme.scale in FLOATS and factor == 1 else "f32"
    scheme = replace(q.scheme, grid=f"int{bits}", scale=scale)
    return replace(q, codes=codes, scheme=scheme, scales=Scales(q.scales.scale / factor, q.scales.zero))


def _ways(q: QTensor) -> Iterator[QTensor]:
    """The same numbers in other schemes: first in their own grid, then as integers, the fewest bits first."""
    kinds: tuple[Zero, ...] = (q.scheme.zero, "sym", "asym", "asym1")
    wider = (in_integers(q, bits) for bits in range(2, 9) if q.scheme.grid != f"int{bits}")
    for same in itertools.chain([q], (other for other in wider if other is not None)):
        for scale, zero in itertools.product(_encodings(same), dict.fromkeys(kinds)):
            way = expressed(same, zero, scale)
            if way is not None:
                yield way


def _encodings(q: QTensor) -> list[str]:
    """How its scales may be stored as they are: as now, in float32, in half of that where nothing is lost."""
    if q.scheme.scale in ("e8m0", "e4m3"):
        return [q.scheme.scale]
    halved = torch.equal(q.scales.scale.half().float(), q.scales.scale) and q.scheme.zero != "min"
    return list(dict.fromkeys([q.scheme.scale, "f32", *(["f16"] if halved else [])]))


def packed(q: QTensor, name: str, format_: Format, *, transposed: bool) -> Packed:
    """A matrix in the format's terms. FormatError, with the format's own reason, if it cannot hold these numbers."""
    if q.order is not None:
        remedy = "use the file as it is, or quantize the original without desc_act"
        message = "its columns are in an order of their own (desc_act, or llama.cpp's order of heads)"
        raise FormatError(message, where=name, remedy=remedy)
    reason = None
    N, K = q.codes.shape
    for same in _ways(q):
        try:
            layer = format_.adapt(Layer(name, N, K, same.scheme, transposed), EXACT)
        except FormatError as error:
            reason = reason or error
            continue
        second = (
            same.scheme.scale in (*FLOATS, "e8m0") or same.scales.outer is not None
        )  # what its scales stand under is known
        if second and layer.scheme == same.scheme and torch.equal(decode(same), decode(q)):
            return Packed(layer, same)
    why = q.scheme if reason is None else reason.message
    message = f"{format_.name} cannot hold these numbers as they are: {why}"
    raise FormatError(message, where=name, remedy="use --format bitwright, which holds every scheme")


@dataclass
class _Shard:
    """The content of one file: matrices in the new format, tensors in float, and their ledger entries."""

    packed: list[Packed]
    floats: dict[str, Tensor]
    entries: list[Entry]

    def tensors(self, format_: Format) -> dict[str, Tensor]:
        """All tensors of the file by name."""
        parts = {p.layer.name: format_.encode(p.q, p.layer, EXACT) for p in self.packed}
        return self.floats | {f"{module}.{suffix}": t for module, own in parts.items() for suffix, t in own.items()}


def repack(model: Path, out: Path, format_name: str) -> dict[str, Any]:
    """Write the quantized directory or GGUF file `model` as the directory `out` in another format.

    Gives {out, bytes, tensors, notes}.
    FormatError for numbers that the format cannot hold, for a source with quantized activations, and for one that is not
    quantized; CheckpointError as of `WeightSource`.
    """
    format_, source = FORMATS[format_name], _Source(model)
    depth = len(source.skeleton)
    place = WorkInProgress(out, {"convert": format_name}, needed=0, resume=False)
    layers: list[Layer] = []
    ledger: list[Entry] = []
    try:
        for index in range(depth + 1):
            shard = source.shard(index, format_)
            layers += [p.layer for p in shard.packed]
            ledger += shard.entries
            meant = {p.layer.name: p.q for p in shard.packed}
            config = format_.config([p.layer for p in shard.packed], []) if meant else {}
            verify = Verification(format_, config, meant, shard.floats)
            put = partial(place.put_shard, index, shard.tensors(format_), verify)
            place.commit(index, put, shard.entries, None)
        if not layers:
            remedy = "give a quantized one; `bitwright quantize` rounds a float one"
            raise FormatError("there is nothing quantized in it", where=str(model), remedy=remedy)
    except BitwrightError:
        place.abandon()
        raise
    total = join(place, depth + 1)
    outside = sorted(set(source.skeleton.linear_names()) - {layer.name for layer in layers})
    config = format_.config(layers, outside)
    said = source.config()
    place.write_json("config.json", said | {"quantization_config": config})
    bits = 8 * sum(entry.bytes for entry in ledger) / sum(count(entry.shape) for entry in ledger)
    place.write_text(
        CARD,
        str(Card(said, format_name, bits, ledger, source.skeleton.predicts, loader=auto_class(source.skeleton.config))),
    )
    if format_name == "gptq":
        place.write_json("quantize_config.json", config)
    if is_gguf(model):
        write_companions(model, source.skeleton, place)
    place.finish(model, ledger)
    return {"out": str(out), "bytes": total, "tensors": len(ledger), "notes": source.notes}


class _Source:
    """The quantized checkpoint to convert, shard by shard."""

    def __init__(self, model: Path) -> None:
        self.model, self.weight_source = model, open_weights(model)
        if is_gguf(model):
            check_companions(model)
        self.skeleton = Skeleton(read_config(model), EXACT)
        self.names = names_in(self.weight_source, self.skeleton)
        self._floats: list[str] = []  # notes on tensors that were quantized and become float
        self._sizes: dict[tuple[str, str], list[int]] = {}  # (kind, scheme): matrices, bytes before, after

    def shard(self, index: int, format_: Format) -> _Shard:
        """Block `index`; after the last, the tensors outside the blocks."""
        inside = index < len(self.skeleton)
        modules = self.skeleton.linears(index) if inside else {}
        shard = _Shard([], {}, [])
        for parameter in self.skeleton.state_names(index) if inside else self.skeleton.outer_names():
            if parameter not in self.names:
                continue
            source, module = self.names[parameter], modules.get(parameter.removesuffix(".weight"))
            if self.weight_source.input_quantization(source) is not None:
                raise self._changed_inputs(source)
            q = None if module is None or not parameter.endswith(".weight") else self.weight_source.quantized(source)
            if q is None:
                shard.floats[parameter] = self._float(parameter, source)
                shard.entries.append(_entry(parameter, shard.floats[parameter]))
            else:
                transposed = isinstance(module, Conv1D)
                shard.packed.append(packed(q, parameter.removesuffix(".weight"), format_, transposed=transposed))
                shard.entries.append(_packed_entry(shard.packed[-1], format_))
                self._count(source, shard.entries[-1])
        return shard

    def _changed_inputs(self, source: str) -> FormatError:
        """The error for a matrix whose inputs are rounded or rotated: its weights alone can be had by rounding once more."""
        q, remedy = self.weight_source.quantized(source), "quantize the original to the format you need"
        if q is not None and not is_gguf(self.model):
            again = f"bitwright quantize {self.model} OUT --requantize --scheme {q.scheme} --method rtn --calib none"
            remedy += f"; or round the weights once more, which hardly changes them, with inputs in float: {again}"
        return FormatError("its engine changes the inputs too, which is not converted", where=source, remedy=remedy)

    def _count(self, source: str, entry: Entry) -> None:
        kind, before = self.weight_source.describe(source)
        sizes = self._sizes.setdefault((kind, entry.scheme), [0, 0, 0])
        for i, more in enumerate((1, before, entry.bytes)):
            sizes[i] += more

    @property
    def notes(self) -> list[str]:
        """Notes on matrices that take more bytes than in the source."""
        grown = [(kinds, sizes) for kinds, sizes in self._sizes.items() if sizes[2] > sizes[1]]
        return self._floats + [
            f"{n} matrices are {kind} in the source, {before:,} bytes, and {scheme} here, {after:,}"
            for (kind, scheme), (n, before, after) in grown
        ]

    def _float(self, parameter: str, source: str) -> Tensor:
        """A tensor that stays in float, or is decoded because directories hold it in float."""
        tensor = self.weight_source.read(source).contiguous()
        kind, nbytes = self.weight_source.describe(source)
        if nbytes < tensor.nbytes:
            self._floats.append(
                f"{parameter} is {kind} in the source, {nbytes:,} bytes, and float here, {tensor.nbytes:,}"
            )
        return tensor

    def config(self) -> dict[str, Any]:
        """config.json without quantization_config."""
        if is_gguf(self.model):
            said = config_of_file(self.skeleton)
        else:
            said = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        stale = ("quantization_config", "torch_dtype")
        tied = {"tie_word_embeddings": bool(self.skeleton.config.tie_word_embeddings)}
        return {key: value for key, value in said.items() if key not in stale} | {"dtype": "float32", **tied}


def _entry(name: str, tensor: Tensor) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Entry(name, tuple(tensor.shape), dtype, KEPT, "as in the source", bytes=tensor.nbytes)


def _packed_entry(p: Packed, format_: Format) -> Entry:
    nbytes = sum(dtype.itemsize * count(shape) for dtype, shape in format_.layout(p.layer, EXACT).values())
    scheme, shape = str(p.layer.scheme), (p.layer.N, p.layer.K)
    return Entry(f"{p.layer.name}.weight", shape, "float32", QUANTIZED, "as in the source", scheme, bytes=nbytes)
