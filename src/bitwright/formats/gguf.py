"""GGUF as a Format: one tensor of llama.cpp's block types for each layer. formats/gguf_writer.py writes them into a file.

weight  uint8 [N, K / size · bytes]: the blocks of each row; a block has `size` weights in `bytes` bytes (formats/ggml.py)
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.format import Layer, Read, differing, recovered, refuse_decomposed
from bitwright.formats.ggml import TYPES, BlockType, encode
from bitwright.formats.ggml_codes import codes_of
from bitwright.formats.ggml_scales import scales_of
from bitwright.gguf.block_types import decoded, type_named
from bitwright.gguf.file_types import FALLBACKS
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, Scales


def kind_of(layer: Layer) -> BlockType:
    """The block type of a layer: its container, or the last type of `TYPES` with its scheme. FormatError if there is none."""
    if layer.container:
        return TYPES[layer.container]
    found = next((kind for kind in reversed(TYPES.values()) if kind.scheme == layer.scheme), None)
    if found is None:
        remedy = f"one of {', '.join(name.lower() for name in TYPES)}, or a mix such as q4_k_m"
        raise FormatError(f"GGUF has no block type for {layer.scheme}", where=layer.name, remedy=remedy)
    return found


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether codes are equal. Compared as int64, eight codes at a time: blocks have a multiple of eight, and it is faster."""
    return bool(np.array_equal(a.view(torch.int64).numpy(), b.contiguous().view(torch.int64).numpy()))


def _same_scales(a: Scales, b: Scales) -> bool:
    same_zero = b.zero is None if a.zero is None else b.zero is not None and torch.equal(a.zero, b.zero)
    return same_zero and torch.equal(a.scale, b.scale)


def reads_back(kind: str, blocks: Tensor, q: QTensor) -> bool:
    """Whether blocks uint8 [N, bytes] hold exactly q's codes and scales, by bitwright's own readers of ggml blocks."""
    return _alike(codes_of(kind, blocks), q.codes) and _same_scales(scales_of(kind, blocks, kind)[1], q.scales)


class Gguf:
    """llama.cpp's block types; the embedding and the output head are quantized too."""

    name = "gguf"
    method = "gguf"
    kv_cache = False
    embeddings = True
    one_file = True

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`. Where K is no multiple of the block size, the layer gets llama.cpp's fallback type."""
        refuse_decomposed(layer, "GGUF")
        if layer.activations is not None:
            remedy = "leave out --activations: llama.cpp rounds inputs as it likes"
            raise FormatError("GGUF files cannot say that inputs are rounded", where=layer.name, remedy=remedy)
        kind = wanted = kind_of(layer)
        while layer.K % kind.size:
            if kind.name not in FALLBACKS:
                message = f"K = {layer.K} is not a multiple of {kind.size}, the block of {kind.name}"
                raise FormatError(message, where=layer.name, remedy="keep this layer by a recipe: scheme = 'keep'")
            kind = TYPES[FALLBACKS[kind.name]]
        fallback = ""
        if kind is not wanted:
            bits = [8 * k.bytes / k.size for k in (kind, wanted)]
            fallback = f"{wanted.name} -> {kind.name}: rows of {layer.K} do not fill its blocks of {wanted.size} "
            fallback += f"({bits[0]:g} bits a weight, not {bits[1]:g})"
        return replace(layer, scheme=kind.scheme, container=kind.name, fallback=fallback)

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        kind = kind_of(layer)
        return {"weight": (torch.uint8, (layer.N, layer.K // kind.size * kind.bytes))}

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`."""
        return {"weight": encode(q, kind_of(layer))}

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`: the block type of each module's weight, for the readers here; GGUF has no config.json."""
        return {"quant_method": self.method, "types": {layer.name: kind_of(layer).name for layer in layers}}

    def input_quantization(self, config: dict[str, Any], name: str, read: Read) -> InputQuantization | None:
        """See `Format.input_quantization`."""
        return None

    def decode(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Tensor:
        """See `Format.decode`: by the gguf package's `dequantize`."""
        return torch.from_numpy(decoded(tensors["weight"].numpy(), type_named(config["types"][name]), name))

    def quantized(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> QTensor:
        """See `Format.quantized`."""
        scheme, scales = scales_of(config["types"][name], tensors["weight"], name)
        return recovered(self.decode(config, name, tensors), scheme, scales, name)
