"""bitwright's own format (`quant_method: bitwright`): holds every Scheme, outlier channels and run-time rotations.

N outputs, K inputs, G groups along K, b bits a code. Tensors of one module, by suffix:

weight_shape         int64 [2]   N, K; packed rows end in padding, so K does not follow from their width
weight_codes         int32 [N, ⌈K·b/32⌉]   b bits a code along K, lowest bit first; signed codes plus 2^(b−1).
                     fp8: float8_e4m3fn [N, K]
                     where the config says `sparse`: only the n weights that weight_mask keeps, row after row, as one stream
                     int32 [⌈n·b/32⌉]; fp8: float8_e4m3fn [n]
weight_mask          `sparse` only, int32 [N, ⌈K/32⌉]: one bit a weight along K, lowest first; 0: the weight is 0
weight_scale         R rows (N; one for group "tensor") of G groups, as the scheme says:
                     f32, f16, bf16   [R, G]
                     e8m0             uint8 [R, G], exponent + 127; 255, which would be NaN, says that the scale is 0
                     e4m3             float8_e4m3fn [R, G], to be divided by weight_scale_outer, float32 [1]
                     k8, k6, k4       one stream of R·G numbers of 8, 6 or 4 bits, int32 [⌈R·G·bits/32⌉]; unless "min" they
                                      are signed and stored plus 2^(bits−1); times weight_scale_outer, float16 [R, ⌈K/256⌉]
                     dq8              uint8 [R, G], index into the 256 values of the dynamic data type; times
                                      weight_scale_outer, float32 [⌈R·G/256⌉], plus weight_scale_mean, float32 [1]
weight_zero_point    "asym", "asym1": one stream of R·G numbers of b bits, each plus 2^(b−1)
weight_minimum       "min": stored as the scales are; k6 and k4 hold −m, with weight_minimum_outer
outlier_columns      int32 [k], ascending input channels; outlier_weight [N, k] in the model's type replaces the dequantized
                     weights of these channels. Both are there, possibly empty, wherever the config says `outliers`
input_scale          float32 [1], and unless "sym" input_zero_point, int32 [1]: static activations, per tensor

quantization_config: {quant_method: "bitwright", format_version: 1, modules: [{scheme, activations, outliers, rotate, sparse,
modules: [names]}]}. `scheme` and `activations` are Schemes as text; `outliers` and `sparse` are true or left out; `rotate` is
the block size of a Hadamard rotation or left out. The names are the model's; names of tensors may lack its prefix, or have
one more.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.files.checkpoint import Spec
from bitwright.formats.format import Layer, Read, differing, recovered
from bitwright.formats.native_reader import (
    FLOATS,
    FP8,
    VERSION,
    Stored,
    check_rotation,
    entry_of,
    inputs_can_be,
    matrix,
    refuse,
    scales_of,
    static_range,
)
from bitwright.numerics.codec import decode, dq8_index, integers_of, is_signed
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.packing import pack, words
from bitwright.numerics.qtensor import Outliers, QTensor, Scales
from bitwright.numerics.scheme import SUPERBLOCK, TENSOR, TOKEN, Scheme

PARTS = (
    "weight_shape", "weight_codes", "weight_scale", "weight_scale_outer", "weight_scale_mean", "weight_zero_point",
    "weight_minimum", "weight_minimum_outer", "weight_mask", "outlier_columns", "outlier_weight", "input_scale",
    "input_zero_point",
)  # fmt: skip
ZERO_SCALE = 255  # e8m0 has no zero; its bit pattern of NaN is used for it


class Native:
    """Weights in any Scheme; activations in float, per token or static per tensor; outlier channels, rotations."""

    name = "bitwright"
    method = "bitwright"
    parts = frozenset(PARTS)
    kv_cache = True
    embeddings = False
    one_file = False

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`: unchanged. FormatError for activations, outliers or a rotation that make no sense."""
        if layer.scheme.group == TOKEN:
            refuse(layer.name, "group 'token' is for inputs, not for weights", "use 'channel' or a group such as g128")
        if not inputs_can_be(layer.activations):
            found = f"inputs cannot be rounded to {layer.activations}"
            refuse(layer.name, found, "int8-token, fp8-token, int8-tensor-asym or alike")
        if not 0 <= layer.outliers <= layer.K:
            refuse(layer.name, f"{layer.outliers} of {layer.K} input channels cannot be outliers", f"0 to {layer.K}")
        check_rotation(layer.rotate, layer.K, layer.name)
        return layer

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        s, N, K, bits = layer.scheme, layer.N, layer.K, layer.scheme.levels.bits
        codes: Spec = (FP8, (N, K)) if s.grid == "fp8" else (torch.int32, (N, words(K, bits)))
        specs: dict[str, Spec] = {"weight_codes": codes, "weight_shape": (torch.int64, (2,))}
        if is_sparse(layer):
            left = N * K - layer.pruned
            specs["weight_codes"] = (FP8, (left,)) if s.grid == "fp8" else (torch.int32, (words(left, bits),))
            specs["weight_mask"] = (torch.int32, (N, words(K, 1)))
        specs |= _table_layout("weight_scale", layer)
        if s.zero == "min":
            specs |= _table_layout("weight_minimum", layer)
        elif not s.symmetric:
            specs["weight_zero_point"] = (torch.int32, (words(_rows(s, N) * s.groups(K), bits),))
        if layer.outliers:
            specs["outlier_columns"] = (torch.int32, (layer.outliers,))
            specs["outlier_weight"] = (dtype, (N, layer.outliers))
        if layer.activations is not None and layer.activations.group == TENSOR:
            specs["input_scale"] = (torch.float32, (1,))
            if layer.activations.zero != "sym":
                specs["input_zero_point"] = (torch.int32, (1,))
        return specs

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`. FormatError if q's outliers or the input scales do not match the layer."""
        s, bits, zero = q.scheme, q.scheme.levels.bits, q.scales.zero
        half = 1 << (bits - 1)
        unsigned = q.codes if s.grid == "fp8" else q.codes.short() + (half if is_signed(s) else 0)
        tensors = {"weight_shape": torch.tensor(q.codes.shape)}
        if is_sparse(layer):
            left = _left(q, layer)
            kept = unsigned[left]
            tensors["weight_codes"] = kept.view(FP8) if s.grid == "fp8" else _stream(kept, bits)
            tensors["weight_mask"] = pack(left.short(), 1)
        else:
            tensors["weight_codes"] = unsigned.view(FP8) if s.grid == "fp8" else pack(unsigned, bits)
        tensors |= _table_tensors("weight_scale", q.scales.scale, q.scales.outer, q)
        if s.zero == "min" and zero is not None:
            tensors |= _table_tensors("weight_minimum", zero, q.scales.outer_zero, q)
        elif zero is not None:
            tensors["weight_zero_point"] = _stream(zero.int() + half, bits)
        return tensors | _outlier_tensors(q, layer, dtype) | _input_tensors(inputs, layer)

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`: modules with equal settings share an entry; modules that are not listed are in float."""
        alike: dict[tuple[str, str, bool, int, bool], list[str]] = defaultdict(list)
        for layer in layers:
            activations, outliers = str(layer.activations or ""), layer.outliers > 0  # their number is in the tensors
            alike[(str(layer.scheme), activations, outliers, layer.rotate, is_sparse(layer))].append(layer.name)
        entries = []
        for (scheme, activations, outliers, rotate, sparse), names in alike.items():
            more = {"activations": activations, "outliers": outliers, "rotate": rotate, "sparse": sparse}
            entries.append({"scheme": scheme, **{key: value for key, value in more.items() if value}, "modules": names})
        return {"quant_method": self.method, "format_version": VERSION, "modules": entries}

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "weight_codes" in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Format.input_quantization`."""
        entry, stored = entry_of(config, name), Stored(name, read)
        if entry.activations is None and not entry.rotate:
            return None
        K = stored.shape()[1]
        check_rotation(entry.rotate, K, name)
        columns = torch.from_numpy(stored.columns(K)) if entry.outliers else None
        return InputQuantization(entry.activations, static_range(stored, entry.activations), columns, entry.rotate)

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Format.decode`: by native_reader.py, which shares no packing code with this file."""
        return torch.from_numpy(matrix(entry_of(config, name), Stored(name, tensors.get)))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Format.quantized`."""
        entry, stored = entry_of(config, name), Stored(name, tensors.get)
        outliers = None
        if entry.outliers:
            outliers = Outliers(torch.from_numpy(stored.columns(stored.shape()[1])), tensors["outlier_weight"])
        return recovered(
            torch.from_numpy(matrix(entry, stored)), entry.scheme, scales_of(entry, stored), name, outliers
        )


# -------------------------------------------------------------------------------------------------------------- write


def is_sparse(layer: Layer) -> bool:
    """Whether a mask and the codes of the weights that are left take less than all codes."""
    bits, all_of = layer.scheme.levels.bits, layer.N * layer.K
    return all_of + bits * (all_of - layer.pruned) < bits * all_of


def _left(q: QTensor, layer: Layer) -> Tensor:
    """The mask [N, K] of the weights whose codes are stored: all but the first `layer.pruned` zeros, since any may be."""
    zero = decode(replace(q, shape=tuple(q.codes.shape), outliers=None)).reshape(-1) == 0
    gone = zero & (zero.cumsum(0) <= layer.pruned)
    if int(gone.sum()) < layer.pruned:
        refuse(layer.name, f"{int(gone.sum())} zeros, not the {layer.pruned} that were planned", "report this defect")
    return ~gone.view(q.codes.shape)


def _rows(s: Scheme, N: int) -> int:
    """R, the number of rows of scales: N, or 1 for a scheme per tensor."""
    return 1 if s.group == TENSOR else N


def _table_layout(name: str, layer: Layer) -> dict[str, Spec]:
    """Layout of the scales, or of the minima, which are stored in the same way."""
    s, R = layer.scheme, _rows(layer.scheme, layer.N)
    shape = (R, s.groups(layer.K))
    count, outer = shape[0] * shape[1], f"{name}_outer"
    match s.scale:
        case "e8m0":
            return {name: (torch.uint8, shape)}
        case "e4m3":
            return {name: (FP8, shape), outer: (torch.float32, (1,))}
        case "dq8":
            blocks = -(-count // SUPERBLOCK)
            single: Spec = (torch.float32, (1,))
            return {name: (torch.uint8, shape), outer: (torch.float32, (blocks,)), f"{name}_mean": single}
        case "k8" | "k6" | "k4":
            packed: Spec = (torch.int32, (words(count, int(s.scale[1:])),))
            return {name: packed, outer: (torch.float16, (R, -(-layer.K // SUPERBLOCK)))}
        case encoding:
            return {name: (FLOATS[encoding], shape)}


def _table_tensors(name: str, table: Tensor, outer: Tensor | None, q: QTensor) -> dict[str, Tensor]:
    """The tensors of `_table_layout`, filled. table: scales or minima [R, G]."""
    s = q.scheme
    if s.scale in FLOATS:
        return {name: table.to(FLOATS[s.scale])}
    if s.scale == "e8m0":
        exponents = torch.frexp(table).exponent + 126
        return {name: exponents.masked_fill(table == 0, ZERO_SCALE).to(torch.uint8)}
    assert outer is not None  # every two-level scale encoding has one
    if s.scale == "e4m3":
        return {name: (table * outer).to(FP8), f"{name}_outer": outer.reshape(1)}
    if s.scale == "dq8":
        assert q.scales.outer_zero is not None
        index = dq8_index(table, outer, q.scales.outer_zero)
        return {name: index, f"{name}_outer": outer.reshape(-1), f"{name}_mean": q.scales.outer_zero.reshape(1)}
    bits = int(s.scale[1:])
    integers = integers_of(table, outer, s).int()
    unsigned = integers + (1 << (bits - 1)) if s.symmetric else integers.abs()  # minima are negative
    return {name: _stream(unsigned, bits), f"{name}_outer": outer.to(torch.float16)}


def _stream(numbers: Tensor, bits: int) -> Tensor:
    """Pack numbers of any shape as one bit stream, without padding at the ends of rows."""
    return pack(numbers.reshape(1, -1), bits)[0]


def _outlier_tensors(q: QTensor, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outlier channels and their float weights; {} if q.outliers is None. FormatError if their number differs."""
    count = 0 if q.outliers is None else len(q.outliers.columns)
    if count != layer.outliers:
        refuse(layer.name, f"{count} outlier columns, not the {layer.outliers} that were planned", "plan as many")
    if q.outliers is None:
        return {}
    return {"outlier_columns": q.outliers.columns.int(), "outlier_weight": q.outliers.weight.to(dtype)}


def _input_tensors(inputs: Scales | None, layer: Layer) -> dict[str, Tensor]:
    """The scale and zero point of static activations; {} for others."""
    if layer.activations is None or layer.activations.group != TENSOR:
        return {}
    if inputs is None:
        refuse(layer.name, "its inputs have no range to be rounded to", "calibrate, or round them by token")
    zero = {} if inputs.zero is None else {"input_zero_point": inputs.zero.reshape(1).int()}
    return {"input_scale": inputs.scale.reshape(1).float(), **zero}
