"""Which weights an adapter was trained beside: recorded by `finetune`, compared by whatever applies the adapter."""

import hashlib
import json
from pathlib import Path
from typing import Any

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint, TensorInfo
from bitwright.files.model_path import is_gguf
from bitwright.models.adapter import BASE, Adapter
from bitwright.models.gguf_source import GgufWeightSource

SAMPLED = 4096  # bytes of each tensor that count


def weights_digest(model: Path) -> str:
    """A hash of names, types, shapes and first bytes of all tensors of a model: the same for a copy in another place."""
    summed = hashlib.sha256()
    for name, file, offset, said in sorted(_places(model)):
        with Path(file).open("rb") as stream:
            stream.seek(offset)
            summed.update(f"{name} {said}".encode() + stream.read(SAMPLED))
    return summed.hexdigest()


def _places(model: Path) -> list[tuple[str, str, int, str]]:
    """Name, file, first byte and description of every tensor."""
    if is_gguf(model):
        tensors = GgufWeightSource(model).file.tensors
        return [(name, str(t.file), t.offset, f"{t.type.name} {t.shape}") for name, t in tensors.items()]
    found: dict[str, TensorInfo] = Checkpoint(model).tensors
    return [(name, str(t.file), t.offset, f"{t.dtype} {t.shape}") for name, t in found.items()]


def base_record(model: Path, *, quantized: bool, makes_up: bool = False) -> bytes:
    """The content of `BASE` beside an adapter: what it was trained beside. quantized: whether the model's files are; makes_up:
    whether the adapter began as what their rounding lost."""
    said = {"base": str(model), "weights": weights_digest(model), "quantized": quantized}
    said |= {"makes_up": True} if makes_up else {}
    return json.dumps(said, indent=1).encode()


def check_base(adapter: Adapter, model: Path) -> tuple[str, ...]:
    """Notes on the adapter's base. CheckpointError if the adapter was trained beside other float weights than the model's.

    The base is known from what `finetune` recorded, or from a local directory that adapter_config.json names. A hub's name
    tells no weights: where it is not the model's own, that is noted.
    """
    recorded = recorded_base(adapter.folder)
    named = str(adapter.config.get("base_model_name_or_path") or "")
    own = weights_digest(model)
    if recorded is not None:
        if recorded["weights"] == own:
            return ()
        if recorded.get("makes_up"):
            message = f"the adapter makes up for the rounding of {recorded['base']}: added to other weights it is wrong"
            remedy = f"use it beside {recorded['base']}; or train one to merge, without --init residual"
            raise CheckpointError(message, where=str(adapter.folder), remedy=remedy)
        if recorded.get("quantized"):
            return (f"the adapter was trained beside {recorded['base']}, which was quantized already",)
        raise _other(adapter, model, str(recorded["base"]))
    if (Path(named) / "config.json").is_file() and any(Path(named).glob("*.safetensors")):
        if weights_digest(Path(named)) != own:
            raise _other(adapter, model, named)
        return ()
    if named and Path(named).name.lower() != model.resolve().name.lower():
        return (f"the adapter names {named} as its base: whether {model} is that cannot be told from names and shapes",)
    return ()


def recorded_base(folder: Path) -> dict[str, Any] | None:
    """What `base_record` has put beside an adapter; None if nothing. CheckpointError for a damaged file."""
    file = folder / BASE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        _ = found["weights"], found["base"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError("damaged", where=str(file), remedy="delete this file, or get a good copy") from error
    return dict(found)


def _other(adapter: Adapter, model: Path, base: str) -> CheckpointError:
    message = f"the adapter was trained beside other weights, those of {base}: {model}'s differ"
    return CheckpointError(message, where=str(adapter.folder), remedy=f"give {base}")
