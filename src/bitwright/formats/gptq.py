"""GPTQ v1: the layout that GPTQModel, transformers and vLLM read.

qweight [K·b/32, N]  unsigned codes packed along K, eight 4-bit codes a word (3-bit codes straddle words)
qzeros  [G, N·b/32]  zero point − 1, packed along N: v1's convention, so the lowest code cannot be a zero point ("asym1")
scales  [G, N]       float16
g_idx   [K]          the group of each column: always k // g in what is written here, any order in what is read (desc_act)
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.format import Layer, Read, differing, recovered, refuse_decomposed, refuse_ragged
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.packing import pack
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import Scheme, Zero

BITS = (2, 3, 4, 8)
STORED: dict[str, Zero] = {"asym": "asym1", "signed": "sym"}  # as the format has it


class Gptq:
    """Integers of 2, 3, 4 or 8 bits, one scheme for the whole file."""

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
        if layer.activations is not None:
            remedy = "use compressed-tensors, or leave out --activations"
            raise FormatError("GPTQ files cannot say that inputs are rounded", where=layer.name, remedy=remedy)
        if bits not in BITS or not plain:
            remedy = (
                "--format bitwright, which holds every scheme; here int2, int3, int4 or int8 in groups or per channel"
            )
            raise FormatError(f"GPTQ files cannot hold {s}", where=layer.name, remedy=remedy)
        refuse_ragged(layer)
        for axis, extent in (("K", layer.K), ("N", layer.N)):
            if extent * bits % 32:
                message = f"{axis} = {extent} codes of {bits} bits do not fill whole 32-bit words"
                raise FormatError(
                    message, where=layer.name, remedy="keep this layer by a recipe, or use compressed-tensors"
                )
        return replace(layer, scheme=Scheme(s.grid, s.group, STORED.get(s.zero, s.zero), "f16"))

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
            "qzeros": pack(zero.T.short() + (half - 1), bits),
            "scales": q.scales.scale.T.to(torch.float16).contiguous(),
            "g_idx": torch.arange(K, dtype=torch.int32) // q.scheme.group_length(K),
        }

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`. Linear modules inside blocks that stay float are excluded by GPTQModel's `dynamic`."""
        schemes = {layer.scheme for layer in layers}
        if len(schemes) > 1:
            named = ", ".join(sorted(map(str, schemes)))
            raise FormatError(f"a GPTQ file holds one scheme, not {named}", remedy="use compressed-tensors")
        scheme = schemes.pop()
        excluded: dict[str, Any] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in kept if name != "lm_head"}
        return {
            "quant_method": self.method,
            "checkpoint_format": "gptq",
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
        """See `CheckpointReader.module_config`."""
        return config

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Format.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Format.decode`: bit by bit from the layout above, sharing nothing with the writer."""
        bits = int(config["bits"])
        codes = _bits_to_numbers(tensors["qweight"].numpy(), bits).T  # [N, K]
        zeros = _bits_to_numbers(tensors["qzeros"].numpy().T, bits) + 1  # [N, G]
        group = tensors["g_idx"].numpy()
        scale = tensors["scales"].numpy().astype(np.float32).T  # [N, G]
        return torch.from_numpy((codes - zeros[:, group]).astype(np.float32) * scale[:, group])

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Format.quantized`."""
        bits, group, K = int(config["bits"]), int(config["group_size"]), len(tensors["g_idx"])
        length = K if group < 0 else group
        groups, order = tensors["g_idx"].long().sort(stable=True)
        if not torch.equal(groups, torch.arange(K) // length):
            remedy = "get a good copy of the file"
            raise FormatError(f"its columns are not in groups of {length} (g_idx)", where=name, remedy=remedy)
        scheme = Scheme(f"int{bits}", "channel" if group < 0 else group, "asym")
        zeros = _bits_to_numbers(tensors["qzeros"].numpy().T, bits) + 1 - (1 << (bits - 1))
        scales = Scales(tensors["scales"].float().T.contiguous(), torch.from_numpy(zeros).float())
        q = recovered(self.decode(config, name, tensors)[:, order], scheme, scales, name)
        return q if torch.equal(order, torch.arange(K)) else replace(q, order=order)


def _bits_to_numbers(packed: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """int32 words [W, C] -> numbers [W·32/bits, C], reading each column as a little-endian bit stream."""
    octets = np.ascontiguousarray(packed.T).astype("<i4").view(np.uint8)  # [C, 4W]
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(octets.shape[0], -1, bits)
    return (stream.astype(np.int32) << np.arange(bits)).sum(-1).T.astype(np.int32)
