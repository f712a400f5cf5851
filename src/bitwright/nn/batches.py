"""Call a module with a batch, and collect the tensors of its output."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, NumericsError, RecipeError

Batch = Tensor | tuple[Any, ...] | dict[str, Any]  # f(x), f(*x) or f(**x)


@torch.no_grad()
def run(module: nn.Module, batch: Batch) -> Any:
    """The module's output for a batch, without gradients. The batch is copied, in case the module changes it in place.

    RecipeError for a batch that its forward does not take.
    """
    args, named = as_call(cloned(batch))
    try:
        return module(*args, **named)
    except (TypeError, AttributeError) as error:
        if not tensors(batch):
            remedy = "a tensor, a tuple of arguments or a dict of named ones; torch.from_numpy makes tensors of arrays"
            message = f"a batch without a tensor: a {type(batch).__name__}"
            raise RecipeError(message, where=type(module).__name__, remedy=remedy) from error
        reason = bound(module, batch)
        if not isinstance(reason, str):
            raise
        remedy = (
            "a dict is taken for named arguments, a tuple or list for several: ({...},) gives a dict, ([...],) a list"
        )
        message = f"its forward does not take such a batch: {reason}"
        raise RecipeError(message, where=type(module).__name__, remedy=remedy) from error


def as_call(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a batch stands for, by position and by name."""
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def bound(module: nn.Module, batch: Batch) -> dict[str, Any] | str:
    """A batch as arguments of the module's forward, by parameter name; or the reason why it does not fit."""
    args, named = as_call(batch)
    try:
        return dict(inspect.signature(module.forward).bind(*args, **named).arguments)
    except TypeError as error:
        return str(error)


def run_named(module: nn.Module, batch: Batch, kind: type[BitwrightError], remedy: str) -> Any:
    """`run`, where torch's error becomes one of this kind that names the last layer that was reached."""
    reached = [type(module).__name__]
    layers = [(name, layer) for name, layer in module.named_modules() if name and not list(layer.children())]
    handles = [layer.register_forward_pre_hook(lambda *_, name=name: reached.append(name)) for name, layer in layers]
    try:
        return run(module, batch)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if "not implemented for" in message:  # half precision, mostly
            remedy = "module.float(), which what is quantized computes like; .half() of the result gives half results"
        raise kind(message, where=reached[-1].removeprefix("body."), remedy=remedy) from error
    finally:
        for handle in handles:
            handle.remove()


def require_finite(values: list[Tensor], what: str, where: str) -> list[Tensor]:
    """The values. NumericsError if one is NaN or infinite."""
    if any(not bool(torch.isfinite(x).all()) for x in values if x.is_floating_point()):
        raise NumericsError(
            f"{what} are not finite", where=where, remedy="look for NaN in the batches and in the weights"
        )
    return values


def cloned(value: Any) -> Any:
    """Copy the tensors in nested tuples, lists and dicts; other values are shared."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: cloned(each) for name, each in value.items()}
    plain = type(value) in (tuple, list)
    return type(value)(cloned(each) for each in value) if plain else value


def outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    """All tensors in the module's output for a batch, to be compared with another's: see `same_draws`."""
    with same_draws():
        return tensors(run(module, batch))


def random_states() -> tuple[Any, ...]:
    """Of the generators that a forward draws from by itself: torch's, Python's and numpy's."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def draws(compute: Callable[[], Any]) -> tuple[Any, bool]:
    """What a function returns, and whether it drew random numbers."""
    before = random_states()
    result = compute()
    drawn, python, (_, keys, position, *_) = random_states()
    same = torch.equal(before[0], drawn) and before[1] == python
    return result, not (same and np.array_equal(before[2][1], keys) and before[2][2] == position)


@contextmanager
def same_draws() -> Iterator[None]:
    """Draw the same random numbers inside every time; afterwards the generators go on as if nothing had been drawn."""
    drawn, python, numpy = random_states()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(drawn)
        random.setstate(python)
        np.random.set_state(numpy)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, tuple | list) else []
