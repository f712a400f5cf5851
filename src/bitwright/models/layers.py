"""What kind of layer a module is: linear or a norm, whatever class a model has for it; and a linear layer's matrix."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear. Subclasses of Linear may have another forward: Falcon's gives the same, a router does not."""
    return isinstance(module, Conv1D) if not isinstance(module, nn.Linear) else _multiplies(type(module).forward)


@cache
def _multiplies(forward: Callable[..., Any]) -> bool:
    """Whether the forward of a subclass of Linear gives x Wᵀ + b, tried on a small Linear."""
    small, x = skip_init(nn.Linear, 3, 2), torch.arange(3.0)[None]
    small.load_state_dict({"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)})
    with suppress(Exception):  # a forward that needs what a Linear lacks
        given = forward(small, x)
        return isinstance(given, Tensor) and torch.allclose(given, small(x))
    return False


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: its own weight is a vector."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.ndim == 1


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as [N, K]; a Conv1D stores its transpose. Also converts back."""
    return weight.T if isinstance(module, Conv1D) else weight
