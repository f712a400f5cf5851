"""Inspect a checkpoint: shape, scheme, bytes and loss of every tensor, from headers and the ledger alone."""

from pathlib import Path
from typing import Any

from bitwright.files.hub import local
from bitwright.models.config import read_config
from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.skeleton import Skeleton
from bitwright.models.source import names_in, open_weights
from bitwright.pipeline.ledger import from_jsonl
from bitwright.pipeline.work_in_progress import ledger_beside


def inspect(folder: Path) -> dict[str, Any]:
    """{bytes, bits_per_weight, tensors: [{name, shape, scheme, bytes, loss}]}, one entry a tensor of the float model.

    `scheme` is the float type of a tensor that is not quantized; `loss` is known where a ledger is. CheckpointError for a
    tensor that the model lacks, or that it does not read.
    """
    import torch

    folder = local(folder)
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
    for name, shape in sorted(weight_source.shapes.items()):
        entry = entries.get(name) or entries.get(renamed.get(name, ""))
        stored, size = weight_source.describe(name)
        tensors.append(
            {
                "name": name,
                "shape": list(shape or (entry.shape if entry else ())),
                "scheme": entry.scheme if entry and entry.scheme else stored,
                "bytes": size,
                "loss": entry.loss if entry else None,
            }
        )
    return {"bytes": weight_source.bytes, "bits_per_weight": 8 * weight_source.bytes / parameters, "tensors": tensors}
