"""Normalize a module before quantization: weights computed from other parameters become plain parameters.

Covers torch.nn.utils.parametrizations, the older weight_norm and spectral_norm, and masks of torch.nn.utils.prune. GPT-2's
Conv1D becomes a Linear; transposed, 3-D and bordered convolutions become plain ones (rearranged.py).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from bitwright.nn.rearranged import as_plain
from bitwright.nn.tree import Kept, named, replaced


@torch.no_grad()
def plain(root: nn.Module, kept: Kept) -> nn.Module:
    """Change a module in place, and return it: every weight is a parameter, with its value in eval mode, and every convolution
    that is not kept in float is a Conv1d or Conv2d, padded by zeros.
    """
    for names, module in named(root):
        if parametrize.is_parametrized(module):
            _unparametrized(module)
        _without_hooks(module)
        if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
            root = replaced(root, module, _transposed(module))
        if not any(kept.covers(name) for name in names):
            while (simpler := as_plain(module)) is not None:
                root = replaced(root, module, simpler)
                module = simpler.get_submodule("layer")  # a ConvTranspose3d becomes a Conv3d first, then a Conv2d
    return root


def _unparametrized(module: nn.Module) -> None:
    """Replace parametrizations by the values that they compute. torch's own function would also affect copies of the module."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _without_hooks(module: nn.Module) -> None:
    """Replace weights that forward pre-hooks compute by parameters, and remove the hooks."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
        elif isinstance(hook, prune.BasePruningMethod):
            _unmasked(module, hook)
        else:
            continue
        del module._forward_pre_hooks[key]


def _unmasked(module: nn.Module, hook: prune.BasePruningMethod) -> None:
    """Apply a pruning mask for good: the parameter has the zeros, mask and hook are gone."""
    name: str = hook._tensor_name
    original, mask = module._parameters.pop(f"{name}_orig"), module._buffers.pop(f"{name}_mask")
    assert isinstance(original, Tensor) and isinstance(mask, Tensor)
    vars(module).pop(name, None)
    module.register_parameter(name, nn.Parameter(original.detach() * mask))


def _transposed(module: nn.Module) -> nn.Linear:
    """transformers' Conv1D, whose weight is [K, N], as a Linear."""
    weight = module.get_parameter("weight")
    layer = nn.Linear(weight.shape[0], weight.shape[1], device="meta").train(module.training)
    layer.weight = nn.Parameter(weight.T.contiguous())
    layer.bias = nn.Parameter(module.get_parameter("bias").detach().clone())
    return layer
