"""Where the text model is in a model of transformers: its blocks, and the towers for images or sound beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bitwright.errors import CheckpointError


def find_blocks(model: PreTrainedModel, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """The ModuleList of the text model's blocks: the largest of those as long as its config's number of layers."""
    depth = config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set[int]()
    own = [(n, m) for n, m in lists if _model_around(model, n) is decoder]
    found = own or [(n, m) for n, m in lists if id(m) in within] or lists
    if not found:
        message = f"{type(model).__name__} has no ModuleList of {depth} blocks"
        raise CheckpointError(message, remedy="models of blocks in a row are supported")
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _model_around(model: PreTrainedModel, name: str) -> nn.Module:
    """The innermost of transformers' models that a module lies in."""
    owners = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    return next((m for m in map(model.get_submodule, owners) if isinstance(m, PreTrainedModel)), model)


def towers_of(model: PreTrainedModel, text: str) -> tuple[str, ...]:
    """The models inside that are not the text model, such as a vision tower, by name; text: where the blocks are."""
    inner = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    others = [name for name in inner if not f"{text}.".startswith(f"{name}.") and not name.startswith(f"{text}.")]
    return tuple(name for name in others if not any(name.startswith(f"{other}.") for other in others))


@contextmanager
def no_longer_meta(model: nn.Module) -> Iterator[None]:
    """For a while, a model tells by its first parameter where it is: that may be a vision tower's, which is never loaded."""
    name, parameter = next(iter(model.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if parameter.is_meta:
        module.register_parameter(leaf, nn.Parameter(torch.empty(0, dtype=parameter.dtype), requires_grad=False))
    try:
        yield
    finally:
        module.register_parameter(leaf, parameter)
