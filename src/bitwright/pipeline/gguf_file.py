"""Write a model's GGUF file: parameters by transformers' names, rows in llama.cpp's order, each read back and compared."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from bitwright.formats import Layer, gguf_writer
from bitwright.formats.gguf_members import Member, described
from bitwright.gguf.rope import tensors_of
from bitwright.gguf.tensor_names import Names
from bitwright.numerics.qtensor import QTensor, reordered, rows
from bitwright.pipeline.quantize_matrix import SLAB


class GgufModelWriter:
    """A GGUF file being written; an existing one is continued. VerificationError for what does not read back as written."""

    def __init__(
        self, path: Path, keys: Mapping[str, Any], config: PretrainedConfig, members: Iterable[Member]
    ) -> None:
        """Begin or continue the file, and write the tensors that follow from the config. FormatError as of `Names`."""
        self._names = Names(config)
        self._making = gguf_writer.GgufWriter(path, keys, described(config, members))
        for name, tensor in tensors_of(config).items():
            self._making.put_floats(name, tensor)

    def put_floats(self, parameter: str, tensor: Tensor) -> None:
        """Write a parameter that stays in float."""
        written = self._names.written(parameter, tensor).contiguous()
        parts = self._names.places(parameter, tuple(written.shape))
        lines = written.reshape(-1, written.shape[-1]) if written.ndim else written
        for place, part in zip(
            parts, lines.split([place.rows for place in parts]) if len(parts) > 1 else (lines,), strict=True
        ):
            self._making.put_floats(place.name, part.contiguous(), place.first)

    def put_rounded(self, parameter: str, layer: Layer, q: QTensor) -> None:
        """Write a quantized parameter, some rows at a time."""
        order = self._names.rows(parameter, len(q.codes))
        q, begin = replace(q if order is None else reordered(q, order), order=None), 0  # columns lie as in the file
        for name, first, count, _ in self._names.places(parameter, tuple(q.codes.shape)):
            step = max(1, SLAB // layer.K)
            for at in range(0, count, step):
                some = rows(q, begin + at, begin + min(at + step, count))
                self._making.put_rounded(name, layer, some, first + at)
            begin += count

    def flush(self) -> None:
        """Flush all that was written to the disk."""
        self._making.flush()

    def __enter__(self) -> "GgufModelWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._making.__exit__()
