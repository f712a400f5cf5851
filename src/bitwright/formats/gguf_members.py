"""The tensors of a model's GGUF file: names, types and shapes there, for parameters by transformers' names."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitwright.errors import FormatError
from bitwright.formats import gguf_writer
from bitwright.formats.format import Layer
from bitwright.formats.gguf import kind_of
from bitwright.gguf.reader import Kind, Types, type_named
from bitwright.gguf.rope import tensors_of
from bitwright.gguf.tensor_names import Names, expert_of


class Member(NamedTuple):
    """A parameter that the file will hold: its type and shape in transformers; its layer, if it is quantized."""

    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layer: Layer | None = None


def described(config: PretrainedConfig, members: Iterable[Member]) -> list[tuple[str, Kind, Tensor]]:
    """The file's tensors in their order: name and type in the file, and a tensor of its shape without data.

    FormatError as of `Names`, and for experts of one layer that are to be stored in different types.
    """
    names, found = Names(config), dict[str, tuple[Kind, Tensor]]()
    for member in members:
        name, kind, tensor = _described(names, member)
        known = found.get(name, (kind, tensor))[0]
        if known != kind:
            message = f"one expert is to be {kind.name}, another {known.name}, and all of a layer are one tensor"
            raise FormatError(message, where=name, remedy=f'one rule for all of them: match = "{name}"')
        found[name] = kind, tensor
    more: list[tuple[str, Kind, Tensor]] = [
        (name, Types.F32, tensor.to("meta")) for name, tensor in tensors_of(config).items()
    ]
    return [*sorted(((n, *rest) for n, rest in found.items()), key=lambda d: gguf_writer.place(d[0])), *more]


def _described(names: Names, member: Member) -> tuple[str, Kind, Tensor]:
    """The tensor that a parameter is stored in; all experts of a layer share one."""
    layer = member.layer
    if layer is None:
        tensor = names.written(member.parameter, torch.empty(member.shape, dtype=member.dtype, device="meta"))
        kind = gguf_writer.FLOAT_TYPES[tensor.dtype]
    else:
        block, height = kind_of(layer), names.height(member.parameter, layer.N)
        tensor = torch.empty(height, layer.K // block.size * block.bytes, dtype=torch.uint8, device="meta")
        kind = type_named(block.name)
    if expert_of(member.parameter) is not None:
        tensor = tensor.new_empty(names.experts, *tensor.shape)
    return names.of(member.parameter), kind, tensor
