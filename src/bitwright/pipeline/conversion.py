"""Convert a checkpoint to another container with the same numbers, or refuse with the reason."""

from pathlib import Path
from typing import Any

import torch

from bitwright.calibration.windows import load_tokenizer
from bitwright.errors import FormatError, InputError
from bitwright.files.checkpoint import Checkpoint, disk_errors
from bitwright.files.hub import local
from bitwright.files.model_path import is_gguf
from bitwright.formats import chosen
from bitwright.formats.gguf_members import Member
from bitwright.gguf.architectures import check_is_model
from bitwright.gguf.config_keys import not_kept
from bitwright.gguf.metadata import metadata
from bitwright.gguf.reader import GgufFile
from bitwright.gguf.tensor_names import is_unused
from bitwright.models.config import check_described, is_adapter, quantization_of, read_config
from bitwright.models.gguf_model import config_for_gguf, fit_to_gguf
from bitwright.models.skeleton import Skeleton
from bitwright.models.unread import check_all_read
from bitwright.pipeline.convert_adapter import adapter_from_gguf, adapter_to_gguf, is_gguf_adapter
from bitwright.pipeline.gguf_file import GgufModelWriter
from bitwright.pipeline.repacking import repack
from bitwright.pipeline.work_in_progress import check_out, unfinished_file
from bitwright.plan.planned_tensor import TAKEN_AS, taken_notes


def convert(model: Path, out: Path, format_name: str | None = None, *, base: Path | None = None) -> dict[str, Any]:
    """Write a checkpoint in another container: a float directory as a GGUF file, a quantized one in another format, a LoRA
    adapter of peft's as a GGUF file or the reverse.

    In a GGUF file every tensor keeps its type, but vectors are float32, as llama.cpp needs them. base: of an adapter. Gives
    {out, bytes, tensors, notes}. CheckpointError for a tensor that the model does not have; FormatError for what the other
    format cannot hold number by number; InputError for a base where it means nothing, or none where one is needed.
    """
    check_out(out)
    model = local(model)
    if is_gguf(model) and is_gguf_adapter(model) and not is_gguf(out):
        return adapter_from_gguf(model, out, base)
    chosen_format, _, _ = chosen(out, format_name, None, None)
    if model.is_dir() and is_adapter(model) and chosen_format == "gguf":
        return adapter_to_gguf(model, out, base)
    if base is not None:
        remedy = "leave out --base; or give an adapter, and OUT.gguf for one in peft's form"
        raise InputError("it is no adapter that is converted with its base", where=str(model), remedy=remedy)
    if chosen_format != "gguf":
        return repack(model, out, chosen_format)
    if is_gguf(model):
        file = GgufFile(model)
        check_is_model(file.keys, file.tensors, str(model))
        remedy = "name a directory, for what is quantized; `bitwright quantize` rounds it to other types"
        raise FormatError("a GGUF file already", where=str(model), remedy=remedy)
    if quantization_of(model) is not None:
        remedy = "quantize the float original to GGUF"
        message = "what is quantized is converted to directories alone"
        raise FormatError(message, where=str(model), remedy=remedy)
    return _directory_to_gguf(model, out)


def _directory_to_gguf(model: Path, out: Path) -> dict[str, Any]:
    """Write a float directory as a GGUF file: what `convert` gives, and its errors."""
    config = read_config(model)
    skeleton, checkpoint = Skeleton(config_for_gguf(config), torch.float32), Checkpoint(model)
    check_described(checkpoint.tensors, model)
    left = fit_to_gguf(config, checkpoint)
    skeleton.split_experts(checkpoint)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    names = skeleton.source_names(shapes, str(model))
    check_all_read(shapes, names.values(), skeleton, str(model))
    notes, tied = _left_out(set(checkpoint.tensors) - set(names.values()), skeleton), skeleton.tied_names()
    infos = {parameter: checkpoint.tensors[source] for parameter, source in names.items() if parameter not in tied}
    types = {parameter: TAKEN_AS.get(info.dtype, info.dtype) for parameter, info in infos.items()}
    members = [Member(parameter, types[parameter], tuple(info.shape)) for parameter, info in infos.items()]
    keys, said = metadata(model, skeleton.config, load_tokenizer(model), None)
    unfinished = unfinished_file(out)
    with GgufModelWriter(unfinished, keys, skeleton.config, members) as file:
        for parameter in infos:
            file.put_floats(parameter, checkpoint.read(names[parameter]).to(types[parameter]))
        file.flush()
    with disk_errors(out):
        unfinished.rename(out)
    return {
        "out": str(out),
        "bytes": out.stat().st_size,
        "tensors": len(members),
        "notes": [
            *left,
            *taken_notes(info.dtype for info in infos.values()),
            *notes,
            *said,
            *not_kept(skeleton.config),
        ],
    }


def _left_out(others: set[str], skeleton: Skeleton) -> list[str]:
    """What is said of tensors that are not written."""
    unused = [source for source in sorted(others) if is_unused(source) and not skeleton.predicts]
    return [f"{source} is left out: llama.cpp does without an encoder's pooling layer and heads" for source in unused]
