"""What a checkpoint's files call the parameters of a model: transformers renames some of them as it loads.

Its own table of renamings is applied: `block_sparse_moe` to `mlp`, say, or `language_model.model` to `model.language_model`.
Where it fuses the experts of a layer, which a skeleton does not (see experts.py), a file's expert is that expert. Other
parameters that it makes by computing, of a tensor that it cuts or several that it joins, are conversions. Results keep the
files' names, so that the same loader reads them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from bitwright.models.experts import FIRST, GATE, UP

EXPERT = re.compile(r"\.experts\.(\d+)\.")


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
class FileNames:
    """Parameter of the model -> tensor in the files, both as they are called there; and what is made by computing."""

    names: dict[str, str]
    conversions: tuple[Conversion, ...]


def in_model(model: PreTrainedModel, files: Iterable[str], known: Iterable[str]) -> FileNames:
    """What a file's tensors become. known: what the model's parameters are called, fused experts among them. A tensor that
    the model does not know is missing."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: change for change in converters for pattern in change.source_patterns}
    names, stem, found = set(known), model.base_model_prefix, dict[str, str]()
    groups: dict[str, list[tuple[str, str]]] = {}
    for file in sorted(files, key=dot_natural_key):
        renamed, pattern = rename_source_key(file, renamings, converters)
        change = None if pattern is None else by_pattern[pattern]
        if change is not None and pattern is not None and not _merges(change):
            made = next((place for place in _places(renamed, stem) if place in names), None)
            if made is not None:
                groups.setdefault(made, []).append((file, pattern))
                continue
            renamed, _ = rename_source_key(file, renamings, [])
        elif change is not None and pattern is not None:
            renamed = _expert(file, renamed, pattern, change)
        places = (*_places(renamed, stem), *_places(file, stem))
        name = next((place for place in places if place in names), None)
        if name is not None and (name not in found or name == file):
            found[name] = file
    conversions = [(by_pattern[parts[0][1]], parts, made) for made, parts in groups.items()]
    return FileNames(found, tuple(Conversion(c, tuple(parts), _made(made, c, names)) for c, parts, made in conversions))


def _places(name: str, stem: str) -> Iterator[str]:
    """What a tensor may be called in the model, whose bare model is its attribute `stem`."""
    yield from (name, name.removeprefix(f"{stem}."), f"{stem}.{name}")


def _merges(change: WeightConverter) -> bool:
    """Whether a conversion stacks the experts of a layer."""
    return any(isinstance(operation, MergeModulelist) for operation in change.operations)


def _expert(file: str, fused: str, pattern: str, change: WeightConverter) -> str:
    """The parameter of one expert, where transformers would merge it into `fused` by a pattern."""
    number = EXPERT.search(file)
    if number is None:
        return fused
    stem, _, leaf = fused.rpartition(".")
    if leaf == FIRST:
        leaf = (GATE, UP)[change.source_patterns.index(pattern)]
    return f"{stem}.{number[1]}.{leaf}.weight"


def _made(first: str, change: WeightConverter, names: set[str]) -> tuple[str, ...]:
    """All parameters that a conversion makes, told from the first."""
    patterns = change.target_patterns
    made = [first.replace(patterns[0], pattern) for pattern in patterns]
    return tuple(name for name in made if name in names) if len(patterns) > 1 else (first,)
