"""What quantization cost: perplexity, and KL divergence, top-1 agreement against the original.

Both models are walked block by block (see walk.py). A text's tokens are cut into non-overlapping windows, each predicted
from its own start. Standard errors are those of the mean over windows: tokens of one window are not independent.
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

from bitwright.calibration import load_tokenizer, windows
from bitwright.errors import InputError
from bitwright.reference import Predictions
from bitwright.store import code_version
from bitwright.walk import Piece, Walk, batched, perplexity_of, pieces, surprise


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
    if other and other.vocabulary != walk.vocabulary:
        raise InputError("model and reference have different vocabularies", where=str(reference))
    hidden = walk.hidden(ids)
    against = _against(other, ids, predictions) if other else None
    parts = list(_judge(walk, hidden, ids, against))
    nll = torch.cat([part[0] for part in parts]).view(len(ids), -1)
    mean, stderr = _mean(nll)
    perplexity = perplexity_of(mean)
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
Against = Callable[[Piece, Tensor], tuple[Tensor, Tensor]]


def _against(other: Walk, ids: Tensor, folder: Path | None) -> Against:
    """The reference's side of the judgement: from its stored predictions, or from the model itself."""
    stored = Predictions(folder, _key(other, ids)) if folder else None
    if stored is not None and stored.complete:
        return lambda piece, log_q: stored.against(piece.begin, log_q)
    hidden = other.hidden(ids)
    if stored is None:
        return lambda piece, log_q: _exact(other.log_probabilities(hidden, piece), log_q)
    stored.begin()
    for piece in pieces(batched(ids), other.vocabulary):
        stored.write(piece.begin, other.log_probabilities(hidden, piece))
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
    parts = batched(ids)
    for piece in pieces(parts, walk.vocabulary):
        log_q = walk.log_probabilities(hidden, piece)
        nll = surprise(log_q, piece.targets(parts))
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
