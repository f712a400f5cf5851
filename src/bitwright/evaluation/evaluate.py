"""Evaluate: perplexity, and KL divergence and top-1 agreement against the float original.

A text's tokens are cut into non-overlapping windows, each predicted from its own start. Both models are streamed block by block
over all texts at once, so that weights are read once (see models/streamed.py). Standard errors are those of the mean over
windows, since tokens of one window are not independent.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import InputError
from bitwright.evaluation.judged_text import JudgedText
from bitwright.evaluation.reference import Compared, Predictions
from bitwright.files.hub import local
from bitwright.models.streamed import Piece, StreamedModel, batched, perplexity_of, pieces, surprise
from bitwright.numerics.key_value_codes import key_value_codes
from bitwright.pipeline.statistics_store import code_version
from bitwright.system.device import CPU
from bitwright.system.progress import Progress, named


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One text's result; the JSON of `bitwright eval`. KL is KL(reference ‖ model) in nats a token; None without a reference.

    perplexity_ratio  the model's perplexity over the reference's; its standard error is that of the difference window by
                      window, far smaller than those of the two
    kl_p99, kl_p999   quantiles of KL over tokens: 99 % and 99.9 %
    top1              share of tokens whose most likely prediction is the reference's
    seconds           for all texts that were evaluated together
    notes             on what the models' files hold and is not used
    """

    text: str
    tokens: int
    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float | None = None
    reference_perplexity_stderr: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl_mean: float | None = None
    kl_stderr: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    top1: float | None = None
    bits_per_weight: float
    seconds: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, keys as they are named."""
        return asdict(self)


def evaluate(
    model: Path,
    *,
    texts: Sequence[str],
    reference: Path | None = None,
    seqlen: int = 256,
    tokens: int | None = None,
    predictions: Path | None = None,
    engine: str | None = None,
    kv: str | None = None,
    chat: bool = False,
    device: torch.device = CPU,
    adapter: Path | None = None,
    reference_adapter: Path | None = None,
    progress: Progress = lambda *_: None,
    reference_progress: Progress | None = None,
) -> list[Evaluation]:
    """Evaluate a checkpoint on each of several texts, against a reference if one is given.

    seqlen       tokens in a window: at least 2, at most the models' context
    tokens       stop after so many of each text (whole windows); None: the whole text
    predictions  a directory with this reference's predictions, written if they are missing. KL is then over the reference's
                 most likely tokens (see reference.py)
    engine       "llama.cpp": round inputs, keys and values as that engine does (GGUF files)
    kv           keys and values rounded to "q8" or "q4", of the model alone
    chat         the texts are conversations, in the model's chat template (see chat_text.py)
    device       that both models are computed on
    adapter, reference_adapter  LoRA adapters in peft's form, added to the weights of the model and of the reference
    progress     told of every block of the model
    reference_progress  told then of every block of the reference, unless its predictions are stored; None: `progress` is
    Raises InputError for a window that does not fit, a reference of another vocabulary or tokenizer, an engine that does not
    run the file, keys and values that are rounded already, a chat template that is missing; CalibrationError for a text shorter
    than one window.
    """
    begun = time.monotonic()
    if not texts:
        raise InputError("no text to judge on", remedy="name at least one")
    streamed = StreamedModel(local(model), engine=engine, kv=key_value_codes(kv), device=device, adapter=adapter)
    other = StreamedModel(local(reference), device=device, adapter=reference_adapter) if reference else None
    judged = JudgedText(texts, seqlen, tokens, chat)
    ids = judged.windows(streamed)
    if other:
        judged.check_reference(streamed, ids, other)
    parts = [batched(one) for one in ids]
    hidden = _carried(streamed, parts, progress)
    beside = reference_progress or named(progress, "the reference: ")
    against = _references(other, parts, predictions, beside) if other else [None] * len(parts)
    costs = [_costs(streamed, *one) for one in zip(hidden, parts, against, strict=True)]
    seconds = time.monotonic() - begun
    notes = tuple(f"{one.folder}: {note}" for one in (streamed, other) if one for note in one.weight_source.notes)
    found = (_evaluation(streamed, name, cost, seconds) for name, cost in zip(texts, costs, strict=True))
    return [replace(one, notes=notes) for one in found]


Against = Callable[
    [Piece, Tensor], Compared
]  # compares the model's predictions log q [n, V] of some tokens with the reference's


def _carried(streamed: StreamedModel, texts: list[list[Tensor]], progress: Progress) -> list[list[Tensor]]:
    """Each text's hidden states behind the last block. No batch holds two texts, so results do not depend on other texts."""
    hidden = iter(streamed.carried([part for parts in texts for part in parts], progress))
    return [list(islice(hidden, len(parts))) for parts in texts]


def _references(
    other: StreamedModel, texts: list[list[Tensor]], folder: Path | None, progress: Progress
) -> list[Against]:
    """The reference's predictions of each text: from the model itself, or stored ones, made where they are missing."""
    if folder is None:
        return [_exactly(other, *one) for one in zip(_carried(other, texts, progress), texts, strict=True)]
    stored = [Predictions(folder, _key(other, parts)) for parts in texts]
    new = [(one, parts) for one, parts in zip(stored, texts, strict=True) if not one.complete]
    if new:
        hidden = _carried(other, [parts for _, parts in new], progress)
        for (one, parts), states in zip(new, hidden, strict=True):
            _store(one, other, states, parts)
    return [_stored(one) for one in stored]


def _store(stored: Predictions, other: StreamedModel, hidden: list[Tensor], parts: list[Tensor]) -> None:
    """Store the reference's predictions of one text."""
    stored.begin()
    for piece in pieces(parts, other.vocabulary):
        log_p = other.log_probabilities(hidden, piece)
        stored.write(piece.begin, log_p, surprise(log_p, piece.targets(parts)))
    stored.finish(sum(part.numel() for part in parts))


def _stored(stored: Predictions) -> Against:
    return lambda piece, log_q: stored.against(piece.begin, log_q)


def _exactly(other: StreamedModel, hidden: list[Tensor], parts: list[Tensor]) -> Against:
    """KL(p ‖ q) over the whole vocabulary."""

    def compare(piece: Piece, log_q: Tensor) -> Compared:
        log_p = other.log_probabilities(hidden, piece)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        same = log_p.argmax(-1) == log_q.argmax(-1)
        return Compared(kl.clamp(min=0), same, surprise(log_p, piece.targets(parts)))

    return compare


def _key(other: StreamedModel, parts: list[Tensor]) -> str:
    """A hash of all that predictions depend on: model, windows and code."""
    ids = torch.cat(parts)
    model = [other.weight_source.fingerprint(), other.skeleton.config.to_json_string()]
    model += [] if other.adapter is None else [other.adapter.digest]
    return sha256(json.dumps([model, code_version(), ids.shape]).encode() + ids.numpy().tobytes()).hexdigest()


def _costs(
    streamed: StreamedModel, hidden: list[Tensor], parts: list[Tensor], against: Against | None
) -> tuple[Tensor, Compared | None]:
    """−log p of each token of a text, and its comparison with the reference; all [W, T − 1]."""
    nll, beside = list[Tensor](), list[Compared]()
    for piece in pieces(parts, streamed.vocabulary):
        log_q = streamed.log_probabilities(hidden, piece)
        nll.append(surprise(log_q, piece.targets(parts)).cpu())
        if against:
            beside.append(against(piece, log_q).cpu())
    count = sum(len(part) for part in parts)

    def whole(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).view(count, -1)

    if not against:
        return whole(nll), None
    kl, same, theirs = whole([c.kl for c in beside]), whole([c.same for c in beside]), whole([c.nll for c in beside])
    return whole(nll), Compared(kl, same, theirs)


def _evaluation(
    streamed: StreamedModel, text: str, costs: tuple[Tensor, Compared | None], seconds: float
) -> Evaluation:
    """Means, standard errors and quantiles over a text's tokens."""
    nll, beside = costs
    perplexity, stderr = _exponential(nll)
    found = Evaluation(
        text=text,
        tokens=nll.numel(),
        perplexity=perplexity,
        perplexity_stderr=stderr,
        bits_per_weight=streamed.bits_per_weight,
        seconds=seconds,
    )
    if beside is None:
        return found
    (theirs, theirs_stderr), (ratio, ratio_stderr) = _exponential(beside.nll), _exponential(nll - beside.nll)
    kl_mean, kl_stderr = _mean(beside.kl)
    return replace(
        found,
        reference_perplexity=theirs,
        reference_perplexity_stderr=theirs_stderr,
        perplexity_ratio=ratio,
        perplexity_ratio_stderr=ratio_stderr,
        kl_mean=kl_mean,
        kl_stderr=kl_stderr,
        kl_median=_quantile(beside.kl, 0.5),
        kl_p99=_quantile(beside.kl, 0.99),
        kl_p999=_quantile(beside.kl, 0.999),
        top1=float(beside.same.double().mean()),
    )


def _mean(per_token: Tensor) -> tuple[float, float]:
    """Mean over all tokens of [W, T − 1], and its standard error from the spread of the windows' means."""
    by_window = per_token.double().mean(1)
    stderr = float(by_window.std() / math.sqrt(len(by_window))) if len(by_window) > 1 else float("nan")
    return float(by_window.mean()), stderr


def _exponential(nll: Tensor) -> tuple[float, float]:
    """exp of the mean of [W, T − 1], and its standard error to first order."""
    mean, stderr = _mean(nll)
    found = perplexity_of(mean)
    return found, found * stderr


def _quantile(values: Tensor, q: float) -> float:
    """The q-quantile by nearest rank, for any number of values."""
    flat = values.flatten().sort().values
    return float(flat[round(q * (len(flat) - 1))])
