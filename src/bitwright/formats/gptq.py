"""GPTQ checkpoints (`quant_method: gptq`), as GPTQModel, transformers and vLLM load them: writer and reader.

qweight int32 [K·b/32, N]  unsigned b-bit codes packed along K, eight 4-bit codes in a word (3-bit codes cross words)
qzeros  int32 [G, N·b/32]  zero points, packed along N. v1 ("checkpoint_format": "gptq", or none) stores each zero point − 1,
                           so the lowest code cannot be one (zero "asym1"); v2 ("gptq_v2") stores them as they are
scales  float16 [G, N]     w = (code − zero) · scale
g_idx   int32 [K]          the group of each input channel. Written: always k // g. Read: in any order (desc_act); k // g if
                           it is missing

Symmetric checkpoints are written as v1, which every loader reads. Asymmetric ones are written as v2, because GPTQModel
accepts asymmetric v1 checkpoints only if it wrote them itself.

GPTQModel's `dynamic` overrides the config for single modules: {"-:regex": {}} keeps them in float, {"+:regex": {bits,
group_size, …}} (or without a sign) stores them with these settings. The first expression that matches the beginning of the
module's name counts.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.format import (
    Layer,
    Read,
    differing,
    recovered,
    refuse_decomposed,
    refuse_rounded_inputs,
    refuse_short_groups,
)
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.packing import pack
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import GROUPS, Scheme

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}  # checkpoint_format
SAID_BY_MODULE = ("bits", "group_size", "sym", "desc_act", "mse", "pack_dtype")  # settings that `dynamic` may override


class Gptq:
    """2-, 3-, 4- or 8-bit integers in groups or per channel. Written: one scheme for all layers."""

    name = "gptq"
    method = "gptq"
    parts = frozenset(("qweight", "qzeros", "scales", "g_idx"))
    kv_cache = False
    embeddings = False
    one_file = False

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`."""
        refuse_decomposed(layer, "GPTQ")
        s, bits = layer.scheme, layer.scheme.levels.bits
        plain = (
            s.grid.startswith("int") and s.scale in ("f32", "f16", "bf16") and s.zero != "min" and s.group != "tensor"
        )
        refuse_rounded_inputs(layer, "GPTQ")
        if bits not in BITS or not plain:
            remedy = (
                "--format bitwright, which holds every scheme; here int2, int3, int4 or int8 in groups or per channel"
            )
            raise FormatError(f"GPTQ files cannot hold {s}", where=layer.name, remedy=remedy)
        refuse_short_groups(layer)
        for axis, extent in (("K", layer.K), ("N", layer.N)):
            if extent * bits % 32:
                message = f"{axis} = {extent} codes of {bits} bits do not fill whole 32-bit words"
                raise FormatError(
                    message, where=layer.name, remedy="keep this layer by a recipe, or use compressed-tensors"
                )
        return replace(layer, scheme=Scheme(s.grid, s.group, "sym" if s.symmetric else "asym", "f16"))

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        N, K, bits, G = layer.N, layer.K, layer.scheme.levels.bits, layer.scheme.groups(layer.K)
        return {
            "qweight": (torch.int32, (K * bits // 32, N)),
            "qzeros": (torch.int32, (G, N * bits // 32)),
            "scales": (torch.float16, (G, N)),
            "g_idx": (torch.int32, (K,)),
        }

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`."""
        bits, K = q.scheme.levels.bits, q.codes.shape[1]
        half = 1 << (bits - 1)
        zero = torch.zeros_like(q.scales.scale) if q.scales.zero is None else q.scales.zero
        return {
            "qweight": pack(q.codes.short() + half, bits).T.contiguous(),
            "qzeros": pack(zero.T.short() + half - int(q.scheme.symmetric), bits),
            "scales": q.scales.scale.T.to(torch.float16).contiguous(),
            "g_idx": torch.arange(K, dtype=torch.int32) // q.scheme.group_length(K),
        }

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`. Linear modules in float are excluded by GPTQModel's `dynamic`."""
        schemes = {layer.scheme for layer in layers}
        if len(schemes) > 1:
            named = ", ".join(sorted(map(str, schemes)))
            raise FormatError(f"a GPTQ file holds one scheme, not {named}", remedy="use compressed-tensors")
        scheme = schemes.pop()
        excluded = kept_in_float(kept)
        return {
            "quant_method": self.method,
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "bits": scheme.levels.bits,
            "group_size": scheme.group if isinstance(scheme.group, int) else -1,
            "sym": scheme.zero == "sym",
            "desc_act": False,
            "lm_head": False,
            "damp_percent": 0.01,
            **({"dynamic": excluded} if excluded else {}),
        }

    def holds(self, dtypes: Mapping[str, torch.dtype]) -> bool:
        """See `CheckpointReader.holds`."""
        return "qweight" in dtypes

    def module_config(self, config: dict[str, Any], name: str, kind: type[nn.Module] = nn.Linear) -> dict[str, Any]:
        """See `CheckpointReader.module_config`; `dynamic` is applied. FormatError also for other layouts than v1 and v2."""
        config = config | _dynamic(config.get("dynamic") or {}, name)
        said = {str(config[key]).lower() for key in ("checkpoint_format", "format") if config.get(key)} or {"gptq"}
        layout = "marlin" if config.get("is_marlin_format") else " and ".join(sorted(said))
        if layout not in VERSIONS:
            remedy = f"known: {', '.join(VERSIONS)}; GPTQModel converts others"
            raise FormatError(f"GPTQ's layout {layout!r} is not read here", where=name, remedy=remedy)
        bits, group = config.get("bits"), config.get("group_size", -1)
        if bits is None:
            remedy = "get the whole config from where the weights are from: bits, group_size, desc_act, sym"
            raise FormatError("the quantization_config does not say how many bits", where=name, remedy=remedy)
        if bits not in BITS or type(group) is not int or (group != -1 and group < 1):
            remedy = f"{', '.join(map(str, BITS))} bits; a group of columns, or -1"
            raise FormatError(f"{bits!r} bits in groups of {group!r} are not read here", where=name, remedy=remedy)
        if config.get("pack_dtype", "int32") != "int32":
            message = f"codes packed in {config['pack_dtype']} are not read here"
            raise FormatError(message, where=name, remedy="pack_dtype int32")
        return {**config, "dynamic": {}, "checkpoint_format": layout, "group_size": group}

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Format.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Format.decode`. Unpacks bit by bit by the layout above, and shares no code with the writer."""
        config = self.module_config(config, name)
        codes = _bits_to_numbers(tensors["qweight"].numpy(), config["bits"]).T  # [N, K]
        group = _group_of_each_column(config, name, tensors, codes.shape[1])
        zeros = _zeros(config, tensors["qzeros"])
        scale = tensors["scales"].float().numpy().T  # [N, G]
        _check_groups(name, group, codes.shape[0], scale.shape, zeros.shape, given="g_idx" in tensors)
        return torch.from_numpy((codes - zeros[:, group]).astype(np.float32) * scale[:, group])

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Format.quantized`. With desc_act, columns are sorted by group, and the QTensor has their order."""
        config = self.module_config(config, name)
        w, bits, group = self.decode(config, name, tensors), config["bits"], config["group_size"]
        K = w.shape[1]
        length = K if group < 0 else group
        each = _group_of_each_column(config, name, tensors, K)
        groups, order = torch.from_numpy(each).sort(stable=True)
        if not torch.equal(groups, torch.arange(K) // length):
            remedy = "get a good copy of the file"
            raise FormatError(f"its columns are not in groups of {length} (g_idx)", where=name, remedy=remedy)
        known = group in (-1, *GROUPS)
        if not known and group % max(GROUPS):
            raise FormatError(
                f"groups of {group} are not computed here", where=name, remedy="quantize the original anew"
            )
        scheme = Scheme(f"int{bits}", "channel" if group < 0 else group if known else max(GROUPS), "asym")
        zeros = torch.from_numpy(_zeros(config, tensors["qzeros"]) - (1 << (bits - 1))).float()
        times = 1 if known else group // max(GROUPS)  # larger groups: several of the largest with one scale
        tables = (t.repeat_interleave(times, 1)[:, : scheme.groups(K)] for t in (tensors["scales"].float().T, zeros))
        q = recovered(w[:, order], scheme, Scales(*(t.contiguous() for t in tables)), name)
        return q if torch.equal(order, torch.arange(K)) else replace(q, order=order)


def kept_in_float(names: list[str]) -> dict[str, dict[str, Any]]:
    """`dynamic` rules that keep these modules in float. lm_head needs none: the config says "lm_head": false."""
    return {f"-:^{re.escape(name)}$": {} for name in names if name != "lm_head"}


def _dynamic(rules: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The settings that GPTQModel's `dynamic` overrides for one module; {} if no rule matches.

    FormatError if a rule says that this quantized module is in float, or is no valid regular expression.
    """
    for rule, said in rules.items():
        sign, pattern = (rule[0], rule[2:]) if rule[:2] in ("+:", "-:") else ("+", rule)
        try:
            matches = re.match(pattern, name)
        except re.error as error:
            raise FormatError(f"dynamic has no regular expression {rule!r}: {error}", where=name) from error
        if matches and sign == "-":
            message = f"it is quantized in the file, and {rule!r} in `dynamic` says that it is not"
            raise FormatError(message, where=name, remedy="get a good copy of the checkpoint")
        if matches:
            return {key: value for key, value in (said or {}).items() if key in SAID_BY_MODULE}
    return {}


def _group_of_each_column(config: dict[str, Any], name: str, tensors: dict[str, Tensor], K: int) -> NDArray[np.int64]:
    """The group of each input channel [K]: g_idx, or k // g without it. FormatError for desc_act without g_idx."""
    if "g_idx" in tensors:
        return tensors["g_idx"].numpy().astype(np.int64)
    if config.get("desc_act"):
        message = "its columns are in the order of activations (desc_act), and it lacks the g_idx that says which"
        remedy = "quantize the original anew, or get the file from a GPTQ of May 2023 or later"
        raise FormatError(message, where=name, remedy=remedy)
    return np.arange(K) // (K if config["group_size"] < 0 else config["group_size"])


def _check_groups(
    name: str, group: NDArray[np.int64], N: int, scales: tuple[int, ...], zeros: tuple[int, ...], *, given: bool
) -> None:
    """FormatError for scales or zero points whose shapes are not [N, G]. given: the groups come from a g_idx in the file."""
    G = int(group.max(initial=0)) + 1
    fits = scales == zeros == (N, scales[1]) and (scales[1] == G or (given and scales[1] > G))
    if not fits or int(group.min(initial=0)) < 0:
        message = f"scales {scales} and zero points {zeros} are not those of {G} groups in {N} rows"
        raise FormatError(message, where=name, remedy="get a good copy of the file, with its bits and group_size")


def _zeros(config: dict[str, Any], qzeros: Tensor) -> NDArray[np.int32]:
    """Unpack the zero points [N, G], unsigned.

    v1 stores each minus 1. The subtraction is done on whole 32-bit words, so a zero point of 0 borrows from its neighbour;
    as in GPTQModel, adding ones to whole words undoes that. 3-bit zero points cross words, and wrap around one by one.
    """
    bits, packed = config["bits"], qzeros.numpy().T
    if VERSIONS[config["checkpoint_format"]] == 2:
        return _bits_to_numbers(packed, bits)
    if 32 % bits:
        return (_bits_to_numbers(packed, bits) + 1) & ((1 << bits) - 1)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return _bits_to_numbers((packed.view(np.uint32) + ones).view(np.int32), bits)


def _bits_to_numbers(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Unpack int32 words [W, C] -> unsigned numbers [W·32/bits, C]; each column is a little-endian bit stream."""
    octets = np.ascontiguousarray(packed.T).astype("<i4").view(np.uint8)  # [C, 4W]
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(octets.shape[0], -1, bits)
    return (stream.astype(np.int32) << np.arange(bits)).sum(-1).T.astype(np.int32)
