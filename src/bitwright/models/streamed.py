"""Run a model over a text with one decoder block's weights in memory at a time, and compute its predictions.

A model larger than memory can thus be evaluated. Logits are computed for a few tokens at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import CheckpointError, InputError
from bitwright.gguf.input_rounding import ENGINE, EightBits, cached, inputs_of
from bitwright.models.adapter import Adapter
from bitwright.models.config import read_config
from bitwright.models.gguf_source import GgufWeightSource
from bitwright.models.kv_cache import KvCache, check_unrounded
from bitwright.models.layers import matrix_of
from bitwright.models.skeleton import TOKENS_PER_BATCH, Skeleton, batches
from bitwright.models.source import WeightSource, kv_rounding, names_in, open_weights
from bitwright.numerics.key_value_codes import KeyValueCodes
from bitwright.system.device import CPU
from bitwright.system.progress import Progress

LOGITS_AT_ONCE = 1 << 25  # float32 logits held at a time, per model


class StreamedModel:
    """A checkpoint directory or GGUF file, float or quantized, that is run block by block."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        engine: str | None = None,
        kv: KeyValueCodes | None = None,
        device: torch.device = CPU,
        adapter: Path | None = None,
    ) -> None:
        """Reads headers only. dtype, device: of the computation. engine: whose quantization of inputs to simulate; None: that
        of the checkpoint's own config. kv: keys and values rounded to it; None: as the checkpoint's own config says.
        adapter: of LoRA, added to the model's weights, quantized or not, as they are read.

        CheckpointError for a directory that is no checkpoint, or whose weights do not fit its config; InputError for an engine
        that is unknown, cannot run this file, or rounds keys and values itself where kv is given.
        """
        self.folder = folder
        self.skeleton = Skeleton(read_config(folder), dtype, device)
        self.weight_source = open_weights(folder, self.skeleton)
        self.engine, self.kv = engine, kv
        if kv is not None:
            check_unrounded(self.weight_source.config, folder)
            if engine is not None:
                raise InputError(f"{engine} keeps keys and values in its own way", remedy="leave out --kv or --engine")
        self.input_quantization = (
            self.weight_source.input_quantization
            if engine is None
            else _input_quantization_of(engine, self.weight_source)
        )
        self.names = names_in(self.weight_source, self.skeleton)
        self.adapter = None if adapter is None else Adapter(adapter)
        if self.adapter is not None:
            self.adapter.check(self.skeleton)

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes of all tensors / number of parameters, tied ones counted once."""
        return 8 * self.weight_source.bytes / sum(p.numel() for p in self.skeleton.model.parameters())

    def load(self, parameters: list[str]) -> None:
        """Read these parameters, dequantize them, and load them into the skeleton."""
        tensors = self._converted(set(parameters))
        for name in parameters:
            if name not in self.names:
                continue
            source = self.names[name]
            tensor = self.weight_source.read(source)
            if self.weight_source.is_packed(source):
                tensor = matrix_of(self.skeleton.model.get_submodule(name.removesuffix(".weight")), tensor)
            if tuple(tensor.shape) != tuple(self.skeleton.model.state_dict(keep_vars=True)[name].shape):
                raise CheckpointError(
                    f"tensor {source!r} decodes to shape {tuple(tensor.shape)}", where=str(self.folder)
                )
            tensors[name] = tensor if self.adapter is None else self.adapter.applied(self.skeleton, name, tensor)
        self.skeleton.load(tensors)

    def _converted(self, parameters: set[str]) -> dict[str, Tensor]:
        """Tensors in the files, by their own names, from which some of these parameters are computed."""
        wanted = [one for one in self.skeleton.conversions if parameters.intersection(one.makes)]
        return {name: self.weight_source.read(name) for one in wanted for name in one.sources}

    @property
    def vocabulary(self) -> int:
        """The vocabulary size V."""
        return int(self.skeleton.config.get_text_config().vocab_size)

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """The last block's output for windows of token ids [W, T], in batches [B, T, H]."""
        return self.carried(batched(ids))

    def carried(self, parts: list[Tensor], progress: Progress = lambda *_: None) -> list[Tensor]:
        """The last block's outputs [B, T, H] for batches of token ids [B, T], all of the same length T.

        progress: told of every block.
        """
        progress("block", 0, len(self.skeleton))
        self.load(self.skeleton.outer_names())
        hidden = [self.skeleton.embed(part) for part in parts]
        for index in range(len(self.skeleton)):
            self.load([*self.skeleton.state_names(index), *self.skeleton.lent_names(index)])
            names = {module: self.names.get(f"{module}.weight", "") for module in self.skeleton.linears(index)}
            input_quantizations = {module: self.input_quantization(name) for module, name in names.items()}
            with self.skeleton.quantizing_inputs(input_quantizations), self.skeleton.caching(self._cache(index)):
                for b, batch in enumerate(hidden):
                    hidden[b] = self.skeleton.run(index, batch)
            self.skeleton.unload(index)
            progress("block", index + 1, len(self.skeleton))
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] of the last block's output. Needs the parameters outside the blocks, which `carried` loads."""
        source = self.names[f"{self.skeleton.head_name}.weight"]
        with self.skeleton.quantizing_inputs({self.skeleton.output_name: self.input_quantization(source)}):
            return self.skeleton.head(hidden)

    def log_probabilities(self, hidden: list[Tensor], piece: "Piece") -> Tensor:
        """Log-probabilities of the next token, [n, V], at the positions of a piece. hidden: from `carried`."""
        return self.head(hidden[piece.batch][piece.rows, piece.at]).flatten(0, 1).log_softmax(-1)

    def _cache(self, index: int) -> KvCache | None:
        """The quantized KV cache of block `index`; None: it is in float."""
        if self.engine == ENGINE:
            return KvCache(rounding=(cached, cached))
        if self.kv is not None:
            return KvCache(rounding=(self.kv.rounded_keys, self.kv.rounded))
        name = self.skeleton.attention_name(index)
        rounding = None if name is None else kv_rounding(self.weight_source, self.skeleton, name)
        return None if rounding is None else KvCache(rounding=rounding)


def _input_quantization_of(
    engine: str, weight_source: WeightSource | GgufWeightSource
) -> Callable[[str], EightBits | None]:
    """An engine's quantization of inputs: a function from a module's weight name. InputError for an unknown engine."""
    if engine != ENGINE:
        raise InputError(f"unknown engine {engine!r}", remedy=f"{ENGINE}, or none: in float")
    if not isinstance(weight_source, GgufWeightSource):
        remedy = "give a .gguf file, or leave out --engine"
        raise InputError(f"{ENGINE} does not run directories", where=str(weight_source.folder), remedy=remedy)

    def of(name: str) -> EightBits | None:
        if not name:
            return None
        return inputs_of(weight_source.file.tensors[weight_source.stored[name]].type, weight_source.names.heads(name))

    return of


@dataclass(frozen=True)
class Piece:
    """Some predicted tokens.

    begin  number of the first of them, over the whole text
    batch  index of their batch; rows: windows in it; at: positions from which they are predicted
    """

    begin: int
    batch: int
    rows: slice
    at: slice

    def targets(self, parts: list[Tensor]) -> Tensor:
        """The tokens that are to be predicted [n]. parts: all batches of token ids [B, T]."""
        return parts[self.batch][self.rows, self.at.start + 1 : self.at.stop + 1].flatten()


def batched(ids: Tensor) -> list[Tensor]:
    """Split windows [W, T] into the batches [B, T] on which a block is run."""
    return batches(ids, TOKENS_PER_BATCH)


def pieces(parts: list[Tensor], vocabulary: int) -> Iterator[Piece]:
    """All predicted tokens of batches [B, T], in order, in pieces of at most `LOGITS_AT_ONCE` logits."""
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)  # tokens
    begin = 0
    for b, part in enumerate(parts):
        last, some = part.shape[1] - 1, max(1, at_once // part.shape[1])  # windows
        for first in range(0, len(part), some):
            for at in range(0, last, at_once):
                piece = Piece(begin, b, slice(first, first + some), slice(at, min(at + at_once, last)))
                yield piece
                begin += len(part[piece.rows]) * (piece.at.stop - at)


def surprise(log_p: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood −log p [n] of the target tokens [n], given log p [n, V]."""
    return -log_p.gather(-1, targets[:, None].to(log_p.device))[:, 0]


def float_perplexities(folder: Path, texts: Sequence[Tensor]) -> list[float]:
    """Perplexities of a checkpoint on several texts, each in windows [W, T] of the same length T ≥ 2.

    Each window is predicted without the ones before it. The weights are read once for all texts.
    """
    streamed, each = StreamedModel(folder), [batched(ids) for ids in texts]
    hidden, found = streamed.carried([part for parts in each for part in parts]), list[float]()
    for parts in each:
        own, hidden = hidden[: len(parts)], hidden[len(parts) :]
        nll = [
            surprise(streamed.log_probabilities(own, piece), piece.targets(parts))
            for piece in pieces(parts, streamed.vocabulary)
        ]
        found.append(perplexity_of(float(torch.cat(nll).double().mean())))
    return found


def perplexity_of(mean: float) -> float:
    """Perplexity exp(mean) for a mean −log p; inf where it overflows."""
    return float(torch.tensor(mean, dtype=torch.float64).exp())
