"""What a checkpoint's files call the parameters of a model: transformers renames some of them as it loads.

Its own table of renamings is applied (`block_sparse_moe` to `mlp`, say). Where it fuses the experts of a layer, which a
skeleton does not (see experts.py), a file's expert is that expert.
"""

import re
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from bitwright.models.experts import FIRST, GATE, UP

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def in_model(model: PreTrainedModel, files: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Parameter of the model -> tensor in the files; both as they are called there. known: what the model's parameters are
    called, fused experts among them. A tensor that the model does not know is missing."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    merges = [change for change in changes if isinstance(change, WeightConverter) and _merges(change)]
    names, stem = set(known), model.base_model_prefix
    found: dict[str, str] = {}
    for file in files:
        renamed, pattern = rename_source_key(file, renamings, merges)
        target = renamed if pattern is None else _expert(file, renamed, pattern, merges)
        places = (file, target, target.removeprefix(f"{stem}."), f"{stem}.{target}")
        name = next((place for place in places if place in names), None)
        if name is not None:
            found.setdefault(name, file)
    return found


def _merges(change: WeightConverter) -> bool:
    """Whether a conversion stacks the experts of a layer."""
    return any(isinstance(operation, MergeModulelist) for operation in change.operations)


def _expert(file: str, fused: str, pattern: str, merges: list[WeightConverter]) -> str:
    """The parameter of one expert, where transformers would merge it into `fused` by a pattern."""
    number = EXPERT.search(file)
    if number is None:
        return fused
    change = next(change for change in merges if pattern in change.source_patterns)
    stem, _, leaf = fused.rpartition(".")
    if leaf == FIRST:
        leaf = (GATE, UP)[change.source_patterns.index(pattern)]
    return f"{stem}.{number[1]}.{leaf}.weight"
