"""The scheme of each layer's weights: one for all, or others for layers by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from torch import nn

from bitwright.errors import RecipeError
from bitwright.nn.tree import pattern_of
from bitwright.numerics.scheme import Scheme


@dataclass(frozen=True)
class WeightSchemes:
    """The scheme of layers that no pattern matches; and patterns of layers' names, the first that matches counts."""

    default: Scheme
    others: tuple[tuple[str, Scheme], ...] = ()

    @classmethod
    def of(cls, module: nn.Module, default: str, others: Mapping[str, str] | None) -> Self:
        """From texts. SchemeError for an unknown scheme, RecipeError for a pattern that matches no submodule, or no text."""
        if not isinstance(default, str):  # a batch, or torch.ao's set of classes
            message = f"weights are said by the name of a scheme, not by a {type(default).__name__}"
            raise RecipeError(message, where=type(module).__name__, remedy='weights="int8-channel"')
        names = [name for name, _ in module.named_modules(remove_duplicate=False)]
        for pattern in others or {}:
            if not any(fnmatchcase(name, pattern) for name in names):
                remedy = f"names of layers, such as {', '.join(names[1:4])}"
                raise RecipeError("the pattern of schemes matches no submodule", where=pattern, remedy=remedy)
        parsed = tuple((pattern, Scheme.parse(text)) for pattern, text in (others or {}).items())
        return cls(Scheme.parse(default), parsed)

    def at(self, name: str) -> Scheme:
        """The scheme of a layer, by its own name or that of a module around it."""
        by_pattern = dict(self.others)
        found = pattern_of(name, by_pattern)
        return self.default if found is None else by_pattern[found]
