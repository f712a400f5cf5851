"""GGUF files as a source of weights, under transformers' parameter names; with their config and tokenizer."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
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
from bitwright.gguf.config_keys import config_of, further_blocks
from bitwright.gguf.reader import FLOATS, WEIGHTS_AT_ONCE, GgufFile, decoded, float_dtype
from bitwright.gguf.rope import COMPUTED
from bitwright.gguf.tensor_names import Names, expert_of, first_row
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.experts import one_by_one
from bitwright.models.families import model_of
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, reordered, stacked


def read_config(path: Path) -> PretrainedConfig:
    """transformers' config for a GGUF file.

    CheckpointError for a damaged file, an unknown architecture, or tensors that do not fit the keys.
    """
    return _matched(GgufFile(path)).names.config


class Matched(NamedTuple):
    """A file's model: its names; transformers' parameter name -> the file's tensor, and -> shape in transformers."""

    names: Names
    stored: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def _matched(file: GgufFile) -> Matched:
    """The model of a file.

    Shapes from the keys are compared with the tensors before any memory is allocated. CheckpointError if they differ, or for
    tensors that the architecture does not have.
    """
    factors = {name: file.read(name).float() for name in COMPUTED if name in file.tensors}
    config = config_of(file.keys, {name: t.shape for name, t in file.tensors.items()}, str(file.path), factors)
    file.check_vocabulary()
    names, stored, parameters = Names(config), dict[str, str](), _parameters(config, str(file.path))
    for parameter, shape in parameters.items():
        with suppress(FormatError):  # llama.cpp has no tensor for buffers and tied parameters
            name = names.of(parameter)
            found = file.tensors.get(name)
            if found is not None and found.shape != (meant := names.stored_shape(parameter, shape)):
                message = f"tensor {name!r} has shape {found.shape}, the keys mean {meant}"
                raise CheckpointError(message, where=str(file.path), remedy="get a good copy")
            stored |= {} if found is None else {parameter: name}
    known = {*stored.values(), *COMPUTED}
    unknown = [name for name in file.tensors if name not in known and not _is_further(name, file.keys, config)]
    if unknown:
        message = f"{len(unknown)} tensors that the architecture does not have, such as {unknown[0]}"
        raise CheckpointError(message, where=str(file.path), remedy="a file of this architecture alone")
    return Matched(names, stored, {parameter: parameters[parameter] for parameter in stored})


def _is_further(name: str, keys: Mapping[str, Any], config: PretrainedConfig) -> bool:
    """Whether a tensor is of a block of multi-token prediction, behind the last block."""
    parts = name.split(".")
    behind = parts[0] == "blk" and parts[1].isdigit() and int(parts[1]) >= config.num_hidden_layers
    return behind and further_blocks(keys) > 0


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


class GgufWeightSource:
    """The interface of `WeightSource` for a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Reads headers only. CheckpointError as `read_config`."""
        self.folder, self.config = path, None
        self.file = GgufFile(path)
        self.names, self.stored, self._shapes = _matched(self.file)
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
        found = self.file.read_rows(*self._place(name)).view(self._stored_shape(name))
        return self.names.read(name, found, self._shapes[name])

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter in the file: of its tensor, or of one expert in it."""
        shape = self.file.tensors[self.stored[name]].shape
        return shape if expert_of(name) is None else shape[1:]

    def _place(self, name: str) -> tuple[str, int, int]:
        """The tensor that holds a parameter, and its rows there, [first, last): of an expert, a part of them."""
        own = self._stored_shape(name)
        first = first_row(name, own)
        return self.stored[name], first, first + prod(own[:-1])

    def rows(self, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """An embedding for lookups: the tensor to keep in memory (perhaps blocks), and a function that dequantizes rows."""
        kind = self.file.tensors[self.stored[name]].type
        if kind in FLOATS:
            return self.read(name), lambda rows: rows
        return self.parts(name)["weight"], lambda rows: torch.from_numpy(decoded(rows.numpy(), kind, name))

    def parts(self, name: str) -> dict[str, Tensor]:
        """The ggml blocks of a weight: uint8 [N, bytes], rows in llama.cpp's order."""
        return {"weight": torch.from_numpy(self.file.rows(*self._place(name)))}

    def quantized(self, name: str) -> QTensor | None:
        """A matrix as a QTensor, rows in transformers' order; None if it is float.

        FormatError for a type that is not read here.
        """
        t = self.file.tensors[self.stored[name]]
        if t.type in FLOATS:
            return None
        blocks, some = self.file.rows(*self._place(name)), max(1, WEIGHTS_AT_ONCE // t.shape[-1])
        q = stacked([self._codes(name, blocks[start : start + some]) for start in range(0, len(blocks), some)])
        order = self.names.rows(name, len(q.codes))
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
        stored, first, last = self._place(name)
        t = self.file.tensors[stored]
        return t.type.name.lower(), (last - first) * t.row_bytes

    def scalar(self, name: str) -> Tensor | None:
        """None: GGUF files hold no scales of a KV cache."""
        return None

    def fingerprint(self) -> list[Any]:
        """Identifies the weight files, to detect that they have changed."""
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.file.files]


class FloatGgufCheckpoint:
    """A GGUF file with the interface of `Checkpoint`; tensors under transformers' names, quantized ones dequantized as read."""

    def __init__(self, path: Path, decoded_as: torch.dtype | None = None) -> None:
        """decoded_as: the dtype that quantized tensors count as; None: CheckpointError for a file that is quantized already.

        CheckpointError for a file with blocks of multi-token prediction, too.
        """
        self.weight_source, self.folder, self.decoded_as = GgufWeightSource(path), path, decoded_as
        if further_blocks(self.weight_source.file.keys):
            remedy = "--calib none or an importance matrix, and --method search, which keep them; or the checkpoint's directory"
            message = "it has blocks of multi-token prediction, which a calibrated run would lose"
            raise CheckpointError(message, where=str(path), remedy=remedy)
        self.tensors = {name: self._info(name, stored) for name, stored in self.weight_source.stored.items()}

    def _info(self, name: str, stored: str) -> TensorInfo:
        t, shape = self.weight_source.file.tensors[stored], self.weight_source.shapes[name]
        assert shape is not None
        dtype = float_dtype(t, stored, str(self.folder), self.decoded_as)
        return TensorInfo(t.file, t.offset, dtype, shape)

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
