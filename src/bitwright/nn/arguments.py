"""Record the arguments of a module's call, and of the calls of all its submodules, by parameter name."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.nn.batches import Batch, run
from bitwright.nn.trace import SIMPLE
from bitwright.nn.tree import copied, named


@torch.no_grad()
def arguments(root: nn.Module, example: Batch) -> dict[str, list[dict[str, Any]]]:
    """Run an example; submodule name -> arguments of each of its calls, {} for a call that does not fit its signature.

    A submodule with several names is listed under each.
    """
    root = copied(root)
    calls: dict[str, list[dict[str, Any]]] = {}

    def hook(names: tuple[str, ...], signature: inspect.Signature) -> Any:
        def record(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            try:
                found = dict(signature.bind(*inputs, **named).arguments)
            except TypeError:
                found = {}
            for name in names:
                calls.setdefault(name, []).append(found)

        return record

    for names, module in named(root):
        signature = inspect.signature(module.forward)
        module.register_forward_pre_hook(hook(names, signature), with_kwargs=True)
    run(root, example)
    return calls


def one_way(calls: list[dict[str, Any]]) -> dict[str, Any] | str:
    """The arguments of the first call, if all calls pass tensors for the same parameters, and equal values for the others;
    else the reason why not."""
    if not calls or not calls[0]:
        return "it is never called" if not calls else "it is called with more than tensors"
    names = [{name for name, value in call.items() if isinstance(value, Tensor)} for call in calls]
    others = [{name: value for name, value in call.items() if name not in names[0]} for call in calls]
    plain = all(isinstance(value, SIMPLE) for call in others for value in call.values())
    if not plain or any(each != names[0] for each in names) or any(each != others[0] for each in others):
        return "it is called in more than one way"
    return calls[0]
