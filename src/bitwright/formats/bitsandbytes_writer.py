"""Writer of bitsandbytes' NF4 checkpoints, with or without double quantization. bitsandbytes.py has the layout and the reader.

transformers loads them with bitsandbytes, and QLoRA trains on them. Each matrix is dequantized to the model's own float type.
"""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import FormatError
from bitwright.files.checkpoint import Spec
from bitwright.formats.bitsandbytes import STATE, BitsAndBytes
from bitwright.formats.format import Layer, differing, refuse_decomposed, refuse_rounded_inputs, refuse_short_groups
from bitwright.numerics.codec import dq8_index, dynamic_map
from bitwright.numerics.qtensor import QTensor, Scales
from bitwright.numerics.scheme import GRIDS, SUPERBLOCK

BLOCKS = (32, 64, 128, 256)  # group sizes that bitsandbytes has kernels for
DOUBLE = "dq8"  # the scale encoding that is QLoRA's double quantization
LONGEST = -2.2250738585072014e-308  # the float whose JSON text is longest


class BitsAndBytesWriter(BitsAndBytes):
    """Writer of NF4. K must be a multiple of the block size, so that no block crosses from one row into the next."""

    kv_cache = False
    embeddings = False
    one_file = False

    def adapt(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """See `Format.adapt`. container: the float type that the matrix is dequantized to, such as "bfloat16"."""
        refuse_decomposed(layer, self.name)
        refuse_rounded_inputs(layer, self.name)
        s = layer.scheme
        if s.grid != "nf4" or s.group not in BLOCKS or s.scale not in ("f32", "f16", "bf16", DOUBLE):
            remedy = "nf4-g64-dq, or nf4-g64 without double quantization; groups of 32 to 256"
            raise FormatError(f"bitsandbytes' files cannot hold {s}", where=layer.name, remedy=remedy)
        refuse_short_groups(layer)
        scheme = replace(s, zero="sym", scale=DOUBLE if s.scale == DOUBLE else "f32")
        return replace(layer, scheme=scheme, container=str(dtype).removeprefix("torch."))

    def layout(self, layer: Layer, dtype: torch.dtype) -> dict[str, Spec]:
        """See `Format.layout`."""
        blocks = layer.N * layer.scheme.groups(layer.K)
        specs: dict[str, Spec] = {
            "weight": (torch.uint8, (layer.N * layer.K // 2, 1)),
            "weight.quant_map": (torch.float32, (16,)),
            STATE: (torch.uint8, (len(_state(layer, LONGEST)),)),
        }
        if layer.scheme.scale != DOUBLE:
            return specs | {"weight.absmax": (torch.float32, (blocks,))}
        return specs | {
            "weight.absmax": (torch.uint8, (blocks,)),
            "weight.nested_absmax": (torch.float32, (-(-blocks // SUPERBLOCK),)),
            "weight.nested_quant_map": (torch.float32, (256,)),
        }

    def encode(self, q: QTensor, layer: Layer, dtype: torch.dtype, inputs: Scales | None = None) -> dict[str, Tensor]:
        """See `Format.encode`."""
        codes, s = q.codes.reshape(-1), q.scales
        mean = None if s.outer_zero is None else float(s.outer_zero)
        state = _state(layer, mean).ljust(len(_state(layer, LONGEST)))  # its size is planned before the mean is known
        tensors = {
            "weight": (codes[::2] << 4 | codes[1::2])[:, None],
            "weight.quant_map": torch.tensor(GRIDS["nf4"].levels),
            STATE: torch.frombuffer(bytearray(state), dtype=torch.uint8),
        }
        if s.outer is None or s.outer_zero is None:
            return tensors | {"weight.absmax": s.scale.reshape(-1)}
        return tensors | {
            "weight.absmax": dq8_index(s.scale, s.outer, s.outer_zero).reshape(-1),
            "weight.nested_absmax": s.outer.reshape(-1),
            "weight.nested_quant_map": dynamic_map(),
        }

    def wrong(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor], q: QTensor) -> int:
        """See `Format.wrong`."""
        return differing(self.decode(config, name, tensors), q)

    def config(self, layers: list[Layer], kept: list[str]) -> dict[str, Any]:
        """See `Format.config`: as transformers' BitsAndBytesConfig writes it."""
        dtype = Counter(layer.container for layer in layers).most_common(1)[0][0]
        return {
            "quant_method": self.method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": any(layer.scheme.scale == DOUBLE for layer in layers),
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept,
        }


def _state(layer: Layer, mean: float | None) -> bytes:
    """The quant_state of a matrix, as JSON. mean: of its scales (nested_offset), with double quantization."""
    double = layer.scheme.scale == DOUBLE
    nested = {"nested_blocksize": SUPERBLOCK, "nested_dtype": "float32", "nested_offset": mean} if double else {}
    shape, length = [layer.N, layer.K], layer.scheme.group_length(layer.K)
    state = {"quant_type": "nf4", "blocksize": length, "dtype": layer.container, "shape": shape, **nested}
    return json.dumps(state).encode()
