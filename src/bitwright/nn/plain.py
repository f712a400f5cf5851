"""Layers with plain weights: those that a layer computes from other parameters are computed once and for all.

torch.nn.utils.parametrizations, the older weight_norm and spectral_norm, pruning masks of torch.nn.utils.prune; and the
transposed Linear that GPT-2 is made of. Transposed and three-dimensional convolutions are rearranged.
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
    """The root, changed: every weight is a parameter, with the value that the layer would compute in eval mode, and
    every convolution a plain one.
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
                module = simpler.get_submodule("layer")  # a transposed one of three dimensions is one of three
    return root


def _unparametrized(module: nn.Module) -> None:
    """Leave what parametrizations compute. torch's own way to do so takes the property from all copies of the module."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}  # type: ignore[union-attr]
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def _without_hooks(module: nn.Module) -> None:
    """Leave what hooks compute before each forward as a parameter, without the hooks."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            hook.remove(module)
        elif isinstance(hook, prune.BasePruningMethod):
            _unmasked(module, hook)
        else:
            continue
        del module._forward_pre_hooks[key]


def _unmasked(module: nn.Module, hook: prune.BasePruningMethod) -> None:
    """The pruned tensor as a parameter: zeros stay, the mask goes."""
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
