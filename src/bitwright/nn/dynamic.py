"""Post-training dynamic quantization: weights to integers now, activations as they come. No calibration."""

import copy
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError, RecipeError
from bitwright.nn.attention import IntegerAttention
from bitwright.nn.integer import check_activations
from bitwright.nn.layers import DynamicProduct, IntegerEmbedding, Source, check_group, matrix
from bitwright.nn.recurrent import IntegerRecurrent
from bitwright.numerics.codec import encode, fit
from bitwright.numerics.qtensor import QTensor
from bitwright.numerics.scheme import TOKEN, Scheme

KEPT_AS = ("float", "bf16")


def quantize_dynamic(
    module: nn.Module,
    scheme: str = "int8-channel",
    *,
    activations: str = "int8-token",
    keep: Mapping[str, str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """A module whose Linear, Conv1d, Conv2d, LSTM, GRU, MultiheadAttention and Embedding hold and multiply integers.

    scheme       of the weights: integers, ternary or binary; by channel, or in groups for Linear
    activations  "int8-token" or "int8-token-asym", or fewer bits: each row (of a convolution: each image) by its range
    keep         patterns of module names -> "float", or "bf16" for float weights and products in bfloat16
    inplace      change `module` itself; otherwise a copy is changed

    Raises RecipeError for a module in training mode, one with nothing to quantize, or a pattern that matches nothing;
    SchemeError for schemes whose codes are not integers; NumericsError for weights that are not finite.
    """
    require_mode(module, training=False)
    weights, rounding = Scheme.parse(scheme), Scheme.parse(activations)
    check_activations(rounding, TOKEN)
    kept = Kept(module, keep or {})
    target = module if inplace else copy.deepcopy(module)
    done = 0
    for name, child in list(target.named_modules()):
        if type(child) in DYNAMIC and not kept.covers(name):
            target = replaced(target, name, dynamic(child, weights, rounding, where=name))
            done += 1
    if not done:
        raise nothing_to_quantize(module)
    return kept.apply(target).eval()


def dynamic(module: nn.Module, weights: Scheme, activations: Scheme, *, where: str) -> nn.Module:
    """The integer form of one module of a kind in `DYNAMIC`."""
    check_group(weights, module, where)
    return DYNAMIC[type(module)](module, weights, activations, where)


def quantized(w: Tensor, scheme: Scheme, where: str) -> QTensor:
    """A weight [N, ...] rounded to nearest, as a matrix with a convolution's channels last."""
    flat = matrix(w.detach().float())
    if not bool(torch.isfinite(flat).all()):
        raise NumericsError("the weights are not finite", where=where, remedy="look for NaN or Inf in the module")
    return encode(flat, fit(flat, scheme), scheme)


def _product(module: Source, weights: Scheme, activations: Scheme, where: str) -> DynamicProduct:
    return DynamicProduct.of(module, quantized(module.weight, weights, where), activations=activations, where=where)


def _part(weights: Scheme, activations: Scheme, where: str) -> Callable[[nn.Linear, str], DynamicProduct]:
    """How the matrices inside a module are made integer."""
    return lambda source, name: _product(source, weights, activations, f"{where}.{name}")


def _recurrent(module: nn.LSTM | nn.GRU, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    return IntegerRecurrent(module, _part(weights, activations, where), where=where)


def _attention(module: nn.MultiheadAttention, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    return IntegerAttention(module, _part(weights, activations, where), where=where)


def _embedding(module: nn.Embedding, weights: Scheme, activations: Scheme, where: str) -> nn.Module:
    if module.max_norm is not None:
        raise RecipeError("an embedding with max_norm changes as it is read", where=where, remedy="keep it in float")
    return IntegerEmbedding(quantized(module.weight, weights, where), where=where)


DYNAMIC: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: _product,
    nn.Conv1d: _product,
    nn.Conv2d: _product,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.MultiheadAttention: _attention,
    nn.Embedding: _embedding,
}


# ------------------------------------------------------------------------------------------------- the tree of modules


class Bf16(nn.Module):
    """A float module with its weights, and what it computes, in bfloat16; the result in the input's type."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.to(torch.bfloat16)

    def forward(self, *inputs: Any) -> Any:
        """Tensors, or tuples of them, in and out."""
        dtype = next(x.dtype for x in inputs if isinstance(x, Tensor))
        dtype = dtype if dtype.is_floating_point else torch.float32
        return _cast(self.inner(*_cast(inputs, torch.bfloat16)), dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors, in tuples too, in another type."""
    if isinstance(value, tuple):
        return tuple(_cast(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class Kept:
    """Which modules (and parameters of their own) stay float, and how: patterns of names -> "float" or "bf16"."""

    def __init__(self, module: nn.Module, keep: Mapping[str, str]) -> None:
        names = [name for name, _ in module.named_modules()] + [name for name, _ in module.named_parameters()]
        for pattern, kind in keep.items():
            if kind not in KEPT_AS:
                raise RecipeError(f"cannot keep as {kind!r}", where=pattern, remedy=f"one of {', '.join(KEPT_AS)}")
            if not any(fnmatchcase(name, pattern) for name in names):
                remedy = f"names of submodules, such as {', '.join(names[1:4])}"
                raise RecipeError("the pattern matches no submodule or parameter", where=pattern, remedy=remedy)
        self.keep = keep

    def covers(self, name: str) -> str | None:
        """How a module, or one that it lies in, is kept; None: it is not."""
        path = name.split(".")
        above = [".".join(path[: i + 1]) for i in range(len(path))]
        return next((kind for p, kind in self.keep.items() if any(fnmatchcase(each, p) for each in above)), None)

    def apply(self, target: nn.Module) -> nn.Module:
        """The module with those kept as bf16 put into bfloat16."""
        for name, child in list(target.named_modules()):
            if any(fnmatchcase(name, pattern) and kind == "bf16" for pattern, kind in self.keep.items()):
                target = replaced(target, name, Bf16(child))
        return target


def replaced(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The root with one submodule replaced; the new module itself where the name is that of the root."""
    if not name:
        return module
    parent = root.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], module)
    for above in (parent, root):
        if isinstance(above, nn.TransformerEncoder):
            above.use_nested_tensor = False  # its shortcut reads float weights past the modules that hold them
    return root


def require_mode(module: nn.Module, *, training: bool) -> None:
    """RecipeError, naming the first submodule, where the module is not in the mode that is needed."""
    wrong = next((name for name, child in module.named_modules() if child.training != training), None)
    if wrong is not None:
        found, wanted = ("eval", "train") if training else ("train", "eval")
        raise RecipeError(f"in {found} mode, where {wanted} is needed", where=wrong or "module", remedy=f".{wanted}()")


def nothing_to_quantize(module: nn.Module) -> RecipeError:
    """The error for a module without any layer that has an integer form (or with all of them kept)."""
    kinds = ", ".join(kind.__name__ for kind in DYNAMIC)
    return RecipeError("nothing to quantize", where=type(module).__name__, remedy=f"a module with any of {kinds}")
