"""Sequence: a job in a slot of the decoder: what is read next, and what becomes of the logits."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.inference.decoder import Decoder, Part
from bitwright.inference.generation import Detokenizer
from bitwright.inference.ngrams import NgramIndex
from bitwright.serve.job import End, Job, Likely
from bitwright.serve.stops import StopFilter


class Sequence:
    """A job's tokens in one slot.

    cached   tokens of the prompt that the slot held already
    stop     tokens that end an answer
    decode   token ids -> text
    """

    def __init__(
        self,
        job: Job,
        slot: int,
        cached: int,
        *,
        decode: Callable[[list[int]], str],
        stop: frozenset[int],
        lookahead: int,
    ) -> None:
        self.job, self.slot, self.cached, self.stop, self.grammar = job, slot, cached, stop, job.grammar
        self.ids = list(job.prompt)  # all tokens, written ones too
        self.unread = job.prompt[cached:]
        self.proposed: list[int] = []
        self.seen = NgramIndex(lookahead)
        self.seen.extend(job.prompt)
        self.generator = torch.Generator().manual_seed(job.sampling.seed % 2**64)
        self.text, self.filter = Detokenizer(decode), StopFilter(job.stops)
        self.counts: Counter[int] = Counter()
        self.reason: str | None = None  # of the end

    @property
    def written(self) -> int:
        """Tokens of the answer so far, the one that ends it included."""
        return sum(self.counts.values())

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be read."""
        return not self.counts

    def part(self, room: int) -> Part:
        """What is read next, at most `room` tokens."""
        self.proposed = self.proposed[: max(0, room - len(self.unread))]
        return Part(self.slot, torch.tensor([*self.unread[:room], *self.proposed]), len(self.proposed) + 1)

    def advance(self, part: Part, logits: Tensor, decoder: Decoder, seconds: float) -> None:
        """Choose tokens from logits [wanted, V] behind a part whose reading took so long, and deliver their text."""
        self.unread = self.unread[len(part.ids) :]
        if self.unread:
            return
        chosen: list[int] = []
        for row in logits:
            chosen.append(self._chosen(row))
            self._write(chosen[-1], row)
            if self.reason or chosen != self.proposed[: len(chosen)]:
                break
        kept = len(chosen) - 1
        if self.written > len(chosen):  # the first token's reading was the prompt's
            self.seen.judged(len(self.proposed), kept, seconds)
        if self.proposed:
            decoder.keep(self.slot, decoder.length(self.slot) - len(self.proposed) + kept)
        self.seen.extend(chosen)
        self.unread = chosen[-1:]
        self.proposed = self.seen.propose(min(self.job.most - self.written - 1, self._space(decoder)))

    def _space(self, decoder: Decoder) -> int:
        return decoder.context - decoder.length(self.slot) - 1

    def _chosen(self, row: Tensor) -> int:
        logits = self.job.penalties.applied(row, self.counts)
        return self.job.sampling.pick(logits if self.grammar is None else self.grammar.masked(logits), self.generator)

    def _write(self, token: int, row: Tensor) -> None:
        """Add a token to the answer; deliver what can be."""
        self.counts[token] += 1
        if token in self.stop:
            self.reason = "stop"
            return
        self.ids.append(token)
        if self.grammar is not None and self.grammar.accept(token):
            self.reason = "stop"
        piece = self.filter.push(self.text.push(token), self._likely(token, row))
        if piece is not None:
            self.job.deliver(piece)
        if self.filter.done:
            self.reason = "stop"
        elif self.reason is None and self.written >= self.job.most:
            self.reason = "length"

    def _likely(self, token: int, row: Tensor) -> Likely | None:
        """The token's log probability, by the model's own logits."""
        if self.job.logprobs is None:
            return None
        log_p = row.log_softmax(-1)
        best, ids = log_p.topk(min(self.job.logprobs, len(log_p)))
        return Likely(token, float(log_p[token]), tuple(zip(ids.tolist(), best.tolist(), strict=True)))

    def finish(self) -> None:
        """Deliver what is left of the text, and the end."""
        left = [] if self.filter.done else [self.filter.push(self.text.rest())]
        left += [] if self.filter.done else [self.filter.rest()]
        for piece in left:
            if piece is not None:
                self.job.deliver(piece)
        self.job.deliver(End(self.reason or "stop", len(self.job.prompt), self.written, self.cached))
