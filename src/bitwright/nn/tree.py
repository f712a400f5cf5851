"""Operations on the tree of modules: find layers by class, replace them, keep some in float or bfloat16."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from bitwright.errors import RecipeError

KEPT_AS = ("float", "bf16")


def kind(module: nn.Module) -> type[nn.Module]:
    """The torch.nn class whose forward a module runs: for a subclass that does not override it, the base class.

    A module that overrides it has its own class. Parametrizations are ignored.
    """
    own: type[nn.Module] = type_before_parametrizations(module)
    for found in own.__mro__:
        if found.__module__.startswith("torch.nn.modules") and issubclass(found, nn.Module):
            return found if _computes_as(own, found) else own
    return own


def _computes_as(own: type[nn.Module], found: type[nn.Module]) -> bool:
    """Whether a subclass computes the same as its base: it overrides no forward."""
    return all(getattr(own, name, None) is getattr(found, name, None) for name in ("forward", "_conv_forward"))


def named(root: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every submodule once, with all of its names, in the order of named_modules."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        found.setdefault(id(module), ([], module))[0].append(name)
    return [(tuple(names), module) for names, module in found.values()]


def layers_of(root: nn.Module, kinds: Mapping[type[nn.Module], Any], kept: "Kept") -> list[tuple[str, nn.Module]]:
    """(First name, module) of every layer of these kinds, without those kept in float, or inside another such layer."""
    found: list[tuple[str, nn.Module]] = []
    inside: set[int] = set()
    for names, module in named(root):
        if id(module) in inside or any(kept.covers(name) for name in names):
            continue
        if kind(module) in kinds:
            found.append((names[0], module))
            inside.update(id(child) for child in module.modules())
    return found


def replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace a submodule under all of its names; returns the root, which is `new` if `old` was the root."""
    if root is old:
        return new
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    return root


def quantizable(module: nn.Module) -> nn.Module:
    """The module itself, or what torch.compile wraps. RecipeError for TorchScript, and for weights without values."""
    if not isinstance(module, nn.Module):
        remedy = "a torch.nn.Module; of a state dict, build the module and load_state_dict"
        raise RecipeError(f"a {type(module).__name__} is no module", remedy=remedy)
    module = getattr(module, "_orig_mod", module)
    where = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        remedy = "quantize the module that it was made of, and trace or script the result"
        raise RecipeError("TorchScript is compiled code, not layers", where=where, remedy=remedy)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            remedy = "run it once on an example, which gives lazy layers their shapes"
            raise RecipeError("a lazy layer has no weights yet", where=name, remedy=remedy)
        if tensor.is_meta:
            raise RecipeError("a tensor on the device meta has no values", where=name, remedy="load the weights first")
    return module


def with_hooks_of(new: nn.Module, old: nn.Module) -> nn.Module:
    """A layer that stands in another's place, with that one's hooks."""
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        for kind_of in (name, f"{name}_with_kwargs"):
            getattr(new, kind_of).update(getattr(old, kind_of))
    new._forward_hooks_always_called.update(old._forward_hooks_always_called)
    return new


def refuse_hooks(layer: nn.Module, where: str) -> None:
    """RecipeError for a layer with hooks, where its place is taken by one whose inputs or outputs are codes."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        remedy = f'remove them, keep={{"{where}": "float"}}, or bitwright.quantize_dynamic, which keeps them'
        raise RecipeError("it has forward hooks, which would see integers", where=where, remedy=remedy)


def refuse_complex(layer: nn.Module, where: str) -> None:
    """RecipeError for a layer with complex weights: as real numbers they would lose their imaginary parts."""
    if any(p.is_complex() for p in layer.parameters()):
        raise RecipeError("complex weights have no quantized form", where=where, remedy=f'keep={{"{where}": "float"}}')


def off_the_fast_path(root: nn.Module) -> nn.Module:
    """Disable torch's fast path for transformer layers in a module: it reads float weights directly, past the submodules."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # only the check for the fast path reads it
    return root


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Within this context, torch's fast path for attention is disabled for all modules."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module; unlike copy.deepcopy, it also copies tensors computed by hooks (weight_norm, prune)."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for value in vars(child).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


class Around(nn.Module):
    """A module around another one (`AROUND`, by name), whose attributes it has where it has none of its own."""

    AROUND = "inner"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.AROUND:
                raise
            return self.passed_on(getattr(getattr(self, self.AROUND), name))

    def passed_on(self, value: Any) -> Any:
        """What becomes of an attribute of the other module."""
        return value


class Bf16(Around):
    """Runs a float module in bfloat16, weights and computation; the result has the input's dtype.

    It has the module's attributes, tensors in the type that they had.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.given = next((p.dtype for p in inner.parameters()), torch.float32)
        self.inner = inner.to(torch.bfloat16)

    def passed_on(self, value: Any) -> Any:
        """In the type that it had."""
        return _cast(value, self.given)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Tensors, or tuples of them, in and out."""
        given = (x.dtype for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        dtype = next((dtype for dtype in given if dtype.is_floating_point), torch.float32)
        names = {name: _cast(value, torch.bfloat16) for name, value in named.items()}
        return _cast(self.inner(*_cast(inputs, torch.bfloat16), **names), dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating-point tensors, also in tuples, to another dtype."""
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def pattern_of(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that matches a module's own name, or that of one around it; None if there is none."""
    path = name.split(".")
    above = [".".join(path[: i + 1]) for i in range(len(path))]
    return next((pattern for pattern in patterns if any(fnmatchcase(each, pattern) for each in above)), None)


class Kept:
    """The modules (and parameters) that are not quantized: pattern of the name -> "float" or "bf16".

    RecipeError for another value, or a pattern that matches nothing.
    """

    def __init__(self, module: nn.Module, keep: Mapping[str, str]) -> None:
        names = [name for name, _ in module.named_modules(remove_duplicate=False)]
        names += [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for pattern, kind in keep.items():
            if kind not in KEPT_AS:
                raise RecipeError(f"cannot keep as {kind!r}", where=pattern, remedy=f"one of {', '.join(KEPT_AS)}")
            if not any(fnmatchcase(name, pattern) for name in names):
                remedy = f"names of submodules, such as {', '.join(names[1:4])}"
                raise RecipeError("the pattern matches no submodule or parameter", where=pattern, remedy=remedy)
        self.keep = dict(keep)

    def covers(self, name: str) -> str | None:
        """How a module is kept, by its own name or that of one around it: "float" or "bf16"; None: it is quantized."""
        found = pattern_of(name, self.keep)
        return None if found is None else self.keep[found]

    def apply(self, target: nn.Module) -> nn.Module:
        """Wrap the modules that are kept in bfloat16 in `Bf16`; returns the root."""
        for names, child in named(target):
            patterns = [p for p, kind in self.keep.items() if kind == "bf16"]
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                refuse_complex(child, names[0])
                target = replaced(target, child, Bf16(child))
        return target


def require_mode(module: nn.Module, *, training: bool) -> None:
    """RecipeError if a module is in the wrong mode. Eval is needed of all submodules, training only of the module itself."""
    wrong = next((name for name, child in module.named_modules() if child.training != training), None)
    if wrong is not None and (not training or not module.training):
        found, wanted = ("eval", "train") if training else ("train", "eval")
        raise RecipeError(f"in {found} mode, where {wanted} is needed", where=wrong or "module", remedy=f".{wanted}()")
