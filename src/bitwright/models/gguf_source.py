"""GGUF files as a source of weights, under transformers' parameter names; with their config and tokenizer."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError
from bitwright.files.checkpoint import TensorInfo
from bitwright.formats.format import recovered
from bitwright.formats.ggml_scales import scales_of
from bitwright.gguf.block_types import FLOATS, Kind, decoded
from bitwright.gguf.config_keys import config_of, further_blocks
from bitwright.gguf.reader import WEIGHTS_AT_ONCE, GgufFile
from bitwright.gguf.rope import COMPUTED
from bitwright.gguf.templates import check_files, read_templates
from bitwright.gguf.tensor_names import Names
from bitwright.gguf.tensor_parts import Place, in_one
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.experts import one_by_one
from bitwright.models.families import model_of
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, reordered, stacked


def read_config(path: Path) -> PretrainedConfig:
    """transformers' config for a GGUF file.

    CheckpointError for a damaged file, an unknown architecture, or tensors that do not fit the keys.
    """
    return GgufWeightSource(path).names.config


class Matched(NamedTuple):
    """A file's model: its names; transformers' parameter name -> where it lies in the file, and -> shape in transformers."""

    names: Names
    places: dict[str, list[Place]]
    shapes: dict[str, tuple[int, ...]]


def _matched(file: GgufFile) -> Matched:
    """The model of a file.

    Shapes from the keys are compared with the tensors before any memory is allocated. CheckpointError if they differ, or for
    tensors that the architecture does not have.
    """
    factors = {name: file.read(name).float() for name in COMPUTED if name in file.tensors}
    config = config_of(file.keys, {name: t.shape for name, t in file.tensors.items()}, str(file.path), factors)
    file.check_vocabulary()
    names, places, parameters = Names(config), dict[str, list[Place]](), _parameters(config, str(file.path))
    for parameter, shape in parameters.items():
        with suppress(FormatError):  # llama.cpp has no tensor for buffers and tied parameters
            found = names.places(parameter, names.own_shape(parameter, shape))
            found = [place if place.name in file.tensors else in_one(place) for place in found]
            for place in found:
                t = file.tensors.get(place.name)
                if t is not None and t.shape != place.shape:
                    message = f"tensor {place.name!r} has shape {t.shape}, the keys mean {place.shape}"
                    raise CheckpointError(message, where=str(file.path), remedy="get a good copy")
            if all(place.name in file.tensors for place in found):
                places[parameter] = found
    known = {*(place.name for found in places.values() for place in found), *COMPUTED}
    unknown = [name for name in file.tensors if name not in known and not _is_unread(name, file.keys, config)]
    if unknown:
        message = f"{len(unknown)} tensors that the architecture does not have, such as {unknown[0]}"
        raise CheckpointError(message, where=str(file.path), remedy="a file of this architecture alone")
    return Matched(names, places, {parameter: parameters[parameter] for parameter in places})


def _is_unread(name: str, keys: Mapping[str, Any], config: PretrainedConfig) -> bool:
    """Whether a tensor is of a block of multi-token prediction, behind the last block; or of keys and values in a layer that
    takes those of an earlier one."""
    parts = name.split(".")
    if parts[0] != "blk" or not parts[1].isdigit():
        return False
    if int(parts[1]) >= config.num_hidden_layers:
        return further_blocks(keys) > 0
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return int(parts[1]) >= config.num_hidden_layers - shared and parts[2] in ("attn_k", "attn_v", "attn_k_norm")


def _parameters(config: PretrainedConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters and buffers, experts apart, from a model on the meta device.

    CheckpointError if none can be built.
    """
    try:
        with torch.device("meta"):
            model = model_of(config)
            one_by_one(model)
            return {name: tuple(t.shape) for name, t in model.state_dict().items()}
    except (RuntimeError, ValueError, TypeError, ArithmeticError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"its keys make no model: {reason}", where=where, remedy="get a good copy") from error


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a GGUF file. CheckpointError for a kind that is not read here."""
    return tokenizer_of(GgufFile(path).keys, str(path))


def check_companions(path: Path) -> None:
    """FormatError for a GGUF file whose tokenizer or chat template no directory can hold; CheckpointError as of the former."""
    check_files(read_templates(GgufFile(path).keys), str(path))
    tokenizer = read_tokenizer(path)
    try:
        tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # the tokenizers package raises no other
        message = (
            "its tokenizer joins by scores that are equal, or takes the longest token: no tokenizer.json can say so"
        )
        raise FormatError(message, where=str(path), remedy="keep it a GGUF file: give OUT.gguf") from error


class GgufWeightSource:
    """The interface of `WeightSource` for a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Reads headers only. CheckpointError as `read_config`."""
        self.folder, self.config = path, None
        self.file = GgufFile(path)
        self.file.tensors |= self.file.entries
        self.names, self.places, self._shapes = _matched(self.file)
        self.stored = {parameter: places[0].name for parameter, places in self.places.items()}
        self.notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Parameter name -> shape in transformers."""
        return {**self._shapes}

    @property
    def is_float(self) -> bool:
        """Whether no tensor is quantized."""
        return all(t.type in FLOATS for t in self.file.tensors.values())

    @property
    def bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(t.nbytes for t in self.file.tensors.values())

    def input_quantization(self, name: str) -> InputQuantization | None:
        """None: GGUF files do not specify a quantization of inputs."""
        return None

    def read(self, name: str) -> Tensor:
        """A parameter in float, in transformers' layout."""
        found = [self.file.read_rows(at, first, first + rows) for at, first, rows, _ in self.places[name]]
        whole = torch.cat(found).view(self.names.own_shape(name, self._shapes[name]))
        return self.names.read(name, whole, self._shapes[name])

    def _blocks(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a parameter's rows, in llama.cpp's order."""
        parts = [self.file.rows(at, first, first + rows) for at, first, rows, _ in self.places[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _kinds(self, name: str) -> set[Kind]:
        """The ggml types that a parameter is stored in."""
        return {self.file.tensors[place.name].type for place in self.places[name]}

    def rows(self, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """An embedding for lookups: the tensor to keep in memory (perhaps blocks), and a function that dequantizes rows."""
        kind = self.file.tensors[self.stored[name]].type
        if kind in FLOATS:
            return self.read(name), lambda rows: rows
        return self.parts(name)["weight"], lambda rows: torch.from_numpy(decoded(rows.numpy(), kind, name))

    def parts(self, name: str) -> dict[str, Tensor]:
        """The ggml blocks of a weight: uint8 [N, bytes], rows in llama.cpp's order."""
        return {"weight": torch.from_numpy(self._blocks(name))}

    def quantized(self, name: str) -> QTensor | None:
        """A matrix as a QTensor, rows in transformers' order; None if it is float, or if its parts are of several types.

        FormatError for a type that is not read here.
        """
        t = self.file.tensors[self.stored[name]]
        if t.type in FLOATS or len(self._kinds(name)) > 1:
            return None
        blocks, some = self._blocks(name), max(1, WEIGHTS_AT_ONCE // t.shape[-1])
        q = stacked([self._codes(name, blocks[start : start + some]) for start in range(0, len(blocks), some)])
        order = self.names.rows(name, len(q.codes))
        q = replace(q, order=self.names.columns(name, q.codes.shape[1]))
        return q if order is None else reordered(q, order.argsort())

    def _codes(self, name: str, blocks: NDArray[np.uint8]) -> QTensor:
        """Some rows of a quantized matrix as a QTensor; blocks: uint8 [rows, bytes]."""
        kind = self.file.tensors[self.stored[name]].type
        scheme, scales = scales_of(kind.name, torch.from_numpy(blocks), name)
        return recovered(torch.from_numpy(decoded(blocks, kind, name)), scheme, scales, name)

    def is_packed(self, name: str) -> bool:
        """False: `read` gives every tensor in the module's own orientation."""
        return False

    def describe(self, name: str) -> tuple[str, int]:
        """The ggml type of a parameter, in lower case, and its bytes."""
        kinds = "+".join(sorted(kind.name.lower() for kind in self._kinds(name)))
        return kinds, sum(place.rows * self.file.tensors[place.name].row_bytes for place in self.places[name])

    def scalar(self, name: str) -> Tensor | None:
        """None: GGUF files hold no scales of a KV cache."""
        return None

    def fingerprint(self) -> list[Any]:
        """Identifies the weight files, to detect that they have changed."""
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.file.files]


class FloatGgufCheckpoint:
    """A GGUF file with the interface of `Checkpoint`; tensors under transformers' names, quantized ones dequantized as read."""

    def __init__(self, path: Path, decoded_as: torch.dtype = torch.float32) -> None:
        """decoded_as: the dtype that quantized tensors count as. CheckpointError for blocks of multi-token prediction."""
        self.weight_source, self.folder, self.decoded_as = GgufWeightSource(path), path, decoded_as
        if further_blocks(self.weight_source.file.keys):
            remedy = "--calib none or an importance matrix, and --method search, which keep them; or the checkpoint's directory"
            message = "it has blocks of multi-token prediction, which a calibrated run would lose"
            raise CheckpointError(message, where=str(path), remedy=remedy)
        self.tensors = {name: self._info(name, stored) for name, stored in self.weight_source.stored.items()}

    def _info(self, name: str, stored: str) -> TensorInfo:
        t, shape = self.weight_source.file.tensors[stored], self.weight_source.shapes[name]
        assert shape is not None
        return TensorInfo(t.file, t.offset, FLOATS.get(t.type, self.decoded_as), shape)

    def read(self, name: str) -> Tensor:
        """One tensor in transformers' layout."""
        return self.weight_source.read(name)

    def stored_as(self, name: str) -> str:
        """The block type of a tensor in the file, such as "q4_k"; "" if it is float."""
        kind = self.weight_source.file.tensors[self.weight_source.stored[name]].type
        return "" if kind in FLOATS else kind.name.lower()

    def fingerprint(self) -> list[Any]:
        """Identifies the weight files, to detect that they have changed."""
        return self.weight_source.fingerprint()
