"""A checkpoint in another container, number by number the same; or refused, with the reason."""

from pathlib import Path
from typing import Any

import torch

from bitwright.calibration import load_tokenizer
from bitwright.checkpoint import Checkpoint, disk_errors
from bitwright.errors import FormatError
from bitwright.llamacpp import export
from bitwright.llamacpp.artefact import is_gguf
from bitwright.models import Skeleton, quantization_of, read_config
from bitwright.workplace import check_out


def convert(model: Path, out: Path) -> dict[str, Any]:
    """A float checkpoint's directory as a GGUF file, every tensor in its own type; vectors, as llama.cpp wants, in float32.

    Gives {out, bytes, tensors}. FormatError for any other way, or for a model that llama.cpp does not have.
    """
    check_out(out)
    if not is_gguf(out) or is_gguf(model) or quantization_of(model) is not None:
        remedy = (
            "MODEL a float checkpoint, OUT a name that ends in .gguf; or quantize the original to the format you need"
        )
        raise FormatError("only float checkpoints are converted yet, and only to GGUF", where=str(model), remedy=remedy)
    skeleton, checkpoint = Skeleton(read_config(model), torch.float32), Checkpoint(model)
    names = skeleton.source_names({name: info.shape for name, info in checkpoint.tensors.items()}, str(model))
    tied = skeleton.tied_names()
    pieces = [export.Piece(parameter, source, None) for parameter, source in names.items() if parameter not in tied]
    keys = export.metadata(model, skeleton.config, load_tokenizer(model), None)
    unfinished = out.with_name(out.name + ".partial")
    files = sorted({info.file for info in checkpoint.tensors.values()})
    export.write(unfinished, keys, pieces, files, skeleton.config)
    with disk_errors(out):
        unfinished.rename(out)
    return {"out": str(out), "bytes": out.stat().st_size, "tensors": len(pieces)}
