"""What quantization cost: perplexity, and KL divergence, top-1 agreement against the original.

Both models are walked block by block, as in the pipeline, so a model larger than memory can be judged; logits exist for
a few tokens at a time. A text's tokens are cut into non-overlapping windows, each predicted from its own start.
Standard errors are those of the mean over windows: tokens of one window are not independent.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.artefact import Artefact, open_artefact
from bitwright.calibration import batches, load_tokenizer, windows
from bitwright.errors import CheckpointError, InputError
from bitwright.kv import KvCache, read_rounding
from bitwright.llamacpp.artefact import GgufArtefact
from bitwright.llamacpp.engine import ENGINE, EightBits, cached, inputs_of
from bitwright.models import TOKENS_PER_BATCH, Skeleton, matrix_of, read_config
from bitwright.reference import Predictions
from bitwright.store import code_version

LOGITS_AT_ONCE = 1 << 25  # float32 logits held at a time, per model


@dataclass(frozen=True)
class Evaluation:
    """The command line's JSON. KL is KL(reference ‖ model) in nats a token; None without a reference."""

    tokens: int
    perplexity: float
    perplexity_stderr: float
    kl_mean: float | None
    kl_stderr: float | None
    kl_median: float | None
    kl_p999: float | None
    top1: float | None
    bits_per_weight: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data, keys as they are named."""
        return asdict(self)


class Walk:
    """A checkpoint directory or GGUF file, float or quantized, carried over a text block by block."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32, engine: str | None = None) -> None:
        """Reads headers. engine: whose rounding of inputs to imitate; None: what the file itself says of inputs.

        Raises CheckpointError for a directory that is not a checkpoint, or not of its config; InputError for an engine that
        is not known, or does not run this file.
        """
        self.folder = folder
        self.skeleton = Skeleton(read_config(folder), dtype)
        self.artefact = open_artefact(folder)
        self.engine = engine
        self.intake = self.artefact.intake if engine is None else _intake_of(engine, self.artefact)
        self.names = self.skeleton.source_names(self.artefact.shapes, str(folder))

    @property
    def bits_per_weight(self) -> float:
        """8 × bytes of all weight data / parameters, tied ones once."""
        return 8 * self.artefact.bytes / sum(p.numel() for p in self.skeleton.model.parameters())

    def load(self, parameters: list[str]) -> None:
        """Read and decode these parameters into the skeleton."""
        tensors = {}
        for name in parameters:
            if name not in self.names:
                continue
            source = self.names[name]
            tensor = self.artefact.read(source)
            if self.artefact.is_packed(source):
                tensor = matrix_of(self.skeleton.model.get_submodule(name.removesuffix(".weight")), tensor)
            if tuple(tensor.shape) != tuple(self.skeleton.model.state_dict(keep_vars=True)[name].shape):
                raise CheckpointError(
                    f"tensor {source!r} decodes to shape {tuple(tensor.shape)}", where=str(self.folder)
                )
            tensors[name] = tensor
        self.skeleton.load(tensors)

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """What the last block gives for windows [W, T], in batches [B, T, H]."""
        self.load(self.skeleton.outer_names())
        hidden = [self.skeleton.embed(part) for part in batches(ids, TOKENS_PER_BATCH)]
        for index in range(len(self.skeleton)):
            self.load(self.skeleton.state_names(index))
            names = {module: self.names.get(f"{module}.weight", "") for module in self.skeleton.linears(index)}
            intakes = {module: self.intake(name) for module, name in names.items()}
            with self.skeleton.taking_in(intakes), self.skeleton.caching(self._cache(index)):
                for b, batch in enumerate(hidden):
                    hidden[b] = self.skeleton.run(index, batch)
            self.skeleton.unload(index)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] of what the last block gave; `hidden` has loaded what is outside the blocks."""
        source = self.names[f"{self.skeleton.head_name}.weight"]
        with self.skeleton.taking_in({self.skeleton.output_name: self.intake(source)}):
            return self.skeleton.head(hidden)

    def _cache(self, index: int) -> KvCache | None:
        """What the engine keeps block `index`'s keys and values in; None: in float."""
        if self.engine == ENGINE:
            return KvCache(rounding=(cached, cached))
        name = self.skeleton.attention_name(index)
        config = self.artefact.config
        if name is None or config is None:
            return None
        stem = self.skeleton.model.base_model_prefix + "."
        places = (name, name.removeprefix(stem), stem + name)

        def read(scale: str) -> Tensor | None:
            found = (self.artefact.scalar(f"{place}.{scale}") for place in places)
            return next((tensor for tensor in found if tensor is not None), None)

        rounding = read_rounding(config, read, name)
        return None if rounding is None else KvCache(rounding=rounding)


def _intake_of(engine: str, artefact: Artefact | GgufArtefact) -> Callable[[str], EightBits | None]:
    """What an engine does to the inputs of the module with a weight."""
    if engine != ENGINE:
        raise InputError(f"unknown engine {engine!r}", remedy=f"{ENGINE}, or none: in float")
    if not isinstance(artefact, GgufArtefact):
        remedy = "give a .gguf file, or leave out --engine"
        raise InputError(f"{ENGINE} does not run directories", where=str(artefact.folder), remedy=remedy)
    return lambda name: inputs_of(artefact.file.tensors[artefact.stored[name]].type) if name else None


def evaluate(
    model: Path,
    *,
    reference: Path | None = None,
    text: str,
    seqlen: int = 256,
    tokens: int | None = None,
    predictions: Path | None = None,
    engine: str | None = None,
) -> Evaluation:
    """Judge a checkpoint directory on a text, beside a reference if one is given.

    seqlen       tokens in a window, at least 2; at most what the model knows positions for
    tokens       stop after so many (whole windows); None: the whole text
    predictions  a store of this reference's predictions: used if they are there, written if they are not. KL is then
                 that of its most likely tokens (see reference.py)
    engine       "llama.cpp": inputs, keys and values are rounded as that engine does it (GGUF files)
    Raises InputError for a window that does not fit or an engine that does not run the file, CalibrationError for a text
    shorter than one window.
    """
    begun = time.monotonic()
    walk = Walk(model, engine=engine)
    ids = _windows(walk, text, seqlen, tokens)
    other = Walk(reference) if reference else None
    vocabulary = walk.skeleton.config.get_text_config().vocab_size
    if other and other.skeleton.config.get_text_config().vocab_size != vocabulary:
        raise InputError("model and reference have different vocabularies", where=str(reference))
    hidden = walk.hidden(ids)
    against = _against(other, ids, predictions) if other else None
    parts = list(_judge(walk, hidden, ids, against))
    nll = torch.cat([part[0] for part in parts]).view(len(ids), -1)
    mean, stderr = _mean(nll)
    perplexity = float(torch.tensor(mean, dtype=torch.float64).exp())  # inf where a broken model is beyond all bounds
    kl = torch.cat([part[1] for part in parts]).view(len(ids), -1) if other else None
    same = torch.cat([part[2] for part in parts]) if other else None
    kl_mean, kl_stderr = _mean(kl) if kl is not None else (None, None)
    return Evaluation(
        nll.numel(), perplexity, perplexity * stderr, kl_mean, kl_stderr, _quantile(kl, 0.5), _quantile(kl, 0.999),
        None if same is None else float(same.double().mean()), walk.bits_per_weight, time.monotonic() - begun,
    )  # fmt: skip


def _windows(walk: Walk, text: str, seqlen: int, tokens: int | None) -> Tensor:
    """The text's windows [W, T]."""
    config = walk.skeleton.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or seqlen
    if not 2 <= seqlen <= limit:
        raise InputError(f"--seqlen {seqlen} is not between 2 and the model's {limit} positions")
    ids = windows(load_tokenizer(walk.folder), text, seqlen=seqlen, vocabulary=config.vocab_size)
    return ids[: max(1, tokens // seqlen)] if tokens else ids


# From the number of a token, where it is among the hidden states, and log q [n, V]: KL and top-1 agreement of each [n].
Against = Callable[["_Piece", Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Piece:
    """Some tokens: the first one's number; their batch, its windows `rows`, and positions `at` in them."""

    begin: int
    batch: int
    rows: slice
    at: slice


def _pieces(hidden: list[Tensor], vocabulary: int) -> Iterator[_Piece]:
    """All tokens that are predicted, in order; a few windows, or part of one, at a time."""
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)  # tokens
    begin = 0
    for b, states in enumerate(hidden):
        last, some = states.shape[1] - 1, max(1, at_once // states.shape[1])  # windows
        for first in range(0, len(states), some):
            for at in range(0, last, at_once):
                piece = _Piece(begin, b, slice(first, first + some), slice(at, min(at + at_once, last)))
                yield piece
                begin += len(states[piece.rows]) * (piece.at.stop - at)


def _log_probabilities(walk: Walk, hidden: list[Tensor], piece: _Piece) -> Tensor:
    """Of the next token, [n, V]."""
    return walk.head(hidden[piece.batch][piece.rows, piece.at]).flatten(0, 1).log_softmax(-1)


def _against(other: Walk, ids: Tensor, folder: Path | None) -> Against:
    """The reference's side of the judgement: from its stored predictions, or from the model itself."""
    stored = Predictions(folder, _key(other, ids)) if folder else None
    if stored is not None and stored.complete:
        return lambda piece, log_q: stored.against(piece.begin, log_q)
    hidden = other.hidden(ids)
    if stored is None:
        return lambda piece, log_q: _exact(_log_probabilities(other, hidden, piece), log_q)
    stored.begin()
    for piece in _pieces(hidden, other.skeleton.config.get_text_config().vocab_size):
        stored.write(piece.begin, _log_probabilities(other, hidden, piece))
    stored.finish(ids.numel())
    return lambda piece, log_q: stored.against(piece.begin, log_q)


def _key(other: Walk, ids: Tensor) -> str:
    """A hash of all that predictions depend on: the model, the tokens and the code."""
    model = [other.artefact.fingerprint(), other.skeleton.config.to_json_string()]
    return sha256(json.dumps([model, code_version()]).encode() + ids.numpy().tobytes()).hexdigest()


def _exact(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) over the whole vocabulary [n], and whether the top 1 agrees [n]."""
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl.clamp(min=0), log_p.argmax(-1) == log_q.argmax(-1)


def _judge(
    walk: Walk, hidden: list[Tensor], ids: Tensor, against: Against | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each token's −log p, KL(reference ‖ model), and whether the top 1 agrees; piece by piece."""
    windows_before = 0
    batch = 0
    for piece in _pieces(hidden, walk.skeleton.config.get_text_config().vocab_size):
        if piece.batch != batch:
            windows_before, batch = windows_before + len(hidden[batch]), piece.batch
        states = hidden[batch]
        targets = ids[windows_before : windows_before + len(states), 1:][piece.rows, piece.at].flatten()
        log_q = _log_probabilities(walk, hidden, piece)
        nll = -log_q.gather(-1, targets[:, None])[:, 0]
        kl, same = against(piece, log_q) if against else (nll, nll)
        yield nll, kl, same


def _mean(per_token: Tensor) -> tuple[float, float]:
    """Mean over all tokens of [W, T − 1], and its standard error from the spread of the windows' means."""
    by_window = per_token.double().mean(1)
    stderr = float(by_window.std() / math.sqrt(len(by_window))) if len(by_window) > 1 else float("nan")
    return float(by_window.mean()), stderr


def _quantile(values: Tensor | None, q: float) -> float | None:
    """The q-quantile, for any number of values."""
    if values is None:
        return None
    flat = values.flatten().sort().values
    return float(flat[min(len(flat) - 1, round(q * (len(flat) - 1)))])
