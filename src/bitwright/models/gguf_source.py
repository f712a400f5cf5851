"""A GGUF file as a source of float weights by transformers' names, whoever made it."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from bitwright.errors import CheckpointError, FormatError
from bitwright.files.checkpoint import TensorInfo
from bitwright.formats.format import recovered
from bitwright.formats.ggml_scales import scales_of
from bitwright.gguf.config_keys import config_of
from bitwright.gguf.reader import FLOATS, WEIGHTS_AT_ONCE, GgufFile, decoded, float_dtype
from bitwright.gguf.rope import COMPUTED
from bitwright.gguf.tensor_names import Names
from bitwright.gguf.tokenizer import tokenizer_of
from bitwright.models.families import model_of
from bitwright.numerics.input_quantization import InputQuantization
from bitwright.numerics.qtensor import QTensor, reordered, stacked


def read_config(path: Path) -> PretrainedConfig:
    """transformers' config of a file. CheckpointError for one that is damaged, of an architecture not read here, or whose
    tensors are not those that its keys mean."""
    return _matched(GgufFile(path))[0].config


def _matched(file: GgufFile) -> tuple[Names, dict[str, str]]:
    """The names of the model that a file's keys mean; transformers' name -> the file's, for all tensors.

    Nothing is built of a size that the tensors do not have: a key may say anything.
    """
    factors = {name: file.read(name).float() for name in COMPUTED if name in file.tensors}
    config = config_of(file.keys, {name: t.shape for name, t in file.tensors.items()}, str(file.path), factors)
    file.check_vocabulary()
    names, stored = Names(config), dict[str, str]()
    for parameter, shape in _parameters(config, str(file.path)).items():
        with suppress(FormatError):  # a buffer, or what is tied: llama.cpp has none
            name = names.of(parameter)
            found = file.tensors.get(name)
            if found is not None and names.shape(parameter, found.shape) != shape:
                message = f"tensor {name!r} has shape {found.shape}, the keys mean {names.shape(parameter, shape)}"
                raise CheckpointError(message, where=str(file.path), remedy="get a good copy")
            stored |= {} if found is None else {parameter: name}
    unknown = [name for name in file.tensors if name not in stored.values() and name not in COMPUTED]
    if unknown:
        message = f"{len(unknown)} tensors that the architecture does not have, such as {unknown[0]}"
        raise CheckpointError(message, where=str(file.path), remedy="a file of this architecture alone")
    return names, stored


def _parameters(config: PretrainedConfig, where: str) -> dict[str, tuple[int, ...]]:
    """All parameters of the model and their shapes, which takes no memory. CheckpointError for a config of no model."""
    try:
        with torch.device("meta"):
            return {name: tuple(t.shape) for name, t in model_of(config).state_dict().items()}
    except (RuntimeError, ValueError, TypeError, ArithmeticError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"its keys make no model: {reason}", where=where, remedy="get a good copy") from error


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a file. CheckpointError for a kind that is not read here."""
    return tokenizer_of(GgufFile(path).keys, str(path))


class GgufWeightSource:
    """See `WeightSource`: the same for a GGUF file."""

    def __init__(self, path: Path) -> None:
        """Reads headers. CheckpointError as of `read_config`, or for a tensor that its architecture does not have."""
        self.folder, self.config = path, None
        self.file = GgufFile(path)
        self.names, self.stored = _matched(self.file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Every tensor and its shape; GPT-2's matrices are transposed in the file."""
        return {p: self.names.shape(p, self.file.tensors[name].shape) for p, name in self.stored.items()}

    @property
    def is_float(self) -> bool:
        """Whether nothing in it is quantized."""
        return all(t.type in FLOATS for t in self.file.tensors.values())

    @property
    def bytes(self) -> int:
        """All weight data."""
        return sum(t.nbytes for t in self.file.tensors.values())

    def input_quantization(self, name: str) -> InputQuantization | None:
        """What the engine does to inputs: nothing that a file says."""
        return None

    def read(self, name: str) -> Tensor:
        """A tensor in float."""
        return self.names.read(name, self.file.read(self.stored[name]))

    def rows(self, name: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A table of rows as it is kept in memory, and what gives some of them in float."""
        kind = self.file.tensors[self.stored[name]].type
        if kind in FLOATS:
            return self.read(name), lambda rows: rows
        return self.parts(name)["weight"], lambda rows: torch.from_numpy(decoded(rows.numpy(), kind, name))

    def parts(self, name: str) -> dict[str, Tensor]:
        """The blocks of a weight: uint8 [N, bytes], rows as llama.cpp has them."""
        return {"weight": torch.from_numpy(self.file.rows(self.stored[name]))}

    def quantized(self, name: str) -> QTensor | None:
        """A matrix as codes and scales, rows as transformers has them; None: it is float.

        FormatError for a type that is not read, or blocks that are not codes under scales.
        """
        t = self.file.tensors[self.stored[name]]
        if t.type in FLOATS:
            return None
        blocks, some = self.file.rows(self.stored[name]), max(1, WEIGHTS_AT_ONCE // t.shape[1])
        q = stacked([self._codes(name, blocks[start : start + some]) for start in range(0, len(blocks), some)])
        order = self.names.rows(name, len(q.codes))
        return q if order is None else reordered(q, order.argsort())

    def _codes(self, name: str, blocks: NDArray[np.uint8]) -> QTensor:
        """Some rows of a quantized matrix."""
        kind = self.file.tensors[self.stored[name]].type
        scheme, scales = scales_of(kind.name, torch.from_numpy(blocks), name)
        return recovered(torch.from_numpy(decoded(blocks, kind, name)), scheme, scales, name)

    def is_packed(self, name: str) -> bool:
        """Whether `read` gives a matrix [N, K] rather than what the module holds."""
        return False

    def describe(self, name: str) -> tuple[str, int]:
        """How a tensor is stored, and its bytes."""
        t = self.file.tensors[self.stored[name]]
        return t.type.name.lower(), t.nbytes

    def scalar(self, name: str) -> Tensor | None:
        """A tensor beside the weights, such as a scale of the KV cache: there are none."""
        return None

    def fingerprint(self) -> list[Any]:
        """What changes when the weights do."""
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in self.file.files]


class FloatGgufCheckpoint:
    """A float GGUF file in the place of a `Checkpoint`: tensors by transformers' names."""

    def __init__(self, path: Path) -> None:
        """CheckpointError for a file that is quantized already."""
        self.weight_source, self.folder = GgufWeightSource(path), path
        self.tensors = {name: self._info(name, stored) for name, stored in self.weight_source.stored.items()}

    def _info(self, name: str, stored: str) -> TensorInfo:
        t = self.weight_source.file.tensors[stored]
        dtype = float_dtype(t, stored, str(self.folder))
        return TensorInfo(t.file, t.offset, dtype, self.weight_source.names.shape(name, t.shape))

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.weight_source.read(name)

    def fingerprint(self) -> list[Any]:
        """What changes when the weights do."""
        return self.weight_source.fingerprint()
