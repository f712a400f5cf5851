"""Inspect a checkpoint: shape, scheme, bytes and loss of every tensor, from headers and the ledger alone."""

from math import prod
from pathlib import Path
from typing import Any

from transformers.core_model_loading import dot_natural_key

from bitwright.evaluation.gguf_inspection import described
from bitwright.files.hub import local
from bitwright.files.model_path import is_gguf
from bitwright.gguf.architectures import instead_of_model, named
from bitwright.gguf.reader import GgufFile
from bitwright.models.config import read_config
from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import names_in, open_weights
from bitwright.pipeline.ledger import from_jsonl
from bitwright.pipeline.work_in_progress import ledger_beside


def inspect(folder: Path) -> dict[str, Any]:
    """{bytes, bits_per_weight, tensors: [{name, shape, scheme, bytes, loss}]}, one entry a tensor of the float model.

    Of a GGUF file also what `gguf_inspection.described` gives, and each tensor's block type (`type`); one of an architecture
    that is not known here, and one that is no model, has its tensors by their own names. `scheme` is the float type of a
    tensor that is not quantized; `loss` is known where a ledger is. CheckpointError for a tensor that the model lacks, or
    that it does not read.
    """
    import torch

    folder = local(folder)
    if is_gguf(folder):
        file = GgufFile(folder)
        if named(file.keys.get("general.architecture")) is None or instead_of_model(file.keys, file.tensors):
            return _by_name(file) | described(file)
    skeleton = Skeleton(read_config(folder), torch.float32)
    weight_source = open_weights(folder, skeleton)
    names_in(weight_source, skeleton)
    ledger = folder / "ledger.jsonl" if folder.is_dir() else ledger_beside(folder)
    entries = {entry.name: entry for entry in from_jsonl(ledger)} if ledger.is_file() else {}
    parameters = sum(p.numel() for p in skeleton.model.parameters())
    renamed = (
        weight_source.stored if isinstance(weight_source, GgufWeightSource) else {}
    )  # a GGUF file quantized without its model has a ledger by the file's own names
    tensors = []
    for name, shape in sorted(weight_source.shapes.items(), key=lambda item: dot_natural_key(item[0])):
        entry = entries.get(name) or entries.get(renamed.get(name, ""))
        stored, size = weight_source.describe(name)
        kind = {"type": stored} if isinstance(weight_source, GgufWeightSource) else {}
        tensors.append(
            {
                "name": name,
                "shape": list(shape or (entry.shape if entry else ())),
                "scheme": entry.scheme if entry and entry.scheme else stored,
                "bytes": size,
                "loss": entry.loss if entry else None,
                **kind,
            }
        )
    found = {"bytes": weight_source.bytes, "bits_per_weight": 8 * weight_source.bytes / parameters, "tensors": tensors}
    return found | described(weight_source.file) if isinstance(weight_source, GgufWeightSource) else found


def _by_name(file: GgufFile) -> dict[str, Any]:
    """Bytes and tensors of a file whose architecture is not known."""
    tensors = []
    for name, t in file.tensors.items():
        kind = t.type.name.lower()
        tensors.append(
            {"name": name, "shape": list(t.shape), "scheme": kind, "bytes": t.nbytes, "loss": None, "type": kind}
        )
    size, parameters = (sum(t.nbytes for t in file.tensors.values()), sum(prod(t.shape) for t in file.tensors.values()))
    return {"bytes": size, "bits_per_weight": 8 * size / max(parameters, 1), "tensors": tensors}
