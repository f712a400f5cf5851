"""Locate the text model within a transformers model: its decoder blocks, and the vision or audio towers beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bitwright.errors import CheckpointError


def find_blocks(model: PreTrainedModel, config: PretrainedConfig) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the text model's blocks: the largest ModuleList whose length is the config's number of layers.

    CheckpointError if there is none.
    """
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
    """The innermost PreTrainedModel that contains a module."""
    owners = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
    return next((m for m in map(model.get_submodule, owners) if isinstance(m, PreTrainedModel)), model)


def towers_of(model: PreTrainedModel, text: str) -> tuple[str, ...]:
    """Names of the PreTrainedModels inside that are not the text model, such as a vision tower. text: name of the blocks."""
    inner = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    others = [name for name in inner if not f"{text}.".startswith(f"{name}.") and not name.startswith(f"{text}.")]
    return tuple(name for name in others if not any(name.startswith(f"{other}.") for other in others))


@contextmanager
def no_longer_meta(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this context, the model's first parameter is empty, on `device`, instead of on the meta device.

    transformers takes a model's device from its first parameter, which may be a vision tower's, whose weights are not loaded.
    """
    name, parameter = next(iter(model.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if parameter.is_meta:
        empty = torch.empty(0, dtype=parameter.dtype, device=device)
        module.register_parameter(leaf, nn.Parameter(empty, requires_grad=False))
    try:
        yield
    finally:
        module.register_parameter(leaf, parameter)
