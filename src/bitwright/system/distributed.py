"""Several processes that quantize one model together, on one machine or on several, through torch.distributed.

All of them carry out the same plan, block by block, in step. Each passes its share of the calibration windows through the
model, and statistics are summed over all; each rounds its share of a matrix's rows, and all get the whole matrix. So work
and activations are divided; what is exchanged is a Gram for each input, the codes and, for a run that is resumed, the hidden
states behind each block. The first process (rank 0) draws the windows, decides which method loses less, and alone writes.

Outside `joined` there is one process, and every function here returns what it is given. Inside, all processes must call the
same ones in the same order, on their main thread.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from bitwright.errors import BitwrightError

T = TypeVar("T")
MEETING = timedelta(minutes=10)  # in which all processes must have started
PATIENCE = timedelta(hours=12)  # a process may write a large shard while the others wait

_group: dist.ProcessGroup | None = None


@contextmanager
def joined(together: bool) -> Iterator[None]:
    """Work with the other processes of torch.distributed's default group, which is made where there is none; False: alone.

    Messages pass through the CPU (gloo). BitwrightError where the processes do not find each other.
    """
    global _group  # torch.distributed's groups are the process's too
    if not together:
        yield
        return
    made = not dist.is_initialized()
    try:
        if made:
            dist.init_process_group("gloo", timeout=MEETING)
        _group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        remedy = "start every process with torchrun: docs/guide/several-machines.md"
        raise BitwrightError(f"the processes do not find each other: {error}", remedy=remedy) from None
    try:
        yield
    finally:  # the others are told by their connections' end if this one leaves early
        group, _group = _group, None
        dist.destroy_process_group(group)
        if made:
            dist.destroy_process_group()


def count() -> int:
    """How many processes work together."""
    return 1 if _group is None else dist.get_world_size(_group)


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _group is None else dist.get_rank(_group)


def share(t: Tensor) -> Tensor:
    """This process's part of t [S, ...], which all have; empty for the last ones where S is less than their number."""
    return t.tensor_split(count())[rank()]


def total(t: Tensor) -> Tensor:
    """The sum of t over all processes (all_reduce), in place; in float32 where t is of a shorter float type."""
    return _reduced(t, "SUM")


def least(t: Tensor) -> Tensor:
    """The least of each element over all processes, in place."""
    return _reduced(t, "MIN")


def most(t: Tensor) -> Tensor:
    """The largest of each element over all processes, in place."""
    return _reduced(t, "MAX")


def _reduced(t: Tensor, how: str) -> Tensor:
    if _group is None:
        return t
    here = t.detach()
    whole = here.to("cpu", torch.float32 if t.dtype in (torch.bfloat16, torch.float16) else t.dtype).contiguous()
    with _peers():
        dist.all_reduce(whole, getattr(dist.ReduceOp, how), group=_group)
    return t if whole is here else here.copy_(whole)


def everyone(value: T) -> list[T]:
    """What each process gives (all_gather), in the order of ranks."""
    if _group is None:
        return [value]
    found: list[Any] = [None] * count()
    with _peers():
        dist.all_gather_object(found, value, group=_group)
    return found


def to_first(t: Tensor) -> Tensor | None:
    """In the first process, t [S, ...] of all (gather), of any S, in the order of ranks; None in the others. All on the CPU."""
    if _group is None:
        return t
    sizes = everyone(len(t))
    if rank():
        with _peers():
            if len(t):
                dist.send(t.contiguous().view(torch.uint8), group=_group, group_dst=0)
        return None
    whole = t.new_empty(sum(sizes), *t.shape[1:])
    for sender, part in enumerate(whole.split(sizes)):
        with _peers():
            if sender == 0:
                part.copy_(t)
            elif len(part):
                dist.recv(part.view(torch.uint8), group=_group, group_src=sender)
    return whole


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes (broadcast); an error that it raises on purpose is raised in all."""
    if _group is None:
        return make()
    sent: list[Any] = [None]
    if rank() == 0:
        try:
            sent = [make()]
        except BitwrightError as error:
            sent = [_Raised(error)]
    with _peers():
        dist.broadcast_object_list(sent, group=_group, group_src=0)
    if isinstance(sent[0], _Raised):
        raise sent[0].error
    made: T = sent[0]
    return made


def on_first(make: Callable[[], T]) -> T | None:
    """What the first process makes, for itself alone; None in the others. Errors as in `from_first`."""
    kept: list[T] = []
    from_first(lambda: kept.append(make()))
    return kept[0] if kept else None


class _Raised:
    """An error on its way to the other processes."""

    def __init__(self, error: BitwrightError) -> None:
        self.error = error


@contextmanager
def _peers() -> Iterator[None]:
    """BitwrightError where another process has gone."""
    try:
        yield
    except RuntimeError as error:
        remedy = (
            "see what it printed; then start all of them again: the same command goes on from the last complete block"
        )
        raise BitwrightError(f"another process of this run has ended: {_short(error)}", remedy=remedy) from None


def _short(error: RuntimeError) -> str:
    """The first sentence of the message, without the place in torch's sources."""
    return str(error).splitlines()[0].partition("] ")[2].partition(". ")[0] or type(error).__name__
