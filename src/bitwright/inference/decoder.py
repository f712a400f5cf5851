"""Decoder: a causal language model with a cache of several sequences, which it reads on in one forward."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import InputError


@dataclass(frozen=True)
class Part:
    """Tokens to read behind those that a sequence holds already.

    slot    which sequence
    ids     [T], at least one
    wanted  of how many of them, the last ones, logits are wanted
    """

    slot: int
    ids: Tensor
    wanted: int = 1


class Decoder(ABC):
    """A model with keys and values of `slots` sequences, each of at most `context` tokens."""

    slots: int
    context: int

    @property
    @abstractmethod
    def goes_back(self) -> bool:
        """Whether the tokens that were read last can be taken back by `keep`: recurrent states cannot."""

    @abstractmethod
    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """Read each part behind its own sequence: logits [wanted, V] of each. No two parts of one sequence.

        InputError where a sequence grows beyond the context.
        """

    @abstractmethod
    def length(self, slot: int) -> int:
        """How many tokens a sequence holds."""

    @abstractmethod
    def keep(self, slot: int, length: int) -> int:
        """Forget a sequence's tokens from `length` on; how many it still holds: none, where the cache cannot go back so far."""

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> int:
        """Let a sequence begin with the first tokens of another, in place of what it held; as `keep`."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Forget the first sequence and read a prompt [T]: logits [V] for the token after it."""
        self.keep(0, 0)
        return self.read([Part(0, ids)])[0][0]

    def step(self, token: int) -> Tensor:
        """Read one more token of the first sequence: logits [V] for the one after it."""
        return self.read([Part(0, torch.tensor([token]))])[0][0]

    def check(self, parts: Sequence[Part]) -> None:
        """InputError where a sequence would grow beyond the context."""
        for part in parts:
            wanted = self.length(part.slot) + len(part.ids)
            if wanted > self.context:
                message = f"{wanted} tokens in a context of {self.context}"
                raise InputError(
                    message, remedy=f"give a shorter prompt, or --context {wanted} if the model reaches that far"
                )


class OneByOne(Decoder):
    """A Decoder that reads one sequence after the other, through transformers' forward."""

    @abstractmethod
    def read_one(self, part: Part) -> Tensor:
        """Read one part: logits [wanted, V]."""

    @torch.no_grad()
    def read(self, parts: Sequence[Part]) -> list[Tensor]:
        """See `Decoder`."""
        self.check(parts)
        return [self.read_one(part) for part in parts]
