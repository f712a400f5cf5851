"""The files beside the weights of a directory that is made of a GGUF file: config, tokenizer with its templates, end tokens."""

import json
from pathlib import Path
from typing import Any

from bitwright.calibration.windows import load_tokenizer
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.special_tokens import ends_of
from bitwright.models.skeleton import Skeleton
from bitwright.pipeline.work_in_progress import WorkInProgress


def config_of_file(skeleton: Skeleton) -> dict[str, Any]:
    """config.json of a GGUF file's model."""
    said: dict[str, Any] = json.loads(skeleton.config.to_json_string(use_diff=False))
    return said | {"architectures": [type(skeleton.model).__name__]}


def write_companions(source: Path, skeleton: Skeleton, place: WorkInProgress) -> None:
    """Write the tokenizer's files, and generation_config.json if the file names tokens that end generation."""
    load_tokenizer(source).save_pretrained(place.result)
    ends = ends_of(GgufFile(source).keys) if skeleton.predicts else []
    if ends:
        place.write_json("generation_config.json", {"eos_token_id": ends})
