"""Engine: the one thread that computes. It takes jobs from a queue into slots and reads all of them on together, step by step.

In each step every sequence that is being written reads its last token (and what is proposed behind it), and prompts read as
much as is left of `TOKENS_AT_ONCE`: a long prompt does not hold up the others. What a slot's keys and values hold is kept when
its job is done: a prompt that begins with the same tokens goes on from there, in that slot or in a copy.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from time import perf_counter

from torch import Tensor

from bitwright.inference.decoder import Decoder, Part
from bitwright.serve.failures import RequestError, broken, stopping, timed_out, too_busy
from bitwright.serve.job import Job
from bitwright.serve.sequence import Sequence

TOKENS_AT_ONCE = 512
WORTH_WAITING = 32  # tokens of a prompt that another job is just reading, for which a job waits


@dataclass
class Counts:
    """What the engine has done, for /metrics."""

    prompt: int = 0
    cached: int = 0
    written: int = 0
    proposed: int = 0
    kept: int = 0
    steps: int = 0
    first_token: deque[float] = field(default_factory=partial(deque, maxlen=10_000))  # seconds, until they are reported


@dataclass(eq=False)
class Task:
    """Any other computation that must not run beside a step. done: called with what it gave, or why it failed."""

    run: Callable[[], Tensor]
    done: Callable[[Tensor | RequestError], None]
    deadline: float
    cancelled: bool = False


class Engine:
    """See above.

    decode   token ids -> text
    stop     tokens that end an answer
    most     jobs and tasks that may wait
    seconds  how long a job may take, for the message of the failure
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        decode: Callable[[list[int]], str],
        stop: frozenset[int],
        most: int,
        seconds: float,
        lookahead: int = 0,
    ) -> None:
        self.decoder, self.decode, self.stop, self.most, self.seconds = decoder, decode, stop, most, seconds
        self.lookahead = lookahead if decoder.goes_back else 0
        self.held: list[list[int]] = [[] for _ in range(decoder.slots)]  # tokens in each slot
        self.used = [0.0] * decoder.slots  # when
        self.running: list[Sequence] = []
        self.waiting: deque[Job] = deque()
        self.tasks: deque[Task] = deque()
        self.counts = Counts()
        self._changed, self._ending = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def close(self) -> None:
        """End what is left with failures, and the thread."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def add(self, jobs: list[Job]) -> None:
        """Queue jobs. RequestError 429 if the queue has no room for them, 503 if the engine ends."""
        with self._changed:
            self._admit_to_queue(len(jobs))
            self.waiting += jobs
            self._changed.notify()

    def add_task(self, task: Task) -> None:
        """Queue another computation; as `add`."""
        with self._changed:
            self._admit_to_queue(1)
            self.tasks.append(task)
            self._changed.notify()

    def _admit_to_queue(self, count: int) -> None:
        if self._ending:
            raise stopping()
        waiting, free = len(self.waiting) + len(self.tasks), self.decoder.slots - len(self.running)
        if waiting + count > self.most + max(0, free):
            raise too_busy(waiting)

    @property
    def alive(self) -> bool:
        """Whether it computes."""
        return self._thread.is_alive() and not self._ending

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # asked to end, or by a bug, whose traceback is printed: nobody is left waiting
            with self._changed:
                self._ending = True
            for job in [*(s.job for s in self.running), *self.waiting]:
                job.deliver(stopping())
            for task in self.tasks:
                task.done(stopping())

    def _turn(self) -> bool:
        """Wait for work and do one step of it; whether to go on."""
        with self._changed:
            while not (self.waiting or self.tasks or self.running or self._ending):
                self._changed.wait()
            if self._ending:
                return False
            self._drop()
            self._admit()
            task = self.tasks.popleft() if self.tasks else None
        if task is not None:
            self._compute(task)
        if self.running:
            self._step()
        return True

    def _compute(self, task: Task) -> None:
        if task.cancelled:
            return None
        if time.monotonic() > task.deadline:
            return task.done(timed_out(self.seconds))
        try:
            task.done(task.run())
        except RuntimeError as error:  # torch: the server lives on
            task.done(broken(error))
        return None

    def _drop(self) -> None:
        """Forget jobs whose client left, and end those whose time is up."""
        now = time.monotonic()
        for job in [*self.waiting, *(s.job for s in self.running)]:
            if not job.cancelled and now > job.deadline:
                job.deliver(timed_out(self.seconds))
                job.cancel()
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        for sequence in [s for s in self.running if s.job.cancelled]:
            self._release(sequence)

    def _admit(self) -> None:
        """Give free slots to jobs in the order of their coming; but one that waits for a prompt being read lets others pass."""
        for job in list(self.waiting):
            free = [slot for slot in range(self.decoder.slots) if all(s.slot != slot for s in self.running)]
            if not free:
                return
            shared = [common(held, job.prompt) for held in self.held]
            coming = max((common(s.job.prompt, job.prompt) for s in self.running if s.prefilling), default=0)
            if coming > max(shared) + WORTH_WAITING:
                continue
            self.waiting.remove(job)
            self.running.append(self._begun(job, free, shared))

    def _begun(self, job: Job, free: list[int], shared: list[int]) -> Sequence:
        """A job in a slot that holds as much of its prompt as any slot does."""
        best = max(range(len(shared)), key=lambda slot: (shared[slot], slot in free, -self.used[slot]))
        length = min(shared[best], len(job.prompt) - 1)  # one token must be read
        slot = min(free, key=lambda one: (len(self.held[one]) > 0, self.used[one]))
        if best in free and 2 * shared[best] >= len(self.held[best]):
            slot = best
        at_hand = slot == best or not length
        kept = self.decoder.keep(slot, length) if at_hand else self.decoder.copy(best, slot, length)
        self.held[slot] = job.prompt[:kept]
        self.counts.cached += kept
        return Sequence(job, slot, kept, decode=self.decode, stop=self.stop, lookahead=self.lookahead)

    def _step(self) -> None:
        """Read all running sequences on, and choose their next tokens."""
        parts = self._parts()
        begun = perf_counter()
        try:
            found = self.decoder.read([part for _, part in parts])
        except RuntimeError as error:  # torch: these jobs fail, the server lives on
            for sequence, _ in parts:
                self._fail(sequence, broken(error))
            return
        self.counts.steps += 1
        seconds = perf_counter() - begun
        for (sequence, part), logits in zip(parts, found, strict=True):
            try:
                self._advance(sequence, part, logits, seconds)
            except RequestError as failure:
                self._fail(sequence, failure)

    def _parts(self) -> list[tuple[Sequence, Part]]:
        """What is read next: a token at least of each sequence being written, then of prompts what there is room for."""
        writing = [sequence for sequence in self.running if not sequence.prefilling]
        reading = [sequence for sequence in self.running if sequence.prefilling]
        parts, room = list[tuple[Sequence, Part]](), max(TOKENS_AT_ONCE, len(writing))
        for i, sequence in enumerate([*writing, *reading]):
            left = room - max(0, len(writing) - 1 - i)
            if left:
                part = sequence.part(left)
                parts.append((sequence, part))
                room -= len(part.ids)
        return parts

    def _fail(self, sequence: Sequence, failure: RequestError) -> None:
        """End a sequence without an answer; its slot may hold anything."""
        sequence.job.deliver(failure)
        self.decoder.keep(sequence.slot, 0)
        self._release(sequence)

    def _advance(self, sequence: Sequence, part: Part, logits: Tensor, seconds: float) -> None:
        before, proposed = sequence.written, len(sequence.proposed)
        self.counts.prompt += len(part.ids) if sequence.prefilling else 0
        sequence.advance(part, logits, self.decoder, seconds)
        self.held[sequence.slot] = sequence.ids[: self.decoder.length(sequence.slot)]
        self.counts.written += sequence.written - before
        self.counts.proposed += proposed
        self.counts.kept += sequence.written - before - 1 if proposed else 0
        if before == 0 and sequence.written:
            self.counts.first_token.append(time.monotonic() - sequence.job.begun)
        if sequence.reason:
            sequence.finish()
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Free a sequence's slot; what it holds is kept for others."""
        self.running.remove(sequence)
        self.held[sequence.slot] = sequence.ids[: self.decoder.length(sequence.slot)]
        self.used[sequence.slot] = time.monotonic()


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
