"""The tensors of a model's GGUF file: names, types and shapes there, for parameters by transformers' names."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.formats import gguf_writer
from bitwright.formats.format import Layer
from bitwright.formats.gguf import kind_of
from bitwright.gguf.block_types import Kind, Types, type_named
from bitwright.gguf.reader import ENTRIES
from bitwright.gguf.rope import tensors_of
from bitwright.gguf.tensor_names import Names


class Member(NamedTuple):
    """A parameter that the file will hold: its type and shape in transformers; its layer, if it is quantized."""

    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layer: Layer | None = None


def described(config: PretrainedConfig, members: Iterable[Member]) -> list[tuple[str, Kind, Tensor]]:
    """The file's tensors in their order: name and type in the file, and a tensor of its shape without data.

    FormatError as of `Names`, and for parameters of one tensor that are to be stored in different types.
    """
    names, found = Names(config), dict[str, tuple[Kind, Tensor]]()
    for member in members:
        for name, kind, tensor in _described(names, member):
            known = found.get(name, (kind, tensor))[0]
            if known != kind:
                message = (
                    f"one part of it is to be {kind.name}, another {known.name}, and all of a layer are one tensor"
                )
                raise FormatError(message, where=name, remedy=f'one rule for all of them: match = "{name}"')
            found[name] = kind, tensor
    more: list[tuple[str, Kind, Tensor]] = [
        (name, Types.F32, tensor.to("meta")) for name, tensor in tensors_of(config).items()
    ]
    return [*sorted(((n, *rest) for n, rest in found.items()), key=lambda d: gguf_writer.place(d[0])), *more]


def _described(names: Names, member: Member) -> Iterator[tuple[str, Kind, Tensor]]:
    """The tensors that a parameter is stored in, or that it is a part of."""
    layer = member.layer
    if layer is None:
        tensor = names.written(member.parameter, torch.empty(member.shape, dtype=member.dtype, device="meta"))
        kind = gguf_writer.FLOAT_TYPES[tensor.dtype]
    else:
        block, height = kind_of(layer), names.height(member.parameter, layer.N)
        tensor = torch.empty(height, layer.K // block.size * block.bytes, dtype=torch.uint8, device="meta")
        kind = type_named(block.name)
    for place in names.places(member.parameter, tuple(tensor.shape)):
        if not place.name.endswith(ENTRIES):  # which are in the header
            yield place.name, kind, tensor.new_empty(place.shape)
