"""Call a module with a batch, and collect the tensors of its output."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | tuple[Any, ...] | dict[str, Any]  # f(x), f(*x) or f(**x)


@torch.no_grad()
def run(module: nn.Module, batch: Batch) -> Any:
    """The module's output for a batch, without gradients. The batch is copied, in case the module changes it in place."""
    batch = cloned(batch)
    if isinstance(batch, dict):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def cloned(value: Any) -> Any:
    """Copy the tensors in nested tuples, lists and dicts; other values are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: cloned(each) for name, each in value.items()}
    plain = type(value) in (tuple, list)
    return type(value)(cloned(each) for each in value) if plain else value


def outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors in the module's output for a batch."""
    return tensors(run(module, batch))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, tuple | list) else []
