"""Job: one answer that is wanted, and what the engine tells about it as it grows."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitwright.inference.sampling import Sampling
from bitwright.serve.failures import RequestError
from bitwright.serve.grammar import Grammar


@dataclass(frozen=True)
class Likely:
    """A token with its log probability, and the likeliest ones in its place."""

    id: int
    logprob: float
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that an answer goes on with, and the tokens that it ends with: with log probabilities if they were asked for."""

    text: str
    tokens: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer. reason: "stop" or "length"; cached: tokens of the prompt that had been read before."""

    reason: str
    prompt: int
    completion: int
    cached: int


Event = Piece | End | RequestError


@dataclass(frozen=True)
class Penalties:
    """What changes logits. bias: added to some tokens'; frequency, presence: taken from those of tokens written before."""

    bias: tuple[tuple[int, float], ...] = ()
    frequency: float = 0.0
    presence: float = 0.0

    def applied(self, logits: Tensor, counts: dict[int, int]) -> Tensor:
        """Logits [V] as the next token is chosen from; counts: of the tokens written so far."""
        if not self.bias and not (counts and (self.frequency or self.presence)):
            return logits
        changed = logits.clone()
        if self.bias:
            tokens, more = zip(*self.bias, strict=True)
            changed[torch.tensor(tokens)] += torch.tensor(more)
        if counts and (self.frequency or self.presence):
            written = torch.tensor(list(counts))
            changed[written] -= self.presence + self.frequency * torch.tensor(list(counts.values())).float()
        return changed


@dataclass(eq=False)
class Job:
    """One answer.

    prompt    token ids, at least one
    most      tokens to write at most, at least one
    stops     strings that end it
    logprobs  how many of the likeliest tokens are wanted beside each; None: no log probabilities
    grammar   what the answer must satisfy; None: any text
    deliver   called by the engine's thread with each event
    deadline  of time.monotonic(): after it the job ends with a failure
    """

    prompt: list[int]
    most: int
    sampling: Sampling
    deliver: Callable[[Event], None]
    deadline: float
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    penalties: Penalties = Penalties()
    begun: float = field(default_factory=time.monotonic)
    cancelled: bool = False  # set where the client left; the engine then drops the job

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True
