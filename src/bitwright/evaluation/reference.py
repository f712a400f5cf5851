"""The float model's predictions on a text, on disk, so that many candidates can be evaluated without running it again.

For each token: the `TOP` most likely next tokens with their log-probabilities, the probability of all others together, and
−log p of the actual next token, for the float model's own perplexity.
KL(p ‖ q) over these TOP + 1 events is a lower bound of KL over the vocabulary (merging events never raises it); it misses
differences among unlikely tokens, which are small: see docs/log.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.errors import CheckpointError
from bitwright.files.checkpoint import Checkpoint, disk_errors, write_file, write_shard

TOP = 512


@dataclass(frozen=True)
class Compared:
    """Comparison with a reference, by token [n]: KL(reference ‖ model) in nats, top-1 agreement, the reference's −log p."""

    kl: Tensor
    same: Tensor
    nll: Tensor

    def cpu(self) -> "Compared":
        """The same on the CPU."""
        return Compared(self.kl.cpu(), self.same.cpu(), self.nll.cpu())


class Predictions:
    """The stored predictions on one text, in pieces as they were computed; complete only after `finish`."""

    def __init__(self, folder: Path, text: str) -> None:
        """text: a hash of the tokens."""
        self.folder, self.stem = folder, f"reference-{text[:16]}"

    @property
    def complete(self) -> bool:
        """Whether all pieces have been written."""
        return (self.folder / f"{self.stem}.json").is_file()

    def begin(self) -> None:
        """Make the directory."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, begin: int, log_p: Tensor, nll: Tensor) -> None:
        """Store predictions log_p [n, V] of the tokens from number `begin` on, and −log p of the actual tokens, nll [n]."""
        top = log_p.topk(min(TOP, log_p.shape[1]), dim=-1)
        tensors = {"log_p": top.values.to(torch.float32), "token": top.indices.to(torch.int32), "nll": nll}
        write_shard(self._piece(begin), {name: tensor.cpu() for name, tensor in tensors.items()})

    def finish(self, tokens: int) -> None:
        """Mark the predictions as complete."""
        write_file(self.folder / f"{self.stem}.json", json.dumps({"tokens": tokens, "top": TOP}).encode())

    def against(self, begin: int, log_q: Tensor) -> Compared:
        """Compare log_q [n, V] with the reference, for the piece that begins at token `begin`.

        CheckpointError for a piece that is missing, damaged or of another length.
        """
        piece = Checkpoint(self.folder, only=self._piece(begin))
        log_p, token = piece.read("log_p").to(log_q.device), piece.read("token").long().to(log_q.device)
        if len(log_p) != len(log_q):
            message = f"{len(log_p)} predictions for {len(log_q)} tokens"
            remedy = "delete that directory of predictions and run again"
            raise CheckpointError(message, where=str(self._piece(begin)), remedy=remedy)
        log_q_top = log_q.gather(-1, token)
        kl = (log_p.exp() * (log_p - log_q_top)).sum(-1)
        if log_p.shape[1] < log_q.shape[1]:
            rest_p, rest_q = (_rest(t) for t in (log_p, log_q_top))
            kl += rest_p * (rest_p / rest_q).log()
        return Compared(kl.clamp(min=0), token[:, 0] == log_q.argmax(-1), piece.read("nll"))

    def _piece(self, begin: int) -> Path:
        return self.folder / f"{self.stem}-{begin:09d}.safetensors"


def _rest(log_top: Tensor) -> Tensor:
    """The probability of all tokens outside the top, [n]."""
    return (1 - log_top.double().exp().sum(-1)).clamp(min=1e-12).float()
