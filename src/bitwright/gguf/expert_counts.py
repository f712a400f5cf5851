"""The numbers of experts that a file's keys announce, beside those that its tensors hold."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bitwright.errors import CheckpointError
from bitwright.gguf.architectures import EXPERT_COUNT, EXPERTS_USED

MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
STACKED = "_exps.weight"  # how the names of all experts' matrices in one tensor end


def check_experts(keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """CheckpointError for a number of experts that the tensors do not hold, or that is absurd, and for a token's experts that
    are none, or more than there are. shapes: tensor -> shape."""
    name = str(keys.get("general.architecture"))
    count, used = (_number(keys, f"{name}.{key}", where) for key in (EXPERT_COUNT, EXPERTS_USED))
    other = next((t for t, shape in shapes.items() if t.endswith(STACKED) and shape[0] != count), None)
    if other is not None:
        message = f"{EXPERT_COUNT} = {count}, and tensor {other!r} holds {shapes[other][0]}"
        remedy = f"get a good copy; or gguf-set-metadata FILE {name}.{EXPERT_COUNT} N, if the tensors are right"
        raise CheckpointError(message, where=where, remedy=remedy)
    if not 0 <= count <= MOST_EXPERTS:
        message = f"{EXPERT_COUNT} = {count}, and llama.cpp takes {MOST_EXPERTS} at most"
        raise CheckpointError(message, where=where, remedy="get a good copy")
    if count and f"{name}.{EXPERTS_USED}" in keys and not 0 < used <= count:
        message = f"{EXPERTS_USED} = {used}: each token must have 1 to {count} experts, as many as there are"
        remedy = f"get a good copy; or gguf-set-metadata FILE {name}.{EXPERTS_USED} N, as the model was trained"
        raise CheckpointError(message, where=where, remedy=remedy)


def _number(keys: Mapping[str, Any], key: str, where: str) -> int:
    """An integer key, or what all entries of an array are; 0 if it is missing. CheckpointError for anything else."""
    value = keys.get(key, 0)
    found = np.unique(value) if isinstance(value, int | np.ndarray) else np.empty(0)
    if found.dtype.kind not in "iu" or found.size != 1:
        raise CheckpointError(f"{key} = {value!r} is no number", where=where, remedy="get a good copy")
    return int(found[0])
