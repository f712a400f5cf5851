"""Write a model's GGUF file: parameters by transformers' names, rows in llama.cpp's order, each read back and compared."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.formats import Layer, gguf_writer
from bitwright.formats.gguf import kind_of
from bitwright.gguf.reader import Kind, Types, type_named
from bitwright.gguf.rope import tensors_of
from bitwright.gguf.tensor_names import Names
from bitwright.numerics.qtensor import QTensor, reordered, rows
from bitwright.pipeline.quantize_matrix import SLAB


class Member(NamedTuple):
    """A parameter that the file will hold: its type and shape in transformers; its layer, if it is quantized."""

    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layer: Layer | None = None


class GgufModelWriter:
    """A GGUF file being written; an existing one is continued. VerificationError for what does not read back as written."""

    def __init__(
        self, path: Path, keys: Mapping[str, Any], config: PretrainedConfig, members: Iterable[Member]
    ) -> None:
        """Begin or continue the file, and write the tensors that follow from the config. FormatError as of `Names`."""
        self._names = Names(config)
        described = [self._described(member) for member in members]
        computed = tensors_of(config)
        more = [(name, Types.F32, tensor) for name, tensor in computed.items()]
        self._making = gguf_writer.GgufWriter(
            path, keys, [*sorted(described, key=lambda d: gguf_writer.place(d[0])), *more]
        )
        for name, tensor in computed.items():
            self._making.put_floats(name, tensor)

    def _described(self, member: Member) -> tuple[str, Kind, Tensor]:
        """A tensor's name and types in the file, and a tensor of its shape without data."""
        name, layer = self._names.of(member.parameter), member.layer
        if layer is None:
            whole = torch.empty(member.shape, dtype=member.dtype, device="meta")
            tensor = self._names.written(member.parameter, whole)
            return name, gguf_writer.FLOAT_TYPES[tensor.dtype], tensor
        kind, height = kind_of(layer), self._names.height(member.parameter, layer.N)
        blocks = torch.empty(height, layer.K // kind.size * kind.bytes, dtype=torch.uint8, device="meta")
        return name, type_named(kind.name), blocks

    def put_floats(self, parameter: str, tensor: Tensor) -> None:
        """Write a parameter that stays in float."""
        self._making.put_floats(self._names.of(parameter), self._names.written(parameter, tensor).contiguous())

    def put_rounded(self, parameter: str, layer: Layer, q: QTensor) -> None:
        """Write a quantized parameter, some rows at a time."""
        name, order = self._names.of(parameter), self._names.rows(parameter, len(q.codes))
        q = q if order is None else reordered(q, order)
        N, step = len(q.codes), max(1, SLAB // layer.K)
        for first in range(0, N, step):
            self._making.put_rounded(name, layer, rows(q, first, min(first + step, N)), first)

    def flush(self) -> None:
        """Flush all that was written to the disk."""
        self._making.flush()

    def __enter__(self) -> "GgufModelWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._making.__exit__()
