"""Which tensor of a checkpoint becomes which parameter: by transformers' own renamings, applied as it loads.

transformers renames what older files call otherwise (`language_model.model.` where the model now has `model.language_model.`)
and writes the old names when it saves. Some tensors it makes of others: one that it cuts, or several that it joins. Results
keep the source's names, so the same loader reads them.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

ALIASES = {"embed_out.weight": "lm_head.weight"}  # what files call it where transformers has renamed it (GPT-NeoX)


@dataclass(frozen=True)
class Conversion:
    """Tensors of a file that transformers makes parameters of by computing: cutting, joining, transposing.

    parts   the file's tensors, in transformers' order, with the pattern that each matches
    makes   the parameters
    """

    converter: WeightConverter
    parts: tuple[tuple[str, str], ...]
    makes: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        """The file's tensors."""
        return [name for name, _ in self.parts]

    def applied(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by name, of the file's tensors by name."""
        own = deepcopy(self.converter)
        for name, pattern in self.parts:
            own.add_tensor(self.makes[0], name, pattern, tensors[name])
        made = own.convert(self.makes[0], model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


@dataclass(frozen=True)
class StoredNames:
    """parameter -> tensor of the file, and what is made of several or by computing."""

    names: dict[str, str]
    conversions: tuple[Conversion, ...]


def stored_names(model: PreTrainedModel, tensors: Iterable[str]) -> StoredNames:
    """Match a file's tensors, by name, with the model's parameters and persistent buffers; what matches none is left out."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    own = model.state_dict(keep_vars=True)
    names = dict[str, str]()
    groups: dict[str, list[tuple[str, str]]] = {}
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    for tensor in sorted(tensors, key=dot_natural_key):
        found, pattern = _target(tensor, renamings, converters, model.base_model_prefix, own)
        if found is None:
            continue
        if pattern is not None:
            groups.setdefault(found, []).append((tensor, pattern))
        elif found not in names or tensor == found:
            names[found] = tensor
    conversions = tuple(
        Conversion(by_pattern[parts[0][1]], tuple(parts), _made(first, by_pattern[parts[0][1]], own))
        for first, parts in groups.items()
    )
    return StoredNames(names, conversions)


def _target(
    tensor: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    prefix: str,
    own: dict[str, Tensor],
) -> tuple[str | None, str | None]:
    """The parameter that a tensor becomes, or the first that is made with it; the pattern of what makes it."""
    ways: tuple[tuple[list[WeightRenaming], list[WeightConverter]], ...]
    ways = ((renamings, converters), (renamings, []), ([], []))
    for renames, converts in ways:
        found, pattern = rename_source_key(tensor, renames, converts, prefix, own)
        if found in own:
            return found, pattern
    alias = ALIASES.get(tensor)
    return (alias if alias in own else None), None


def _made(first: str, converter: WeightTransform, own: Mapping[str, Tensor]) -> tuple[str, ...]:
    """All parameters that a converter makes, told from the first."""
    patterns = converter.target_patterns
    made = [first.replace(patterns[0], pattern) for pattern in patterns]
    return tuple(name for name in made if name in own) if len(patterns) > 1 else (first,)
