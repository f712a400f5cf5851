"""compressed-tensors, the format of llm-compressor, which transformers and vLLM load: writer and reader.

pack-quantized        b-bit codes, plus 2^(b−1), packed densely along K in 32-bit words; zero points likewise along N
int-quantized         int8 weights [N, K], where the activations are int8 too
float-quantized       float8_e4m3fn weights [N, K]
mxfp4-, nvfp4-pack-quantized  two e2m1 codes in a byte, the first in the low 4 bits

Scales have the model's own float type, because transformers loads them in that. Written layers are verified by the
decompressors of the compressed-tensors library ("the library" below).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import CheckpointError, FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.config_groups import (
    ORDER,
    group_of,
    inferred_container,
    refuse_transforms,
    scheme_of,
    scheme_of_inputs,
)
from bitwright.formats.format import (
    FLOAT_NAMES,
    Layer,
    Read,
    differing,
    recovered,
    refuse_decomposed,
    refuse_short_groups,
)
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.packing import pack, unpack, words
from bitwright.numerics.qtensor import QTensor, Scales, permuted, unpermuted
from bitwright.numerics.scheme import TENSOR, TOKEN, Scheme

PACKED, INT8, FP8 = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, NVFP4 = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
READ = (PACKED, INT8, FP8, MXFP4, NVFP4, "naive-quantized", "mxfp8-quantized")
PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale", "weight_g_idx",
    "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip
INDEX = "weight_g_idx"
NARROW = {INT8: torch.int8, FP8: torch.float8_e4m3fn}  # formats with one byte for each weight, not packed


class CompressedTensors:
    """Weights in 2- to 8-bit integers, ternary, FP8, MXFP4 or NVFP4; activations in float, or int8 or FP8, per token
    (dynamic) or per tensor (static)."""

    name = "compressed-tensors"
    method = "compressed-tensors"
    parts = frozenset(PARTS)
    kv_cache = True
    embeddings = False
    one_file = False

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`."""
        scheme = layer.scheme
        _container(layer)
        refuse_decomposed(layer, self.name)
        if layer.transposed:
            raise FormatError(
                "its module is a Conv1D, which loaders of compressed-tensors do not replace",
                where=layer.name,
                remedy="use --format gptq",
            )
        refuse_short_groups(layer)
        scheme = replace(scheme, zero="sym") if scheme.zero == "signed" else scheme
        plain = scheme.scale in ("f32", "f16", "bf16")
        return replace(layer, scheme=scheme.with_scale(FLOAT_NAMES[dtype]) if plain else scheme)

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        return self._weight_layout(layer, dtype) | _input_layout(layer.activations, dtype)

    def _weight_layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        N, K, scheme = layer.N, layer.K, layer.scheme
        G, kind = scheme.groups(K), _container(layer)
        scale: tuple[int, ...] = (1,) if scheme.group == "tensor" else (N, G)
        if kind == PACKED:
            bits = scheme.levels.bits
            specs: dict[str, Spec] = {
                "weight_packed": (torch.int32, (N, words(K, bits))),
                "weight_scale": (dtype, scale),
                "weight_shape": (torch.int64, (2,)),
            }
            if scheme.zero != "sym":
                specs["weight_zero_point"] = (torch.int32, (words(N, bits), G))
            return specs
        if kind in NARROW:
            return {"weight": (NARROW[kind], (N, K)), "weight_scale": (dtype, scale)}
        specs = {"weight_packed": (torch.uint8, (N, K // 2)), "weight_scale": (torch.uint8, (N, G))}
        if kind == NVFP4:
            specs["weight_scale"] = (torch.float8_e4m3fn, (N, G))
            specs["weight_global_scale"] = (torch.float32, (1,))
        return specs

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return self._weight_tensors(q, layer, dtype) | _input_tensors(inputs, dtype)

    def _weight_tensors(self, q: QTensor, layer: Layer, dtype: torch.dtype) -> dict[str, Tensor]:
        N, K = q.codes.shape
        s, kind = q.scales, _container(layer)
        scale = s.scale.reshape(1) if q.scheme.group == "tensor" else s.scale
        if kind == PACKED:
            bits = q.scheme.levels.bits
            half = 1 << (bits - 1)
            tensors = {
                "weight_packed": pack(q.codes.short() + half, bits),
                "weight_scale": scale.to(dtype),
                "weight_shape": torch.tensor([N, K]),
            }
            if s.zero is not None:
                tensors["weight_zero_point"] = pack(s.zero.T.short() + half, bits).T.contiguous()
            return tensors
        if kind in NARROW:
            return {"weight": q.codes.view(NARROW[kind]), "weight_scale": scale.to(dtype)}
        packed = q.codes[:, ::2] | (q.codes[:, 1::2] << 4)
        if kind == MXFP4:
            exponents = torch.where(s.scale > 0, s.scale, 2.0**-127).log2().round() + 127
            return {"weight_packed": packed, "weight_scale": exponents.to(torch.uint8)}
        assert s.outer is not None
        local = (s.scale * s.outer).to(torch.float8_e4m3fn)
        return {"weight_packed": packed, "weight_scale": local, "weight_global_scale": s.outer.reshape(1)}

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`: one config group for each pair of weight and activation schemes. A single group targets
        "Linear", and `ignore` lists the exceptions."""
        alike: dict[tuple[Scheme, Scheme | None], list[Layer]] = defaultdict(list)
        for layer in layers:
            alike[(layer.scheme, layer.activations)].append(layer)
        kinds = {_container(group[0]) for group in alike.values()}
        groups = {}
        for i, ((scheme, inputs), members) in enumerate(alike.items()):
            targets = ["Linear"] if len(alike) == 1 else [layer.name for layer in members]
            groups[f"group_{i}"] = {
                "targets": targets, "weights": arguments(scheme),
                "input_activations": None if inputs is None else arguments(inputs),
                "output_activations": None, "format": _container(members[0]),
            }  # fmt: skip
        return {
            "quant_method": self.method,
            "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": kept,
            **({"dequantize": True} if any(scheme.zero != "sym" for scheme, _ in alike) else {}),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "weight_packed" in dtypes or ("weight_scale" in dtypes and dtypes.get("weight") in NARROW.values())

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`: the config group that the library's own matching selects."""
        refuse_transforms(config, name)
        group = group_of(config, name, kind)
        container = group.get("format") or config.get("format")
        container = inferred_container(group, kind) if container in (None, "mixed-precision") else container
        if container not in READ:
            remedy = f"known: {', '.join(READ)}"
            raise FormatError(f"its container {container!r} is not read here", where=name, remedy=remedy)
        return {**config, "format": container, "ignore": [], "config_groups": {"group_0": {**group, "targets": [name]}}}

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Format.input_quantization`."""
        found = group_of(config, name).get("input_activations")
        if found is None:
            return None
        scheme = scheme_of_inputs(found, name)
        if scheme.scale == "e4m3":
            outer = read("input_global_scale")
            return InputQuantization(scheme, outer=(torch.ones(1) if outer is None else outer.float()).view(1, 1))
        if found["dynamic"]:
            return InputQuantization(scheme)
        scale, zero = read("input_scale"), read("input_zero_point")
        if scale is None or (zero is None and not found["symmetric"]):
            raise FormatError("its inputs are rounded to a range that the file lacks", where=name)
        return InputQuantization(
            scheme, Scales(scale.float().view(1, 1), None if zero is None else zero.float().view(1, 1))
        )

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Format.decode`: by the library's own decompressors, as the config specifies."""
        from compressed_tensors.compressors.base import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        config = self.module_config(config, name)
        group = group_of(config, name)
        _check_parts(group, name, tensors)
        scheme_of(group["weights"], name)
        order, sorted_ = _by_group(group, name, tensors)
        compressor = BaseCompressor.get_value_from_registry(config["format"])
        sorted_ = _zero_points_packed(group, sorted_)
        group = {**group, "weights": {key: value for key, value in group["weights"].items() if key != ORDER}}
        weight: Tensor = compressor.decompress(dict(sorted_), QuantizationScheme(**group))["weight"]
        return unpermuted(weight, order)

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Format.quantized`."""
        # with float32 scales the library returns float32 weights, not rounded to the model's own type
        exact = {
            suffix: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for suffix, t in tensors.items()
        }
        config = self.module_config(config, name)
        group = group_of(config, name)
        scheme, block = scheme_of(group["weights"], name), group["weights"].get("block_structure") or [0]
        w, (order, _) = self.decode(config, name, exact), _by_group(group, name, exact)
        scales = _scales(scheme, exact, block[0])
        q = recovered(permuted(w, order), scheme, scales, name)
        return replace(q, order=order)


def _check_parts(group: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> None:
    """CheckpointError if a tensor that the config requires is missing, or one that it does not provide for is there.

    The library would silently ignore a missing zero point. Zero points that are all 0 are allowed in symmetric schemes.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    packed = "weight_packed" in tensors
    needed = {"weight_packed" if packed else "weight", "weight_scale"}
    needed |= {"weight_shape"} if packed and weights["type"] == "int" else set()
    needed |= set() if weights["symmetric"] else {"weight_zero_point"}
    needed |= {"weight_global_scale"} if weights["strategy"] == "tensor_group" else set()
    needed |= {INDEX} if ORDER in weights else set()
    missing = sorted(needed - tensors.keys())
    if missing:
        what = f" ({ORDER} {weights[ORDER]})" if missing[0] == INDEX else ""
        message = f"its quantization_config{what} promises tensor {name}.{missing[0]}, which is missing"
        raise CheckpointError(message, where=name, remedy="get a good copy of the checkpoint")
    known = needed | ({"input_scale", "input_zero_point", "input_global_scale"} if inputs else set())
    known |= {s for s in ("weight_zero_point", "input_zero_point") if s in tensors and not tensors[s].any()}
    known |= {INDEX} if INDEX in tensors and bool((tensors[INDEX] == -1).all()) else set()  # made, and not used
    odd = sorted(tensors.keys() - known)
    if odd:
        message = f"tensor {name}.{odd[0]} is none that its quantization_config has a use for"
        raise CheckpointError(message, where=name, remedy="get a good copy of the checkpoint")


def _by_group(group: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The order [K] of columns in which those of a group are neighbours, and the tensors with the columns so; None: they are.

    As llm-compressor had it until August 2026 (actorder "group"): columns lie as the module's inputs do, and weight_g_idx [K]
    says the group of each. FormatError for groups that do not fit.
    """
    plain = {suffix: tensor for suffix, tensor in tensors.items() if suffix != INDEX}
    if ORDER not in group["weights"]:
        return None, plain
    bits, length, K = (
        group["weights"]["num_bits"],
        group["weights"].get("group_size"),
        int(tensors["weight_shape"][1]),
    )
    groups, order = tensors[INDEX].long().sort(stable=True)
    if "weight_packed" not in tensors or not length or not torch.equal(groups, torch.arange(K) // length):
        remedy = "get a good copy of the checkpoint"
        raise FormatError(f"its columns are not in groups of {length} ({INDEX})", where=name, remedy=remedy)
    codes = unpack(tensors["weight_packed"], bits, K)[:, order]
    return order, plain | {"weight_packed": pack(codes, bits)}


def _zero_points_packed(group: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the zero points of packed codes packed too: until 2025 the library stored them as int8 [N, G]."""
    zero, bits = tensors.get("weight_zero_point"), group["weights"]["num_bits"]
    if zero is None or zero.dtype != torch.int8 or "weight_packed" not in tensors or zero.ndim != 2:
        return tensors
    return tensors | {"weight_zero_point": pack(zero.T.short() + (1 << (bits - 1)), bits).T.contiguous()}


def _scales(scheme: Scheme, tensors: dict[str, Tensor], block: int = 0) -> Scales:
    """Scales and signed zero points of a module's tensors. block: rows that share a scale, for FP8 blocks; 0: no blocks."""
    given, N = (
        tensors["weight_scale"].float(),
        len(tensors["weight_packed" if "weight_packed" in tensors else "weight"]),
    )
    if scheme.scale == "e8m0":
        return Scales(torch.exp2(given - 127))
    if block:
        return Scales(given.repeat_interleave(block, 0)[:N].contiguous())
    if scheme.scale == "e4m3":
        outer = tensors["weight_global_scale"].float()
        return Scales(given / outer, outer=outer.view(1, 1))
    scale = given.reshape(1, 1) if scheme.group == TENSOR else given.reshape(N, -1)
    if scheme.zero == "sym":
        return Scales(scale)
    half, zero = 1 << (scheme.levels.bits - 1), tensors["weight_zero_point"]
    if zero.dtype == torch.int32 and "weight_packed" in tensors:
        zero = unpack(zero.T.contiguous(), scheme.levels.bits, N).T.short() - half
    return Scales(scale, zero.float().reshape(scale.shape))


def _input_layout(scheme: Scheme | None, dtype: torch.dtype) -> dict[str, Spec]:
    """Layout of the scale and zero point of static activations; {} for dynamic or float activations."""
    if scheme is None or scheme.group != TENSOR:
        return {}
    zero: dict[str, Spec] = {} if scheme.zero == "sym" else {"input_zero_point": (torch.int8, (1,))}
    return {"input_scale": (dtype, (1,)), **zero}


def _input_tensors(inputs: Scales | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `_input_layout`, filled."""
    if inputs is None:
        return {}
    zero = {} if inputs.zero is None else {"input_zero_point": inputs.zero.reshape(1).to(torch.int8)}
    return {"input_scale": inputs.scale.reshape(1).to(dtype), **zero}


def _container(layer: Layer) -> str:
    """The library's compression format for a layer's schemes, such as "pack-quantized"; FormatError if there is none."""
    s, inputs = layer.scheme, layer.activations
    plain = s.scale in ("f32", "f16", "bf16")
    if inputs is not None and (inputs.grid not in ("int8", "fp8") or s.grid == "fp4"):
        remedy = "int8-token, fp8-token, int8-tensor or fp8-tensor, with weights of int2 to int8 or fp8"
        raise FormatError(f"no engine rounds inputs to {inputs} for weights in {s}", where=layer.name, remedy=remedy)
    if s.grid == "int8" and s.zero == "sym" and isinstance(s.group, str) and plain and inputs and inputs.grid == "int8":
        return INT8
    if s.grid in ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "ternary") and plain and s.zero != "min":
        if s.zero == "sym" or s.group != "tensor":
            return PACKED
    elif s.grid == "fp8" and plain and isinstance(s.group, str):
        return FP8
    elif s.grid == "fp4" and s.scale == "e8m0" and s.group == 32:
        return MXFP4
    elif s.grid == "fp4" and s.scale == "e4m3" and s.group == 16:
        return NVFP4
    raise FormatError(
        f"compressed-tensors has no container for {s}",
        where=layer.name,
        remedy="--format bitwright, which holds every scheme; here int2 to int8 (sym or asym), ternary, fp8-channel, "
        "fp8-tensor, mxfp4 or nvfp4",
    )


def arguments(scheme: Scheme) -> dict[str, Any]:
    """The library's QuantizationArgs for a scheme of weights or activations."""
    grouped = isinstance(scheme.group, int)
    dynamic = scheme.group == TOKEN
    arguments: dict[str, Any] = {
        "num_bits": scheme.levels.bits,
        "type": "float" if scheme.grid in ("fp4", "fp8") else "int",
        "symmetric": scheme.zero == "sym",
        "strategy": "group" if grouped else scheme.group,
        "group_size": scheme.group if grouped else None,
        "dynamic": dynamic,
    }
    if scheme.scale == "e8m0":
        arguments["scale_dtype"] = "torch.uint8"
    if scheme.scale == "e4m3":
        arguments |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    return arguments
