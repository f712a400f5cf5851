"""The parts of a GGUF file that is split: NAME-00001-of-0000N.gguf, and the others beside it. Source: llama-gguf-split."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.errors import CheckpointError

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
NUMBER, COUNT = "split.no", "split.count"  # keys: the number of a part, from 0; how many there are


def other_parts(path: Path, parts: int) -> Iterator[Path]:
    """The second and further parts of a split model. CheckpointError if `path` is not the first, or a part is missing."""
    found = PART.search(path.name)
    if found is None or int(found[2]) != parts or int(found[1]) != 1:
        remedy = "give the first part, NAME-00001-of-0000N.gguf, beside the others"
        raise CheckpointError(f"one of {parts} parts of a split model", where=str(path), remedy=remedy)
    for number in range(2, parts + 1):
        part = path.with_name(f"{path.name[: found.start()]}-{number:05d}-of-{parts:05d}.gguf")
        if not part.is_file():
            remedy = "put all parts in one directory"
            raise CheckpointError("this part of a split model is missing", where=str(part), remedy=remedy)
        yield part


def check_part(first: Mapping[str, Any], own: Mapping[str, Any], index: int, where: str) -> None:
    """CheckpointError for a part that has another number than its name says, or belongs to another model than the first.

    first, own: the keys of both; a part has few, and those that both have are the same.
    """
    remedy = "put the parts of one model in a directory, as they were named"
    if own.get(NUMBER) != index:
        message = f"by its name part {index + 1} of a split model, by its key {NUMBER} = {own.get(NUMBER)} another"
        raise CheckpointError(message, where=where, remedy=remedy)
    for key, value in own.items():
        if key != NUMBER and key in first and not np.array_equal(value, first[key]):
            message = (
                f"a part of another model: its {key} is {str(value)[:40]!r}, that of the first {str(first[key])[:40]!r}"
            )
            raise CheckpointError(message, where=where, remedy=remedy)
