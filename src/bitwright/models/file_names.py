"""Map the tensor names in checkpoint files to a model's parameter names, by transformers' own conversion mapping.

transformers renames tensors on loading, such as `block_sparse_moe` to `mlp`. It also computes some parameters by splitting or
concatenating tensors: these are `Conversion`s. It fuses the experts of a layer; a Skeleton does not (experts.py), so an expert
in the files maps to the same expert in the Skeleton. Quantized checkpoints keep the names of the files.
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
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from bitwright.models.experts import FIRST, GATE, UP

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Conversion:
    """Parameters that transformers computes from tensors in the files, by splitting, concatenating or transposing.

    parts   (tensor in the files, pattern of transformers' mapping that it matches), in transformers' order
    makes   names of the parameters
    """

    converter: WeightConverter
    parts: tuple[tuple[str, str], ...]
    makes: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        """Names of the tensors in the files."""
        return [name for name, _ in self.parts]

    @property
    def transposition(self) -> Transpose | None:
        """What swaps the last two axes of a tensor, if the conversion does nothing else."""
        first, *rest = self.converter.operations
        return first if isinstance(first, Transpose) and not rest else None

    def transposes(self, shape: tuple[int, ...], meant: tuple[int, ...]) -> bool:
        """Whether it swaps the axes of a tensor of this shape for a parameter of shape `meant`; some files need no swap."""
        swap = self.transposition
        return swap is not None and not (swap.check_dims and shape == meant)

    def applied(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the parameters. tensors: by their names in the files. Returns them by parameter name."""
        own = deepcopy(self.converter)
        for name, pattern in self.parts:
            own.add_tensor(self.makes[0], name, pattern, tensors[name])
        made = own.convert(self.makes[0], model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


@dataclass(frozen=True)
class FileNames:
    """names: model parameter -> tensor in the files, for plain renamings; conversions: parameters that are computed."""

    names: dict[str, str]
    conversions: tuple[Conversion, ...]


def in_model(model: PreTrainedModel, files: Iterable[str], known: Iterable[str]) -> FileNames:
    """Map tensors in the files to parameters. known: names of the model's parameters (or of fused experts).

    Tensors that match no parameter are left out of the result.
    """
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
    """The names that a tensor may have in the model: as it is, without and with the base model's prefix `stem`."""
    yield from (name, name.removeprefix(f"{stem}."), f"{stem}.{name}")


def _merges(change: WeightConverter) -> bool:
    """Whether a conversion fuses the experts of a layer."""
    return any(isinstance(operation, MergeModulelist) for operation in change.operations)


def _expert(file: str, fused: str, pattern: str, change: WeightConverter) -> str:
    """The Skeleton's parameter of one expert, for a tensor `file` that transformers would merge into the parameter `fused`."""
    number = EXPERT.search(file)
    if number is None:
        return fused
    stem, _, leaf = fused.rpartition(".")
    if leaf == FIRST:
        leaf = (GATE, UP)[change.source_patterns.index(pattern)]
    return f"{stem}.{number[1]}.{leaf}.weight"


def _made(first: str, change: WeightConverter, names: set[str]) -> tuple[str, ...]:
    """All parameters that a conversion makes, derived from the name of the first."""
    patterns = change.target_patterns
    made = [first.replace(patterns[0], pattern) for pattern in patterns]
    return tuple(name for name in made if name in names) if len(patterns) > 1 else (first,)
