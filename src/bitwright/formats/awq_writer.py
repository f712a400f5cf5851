"""Writer of AWQ checkpoints in AutoAWQ's GEMM layout. awq.py describes the layout, and has the reader that verifies it.

transformers loads such checkpoints with GPTQModel, vLLM with its own kernels. The layout always has zero points: a symmetric
scheme is written with the middle code, 8.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.awq import Awq
from bitwright.formats.format import Layer, differing, refuse_decomposed, refuse_rounded_inputs, refuse_short_groups
from bitwright.formats.gptq import kept_in_float
from bitwright.numerics.packing import pack
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import CHANNEL, Scheme

WORD = 8  # 4-bit codes in an int32 word
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the 4-bit field of the word that each of eight outputs goes to


class AwqWriter(Awq):
    """Writer of AWQ: 4-bit integers in groups or per channel; all layers have the same group size."""

    kv_cache = False
    embeddings = False
    one_file = False

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`."""
        refuse_decomposed(layer, "AWQ")
        refuse_rounded_inputs(layer, "AWQ")
        s = layer.scheme
        plain = s.scale in ("f32", "f16", "bf16") and (isinstance(s.group, int) or s.group == CHANNEL)
        if s.grid != "int4" or s.zero == "min" or not plain:
            remedy = "int4-g128-asym or int4-g128, groups of 16 to 256 or by channel"
            raise FormatError(f"AWQ files cannot hold {s}", where=layer.name, remedy=remedy)
        if layer.transposed:
            message = "its module is a Conv1D, which loaders of AWQ do not replace"
            raise FormatError(message, where=layer.name, remedy="use --format gptq")
        refuse_short_groups(layer)
        if layer.N % WORD:
            message = f"N = {layer.N} codes of 4 bits do not fill whole 32-bit words"
            raise FormatError(
                message, where=layer.name, remedy="keep this layer by a recipe, or use compressed-tensors"
            )
        return replace(layer, scheme=Scheme("int4", s.group, "sym" if s.symmetric else "asym", "f16"))

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        N, K, G = layer.N, layer.K, layer.scheme.groups(layer.K)
        return {
            "qweight": (torch.int32, (K, N // WORD)),
            "qzeros": (torch.int32, (G, N // WORD)),
            "scales": (torch.float16, (G, N)),
        }

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`."""
        zero = torch.zeros_like(q.scales.scale) if q.scales.zero is None else q.scales.zero
        return {
            "qweight": _words(q.codes.T),
            "qzeros": _words(zero.T),
            "scales": q.scales.scale.T.to(torch.float16).contiguous(),
        }

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`. Modules in float are listed in `modules_to_not_convert`, and for GPTQModel in `dynamic`."""
        groups = Counter(layer.scheme.group for layer in layers)
        if len(groups) > 1:
            named = ", ".join(sorted(map(str, groups)))
            raise FormatError(f"an AWQ file holds one group, not {named}", remedy="use compressed-tensors")
        (group,) = groups
        return {
            "quant_method": self.method,
            "version": "gemm",
            "bits": 4,
            "group_size": group if isinstance(group, int) else -1,
            "zero_point": True,
            "modules_to_not_convert": kept,
            **({"dynamic": excluded} if (excluded := kept_in_float(kept)) else {}),
        }


def _words(numbers: Tensor) -> Tensor:
    """Pack signed 4-bit numbers [R, N] -> int32 words [R, N/8]: plus 8 (unsigned), in AWQ's order within a word."""
    order = torch.tensor(PLACES).argsort()
    eights = (numbers.short() + 8).unflatten(1, (-1, WORD))
    return pack(eights[..., order].flatten(1), 4)
